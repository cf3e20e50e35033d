"""What a run tells while it goes: metrics.jsonl, and progress on the screen.

metrics.jsonl holds one JSON object a line, of three kinds:

    {"kind": "step", "step", "epoch", every metric of that training step, "step_seconds"}
    {"kind": "epoch", "step", "epoch", every metric of the evaluation at its end, "seconds",
     "memory_bytes", and what else the experiment records}
    {"kind": "skip", "step", "epoch", "leaf"}

`step` counts finished steps and `epoch` counts from 1. A training step is written every
`log_every` steps, with its own metrics, not averages; `step_seconds` is the mean time of a step
since the line before. `seconds` is the wall time of the epoch, compilation left out.
`memory_bytes` is the most that the device has held so far or, on a CPU, the process. A step is
skipped by `--on-nan skip` alone; `leaf` names what was not finite. All but the figures of time and
memory is fixed by the config. Of several seeds, metrics are means; what is of seed S alone has
`_of_seed_S` at the end of its name.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from experiments import distributed
from experiments.errors import NonFinite
from experiments.events import TensorBoard, Wandb
from experiments.workdir import writing

METRICS = "metrics.jsonl"  # file of a workdir
MEASURED = ("seconds", "step_seconds", "memory_bytes")  # fields that the config does not fix
PLAIN_INTERVAL = 10  # seconds between two lines of progress where there is no terminal


class Log:
    """The metrics of a run, in its workdir; a context manager.

    Attributes:
      epochs: the lines of kind "epoch", those from before a resume included.
    """

    def __init__(self, workdir: Path, size: int, step: int, wandb: str | None = None) -> None:
        """Opens the log as it was when it had `size` bytes, after `step` steps.

        Args:
          workdir: the folder.
          size: bytes to keep.
          step: where to go on.
          wandb: a project of Weights & Biases to record to as well.

        Raises:
          ValueError: if it is shorter than that, or damaged. It is left as it is then.

        Every method raises a UserError if it cannot write.
        """
        self._workdir, path = workdir, workdir / METRICS
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise ValueError(
                f"{path} has {found} bytes, but had {size} when the checkpoint of step {step} was"
                " saved; put the file back, or start anew in another --workdir"
            )
        kept = path.read_bytes()[:size].splitlines() if size else []
        lines = [_parsed(path, *item) for item in enumerate(kept, 1)]
        self._file = path.open("ab")
        # What a killed run wrote after its last checkpoint will be written again.
        self._file.truncate(size)
        self.epochs = [line for line in lines if line["kind"] == "epoch"]
        self._sinks: list[TensorBoard | Wandb] = [TensorBoard(workdir / "tensorboard", step + 1)]
        if wandb is not None:
            self._sinks.append(Wandb(wandb, workdir))

    def write(
        self, kind: str, step: int, epoch: int, values: Mapping[str, float], **other: Any
    ) -> dict[str, Any]:
        """Writes one line; numbers go to the sinks as scalars, arrays of "alpha" as histograms."""
        line = {"kind": kind, "step": step, "epoch": epoch, **values, **other}
        measured = {name: other[name] for name in MEASURED if name in other}
        with writing(self._workdir):
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            for sink in self._sinks:
                sink.scalars(step, kind, {**values, **measured})
                for name in (name for name in other if name.startswith("alpha")):
                    for path, array in _arrays(name, other[name]):
                        sink.histogram(step, path, array)
        if kind == "epoch":
            self.epochs.append(line)
        return line

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        """Hands pictures, PNG, in the workdir to the sinks."""
        with writing(self._workdir):
            for sink in self._sinks:
                for file in files:
                    name = file.relative_to(self._workdir).with_suffix("").as_posix()
                    sink.picture(step, name, file.read_bytes())

    def sync(self) -> int:
        """Brings every line to the disk; returns the size of the file in bytes."""
        with writing(self._workdir):
            self._file.flush()
            os.fsync(self._file.fileno())
            for sink in self._sinks:
                sink.flush()
            return self._file.tell()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._workdir), ExitStack() as stack:  # each, even if another one fails
            stack.callback(self._file.close)
            for sink in self._sinks:
                stack.callback(sink.close)


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        return parse_line(text)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}, is damaged ({error}); put the file back, or start anew in"
            " another --workdir"
        ) from error


def parse_line(text: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; raises a ValueError or an OverflowError if it is damaged."""
    line = json.loads(text)
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise ValueError("no object with a kind")
    for name in ("step", "epoch"):
        if type(line.get(name)) is not int:
            raise ValueError(f"{name} is no whole number")
    for name, value in line.items():
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
    return line


def _arrays(name: str, alpha: Any) -> list[tuple[str, np.ndarray]]:
    """The arrays, by name, of alphas as a line holds them: a matrix, or one for each cell."""
    if isinstance(alpha, Mapping):
        return [(f"{name}/{cell}", np.asarray(values)) for cell, values in alpha.items()]
    return [(name, np.asarray(alpha))]


class Display:
    """Progress on a console: two live lines on a terminal, plain lines elsewhere.

    A context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=not distributed.is_first())
        self._spinner = Spinner("dots")
        self._phase: tuple[str, float] | None = None
        self._detail = ""
        self._total = self._steps_per_epoch = self._first = self._step = 0
        self._values: Mapping[str, float] = {}
        self._start = self._printed = 0.0
        self._live = Live(
            console=self.console, get_renderable=self._render, transient=True, refresh_per_second=8
        )

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Shows what is going on and for how many seconds, until it is done."""
        start = time.monotonic()
        self._phase, self._detail = (text, start), ""
        if not self.console.is_terminal:
            self.console.print(f"{text} ...")
        try:
            yield
        finally:
            self._phase = None
        self.console.print(f"{text}: {time.monotonic() - start:.1f} s", highlight=False)

    def detail(self, text: str, seconds: float | None = None) -> None:
        """Shows which part of the phase has begun or, with the seconds it took, ended."""
        self._detail = text if seconds is None else ""
        if seconds is not None and seconds >= 1:
            self.console.print(f"  {text}: {seconds:.1f} s", highlight=False)

    def warn(self, text: str) -> None:
        """Prints what a user should know, in one line."""
        self.console.print(f"warning: {text}", soft_wrap=True, highlight=False, markup=False)

    def start(self, step: int, total: int, steps_per_epoch: int) -> None:
        """Starts the clock of steps `step + 1` to `total`."""
        self._first = self._step = step
        self._total, self._steps_per_epoch = total, steps_per_epoch
        self._start = self._printed = time.monotonic()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of a finished step."""
        self._step, self._values = step, values
        if not self.console.is_terminal and time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._printed = time.monotonic()
            text = f"{self._position()}: {_format(values)}; {self._rate()}"
            self.console.print(text, soft_wrap=True, highlight=False)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Prints the metrics at the end of an epoch."""
        self._printed = time.monotonic()
        text = f"epoch {line['epoch']}: {_format(line)}; {line['seconds']:.1f} s"
        self.console.print(text, soft_wrap=True, highlight=False)

    def _position(self) -> str:
        per_epoch = self._steps_per_epoch
        epoch = min(self._step, self._total - 1) // per_epoch + 1
        return f"epoch {epoch}/{self._total // per_epoch}, step {self._step}/{self._total}"

    def _rate(self) -> str:
        done = self._step - self._first
        if not done:
            return ""
        seconds = (time.monotonic() - self._start) / done
        left = round(seconds * (self._total - self._step))
        hours, minutes = divmod(left // 60, 60)
        return f"{seconds:.3g} s/step, {hours}:{minutes:02}:{left % 60:02} left"

    def _render(self) -> RenderableType:
        if self._phase:
            text, start = self._phase
            detail = f", {self._detail}" if self._detail else ""
            self._spinner.update(text=f"{text}{detail}: {time.monotonic() - start:.0f} s")
            return self._spinner
        if not self._total:
            return ""
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(self._total, self._step, width=20)
        row.add_row(self._position(), bar, self._rate())
        return Group(row, Text(_format(self._values)))

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def require_finite(step: int, tree: Any) -> None:
    """Raises NonFinite, which names the first leaf of a pytree that is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jax.numpy.issubdtype(jax.numpy.result_type(leaf), np.floating):
            continue
        values = np.asarray(leaf)
        finite = np.isfinite(values)
        if not finite.all():
            raise non_finite(step, leaf_name(path), values[~finite].flat[0])


def non_finite(step: int, name: str, value: object = "not finite") -> NonFinite:
    """The error that names a step and a leaf."""
    return NonFinite(
        f"step {step}: {name} is {value}. The last good checkpoint is kept; go on from it with"
        " lower learning rates by --fork NEWDIR, or leave such steps out by --on-nan skip"
    )


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's place in a pytree, as "gradient.cell_0.kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def _format(values: Mapping[str, Any]) -> str:
    """Losses, accuracies and perplexities as a person reads them."""
    parts = []
    for name, value in values.items():
        if name.endswith("accuracy"):
            parts.append(f"{name.replace('_', ' ')} {value:.1%}")
        elif name.endswith("perplexity"):
            parts.append(f"{name.replace('_', ' ')} {value:.1f}")
        elif name.endswith("loss"):
            parts.append(f"{name.replace('_', ' ')} {value:.3f}")
    return ", ".join(parts)
