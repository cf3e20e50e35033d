"""The loop that every experiment shares: workdir, resume, signals.

A workdir holds config.json, metrics.jsonl (see `experiments.metrics`), TensorBoard events and
checkpoints. The same command on the same workdir goes on where it ended, with the same bits as if
it had never stopped.
"""

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax

from darts_jax import checkpoint
from darts_jax.files import write_text
from experiments.command_line import COMPILER, Interrupted, UserError, user_errors
from experiments.metrics import METRICS, Display, Log, require_finite

PyTree = Any

CHECKPOINTS = "checkpoints"  # folder of a workdir


class Job(NamedTuple):
    """What to run.

    Attributes:
      name: of the step, as "search step".
      init: makes the state before the first step, outside of jit.
      train_step: (state, data, batch) -> (state, NamedTuple of scalar metrics); pure, made of
        jitted functions, and free to donate the state.
      eval_step: (state, data, batch) -> ({metric: sum over the batch}, number of samples); so too.
      data: pytree of arrays on the device, an argument of both steps at every call.
      train_batches: epoch, from 0 -> its batches, `steps_per_epoch` pytrees of arrays of one shape;
        a function of the epoch alone.
      eval_batches: the batches of an evaluation.
      epochs: how many to run.
      steps_per_epoch: training steps in each of them.
      end_epoch: called with the state after each epoch; returns what to record besides metrics.
      next_epoch: (state, the lines of kind "epoch" so far) -> state to go on with.
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
    next_epoch: Callable[[PyTree, Sequence[dict[str, Any]]], PyTree] = lambda state, lines: state


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


def check_workdir(workdir: Path, config: Any) -> None:
    """Raises a UserError if the folder holds another run, or something else. Writes nothing."""
    try:
        saved = flatten(json.loads((workdir / "config.json").read_text()))
    except FileNotFoundError:
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(
                f"{workdir} holds files but no run (no config.json); give another --workdir"
            ) from None
        return
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{workdir}/config.json cannot be read ({error}); give another --workdir"
        ) from error
    current = flatten(_resolve(config))
    differing = [
        f"{name} is {saved.get(name, 'missing')} there, {current.get(name, 'missing')} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, "missing") != current.get(name, "missing")
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(differing)}."
            " Give another --workdir, or the fields of that run"
        )


@contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Inside, an OSError is a UserError that names the workdir."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {workdir} ({error}); give another --workdir") from error


def write_config(config: Any, workdir: Path) -> None:
    """Writes config.json, which `check_workdir` reads; makes the folder if need be."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / "config.json", json.dumps(_resolve(config), indent=2) + "\n")


def run(job: Job, config: Any, workdir: Path, log_every: int, display: Display) -> Result:
    """Runs a job from where its workdir says to its end.

    A checkpoint is saved at the start, after each epoch, and within one on SIGINT or SIGTERM: the
    step that runs is finished first, as is an evaluation. A second signal kills at once.

    Args:
      job: what to run.
      config: a dataclass, written to config.json.
      workdir: the folder to write to.
      log_every: training steps from one line of metrics.jsonl to the next.
      display: shows the progress.

    Raises:
      UserError: if `job.init` raises a ValueError, or the workdir cannot be resumed.
      NonFinite: at the first step with a metric, or the first epoch with a weight, that is not
        finite; the last checkpoint is from before.
      Interrupted: by a signal.
    """
    with _stop_signal() as stop:
        step, saved, log = _open(job, config, workdir, display)
        with log:
            if len(log.epochs) >= job.epochs:
                return Result(saved.state, log.epochs, compile_seconds=0.0)
            start = time.monotonic()
            examples = (
                (job.name, job.train_step, job.train_batches(0)[0]),
                ("evaluation", job.eval_step, job.eval_batches[0]),
            )
            for name, function, batch in examples:
                # Of a copy, since a step may donate the state.
                copy = jax.tree.map(lambda x: x.copy(), saved.state)
                call = partial(function, copy, job.data, batch)
                _compile(call, name, step, display, stop)
            compile_seconds = time.monotonic() - start

            display.start(step, job.epochs * job.steps_per_epoch, job.steps_per_epoch)
            observe = partial(_observe, log, log_every, job.steps_per_epoch, display)
            state, seconds = saved.state, saved.epoch_seconds
            for epoch in range(len(log.epochs), job.epochs):
                start = time.monotonic() - seconds
                batches = job.train_batches(epoch)[step - epoch * job.steps_per_epoch :]
                state, step = _train(job.train_step, state, step, job.data, batches, observe, stop)
                require_finite(step, state)
                if step < (epoch + 1) * job.steps_per_epoch:
                    seconds = time.monotonic() - start
                else:
                    values = _evaluate(job.eval_step, state, job.data, job.eval_batches)
                    require_finite(step, values)
                    other = {"seconds": time.monotonic() - start, **job.end_epoch(state)}
                    display.epoch(log.write("epoch", step, epoch + 1, values, **other))
                    state = job.next_epoch(state, log.epochs)
                    seconds = 0.0
                saved = _Saved(state, log.sync(), seconds)
                checkpoint.save(workdir / CHECKPOINTS, step, saved)
                if stop.signum:
                    raise Interrupted(stop.signum, step)
            return Result(state, log.epochs, compile_seconds)


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
        with writing(workdir):
            write_config(config, workdir)
            if restored is None:  # so that metrics without a checkpoint have lost theirs
                checkpoint.save(workdir / CHECKPOINTS, 0, fresh)
        step, saved = restored or (0, fresh)
        return step, saved, Log(workdir, saved.log_size, step)


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
    train_step: Callable,
    state: PyTree,
    step: int,
    data: PyTree,
    batches: Sequence[PyTree],
    observe: Callable[[int, Any], None],
    stop: SimpleNamespace,
) -> tuple[PyTree, int]:
    """Steps until the batches end or a signal comes: the state, and the number of steps."""
    waiting: list[tuple[int, Any]] = []
    for batch in batches:
        state, metrics = train_step(state, data, batch)
        step += 1
        # One step is looked at while the next one runs, so that the device never waits for us.
        for finished in waiting:
            observe(*finished)
        waiting = [(step, metrics)]
        if stop.signum:
            break
    for finished in waiting:
        observe(*finished)
    return state, step


def _observe(
    log: Log, log_every: int, steps_per_epoch: int, display: Display, step: int, metrics: Any
) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
    require_finite(step, values)
    display.update(step, values)
    if step % log_every == 0:
        log.write("step", step, (step - 1) // steps_per_epoch + 1, values)


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


def _resolve(config: Any) -> dict[str, Any]:
    """The config as JSON holds it; where it is written to is no part of what it is."""
    fields = dataclasses.asdict(config)
    fields.pop("workdir")
    return json.loads(json.dumps(fields))


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"search.epochs": 50, ...} of nested fields."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
