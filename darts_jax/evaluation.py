"""The network that trains a discrete cell from scratch, as a Flax module, and what it costs.

Neighbouring cells of one shape are a loop over stacked parameters: compiled once, however many
there are.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array, lax

from darts_jax import discrete
from darts_jax.convolution import conv
from darts_jax.discrete import Cell
from darts_jax.genotype import Genotype, nearest
from darts_jax.networks import (
    STEM_MULTIPLIER,
    Norm,
    check_layout,
    noise_key,
    reductions,
    uniform_fan_in,
)
from darts_jax.operations import DISCRETE_OPERATIONS, Moments, Operation, relu, update_running

PyTree = Any
Stem = Literal["cifar", "imagenet"]

HALVINGS = {"cifar": 0, "imagenet": 3}  # of height and width, in the stem
AUXILIARY_STRIDE = {"cifar": 3, "imagenet": 2}  # of the auxiliary head's pooling
AUXILIARY_WINDOW = 5
AUXILIARY_CHANNELS = (128, 768)


class StemConv(NamedTuple):
    """A 3x3 convolution of a stem, and a batch norm."""

    inputs: int
    outputs: int
    stride: int = 1
    relu_first: bool = False


class Logits(NamedTuple):
    """[N, classes] each; auxiliary is None where there is no such head, or it is not trained."""

    main: Array
    auxiliary: Array | None


class Cells(nn.Module):
    """Cells of one shape in a row, with their parameters stacked along the first axis."""

    cell: Cell
    length: int
    operations: FrozenDict[str, Operation]
    remat: bool

    @nn.compact
    def __call__(
        self, older: Array, newer: Array, train: bool, keep: Array | None
    ) -> tuple[Array, Array]:
        """The outputs of the last two cells; keep [length, edges, N] is for drop path."""
        cell, operations = self.cell, self.operations
        norms = _stacked(discrete.norm_shapes(cell, operations), self.length)
        kernels = self.param(
            "kernels", uniform_fan_in, _stacked(discrete.shapes(cell, operations), self.length), 2
        )
        affine = self.param("affine", _identity, norms)
        stats = self.variable("batch_stats", "moments", _unit_moments, norms)
        if self.is_initializing():  # eagerly, a cell would take a minute to compile
            stride = 2 if cell.reduction else 1
            count, height, width, _ = newer.shape
            channels = len(cell.concat) * cell.channels
            last = jnp.zeros((count, height // stride, width // stride, channels), newer.dtype)
            return (newer if self.length == 1 else last), last

        def step(carry, xs):
            output, batch = discrete.discrete(*xs[:3], carry, cell, operations, *xs[3:])
            return (carry[1], output), batch

        key = noise_key(self, {name: operations[name] for name, _ in cell.edges})
        keys = None if key is None else jax.random.split(key, self.length)
        xs = (kernels, affine, None if train else stats.value, keep, keys)
        body = jax.checkpoint(step) if self.remat else step
        if self.length == 1:  # its output may have another shape than its inputs
            carry, batch = body((older, newer), jax.tree.map(lambda x: x[0], xs))
            batch = jax.tree.map(lambda x: x[None], batch)
        else:
            carry, batch = lax.scan(body, (older, newer), xs)
        if train:
            stats.value = update_running(stats.value, batch)
        return carry


class AuxiliaryHead(nn.Module):
    """A classifier on the features at two thirds of the depth, for training alone."""

    num_classes: int
    stem: Stem

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[N, H, W, C], H and W such that pooling leaves 2x2 -> logits [N, classes]."""
        window, stride = AUXILIARY_WINDOW, AUXILIARY_STRIDE[self.stem]
        sizes = [(size - window) // stride + 1 for size in x.shape[1:3]]
        if sizes != [2, 2]:
            needed = (stride + window) * 4 * 2 ** HALVINGS[self.stem]
            raise ValueError(
                f"the auxiliary head cannot pool {x.shape[1]}x{x.shape[2]} features to 2x2; give"
                f" images of {needed}x{needed}, or train without it"
            )
        first, second = AUXILIARY_CHANNELS
        y = nn.avg_pool(relu(x), (window, window), (stride, stride))
        y = y @ self.param("conv_1", uniform_fan_in, (x.shape[-1], first)).astype(y.dtype)
        y = relu(Norm(affine=True, name="norm_1")(y, train))
        y = conv(y, self.param("conv_2", uniform_fan_in, (2, 2, first, second)).astype(y.dtype))
        if self.stem == "cifar":  # the original has none on ImageNet, for reasons of its own
            y = Norm(affine=True, name="norm_2")(y, train)
        return Classifier(self.num_classes, name="classifier")(relu(y)[:, 0, 0])


class Classifier(nn.Module):
    """A linear layer in float32 at least, initialised as PyTorch does."""

    num_classes: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """[N, C] -> [N, classes]."""
        size = features.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (size, self.num_classes))
        bias = self.param("bias", _uniform, (self.num_classes,), 1 / math.sqrt(size))
        return features.astype(jnp.promote_types(features.dtype, jnp.float32)) @ kernel + bias


class EvaluationNetwork(nn.Module):
    """A discrete network of normal and reduction cells.

    Attributes:
      genotype: the two cells.
      channels: of each node in the first cell; doubled by each reduction cell.
      layers: number of cells, at least 3.
      num_classes: of the classifiers.
      stem: "cifar", which keeps height and width, or "imagenet", which divides them by 8.
      auxiliary: whether a second classifier is trained, on the features of the second reduction.
      operations: those that the genotype names.
      dtype: of the activations and of the arithmetic of convolutions. Parameters, statistics,
        classifiers and losses are float32 at least.
      remat: compute the inside of each cell again for its gradient, rather than keep it.
      batch_norm_groups: as of `networks.Supernet`; the loss is `training.make_loss`.
    """

    genotype: Genotype
    channels: int
    layers: int
    num_classes: int
    stem: Stem = "cifar"
    auxiliary: bool = False
    operations: FrozenDict[str, Operation] = DISCRETE_OPERATIONS
    dtype: Any = None
    remat: bool = False
    batch_norm_groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool, drop_path: Array | float | None = None) -> Logits:
        """Logits of a batch.

        Args:
          x: images [N, H, W, channels], H and W divisible by 4, for "imagenet" by 32.
          train: normalise by the batch, update the running statistics, run the auxiliary head.
          drop_path: probability, in [0, 1), that the output of an edge is dropped for a sample.
            Needs the random key "drop_path", as random operations need "noise".

        Raises:
          ValueError: for fewer than 3 layers, an image size that does not halve often enough or is
            too small for the auxiliary head, or an unknown operation.
        """
        check_layout(self.layers, x.shape, HALVINGS[self.stem] + 2)
        self._check_operations()
        x = x.astype(self.dtype or x.dtype)
        older, newer = self._stem(x, train)
        auxiliary, layer = None, 0
        for cell, length in runs(self):
            keep = self._keep(drop_path, length, len(cell.edges), len(x)) if train else None
            run = Cells(cell, length, self.operations, self.remat, name=f"cells_{layer}")
            older, newer = run(older, newer, train, keep)
            layer += length
            at_auxiliary = layer - 1 == reductions(self.layers)[1]
            if self.auxiliary and at_auxiliary and train:
                head = AuxiliaryHead(self.num_classes, self.stem, name="auxiliary")
                auxiliary = head(newer, train)
        logits = Classifier(self.num_classes, name="classifier")(newer.mean((1, 2)))
        return Logits(logits, auxiliary)

    def _stem(self, x: Array, train: bool) -> tuple[Array, Array]:
        outputs = []
        for i, layers in enumerate(stem_layers(self.stem, self.channels, x.shape[-1])):
            for j, layer in enumerate(layers):
                shape = (3, 3, layer.inputs, layer.outputs)
                kernel = self.param(f"stem_{i}_{j}", uniform_fan_in, shape).astype(x.dtype)
                x = conv(relu(x) if layer.relu_first else x, kernel, layer.stride, padding=1)
                x = Norm(affine=True, name=f"stem_norm_{i}_{j}")(x, train)
            outputs.append(x)
        return outputs[0], outputs[-1]

    def _keep(
        self, drop_path: Array | float | None, length: int, edges: int, count: int
    ) -> Array | None:
        if drop_path is None or self.is_initializing():
            return None
        kept = jax.random.bernoulli(
            self.make_rng("drop_path"), 1 - drop_path, (length, edges, count)
        )
        return kept / (1 - jnp.asarray(drop_path))

    def _check_operations(self) -> None:
        for name, _ in (*self.genotype.normal, *self.genotype.reduce):
            if name not in self.operations:
                raise ValueError(
                    f"the genotype names an operation {name!r} that is not in operations; nearest"
                    f" names: {nearest(name, self.operations)}"
                )


def stem_layers(stem: Stem, channels: int, image_channels: int) -> tuple[tuple[StemConv, ...], ...]:
    """The convolutions that lead to each input of the first cell: the same input twice, or two."""
    if stem == "cifar":
        return ((StemConv(image_channels, STEM_MULTIPLIER * channels),),)
    half = channels // 2
    return (
        (StemConv(image_channels, half, 2), StemConv(half, channels, 2, relu_first=True)),
        (StemConv(channels, channels, 2, relu_first=True),),
    )


def runs(network: EvaluationNetwork) -> Iterator[tuple[Cell, int]]:
    """The cells of a network, in order: (shape, how many of this shape follow each other)."""
    for cell, run in itertools.groupby(_cells(network)):
        yield cell, len(list(run))


def _cells(network: EvaluationNetwork) -> Iterator[Cell]:
    found, channels = network.genotype, network.channels
    stem = stem_layers(network.stem, channels, 1)
    older, newer = stem[0][-1].outputs, stem[-1][-1].outputs
    before = network.stem == "imagenet"
    for i in range(network.layers):
        reduction = i in reductions(network.layers)
        channels *= 2 if reduction else 1
        edges = found.reduce if reduction else found.normal
        concat = found.reduce_concat if reduction else found.normal_concat
        yield Cell(edges, concat, channels, (older, newer), reduction, before)
        older, newer, before = newer, len(concat) * channels, reduction


def multiply_adds(network: EvaluationNetwork, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and classifier for one image, auxiliary head left out.

    Of the ordinary formulation, which applies depthwise and pointwise kernels in turn.

    Args:
      network: what to count.
      image_shape: (height, width, channels).
    """
    height, width, image_channels = image_shape
    total = 0
    for layer in itertools.chain(*stem_layers(network.stem, network.channels, image_channels)):
        height, width = height // layer.stride, width // layer.stride
        total += 9 * layer.inputs * layer.outputs * height * width
    features = 0
    for cell, length in runs(network):
        reduced = 2 if cell.reduction else 1
        older, newer = cell.inputs
        # Preprocessing is at the resolution that the older input is brought to.
        total += length * (older + newer) * cell.channels * height * width
        height, width = height // reduced, width // reduced
        for name, members in discrete.groups(cell).items():
            operation = network.operations[name]
            for group in members:
                per_pixel = sum(
                    math.prod(shape) * operation.uses(leaf, group.stride)
                    for leaf, shape in operation.shapes(cell.channels, group.stride).items()
                )
                total += length * len(group.positions) * per_pixel * height * width
        features = len(cell.concat) * cell.channels
    return total + features * network.num_classes


def count_parameters(params: PyTree) -> int:
    """Numbers in a pytree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _stacked(shapes: PyTree, length: int) -> PyTree:
    return jax.tree.map(
        lambda shape: (length, *shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def _identity(key: Array, shapes: PyTree) -> PyTree:
    def leaf(shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _unit_moments(shapes: PyTree) -> PyTree:
    def leaf(shape):
        return Moments(jnp.zeros(shape), jnp.ones(shape))

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def _uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
