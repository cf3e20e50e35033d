"""Weighted sums of images, their moments, and ReLU, by kernels in derivatives of every order.

Images are "many", [N, H, W, K, C], of K edges, or "few", [N, H, W, 1, C], which stands for K alike;
factors are [K, C]. Each map is a primitive whose derivatives are others of these.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from darts_jax import native
from darts_jax.bilinear import bilinear
from darts_jax.polynomial import add, polynomial

PIXELS = (0, 1, 2)


def mix(images: Sequence[Array], factors: Sequence[Array], bias: Array) -> Array:
    """Sum over i of images[i] * factors[i], plus bias [K, C]: [N, H, W, K, C].

    Raises:
      TypeError: their shapes do not fit.
    """
    args = *images, *factors, bias
    kinds, batches = (bias.shape, (1, *bias.shape[1:])), {x.shape[:3] for x in images}
    fit = len(batches) == 1 and all(x.shape[3:] in kinds for x in images)
    if not fit or any(f.shape != bias.shape for f in factors):
        given = ", ".join(str(jax.typeof(x)) for x in args)
        raise TypeError(f"images, factors and bias do not fit: {given}")
    dtype = jnp.result_type(*args)
    return _mix_p.bind(*(x.astype(dtype) for x in args))


def mean(x: Array) -> Array:
    """Mean over the pixels of x [N, H, W, ...]."""
    return _mean_p.bind(x)


def mean_and_variance(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance over the pixels of x [N, H, W, ...], two arrays [...]."""
    mean, variance = _own_moments_p.bind(x) if native.preferred(x.dtype) else _plain_moments(x)
    return mean, variance


def relu(x: Array) -> Array:
    """max(x, 0), with derivative 0 at 0, and NaN where x is."""
    return _relu_p.bind(x) if native.preferred(x.dtype) else _gate(x, x)


@jax.custom_jvp
def _plain_moments(x):
    mean = x.mean(PIXELS)
    return [mean, lax.square(x - mean).mean(PIXELS)]


@_plain_moments.defjvp
def _plain_moments_jvp(primals, tangents):
    # The variance does not change to first order with the mean that it is taken around.
    (x,), (x_dot,) = primals, tangents
    mean, variance = _plain_moments(x)
    return [mean, variance], [x_dot.mean(PIXELS), 2 * ((x - mean) * x_dot).mean(PIXELS)]


def _scale(x, factors):
    return mix([x], [factors], jnp.zeros(factors.shape, x.dtype))


def _gate(x, t):
    return jnp.where(x <= 0, jnp.zeros((), t.dtype), t)


def _count(x) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def _sum(x):
    if not _count(x):
        return jnp.zeros(x.shape[3:], x.dtype)
    return polynomial((_count(x), (mean(x),)))


def _pull_image(ct, x, factors):
    """Cotangent of an image that stands with factors in a sum, from that of the sum."""
    if x.aval.shape == ct.shape:
        return _scale(ct, factors)
    return _fold_p.bind(ct, factors)


_dot_p = bilinear(
    "pixel_dot",
    lambda x, y: (x * y).sum(PIXELS),
    lambda x, y: y.shape[3:],
    lambda ct, x, y: _pull_image(y, x, ct),
    lambda ct, x, y: _scale(x, ct),
    looped=False,
    target="dot",
)
_fold_p = bilinear(
    "fold",
    lambda many, factors: (many * factors).sum(3, keepdims=True),
    lambda many, factors: (*many.shape[:3], 1, many.shape[4]),
    lambda ct, many, factors: _scale(ct, factors),
    lambda ct, many, factors: _dot_p.bind(ct, many),
    looped=False,
    target="fold",
)


def _primitive(
    name: str,
    function: Callable,
    shape: Callable,
    target: str | None = None,
    results: int | None = None,
) -> Primitive:
    """A primitive that XLA compiles, or for which the kernel `target` is called where it is there.

    With `results`, it has so many of one shape, else one, and not in a list.
    """
    primitive = Primitive(name)
    primitive.multiple_results = results is not None

    def abstract(*args):
        aval = jax.core.ShapedArray(shape(*args), args[0].dtype)
        return aval if results is None else [aval] * results

    native.define(primitive, function, abstract, target)

    def batch(args, dims):
        out = jax.vmap(function, in_axes=tuple(dims))(*args)
        return out, jax.tree.map(lambda _: 0, out)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _mix(*args):
    *pairs, bias = args
    half = len(pairs) // 2
    return sum(x * f for x, f in zip(pairs[:half], pairs[half:], strict=True)) + bias


def _mix_jvp(primals, tangents):
    half = len(primals) // 2
    images, factors = [], []
    for i in range(half):
        (x, f), (x_dot, f_dot) = ((args[i], args[half + i]) for args in (primals, tangents))
        if type(x_dot) is not ad.Zero:
            images.append(x_dot)
            factors.append(f)
        if type(f_dot) is not ad.Zero:
            images.append(x)
            factors.append(f_dot)
    bias_dot = ad.instantiate_zeros(tangents[-1])
    out = _mix_p.bind(*primals)
    if images:
        return out, mix(images, factors, bias_dot)
    return out, jnp.broadcast_to(bias_dot, out.shape)


def _mix_transpose(ct, *args):
    half = len(args) // 2
    images, factors = [], []
    for x, f in zip(args[:half], args[half:-1], strict=True):
        unknown = ad.is_undefined_primal(x)
        images.append(_pull_image(ct, x, f) if unknown else None)
        factors.append(_dot_p.bind(x, ct) if ad.is_undefined_primal(f) else None)
    bias = _sum(ct) if ad.is_undefined_primal(args[-1]) else None
    return [*images, *factors, bias]


def _moments(x, y):
    mean_x, mean_y = x.mean(PIXELS), y.mean(PIXELS)
    return [mean_y, ((x - mean_x) * (y - mean_y)).mean(PIXELS)]


def _moments_jvp(primals, tangents):
    # Mean of y, and covariance of x and y, which is bilinear.
    (x, y), (x_dot, y_dot) = primals, tangents
    mean, covariance = _moments_p.bind(x, y)
    mean_dot, terms = ad.Zero(jax.typeof(mean).to_tangent_aval()), []
    if type(y_dot) is not ad.Zero:
        mean_dot, term = _moments_p.bind(x, y_dot)
        terms.append(term)
    if type(x_dot) is not ad.Zero:
        terms.append(_moments_p.bind(y, x_dot)[1])
    return [mean, covariance], [mean_dot, add(*terms)]


def _moments_transpose(cts, x, y):
    """Of the means of y and (x - mean x) y: y is what is not known."""
    mean_ct, covariance_ct = cts
    share = 1 / max(_count(y.aval), 1)  # of no images the cotangent has no elements
    if type(covariance_ct) is ad.Zero:
        bias = polynomial((share, (ad.instantiate_zeros(mean_ct),)))
        return [None, jnp.broadcast_to(bias, y.aval.shape)]
    mean, _ = mean_and_variance(x)  # as going forward: XLA computes it once
    bias = [(-share, (mean, covariance_ct))]
    if type(mean_ct) is not ad.Zero:
        bias.append((share, (mean_ct,)))
    return [None, mix([x], [polynomial((share, (covariance_ct,)))], polynomial(*bias))]


def _own_moments_jvp(primals, tangents):
    # The covariance with itself changes by twice that with the tangent.
    (x,), (x_dot,) = primals, tangents
    mean_dot, covariance_dot = _moments_p.bind(x, x_dot)
    return _own_moments_p.bind(x), [mean_dot, polynomial((2.0, (covariance_dot,)))]


_moments_p = _primitive("moments", _moments, lambda x, y: x.shape[3:], "moments", results=2)
ad.primitive_jvps[_moments_p] = _moments_jvp
ad.primitive_transposes[_moments_p] = _moments_transpose

_own_moments_p = _primitive(
    "own_moments", lambda x: _moments_p.bind(x, x), lambda x: x.shape[3:], results=2
)
ad.primitive_jvps[_own_moments_p] = _own_moments_jvp

_mean_p = _primitive("pixel_mean", lambda x: x.mean(PIXELS), lambda x: x.shape[3:], "mean")
ad.deflinear2(_mean_p, lambda ct, x: [jnp.broadcast_to(ct / _count(x.aval), x.aval.shape)])

_mix_p = _primitive("mix", _mix, lambda *args: (*args[0].shape[:3], *args[-1].shape), "mix")
ad.primitive_jvps[_mix_p] = _mix_jvp
ad.primitive_transposes[_mix_p] = _mix_transpose

_gate_p = _primitive("gate", _gate, lambda x, t: t.shape, "gate")
# Flat almost everywhere in x.
ad.defjvp(_gate_p, None, lambda t_dot, x, t: _gate_p.bind(x, t_dot))
ad.primitive_transposes[_gate_p] = lambda ct, x, t: [None, _gate_p.bind(x, ct)]

_relu_p = _primitive("relu", lambda x: _gate(x, x), lambda x: x.shape, "relu")
ad.defjvp(_relu_p, lambda x_dot, x: _gate_p.bind(x, x_dot))
