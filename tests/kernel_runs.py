"""What kernels compute, in a process of its own.

python tests/kernel_runs.py PROGRAM FILE [without] [processors=N]    # FILE.npz
"""

import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def supernet() -> dict[str, np.ndarray]:
    """Loss of a small network, and its gradients in weights and alpha, in float64."""
    from darts_jax import search
    from darts_jax.networks import Supernet

    network = Supernet(2, 3, 10, nodes=1)
    draw = np.random.default_rng(0).standard_normal
    images = jnp.asarray(draw((2, 8, 8, 3)))
    alpha = {kind: jnp.asarray(draw(shape)) for kind, shape in network.weight_shapes.items()}
    shapes = jax.eval_shape(lambda key: network.init(key, images, alpha, True), jax.random.key(0))
    w = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape)), shapes["params"])
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["batch_stats"])
    inputs = search.Inputs(search.Batch(images, jnp.arange(2)), stats)
    differentiate = jax.value_and_grad(search.make_loss(network), (0, 1), has_aux=True)
    (loss, _), gradients = jax.jit(differentiate)(w, alpha, inputs)
    found = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(gradients)}
    return {"loss": np.asarray(loss)} | {name: np.asarray(x) for name, x in found.items()}


def primitives() -> dict[str, np.ndarray]:
    """Values and gradients of each function, of images that many threads share."""
    from darts_jax.depthwise import depthwise
    from darts_jax.mixing import mean, mean_and_variance, mix, relu
    from darts_jax.pointwise import pointwise
    from darts_jax.pooling import max_pool

    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    few, many, factors = draw(5, 31, 33, 5), draw(5, 31, 33, 3, 5), draw(3, 5)
    calls = {
        "few": (depthwise, few, draw(3, 3, 3, 5)),
        "many": (depthwise, many, draw(3, 5, 5, 5)),
        "pointwise": (pointwise, many, draw(3, 5, 7)),
        "mix": (lambda x, f, b: mix([x], [f], b), many, factors, factors),
        "mix_few": (lambda x, f, b: mix([x], [f], b), few[..., None, :], factors, factors),
        "mean": (mean, many),
        "moments": (mean_and_variance, many),
        "relu": (relu, many),
        "pool": (lambda x: max_pool(x, 2), few),
    }
    found = {}
    for name, (function, *args) in calls.items():
        value, pullback = jax.vjp(jax.jit(function), *args)
        cotangent = jax.tree.map(lambda y: draw(*y.shape), value)
        for i, leaf in enumerate(jax.tree.leaves((value, pullback(cotangent)))):
            found[f"{name}/{i}"] = np.asarray(leaf)
    return found


PROGRAMS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "supernet": supernet,
    "primitives": primitives,
}


if __name__ == "__main__":
    program, file, *options = sys.argv[1:]
    for option in options:
        if option == "without":
            sys.modules["darts_jax_native"] = None
        else:
            count = int(option.removeprefix("processors="))
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    from darts_jax import native

    assert native.AVAILABLE == ("without" not in options)
    with jax.enable_x64(program == "supernet"):
        np.savez(file, **PROGRAMS[program]())
