"""How much memory this process has needed, or lacks. Imports nothing that would need more."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from experiments.errors import UserError

EXHAUSTED = "RESOURCE_EXHAUSTED"  # how XLA begins to say so


def device_memory() -> int | None:
    """The most memory that the first device has held so far, in bytes; of a CPU, this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", peak_memory())


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes; None where that is not known."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Inside, that a device's memory is not enough is a UserError, with this remedy."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason, *_ = str(error).splitlines()
        if EXHAUSTED not in reason:
            raise
        raise UserError(f"the memory is not enough ({reason}); {remedy}") from error
