"""Kernels for CPUs, which darts_jax uses where it finds them."""

import ctypes
import importlib.util
from typing import Any

import jax

_NAMES = (
    *("convolve", "correlate"),
    *("apply", "outer"),
    *("mean", "dot", "moments"),
    *("mix", "fold", "relu", "gate"),
    *("polynomial", "inverse_root", "split", "join"),
    *("pool_index", "pool_take", "pool_put"),
)
_TYPES = ("f32", "f64")


def functions() -> dict[str, Any]:
    """The kernels as XLA takes them, `jax.ffi.register_ffi_target`, by name."""
    spec = importlib.util.find_spec("darts_jax_native._kernels")
    library = ctypes.CDLL(spec.origin)
    names = [f"darts_jax_{name}_{dtype}" for name in _NAMES for dtype in _TYPES]
    return {name: jax.ffi.pycapsule(getattr(library, name)) for name in names}
