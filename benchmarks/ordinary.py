"""The network of the search written the ordinary way in JAX, to compare `darts_jax` with.

One operation at a time on one edge at a time: grouped convolutions for depthwise ones, windows
reduced by XLA for pooling, a batch norm for each output. It computes what
`darts_jax.networks.Supernet` does and shares no arithmetic with it, so it is an oracle as well.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from darts_jax.genotype import CNN_PRIMITIVES, edges

PyTree = Any
Norm = Callable[[Array], Array]

EDGES = tuple((i, j) for j in range(2, 6) for i in range(j))  # (source, destination), as in alpha


def conv(x, kernel, stride=1, padding=0, dilation=1, groups=1) -> Array:
    """Convolution of [N, H, W, C_in] by [k, k, C_in / groups, C_out], padding on every side."""
    sides = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        sides,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def depthwise_pointwise(x, depthwise, pointwise, stride, padding, dilation=1) -> Array:
    """ReLU, depthwise convolution by [k, k, C], 1x1 convolution by [C, D]."""
    y = jax.nn.relu(x)
    y = conv(y, depthwise[:, :, None], stride, padding, dilation, groups=x.shape[-1])
    return conv(y, pointwise[None, None])


def factorized_reduce(p, x) -> Array:
    """ReLU, then 1x1 convolutions at stride 2 of x and of x without its first row and column."""
    x = jax.nn.relu(x)
    halves = [conv(x, p["conv_1"][None, None], 2), conv(x[:, 1:, 1:], p["conv_2"][None, None], 2)]
    return jnp.concatenate(halves, -1)


def _max_pool(p, x, stride, norm):
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    y = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), sides)
    return norm(y)


def _avg_pool(p, x, stride, norm):
    def total(x):
        sides = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, stride, stride, 1), sides)

    return norm(total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype)))


def _skip_connect(p, x, stride, norm):
    return x if stride == 1 else norm(factorized_reduce(p, x))


def _sep_conv(p, x, stride, norm):
    padding = p["depthwise_1"].shape[0] // 2
    y = norm(depthwise_pointwise(x, p["depthwise_1"], p["pointwise_1"], stride, padding))
    return norm(depthwise_pointwise(y, p["depthwise_2"], p["pointwise_2"], 1, padding))


def _dil_conv(p, x, stride, norm):
    padding = p["depthwise"].shape[0] - 1
    return norm(depthwise_pointwise(x, p["depthwise"], p["pointwise"], stride, padding, dilation=2))


OPERATIONS = {  # "none" is zero
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _avg_pool,
    "skip_connect": _skip_connect,
    "sep_conv_3x3": _sep_conv,
    "sep_conv_5x5": _sep_conv,
    "dil_conv_3x3": _dil_conv,
    "dil_conv_5x5": _dil_conv,
}


def _reduce_shapes(inputs: int, outputs: int) -> PyTree:
    return {"conv_1": (inputs, outputs // 2), "conv_2": (inputs, outputs - outputs // 2)}


def _edge_shapes(channels: int, stride: int) -> PyTree:
    shapes = {} if stride == 1 else {"skip_connect": _reduce_shapes(channels, channels)}
    for size in (3, 5):
        taps, mix = (size, size, channels), (channels, channels)
        shapes[f"dil_conv_{size}x{size}"] = {"depthwise": taps, "pointwise": mix}
        shapes[f"sep_conv_{size}x{size}"] = {
            "depthwise_1": taps,
            "pointwise_1": mix,
            "depthwise_2": taps,
            "pointwise_2": mix,
        }
    return shapes


@dataclass(frozen=True)
class Supernet:
    """Stands in for `darts_jax.networks.Supernet`: it has the same `init` and `apply`.

    The parameters differ in "edges" only, which is a list of one dict an edge, ordered as alpha:
    see `from_supernet`. "batch_stats" is a list of (mean, variance) in the order of computation.
    """

    channels: int
    layers: int
    num_classes: int
    nodes: ClassVar[int] = 4
    primitives: tuple[str, ...] = CNN_PRIMITIVES

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the mixing weights of each kind of cell: [edges, candidates]."""
        shape = (len(edges(self.nodes)), len(self.primitives))
        return dict.fromkeys(("normal", "reduce"), shape)

    def cells(self) -> list[tuple[int, bool, bool]]:
        """For each cell: its channels, whether it reduces, and whether the one before did."""
        reduces = [i in (self.layers // 3, 2 * self.layers // 3) for i in range(self.layers)]
        factors = [2**count for count in itertools.accumulate(reduces)]
        return [
            (self.channels * factor, *pair)
            for factor, *pair in zip(factors, reduces, [False, *reduces[:-1]], strict=True)
        ]

    def shapes(self, image_channels: int) -> PyTree:
        """Shapes of the kernels, each uniform at the start."""
        older = newer = 3 * self.channels
        tree: dict[str, PyTree] = {"stem": (3, 3, image_channels, newer)}
        for i, (channels, reduction, before) in enumerate(self.cells()):
            reduce, plain = _reduce_shapes(older, channels), {"kernel": (older, channels)}
            strides = [2 if reduction and source < 2 else 1 for source, _ in EDGES]
            tree[f"cell_{i}"] = {
                "preprocess_0": reduce if before else plain,
                "preprocess_1": {"kernel": (newer, channels)},
                "edges": [_edge_shapes(channels, stride) for stride in strides],
            }
            older, newer = newer, 4 * channels
        return tree | {"head_kernel": (newer, self.num_classes)}

    def init(self, key: Array, x: Array, weights: Mapping[str, Array], train: bool) -> PyTree:
        """Parameters, uniform in +-1 / sqrt(fan-in), and running statistics."""
        # By NumPy: each of a thousand eager draws would be compiled for its shape.
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

        def draw(shape):
            bound = 1 / math.sqrt(math.prod(shape[:-1]))
            return jnp.asarray(rng.uniform(-bound, bound, shape), x.dtype)

        params = jax.tree.map(draw, self.shapes(x.shape[-1]), is_leaf=lambda s: type(s) is tuple)
        width = 3 * self.channels
        params["stem_norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        params["head_bias"] = jnp.zeros(self.num_classes)
        initial = itertools.repeat((jnp.zeros(()), jnp.ones(())))
        _, stats = jax.eval_shape(
            lambda params: self._forward(params, initial, x, weights, True), params
        )
        stats = [(jnp.zeros(mean.shape), jnp.ones(var.shape)) for mean, var in stats]
        return {"params": params, "batch_stats": stats}

    def apply(
        self,
        variables: PyTree,
        x: Array,
        weights: Mapping[str, Array],
        train: bool,
        mutable: Collection[str] = (),
    ) -> Any:
        """Logits [N, classes] of images [N, H, W, C]; with new statistics if those are mutable."""
        logits, stats = self._forward(
            variables["params"], variables["batch_stats"], x, weights, train
        )
        return (logits, {"batch_stats": stats}) if "batch_stats" in mutable else logits

    def _forward(self, params, running: Iterable, x, weights, train: bool):
        norm, stats = _batch_norm(running, train)
        affine = params["stem_norm"]
        stem = norm(conv(x, params["stem"], padding=1)) * affine["scale"] + affine["bias"]
        older = newer = stem
        for i, (_, reduction, before) in enumerate(self.cells()):
            mix = weights["reduce" if reduction else "normal"]
            cell = self.cell(params[f"cell_{i}"], older, newer, mix, reduction, before, norm)
            older, newer = newer, cell
        return newer.mean((1, 2)) @ params["head_kernel"] + params["head_bias"], stats

    def cell(
        self,
        p: PyTree,
        older: Array,
        newer: Array,
        weights: Array,
        reduction: bool,
        before: bool,
        norm: Norm,
    ) -> Array:
        """One cell, [N, H', W', 4 C], of inputs [N, H, W, C'], parameters as in `shapes`."""
        if before:
            older = norm(factorized_reduce(p["preprocess_0"], older))
        else:
            older = norm(conv(jax.nn.relu(older), p["preprocess_0"]["kernel"][None, None]))
        newer = norm(conv(jax.nn.relu(newer), p["preprocess_1"]["kernel"][None, None]))
        states = [older, newer]
        for node in range(2, 6):
            total = 0
            for edge, (source, destination) in enumerate(EDGES):
                if destination != node:
                    continue
                stride = 2 if reduction and source < 2 else 1
                for name, operation in OPERATIONS.items():
                    y = operation(p["edges"][edge].get(name), states[source], stride, norm)
                    total = total + weights[edge, self.primitives.index(name)] * y
            states.append(total)
        return jnp.concatenate(states[2:], -1)


def _batch_norm(running: Iterable, train: bool) -> tuple[Norm, list]:
    """A function that normalises, and the list of running statistics that it fills."""
    old, new = iter(running), []

    def norm(y):
        mean, var = next(old)
        if train:
            m, v = y.mean((0, 1, 2)), y.var((0, 1, 2))
            count = y.size // y.shape[-1]
            new.append((0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * count / (count - 1)))
            mean, var = m, v
        else:
            new.append((mean, var))
        return (y - mean) / jnp.sqrt(var + 1e-5)

    return norm, new


def batch_norm(y: Array) -> Array:
    """y [N, H, W, C], normalised by the batch."""
    return (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-5)


def from_supernet(params: PyTree) -> PyTree:
    """The parameters of a `darts_jax.networks.Supernet` as those of this one.

    That one stacks the edges of each parameter, ordered by source, then by destination. Only the
    edges that leave the inputs have stride 2: where no other has the parameter, the stack ends.
    """
    order = sorted(EDGES)

    def unstack(cell):
        edges = []
        for edge in EDGES:
            row = order.index(edge)
            leaves = {
                name: {leaf: stack[row] for leaf, stack in stacks.items() if row < len(stack)}
                for name, stacks in cell["edges"].items()
            }
            edges.append({name: held for name, held in leaves.items() if held})
        return cell | {"edges": edges}

    return {
        name: unstack(value) if name.startswith("cell_") else value
        for name, value in params.items()
    }
