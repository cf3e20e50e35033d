"""Searches, killed at random moments and told to stop: they go on with the same bits.

The convolutional one is of a network that compiles in a second.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_runner import lines

from darts_jax import checkpoint
from experiments.metrics import MEASURED

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "one_of_several.py"


class Search(NamedTuple):
    """A search that is killed so often, and long enough for that."""

    name: str
    epochs: int
    kills: int


SEARCHES = (Search("search_rnn", 16, kills=20), Search("search_cnn", 16, kills=4))
# A checkpoint at every step, so that many of the kills hit one that is being written.
OPTIONS = ("--search.w.learning-rate", "0.5", "--save-minutes", "0.0001", "--log-every", "1")


def start(search, workdir):
    epochs = ("--search.epochs", str(search.epochs))
    command = [sys.executable, str(SCRIPT), search.name, "smoke", *OPTIONS, *epochs]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        env={
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compiling
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(search, workdir):
    process = start(search, workdir)
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


@pytest.fixture(scope="module", params=SEARCHES, ids=lambda search: search.name)
def whole(request, tmp_path_factory):
    """A search, and the workdir of one that was left alone."""
    workdir = tmp_path_factory.mktemp(request.param.name) / "whole"
    finish(request.param, workdir)
    return request.param, workdir


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
    search, expected = whole
    workdir, rng, within = expected.parent / "killed", random.Random(0), 0
    for i in range(search.kills):
        process = start(search, workdir)
        if i % 4:  # the others are killed while they start
            wait_for_progress(process, workdir)
            time.sleep(rng.uniform(0, 0.4))
        else:
            time.sleep(rng.uniform(0, 4))
        within += process.poll() is None
        process.kill()
        process.communicate()
    assert within > search.kills * 3 // 4
    finish(search, workdir)
    assert_same(workdir, expected)


@pytest.mark.parametrize("whole", SEARCHES[:1], indirect=True, ids=lambda search: search.name)
def test_told_to_stop(whole):
    """By one signal, and as it goes on by the other."""
    search, expected = whole
    workdir = expected.parent / "told"
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = start(search, workdir)
        wait_for_progress(process, workdir)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signum
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        stopped = f"stopped by {signum.name} after step {newest(workdir)}; to go on: python -m "
        assert stopped in line
    finish(search, workdir)
    assert_same(workdir, expected)


def test_times_are_all_that_may_differ(whole):
    search, workdir = whole
    assert set(MEASURED) == {"seconds", "step_seconds", "memory_bytes"}
    assert len(lines(workdir)) > search.epochs
