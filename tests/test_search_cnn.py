import dataclasses
import inspect
import json
from pathlib import Path

import event_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import data, finite, genotype, hypergradient, search
from experiments import search_cnn
from experiments.config import DataConfig, WConfig, w_optimizer
from experiments.distributed import Distributed
from experiments.metrics import MEASURED
from experiments.remedies import RemediesConfig
from experiments.run_config import RunConfig
from experiments.search_config import PRESETS, Config, SearchConfig

NUM_EDGES = 14


def test_estimators(x64):
    problem = hypergradient.Bilevel(
        lambda w, a, _: jnp.sum((w - a) ** 4) / 4, lambda w, a, _: jnp.sum(jnp.sin(w) * a)
    )
    w, alpha = jnp.array([0.3, -2.0]), jnp.array([1.5, 0.4])
    # A clip that acts: differentiated through, it is part of the step.
    optimizer = w_optimizer(WConfig(clip=0.5), 0.1)

    def gradient(name, radius=0.01):
        config = SearchConfig(estimator=name, radius=radius)
        estimate = search_cnn.make_estimator(config, optimizer)(problem)
        return estimate(alpha, w, optimizer.init(w), None, None).gradient

    def unrolled_loss(alpha):
        w_gradient = jax.grad(problem.train_loss)(w, alpha, None)
        updates, _ = optimizer.update(w_gradient, optimizer.init(w), w)
        return problem.val_loss(w + updates, alpha, None)

    exact = jax.grad(unrolled_loss)(alpha)
    np.testing.assert_allclose(gradient("unrolled"), exact, rtol=1e-12)
    np.testing.assert_allclose(gradient("first_order"), jnp.sin(w), rtol=1e-12)
    np.testing.assert_allclose(gradient("finite_difference", 1e-5), exact, rtol=1e-8)
    assert abs(gradient("finite_difference", 1.0) - exact).max() > 1e-6  # the radius is used
    assert abs(jnp.sin(w) - exact).max() > 1e-2


def test_paper_preset():
    """Section 3.1 and appendix A of arXiv 1806.09055, and what the released code adds."""
    _, paper = PRESETS["paper"]
    assert dataclasses.asdict(paper) == {
        "data": {
            "name": "cifar10",
            "path": None,
            "limit": None,
            "crop": 4,
            "flip": True,
            "cutout": 0,
        },
        "network": {
            "channels": 16,
            "layers": 8,
            "nodes": 4,
            "batch_norm_groups": 1,
            "partial": 1,
        },
        "search": {
            "estimator": "unrolled",
            "radius": 0.01,
            "train_portion": 0.5,
            "epochs": 50,
            "batch_size": 64,
            "w": {
                "learning_rate": 0.025,
                "schedule": "cosine",
                "learning_rate_min": 0.001,
                "decay": 0.97,  # of a schedule that is not used
                "decay_epochs": 1,
                "momentum": 0.9,
                "weight_decay": 3e-4,
                "clip": 5.0,
            },
            "alpha": {"learning_rate": 3e-4, "b1": 0.5, "b2": 0.999, "weight_decay": 1e-3},
            "remedies": dataclasses.asdict(RemediesConfig()),  # all off
        },
        "seed": 0,
        "seeds": 1,
        "seeds_at_once": None,
        "run": {**dataclasses.asdict(RunConfig()), "log_every": 50},
        "workdir": None,
    }


def test_presets():
    assert list(PRESETS) == ["digits", "mnist5k", "cifar10", "paper", "smoke"]
    for _, config in PRESETS.values():
        search_cnn.check(config)
        assert config.search.estimator == "unrolled"
    for name in ("digits", "mnist5k", "smoke"):
        assert not PRESETS[name][1].data.flip  # a mirrored digit is none


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        yield from leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]


def test_help_explains_each_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        search_cnn.main(["paper", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for name, (description, _) in PRESETS.items():
        assert f"{name}: {description}" in output
    source = [
        line
        for file in map(
            inspect.getfile, (Config, DataConfig, RemediesConfig, RunConfig, Distributed)
        )
        for line in Path(file).read_text().splitlines()
    ]
    names = list(leaves(PRESETS["paper"][1]))
    assert len(names) == 54
    for name in names:
        assert f"--{name.removeprefix('run.').replace('_', '-')}" in output
        last = name.split(".")[-1]
        declared = next(i for i, line in enumerate(source) if line.startswith(f"    {last}: "))
        text = source[declared + 1].strip().strip('"').split()[:3]
        assert text, name
        assert " ".join(text) in output, name


# A stand-in for the supernet: a linear classifier, whose alphas weigh the loss.


def install_stand_in(monkeypatch):
    def init(key, network, w_optimizer, alpha_optimizer, image_shape, make_alpha):
        if network.layers < 3 or image_shape[0] % 4:
            return real_init(key, network, w_optimizer, alpha_optimizer, image_shape)
        w = jnp.zeros((int(np.prod(image_shape)), network.num_classes))
        shape = (NUM_EDGES, len(genotype.CNN_PRIMITIVES))
        alpha = {name: 1e-3 * jax.random.normal(key, shape) for name in ("normal", "reduce")}
        return search.SearchState(
            jnp.int32(0), key, w, alpha, {}, w_optimizer.init(w), alpha_optimizer.init(alpha)
        )

    def logits(state, image):
        return image.reshape(len(image), -1) @ state.w

    def make_step(network, estimator, w_optimizer, alpha_optimizer, relax, skip_nonfinite):
        @jax.jit
        def step(state, train_batch, val_batch):
            def loss(w, alpha, batch):
                scale = 1 + 0.1 * sum(jax.nn.softmax(a)[:, 4:].sum() for a in alpha.values())
                values = logits(state._replace(w=w), batch.image)
                return search.cross_entropy(scale * values, batch.label).mean()

            alpha_gradient = jax.grad(loss, 1)(state.w, state.alpha, val_batch)
            updates, alpha_state = alpha_optimizer.update(
                alpha_gradient, state.alpha_opt_state, state.alpha
            )
            alpha = optax.apply_updates(state.alpha, updates)
            train_loss, gradient = jax.value_and_grad(loss)(state.w, alpha, train_batch)
            updates, w_state = w_optimizer.update(gradient, state.w_opt_state, state.w)
            state = search.SearchState(
                state.step + 1,
                state.key,
                optax.apply_updates(state.w, updates),
                alpha,
                {},
                w_state,
                alpha_state,
            )
            zero = jnp.zeros(())
            val_loss = loss(state.w, alpha, val_batch)
            parts = search.Checked(val_loss, zero, zero, train_loss, zero)
            nonfinite = finite.first(jnp.stack(parts))
            return state, search.Metrics(train_loss, zero, val_loss, zero, zero, zero, nonfinite)

        return step

    def make_evaluate(network, relax):
        def evaluate(state, batch, mask):
            values = logits(state, batch.image)
            losses = search.cross_entropy(values, batch.label)
            correct = values.argmax(-1) == batch.label
            return jnp.where(mask, losses, 0).sum(), (correct & mask).sum()

        return evaluate

    real_init = search.init
    monkeypatch.setattr(search, "init", init)
    monkeypatch.setattr(search, "make_step", make_step)
    monkeypatch.setattr(search, "make_evaluate", make_evaluate)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Runs in an empty folder, quickly, and leaves the compilation cache as it is."""
    install_stand_in(monkeypatch)
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(search_cnn, "draw", lambda *_: [])


def metrics_of(workdir, kind):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_search_from_the_command_line(stand_in, capsys):
    assert search_cnn.main(["smoke", "--search.epochs", "3", "--log-every", "2"]) == 0
    workdir = stand_in / "runs" / "search_cnn-smoke-seed0"
    files = "config.json metrics.jsonl genotype.json normal.svg normal.png reduce.svg reduce.png"
    for name in (*files.split(), "alphas.svg", "alphas.png", "tensorboard", "checkpoints"):
        assert (workdir / name).exists(), name

    config = json.loads((workdir / "config.json").read_text())
    assert config["search"]["epochs"] == 3
    assert config["search"]["estimator"] == "unrolled"
    assert config["data"] | {"name": "digits", "limit": 128, "crop": 1} == config["data"]

    steps, epochs = metrics_of(workdir, "step"), metrics_of(workdir, "epoch")
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]  # 64 images, batches of 16
    assert list(steps[0])[3:] == [*search.Metrics._fields[:-1], "step_seconds"]
    assert [line["step"] for line in epochs] == [4, 8, 12]
    found = genotype.load(workdir / "genotype.json")
    assert found == genotype.derive(epochs[-1]["alpha"])
    assert epochs[0]["alpha"] != epochs[1]["alpha"]
    for cell in ("normal", "reduce"):
        event_files.assert_histograms(workdir, epochs, f"alpha/{cell}")
    event_files.assert_pictures(workdir, 12, ["normal", "reduce", "alphas"])

    output = capsys.readouterr().out
    for text in (
        "creating the parameters",
        "compiling the search step",
        "epoch 3: eval accuracy",
        f"accuracy {epochs[-1]['eval_accuracy']:.1%}",
        f"0 = {found.normal[0][0]}(",
        "peak memory",
        "runs/search_cnn-smoke-seed0",
    ):
        assert text in output, text
    # The next command trains the cells; it may take several lines of the table.
    last = output[output.index("next ") :].replace("│", "").replace("└", "").replace("─", "")
    expected = "python -m experiments.evaluate_cnn smoke --genotype runs/search_cnn-smoke-seed0/"
    assert f"{expected}genotype.json" in " ".join(last.split()).replace("/ ", "/")

    # The same command on the same workdir has nothing left to do, and tells the same.
    before = (workdir / "metrics.jsonl").read_bytes()
    assert search_cnn.main(["smoke", "--search.epochs", "3", "--log-every", "2"]) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    again = capsys.readouterr().out
    assert "compiling the" not in again
    assert f"accuracy {epochs[-1]['eval_accuracy']:.1%}" in again


def test_same_seed_same_run(stand_in, no_pictures):
    arguments = ["smoke", "--search.epochs", "1", "--log-every", "1", "--workdir"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert search_cnn.main([*arguments, name, "--seed", str(seed)]) == 0
    a, b, c = (
        [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics_of(path, "step")]
        for path in map(stand_in.joinpath, "abc")
    )
    assert a == b
    assert a != c


def job_and_batches(monkeypatch, config, dataset):
    """Runs one training step that only keeps the two batches it was given."""
    seen = []
    install_stand_in(monkeypatch)

    def make_step(*_, **__):
        def step(state, train_batch, val_batch):
            seen.append((train_batch, val_batch))
            return state, None

        return step

    monkeypatch.setattr(search, "make_step", make_step)
    job = search_cnn.make_job(config, dataset, Path("unused"))
    state = job.init()
    for epoch in range(2):
        for i, indices in enumerate(job.train_batches(epoch)):
            step = jnp.int32(epoch * job.steps_per_epoch + i)
            job.train_step(state._replace(step=step), job.data, indices)
    return job, seen


def numbered_dataset(size):
    """Images, all of whose pixels are their number: identity shows in a batch."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, 8, 8, 1))
    split = data.Split(np.ascontiguousarray(images), np.arange(size, dtype=np.int32) % 10)
    return data.Dataset("numbered", split, split, 10, (0.0,), (1.0,))


def test_batches_come_from_the_two_halves(monkeypatch):
    config = Config(
        DataConfig("digits", crop=0, flip=False), search=SearchConfig(epochs=2, batch_size=8)
    )
    job, seen = job_and_batches(monkeypatch, config, numbered_dataset(101))
    assert job.steps_per_epoch == 6  # 50 images train w
    numbers = [
        [np.rint(np.asarray(batch.image) * 255)[:, 0, 0, 0].astype(int) for batch in pair]
        for pair in seen
    ]
    for (train, val), (train_batch, val_batch) in zip(numbers, seen, strict=True):
        assert set(train) <= set(range(50))
        assert set(val) <= set(range(50, 101))
        np.testing.assert_array_equal(train_batch.label, train % 10)
        np.testing.assert_array_equal(val_batch.label, val % 10)
        assert train_batch.image.dtype == jnp.float32
    for epoch in (numbers[:6], numbers[6:]):
        assert len({n for train, _ in epoch for n in train}) == 48  # each once
    assert len({tuple(val) for _, val in numbers}) == 12  # fresh in every step
    # The evaluation sees each image of the second half once.
    assert sum(int(mask.sum()) for _, mask in job.eval_batches) == 51


def test_batches_are_augmented_anew_in_each_step(monkeypatch):
    random = np.random.default_rng(0)
    split = data.Split(random.integers(0, 256, (32, 8, 8, 1), np.uint8), np.arange(32) % 10)
    dataset = data.Dataset("noise", split, split, 10, (0.5,), (0.25,))
    config = Config(
        DataConfig("digits", crop=1, flip=True, cutout=4), search=SearchConfig(batch_size=16)
    )
    # A batch of the whole half: only order and augmentation differ between epochs.
    _, seen = job_and_batches(monkeypatch, config, dataset)
    (train_0, val_0), (train_1, val_1) = ([np.asarray(b.image) for b in pair] for pair in seen)
    assert (train_0 == 0).any()
    assert not {image.tobytes() for image in train_0} & {image.tobytes() for image in train_1}
    assert not {image.tobytes() for image in val_0} & {image.tobytes() for image in val_1}


# Bad input.


def assert_refused(capsys, arguments, *texts, code=2):
    """Exit code, one line on stderr that holds the texts, and nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    assert search_cnn.main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert error.startswith("error: ")
    for text in texts:
        assert text in error
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["didgits"], ("unknown preset 'didgits'; use one of: digits",)),
        (["--data.name", "cifar_10"], ("unknown dataset 'cifar_10'; use one of: cifar10",)),
        (["smoke", "--network.layers", "2"], ("at least 3 layers", "got 2")),
        (["smoke", "--search.batch-size", "65"], ("64 images fill no batch of 65", "1 to 64")),
        (["smoke", "--search.batch-size", "0"], ("64 images fill no batch of 0", "1 to 64")),
        (["smoke", "--search.train-portion", "1"], ("portion of 1.0", "between 0 and 1")),
        (["smoke", "--data.limit", "0"], ("a limit of 0 images keeps none", "at least 1")),
        (["smoke", "--search.epochs", "0"], ("--search.epochs is 0; give at least 1",)),
        (["smoke", "--network.channels", "0"], ("--network.channels is 0; give at least 1",)),
        (["smoke", "--log-every", "0"], ("--log-every is 0; give at least 1",)),
        (["smoke", "--seed", "-1"], ("--seed is -1; give at least 0",)),
        (["smoke", "--search.radius", "0"], ("--search.radius is 0.0; give more than 0",)),
        (["smoke", "--search.w.clip", "0"], ("--search.w.clip is 0.0; give more than 0",)),
        (["smoke", "--search.w.momentum", "1"], ("--search.w.momentum is 1.0; give less than 1",)),
        (
            ["smoke", "--search.alpha.learning-rate", "-1"],
            ("--search.alpha.learning-rate is -1.0; give at least 0",),
        ),
        (["smoke", "--search.radius", "nan"], ("--search.radius is nan; give more than 0",)),
        (["smoke", "--data.crop", "-1"], ("--data.crop is -1; give at least 0",)),
    ],
)
def test_bad_input_is_one_line(stand_in, capsys, arguments, texts):
    assert_refused(capsys, arguments, *texts)


def test_odd_image_size(stand_in, capsys, monkeypatch):
    images = np.zeros((128, 7, 7, 1), np.uint8)
    split = data.Split(images, np.arange(128, dtype=np.int32) % 10)
    odd = data.Dataset("odd", split, split, 10, (0.5,), (0.5,))
    monkeypatch.setattr(data, "load", lambda *_: odd)
    assert_refused(capsys, ["smoke"], "images of 7x7 do not halve twice", "multiple of 4")


def test_dataset_that_is_not_prepared(stand_in, capsys):
    pytest.importorskip("tensorflow_datasets")
    arguments = ["paper", "--data.path", str(stand_in / "nowhere")]
    assert_refused(
        capsys, arguments, "'cifar10' is not prepared in", "pip install", ".download_and_prepare()"
    )


def test_workdir_of_another_config(stand_in, no_pictures, capsys):
    arguments = ["smoke", "--search.epochs", "1", "--workdir", "run"]
    assert search_cnn.main(arguments) == 0
    capsys.readouterr()
    content = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    assert_refused(
        capsys,
        ["smoke", "--workdir", "run", "--search.w.clip", "4"],
        "run holds a run with another config",
        "search.w.clip is 5.0 there, 4.0 here",
        "--workdir",
    )
    assert content == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


def test_loss_that_is_not_finite(stand_in, capsys):
    diverging = ["smoke", "--search.w.learning-rate", "1e38", "--search.w.clip", "1e38"]
    assert search_cnn.main([*diverging, "--workdir", "run"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: val_loss is not finite. ")
    assert error.count("\n") == 1
    assert "The last good checkpoint is kept" in error
    assert not Path("run", "genotype.json").exists()


@pytest.mark.slow
def test_smoke_preset(tmp_path, monkeypatch, capsys):
    """The real thing, compilation included."""
    monkeypatch.chdir(tmp_path)
    assert search_cnn.main(["smoke", "--workdir", "run"]) == 0
    epochs = metrics_of(tmp_path / "run", "epoch")
    assert len(epochs) == 2
    assert genotype.load("run/genotype.json") == genotype.derive(epochs[-1]["alpha"])
    assert "Search finished" in capsys.readouterr().out
