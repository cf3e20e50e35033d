"""Candidate operations against recorded numbers and against their ordinary formulation."""

import itertools
import math

import jax
import jax.numpy as jnp
import layout
import numpy as np
import pytest
from jax import lax

from darts_jax import networks
from darts_jax.operations import (
    DISCRETE_OPERATIONS,
    OPERATIONS,
    Moments,
    batch_norm,
    factorized_reduce,
    moments,
    normalize,
    unbiased,
    update_running,
)

pytestmark = pytest.mark.usefixtures("kernels", "x64")

RTOL = 1e-9
TABLE = list(itertools.product(OPERATIONS, (1, 2)))
POOLS = ("max_pool_3x3", "avg_pool_3x3")
# Our parameter -> the recorded one, and its layout.
WEIGHTS = {
    "conv_1": ("conv1", layout.pointwise),
    "conv_2": ("conv2", layout.pointwise),
    "conv_1x7": ("conv_1x7", lambda w: w[:, :, 0].transpose(2, 1, 0)),
    "conv_7x1": ("conv_7x1", lambda w: w[:, :, :, 0].transpose(2, 1, 0)),
    "depthwise": ("dw", layout.depthwise),
    "pointwise": ("pw", layout.pointwise),
    "depthwise_1": ("dw1", layout.depthwise),
    "pointwise_1": ("pw1", layout.pointwise),
    "depthwise_2": ("dw2", layout.depthwise),
    "pointwise_2": ("pw2", layout.pointwise),
}


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry: a value near zero is a difference of larger ones."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def all_close(actual, expected, rtol=RTOL):
    jax.tree.map(lambda a, e: close(a, e, rtol), actual, expected)


@pytest.fixture
def recorded(oracle):
    """`recorded("sep_conv_3x3/stride1")`: that group's arrays by key, images in our layout."""

    def group(name):
        prefix = f"{name}/"
        arrays = {
            key.removeprefix(prefix): jnp.asarray(value, jnp.float64)
            for key, value in oracle("ops.npz").items()
            if key.startswith(prefix)
        }
        images = ("input", "cotangent", "output", "output_eval", "grad_input")
        return {k: v.transpose(0, 2, 3, 1) if k in images else v for k, v in arrays.items()}

    return group


def weights_of(group, names, prefix="weight."):
    return {name: WEIGHTS[name][1](group[prefix + WEIGHTS[name][0]]) for name in names}


def run(name, stride, params, x, running=None, normalized=True):
    """Output [N, H, W, K, C], and moments by norm, of params [K, ...]: batch norms included."""
    operation, seen = OPERATIONS[name], {}

    def norm(inner, y):
        batch = moments(y)
        seen[inner] = unbiased(batch, math.prod(y.shape[:3]))
        return normalize(y, batch if running is None else running[inner])

    y = operation.apply(operation.prepare(params), x, stride, norm)
    return norm("norm", y) if normalized and operation.normalized(stride) else y, seen


def single(name, stride, params, x, **options):
    stacked = jax.tree.map(lambda p: p[None], params)
    y, seen = run(name, stride, stacked, x, **options)
    assert y.shape[3] == 1
    return y[..., 0, :], jax.tree.map(lambda m: m[0], seen)


def forward_and_backward(function, params, x, cotangent):
    """Output, aux, and gradients of sum(output * cotangent) in params and x."""

    def loss(params, x):
        y, seen = function(params, x)
        return (y * cotangent).sum(), (y, seen)

    (_, (y, seen)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        params, x
    )
    return y, seen, gradients


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_7x7", "conv_7x1_1x7"])
def test_recorded_operations_of_published_cells(recorded, name, stride):
    """With scale and shift, as discrete cells have them."""
    group = recorded(f"{name}_affine/stride{stride}")
    operation = DISCRETE_OPERATIONS[name]
    params = weights_of(group, operation.shapes(4, stride))
    norms = norm_names(name)

    def affine(norm):
        return {"scale": group[f"{norms[norm]}.gamma"], "bias": group[f"{norms[norm]}.beta"]}

    def apply(params, x):
        def norm(which, y):
            return batch_norm(y, None, **affine(which))[0]

        kernels = operation.prepare(jax.tree.map(lambda p: p[None], params))
        return norm("norm", operation.apply(kernels, x, stride, norm))[..., 0, :], None

    y, _, (grad_params, grad_x) = forward_and_backward(
        apply, params, group["input"], group["cotangent"]
    )
    close(y, group["output"])
    close(grad_x, group["grad_input"])
    all_close(grad_params, weights_of(group, params, "grad.weight."))


def norm_names(name):
    """Our norms -> the recorded ones."""
    return {"norm_1": "bn1", "norm": "bn2"} if name.startswith("sep_conv") else {"norm": "bn"}


def moments_of(group, norm, prefix=""):
    return Moments(*(group[f"{prefix}{norm}.running_{kind}"] for kind in ("mean", "var")))


@pytest.mark.parametrize(("name", "stride"), TABLE)
def test_recorded(recorded, name, stride):
    group = recorded(f"{name}{'_bn' if name in POOLS else ''}/stride{stride}")
    names = OPERATIONS[name].shapes(4, stride)
    params = weights_of(group, names)
    assert {k: v.shape for k, v in params.items()} == names
    y, seen, (grad_params, grad_x) = forward_and_backward(
        lambda params, x: single(name, stride, params, x),
        params,
        group["input"],
        group["cotangent"],
    )
    close(y, group["output"])
    close(grad_x, group["grad_input"])
    all_close(grad_params, weights_of(group, names, "grad.weight."))

    norms = norm_names(name) if OPERATIONS[name].normalized(stride) else {}
    assert set(seen) == set(norms)
    running = {ours: moments_of(group, theirs) for ours, theirs in norms.items()}
    for ours, theirs in norms.items():
        all_close(update_running(running[ours], seen[ours]), moments_of(group, theirs, "after."))
    y, _ = single(name, stride, params, group["input"], running=running)
    close(y, group["output_eval"])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", POOLS)
def test_recorded_pools_without_norm(recorded, name, stride):
    group = recorded(f"{name}/stride{stride}")
    y, _, (_, grad_x) = forward_and_backward(
        lambda params, x: single(name, stride, params, x, normalized=False),
        {},
        group["input"],
        group["cotangent"],
    )
    close(y, group["output"])
    close(grad_x, group["grad_input"])


@pytest.mark.parametrize(
    ("module", "key", "leaves"),
    [
        (networks.ReluConvNorm(6), "ReLUConvBN", {"kernel": "conv"}),
        (networks.FactorizedReduce(6), "FactorizedReduce", {"conv_1": "conv1", "conv_2": "conv2"}),
    ],
    ids=["ReluConvNorm", "FactorizedReduce"],
)
def test_recorded_preprocessing(recorded, module, key, leaves):
    group = recorded(f"{key}/cin4_cout6")

    def weights(prefix):
        return {ours: layout.pointwise(group[prefix + theirs]) for ours, theirs in leaves.items()}

    running = {"Norm_0": {"moments": moments_of(group, "bn")}}

    def train(params, x):
        variables = {"params": params, "batch_stats": running}
        y, updated = module.apply(variables, x, True, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    y, after, (grad_params, grad_x) = forward_and_backward(
        train, weights("weight."), group["input"], group["cotangent"]
    )
    close(y, group["output"])
    close(grad_x, group["grad_input"])
    all_close(grad_params, weights("grad.weight."))
    all_close(after, {"Norm_0": {"moments": moments_of(group, "bn", "after.")}})
    variables = {"params": weights("weight."), "batch_stats": running}
    close(module.apply(variables, group["input"], False), group["output_eval"])


# The ordinary formulation: one edge at a time, XLA's own windows and grouped convolutions.


def ordinary_max_pool(params, x, stride, norm):
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, sides)


def ordinary_avg_pool(params, x, stride, norm):
    def window_sum(y):
        window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
        sides = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(y, 0.0, lax.add, window, strides, sides)

    return window_sum(x) / window_sum(jnp.ones_like(x))


def ordinary_skip_connect(params, x, stride, norm):
    if stride == 1:
        return x
    x = jax.nn.relu(x)
    shifted = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
    halves = [
        grouped(part, params[name][None, None], stride, 0)
        for part, name in ((x, "conv_1"), (shifted, "conv_2"))
    ]
    return jnp.concatenate(halves, -1)


def grouped(x, kernel, stride, padding, dilation=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def separable(x, depthwise, pointwise, stride, padding, dilation=1):
    x = jax.nn.relu(x)
    y = grouped(x, depthwise[:, :, None], stride, padding, dilation, groups=x.shape[-1])
    return grouped(y, pointwise[None, None], 1, 0)


def ordinary_sep_conv(params, x, stride, norm):
    padding = params["depthwise_1"].shape[0] // 2
    y = separable(x, params["depthwise_1"], params["pointwise_1"], stride, padding)
    y = norm("norm_1", y)
    return separable(y, params["depthwise_2"], params["pointwise_2"], 1, padding)


def ordinary_dil_conv(params, x, stride, norm):
    depthwise = params["depthwise"]
    padding = depthwise.shape[0] - 1
    return separable(x, depthwise, params["pointwise"], stride, padding, dilation=2)


ORDINARY = {
    "max_pool_3x3": ordinary_max_pool,
    "avg_pool_3x3": ordinary_avg_pool,
    "skip_connect": ordinary_skip_connect,
    "sep_conv_3x3": ordinary_sep_conv,
    "sep_conv_5x5": ordinary_sep_conv,
    "dil_conv_3x3": ordinary_dil_conv,
    "dil_conv_5x5": ordinary_dil_conv,
}


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def draw_params(name, channels, stride, num_edges=None):
    lead = () if num_edges is None else (num_edges,)
    shapes = OPERATIONS[name].shapes(channels, stride)
    return {leaf: draw(i, (*lead, *shape)) for i, (leaf, shape) in enumerate(shapes.items())}


def against_ordinary(name, stride, params, x, rtol=1e-11):
    def ordinary(params, x):
        return ORDINARY[name](params, x, stride, lambda _, y: normalize(y, moments(y))), None

    def ours(params, x):
        return single(name, stride, params, x, normalized=False)[0], None

    cotangent = draw(9, jax.eval_shape(ordinary, params, x)[0].shape)
    for function, found in ((ordinary, expected := []), (ours, actual := [])):
        y, _, gradients = forward_and_backward(function, params, x, cotangent)
        found += [y, gradients]
    all_close(actual, expected, rtol)


@pytest.mark.parametrize(("name", "stride"), TABLE)
def test_ordinary_formulation(name, stride):
    channels = 3
    params = draw_params(name, channels, stride)
    against_ordinary(name, stride, params, draw(7, (2, 6, 8, channels)))


TIES = {
    "integers": lambda: jnp.floor(2 * draw(3, (2, 8, 6, 3))),
    "binary": lambda: (draw(4, (2, 8, 8, 3)) > 0).astype(jnp.float64),
    "constant": lambda: jnp.full((1, 6, 6, 1), -2.0),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("image", TIES)
def test_max_pool_ties(image, stride):
    """A tie's gradient goes where that of `reduce_window` goes: to one pixel, never shared."""
    against_ordinary("max_pool_3x3", stride, {}, TIES[image]())


@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_tie_goes_to_the_first_pixel(stride):
    """Of a window in row-major order, as in PyTorch."""

    def total(x):
        return single("max_pool_3x3", stride, {}, x, normalized=False)[0].sum()

    gradient = jax.grad(total)(jnp.zeros((1, 4, 4, 1)))[0, :, :, 0]
    expected = {
        1: [[4, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]],
        2: [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    }
    np.testing.assert_array_equal(gradient, expected[stride])


@pytest.mark.parametrize("size", [(2, 2), (2, 6), (4, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", POOLS)
def test_pools_of_small_images(name, stride, size):
    against_ordinary(name, stride, {}, draw(5, (1, *size, 2)))


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 2)])
def test_pools_of_odd_images(name, size):
    against_ordinary(name, 1, {}, draw(6, (1, *size, 2)))


def test_average_leaves_the_padding_out():
    y, _ = single("avg_pool_3x3", 1, {}, jnp.ones((1, 4, 4, 1)), normalized=False)
    np.testing.assert_allclose(y, 1, rtol=1e-15)


@pytest.mark.parametrize(("name", "stride"), TABLE)
def test_many_edges_equal_single_ones(name, stride):
    """Value and all gradients of K stacked edges are those of K separate ones."""
    channels, num_edges = 3, 2
    params = draw_params(name, channels, stride, num_edges)
    x = draw(7, (2, 6, 6, channels))
    cotangent = draw(8, (2, 6 // stride, 6 // stride, num_edges, channels))

    def together(params, x):
        y, _ = run(name, stride, params, x)
        return jnp.broadcast_to(y, cotangent.shape), None

    def apart(params, x):
        edges = [jax.tree.map(lambda p, i=i: p[i], params) for i in range(num_edges)]
        return jnp.stack([single(name, stride, edge, x)[0] for edge in edges], 3), None

    results = [forward_and_backward(f, params, x, cotangent) for f in (together, apart)]
    if params:  # the edges differ, or a mix-up of them would go unnoticed
        assert np.abs(results[1][0][..., 0, :] - results[1][0][..., 1, :]).max() > 0.1
    all_close(*results, rtol=1e-10)


def test_factorized_reduce_takes_even_then_odd_pixels():
    x = jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    y = factorized_reduce(x, jnp.ones((1, 1, 1)), 2 * jnp.ones((1, 1, 2)))
    assert y.shape == (1, 2, 2, 1, 3)
    np.testing.assert_array_equal(y[0, :, :, 0, 0], [[1, 3], [9, 11]])
    np.testing.assert_array_equal(y[0, :, :, 0, 1], [[12, 16], [28, 32]])


def test_moments():
    y = draw(0, (3, 4, 5, 2, 3))
    batch = moments(y)
    flat = np.asarray(y).reshape(-1, 2, 3)
    all_close(batch, Moments(flat.mean(0), flat.var(0)), 1e-13)
    all_close(unbiased(batch, 60), Moments(flat.mean(0), flat.var(0, ddof=1)), 1e-13)
    z = np.asarray(normalize(y, batch)).reshape(-1, 2, 3)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(z.var(0), flat.var(0) / (flat.var(0) + 1e-5), rtol=1e-12)


def test_unbiased_variance_of_one_value_is_finite():
    batch = moments(jnp.ones((1, 1, 1, 2)))
    np.testing.assert_array_equal(unbiased(batch, 1).var, 0)


def test_update_running():
    running = update_running(Moments(jnp.array(1.0), jnp.array(2.0)), Moments(3.0, 12.0))
    np.testing.assert_allclose(running, (1.2, 3.0), rtol=1e-15)
