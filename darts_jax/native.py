"""Kernels for CPUs from the package `darts_jax_native`, where it is installed.

On CPUs, XLA has no fast path for depthwise convolutions, products of many small matrices, and sums
over all axes but the last ones; that package has one, in C++. Everything works without it, and on
other devices it is not used.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import DTypeLike

try:
    import darts_jax_native
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True
    for _name, _function in darts_jax_native.functions().items():
        jax.ffi.register_ffi_target(_name, _function, platform="cpu")

_SUFFIXES = {"float32": "f32", "float64": "f64"}


def preferred(dtype: DTypeLike) -> bool:
    """Whether programs for this process's default device best use these kernels for a dtype."""
    return AVAILABLE and np.dtype(dtype).name in _SUFFIXES and jax.default_backend() == "cpu"


def define(
    primitive: Primitive,
    function: Callable,
    abstract: Callable,
    target: str | None = None,
    attributes: tuple[str, ...] = (),
) -> None:
    """Gives a primitive what it computes.

    Args:
      primitive: without an implementation so far.
      function: `function(*arrays, **params)`, what XLA compiles.
      abstract: `abstract(*avals, **params)`, the results' avals.
      target: the kernel that computes the same on CPUs, used if it is there.
      attributes: the parameters that the kernel takes: booleans, integers, floats, or tuples of
        them.
    """

    @lru_cache
    def compiled(items):
        return jax.jit(lambda *args: primitive.bind(*args, **dict(items)))

    def outside_of_jit(*args, **params):
        with jax.disable_jit(False):  # or `bind` would come here again
            return compiled(tuple(params.items()))(*args)

    primitive.def_impl(outside_of_jit)
    primitive.def_abstract_eval(abstract)
    portable = mlir.lower_fun(function, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, portable)
    if target is not None:
        mlir.register_lowering(primitive, _lowering(target, portable, attributes), platform="cpu")


def _lowering(target: str, portable: Callable, attributes: tuple[str, ...]) -> Callable:
    """A lowering rule for CPUs: a call of the kernel `target`, or else as the rule `portable`.

    A program for several devices is partitioned by XLA, which cannot look into a kernel; one that
    is exported must run where the kernel is not. Both take the portable rule, as does a batch of no
    images, which kernels do not expect.
    """

    def rule(ctx, *args, **params):
        module, name = ctx.module_context, ctx.avals_in[0].dtype.name
        elsewhere = module.lowering_parameters.for_export or _is_partitioned(module.axis_context)
        empty = all(aval.size == 0 for aval in ctx.avals_in)
        if elsewhere or empty or not AVAILABLE or name not in _SUFFIXES:
            return portable(ctx, *args, **params)
        call = jax.ffi.ffi_lowering(f"darts_jax_{target}_{_SUFFIXES[name]}")
        return call(ctx, *args, **{key: _attribute(params[key]) for key in attributes})

    return rule


def _is_partitioned(axes) -> bool:
    if hasattr(axes, "manual_axes"):  # in `jax.shard_map`, of these axes each device has its own
        return set(axes.mesh.axis_names) != set(axes.manual_axes)
    return getattr(axes, "num_devices", 1) not in (None, 1)


def _attribute(value: bool | int | float | tuple[int, ...] | tuple[float, ...]):
    """As a kernel reads it: integers of 64 bits, floats likewise, tuples as arrays."""
    return value if isinstance(value, bool) else np.asarray(value)[()]
