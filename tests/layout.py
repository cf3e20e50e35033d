"""From the recorded weights, in PyTorch's names and layout, to this library's variables."""

import jax
import jax.numpy as jnp
import numpy as np

from darts_jax import cells
from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.operations import OPERATIONS, Moments

NUM_EDGES = 14


def pointwise(w):
    return w[:, :, 0, 0].T


def depthwise(w):
    return w[:, 0].transpose(1, 2, 0)


# Operation -> our parameter -> (the original's parameter, layout).
PARAMETERS = {
    "skip_connect": {"conv_1": ("conv_1", pointwise), "conv_2": ("conv_2", pointwise)},
    **dict.fromkeys(
        ("sep_conv_3x3", "sep_conv_5x5"),
        {
            "depthwise_1": ("op.1", depthwise),
            "pointwise_1": ("op.2", pointwise),
            "depthwise_2": ("op.5", depthwise),
            "pointwise_2": ("op.6", pointwise),
        },
    ),
    **dict.fromkeys(
        ("dil_conv_3x3", "dil_conv_5x5"),
        {"depthwise": ("op.1", depthwise), "pointwise": ("op.2", pointwise)},
    ),
}
NORMS = {
    ("max_pool_3x3", "norm"): "1",
    ("avg_pool_3x3", "norm"): "1",
    ("skip_connect", "norm"): "bn",
    ("sep_conv_3x3", "norm_1"): "op.3",
    ("sep_conv_3x3", "norm"): "op.7",
    ("sep_conv_5x5", "norm_1"): "op.3",
    ("sep_conv_5x5", "norm"): "op.7",
    ("dil_conv_3x3", "norm"): "op.3",
    ("dil_conv_5x5", "norm"): "op.3",
}


def is_reduction(cell, layers):
    return cell in (layers // 3, 2 * layers // 3)


def params(w, layers):
    """Parameters of a Supernet from `{name: array}`, which may also be gradients."""
    tree = {
        "stem": w["stem.0.weight"].transpose(2, 3, 1, 0),
        "stem_norm": {"scale": w["stem.1.weight"], "bias": w["stem.1.bias"]},
        "head_kernel": w["classifier.weight"].T,
        "head_bias": w["classifier.bias"],
    }
    for c in range(layers):
        groups = cells.sources(NUM_EDGES, is_reduction(c, layers))
        edges = {}
        for name, leaves in PARAMETERS.items():
            column = CNN_PRIMITIVES.index(name)
            for leaf, (theirs, layout) in leaves.items():
                rows = [
                    layout(w[key])
                    for group in groups
                    for e in group.edges
                    if (key := f"cells.{c}._ops.{e}._ops.{column}.{theirs}.weight") in w
                ]
                if rows:
                    edges.setdefault(name, {})[leaf] = np.stack(rows)
        tree[f"cell_{c}"] = {"edges": edges} | {
            f"preprocess_{i}": _preprocess(w, f"cells.{c}.preprocess{i}") for i in (0, 1)
        }
    return jax.tree.map(jnp.asarray, tree)


def _preprocess(w, prefix):
    if f"{prefix}.op.1.weight" in w:
        return {"kernel": pointwise(w[f"{prefix}.op.1.weight"])}
    return {leaf: pointwise(w[f"{prefix}.{leaf}.weight"]) for leaf in ("conv_1", "conv_2")}


def batch_stats(buffers, layers):
    """Running statistics of a Supernet from `{name: array}`; NaN where buffers lacks a norm."""

    def moments(prefix, channels=None):
        pair = [buffers.get(f"{prefix}.running_{kind}") for kind in ("mean", "var")]
        return Moments(*(np.full(channels, np.nan) if m is None else m for m in pair))

    tree = {"stem_norm": {"moments": moments("stem.1")}}
    for c in range(layers):
        reduction = is_reduction(c, layers)
        before = f"cells.{c}.preprocess0"
        strided = f"{before}.bn.running_mean" in buffers
        channels = len(buffers[f"cells.{c}.preprocess1.op.2.running_mean"])
        rows = [
            moments(
                f"cells.{c}._ops.{e}._ops.{CNN_PRIMITIVES.index(key[0])}.{NORMS[key]}", channels
            )
            for group in cells.sources(NUM_EDGES, reduction)
            for key in cells.norms(OPERATIONS, group.stride)
            for e in group.edges
        ]
        tree[f"cell_{c}"] = {
            "edges": jax.tree.map(lambda *rows: np.stack(rows), *rows),
            "preprocess_0": {
                "Norm_0": {"moments": moments(before + (".bn" if strided else ".op.2"))}
            },
            "preprocess_1": {"Norm_0": {"moments": moments(f"cells.{c}.preprocess1.op.2")}},
        }
    return jax.tree.map(jnp.asarray, tree)
