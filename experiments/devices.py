"""Spreading batches over all devices, of this process and of others: one mesh, one axis.

The program is the one that a single device runs; the compiler inserts the sums over devices. So
statistics of a batch, and the loss, are those of the whole batch, to rounding. With one device
nothing here does anything.
"""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any

AXIS = "data"  # of the mesh, over which batches are spread


@cache
def mesh() -> Mesh:
    """All devices, those of one process side by side."""
    # The compiler chooses what is not told: types of axes are not part of the functions.
    return Mesh(np.array(jax.devices()), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def check_batch(flag: str, size: int) -> None:
    """Raises a ValueError if a batch cannot be spread evenly, naming the flag of its size."""
    count = mesh().size
    if size % count:
        raise ValueError(
            f"a batch of {size} cannot be spread evenly over {count} devices; give a --{flag} that"
            f" is a multiple of {count}"
        )


def spread(tree: PyTree, axis: int) -> PyTree:
    """Arrays, the same in each process, spread over the devices along an axis.

    Whole on every device if the axis is not a multiple of them; as they are if there is one device.
    """
    return jax.tree.map(lambda leaf: _put(leaf, _spec(leaf.shape, axis)), tree)


def replicate(tree: PyTree) -> PyTree:
    """Arrays, the same in each process, whole on every device; as they are if there is one."""
    return jax.tree.map(lambda leaf: _put(leaf, PartitionSpec()), tree)


def keep(tree: PyTree, axis: int | None = None) -> PyTree:
    """Arrays that stay on the devices: as `replicate` does or, given an axis, as `spread`."""
    if mesh().size == 1:
        return jax.device_put(tree)
    return replicate(tree) if axis is None else spread(tree, axis)


def spread_share(tree: PyTree, axis: int) -> PyTree:
    """As `spread`, of arrays that hold only this process's `share` of the axis."""
    if mesh().size == 1:
        return tree
    sharding = NamedSharding(mesh(), PartitionSpec(*(None,) * axis, AXIS))
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)


def share(size: int) -> slice:
    """The places in a batch of this size that are on devices of this process."""
    own = [i for i, device in enumerate(mesh().devices) if device in jax.local_devices()]
    each = size // mesh().size
    return slice(own[0] * each, (own[-1] + 1) * each)


def constrain(tree: PyTree, axis: int) -> PyTree:
    """As `spread`, inside jit; as it is where the axis is not a multiple of the devices."""

    def one(leaf: jax.Array) -> jax.Array:
        spec = _spec(leaf.shape, axis)
        if mesh().size == 1 or spec == PartitionSpec():
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh(), spec))

    return jax.tree.map(one, tree)


def gather(tree: PyTree) -> PyTree:
    """Arrays as one process can read them whole; call it in all processes. No copy if it can."""
    return jax.tree.map(_gather, tree)


def collect(tree: PyTree) -> PyTree:
    """Arrays on one device again, where what follows is for one."""
    if mesh().size == 1:
        return tree
    return jax.tree.map(_collect, tree)


def _collect(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = _collect(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    return jax.numpy.asarray(np.asarray(leaf))


def _gather(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _spec(shape: tuple[int, ...], axis: int) -> PartitionSpec:
    return PartitionSpec() if shape[axis] % mesh().size else PartitionSpec(*(None,) * axis, AXIS)


def _put(leaf: Any, spec: PartitionSpec) -> Any:
    """Without a look at what other processes have, unlike `jax.device_put`."""
    if mesh().size == 1:
        return leaf
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        bits = _put(jax.random.key_data(leaf), spec)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    sharding = NamedSharding(mesh(), spec)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
