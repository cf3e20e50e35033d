"""From the recorded weights, in PyTorch's names and layout, to this library's variables."""

import jax
import jax.numpy as jnp
import numpy as np

from darts_jax import cells, discrete, evaluation
from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.operations import DISCRETE_OPERATIONS, OPERATIONS, Moments

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
        groups = cells.groups(NUM_EDGES, is_reduction(c, layers), OPERATIONS)
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
            for group in cells.groups(NUM_EDGES, reduction, OPERATIONS)
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


# The evaluation network, whose parameters are stacked by operation and by run of equal cells.


def _runs(network):
    layer = 0
    for cell, length in evaluation.runs(network):
        yield layer, cell, range(layer, layer + length)
        layer += length


def evaluation_params(w, network, total=False):
    """Parameters of an EvaluationNetwork from `{name: array}`.

    If total, each array is one number for all of a tensor, [1], and is not laid out.
    """
    lay = (lambda layout, x: x[0]) if total else (lambda layout, x: layout(x))
    image = lambda x: x.transpose(2, 3, 1, 0)  # noqa: E731
    plain = lambda x: x  # noqa: E731

    def affine(prefix):
        return {"scale": lay(plain, w[f"{prefix}.weight"]), "bias": lay(plain, w[f"{prefix}.bias"])}

    def linear(prefix):
        kernel = lay(np.transpose, w[f"{prefix}.weight"])
        return {"kernel": kernel, "bias": lay(plain, w[f"{prefix}.bias"])}

    tree = {"classifier": linear("classifier")}
    for (i, j), (conv, norm) in STEMS[network.stem].items():
        tree[f"stem_{i}_{j}"] = lay(image, w[f"{conv}.weight"])
        tree[f"stem_norm_{i}_{j}"] = affine(norm)
    if network.auxiliary:
        prefix = "auxiliary_head.features"
        tree["auxiliary"] = {
            "conv_1": lay(pointwise, w[f"{prefix}.2.weight"]),
            "norm_1": affine(f"{prefix}.3"),
            "conv_2": lay(image, w[f"{prefix}.5.weight"]),
            "classifier": linear("auxiliary_head.classifier"),
        }
        if network.stem == "cifar":
            tree["auxiliary"]["norm_2"] = affine(f"{prefix}.6")
    for first, cell, layers in _runs(network):
        kernels = [_cell_kernels(w, f"cells.{i}", cell, lay) for i in layers]
        norms = [_cell_norms(f"cells.{i}", cell, affine) for i in layers]
        tree[f"cells_{first}"] = {"kernels": _stack(kernels), "affine": _stack(norms)}
    return jax.tree.map(jnp.asarray, tree)


def evaluation_stats(buffers, network):
    """Running statistics of an EvaluationNetwork from `{name: array}`."""

    def moments(prefix):
        return Moments(*(buffers[f"{prefix}.running_{kind}"] for kind in ("mean", "var")))

    tree = {
        f"stem_norm_{i}_{j}": {"moments": moments(norm)}
        for (i, j), (_, norm) in STEMS[network.stem].items()
    }
    for first, cell, layers in _runs(network):
        rows = [_cell_norms(f"cells.{i}", cell, moments) for i in layers]
        tree[f"cells_{first}"] = {"moments": _stack(rows)}
    if network.auxiliary:
        norms = {"norm_1": 3} | ({"norm_2": 6} if network.stem == "cifar" else {})
        tree["auxiliary"] = {
            name: {"moments": moments(f"auxiliary_head.features.{i}")} for name, i in norms.items()
        }
    return jax.tree.map(jnp.asarray, tree)


# (input of the first cell, layer) -> the original's convolution and batch norm.
STEMS = {
    "cifar": {(0, 0): ("stem.0", "stem.1")},
    "imagenet": {
        (0, 0): ("stem0.0", "stem0.1"),
        (0, 1): ("stem0.3", "stem0.4"),
        (1, 0): ("stem1.1", "stem1.2"),
    },
}


def _stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _cell_kernels(w, prefix, cell, lay):
    def rows(leaves, prefixes):
        found = {}
        for leaf, (theirs, layout) in leaves.items():
            present = [p for p in prefixes if f"{p}.{theirs}.weight" in w]
            if present:
                found[leaf] = np.stack([lay(layout, w[f"{p}.{theirs}.weight"]) for p in present])
        return found

    tree = {}
    for i in (0, 1):
        reduces = f"{prefix}.preprocess{i}.conv_1.weight" in w
        leaves = PARAMETERS["skip_connect"] if reduces else {"kernel": ("op.1", pointwise)}
        tree[f"preprocess_{i}"] = rows(leaves, [f"{prefix}.preprocess{i}"])
    for name, members in discrete.groups(cell).items():
        prefixes = [f"{prefix}._ops.{j}" for group in members for j in group.positions]
        if found := rows(PARAMETERS.get(name, {}), prefixes):
            tree[name] = found
    return tree


def _cell_norms(prefix, cell, make):
    reduces = {0: cell.reduction_before, 1: False}
    tree = {
        f"preprocess_{i}": {"norm": _stack([make(f"{prefix}.preprocess{i}.{norm}")])}
        for i, norm in ((i, "bn" if reduces[i] else "op.2") for i in (0, 1))
    }
    for name, norms in discrete.norm_shapes(cell, DISCRETE_OPERATIONS).items():
        if name in discrete.PREPROCESS:
            continue
        members = discrete.groups(cell)[name]
        if name == "skip_connect":
            members = [group for group in members if group.stride == 2]
        positions = [j for group in members for j in group.positions]
        tree[name] = {
            norm: _stack([make(f"{prefix}._ops.{j}.{NORMS[name, norm]}") for j in positions])
            for norm in norms
        }
    return tree
