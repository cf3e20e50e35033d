"""The supernet that a convolutional search trains, as a Flax module.

Modules hold parameters and running statistics; the arithmetic is in `operations` and `cells`. A
network takes mixing weights, not alpha, so that a relaxation is chosen outside of it.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from darts_jax import cells
from darts_jax.convolution import conv
from darts_jax.genotype import CNN_PRIMITIVES, count_nodes, edges, nearest
from darts_jax.operations import (
    NOISE,
    OPERATIONS,
    Moments,
    Operation,
    batch_norm,
    factorized_reduce,
    relu,
    update_running,
)
from darts_jax.relaxation import EDGES

PyTree = Any
STEM_MULTIPLIER = 3


def reductions(layers: int) -> tuple[int, int]:
    """Positions of the reduction cells, at a third and at two thirds of the depth."""
    return layers // 3, 2 * layers // 3


def check_layout(layers: int, image_shape: tuple[int, ...], halvings: int) -> None:
    """Raises a ValueError for fewer than 3 layers, or images that cannot be halved so often.

    Args:
      layers: number of cells.
      image_shape: (N, height, width, ...).
      halvings: how often a network halves height and width.
    """
    if layers < 3:
        raise ValueError(
            f"a network needs at least 3 layers, to hold 2 reduction cells; got {layers}"
        )
    height, width = image_shape[1:3]
    multiple = 2**halvings
    if height % multiple or width % multiple:
        times = {2: "twice"}.get(halvings, f"{halvings} times")
        raise ValueError(
            f"images of {height}x{width} do not halve {times}: "
            f"crop or pad height and width to a multiple of {multiple}"
        )


def uniform_fan_in(key: Array, shapes: PyTree, num_batch_axes: int = 0) -> PyTree:
    """Arrays of the given shapes, uniform in +-1 / sqrt(fan_in), PyTorch's default.

    The fan-in is the product of all axes between the batch axes and the last one, which holds for
    dense [k, k, C, D], depthwise [k, k, C] and pointwise [C, D] kernels alike.
    """
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    if not leaves:
        return shapes
    ends = list(itertools.accumulate(math.prod(shape) for shape in leaves))
    draw = jax.random.uniform(key, (ends[-1],), minval=-1, maxval=1)
    # One draw for all leaves, cut by NumPy: an eager draw or slice a leaf takes seconds to compile.
    split = jnp.split if isinstance(draw, jax.core.Tracer) else np.split
    parts = split(np.asarray(draw) if split is np.split else draw, ends[:-1])

    def scale(part, shape):
        bound = 1 / math.sqrt(math.prod(shape[num_batch_axes:-1]))
        return jnp.asarray(part.reshape(shape) * bound)

    return jax.tree.unflatten(treedef, map(scale, parts, leaves))


def noise_key(module: nn.Module, operations: Mapping[str, Operation]) -> Array | None:
    """The key that a module's random operations draw from; None where none is random.

    Raises:
      ValueError: if the network was applied without the random key "noise".
    """
    if not any(operation.random for operation in operations.values()):
        return None
    if not module.has_rng(NOISE):
        raise ValueError(
            "an operation draws noise and has no key: wrap the step by search.with_context, or give"
            ' the network rngs={"noise": key}'
        )
    return module.make_rng(NOISE)


class Norm(nn.Module):
    """Batch norm over batch and space, with running statistics and, if affine, scale and shift."""

    affine: bool = False

    @nn.compact
    def __call__(self, y: Array, train: bool) -> Array:
        """Normalise y [N, H, W, C], by the batch if `train`."""
        channels = y.shape[-1]
        stats = self.variable(
            "batch_stats", "moments", lambda: Moments(jnp.zeros(channels), jnp.ones(channels))
        )
        affine = {}
        if self.affine:
            affine["scale"] = self.param("scale", nn.initializers.ones, (channels,))
            affine["bias"] = self.param("bias", nn.initializers.zeros, (channels,))
        y, batch = batch_norm(y, None if train else stats.value, **affine)
        if train and not self.is_initializing():
            stats.value = update_running(stats.value, batch)
        return y


class ReluConvNorm(nn.Module):
    """ReLU, 1x1 convolution, batch norm: brings a cell's input to its number of channels."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[N, H, W, C] -> [N, H, W, channels]."""
        kernel = self.param("kernel", uniform_fan_in, (x.shape[-1], self.channels))
        return Norm()(relu(x) @ kernel, train)


class FactorizedReduce(nn.Module):
    """As `ReluConvNorm`, at half the height and width."""

    channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[N, H, W, C] -> [N, H / 2, W / 2, channels]."""
        half, inputs = self.channels // 2, x.shape[-1]
        conv_1 = self.param("conv_1", uniform_fan_in, (inputs, half))
        conv_2 = self.param("conv_2", uniform_fan_in, (inputs, self.channels - half))
        return Norm()(factorized_reduce(x, conv_1[None], conv_2[None])[..., 0, :], train)


class RelaxedCell(nn.Module):
    """A relaxed cell with the preprocessing of its two inputs.

    Attributes:
      channels: of each node.
      reduction: whether the cell halves height and width.
      reduction_before: whether the cell before did, so that the older input is twice as large.
      operations: candidates by name.
      primitives: the columns of the mixing weights.
      partial: one of so many channels goes through the operations.
      candidates: of each edge; None for all of them.
    """

    channels: int
    reduction: bool
    reduction_before: bool
    operations: FrozenDict[str, Operation]
    primitives: tuple[str, ...]
    partial: int = 1
    candidates: tuple[tuple[str, ...], ...] | None = None

    @nn.compact
    def __call__(
        self,
        older: Array,
        newer: Array,
        weights: Array,
        train: bool,
        edge_weights: Array | None = None,
    ) -> Array:
        """Inputs [N, H, W, C], weights [edges, candidates] -> [N, H', W', nodes * channels]."""
        older_module = FactorizedReduce if self.reduction_before else ReluConvNorm
        older = older_module(self.channels, name="preprocess_0")(older, train)
        newer = ReluConvNorm(self.channels, name="preprocess_1")(newer, train)
        share = self.channels // self.partial
        groups = cells.groups(weights.shape[0], self.reduction, self.operations, self.candidates)
        params = self.param("edges", uniform_fan_in, cells.shapes(share, groups), 1)
        stats = self.variable("batch_stats", "edges", cells.running_statistics, share, groups)
        if self.is_initializing():  # eagerly, the cell would take a minute to compile
            stride = 2 if self.reduction else 1
            count, height, width, _ = newer.shape
            nodes = count_nodes(weights.shape[0])
            return jnp.zeros((count, height // stride, width // stride, nodes * self.channels))
        output, batch = cells.relaxed(
            params,
            None if train else stats.value,
            (older, newer),
            weights,
            groups=groups,
            columns={name: self.primitives.index(name) for name in self.operations},
            partial=self.partial,
            edge_weights=edge_weights,
            key=noise_key(self, self.operations),
        )
        if train:
            stats.value = update_running(stats.value, batch)
        return output


class Supernet(nn.Module):
    """The relaxed network of the search on CIFAR-like images.

    A stem of 3 * channels, then cells that share two pairs of mixing weights. The cells at a third
    and at two thirds of the depth are reduction cells: they halve height and width and double the
    channels.

    Attributes:
      channels: of each node in the first cell.
      layers: number of cells, at least 3.
      num_classes: of the linear classifier.
      nodes: intermediate nodes of each cell.
      operations: candidates by name.
      primitives: the columns of the mixing weights: "none" and the keys of operations.
      batch_norm_groups: equal slices of a training batch, each normalised by its own moments; that
        is what a loss does (`search.make_loss`), since a network sees one of them.
      partial: one of so many channels goes through the operations, as in PC-DARTS; a divisor of
        channels.
      candidates: {"normal", "reduce"}: of each edge, its operations, where they differ; others have
        no parameters there, and no work, whatever their mixing weights. None for all on every edge.
    """

    channels: int
    layers: int
    num_classes: int
    nodes: int = 4
    operations: FrozenDict[str, Operation] = OPERATIONS
    primitives: tuple[str, ...] = CNN_PRIMITIVES
    batch_norm_groups: int = 1
    partial: int = 1
    candidates: FrozenDict[str, tuple[tuple[str, ...], ...]] | None = None

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the mixing weights of each kind of cell: [edges, candidates]."""
        shape = (len(edges(self.nodes)), len(self.primitives))
        return dict.fromkeys(("normal", "reduce"), shape)

    @nn.compact
    def __call__(self, x: Array, weights: Mapping[str, Array], train: bool) -> Array:
        """Logits of a batch. Random operations need the random key "noise".

        Args:
          x: images [N, H, W, channels], H and W divisible by 4.
          weights: "normal" and "reduce", each [edges, candidates]: the mixing weights. With
            "normal_edges" and "reduce_edges", each [edges], edges are weighed, too.
          train: normalise by the batch, and update the running statistics.

        Returns:
          [N, num_classes].

        Raises:
          ValueError: for fewer than 3 layers, an image size that does not halve twice, an operation
            that is not both in operations and in primitives, weights of another shape, channels
            that are not a multiple of partial, or candidates that do not fit.
        """
        self._check(x.shape, weights)
        channels = self.channels
        stem = self.param("stem", uniform_fan_in, (3, 3, x.shape[-1], STEM_MULTIPLIER * channels))
        older = newer = Norm(affine=True, name="stem_norm")(conv(x, stem, padding=1), train)
        before = False
        for i in range(self.layers):
            reduction = i in reductions(self.layers)
            kind = "reduce" if reduction else "normal"
            channels *= 2 if reduction else 1
            cell = RelaxedCell(
                channels,
                reduction,
                before,
                self.operations,
                self.primitives,
                self.partial,
                None if self.candidates is None else self.candidates[kind],
                name=f"cell_{i}",
            )
            of_edges = weights.get(kind + EDGES)
            older, newer = newer, cell(older, newer, weights[kind], train, of_edges)
            before = reduction
        features = newer.mean((1, 2))
        kernel = self.param("head_kernel", uniform_fan_in, (features.shape[-1], self.num_classes))
        bias = self.param("head_bias", nn.initializers.zeros, (self.num_classes,))
        return features @ kernel + bias

    def _check(self, image_shape: tuple[int, ...], weights: Mapping[str, Array]) -> None:
        check_layout(self.layers, image_shape, halvings=2)
        if self.partial < 1 or self.channels % self.partial:
            raise ValueError(
                f"partial is {self.partial}; give a divisor of {self.channels} channels"
            )
        known = set(self.primitives) - {"none"}
        unmatched = sorted(known ^ set(self.operations))
        if unmatched:
            name = unmatched[0]
            raise ValueError(
                f"operation {name!r} must be both in operations and in primitives; "
                f"nearest names: {nearest(name, {*known, *self.operations} - {name})}"
            )
        needed = (len(edges(self.nodes)), len(self.primitives))
        for name in ("normal", "reduce"):
            if weights[name].shape != needed:
                raise ValueError(
                    f"weights[{name!r}] has shape {list(weights[name].shape)}; a network of"
                    f" {self.nodes} nodes needs [{needed[0]} edges, {needed[1]} candidates]"
                )
            if self.candidates is not None:
                self._check_candidates(name)

    def _check_candidates(self, kind: str) -> None:
        held = self.candidates[kind]
        if len(held) != len(edges(self.nodes)):
            raise ValueError(
                f"candidates[{kind!r}] are of {len(held)} edges; a cell of {self.nodes} nodes has"
                f" {len(edges(self.nodes))}"
            )
        for edge, names in enumerate(held):
            for name in names:
                if name not in self.primitives:
                    raise ValueError(
                        f"candidates[{kind!r}] of edge {edge} name {name!r}, which is not in"
                        f" primitives; nearest names: {nearest(name, self.primitives)}"
                    )
            if not set(names) & set(self.operations):
                raise ValueError(
                    f"candidates[{kind!r}] of edge {edge} are {list(names)}; give it an operation"
                )
