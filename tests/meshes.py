"""So many devices for the experiments."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
import numpy as np

from experiments import devices


@contextmanager
def use(count: int) -> Iterator[None]:
    """Inside, experiments see the first `count` devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), (devices.AXIS,))
    with mock.patch.object(devices, "mesh", lambda: mesh):
        yield
