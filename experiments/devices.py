"""Spreading work over all devices, of this process and of others: batches, and seeds.

The devices are a mesh of two axes. Batches are spread over `data`, and what is of several seeds, as
their states, over `seed`. A job makes its mesh once and gives it to what needs it.

The program is the one that a single device runs; the compiler inserts the sums over devices. So
statistics of a batch, and the loss, are those of the whole batch, to rounding. With one device
nothing here does anything.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

SEED, DATA = "seed", "data"  # axes of the mesh
BATCH = PartitionSpec(DATA)  # of arrays whose first axis is that of a batch
WHOLE = PartitionSpec()


def mesh(
    seeds: int = 1, at_once: int | None = None, among: Sequence[jax.Device] | None = None
) -> Mesh:
    """All devices, [seed, data]: groups, each of which has as many of the seeds.

    Args:
      seeds: of the job. The groups are as many as devices, seeds and `at_once` allow: their
        greatest common divisor.
      at_once: how many of the seeds go through a step at once; None for all.
      among: the devices; None for all that there are, those of one process side by side.
    """
    among = jax.devices() if among is None else among
    groups = math.gcd(len(among), seeds, at_once or 0)
    # The compiler chooses what is not told: types of axes are not part of the functions.
    return Mesh(np.array(among).reshape(groups, -1), (SEED, DATA), axis_types=(AxisType.Auto,) * 2)


def leading(seeds: int) -> tuple[str, ...]:
    """The axes of the mesh that come first in what is of each of so many seeds, as their states."""
    return () if seeds == 1 else (SEED,)


def check_batch(mesh: Mesh, flag: str, size: int) -> None:
    """Raises a ValueError if a batch cannot be spread evenly, naming the flag of its size."""
    count = mesh.shape[DATA]
    if size % count:
        raise ValueError(
            f"a batch of {size} cannot be spread evenly over {count} devices; give a --{flag} that"
            f" is a multiple of {count}"
        )


def spread(mesh: Mesh, tree: PyTree, spec: PartitionSpec = WHOLE) -> PyTree:
    """Arrays, the same in each process, spread over the devices as a spec says.

    Whole along an axis that is no multiple of its devices; as they are if there is one device.
    """
    return tree if mesh.size == 1 else jax.tree.map(partial(_put, mesh, spec), tree)


def keep(mesh: Mesh, tree: PyTree, spec: PartitionSpec = WHOLE) -> PyTree:
    """Arrays that stay on the devices, as by `spread`."""
    return jax.device_put(tree) if mesh.size == 1 else spread(mesh, tree, spec)


def spread_share(mesh: Mesh, tree: PyTree, spec: PartitionSpec) -> PyTree:
    """As `spread`, of arrays that hold only this process's `share` of the batch, for one seed."""
    if mesh.size == 1:
        return tree

    def one(leaf: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, _fitting(mesh, spec, (mesh.size,) * leaf.ndim))
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(one, tree)


def share(mesh: Mesh, size: int) -> slice:
    """The places in a batch of this size, of one seed, that are on devices of this process."""
    own = [i for i, device in enumerate(mesh.devices.flat) if device in jax.local_devices()]
    each = size // mesh.size
    return slice(own[0] * each, (own[-1] + 1) * each)


def constrain(mesh: Mesh, tree: PyTree, spec: PartitionSpec) -> PyTree:
    """As `spread`, inside jit; as they are where a spec leaves them whole."""

    def one(leaf: jax.Array) -> jax.Array:
        own = _fitting(mesh, spec, leaf.shape)
        if own == WHOLE:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, own))

    return jax.tree.map(one, tree)


def within(mesh: Mesh, step: Callable) -> Callable:
    """A step, made where JAX knows the mesh, as a map over groups of devices needs it."""
    if mesh.shape[SEED] == 1:
        return step

    def run(*args: PyTree) -> PyTree:
        with jax.set_mesh(mesh):
            return step(*args)

    return run


def gather(tree: PyTree) -> PyTree:
    """Arrays as one process can read them whole; call it in all processes. No copy if it can."""
    return jax.tree.map(_gather, tree)


def collect(tree: PyTree) -> PyTree:
    """Arrays on one device again, where what follows is for one."""
    return jax.tree.map(_collect, tree)


def _collect(leaf: jax.Array) -> jax.Array:
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return leaf
    if _is_key(leaf):
        return _like_key(leaf, _collect(jax.random.key_data(leaf)))
    return jax.numpy.asarray(np.asarray(leaf))


def _gather(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    if _is_key(leaf):
        return _like_key(leaf, _gather(jax.random.key_data(leaf)))
    return multihost_utils.process_allgather(leaf, tiled=True)


def _fitting(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec without axes that are no multiple of their devices, or have one device.

    Over one device nothing is spread, and all arrays should say so alike.
    """
    names = [
        name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, shape, strict=False)
    ]
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def _put(mesh: Mesh, spec: PartitionSpec, leaf: Any) -> Any:
    """Without a look at what other processes have, unlike `jax.device_put`."""
    if _is_key(leaf):
        return _like_key(leaf, _put(mesh, spec, jax.random.key_data(leaf)))
    host = np.asarray(leaf)
    sharding = NamedSharding(mesh, _fitting(mesh, spec, host.shape))
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _like_key(key: jax.Array, bits: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(key))
