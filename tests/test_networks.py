"""The supernet against numbers recorded from the original, and its own invariants."""

import json

import jax
import jax.numpy as jnp
import layout
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from jax.flatten_util import ravel_pytree

from darts_jax import hypergradient, relaxation, search
from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.networks import Supernet

pytestmark = pytest.mark.usefixtures("optimized", "x64")

LAYERS = 5
RTOL = 1e-9


@pytest.fixture(scope="module")
def recorded(oracle_path):
    return np.load(oracle_path / "search_cnn.npz")


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry: a value near zero is a difference of larger ones."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.fixture(scope="module")
def problem(recorded, unpack):
    """Network, loss, variables and batches of the recorded search network, in float64."""
    with jax.enable_x64(True):
        network = Supernet(int(recorded["cfg/C"]), LAYERS, int(recorded["cfg/num_classes"]))

        def batch(name):
            image = jnp.asarray(recorded[f"x_{name}"].astype(np.float64).transpose(0, 2, 3, 1))
            return search.Batch(image, jnp.asarray(recorded[f"y_{name}"]))

        return {
            "network": network,
            "loss": search.make_loss(network),
            "w": layout.params(unpack(recorded, "w"), LAYERS),
            "momentum": layout.params(unpack(recorded, "mom"), LAYERS),
            "batch_stats": layout.batch_stats(unpack(recorded, "buf"), LAYERS),
            "alpha": {k: jnp.asarray(recorded[f"alpha/{k}"]) for k in ("normal", "reduce")},
            "train": batch("train"),
            "val": batch("val"),
            "batch": batch,
        }


@pytest.fixture(scope="module")
def passes(problem):
    """Value and gradients of the loss on the training and on the validation batch."""
    with jax.enable_x64(True):
        differentiate = hypergradient.value_and_grad(problem["loss"], True)

        def run(name, w=problem["w"]):
            inputs = search.Inputs(problem[name], problem["batch_stats"])
            return differentiate(w, problem["alpha"], inputs)

        return {"train": run("train"), "val": run("val")}


@pytest.mark.parametrize("name", ["train", "val"])
def test_logits_and_loss(recorded, passes, name):
    evaluation, _ = passes[name]
    close(evaluation.aux.logits, recorded[f"out/logits_{name}"])
    close(evaluation.value, recorded[f"out/loss_{name}"])


@pytest.mark.parametrize("name", ["train", "val"])
def test_gradients(recorded, passes, name, problem):
    _, (w_gradient, alpha_gradient) = passes[name]
    for cell in ("normal", "reduce"):
        close(alpha_gradient[cell], recorded[f"out/grad_{name}_alpha_{cell}"])
    norms = recorded[f"out/grad_{name}_w_norm"]
    close(optax.tree.norm(w_gradient), np.sqrt((norms**2).sum()))


@pytest.mark.parametrize("name", ["normal", "reduce"])
def test_first_order(recorded, passes, name):
    _, (_, alpha_gradient) = passes["val"]
    close(alpha_gradient[name], recorded[f"out/hyper_first_{name}"])


def test_running_statistics_after_a_batch(recorded, passes):
    prefix = "out/buf_after_one_train_forward/"
    after = {k.removeprefix(prefix): recorded[k] for k in recorded if k.startswith(prefix)}
    buffers = {str(n): np.full(1, np.nan) for n in recorded["buf_names"] if str(n) not in after}
    for name in buffers:  # channels are needed where only some norms of a cell were recorded
        shape = json.loads(str(recorded["buf_shapes"]))[list(recorded["buf_names"]).index(name)]
        buffers[name] = np.full(shape, np.nan)
    expected = jax.tree.leaves(layout.batch_stats(buffers | after, LAYERS))
    actual = jax.tree.leaves(passes["train"][0].aux.batch_stats)
    checked = 0
    for ours, theirs in zip(actual, expected, strict=True):
        known = ~np.isnan(theirs)
        np.testing.assert_allclose(np.asarray(ours)[known], theirs[known], rtol=RTOL)
        checked += known.sum()
    assert checked == sum(values.size for values in after.values())


def test_logits_by_running_statistics(recorded, problem):
    logits = jax.jit(problem["network"].apply, static_argnames="train")(
        {"params": problem["w"], "batch_stats": problem["batch_stats"]},
        problem["train"].image,
        relaxation.softmax(problem["alpha"]),
        train=False,
    )
    close(logits, recorded["out/logits_train_evalmode"])


def inner_optimizer(recorded):
    decay, momentum = recorded["cfg/weight_decay"], recorded["cfg/momentum"]
    return optax.chain(
        optax.add_decayed_weights(float(decay)),
        optax.sgd(float(recorded["cfg/xi"]), momentum=float(momentum)),
    )


def with_momentum(optimizer, problem):
    """The optimizer's initial state, but with the recorded momentum buffers."""

    def replace(node):
        if not isinstance(node, optax.TraceState):
            return node
        momentum = problem["momentum"]
        flat = isinstance(node.trace, jax.Array)
        return node._replace(trace=ravel_pytree(momentum)[0] if flat else momentum)

    state = optimizer.init(problem["w"])
    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, optax.TraceState))


def estimate(make, problem, recorded, **options):
    optimizer = inner_optimizer(recorded)
    loss = problem["loss"]
    estimator = make(hypergradient.Bilevel(loss, loss, has_aux=True), optimizer, **options)
    inputs = [search.Inputs(problem[name], problem["batch_stats"]) for name in ("train", "val")]
    state = with_momentum(optimizer, problem)
    return estimator(problem["alpha"], problem["w"], state, *inputs)


@pytest.mark.slow
def test_unrolled(recorded, problem):
    found = estimate(hypergradient.unrolled, problem, recorded)
    close(found.value, recorded["out/loss_val_unrolled"])
    close(found.aux.logits, recorded["out/logits_val_unrolled"])
    for cell in ("normal", "reduce"):
        close(found.direct[cell], recorded[f"out/direct_{cell}"])
        # The recorded product is with v = grad L_val; ours is with u = -xi v.
        xi = recorded["cfg/xi"]
        close(found.implicit[cell], -xi * recorded[f"out/hvp_exact_{cell}"])
        close(found.gradient[cell], recorded[f"out/hyper_exact_{cell}"])


def test_unrolled_weights(recorded, problem, passes, unpack):
    optimizer = inner_optimizer(recorded)
    _, (gradient, _) = passes["train"]
    state = with_momentum(optimizer, problem)
    updates, _ = optimizer.update(gradient, state, problem["w"])
    ours = optax.apply_updates(problem["w"], updates)
    prefix = "out/unrolled_w/"
    known = {k.removeprefix(prefix): recorded[k] for k in recorded if k.startswith(prefix)}
    blank = {name: np.full_like(value, np.nan) for name, value in unpack(recorded, "w").items()}
    theirs = layout.params(blank | known, LAYERS)
    checked = 0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        at = ~np.isnan(b)
        np.testing.assert_allclose(np.asarray(a)[at], np.asarray(b)[at], rtol=1e-9, atol=1e-12)
        checked += at.sum()
    assert checked == sum(value.size for value in known.values())
    moved = optax.tree.norm(updates)
    close(moved, np.sqrt((recorded["out/unrolled_delta_norm"] ** 2).sum()))


@pytest.mark.parametrize(
    ("radius", "key"),
    [pytest.param(0.01, "hvp_fd", marks=pytest.mark.slow), (1e-6, "hvp_fd_r1e-6")],
)
def test_finite_difference(recorded, problem, radius, key):
    found = estimate(hypergradient.finite_difference, problem, recorded, radius=radius)
    for cell in ("normal", "reduce"):
        expected = -recorded["cfg/xi"] * recorded[f"out/{key}_{cell}"]
        close(found.implicit[cell], expected, rtol=1e-6)
        if radius == 0.01:
            close(found.gradient[cell], recorded[f"out/hyper_fd_{cell}"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["first", "unrolled_fd"])
def test_trajectory(recorded, problem, kind):
    # The original clips the gradient of the weight step, but not that of the unrolled step.
    def optimizer(clip):
        decay, momentum = recorded["cfg/weight_decay"], recorded["cfg/momentum"]
        sgd = optax.sgd(float(recorded["traj/lr"]), momentum=float(momentum))
        return optax.flatten(optax.chain(clip, optax.add_decayed_weights(float(decay)), sgd))

    w_optimizer = optimizer(optax.clip_by_global_norm(float(recorded["traj/grad_clip"])))
    alpha_optimizer = optax.chain(
        optax.add_decayed_weights(float(recorded["traj/arch_wd"])),
        optax.adam(float(recorded["traj/arch_lr"]), b1=0.5, b2=0.999),
    )
    estimator = {
        "first": hypergradient.first_order,
        "unrolled_fd": lambda p: hypergradient.finite_difference(p, optimizer(optax.identity())),
    }[kind]
    step = search.make_step(problem["network"], estimator, w_optimizer, alpha_optimizer)
    state = search.SearchState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
        w=problem["w"],
        alpha=problem["alpha"],
        carry=problem["batch_stats"],
        w_opt_state=with_momentum(w_optimizer, problem),
        alpha_opt_state=alpha_optimizer.init(problem["alpha"]),
    )
    state = jax.device_put(state, may_alias=False)  # the step donates it, and the problem is shared
    recorded_norms = recorded[f"traj/{kind}/w_final_norm"]
    for i in range(3):
        batches = []
        for name in ("train", "val"):
            prefix = "" if i == 0 else "traj/"
            suffix = name if i == 0 else f"{name}_{i}"
            image = recorded[f"{prefix}x_{suffix}"].astype(np.float64).transpose(0, 2, 3, 1)
            label = jnp.asarray(recorded[f"{prefix}y_{suffix}"])
            batches.append(search.Batch(jnp.asarray(image), label))
        state, metrics = step(state, *batches)
        close(metrics.train_loss, recorded[f"traj/{kind}/loss"][i], rtol=1e-6)
        close(metrics.w_gradient_norm, recorded[f"traj/{kind}/gradnorm_before_clip"][i], rtol=1e-6)
        for cell in ("normal", "reduce"):
            close(state.alpha[cell], recorded[f"traj/{kind}/alpha_{cell}_{i}"], rtol=1e-6)
    close(optax.tree.norm(state.w), np.sqrt((recorded_norms**2).sum()), rtol=1e-6)


@pytest.mark.parametrize("size", ["C16_L8", "C8_L8", "C4_L5", "C4_L6"])
def test_parameter_count(oracle, size):
    channels, layers = (int(part[1:]) for part in size.split("_"))
    shape = (14, 8)
    weights = {name: jnp.zeros(shape) for name in ("normal", "reduce")}
    variables = jax.eval_shape(
        lambda: Supernet(channels, layers, 10).init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 3)), weights, train=True
        )
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == oracle("params.json")["search_cnn"][size]["params"]


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        (2, 8, "at least 3 layers.*got 2"),
        (3, 9, "9x9 do not halve"),
        (3, 10, "10x10.*multiple of 4"),
    ],
)
def test_refuses(layers, size, message):
    weights = {name: jnp.zeros((14, 8)) for name in ("normal", "reduce")}
    with pytest.raises(ValueError, match=message):
        Supernet(2, layers, 10).init(
            jax.random.key(0), jnp.zeros((1, size, size, 1)), weights, train=True
        )


@pytest.mark.parametrize(
    ("primitives", "message"),
    [
        (("none", "max_pol_3x3", *CNN_PRIMITIVES[2:]), "'max_pol_3x3'.*max_pool_3x3"),
        (CNN_PRIMITIVES[:-1], "'dil_conv_5x5'.*dil_conv_3x3"),
    ],
)
def test_refuses_an_operation_without_its_twin(primitives, message):
    weights = {name: jnp.zeros((14, len(primitives))) for name in ("normal", "reduce")}
    with pytest.raises(ValueError, match=message):
        Supernet(2, 3, 10, primitives=primitives).init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 1)), weights, train=True
        )


@pytest.mark.parametrize(
    ("nodes", "shape", "message"),
    [
        (2, (14, 8), r"'normal'\] has shape \[14, 8\]; .* of 2 nodes needs \[5 edges, 8 can"),
        (4, (14, 7), r"'normal'\] has shape \[14, 7\]; .* of 4 nodes needs \[14 edges, 8 c"),
    ],
)
def test_refuses_weights_of_another_shape(nodes, shape, message):
    weights = {name: jnp.zeros(shape) for name in ("normal", "reduce")}
    with pytest.raises(ValueError, match=message) as error:
        Supernet(2, 3, 10, nodes).init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 1)), weights, train=True
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ((("skip_connect",),) * 2, r"\['reduce'\] are of 2 edges; a cell of 2 nodes has 5"),
        ((("skip_conect",),) * 5, r"\['reduce'\] of edge 0 name 'skip_conect'.*: skip_connect"),
        (
            (*(("skip_connect",),) * 4, ("none",)),
            r"\['reduce'\] of edge 4 are \['none'\]; give it an operation",
        ),
    ],
)
def test_refuses_candidates_that_do_not_fit(held, message):
    weights = {name: jnp.zeros((5, 8)) for name in ("normal", "reduce")}
    candidates = FrozenDict(normal=(("skip_connect",),) * 5, reduce=held)
    with pytest.raises(ValueError, match=message):
        Supernet(2, 3, 10, 2, candidates=candidates).init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 1)), weights, train=True
        )


def test_reduction_weights_of_another_shape():
    weights = {"normal": jnp.zeros((14, 8)), "reduce": jnp.zeros((5, 8))}
    with pytest.raises(ValueError, match=r"weights\['reduce'\] has shape \[5, 8\]"):
        Supernet(2, 3, 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), weights, train=True)
