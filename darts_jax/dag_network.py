"""Networks of the cells of NAS-Bench-201, relaxed and discrete, as a Flax module.

A stem, stages of cells with a residual block of stride 2 between, batch norm, ReLU, the mean over
space, a linear classifier (arXiv 2001.00326, section 2.1). All cells of a network are one
architecture, unlike those of DARTS.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from darts_jax import convolution, dag_cell
from darts_jax.dag_cell import Convolution, Edges
from darts_jax.networks import Norm, uniform_fan_in
from darts_jax.operations import Moments, relu, update_running
from darts_jax.relaxation import EDGES

PyTree = Any
CELL = "cell"  # the name of its mixing weights, where they are by name


class Cell(nn.Module):
    """A cell of a network; its attributes are those of `Network`."""

    edges: Edges
    primitives: tuple[str, ...]
    choice: tuple[int, ...] | None
    affine: bool
    conv: Convolution
    partial: int

    @nn.compact
    def __call__(self, x: Array, weights: Array, edge_weights: Array | None, train: bool) -> Array:
        """[N, H, W, C] -> [N, H, W, C], weights [edges, candidates], edge_weights [edges]."""
        channels = x.shape[-1] // self.partial
        members = dag_cell.members(self.edges, self.primitives, self.choice)
        norms = dag_cell.norm_shapes(channels, members)
        kernels = self.param("kernels", uniform_fan_in, dag_cell.shapes(channels, members), 1)

        def filled(value: float) -> PyTree:
            return {name: jnp.full(shape, value) for name, shape in norms.items()}

        affine = {}
        if self.affine:
            affine["scale"] = self.param("scale", lambda key: filled(1.0))
            affine["bias"] = self.param("bias", lambda key: filled(0.0))
        stats = self.variable(
            "batch_stats",
            "moments",
            lambda: {name: Moments(jnp.zeros(s), jnp.ones(s)) for name, s in norms.items()},
        )
        y, batch = dag_cell.cell(
            kernels,
            affine,
            None if train else stats.value,
            x,
            weights,
            edges=self.edges,
            primitives=self.primitives,
            members=members,
            conv=self.conv,
            partial=self.partial,
            edge_weights=edge_weights,
        )
        if train and not self.is_initializing():
            stats.value = update_running(stats.value, batch)
        return y


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, at half the height and width and twice the channels."""

    conv: Convolution

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[N, H, W, C] -> [N, H / 2, W / 2, 2 C], H and W even."""
        count, height, width, channels = x.shape
        first = self.param("conv_1", uniform_fan_in, (3, 3, channels, 2 * channels))
        second = self.param("conv_2", uniform_fan_in, (3, 3, 2 * channels, 2 * channels))
        shortcut = self.param("shortcut", uniform_fan_in, (channels, 2 * channels))
        y = Norm(affine=True)(self.conv(relu(x), first, stride=2, padding=1), train)
        y = Norm(affine=True)(self.conv(relu(y), second, padding=1), train)
        pooled = x.reshape(count, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        return y + pooled @ shortcut


class Network(nn.Module):
    """A network for images whose cells are relaxed, or of one architecture.

    Attributes:
      num_classes: of the linear classifier.
      edges: of the cell, (source, destination) each.
      primitives: the columns of the mixing weights.
      choice: the architecture: of each edge, its operation's number; None for the relaxed cell.
      channels: of the first stage; each later one has twice as many.
      stages: how many.
      cells: in each stage.
      stem: side of the stem's kernel, odd.
      affine: whether the batch norms of cells scale and shift.
      conv: the convolution, `convolution.conv` or `convolution.matmul_conv`.
      partial: of a relaxed cell, one of so many channels goes through the operations, as in
        PC-DARTS; a divisor of channels.
    """

    num_classes: int
    edges: Edges
    primitives: tuple[str, ...]
    choice: tuple[int, ...] | None = None
    channels: int = 16
    stages: int = 3
    cells: int = 5
    stem: int = 3
    affine: bool = False
    conv: Convolution = convolution.conv
    partial: int = 1

    @property
    def weight_shapes(self) -> tuple[int, int]:
        """Of the mixing weights: [edges, candidates]."""
        return len(self.edges), len(self.primitives)

    @nn.compact
    def __call__(
        self,
        x: Array,
        weights: Array | Mapping[str, Array] | None = None,
        train: bool = False,
    ) -> Array:
        """Logits of a batch.

        Args:
          x: images [N, H, W, channels], H and W divisible by 2 for each stage but one.
          weights: mixing weights [edges, candidates]; None for 1, which a discrete network takes.
            Or {"cell": these, "cell_edges": [edges]}, as of `relaxation.edge_weighted`.
          train: normalise by the batch, and update the running statistics.

        Returns:
          [N, num_classes].

        Raises:
          ValueError: for images that do not halve so often, weights of another shape, or channels
            that are not a multiple of partial.
        """
        shape, edge_weights = self.weight_shapes, None
        if isinstance(weights, Mapping):
            weights, edge_weights = weights[CELL], weights[CELL + EDGES]
        weights = jnp.ones(shape, x.dtype) if weights is None else weights
        if weights.shape != shape:
            raise ValueError(
                f"weights have shape {list(weights.shape)}; this cell needs {list(shape)}:"
                " [edges, candidates]"
            )
        if self.partial < 1 or self.channels % self.partial:
            raise ValueError(
                f"partial is {self.partial}; give a divisor of {self.channels} channels"
            )
        if self.choice is not None and self.partial > 1:
            raise ValueError(f"partial is {self.partial}; give 1 for a discrete network")
        multiple = 2 ** (self.stages - 1)
        if x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} do not halve {self.stages - 1} times: crop or"
                f" pad height and width to a multiple of {multiple}"
            )
        side = self.stem
        kernel = self.param("stem_kernel", uniform_fan_in, (side, side, x.shape[-1], self.channels))
        y = Norm(affine=True, name="stem_norm")(self.conv(x, kernel, padding=side // 2), train)
        for stage in range(self.stages):
            if stage:
                y = ResidualBlock(self.conv, name=f"reduce_{stage}")(y, train)
            for i in range(self.cells):
                own = (self.edges, self.primitives, self.choice, self.affine, self.conv)
                y = Cell(*own, self.partial, name=f"cell_{stage}_{i}")(
                    y, weights, edge_weights, train
                )
        features = relu(Norm(affine=True, name="last_norm")(y, train)).mean((1, 2))
        kernel = self.param("head_kernel", uniform_fan_in, (features.shape[-1], self.num_classes))
        bias = self.param("head_bias", nn.initializers.zeros, (self.num_classes,))
        return features @ kernel + bias


def one_hot(choice: Array, num_candidates: int) -> Array:
    """Mixing weights [..., edges, candidates] of architectures, integers [..., edges]."""
    return jax.nn.one_hot(choice, num_candidates)
