"""The loop that every experiment shares: resume, checkpoints, signals, what is not finite.

A workdir holds config.json, metrics.jsonl (see `experiments.metrics`), TensorBoard events and
checkpoints. The same command on the same workdir goes on where it ended, with the same bits as if
it had never stopped.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax

from darts_jax import checkpoint
from experiments import devices, distributed
from experiments.command_line import COMPILER, user_errors
from experiments.errors import Finished, Interrupted, UserError
from experiments.memory import device_memory
from experiments.metrics import (
    METRICS,
    Display,
    Log,
    leaf_name,
    non_finite,
    require_finite,
)
from experiments.run_config import RunConfig
from experiments.workdir import CHECKPOINTS, computed, write_config, writing

PyTree = Any

PROFILE = "profile"  # a folder of a workdir
BEST = "eval_loss"  # the metric whose smallest value makes the best checkpoint
MAX_SKIPPED = 10  # steps in a row


class Job(NamedTuple):
    """What to run.

    Attributes:
      name: of the step, as "search step".
      init: makes the state before the first step, outside of jit.
      train_step: (state, data, batch) -> (state, NamedTuple of scalar metrics); pure, made of
        jitted functions, and free to donate the state. Its metric `nonfinite` is no figure, but
        the index of the first leaf of what `checked` returns that is not finite, or -1.
      eval_step: (state, data, batch) -> ({metric: sum over the batch}, number of samples); so too.
      data: pytree of arrays on the device, an argument of both steps at every call.
      train_batches: epoch, from 0 -> its batches, `steps_per_epoch` pytrees of arrays of one shape;
        a function of the epoch alone.
      eval_batches: the batches of an evaluation.
      epochs: how many to run.
      steps_per_epoch: training steps in each of them.
      end_epoch: called with the state after each epoch; returns what to record besides metrics.
      checked: state -> a pytree that names what must be finite in a step, by its structure.
      next_epoch: (state, the lines of kind "epoch" so far) -> state to go on with.
      stop: the lines of kind "epoch" so far -> whether to end before all epochs have run.
      draw: called with the lines of kind "epoch", at the end; returns the pictures, PNG.
      facts: what else than the config makes the run what it is, such as hashes of its data.
      place: a state, as `init` or a checkpoint gives it -> the state on the devices.
    """

    name: str
    init: Callable[[], PyTree]
    train_step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, Any]]
    eval_step: Callable[[PyTree, PyTree, PyTree], tuple[dict[str, jax.Array], jax.Array]]
    data: PyTree
    train_batches: Callable[[int], Sequence[PyTree]]
    eval_batches: Sequence[PyTree]
    epochs: int
    steps_per_epoch: int
    end_epoch: Callable[[PyTree], dict[str, Any]]
    checked: Callable[[PyTree], PyTree]
    next_epoch: Callable[[PyTree, Sequence[dict[str, Any]]], PyTree] = lambda state, lines: state
    stop: Callable[[Sequence[dict[str, Any]]], bool] = lambda lines: False
    draw: Callable[[Sequence[dict[str, Any]]], Sequence[Path]] = lambda lines: ()
    facts: Mapping[str, str] = MappingProxyType({})
    place: Callable[[PyTree], PyTree] = lambda state: state


class Result(NamedTuple):
    """What came of a run.

    Attributes:
      state: after the last step.
      epochs: the lines of kind "epoch" in metrics.jsonl, all of them.
      compile_seconds: tracing and compiling in this process; 0 if there was nothing left to run.
    """

    state: PyTree
    epochs: list[dict[str, Any]]
    compile_seconds: float

    @property
    def seconds(self) -> float:
        """Of all epochs, compilation left out."""
        return sum(line["seconds"] for line in self.epochs)


class _Saved(NamedTuple):
    """What a checkpoint holds: the state, the size of metrics.jsonl, seconds of an epoch begun."""

    state: PyTree
    log_size: int
    epoch_seconds: float


def run(job: Job, config: Any, workdir: Path, display: Display) -> Result:
    """Runs a job from where its workdir says to its end.

    A checkpoint is saved at the start, after each epoch, and within one every few minutes and on
    SIGINT or SIGTERM: the step that runs is finished first, as is an evaluation. A second signal
    kills at once.

    Args:
      job: what to run.
      config: a dataclass, written to config.json; its field `run` is a `RunConfig`.
      workdir: the folder to write to.
      display: shows the progress.

    Raises:
      UserError: if `job.init` raises a ValueError, or the workdir cannot be resumed or written.
      NonFinite: at the first step with a metric, or the first checkpoint with a weight, that is not
        finite, unless it may be skipped; the last checkpoint is from before.
      Interrupted: by a signal.
      Finished: at the end, in all processes but the first of a run.
    """
    with _stop_signal() as stop, ExitStack() as stack:
        step, saved, log = _open_everywhere(job, config, workdir, display)
        stack.enter_context(log)
        if len(log.epochs) >= job.epochs or _stopped(job, log):
            _draw(job, log, step, workdir, display)
            return Result(devices.gather(saved.state), log.epochs, compile_seconds=0.0)
        compile_seconds = _compile_all(job, saved.state, step, display, stop)
        with writing(workdir, checkpoint.SaveError):
            saver = stack.enter_context(
                checkpoint.open_saver(workdir / CHECKPOINTS, config.run.keep, BEST)
            )
        state = _loop(job, config.run, workdir, display, stop, step, saved, log, saver)
        state = devices.gather(state)
        with writing(workdir):
            checkpoint.finish(saver)
        _draw(job, log, len(log.epochs) * job.steps_per_epoch, workdir, display)
        return Result(state, log.epochs, compile_seconds)


def restore(job: Job, workdir: Path, display: Display) -> PyTree:
    """The state in the newest checkpoint of a job's workdir.

    Raises:
      ValueError: if there is none, or it is another job's.
    """
    like = _Saved(job.init(), log_size=0, epoch_seconds=0.0)
    found = checkpoint.restore_latest(workdir / CHECKPOINTS, like)
    if found is None:
        raise ValueError(f"{workdir} holds no checkpoint; give the folder of a run that has begun")
    _warn_of_damaged(found, display)
    return found.state.state


def _loop(
    job: Job,
    config: RunConfig,
    workdir: Path,
    display: Display,
    stop: SimpleNamespace,
    step: int,
    saved: _Saved,
    log: Log,
    saver: checkpoint.Saver,
) -> PyTree:
    """The epochs that are left; returns the state after them."""
    per_epoch = job.steps_per_epoch
    display.start(step, job.epochs * per_epoch, per_epoch)
    names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(job.checked(saved.state))]
    observer = _Observer(log, config, per_epoch, display, names)
    left = job.epochs * per_epoch - step - 1  # after the first one
    traced = min(config.profile, left) if distributed.is_first() else 0
    profile = _Profile(workdir / PROFILE, step + 2, traced)
    state, seconds = saved.state, saved.epoch_seconds
    for epoch in range(step // per_epoch, job.epochs):
        start, end = time.monotonic() - seconds, (epoch + 1) * per_epoch
        batches = iter(job.train_batches(epoch)[step - epoch * per_epoch :])
        while step < end:
            due = partial(_due, stop, time.monotonic() + 60 * config.save_minutes)
            state, step = _train(job, state, step, batches, due, observer, profile)
            whole = devices.gather(state)
            require_finite(step, whole)
            seconds, values = time.monotonic() - start, {}
            if step == end:
                values = _evaluate(job.eval_step, state, job.data, job.eval_batches)
                require_finite(step, values)
                other = {"seconds": time.monotonic() - start, "memory_bytes": device_memory()}
                if distributed.is_first():
                    with writing(workdir):
                        other |= job.end_epoch(whole)
                display.epoch(log.write("epoch", step, epoch + 1, values, **other))
                state, seconds = job.next_epoch(state, log.epochs), 0.0
            saved = _Saved(devices.gather(state), log.sync(), seconds)
            signum = distributed.largest(stop.signum or 0)
            with writing(workdir):
                checkpoint.save(saver, step, saved, values)
                if signum:
                    checkpoint.finish(saver)
            if signum:
                raise Interrupted(signum, step)
        if _stopped(job, log):
            break
    return state


def _stopped(job: Job, log: Log) -> bool:
    """Whether the job ends early: as the first process says, which has all that is recorded."""
    return bool(distributed.largest(distributed.is_first() and job.stop(log.epochs)))


def _due(stop: SimpleNamespace, at: float) -> bool:
    """Whether a signal has come, or the time to save: in one process, and so in all."""
    return bool(distributed.largest(stop.signum is not None or time.monotonic() >= at))


def _draw(job: Job, log: Log, step: int, workdir: Path, display: Display) -> None:
    if not distributed.is_first():
        raise Finished
    with display.phase("drawing"), writing(workdir):
        log.pictures(step, job.draw(log.epochs))
        log.sync()


def _open_everywhere(
    job: Job, config: Any, workdir: Path, display: Display
) -> tuple[int, _Saved, Log]:
    """As `_open`, in all processes of a run and with the state on the devices."""

    def fresh() -> _Saved:
        with user_errors():
            return _Saved(job.init(), log_size=0, epoch_seconds=0.0)

    fields = computed(config) | {"on-nan": config.run.on_nan}
    open_run = partial(_open, job, config, workdir, display)
    step, saved, log = distributed.opened(open_run, fresh, fields)
    return step, saved._replace(state=job.place(saved.state)), log


def _open(job: Job, config: Any, workdir: Path, display: Display) -> tuple[int, _Saved, Log]:
    """The number of finished steps, the state after them, and the log as it was then."""
    with user_errors():
        with display.phase("creating the parameters"):
            state = job.init()
        fresh = _Saved(state, log_size=0, epoch_seconds=0.0)
        restored = checkpoint.restore_latest(workdir / CHECKPOINTS, fresh)
        if restored is None and (workdir / METRICS).exists():
            raise UserError(
                f"{workdir} holds {METRICS} but no checkpoint; put {CHECKPOINTS}/ back, or start"
                " anew in another --workdir"
            )
        _warn_of_damaged(restored, display)
        with writing(workdir):
            write_config(config, workdir, job.facts)
            if restored is None:  # so that metrics without a checkpoint have lost theirs
                with checkpoint.open_saver(workdir / CHECKPOINTS) as saver:
                    checkpoint.save(saver, 0, fresh)
            step, saved = restored[:2] if restored else (0, fresh)
            return step, saved, Log(workdir, saved.log_size, step, config.run.wandb)


def _warn_of_damaged(restored: checkpoint.Restored | None, display: Display) -> None:
    for path in restored.damaged if restored else ():
        display.warn(f"a checkpoint cannot be read and was set aside, as {path}")


def _compile_all(
    job: Job, state: PyTree, step: int, display: Display, stop: SimpleNamespace
) -> float:
    """Compiles both steps of a job; returns the seconds that took."""
    start = time.monotonic()
    examples = (
        (job.name, job.train_step, job.train_batches(0)[0]),
        ("evaluation", job.eval_step, job.eval_batches[0]),
    )
    for name, function, batch in examples:
        copy = jax.tree.map(lambda x: x.copy(), state)  # since a step may donate the state
        _compile(partial(function, copy, job.data, batch), name, step, display, stop)
    return time.monotonic() - start


def _compile(
    call: Callable[[], PyTree], name: str, step: int, display: Display, stop: SimpleNamespace
) -> None:
    """Makes a pure call once, so that all it is made of is compiled, and drops the result."""
    finished: Future = Future()

    def work() -> None:
        try:
            finished.set_result(jax.block_until_ready(call()))
        except BaseException as error:
            finished.set_exception(error)

    def watch(event: str, seconds: float, fun_name: str = "", **_: Any) -> None:
        stage = fun_name.removeprefix("jit(").removesuffix(")").replace("_", " ")
        if event.endswith("jaxpr_to_mlir_module_duration"):  # the last event before compilation
            display.detail(stage)
        elif event.endswith("backend_compile_duration"):
            display.detail(stage, seconds)

    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        # In a thread, because a signal waits for the main thread to come back from the compiler.
        with display.phase(f"compiling the {name} (the first time this takes long)"):
            threading.Thread(target=work, name=COMPILER, daemon=True).start()
            while not wait([finished], timeout=0.2).done:
                if stop.signum:
                    raise Interrupted(stop.signum, step)
            finished.result()
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)


def _train(
    job: Job,
    state: PyTree,
    step: int,
    batches: Iterator[PyTree],
    due: Callable[[], bool],
    observer: "_Observer",
    profile: "_Profile",
) -> tuple[PyTree, int]:
    """Steps until the batches end or something is due: the state, and the number of steps."""
    waiting: list[tuple[int, Any]] = []
    for batch in batches:
        step += 1
        profile.before(step)
        state, metrics = job.train_step(state, job.data, batch)
        profile.after(step, metrics)
        # One step is looked at while the next one runs, so that the device never waits for us.
        for finished in waiting:
            observer.observe(*finished)
        waiting = [(step, metrics)]
        if due():
            break
    for finished in waiting:
        observer.observe(*finished)
    return state, step


class _Observer:
    """Looks at the metrics of each step: shows them, writes them, and finds what is not finite."""

    def __init__(
        self,
        log: Log,
        config: RunConfig,
        steps_per_epoch: int,
        display: Display,
        names: Sequence[str],
    ) -> None:
        self._log, self._config, self._display = log, config, display
        self._steps_per_epoch, self._names = steps_per_epoch, names
        self._skipped = self._steps = 0  # in a row; since the last line
        self._start = time.monotonic()

    def observe(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step that follows the one before.

        Raises:
          NonFinite: if they are not finite, or were not so too often.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        epoch, bad = (step - 1) // self._steps_per_epoch + 1, int(values.pop("nonfinite"))
        self._steps += 1
        if bad >= 0:
            self._skipped += 1
            if self._config.on_nan == "halt" or self._skipped > MAX_SKIPPED:
                raise non_finite(step, self._names[bad])
            self._log.write("skip", step, epoch, {}, leaf=self._names[bad])
            self._display.warn(f"step {step} is skipped: {self._names[bad]} is not finite")
            return
        self._skipped = 0
        require_finite(step, values)
        self._display.update(step, values)
        if step % self._config.log_every == 0:
            now = time.monotonic()
            seconds = (now - self._start) / self._steps
            self._log.write("step", step, epoch, values, step_seconds=seconds)
            self._start, self._steps = now, 0


class _Profile:
    """Traces some steps: the second of this process, and so on."""

    def __init__(self, folder: Path, first: int, count: int) -> None:
        self._folder, self._first, self._last = folder, first, first + count - 1

    def before(self, step: int) -> None:
        """Before each step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)

    def after(self, step: int, metrics: Any) -> None:
        """After each step."""
        if step == self._last >= self._first:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()


def _evaluate(
    eval_step: Callable, state: PyTree, data: PyTree, batches: Sequence[PyTree]
) -> dict[str, float]:
    """The mean of each metric over all samples of the batches."""
    outputs = jax.device_get([eval_step(state, data, batch) for batch in batches])
    count = sum(int(count) for _, count in outputs)
    return {name: sum(float(sums[name]) for sums, _ in outputs) / count for name in outputs[0][0]}


@contextmanager
def _stop_signal() -> Iterator[SimpleNamespace]:
    """Yields what has `signum` set by the first SIGINT or SIGTERM; a second one acts as usual."""
    stop = SimpleNamespace(signum=None)

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def handle(signum: int, _: object) -> None:
        stop.signum = signum
        restore()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
