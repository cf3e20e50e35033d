"""Several processes that are one run, over loopback: two of two devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
from cheap_cells import CHEAP

from darts_jax import genotype, prediction
from experiments import distributed, pipeline, random_search, recurrent_baselines, search_cnn
from experiments.distributed import Distributed

SCRIPT = Path(__file__).parent / "one_of_several.py"
ENDLESS = ("search_cnn", "smoke", "--workdir", "run", "--log-every", "5", "--search.epochs", "1000")
ENDLESS_TRAINING = (
    *("evaluate_cnn", "smoke", "--workdir", "run", "--genotype", "../cells.json"),
    *("--log-every", "5", "--train.epochs", "1000"),
)


def start(
    folder: Path, *arguments: str, devices: int, env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen:
    """One process, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    env = {
        **os.environ,
        **env,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)


@contextmanager
def pair(
    path: Path, *arguments: str, second: tuple[str, ...] = (), launcher: str = ""
) -> Iterator[list[subprocess.Popen]]:
    """Two processes in path/0 and path/1; `second` is for the second one alone."""
    port = next(port for port in range(62000, 65000) if is_free(port))
    processes = []
    for i in (0, 1):
        flags, env = told(launcher, port, str(i))
        flags += second if i else ()
        processes.append(start(path / str(i), *arguments, *flags, devices=2, env=env))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def told(launcher: str, port: int, process: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Flags and environment by which a launcher tells a process of two who it is."""
    auto = ("--distributed.auto",)
    if launcher == "slurm":  # the port follows from the job
        names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
        values = (str(port - 61440), "127.0.0.1", "2", process, process)
        return auto, {f"SLURM_{name}": value for name, value in zip(names, values, strict=True)}
    if launcher == "ompi":
        uri = {"OMPI_MCA_orte_hnp_uri": f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:34911"}
        names, values = ("SIZE", "RANK", "LOCAL_RANK"), ("2", process, process)
        world = {f"OMPI_COMM_WORLD_{name}": v for name, v in zip(names, values, strict=True)}
        return auto, uri | world
    coordinator = ("--distributed.coordinator", f"127.0.0.1:{port}")
    return (*coordinator, "--distributed.processes", "2", "--distributed.process", process), {}


def lines_of(folder: Path, kind: str = "epoch") -> list[dict]:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def wait_for_epochs(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(lines_of(folder)) < count:
        assert time.monotonic() < deadline, (folder / "err").read_text()
        time.sleep(0.2)


def last_error(folder: Path) -> str:
    return (folder / "err").read_text().splitlines()[-1]


def assert_same_curve(one: Path, other: Path, epochs: int) -> None:
    a, b = lines_of(one)[:epochs], lines_of(other)[:epochs]
    assert len(a) == len(b) == epochs
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["eval_loss"], y["eval_loss"], rtol=1e-4)


@pytest.mark.slow
def test_search_in_two_processes(tmp_path):
    """The curve of one process with one device; the second one shows and writes nothing."""
    arguments = ("search_cnn", "smoke", "--workdir", "run", "--search.epochs", "3")
    with pair(tmp_path, *arguments) as processes:
        assert [process.wait(200) for process in processes] == [0, 0], last_error(tmp_path / "0")
    assert start(tmp_path / "alone", *arguments, devices=1).wait(200) == 0
    assert_same_curve(tmp_path / "0", tmp_path / "alone", 3)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"out", "err"}
    # Gloo's threads tell, one into the line of the other, whom they are connected to.
    shown = re.findall("[A-Za-z]+", (tmp_path / "1" / "out").read_text())
    gloo = "Gloo Rank is connected to peer ranks Expected number of connected peer ranks is"
    assert set(shown) <= set(gloo.split())
    assert (tmp_path / "0" / "run" / "genotype.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 4])
def test_seeds_in_two_processes(seeds, tmp_path):
    """One process has some of the seeds, which all are saved and recorded by the first one."""
    arguments = ("search_cnn", "smoke", "--workdir", "run", "--seeds", str(seeds))
    with pair(tmp_path, *arguments) as processes:
        assert [process.wait(200) for process in processes] == [0, 0], last_error(tmp_path / "0")
    assert start(tmp_path / "alone", *arguments, devices=1).wait(200) == 0
    assert_same_curve(tmp_path / "0", tmp_path / "alone", 2)
    for a, b in zip(lines_of(tmp_path / "0"), lines_of(tmp_path / "alone"), strict=True):
        for seed in range(seeds):
            for cell, alpha in a[f"alpha_of_seed_{seed}"].items():
                expected = b[f"alpha_of_seed_{seed}"][cell]
                np.testing.assert_allclose(alpha, expected, rtol=1e-3, atol=1e-5)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"out", "err"}
    # It goes on in one process, on one device.
    more = (*arguments, "--search.epochs", "3")
    assert start(tmp_path / "0", *more, devices=1).wait(200) == 0, last_error(tmp_path / "0")
    assert len(lines_of(tmp_path / "0")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["1", "2"])
def test_evaluation_in_two_processes(seeds, tmp_path):
    genotype.save(CHEAP, tmp_path / "cells.json")
    cells = str(tmp_path / "cells.json")
    arguments = ("evaluate_cnn", "smoke", "--workdir", "run", "--genotype", cells, "--seeds", seeds)
    with pair(tmp_path, *arguments) as processes:
        assert [process.wait(200) for process in processes] == [0, 0], last_error(tmp_path / "0")
    assert start(tmp_path / "alone", *arguments, devices=1).wait(200) == 0
    assert_same_curve(tmp_path / "0", tmp_path / "alone", 2)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"out", "err"}
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1), np.uint8)
    logits = [
        trained.apply(trained.variables, images)
        for trained in (prediction.load(tmp_path / name / "run") for name in ("0", "alone"))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_text_in_two_processes(tmp_path):
    arguments = ("evaluate_rnn", "smoke", "--workdir", "run", "--genotype", "DARTS_V1")
    with pair(tmp_path, *arguments) as processes:
        assert [process.wait(200) for process in processes] == [0, 0], last_error(tmp_path / "0")
    assert start(tmp_path / "alone", *arguments, devices=1).wait(200) == 0
    assert_same_curve(tmp_path / "0", tmp_path / "alone", 2)
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"out", "err"}
    assert (tmp_path / "0" / "run" / "sample.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "steps_per_epoch"),
    [(ENDLESS, 4), (ENDLESS_TRAINING, 2)],
    ids=["search_cnn", "evaluate_cnn"],
)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_ends_the_other_and_the_run_goes_on(
    tmp_path, arguments, steps_per_epoch, killed
):
    genotype.save(CHEAP, tmp_path / "cells.json")
    with pair(tmp_path, *arguments) as processes:
        wait_for_epochs(tmp_path / "0", 2)
        processes[killed].kill()
        assert processes[1 - killed].wait(60) == distributed.LOST == 4
    error = last_error(tmp_path / str(1 - killed))
    assert error.startswith("error: another process of this run has ended")
    done = len(lines_of(tmp_path / "0"))
    with pair(tmp_path, *arguments) as processes:
        wait_for_epochs(tmp_path / "0", done + 2)
        processes[0].send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes == [128 + signal.SIGTERM] * 2
    # And in one process, on one device.
    alone = start(tmp_path / "0", *arguments, devices=1)
    try:
        wait_for_epochs(tmp_path / "0", len(lines_of(tmp_path / "0")) + 1)
    finally:
        alone.kill()
        alone.wait()
    steps = [line["step"] for line in lines_of(tmp_path / "0")]
    assert steps == [steps_per_epoch * (i + 1) for i in range(len(steps))]


def test_a_signal_to_one_stops_all_after_one_step(tmp_path):
    with pair(tmp_path, *ENDLESS) as processes:
        wait_for_epochs(tmp_path / "0", 1)
        processes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes == [128 + signal.SIGTERM] * 2
    texts = {last_error(tmp_path / name).split(";")[0] for name in "01"}
    assert len(texts) == 1 and "stopped by SIGTERM after step" in texts.pop()


@pytest.mark.parametrize("launcher", ["", "slurm", "ompi"])
def test_processes_of_other_fields_are_refused(tmp_path, launcher):
    """They find each other, and that they differ."""
    with pair(tmp_path, *ENDLESS, second=("--seed", "3"), launcher=launcher) as processes:
        assert [process.wait(60) for process in processes] == [2, 2]
    assert "seed is 0 there, 3 here" in last_error(tmp_path / "1")
    assert "not all processes were given the same fields" in last_error(tmp_path / "0")


def test_a_workdir_that_cannot_be_used_ends_both(tmp_path):
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "0" / "run" / "thesis.tex").touch()
    with pair(tmp_path, *ENDLESS) as processes:
        assert [process.wait(60) for process in processes] == [2, distributed.LOST]
    assert "holds files but no run" in last_error(tmp_path / "0")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Distributed(auto=True, coordinator="host:1"), "leave one of the two out"),
        (Distributed(coordinator="host"), "is host; give HOST:PORT"),
        (Distributed(processes=2), "needs --distributed.coordinator"),
        (Distributed(coordinator="host:1", processes=2, process=2), "is 2 of 2; give one from 0"),
        (Distributed(coordinator="host:1", processes=2, process=-1), "is -1 of 2"),
    ],
)
def test_fields_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(config)


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        flags = ["--distributed.coordinator", f"127.0.0.1:{taken.getsockname()[1]}"]
        assert search_cnn.main(["smoke", *flags, "--distributed.processes", "2"]) == 2
    assert "its port cannot be opened" in capsys.readouterr().err


def test_no_cluster_is_told_in_one_line(tmp_path):
    process = start(tmp_path, "search_cnn", "smoke", "--distributed.auto", devices=1)
    assert process.wait(60) == 2
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert "the other processes of this run are not found" in line


def test_one_process_alone():
    distributed.initialize(Distributed())
    assert not distributed.started() and distributed.is_first()
    assert distributed.largest(7) == 7
    assert distributed.leave(3) == 3


def test_flags_are_told_in_one_line(capsys):
    assert search_cnn.main(["smoke", "--distributed.process", "1"]) == 2
    assert "needs --distributed.coordinator" in capsys.readouterr().err


@pytest.mark.parametrize("module", [pipeline, random_search, recurrent_baselines])
def test_what_is_for_one_process(module, capsys):
    flags = ["--distributed.coordinator", "host:1", "--distributed.processes", "2"]
    assert module.main(["smoke", *flags]) == 2
    assert "in one process" in capsys.readouterr().err


@pytest.mark.parametrize("module", [pipeline, random_search, recurrent_baselines])
def test_what_cannot_be_forked(module, tmp_path, capsys):
    """The runs inside a copy belong to other fields, and would be refused one by one."""
    flags = ["--workdir", str(tmp_path / "run"), "--fork", str(tmp_path / "fork")]
    assert module.main(["smoke", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fork is for searches and trainings alone" in line
    assert not list(tmp_path.iterdir())


def test_a_silent_log_keeps_the_epochs():
    log = distributed.Silent([{"epoch": 1}])
    with log:
        log.write("step", 3, 2, {"train_loss": 1.0})
        line = log.write("epoch", 4, 2, {"eval_loss": 2.0}, seconds=1.0)
        assert log.sync() == 0
    assert log.epochs == [{"epoch": 1}, line]
    assert line == {"kind": "epoch", "step": 4, "epoch": 2, "eval_loss": 2.0, "seconds": 1.0}


def test_what_is_sent_comes_bit_for_bit():
    leaves = [np.float32(-0.0), np.arange(3), jax.random.key(5), jax.numpy.ones((2, 0)), 3]
    found = distributed._unpack(distributed._pack(leaves), leaves)
    for a, b in zip(leaves, found, strict=True):
        a, b = distributed._bits(a), distributed._bits(b)
        assert type(a) is type(b) and np.asarray(a).tobytes() == np.asarray(b).tobytes()
