"""The remedies as flags of a search."""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_network import TinyNetwork

from darts_jax import genotype, hypergradient, relaxation, search
from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.networks import Supernet
from experiments import remedies, search_cnn, select_cnn
from experiments.remedies import REMOVED, RemediesConfig

OFF = RemediesConfig()
CELLS = ("normal", "reduce")
OPTIMIZER = optax.sgd(0.1)


def tiny(config, num_classes):
    return TinyNetwork(config.channels, config.layers, num_classes, config.nodes)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty one, with a network that compiles quickly, no pictures and no cache."""
    monkeypatch.setattr(search_cnn, "supernet", tiny)
    monkeypatch.setattr(search_cnn, "draw", lambda *_: [])
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, name, *flags, epochs=1):
    arguments = ["smoke", "--search.epochs", str(epochs), "--workdir", name, *flags]
    assert search_cnn.main(arguments) == 0
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "epoch"]


def flags(**fields):
    return [
        text
        for name, value in fields.items()
        for text in (f"--search.remedies.{name.replace('_', '-')}", *map(str, value))
    ]


def test_all_off_is_plain_darts_bit_for_bit():
    network = TinyNetwork(2, 3, 10, nodes=1)
    key, shape = jax.random.key(0), (4, 4, 1)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32)
    batch = search.Batch(image, jnp.arange(4))

    def estimator(problem):
        return hypergradient.unrolled(problem, OPTIMIZER)

    own = remedies.make_step(
        OFF, network, remedies.make_relaxation(OFF, None), estimator, OPTIMIZER, OPTIMIZER, True, 9
    )
    plain = search.make_step(network, estimator, OPTIMIZER, OPTIMIZER, skip_nonfinite=True)
    results = []
    for step, extra in ((own, [remedies.init_alpha(OFF)]), (plain, [])):
        state = search.init(key, network, OPTIMIZER, OPTIMIZER, shape, *extra)
        for _ in range(2):
            state, metrics = step(state, batch, batch)
        results.append((state.w, state.alpha, state.carry, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert remedies.make_relaxation(OFF, None) is relaxation.softmax
    assert remedies.adapt(OFF, network, None) is network


@pytest.mark.parametrize(
    "fields",
    [
        {"relaxation": ["gumbel"], "temperature": [10, 0.1]},
        {"relaxation": ["concrete"], "edge_weights": []},
        {"perturb": ["random"]},
        {"perturb": ["adversarial"], "edge_weights": []},
    ],
    ids=str,
)
def test_a_search_with_it_from_the_command_line(folder, fields):
    texts = [text for text in flags(**fields)]
    (line,) = run(folder, "on", *texts)
    (plain,) = run(folder, "off")
    assert line["alpha"]["normal"] != plain["alpha"]["normal"]
    assert ("normal_edges" in line["alpha"]) == ("edge_weights" in fields)
    found = genotype.load(folder / "on" / "genotype.json")
    assert found == genotype.derive(line["alpha"])


def test_shrinking_goes_on_from_an_earlier_search(folder):
    (first,) = run(folder, "first")
    (second,) = run(folder, "second", *flags(shrink_from=["first"], keep=[3]))
    for cell in ("normal", "reduce"):
        before, after = np.array(first["alpha"][cell]), np.array(second["alpha"][cell])
        np.testing.assert_array_equal((after > REMOVED).sum(-1), 3)
        np.testing.assert_array_equal(after > REMOVED, before >= np.sort(before)[:, -3][:, None])
    own = replace(OFF, shrink_from=str(folder / "second"), keep=2)
    third = remedies.survivors(own)
    assert all((third[cell].sum(-1) == 2).all() for cell in third)
    assert all((np.array(second["alpha"][cell])[third[cell]] > REMOVED).all() for cell in third)
    assert remedies.facts(third) != remedies.facts(remedies.survivors(replace(own, keep=3)))
    with pytest.raises(ValueError, match="keep is 4; .* give 1 to 3"):
        remedies.survivors(replace(own, keep=4))


def test_what_is_taken_away_has_no_parameters():
    """The auxiliary skip connection stays on every edge."""
    names, plain = CNN_PRIMITIVES, Supernet(2, 3, 10, nodes=1)
    kept = ("none", "skip_connect", "sep_conv_3x3"), ("max_pool_3x3", "sep_conv_3x3", "none")
    mask = {cell: np.array([[n in own for n in names] for own in kept]) for cell in CELLS}
    network = remedies.adapt(replace(OFF, auxiliary_skip=0.5), plain, mask)
    first = ("none", "skip_connect", "sep_conv_3x3", remedies.AUXILIARY)
    assert set(network.candidates) == set(CELLS)
    assert network.candidates["normal"][0] == first
    assert network.candidates["reduce"][1][-1] == remedies.AUXILIARY
    weights = {cell: jnp.zeros((2, 9)) for cell in CELLS}
    image = jnp.zeros((1, 8, 8, 1))
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), image, weights, train=True))
    edges = params["params"]["cell_1"]["edges"]
    assert set(edges) == {"skip_connect", "sep_conv_3x3", remedies.AUXILIARY}
    rows = {name: next(iter(leaves.values())).shape[0] for name, leaves in edges.items()}
    assert rows == {"skip_connect": 1, "sep_conv_3x3": 2, remedies.AUXILIARY: 2}

    alone = {cell: mask[cell] & (np.array(names) == "none") for cell in CELLS}
    with pytest.raises(
        ValueError, match="keep 1 leaves edge 0 of the normal cell nothing but none"
    ):
        remedies.adapt(replace(OFF, keep=1), plain, alone)


def test_the_eigenvalue_is_recorded_and_drawn(folder, monkeypatch):
    epochs = run(folder, "a", *flags(eigenvalue_every=[2]), epochs=4)
    assert ["eigenvalue" in line for line in epochs] == [False, True, False, True]
    assert all(np.isfinite(line["eigenvalue"]) for line in epochs[1::2])
    assert epochs[1]["eigenvalue"] != epochs[3]["eigenvalue"]
    remedies.draw_eigenvalues(OFF, epochs, folder / "eigenvalue")
    assert (folder / "eigenvalue.png").stat().st_size > 1000
    assert "early stop" not in (folder / "eigenvalue.svg").read_text()
    plain = run(folder, "b", epochs=4)
    assert [line["alpha"] for line in plain] == [line["alpha"] for line in epochs]


def test_early_stopping(folder, monkeypatch, capsys):
    """Ends the run, goes back to the cells from before, and has nothing left to do afterwards."""

    def make_eigenvalue(*_):
        return lambda state: 1.0 if state.step <= 20 else 3.0  # 4 steps an epoch

    monkeypatch.setattr(remedies, "make_eigenvalue", make_eigenvalue)
    texts = flags(eigenvalue_every=[1], stop_ratio=[0.75])
    epochs = run(folder, "a", *texts, epochs=20)
    assert len(epochs) == 10
    config = replace(OFF, eigenvalue_every=1, stop_ratio=0.75)
    assert search_cnn.found(config, epochs) == genotype.derive(epochs[2]["alpha"])
    assert remedies.stop_line(OFF, epochs) is None
    assert run(folder, "a", *texts, epochs=20) == epochs
    remedies.draw_eigenvalues(config, epochs, folder / "eigenvalue")
    assert "early stop" in (folder / "eigenvalue.svg").read_text()


def test_selection_from_one_saved_supernet(folder, capsys):
    """By each method, from the same checkpoint; nothing of the run is changed."""
    (line,) = run(folder, "a")
    before = (folder / "a" / "metrics.jsonl").read_bytes()
    found = {}
    for method in ("argmax", "argmax_with_none", "perturbation"):
        assert select_cnn.main(["--search", "a", "--method", method, "--batches", "1"]) == 0
        found[method] = genotype.load(folder / "a" / f"genotype-{method}.json")
    assert found["argmax"] == genotype.derive(line["alpha"])
    assert found["argmax_with_none"] == genotype.derive(line["alpha"], with_none=True)
    assert "none" not in {name for name, _ in found["perturbation"].normal}
    assert found["perturbation"] != found["argmax"]
    assert (folder / "a" / "metrics.jsonl").read_bytes() == before


def test_selection_without_a_search(folder, capsys):
    assert select_cnn.main(["--search", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "nowhere/config.json is not the config of a search" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("network", "channels", "x", "network.channels is 'x', where 4 would be of the right kind"),
        ("data", "name", [1], "data.name is"),
        ("data", "limit", "many", "data.limit is 'many', where None would be"),
        ("search", "estimator", "unroled", "search.estimator is 'unroled'; use one of: first_"),
        ("search", "remedies", 3, "search.remedies is no object"),
        ("search", "epochs", 0, "--search.epochs is 0; give at least 1"),
        ("search", "radius", float("nan"), "NaN is no number of JSON"),
    ],
)
def test_a_damaged_config_is_refused(folder, capsys, part, field, value, message):
    saved = json.loads(json.dumps(asdict(search_cnn.PRESETS["smoke"][1]), default=str))
    saved[part][field] = value
    (folder / "a").mkdir()
    (folder / "a" / "config.json").write_text(json.dumps(saved))
    assert select_cnn.main(["--search", "a"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_several_searches_are_refused(folder, capsys):
    config = replace(search_cnn.PRESETS["smoke"][1], seeds=2)
    (folder / "a").mkdir()
    fields = json.loads(json.dumps(asdict(config), default=str))
    (folder / "a" / "config.json").write_text(json.dumps(fields))
    assert select_cnn.main(["--search", "a"]) == 2
    assert "a holds 2 searches; give --search the workdir of one" in capsys.readouterr().err


def test_the_config_of_a_search_is_read_back(folder):
    run(folder, "a", *flags(temperature=[3, 1], eigenvalue_every=[0]), "--search.w.momentum", "0.5")
    config = select_cnn.read_config(folder / "a")
    assert config.search.remedies.temperature == (3.0, 1.0)
    assert config.search.w.momentum == 0.5
    assert config.network == search_cnn.PRESETS["smoke"][1].network


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": [0, 1]}, "temperature is 0"),
        ({"auxiliary_skip": [-1]}, "auxiliary-skip is -1.0; give at least 0"),
        ({"stop_ratio": [0.75]}, "needs --search.remedies.eigenvalue-every"),
        ({"relaxation": ["sigmoid"], "perturb": ["random"]}, "leave one of the two out"),
        ({"shrink_from": ["nowhere"]}, "nowhere/metrics.jsonl holds no finished epoch"),
    ],
    ids=str,
)
def test_errors_are_one_line(folder, capsys, fields, message):
    assert search_cnn.main(["smoke", *flags(**fields)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_shrinking_from_several_seeds_is_refused(folder):
    (folder / "a").mkdir()
    line = {"kind": "epoch", "step": 1, "epoch": 1, "alpha_of_seed_0": {}, "alpha_of_seed_1": {}}
    (folder / "a" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="a holds searches of several seeds; give the workdir of"):
        remedies.survivors(replace(OFF, shrink_from=str(folder / "a")))


def test_an_auxiliary_skip_is_an_operation_more():
    config = replace(OFF, auxiliary_skip=0.5)
    network = remedies.adapt(config, Supernet(2, 3, 10, nodes=1), None)
    assert network.primitives[-1] == remedies.AUXILIARY in network.operations
    alpha = remedies.init_alpha(config)(jax.random.key(0), network)
    plain = search.init_alpha(jax.random.key(0), Supernet(2, 3, 10, nodes=1))
    jax.tree.map(np.testing.assert_array_equal, alpha, plain)
    relax = remedies.with_auxiliary_skip(config, remedies.make_relaxation(config, None))
    weights = relax(alpha, relaxation.Context(None, 0.5))["normal"]
    assert weights.shape == (2, 9)
    np.testing.assert_array_equal(weights[:, -1], 0.25)
