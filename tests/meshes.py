"""So many devices for the experiments."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax

from experiments import devices


@contextmanager
def use(count: int) -> Iterator[None]:
    """Inside, experiments see the first `count` devices."""
    mesh = partial(devices.mesh, among=jax.devices()[:count])
    with mock.patch.object(devices, "mesh", mesh):
        yield
