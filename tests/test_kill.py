"""A real search, killed at random moments and told to stop: it goes on with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_runner import lines

from darts_jax import checkpoint
from experiments.metrics import MEASURED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EPOCHS = 30
# A checkpoint at every step, so that many of the kills hit one that is being written.
OPTIONS = (
    "--search.epochs",
    str(EPOCHS),
    "--search.w.learning-rate",
    "0.5",
    "--save-minutes",
    "0.0001",
    "--log-every",
    "1",
)
KILLS = 20


def start(workdir):
    command = [sys.executable, "-m", "experiments.search_rnn", "smoke", *OPTIONS]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workdir):
    process = start(workdir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def newest(workdir):
    """The largest number of a checkpoint; -1 if there is none."""
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.exists() else []
    return max(steps, default=-1)


def wait_for_progress(process, workdir):
    before, deadline = newest(workdir), time.monotonic() + 120
    while newest(workdir) <= before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("kill") / "whole"
    finish(workdir)
    return workdir


def assert_same(workdir, whole):
    assert lines(workdir) == lines(whole)
    assert (workdir / "genotype.json").read_bytes() == (whole / "genotype.json").read_bytes()
    ours, theirs = (
        checkpoint._read(folder / "checkpoints" / str(newest(folder)))[0]
        for folder in (workdir, whole)
    )
    assert set(ours) == set(theirs)
    for name in set(ours) - {".log_size", ".epoch_seconds"}:  # which time decides
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert not list(workdir.rglob("*.damaged"))


def test_killed_at_any_moment(whole):
    workdir, rng, within = whole.parent / "killed", random.Random(0), 0
    for i in range(KILLS):
        process = start(workdir)
        if i % 4:  # the others are killed while they start
            wait_for_progress(process, workdir)
            time.sleep(rng.uniform(0, 0.8))
        else:
            time.sleep(rng.uniform(0, 4))
        within += process.poll() is None
        process.kill()
        process.communicate()
    assert within > KILLS * 3 // 4
    finish(workdir)
    assert_same(workdir, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(whole, signum):
    workdir = whole.parent / signum.name
    process = start(workdir)
    wait_for_progress(process, workdir)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"stopped by {signum.name} after step {newest(workdir)}; to go on: python -m " in line
    finish(workdir)
    assert_same(workdir, whole)


def test_times_are_all_that_may_differ(whole):
    assert set(MEASURED) == {"seconds", "step_seconds", "memory_bytes"}
    assert len(lines(whole)) > EPOCHS
