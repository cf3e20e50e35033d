"""The evaluation network against numbers recorded from the original, and its own invariants."""

import re

import jax
import jax.numpy as jnp
import layout
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from darts_jax import discrete, evaluation, search
from darts_jax.evaluation import EvaluationNetwork
from darts_jax.genotype import PUBLISHED, Genotype
from darts_jax.operations import DISCRETE_OPERATIONS, Moments, update_running

RTOL = 1e-9
SMALL = Genotype(
    normal=(("dil_conv_3x3", 0), ("skip_connect", 1)),
    normal_concat=(2,),
    reduce=(("max_pool_3x3", 0), ("skip_connect", 1)),
    reduce_concat=(2,),
)


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry: a value near zero is a difference of larger ones."""
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# Parameter counts and multiply-adds.


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet"])
@pytest.mark.parametrize(
    ("group", "key", "network"),
    [
        ("eval_cifar", "auxiliary", dict(channels=36, layers=20, num_classes=10)),
        ("eval_cifar", "cifar100_auxiliary", dict(channels=36, layers=20, num_classes=100)),
        (
            "eval_imagenet",
            "auxiliary",
            dict(channels=48, layers=14, num_classes=1000, stem="imagenet"),
        ),
    ],
    ids=["cifar10", "cifar100", "imagenet"],
)
def test_parameter_count(oracle, group, key, network, name, auxiliary):
    recorded = oracle("params.json")[group][name][f"{key}_{auxiliary}"]
    network = EvaluationNetwork(PUBLISHED[name], auxiliary=auxiliary, **network)
    size = 224 if network.stem == "imagenet" else 32
    variables = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=True)
    )
    assert evaluation.count_parameters(variables["params"]) == recorded["all"]
    head = variables["params"].get("auxiliary", {})
    assert evaluation.count_parameters(head) == recorded["auxiliary"]


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet"])
@pytest.mark.parametrize(
    ("group", "size", "network"),
    [
        ("eval_cifar", 32, dict(channels=36, layers=20, num_classes=10)),
        ("eval_imagenet", 224, dict(channels=48, layers=14, num_classes=1000, stem="imagenet")),
    ],
    ids=["cifar", "imagenet"],
)
def test_multiply_adds(oracle, group, size, network, name):
    recorded = oracle("params.json")[group][name][f"macs_{size}x{size}_eval"]["total"]
    network = EvaluationNetwork(PUBLISHED[name], **network)
    assert evaluation.multiply_adds(network, (size, size, 3)) == recorded


# Recorded networks.


@pytest.fixture(scope="module", params=["eval_cnn", "eval_imagenet"])
def recorded(request, oracle_path):
    return dict(np.load(oracle_path / f"{request.param}.npz"))


@pytest.fixture(scope="module")
def network(recorded):
    return EvaluationNetwork(
        PUBLISHED[str(recorded["cfg/genotype"])],
        int(recorded["cfg/C"]),
        int(recorded["cfg/layers"]),
        int(recorded["cfg/num_classes"]),
        "imagenet" if "cfg/label_smooth" in recorded else "cifar",
        auxiliary=True,
    )


@pytest.fixture(scope="module")
def variables(recorded, network, unpack):
    with jax.enable_x64(True):
        return {
            "params": layout.evaluation_params(unpack(recorded, "w"), network),
            "batch_stats": layout.evaluation_stats(unpack(recorded, "buf"), network),
        }


@pytest.fixture(scope="module")
def images(recorded):
    return recorded["x"].astype(np.float64).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def training(recorded, network, variables, images):
    """Losses, logits, statistics and gradients of one training batch."""

    def loss(params):
        logits, updated = network.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        targets = jax.nn.one_hot(recorded["y"], logits.main.shape[-1])
        targets = optax.smooth_labels(targets, float(recorded.get("cfg/label_smooth", 0.0)))
        main, auxiliary = (optax.softmax_cross_entropy(x, targets).mean() for x in logits)
        total = main + float(recorded["cfg/auxiliary_weight"]) * auxiliary
        return total, (main, auxiliary, logits, updated["batch_stats"])

    with jax.enable_x64(True):
        (total, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"]
        )
        return total, *aux, gradient


@pytest.mark.usefixtures("x64")
def test_recorded_evaluation(recorded, network, variables, images):
    logits = jax.jit(lambda: network.apply(variables, images, train=False))()
    assert logits.auxiliary is None
    close(logits.main, recorded["out/eval/logits"])
    loss = search.cross_entropy(logits.main, recorded["y"]).mean()
    close(loss, recorded.get("out/eval/loss", recorded.get("out/eval/loss_ce")))


def test_recorded_training(recorded, training):
    total, main, auxiliary, logits, *_ = training
    close(logits.main, recorded["out/train/logits"])
    close(logits.auxiliary, recorded["out/train/logits_aux"])
    close(main, recorded["out/train/loss_main"])
    close(auxiliary, recorded["out/train/loss_aux"])
    close(total, recorded["out/train/loss_total"])


@pytest.mark.usefixtures("x64")
def test_recorded_gradient_norms(recorded, network, training):
    """Tensor by tensor, where each of ours holds several of the original's."""
    *_, gradient = training
    norms = dict(zip(map(str, recorded["w_names"]), recorded["out/train/grad_norms"], strict=True))
    squares = {name: np.full(1, norm**2) for name, norm in norms.items()}
    expected = layout.evaluation_params(squares, network, total=True)
    actual = jax.tree.map(lambda g, e: (g**2).reshape(*np.shape(e), -1).sum(-1), gradient, expected)
    jax.tree.map(lambda a, e: close(jnp.sqrt(a), np.sqrt(e)), actual, expected)
    checked = sum(e.sum() for e in jax.tree.leaves(expected))
    np.testing.assert_allclose(checked, (recorded["out/train/grad_norms"] ** 2).sum())


@pytest.mark.usefixtures("x64")
def test_recorded_gradients_and_statistics(recorded, network, training, unpack):
    *_, stats, gradient = training
    for pack, prefix, make, ours in (
        ("w", "out/train/grad/", layout.evaluation_params, gradient),
        ("buf", "out/train/buf_after/", layout.evaluation_stats, stats),
    ):
        known = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        blank = {name: np.full_like(v, np.nan) for name, v in unpack(recorded, pack).items()}
        theirs = make(blank | known, network)
        checked = 0
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            at = ~np.isnan(b)
            scale = np.abs(np.asarray(b)[at]).max(initial=0)
            np.testing.assert_allclose(np.asarray(a)[at], b[at], rtol=RTOL, atol=RTOL * scale)
            checked += at.sum()
        assert checked == sum(value.size for value in known.values())


@pytest.mark.usefixtures("x64")
def test_recorded_evaluation_after_training(recorded, network, variables, images, training):
    if "out/eval_after_train_forward/logits" not in recorded:
        pytest.skip("not recorded for this network")
    *_, stats, _ = training
    variables = {**variables, "batch_stats": stats}
    logits = jax.jit(lambda: network.apply(variables, images, train=False))()
    close(logits.main, recorded["out/eval_after_train_forward/logits"])


# Invariants.


def build(layers=3, dtype=jnp.float64, **options):
    network = EvaluationNetwork(SMALL, 4, layers, 10, **options)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1), dtype)
    variables = network.init(jax.random.key(0), images, train=True)
    # Away from scale 1 and shift 0, at which wrong ones would not show.
    flat, unravel = ravel_pytree(variables["params"])
    noise = 0.1 * jax.random.normal(jax.random.key(2), flat.shape, flat.dtype)
    return network, {**variables, "params": unravel(flat + noise)}, images


def run(network, variables, images, **options):
    def loss(params):
        logits, updated = network.apply(
            {**variables, "params": params}, images, True, mutable=["batch_stats"], **options
        )
        return (logits.main**2).sum(), (logits.main, updated)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("train", [True, False])
def test_cells_in_a_row_are_those_one_after_the_other(train):
    cell = discrete.Cell(SMALL.normal, SMALL.normal_concat, 4, (4, 4), False, False)
    row = evaluation.Cells(cell, 3, DISCRETE_OPERATIONS, remat=False)
    older, newer = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 4))
    keep = jax.random.uniform(jax.random.key(1), (3, 2, 3))
    variables = row.init(jax.random.key(2), older, newer, True, None)
    flat, unravel = ravel_pytree(variables)
    variables = unravel(flat + jax.random.uniform(jax.random.key(3), flat.shape) / 2)

    @jax.jit
    def in_a_row():
        return row.apply(variables, older, newer, train, keep, mutable=["batch_stats"])

    @jax.jit
    def one_after_the_other():
        inputs, after = (older, newer), []
        for i in range(3):
            own = jax.tree.map(lambda x, i=i: x[i], variables)
            stats = own["batch_stats"]["moments"]
            output, batch = discrete.discrete(
                own["params"]["kernels"],
                own["params"]["affine"],
                None if train else stats,
                inputs,
                cell,
                DISCRETE_OPERATIONS,
                keep[i],
            )
            inputs = inputs[1], output
            after.append(update_running(stats, batch) if train else stats)
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)
        return inputs, {"batch_stats": {"moments": stats}}

    jax.tree.map(lambda a, e: close(a, e, 1e-11), in_a_row(), one_after_the_other())


def test_rows_of_cells():
    """Reductions, and what has other inputs, stand alone."""
    lengths = [length for _, length in evaluation.runs(build(20, jnp.float32)[0])]
    assert lengths == [1, 1, 4, 1, 1, 5, 1, 1, 5]


@pytest.mark.usefixtures("x64")
def test_remat_changes_nothing():
    network, variables, images = build()
    again = network.clone(remat=True)
    expected, actual = (run(n, variables, images) for n in (network, again))
    jax.tree.map(lambda a, e: close(a, e, 1e-12), actual, expected)


def test_bfloat16_is_near_float32():
    """Parameters, gradients, statistics and logits stay float32."""
    network, variables, images = build(dtype=jnp.float32)
    (_, (expected, _)), _ = run(network, variables, images)
    (_, (logits, updated)), gradient = run(network.clone(dtype=jnp.bfloat16), variables, images)
    assert {x.dtype for x in jax.tree.leaves((logits, updated, gradient))} == {jnp.dtype("float32")}
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-5 < error < 0.05  # it did compute in bfloat16, of 8 bits


@pytest.mark.usefixtures("x64")
def test_recorded_drop_path(oracle, monkeypatch):
    """What is kept is divided by the probability to be kept."""
    recorded = oracle("misc.npz")
    x, y, kept = (recorded[f"drop_path/{name}"] for name in ("x", "y", "keep"))

    def bernoulli(key, probability, shape):
        np.testing.assert_allclose(probability, 1 - recorded["drop_path/prob"], rtol=1e-12)
        return jnp.broadcast_to(kept, shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    network = EvaluationNetwork(PUBLISHED["DARTS_V2"], 2, 3, 10)
    factors = network.apply(
        {},
        float(recorded["drop_path/prob"]),
        3,
        8,
        len(x),
        method="_keep",
        rngs={"drop_path": jax.random.key(0)},
    )
    assert factors.shape == (3, 8, len(x))
    for factor in factors.reshape(-1, len(x)):
        np.testing.assert_allclose(x * factor[:, None, None, None], y, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_drop_path_of_zero_is_none():
    network, variables, images = build()
    rngs = {"drop_path": jax.random.key(3)}
    expected = run(network, variables, images)
    actual = run(network, variables, images, drop_path=0.0, rngs=rngs)
    jax.tree.map(lambda a, e: close(a, e, 1e-12), actual, expected)


def test_drop_path_is_left_out_of_evaluation():
    network, variables, images = build(dtype=jnp.float32)
    expected = network.apply(variables, images, False).main
    np.testing.assert_array_equal(
        network.apply(variables, images, False, drop_path=0.5).main, expected
    )


def test_drop_path_draws_anew_for_each_cell_edge_and_sample():
    network, variables, images = build(layers=12, dtype=jnp.float32)
    images = jnp.tile(images, (10, 1, 1, 1))
    seen = []

    def record(kernels, affine, running, inputs, cell, operations, keep, key):
        seen.append(keep)
        count, height, width, _ = inputs[1].shape
        stride, channels = 2 if cell.reduction else 1, cell.channels * len(cell.concat)
        output = jnp.zeros((count, height // stride, width // stride, channels))
        moments = jax.tree.map(
            lambda leaf: Moments(leaf["scale"], leaf["bias"]),
            affine,
            is_leaf=lambda leaf: "scale" in leaf,
        )
        return output, moments

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(discrete, "discrete", record)
        rngs = {"drop_path": jax.random.key(0)}
        network.apply(variables, images, True, 0.4, rngs=rngs, mutable=["batch_stats"])
    masks = np.stack(seen)
    assert masks.shape == (12, 2, 30)
    np.testing.assert_allclose(np.unique(masks), [0, 1 / 0.6], rtol=1e-6)
    assert len({mask.tobytes() for mask in masks}) == 12
    np.testing.assert_allclose((masks > 0).mean(), 0.6, atol=0.08)


@pytest.mark.parametrize(
    ("layers", "size", "options", "message"),
    [
        (2, 8, {}, "at least 3 layers.*got 2"),
        (3, 10, {}, "10x10 do not halve twice.*multiple of 4"),
        (3, 48, {"stem": "imagenet"}, "48x48 do not halve 5 times.*multiple of 32"),
        (3, 8, {"auxiliary": True}, "cannot pool 2x2 features.*32x32, or train without"),
        (3, 64, {"auxiliary": True, "stem": "imagenet"}, "pool 2x2 features.*224x224"),
        (3, 8, {"operations": DISCRETE_OPERATIONS.pop("skip_connect")[0]}, "'skip_connect' that"),
    ],
)
def test_refuses(layers, size, options, message):
    network = EvaluationNetwork(SMALL, 4, layers, 10, **options)
    with pytest.raises(ValueError, match=message) as error:
        network.init(jax.random.key(0), jnp.zeros((1, size, size, 1)), True)
    assert not re.search("\n", str(error.value))
