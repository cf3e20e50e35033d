"""How much memory this process has needed. Imports nothing that would need more."""

import sys


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
