"""The published cells have the parameter counts that were recorded from the original."""

import pytest

from darts_jax.genotype import PUBLISHED

# (trainable parameters, parameter tensors) of each part of the evaluation network, written down
# from the paper's description, so that a wrong operation, source or concat shows in the totals.


def batch_norm(channels):
    return 2 * channels, 2


def convolution(channels_in, channels_out, kernel=1):
    return channels_in * channels_out * kernel, 1


def total(*parts):
    return tuple(map(sum, zip((0, 0), *parts, strict=True)))


def relu_conv_bn(channels_in, channels_out):
    return total(convolution(channels_in, channels_out), batch_norm(channels_out))


def factorised_reduce(channels_in, channels_out):
    half = convolution(channels_in, channels_out // 2)
    return total(half, half, batch_norm(channels_out))


def operation(name, channels, stride):
    kind, size = name.split("_")[0], int(name[-1]) if name[-1].isdigit() else 0
    block = total((channels * size**2, 1), relu_conv_bn(channels, channels))
    if name == "conv_7x1_1x7":
        strip = convolution(channels, channels, 7)
        return total(strip, strip, batch_norm(channels))
    if name == "skip_connect":
        return factorised_reduce(channels, channels) if stride == 2 else (0, 0)
    return {"sep": total(block, block), "dil": block, "max": (0, 0), "avg": (0, 0)}[kind]


def cells(cell, channels, layers, before, before_before, reduced):
    parts = []
    for layer in range(layers):
        reduction = layer in (layers // 3, 2 * layers // 3)
        channels *= 1 + reduction
        preprocess = factorised_reduce if reduced else relu_conv_bn
        parts += [preprocess(before_before, channels), relu_conv_bn(before, channels)]
        edges, concat = cell[2:] if reduction else cell[:2]
        for name, source in edges:
            parts.append(operation(name, channels, 2 if reduction and source < 2 else 1))
        before_before, before, reduced = before, channels * len(concat), reduction
        if layer == 2 * layers // 3:
            at_auxiliary = before
    return total(*parts), before, at_auxiliary


def linear(features, classes):
    return features * classes + classes, 2


def auxiliary(channels, classes, last_norm):
    return total(
        relu_conv_bn(channels, 128),
        convolution(128, 768, 4),
        batch_norm(768) if last_norm else (0, 0),
        linear(768, classes),
    )


def cifar(cell, classes=10, channels=36, layers=20):
    stem = total(convolution(3, 3 * channels, 9), batch_norm(3 * channels))
    body, features, at = cells(cell, channels, layers, 3 * channels, 3 * channels, False)
    return total(stem, body, linear(features, classes)), auxiliary(at, classes, True)


def imagenet(cell, classes=1000, channels=48, layers=14):
    widths = [3, channels // 2, channels, channels]
    steps = zip(widths, widths[1:], strict=False)
    stem = [total(convolution(i, o, 9), batch_norm(o)) for i, o in steps]
    body, features, at = cells(cell, channels, layers, channels, channels, True)
    return total(*stem, body, linear(features, classes)), auxiliary(at, classes, False)


RECORDED = ("DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet")


@pytest.mark.parametrize("name", RECORDED)
def test_published_cells_have_the_recorded_parameter_counts(name, oracle):
    params = oracle("params.json")
    recorded = params["eval_cifar"][name], params["eval_imagenet"][name]
    for prefix, (network, head), expected in [
        ("", cifar(PUBLISHED[name]), recorded[0]),
        ("cifar100_", cifar(PUBLISHED[name], classes=100), recorded[0]),
        ("", imagenet(PUBLISHED[name]), recorded[1]),
    ]:
        without = expected[f"{prefix}auxiliary_False"]
        assert network == (without["all"], without["num_param_tensors"])
        whole = expected[f"{prefix}auxiliary_True"]
        assert total(network, head) == (whole["all"], whole["num_param_tensors"])
        assert head[0] == whole["auxiliary"]


# Millions of parameters on CIFAR-10, as the papers' tables give them.
REPORTED = {"P_DARTS": 3.4, "PC_DARTS": 3.6, "GDAS": 3.4, "DrNAS": 4.1}


@pytest.mark.parametrize("name", REPORTED)
def test_published_cells_have_the_reported_size(name):
    (parameters, _), _ = cifar(PUBLISHED[name])
    assert round(parameters / 1e6, 1) == REPORTED[name]


def test_the_size_of_every_published_cell_is_known():
    assert {*RECORDED, *REPORTED} == set(PUBLISHED)


@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet"])
def test_cells_of_the_nasnet_space_concatenate_the_nodes_that_no_node_uses(name):
    normal, normal_concat, reduce, reduce_concat = PUBLISHED[name]
    for cell, concat in [(normal, normal_concat), (reduce, reduce_concat)]:
        used = {source for _, source in cell}
        assert concat == tuple(state for state in range(2, 7) if state not in used)
