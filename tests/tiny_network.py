"""A stand-in for the supernet that compiles in a second."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from darts_jax.genotype import CNN_PRIMITIVES, edges


class TinyNetwork(nn.Module):
    """Takes what `networks.Supernet` takes; every mixing weight scales a feature of its own."""

    channels: int
    layers: int
    num_classes: int
    nodes: int = 4
    primitives: tuple[str, ...] = CNN_PRIMITIVES
    batch_norm_groups: int = 1
    partial: int = 1
    candidates: Mapping | None = None

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        shape = (len(edges(self.nodes)), len(self.primitives))
        return dict.fromkeys(("normal", "reduce"), shape)

    @nn.compact
    def __call__(self, x: jax.Array, weights: Mapping[str, jax.Array], train: bool) -> jax.Array:
        mix = jnp.concatenate([jnp.ravel(weights[cell]) for cell in ("normal", "reduce")])
        x = nn.Dense(mix.size)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.num_classes)(jnp.tanh(x) * 8 * mix)
