"""An experiment that a sweep can run in a moment; in a process of its own it imports nothing heavy.

It ends as `--end` says: well, by an exit code after a line on stderr, or when it is told to.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

MODULE = "fake_experiment"
FOREVER = 300  # seconds


@dataclass(frozen=True)
class Inner:
    """Nested."""

    train_rate: float = 0.1
    """Rate."""
    flip: bool = True
    """A flag."""


@dataclass(frozen=True)
class Config:
    """Fake."""

    inner: Inner = field(default_factory=Inner)
    end: str = "well"
    """How it ends: "well", an exit code, "unless FILE" exists by 1, when "told", or so "slowly"."""
    seed: int = 0
    """Seed."""
    workdir: Path | None = None
    """Where to."""


PRESETS = {"small": ("quick", Config()), "other": ("quick, too", Config(Inner(0.5)))}


def check(config):
    """As in an experiment."""
    if config.inner.train_rate < 0:
        raise ValueError(f"--inner.train-rate is {config.inner.train_rate}; give at least 0")


def main(argv: list[str]) -> int:
    """Runs; reads only what a sweep gives it."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in argv if "=" in arg)
    seed, workdir = argv[argv.index("--seed") + 1], Path(argv[argv.index("--workdir") + 1])
    rate = float(given.get("inner.train-rate", PRESETS[argv[0]][1].inner.train_rate))
    inner = {"train_rate": rate, "flip": "--inner.no-flip" not in argv}
    end = given.get("end", "well")
    workdir.mkdir(exist_ok=True)
    fields = {"inner": inner, "end": end, "seed": int(seed)}
    (workdir / "config.json").write_text(json.dumps(fields))
    with (workdir / "attempts").open("a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    print("running", argv)
    if end in ("told", "slowly"):
        return wait(workdir, 0.3 if end == "told" else FOREVER)
    lines = [{"kind": "epoch", "epoch": i, "eval_loss": rate / i, "alpha": [1]} for i in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"kind": "step", "step": 9}])
    (workdir / "metrics.jsonl").write_text(text + '{"kind": "epo')
    code = 0 if end == "well" else int(end) if end.isdecimal() else 1
    if end.startswith("unless") and Path(end.split()[1]).exists():
        code = 0
    if code:
        print(f"error: rate {rate} ends by [{code}]", file=sys.stderr)
    return code


def wait(workdir: Path, saving: float) -> int:
    """Waits for a signal, once, and saves for so many seconds; another one kills."""
    got = []

    def handle(signum, _):
        got.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    (workdir / "ready").touch()
    deadline = time.monotonic() + FOREVER
    while not got and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(saving)
    print("saved")
    return 128 + got[0] if got else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
