import gc
import io
import json
import re
import shutil
import signal
import threading
from typing import NamedTuple

import event_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from stand_in import Config

import darts_jax
from darts_jax import checkpoint, finite, training
from experiments import metrics, runner
from experiments.errors import Interrupted, NonFinite, UserError
from experiments.run_config import RunConfig

STEPS = 5  # in an epoch
SAMPLES = 7  # in the evaluation


class State(NamedTuple):
    step: jax.Array
    key: jax.Array
    w: jax.Array
    twin: jax.Array


class Metrics(NamedTuple):
    train_loss: jax.Array
    train_accuracy: jax.Array
    nonfinite: jax.Array


def make_job(epochs=2, on_epoch=None, on_batch=None, on_loss=None, poison=None):
    """Least squares with noise.

    `on_batch(epoch, i)` is called before a batch is handed out; `on_loss` are losses of the
    evaluation, by epoch; `poison` is (what, first step, last step) to be made NaN.
    """

    def init():
        w = jnp.zeros(3)
        return State(jnp.int32(0), jax.random.key(1), w, w)  # one buffer twice

    def loss(w, batch, key):
        return jnp.mean((batch @ w - 1 + 0.1 * jax.random.normal(key, batch.shape[:1])) ** 2)

    @jax.jit
    def train_step(state, data, batch):
        key = jax.random.fold_in(state.key, state.step)
        value, gradient = jax.value_and_grad(loss)(state.w, data[batch], key)
        w = state.w - 0.1 * gradient
        if poison is not None:
            name, first, last = poison if len(poison) == 3 else (*poison, poison[1])
            bad = jnp.where((state.step + 1 >= first) & (state.step < last), jnp.nan, 0)
            value, w = (value + bad, w) if name == "train_loss" else (value, w + bad)
        nonfinite = finite.first(jnp.stack([value, jnp.square(gradient).sum()]))
        metrics = Metrics(value, value > 0, nonfinite)
        return State(state.step + 1, state.key, w, state.twin + w), metrics

    @jax.jit
    def eval_step(state, data, batch):
        indices, mask = batch
        errors = (data[indices] @ state.w - 1) ** 2
        if on_loss:
            errors = jnp.full_like(errors, jnp.array(on_loss)[state.step // STEPS - 1])
        return {"eval_loss": jnp.where(mask, errors, 0).sum()}, mask.sum()

    class Batches(list):
        def __init__(self, epoch, items, first=0):
            super().__init__(items)
            self.epoch, self.first = epoch, first

        def __getitem__(self, index):
            if isinstance(index, slice):
                return Batches(self.epoch, super().__getitem__(index), index.start)
            return super().__getitem__(index)

        def __iter__(self):
            for i, item in enumerate(super().__iter__(), self.first):
                if on_batch:
                    on_batch(self.epoch, i)
                yield item

    def train_batches(epoch):
        random = np.random.default_rng(epoch)
        return Batches(epoch, list(random.integers(0, 20, (STEPS, 4), dtype=np.int32)))

    def end_epoch(state):
        if on_epoch:
            on_epoch(int(state.step) // STEPS)
        return {"w": state.w.tolist()}

    indices = np.arange(8, dtype=np.int32).reshape(2, 4)
    return runner.Job(
        name="stand-in step",
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        data=jax.random.normal(jax.random.key(0), (20, 3)),
        train_batches=train_batches,
        eval_batches=list(zip(indices, indices < SAMPLES, strict=True)),
        epochs=epochs,
        steps_per_epoch=STEPS,
        end_epoch=end_epoch,
        checked=lambda state: training.Checked(0.0, state.w),
    )


def run(workdir, config=Config(), terminal=False, **kwargs):  # noqa: B008
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with metrics.Display(console) as display:
        result = runner.run(make_job(**kwargs), config, workdir, display)
    return result, console.file.getvalue()


def lines(workdir):
    """The lines of metrics.jsonl without what a clock decides."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in metrics.MEASURED} for line in found]


def checkpoints(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def assert_same_run(workdir, state, whole, whole_state):
    assert lines(workdir) == lines(whole)
    for leaf, expected in zip(state, whole_state, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, expected = jax.random.key_data(leaf), jax.random.key_data(expected)
        np.testing.assert_array_equal(leaf, expected)
    assert max(map(int, checkpoints(workdir))) == max(map(int, checkpoints(whole)))


@pytest.fixture
def whole(tmp_path):
    """A run without interruption: its workdir and its last state."""
    result, _ = run(tmp_path / "whole", epochs=3)
    return tmp_path / "whole", result.state


def test_a_run_writes_each_step_and_epoch_once(whole):
    workdir, state = whole
    written = lines(workdir)
    steps = [line for line in written if line["kind"] == "step"]
    epochs = [line for line in written if line["kind"] == "epoch"]
    assert [(s["step"], s["epoch"]) for s in steps] == [(i + 1, i // STEPS + 1) for i in range(15)]
    assert [(e["step"], e["epoch"]) for e in epochs] == [(5, 1), (10, 2), (15, 3)]
    assert list(steps[0]) == ["kind", "step", "epoch", "train_loss", "train_accuracy"]
    assert list(epochs[0]) == ["kind", "step", "epoch", "eval_loss", "w"]
    assert steps[0]["train_loss"] > steps[-1]["train_loss"]
    assert int(state.step) == 15
    assert epochs[-1]["w"] == state.w.tolist()
    assert json.loads((workdir / "config.json").read_text()) == {
        "inner": {"rate": 0.1, "betas": [0.9, 0.99]},
        "epochs": 2,
        "facts": {"version": darts_jax.__version__},
    }


def test_the_evaluation_is_the_mean_over_the_samples_without_padding(whole):
    workdir, state = whole
    data = np.asarray(make_job().data)[:SAMPLES]
    expected = ((data @ np.asarray(state.w) - 1) ** 2).mean()
    assert lines(workdir)[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_log_every(tmp_path, whole):
    run(tmp_path / "sparse", Config(run=RunConfig(log_every=3)), epochs=3)
    expected = [li for li in lines(whole[0]) if li["kind"] == "epoch" or li["step"] % 3 == 0]
    assert lines(tmp_path / "sparse") == expected


def test_the_metrics_go_to_tensorboard_too(whole):
    found = {(value.tag, step): value for step, value in event_files.values(whole[0])}
    for line in lines(whole[0]):
        for name in set(line) - {"kind", "step", "epoch", "w"}:
            value = found[f"{line['kind']}/{name}", line["step"]].simple_value
            assert value == pytest.approx(line[name], rel=1e-6)
    others = {name.split("/")[1] for name, _ in found} - {"train_loss", "train_accuracy"}
    assert others == {"eval_loss", *metrics.MEASURED}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_after_an_epoch_and_resumed(tmp_path, whole, signum):
    def stop(epoch):
        if epoch == 1:
            signal.raise_signal(signum)

    with pytest.raises(Interrupted, match=f"by {signum.name} after step 5") as stopped:
        run(tmp_path / "run", epochs=3, on_epoch=stop)
    assert stopped.value.signum == signum
    assert len(lines(tmp_path / "run")) == STEPS + 1
    result, _ = run(tmp_path / "run", epochs=3)
    assert_same_run(tmp_path / "run", result.state, *whole)


def test_stopped_within_an_epoch_and_resumed_twice(tmp_path, whole):
    for epoch, batch, step in ((0, 1, 2), (0, 3, 4), (1, 2, 8)):

        def stop(*position, where=(epoch, batch)):
            if position == where:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted, match=f"after step {step}$"):
            run(tmp_path / "run", epochs=3, on_batch=stop)
    result, _ = run(tmp_path / "run", epochs=3)
    assert_same_run(tmp_path / "run", result.state, *whole)
    assert [line["epoch"] for line in result.epochs] == [1, 2, 3]


@pytest.mark.parametrize("epoch", [0, 1])
def test_killed_within_an_epoch_and_resumed(tmp_path, whole, epoch):
    """What was written after the last checkpoint is neither lost nor doubled."""

    class Killed(BaseException):
        pass

    def kill(*position):
        if position == (epoch, 3):
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", epochs=3, on_batch=kill)
    file = tmp_path / "run" / "metrics.jsonl"
    with file.open("a") as log:
        log.write('{"kind": "step", "st')  # half a line
    result, _ = run(tmp_path / "run", epochs=3)
    assert_same_run(tmp_path / "run", result.state, *whole)


def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(tmp_path, whole):
    workdir, state = whole
    for file in (workdir / "checkpoints" / "15").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = lines(workdir)
    result, output = run(workdir, epochs=3)
    assert lines(workdir) == before
    np.testing.assert_array_equal(result.state.w, state.w)
    aside = workdir / "checkpoints" / "15.damaged"
    assert f"warning: a checkpoint cannot be read and was set aside, as {aside}\n" in output
    assert aside.is_dir()


def test_a_finished_run_is_only_read(whole):
    workdir, state = whole
    before = (workdir / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise AssertionError("a step was run")

    result, _ = run(workdir, epochs=3, on_batch=fail, on_epoch=fail)
    assert result.compile_seconds == 0
    assert [line["epoch"] for line in result.epochs] == [1, 2, 3]
    np.testing.assert_array_equal(result.state.w, state.w)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_seconds_of_an_epoch_add_up_over_a_resume(tmp_path):
    def stop(*position):
        if position == (0, 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, on_batch=stop)
    job = make_job()
    fresh = runner._Saved(job.init(), 0, 0.0)
    saved = checkpoint.restore_latest(tmp_path / "checkpoints", fresh).state
    assert saved.epoch_seconds > 0
    result, _ = run(tmp_path)
    assert result.epochs[0]["seconds"] > saved.epoch_seconds


def test_metrics_shorter_than_the_checkpoint_says_are_refused(whole):
    workdir, _ = whole
    file = workdir / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    before = file.read_bytes()
    with pytest.raises(UserError, match="put the file back, or start anew in another"):
        run(workdir, epochs=3)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [b"3", b'{"kinf": "step"}', b'{"kind": "step", "step": 1'])
def test_damaged_metrics_are_refused(tmp_path, damage):
    def stop(*position):
        if position == (1, 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, on_batch=stop)
    file = tmp_path / "metrics.jsonl"
    first, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(damage.ljust(len(first) - 1) + b"\n" + b"".join(others))
    before = file.read_bytes()
    with pytest.raises(UserError, match="metrics.jsonl, line 1, is damaged .*; put the file back"):
        run(tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("part", ["", "*"])
@pytest.mark.parametrize("stopped", ["within", "after"])
def test_metrics_without_a_checkpoint_are_refused(tmp_path, stopped, part):
    """Whether the folder is gone or empty, and in whichever epoch the run was."""

    def stop(*position):
        if position == ((0, 2) if stopped == "within" else (1, 1)):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, on_batch=stop)
    if part:
        for saved in (tmp_path / "checkpoints").iterdir():
            shutil.rmtree(saved)
    else:
        shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = r"holds metrics.jsonl but no checkpoint; put checkpoints/ back, or start anew in an"
    with pytest.raises(UserError, match=message):
        run(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_first_checkpoint_is_kept_where_the_first_epoch_fails(tmp_path):
    with pytest.raises(NonFinite, match="step 2: train_loss is not finite.*last good checkpoint"):
        run(tmp_path, poison=("train_loss", 2))
    assert checkpoints(tmp_path) == ["0"]
    fresh = runner._Saved(make_job().init(), 0, 0.0)
    assert checkpoint.restore_latest(tmp_path / "checkpoints", fresh).step == 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, whole):
    with pytest.raises(NonFinite, match="step 8: train_loss is not finite.*last good checkpoint"):
        run(tmp_path / "run", epochs=3, poison=("train_loss", 8))
    assert checkpoints(tmp_path / "run") == ["0", "5"]
    assert [li["step"] for li in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 5, 6, 7]
    # The state kept is the good one: without the poison the run ends as if there had been none.
    result, _ = run(tmp_path / "run", epochs=3)
    assert_same_run(tmp_path / "run", result.state, *whole)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    recorded = []
    with pytest.raises(NonFinite, match=r"step 10: w is nan"):
        run(tmp_path, epochs=3, poison=("w", 10), on_epoch=recorded.append)
    assert checkpoints(tmp_path) == ["0", "5"]
    assert recorded == [1]


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path):
    result, output = run(
        tmp_path, Config(run=RunConfig(1, on_nan="skip")), poison=("train_loss", 3)
    )
    assert "warning: step 3 is skipped: train_loss is not finite\n" in output
    written = lines(tmp_path)
    assert [(li["kind"], li["step"]) for li in written[:4]] == [
        ("step", 1),
        ("step", 2),
        ("skip", 3),
        ("step", 4),
    ]
    assert written[2] == {"kind": "skip", "step": 3, "epoch": 1, "leaf": "train_loss"}
    assert int(result.state.step) == 2 * STEPS


def test_not_every_step_can_be_left_out(tmp_path):
    config = Config(run=RunConfig(1, on_nan="skip"))
    with pytest.raises(NonFinite, match="step 13: train_loss is not finite"):
        run(tmp_path, config, epochs=3, poison=("train_loss", 3, 20))
    assert [line["kind"] for line in lines(tmp_path)].count("skip") == runner.MAX_SKIPPED


def test_checkpoints_within_an_epoch(tmp_path, whole):
    """Each step, if there is time for it, from which a kill at any step goes on."""
    often = Config(run=RunConfig(1, save_minutes=1e-9, keep=100))
    result, _ = run(tmp_path / "often", often, epochs=3)
    assert checkpoints(tmp_path / "often") == sorted(map(str, range(3 * STEPS + 1)))
    assert_same_run(tmp_path / "often", result.state, *whole)
    for step in (1, 7, 10, 14):
        workdir = tmp_path / str(step)
        shutil.copytree(tmp_path / "often", workdir)
        for later in range(step + 1, 3 * STEPS + 1):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        result, _ = run(workdir, epochs=3)
        assert_same_run(workdir, result.state, *whole)


def test_the_best_checkpoint_is_kept(tmp_path):
    """Beside the newest: the one of the epoch with the smallest loss."""
    run(tmp_path, Config(run=RunConfig(1, keep=1)), epochs=6, on_loss=[3, 1, 2, 5, 4, 6])
    assert checkpoints(tmp_path) == ["10", "30"]


def test_pictures_are_handed_to_tensorboard(tmp_path):
    def draw(epochs):
        from PIL import Image

        Image.new("RGB", (2, 1), (255, len(epochs), 0)).save(tmp_path / "cell.png")
        return [tmp_path / "cell.png"]

    with metrics.Display(Console(file=io.StringIO())) as display:
        runner.run(make_job()._replace(draw=draw), Config(), tmp_path, display)
    pictures = [(step, v) for step, v in event_files.values(tmp_path) if v.HasField("image")]
    ((step, value),) = pictures
    assert (step, value.tag) == (2 * STEPS, "cell")
    assert value.image.encoded_image_string == (tmp_path / "cell.png").read_bytes()


def test_a_trace_of_some_steps(tmp_path):
    run(tmp_path, Config(run=RunConfig(1, profile=3)))
    names = {path.name.split(".")[-2] for path in (tmp_path / "profile").rglob("*.gz")}
    assert "json" in names
    assert any((tmp_path / "profile").rglob("perfetto_trace.json.gz"))


@pytest.mark.parametrize("count", [0, 100])
def test_a_trace_ends_with_the_run(tmp_path, count):
    run(tmp_path, Config(run=RunConfig(1, profile=count)))
    assert any((tmp_path / "profile").rglob("*.gz")) == (count > 0)


def test_other_data_than_the_run_began_with_is_refused(tmp_path):
    def start(facts):
        with metrics.Display(Console(file=io.StringIO())) as display:
            runner.run(make_job()._replace(facts=facts), Config(), tmp_path, display)

    start({"data": "abc"})
    start({"data": "abc"})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="data is abd here, but abc where the run in .* began"):
        start({"data": "abd"})
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, full_disk, whole):
    """Whichever file it is that cannot grow."""
    for i, size in enumerate((100, 1000, 2000)):
        workdir = tmp_path / str(i)

        def fill(epoch, size=size):
            if epoch == 2:
                full_disk(size)

        with pytest.raises(UserError, match=f"cannot write to {workdir} .* make room there"):
            run(workdir, epochs=3, on_epoch=fill)
        gc.collect()  # a file that was left open would be a warning here
        full_disk(None)
        result, _ = run(workdir, epochs=3)
        assert_same_run(workdir, result.state, *whole)


def test_inputs_that_init_refuses_are_the_users(tmp_path):
    def init():
        raise ValueError("images of 7x7\n do not halve")

    with metrics.Display(Console(file=io.StringIO())) as display:
        with pytest.raises(UserError, match="^images of 7x7 do not halve$"):
            runner.run(make_job()._replace(init=init), Config(), tmp_path / "run", display)
    assert not (tmp_path / "run").exists()


def test_the_steps_are_traced_once_for_all_epochs(tmp_path):
    traces = []
    job = make_job(epochs=3)

    def traced(function):
        @jax.jit
        def counted(*args):
            traces.append(function)
            return function(*args)

        return counted

    job = job._replace(train_step=traced(job.train_step), eval_step=traced(job.eval_step))
    with metrics.Display(Console(file=io.StringIO())) as display:
        runner.run(job, Config(), tmp_path, display)
    assert len(traces) == 2


def test_an_error_in_the_step_is_not_lost(tmp_path):
    def train_step(*_):
        raise TypeError("a defect")

    job = make_job()._replace(train_step=train_step)
    with metrics.Display(Console(file=io.StringIO())) as display:
        with pytest.raises(TypeError, match="a defect"):
            runner.run(job, Config(), tmp_path, display)


def test_a_signal_while_compiling_stops_at_once(tmp_path):
    signal_sent, released = threading.Event(), threading.Event()

    def train_step(*_):
        signal.raise_signal(signal.SIGTERM)
        signal_sent.set()
        released.wait(60)

    job = make_job()._replace(train_step=train_step)
    try:
        with metrics.Display(Console(file=io.StringIO())) as display:
            with pytest.raises(Interrupted, match="by SIGTERM after step 0"):
                runner.run(job, Config(), tmp_path, display)
        assert signal_sent.is_set()
    finally:
        released.set()


def test_plain_output_names_the_phases_and_the_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PLAIN_INTERVAL", 0)
    _, output = run(tmp_path)
    assert "\x1b" not in output
    for text in (
        r"creating the parameters \.\.\.\n",
        r"compiling the stand-in step .*\.\.\.\n",
        r"compiling the evaluation .*: \d+\.\d s\n",
        r"epoch 1/2, step 3/10: train loss \d\.\d{3}, train accuracy 100\.0%; .* s/step, 0:00:0\d",
        r"\nepoch 2: eval loss \d\.\d{3}; \d+\.\d s\n",
    ):
        assert re.search(text, output), text


def test_terminal_output_is_live(tmp_path):
    _, output = run(tmp_path, terminal=True)
    assert "\x1b[?25l" in output  # the cursor is hidden,
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # and shown again
    assert "epoch 2: eval loss" in output


def test_progress_fits_a_narrow_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    display = metrics.Display(console)
    display.start(step=0, total=97650, steps_per_epoch=1953)
    values = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5)
    display.update(step=50_000, values=values)
    console.print(display._render())
    first, second, *rest = console.file.getvalue().splitlines()
    assert "epoch 26/50, step 50000/97650" in first
    assert "left" in first
    assert second.endswith("val accuracy 50.0%")
    assert not rest


def test_signals_are_handled_as_before_once_a_run_is_over(tmp_path):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path)
    assert before == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
