"""Searching and training recurrent cells from the command line."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax import genotype, hypergradient, language_model, search, text
from experiments import evaluate_rnn, search_rnn, texts
from experiments.config import alpha_optimizer
from experiments.remedies import RelaxationConfig

SEARCH = ["smoke", "--search.epochs", "2"]


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)


def lines_of(workdir, kind):
    lines = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_paper_preset_of_the_search():
    """Section 3.1.2 and appendix A.1.2 of arXiv 1806.09055, and what the released code adds."""
    paper = dataclasses.asdict(search_rnn.PRESETS["paper"][1])
    assert paper["model"] == {"size": 300, "nodes": 8}
    assert paper["dropout"] == {
        "words": 0.0,
        "embedding": 0.2,
        "input": 0.75,
        "hidden": 0.25,
        "output": 0.75,
    }
    assert paper["search"] == {
        "estimator": "unrolled",
        "radius": 0.01,
        "epochs": 50,
        "batch_size": 256,
        "eval_batch_size": 10,
        "length": 35,
        "slowness": 1e-3,
        "w": {"learning_rate": 20.0, "weight_decay": 5e-7, "clip": 0.25},
        "alpha": {"learning_rate": 3e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-3},
        "remedies": {"relaxation": "softmax", "temperature": (1.0, 1.0)},
    }


def test_paper_preset_of_the_training():
    paper = evaluate_rnn.PRESETS["paper"][1]
    assert (paper.size, paper.train.batch_size, paper.train.epochs) == (850, 64, 8000)
    assert paper.train.w == texts.TextOptimizerConfig(20.0, 8e-7, 0.25)
    assert texts.dropout_of(paper.dropout) == (0.1, 0.2, 0.75, 0.25, 0.75)
    wiki = evaluate_rnn.PRESETS["wikitext2"][1]
    assert (wiki.size, wiki.dropout.hidden, wiki.train.w.weight_decay) == (700, 0.15, 5e-7)


@pytest.mark.parametrize("module", [search_rnn, evaluate_rnn])
def test_presets(module):
    for _, config in module.PRESETS.values():
        data = dataclasses.replace(config.data, path="somewhere")
        module.check(dataclasses.replace(config, data=data))


def test_search_and_training_from_the_command_line(empty_folder, capsys):
    assert search_rnn.main(SEARCH) == 0
    workdir = Path("runs/search_rnn-smoke-seed0")
    names = "config.json metrics.jsonl genotype.json vocabulary.json cell.svg cell.png alphas.png"
    for name in (*names.split(), "alphas.svg", "tensorboard", "checkpoints"):
        assert (workdir / name).exists(), name
    steps, epochs = lines_of(workdir, "step"), lines_of(workdir, "epoch")
    assert [line["step"] for line in epochs] == [7, 14] and len(steps) == 14
    found = genotype.load(workdir / "genotype.json", kind=genotype.RNN)
    assert found == genotype.derive_recurrent(epochs[-1]["alpha"])
    assert epochs[0]["alpha"] != epochs[1]["alpha"]
    output = capsys.readouterr().out
    assert f"perplexity {math.exp(epochs[-1]['eval_loss']):.1f}" in output
    assert f"0 = {found.recurrent[0][0]}(start)" in output
    assert "experiments.evaluate_rnn smoke" in output

    # The training takes the cell that was found last.
    assert evaluate_rnn.main(["smoke"]) == 0
    trained = Path("runs/evaluate_rnn-smoke-seed0")
    assert genotype.load(trained / "genotype.json", kind=genotype.RNN) == found
    words = (trained / "sample.txt").read_text().split()
    vocabulary = json.loads((trained / "vocabulary.json").read_text())
    assert set(words) <= set(vocabulary) and len(words) > 50
    output = capsys.readouterr().out
    last = lines_of(trained, "epoch")[-1]["eval_loss"]
    corpus = text.load("pydoc", limit=2000)
    bits = text.bits_per_character(last, corpus, "valid")
    assert f"perplexity {math.exp(last):.2f} a word, {bits:.3f} bits a character" in output
    assert "not averaged" in output

    before = (trained / "metrics.jsonl").read_bytes()
    assert evaluate_rnn.main(["smoke"]) == 0  # nothing left to do
    assert (trained / "metrics.jsonl").read_bytes() == before

    # As if the text had changed since, or come with another version of Python.
    (trained / "vocabulary.json").write_text(json.dumps(vocabulary[1:]))
    assert evaluate_rnn.main(["smoke"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not the vocabulary of this text" in error
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_lstm_from_the_command_line(empty_folder, capsys):
    arguments = "smoke --genotype LSTM --train.epochs 1 --workdir run"
    assert evaluate_rnn.main(arguments.split()) == 0
    workdir = Path("run")
    assert (workdir / "sample.txt").exists() and not (workdir / "genotype.json").exists()
    vocabulary = len(json.loads((workdir / "vocabulary.json").read_text()))
    output = capsys.readouterr().out
    assert f"{vocabulary * 9 + 4 * 8 * 17:,}" in output
    assert 10 < math.exp(lines_of("run", "epoch")[-1]["eval_loss"]) < 2 * vocabulary


GUMBEL = RelaxationConfig("gumbel", (3.0, 0.5))


def test_a_relaxation_from_the_command_line(empty_folder, monkeypatch):
    monkeypatch.setattr(search_rnn, "draw", lambda *_: [])
    flags = "--search.remedies.relaxation gumbel --search.remedies.temperature 3 0.5".split()
    for workdir, more in (("plain", []), ("gumbel", flags)):
        assert search_rnn.main(["smoke", "--search.epochs", "1", "--workdir", workdir, *more]) == 0
    (plain,), (line,) = (lines_of(workdir, "epoch") for workdir in ("plain", "gumbel"))
    assert plain["alpha"] != line["alpha"] and np.isfinite(line["eval_loss"])
    found = genotype.load("gumbel/genotype.json", kind=genotype.RNN)
    assert found == genotype.derive_recurrent(line["alpha"])


def test_contexts_of_a_search(corpus, monkeypatch):
    """Each step has its share of the whole search, and keys of its own, which dropout has not."""
    seen = []

    def make_task_step(task, *_, **__):
        def step(state, train, val):
            seen.extend([train, val])
            return state._replace(step=state.step + 1), None

        return step

    monkeypatch.setattr("darts_jax.search.make_task_step", make_task_step)
    job = search_rnn.make_job(with_remedies(GUMBEL), corpus, Path("unused"))
    state = job.init()
    for epoch in (0, 1):
        for at in job.train_batches(epoch):
            state, _ = job.train_step(state, job.data, at)
    np.testing.assert_allclose(
        [batch.context.progress for batch in seen], np.repeat(np.arange(14) / 14, 2), rtol=1e-6
    )
    keys = {bytes(jax.random.key_data(key)) for b in seen for key in (b.key, b.context.key)}
    assert len(keys) == 4 * 14


def with_remedies(remedies):
    return small(search=dataclasses.replace(small().search, remedies=remedies))


def test_without_remedies_it_is_plain_darts_bit_for_bit(corpus):
    config = small()
    job = search_rnn.make_job(config, corpus, Path("unused"))
    dropout, w = texts.dropout_of(config.dropout), texts.optimizer(config.search.w)
    plain = search.make_task_step(
        search_rnn.task(config)._replace(
            train_loss=language_model.make_loss(dropout, config.search.slowness),
            val_loss=language_model.make_loss(dropout),
        ),
        lambda problem: hypergradient.unrolled(problem, w),
        w,
        alpha_optimizer(config.search.alpha),
    )
    plain = search_rnn.make_train_step(plain, config, job.steps_per_epoch)
    results = []
    for step in (job.train_step, plain):
        state = job.init()
        for at in job.train_batches(0)[:2]:
            state, metrics = step(state, job.data, at)
        results.append((state.w, state.alpha, state.carry, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)


def small(**options):
    config = search_rnn.PRESETS["smoke"][1]
    return dataclasses.replace(config, **options)


@pytest.fixture(scope="module")
def corpus():
    return text.load("pydoc", limit=2000)


def test_batches_of_a_search_follow_both_texts(corpus, monkeypatch):
    seen = []

    def make_task_step(task, *_, **__):
        def step(state, train, val):
            seen.append((state, train, val))
            carry = jax.tree.map(lambda x: x + 1, state.carry)
            return state._replace(step=state.step + 1, carry=carry), None

        return step

    monkeypatch.setattr("darts_jax.search.make_task_step", make_task_step)
    job = search_rnn.make_job(small(), corpus, Path("unused"))
    state = job.init()
    for epoch in (0, 1):
        for at in job.train_batches(epoch):
            state, _ = job.train_step(state, job.data, at)
    train_rows, val_rows = text.columns(corpus.train, 8), text.columns(corpus.valid, 8)
    keys = set()
    for i, (before, train, val) in enumerate(seen):
        at = job.train_batches(i // 7)[i % 7]
        length, start = int(at.length), int(at.train_start)
        assert (train.valid == (np.arange(35) < length)).all() and val.valid.all()
        np.testing.assert_array_equal(train.tokens[:length], train_rows[start : start + length])
        np.testing.assert_array_equal(
            train.targets[:length], train_rows[start + 1 : start + 1 + length]
        )
        first = 35 * (i % 7 % text.num_windows(len(val_rows), 35))
        np.testing.assert_array_equal(val.tokens, val_rows[first : first + 35])
        assert before.carry.train_hidden.min() == before.carry.val_hidden.max() == i % 7
        rate = before.w_opt_state.hyperparams["learning_rate"]
        np.testing.assert_allclose(rate, 5 * length / 35, rtol=1e-6)
        keys |= {bytes(jax.random.key_data(b.key)) for b in (train, val)}
    assert len(keys) == 2 * len(seen)  # dropout is drawn anew for every batch


def compilations(function, *args):
    """Names of the events of compiling that a call causes."""
    compiled = []

    def listen(event, *_, **__):
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function(*args)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return compiled


@pytest.mark.parametrize("module", [search_rnn, evaluate_rnn])
def test_sequences_of_all_lengths_are_one_program(corpus, module):
    if module is search_rnn:
        own = dataclasses.replace(small().search, estimator="first_order")
        job = search_rnn.make_job(small(search=own), corpus, Path("unused"))
    else:
        job = evaluate_rnn.make_job(evaluation_config(), corpus)
    state = job.init()
    batches = job.train_batches(0)
    short = batches[0]._replace(length=np.int32(17))
    for batch in batches[:2]:
        state, _ = job.train_step(state, job.data, batch)
    assert not compilations(job.train_step, state, job.data, short)
    assert compilations(jax.jit(lambda x: x + 1), 0.0)  # of which it would be told


def evaluation_config(**train):
    config = evaluate_rnn.PRESETS["smoke"][1]
    return dataclasses.replace(
        config,
        genotype="DARTS_V1",
        cell=genotype.PUBLISHED_RECURRENT["DARTS_V1"],
        train=dataclasses.replace(config.train, **train),
    )


def test_averaging_starts_without_progress(corpus):
    job = evaluate_rnn.make_job(evaluation_config(patience=2), corpus)
    state = job.init()
    lines = [{"eval_loss": loss} for loss in (3.0, 2.0, 2.5, 2.6)]
    assert not job.next_epoch(state, lines[:3]).averaged
    state = job.next_epoch(state, lines)
    assert state.averaged
    assert job.next_epoch(state, lines[:2]).averaged  # for good
    params = []
    for at in job.train_batches(0)[:3]:
        state, _ = job.train_step(state, job.data, at)
        params.append(jax.tree.map(np.asarray, state.params))
    assert state.average.count == 3
    mean = jax.tree.map(lambda *x: sum(x) / 3, *params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
        state.average.mean,
        mean,
    )


def test_samples_follow_the_model():
    """A model that says all but the next number is impossible."""
    size = 5
    params = language_model.init_params(jax.random.key(0), size, size, 8)
    params |= {"embedding": 100 * jnp.eye(size), "bias": jnp.zeros(size)}

    def cell(params, x, hidden, **_):  # the hidden state is the next word's embedding
        after = jnp.roll(x[0], 1, axis=-1) / 100
        return language_model.Trajectory(after[None], after, None)

    drawn = language_model.sample(jax.random.key(1), params, cell, jnp.zeros((1, size)), 0, 7)
    np.testing.assert_array_equal(drawn, [1, 2, 3, 4, 0, 1, 2])


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (search_rnn, ["pidoc"], "unknown preset 'pidoc'; use one of: pydoc"),
        (search_rnn, ["ptb"], "text 'ptb' is read from a folder"),
        (search_rnn, ["smoke", "--search.batch-size", "2000"], "gives no 2000 columns"),
        (search_rnn, ["smoke", "--search.length", "300"], "no window of 300"),
        (search_rnn, ["smoke", "--dropout.hidden", "1"], "--dropout.hidden is 1.0; give less"),
        (search_rnn, ["smoke", "--search.w.clip", "0"], "--search.w.clip is 0.0; give more"),
        (
            search_rnn,
            ["smoke", "--search.remedies.temperature", "0", "1"],
            "temperature is 0.0; give",
        ),
        (evaluate_rnn, ["smoke", "--genotype", "DARTS_V3"], "no genotype file or published cell"),
        (evaluate_rnn, ["smoke", "--genotype", "conv.json"], "holds convolutional cells; give"),
        (evaluate_rnn, ["smoke", "--train.patience", "0"], "--train.patience is 0"),
        (evaluate_rnn, ["smoke", "--size", "0"], "--size is 0; give at least 1"),
    ],
)
def test_bad_input_is_one_line(empty_folder, capsys, module, arguments, message):
    genotype.save(genotype.PUBLISHED["DARTS_V2"], "conv.json")
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not Path("runs").exists()
