"""Several seeds in one job: each is what it would be alone."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spread_runs
from test_search_cnn import install_stand_in

from darts_jax import augment, choices, genotype, text
from experiments import images, search_cnn, search_rnn, seeds
from experiments.remedies import RelaxationConfig

SEEDS = (3, 4)
STEPS = 3
OFF = RelaxationConfig()


def cnn_job(**fields):
    config = search_cnn.PRESETS["smoke"][1]
    config = replace(config, data=replace(config.data, cutout=2, flip=True), **fields)
    with mock.patch.object(search_cnn, "supernet", spread_runs.tiny):
        return search_cnn.make_job(config, spread_runs.digits(config), Path())


def rnn_job(remedies=OFF, **fields):
    config = search_rnn.PRESETS["smoke"][1]
    own = replace(config.search, length=5, remedies=remedies)
    config = replace(config, search=own, **fields)
    return search_rnn.make_job(config, text.load("pydoc", limit=1000), Path())


def random_cnn_job(**fields):
    own = search_cnn.PRESETS["smoke"][1].search
    remedies = replace(own.remedies, relaxation="concrete", temperature=(2.0, 0.5))
    return cnn_job(search=replace(own, remedies=remedies), **fields)


def random_rnn_job(**fields):
    return rnn_job(remedies=RelaxationConfig("concrete", (2.0, 0.5)), **fields)


@pytest.fixture
def double(x64, monkeypatch):
    monkeypatch.setattr(images, "augment", spread_runs.double(augment.augment))
    monkeypatch.setattr(images, "normalize", spread_runs.double(augment.normalize))


def steps(job):
    """Metrics of a few steps, the state after them, and an evaluation of that."""
    state, metrics = jax.tree.map_with_path(spread_runs.wide, job.init()), []
    for batch in job.train_batches(1)[:STEPS]:
        state, measured = job.train_step(state, job.data, batch)
        metrics.append(measured)
    return metrics, state, job.eval_step(state, job.data, job.eval_batches[-1])


def assert_same(found, expected, rtol=1e-9):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b, rtol = jax.random.key_data(a), jax.random.key_data(b), 0
        np.testing.assert_allclose(a, b, rtol, 1e-12, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("make_job", [cnn_job, rnn_job, random_cnn_job, random_rnn_job])
def test_each_seed_is_what_it_would_be_alone(double, make_job):
    alone = [steps(make_job(seed=seed)) for seed in SEEDS]
    weights = [jax.tree.leaves(state.w)[0] for _, state, _ in alone]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    for at_once in (1, 2):
        job = make_job(seed=SEEDS[0], seeds=len(SEEDS), seeds_at_once=at_once)
        metrics, states, (sums, count) = steps(job)
        for i, (_, state, (own_sums, own_count)) in enumerate(alone):
            assert_same(jax.tree.map(lambda x, i=i: x[i], states), state)
            assert count == own_count
            for name, value in own_sums.items():
                assert_same(sums[f"{name}_of_seed_{SEEDS[i]}"], value)
        mean = [
            jax.tree.map(lambda *x: np.mean(x, 0), *own)
            for own in zip(*(own for own, _, _ in alone), strict=True)
        ]
        assert_same(metrics, [m._replace(nonfinite=np.int32(-1)) for m in mean])
        for name in own_sums:
            assert_same(sums[name], np.mean([own[name] for _, _, (own, _) in alone]))


@pytest.mark.parametrize("at_once", [1, 2])
def test_stages_are_compiled_once(at_once):
    """However many steps are made, and whatever number of seeds takes part in one."""
    jax.clear_caches()  # other tests share its stages
    job, compiled = cnn_job(seeds=4, seeds_at_once=at_once), []

    def listen(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    state, batches = job.init(), job.train_batches(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state, _ = job.train_step(state, job.data, batches[0])
        assert sum("value_and_gradient" in name for name in compiled) == 1, compiled
        first = len(compiled)
        state, _ = job.train_step(state, job.data, batches[1])
        assert compiled[first:] == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_state_is_donated():
    job = cnn_job(seeds=2, seeds_at_once=2)
    before = job.init()
    after, _ = job.train_step(before, job.data, job.train_batches(0)[0])
    jax.block_until_ready(after)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.w, before.w_opt_state)))


def test_what_is_not_finite_names_its_seed():
    job = cnn_job(seeds=3)
    states = job.init()
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), states.w)
    _, metrics = job.train_step(states._replace(w=bad), job.data, job.train_batches(0)[0])
    checked = jax.tree.leaves_with_path(job.checked(states))
    names = [jax.tree_util.keystr(path) for path, _ in checked]
    assert len(names) % 3 == 0
    assert "seed_1" in names[int(metrics.nonfinite)]
    _, metrics = job.train_step(job.init(), job.data, job.train_batches(0)[0])
    assert int(metrics.nonfinite) == -1


@pytest.mark.parametrize(
    ("count", "at_once", "message"),
    [
        (0, None, "--seeds is 0; give at least 1"),
        (4, 0, "--seeds-at-once is 0; give at least 1"),
        (4, 3, "--seeds-at-once is 3, of which the 4 seeds are no multiple"),
        (1, 2, "--seeds-at-once is 2, of which the 1 seeds are no multiple"),
        (2**32 + 1, None, "--seed is 0; give less than"),
    ],
)
def test_what_cannot_be(count, at_once, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        seeds.check(0, count, at_once)


LINES = [
    {
        "kind": "epoch",
        "step": 4,
        "eval_loss": 0.6,
        "eval_loss_of_seed_1": 0.4,
        "eval_loss_of_seed_11": 0.8,
        "eval_accuracy_of_seed_1": 0.7,
        "eval_accuracy_of_seed_11": 0.9,
    }
]


def test_lines_of_one_seed():
    assert seeds.of_seed(LINES, 1) == [
        {"kind": "epoch", "step": 4, "eval_loss": 0.4, "eval_accuracy": 0.7}
    ]
    assert seeds.best(LINES, (1, 11)) == 11  # by accuracy
    losses = [{k: v for k, v in LINES[0].items() if "accuracy" not in k}]
    assert seeds.best(losses, (1, 11)) == 1
    assert seeds.best([{"eval_loss": 0.6}], (5,)) == 5
    assert seeds.mean_text(np.array([1.0, 2.0]), 2) == "1.50 ± 0.71"
    assert seeds.mean_text(np.array([1.0]), 2) == "1.00"


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    install_stand_in(monkeypatch)
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def epochs_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "epoch"]


@pytest.mark.slow
def test_a_search_of_several_seeds_from_the_command_line(stand_in, capsys):
    arguments = ["smoke", "--search.epochs", "2"]
    assert search_cnn.main([*arguments, "--seeds", "3", "--workdir", "all"]) == 0
    output = capsys.readouterr().out
    epochs = epochs_of(stand_in / "all")
    assert len(epochs) == 2
    found = []
    for seed in range(3):
        assert search_cnn.main([*arguments, "--seed", str(seed), "--workdir", f"{seed}"]) == 0
        one = stand_in / "all" / f"seed{seed}"
        for name in ("normal", "reduce", "alphas"):
            assert (one / f"{name}.svg").exists()
            assert (one / f"{name}.png").exists()
        for together, alone in zip(epochs, epochs_of(stand_in / str(seed)), strict=True):
            assert together[f"alpha_of_seed_{seed}"].keys() == alone["alpha"].keys()
            for cell, values in alone["alpha"].items():
                own = together[f"alpha_of_seed_{seed}"][cell]
                np.testing.assert_allclose(own, values, rtol=1e-4, atol=1e-6)
            for name in ("eval_loss", "eval_accuracy"):
                own = together[f"{name}_of_seed_{seed}"]
                np.testing.assert_allclose(own, alone[name], rtol=1e-4)
        found.append(genotype.load(one / "genotype.json"))
        assert found[-1] == genotype.derive(epochs[-1][f"alpha_of_seed_{seed}"])
    losses = [epochs[-1][f"eval_loss_of_seed_{seed}"] for seed in range(3)]
    np.testing.assert_allclose(epochs[-1]["eval_loss"], np.mean(losses), rtol=1e-6)

    best = seeds.best(epochs, range(3))
    assert genotype.load(stand_in / "all" / "genotype.json") == found[best]
    saved = json.loads((stand_in / "all" / "agreement.json").read_text())
    assert saved == choices.table(found)
    assert (stand_in / "all" / "agreement.png").exists()
    text = " ".join(output.split())
    for expected in ("± ", "each seed", "distinct of 3", f"seed{best}/genotype.json"):
        assert expected in text.replace("│", "").replace("- ", "-"), expected


def test_it_goes_on_where_it_ended(stand_in, monkeypatch):
    """With the same bits, and with another number of seeds at once."""
    monkeypatch.setattr(search_cnn, "draw", lambda *_: [])

    def search(workdir, epochs, *more):
        fields = ["smoke", "--seeds", "2", "--search.w.schedule", "step"]
        own = ["--search.epochs", str(epochs), "--workdir", workdir]
        assert search_cnn.main([*fields, *own, *more]) == 0
        return [
            {k: v for k, v in line.items() if "seconds" not in k and k != "memory_bytes"}
            for line in epochs_of(stand_in / workdir)
        ]

    whole = search("whole", 3)
    search("parts", 1)
    assert search("parts", 3) == whole
    search("other", 1, "--seeds-at-once", "2")
    other = search("other", 2, "--seeds-at-once", "1")
    np.testing.assert_allclose(other[-1]["eval_loss"], whole[1]["eval_loss"], rtol=1e-5)
