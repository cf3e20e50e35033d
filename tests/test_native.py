"""Where kernels are used, and where not: one program, the same numbers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import derivatives
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from darts_jax import native
from darts_jax.depthwise import depthwise
from darts_jax.linear import join, split
from darts_jax.mixing import mean, mean_and_variance, mix, relu
from darts_jax.pointwise import pointwise
from darts_jax.polynomial import add, inverse_root
from darts_jax.pooling import max_pool

FEW, MANY, FACTORS = (4, 5, 6, 3), (4, 5, 6, 2, 3), (2, 3)
# Functions of images and of what belongs to no image.
FUNCTIONS = {
    "depthwise": (depthwise, (FEW,), ((2, 3, 3, 3),)),
    "depthwise-many": (depthwise, (MANY,), ((2, 3, 3, 3),)),
    "pointwise": (pointwise, (MANY,), ((2, 3, 4),)),
    "mix": (lambda x, f, b: mix([x], [f], b), (MANY,), (FACTORS, FACTORS)),
    "mean": (mean, (MANY,), ()),
    "mean_and_variance": (mean_and_variance, (MANY,), ()),
    "relu": (relu, (MANY,), ()),
    "max_pool": (partial(max_pool, stride=2), (FEW,), ()),
    "add": (add, (MANY, MANY), ()),
    "inverse_root": (lambda x: inverse_root(x, 9.0), (MANY,), ()),
    "split": (lambda x: split(x, (1, x.shape[0] - 1)), (MANY,), ()),
    "join": (lambda x, y: join([x, y]), (MANY, MANY), ()),
}
each = pytest.mark.parametrize(("function", "images", "others"), FUNCTIONS.values(), ids=FUNCTIONS)
with_kernels = pytest.mark.parametrize("kernels", ["kernels"], indirect=True)
IMAGES = PartitionSpec("data")
SHARED = jax.jit(partial(max_pool, stride=1))


def arguments(images, others):
    return tuple(x.astype(jnp.float32) for x in derivatives.draw(0, *images, *others))


def program(function):
    """Value and gradients, as one function."""

    def run(*args):
        return function(*args), derivatives.gradient(function, args)(*args)

    return run


def calls(lowered):
    """How many calls of kernels a program has."""
    return lowered.as_text().count("@darts_jax_")


def mesh(*shape):
    names = ("data", "other")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@each
def test_the_form_decides_the_program(kernels, function, images, others):
    """That `kernels` has an effect, on values and on gradients."""
    args = arguments(images, others)
    value, both = (calls(jax.jit(f).lower(*args)) for f in (function, program(function)))
    if kernels == "portable":
        assert value == both == 0
    else:
        assert value >= 1
        assert both > value or function is mean  # whose gradient is a constant image


def test_the_form_decides_what_was_compiled_before(kernels):
    """What both forms call is traced again in the second."""
    traced = str(jax.make_jaxpr(SHARED)(jnp.ones(FEW)))
    assert ("pool_take" in traced) == (kernels == "kernels")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int32"])
def test_preferred(kernels, dtype, x64):
    expected = kernels == "kernels" and dtype in ("float32", "float64")
    assert native.preferred(jnp.dtype(dtype)) == expected
    x = jnp.ones((2, 4, 4, 3), dtype)
    assert calls(jax.jit(relu).lower(x)) == expected
    np.testing.assert_array_equal(relu(x), x)


@with_kernels
def test_arrays_without_elements(kernels):
    """A batch of no images is not for kernels; parts without rows, as cells join them, are."""
    empty, whole = jnp.zeros((0, 3)), jnp.ones((2, 3))
    assert calls(jax.jit(lambda *parts: join(parts)).lower(empty, whole)) == 1
    assert calls(jax.jit(lambda x: split(x, (0, 2))).lower(whole)) == 1
    assert calls(jax.jit(mean).lower(jnp.zeros((0, 4, 5, 2, 3)))) == 0


@with_kernels
@each
def test_an_exported_program_has_no_kernels(kernels, function, images, others):
    """It must run where they are not, and it gives the same."""
    args, run = arguments(images, others), jax.jit(program(function))
    assert calls(run.lower(*args)) > 0
    exported = jax.export.export(run)(*args)
    assert "@darts_jax_" not in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize())
    derivatives.close(loaded.call(*args), run(*args), 1e-5)


@with_kernels
@each
def test_a_program_for_two_devices_has_no_kernels(kernels, function, images, others):
    """XLA divides the work, and gives the same."""
    args, run = arguments(images, others), jax.jit(program(function))
    sharding = NamedSharding(mesh(2), IMAGES)
    spread = tuple(
        jax.device_put(x, sharding) if i < len(images) else x for i, x in enumerate(args)
    )
    lowered = run.lower(*spread)
    assert calls(lowered) == 0
    found = lowered.compile()(*spread)
    derivatives.close(jax.device_get(found), jax.device_get(run(*args)), 1e-5)


@with_kernels
@each
def test_kernels_of_each_device(kernels, function, images, others):
    """In `shard_map` over all axes of the mesh every device has its own images, and a kernel."""
    args = arguments(images, others)

    def each_device(devices, names):
        specs = *(IMAGES,) * len(images), *(PartitionSpec(),) * len(others)

        def own(*args):
            return jax.tree.map(lambda y: y[None], program(function)(*args))

        spread = jax.shard_map(
            own,
            mesh=devices,
            in_specs=specs,
            out_specs=IMAGES,
            check_vma=False,
            axis_names=names,
        )
        return jax.jit(spread).lower(*args)

    lowered = each_device(mesh(2), {"data"})
    assert calls(lowered) > 0
    found = lowered.compile()(*args)
    halves = [[x[i : i + 2] for x in args[: len(images)]] for i in (0, 2)]
    rows = [jax.jit(program(function))(*half, *args[len(images) :]) for half in halves]
    derivatives.close(jax.device_get(found), jax.tree.map(lambda *y: np.stack(y), *rows), 1e-5)
    # Of two axes, XLA still divides the work along the other.
    assert calls(each_device(mesh(2, 2), {"data"})) == 0
    assert calls(each_device(mesh(2, 2), {"data", "other"})) > 0


@with_kernels
def test_both_in_one_program(kernels):
    """Of equal arrays, one convolution inside of `shard_map` and one outside."""
    x, kernel = arguments((FEW,), ((2, 3, 3, 3),))
    specs = IMAGES, PartitionSpec()
    inside = jax.shard_map(
        depthwise, mesh=mesh(2), in_specs=specs, out_specs=IMAGES, check_vma=False
    )
    half = jax.device_put(x[:2], NamedSharding(mesh(2), IMAGES))
    for order in (1, -1):

        def both(x, half, order=order):
            parts = (lambda: inside(x, kernel)), (lambda: depthwise(half, kernel))
            return [part() for part in parts[::order]][::order]

        lowered = jax.jit(both).lower(x, half)
        assert calls(lowered) == 1
        whole, alone = lowered.compile()(x, half)
        derivatives.close(np.asarray(whole)[:2], np.asarray(alone), 1e-6)


def run_apart(path, name, *options):
    """The arrays of a program of `kernel_runs` in a process of its own."""
    script = Path(kernel_runs.__file__)
    environment = os.environ | {
        "PYTHONPATH": str(script.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(script), name, str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(path) as archive:
        return dict(archive)


@with_kernels
def test_without_the_package_the_network_is_the_same(kernels, x64, tmp_path):
    """Loss and gradients, of the operations of a search, in a process that cannot import it."""
    found, expected = kernel_runs.supernet(), run_apart(tmp_path / "a.npz", "supernet", "without")
    assert found.keys() == expected.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-10, atol=1e-12 * largest, err_msg=name)


@with_kernels
def test_bit_by_bit_the_same_each_time_and_by_any_number_of_threads(kernels, tmp_path):
    found = kernel_runs.primitives()
    again = kernel_runs.primitives()
    alone = run_apart(tmp_path / "a.npz", "primitives", "processors=1")
    assert found.keys() == again.keys() == alone.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
        np.testing.assert_array_equal(x, alone[name], err_msg=name)


@with_kernels
def test_many_programs_at_once(kernels):
    """Kernels share XLA's threads, and wait for each other's work: never for ever."""
    draw = partial(derivatives.draw, 0)
    x, kernel = (z.astype(jnp.float32) for z in draw((16, 16, 16, 4), (4, 3, 3, 4)))

    @jax.jit
    def chains(x, kernel):
        """Several kernels that XLA may call at the same time."""
        parts = [relu(depthwise(x + i, kernel)) for i in range(6)]
        return [mean_and_variance(part) for part in parts]

    expected = chains(x, kernel)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: chains(x, kernel), range(64)):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
