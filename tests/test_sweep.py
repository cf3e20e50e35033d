"""Sweeps of an experiment that takes a moment: here, by submitit, a faked Slurm, and Ray."""

import csv
import dataclasses
import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import fake_experiment
import pytest

from experiments import command_line, launchers, slurm, sweep, sweep_results
from experiments.errors import UserError
from experiments.tasks import Ended

HERE = Path(__file__).parent


@pytest.fixture
def start(monkeypatch, tmp_path):
    """`start(*argv)`: the exit code of a sweep of the fake experiment in tmp_path/sweep."""
    monkeypatch.setitem(sweep.EXPERIMENTS, "fake", "fake_experiment")
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sweep.jax.config, "update", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return lambda *argv: sweep.main(["fake", "--workdir", "sweep", *argv])


def rows(workdir=Path("sweep")):
    with (workdir / "results.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def attempts(name):
    return len((Path("sweep") / name / "attempts").read_text().splitlines())


def test_every_combination_from_every_seed(start, capsys):
    argv = ("--grid", "inner.train-rate=0.5,2", "--grid", "inner.flip=true,false")
    assert start(*argv, "--seeds", "2", "--seed", "3", "--jobs", "3") == 0
    found = rows()
    assert list(found) == [
        f"inner.train_rate={rate},inner.flip={flip},seed={seed}"
        for rate in ("0.5", "2")
        for flip in ("true", "false")
        for seed in (3, 4)
    ]
    row = found["inner.train_rate=2,inner.flip=false,seed=4"]
    assert float(row.pop("wall_seconds")) > 0
    folder = "sweep/inner.train_rate=2,inner.flip=false,seed=4"
    assert row == {
        "run": Path(folder).name,
        "inner.train_rate": "2",
        "inner.flip": "false",
        "seed": "4",
        "exit_code": "0",
        "error": "",
        "command": "python -m fake_experiment small --inner.train-rate=2 --inner.no-flip --seed 4"
        f" --workdir {folder}",
        "epoch": "2",
        "eval_loss": "1.0",
    }
    assert "running" in Path(f"{folder}.log").read_text()
    assert "8 of 8 done" in capsys.readouterr().out


def test_failed_runs_are_listed_and_tried_again(start, capsys, tmp_path):
    argv = ("--grid", f"end=well,3,unless {tmp_path}/mended", "--", "--inner.train-rate=4")
    assert start(*argv) == 5
    output = capsys.readouterr()
    found = list(rows().values())
    assert [row["exit_code"] for row in found] == ["0", "3", "1"]
    assert found[1]["error"] == "error: rate 4.0 ends by [3]"
    assert found[1]["eval_loss"] == "2.0"  # what it had until then
    assert "error: rate 4.0 ends by [3]" in output.out
    assert output.err.startswith("error: 2 of 3 runs have failed, see the table; to try them again")
    (tmp_path / "mended").touch()
    assert start(*argv) == 5
    assert [row["exit_code"] for row in rows().values()] == ["0", "3", "0"]
    assert [attempts(name) for name in rows()] == [1, 2, 2]
    log = (Path("sweep") / f"{list(rows())[1]}.log").read_text()
    assert log.count("$ ") == 2


def test_other_runs_of_the_folder_keep_their_rows(start):
    assert start("--grid", "inner.train-rate=1,2") == 0
    before = rows()
    assert start("--grid", "inner.train-rate=2,3") == 0
    assert {name: rows()[name] for name in before} == before
    assert len(rows()) == 3
    assert attempts("inner.train_rate=2,seed=0") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--grid", "inner.rat=1,2"],
            "--grid has no field 'inner.rat'; use one of: inner.train_rate",
        ),
        (["--grid", "inner.train-rate=1,x"], "Error parsing --inner.train-rate: could not convert"),
        (["--grid", "inner.train-rate=1,-1"], "--inner.train-rate is -1.0; give at least 0"),
        (["--grid", "inner.train-rate=1,,2"], "lacks a value; give FIELD=VALUE,VALUE"),
        (["--grid", "inner.train-rate"], "lacks a value; give FIELD=VALUE,VALUE"),
        (["--grid", "inner.train-rate=1,1"], "give each once"),
        (["--grid", "end=1", "--grid", "end=2"], "give each once"),
        (["--grid", "inner.flip=yes"], "inner.flip=yes; give true or false"),
        (["--grid", "seed=1,2"], "--grid has no seed; give --seeds and --seed"),
        (["--grid", "workdir=a,b"], "--grid has no field 'workdir'"),
        (["--grid", "inner.flip=true", "--", "--inner.no-flip"], "--inner.no-flip after --"),
        (["--", "--seed=4"], "--seed after -- differs from run to run; give --seed"),
        (["--", "--fork", "x"], "--fork after -- differs from run to run; give no --fork"),
        (["--", "--inner.rat", "1"], "Unrecognized options: --inner.rat"),
        (["smal"], "unknown preset 'smal'; use one of: small"),
        (["--seeds", "0"], "--seeds is 0; give at least 1"),
        (["--jobs", "0"], "--jobs is 0; give at least 1"),
        (["--cpus", "2"], "--cpus is for --launcher slurm and ray"),
        (["--slurm.minutes", "9"], "--slurm.* is for --launcher slurm"),
    ],
)
def test_a_typo_ends_at_once_in_one_line(start, capsys, argv, message):
    assert start(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("sweep").exists()


def test_the_experiment_has_to_exist(capsys):
    assert sweep.main(["search_cn"]) == 2
    error = "error: unknown experiment 'search_cn'; use one of: search_cnn"
    assert capsys.readouterr().err.startswith(error)


def test_folders_of_other_runs_are_refused(start, capsys):
    assert start("--grid", "inner.train-rate=1,2") == 0
    assert start("other", "--grid", "inner.train-rate=1,2", "--", "--inner.no-flip") == 2
    assert "inner.flip is True there, False here" in capsys.readouterr().err
    Path("sweep/results.csv").write_text("a,b\n1,2\n")
    assert start() == 2
    assert "has not the columns of a sweep; move it away" in capsys.readouterr().err
    assert Path("sweep/results.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", sorted(set(sweep.EXPERIMENTS) - {"fake"}))
def test_every_experiment_can_be_swept(name, tmp_path):
    """Its smoke preset is checked; those that are given cells must be told which."""
    cells = (
        [] if "search" in name or name in ("pipeline", "compare_hypergradients") else ["DARTS_V2"]
    )
    rest = [f"--genotype={cell}" for cell in cells]
    config = sweep.Config(name, "smoke", seeds=2, workdir=tmp_path / "sweep")
    _, runs = sweep.plan(config, rest)
    assert [run.folder.name for run in runs] == ["seed=0", "seed=1"]
    assert not any(tmp_path.iterdir())
    if cells:
        with pytest.raises(ValueError, match="share no newest search"):
            sweep.plan(config, [])
    with pytest.raises(UserError, match="^unknown preset"):
        sweep.plan(dataclasses.replace(config, preset="smole"), rest)


def test_folder_names():
    name = sweep.folder_name
    assert name({"a.b": "unrolled", "seed": "0"}) == "a.b=unrolled,seed=0"
    assert name({"a": "-1e-3", "seed": "0"}) == "a=-1e-3,seed=0"
    paths = [
        name({"a": path, "seed": "0"}) for path in ("x/y", "x_y", "x y", "../z", "é", "x" * 999)
    ]
    assert len(set(paths)) == 6
    assert all(len(path) < 200 and path.isascii() and "/" not in path for path in paths)


def test_final_metrics_of_nested_runs(tmp_path):
    for folder, loss in (("best", 0.5), ("brief/random_0", 1)):
        (tmp_path / folder).mkdir(parents=True)
        line = f'{{"kind": "epoch", "eval_loss": {loss}, "averaged": true, "bad": NaN}}\n'
        (tmp_path / folder / "metrics.jsonl").write_text(line)
    found = sweep_results.final_metrics(tmp_path)
    assert found == {"best/eval_loss": "0.5", "brief/random_0/eval_loss": "1"}


def test_who_has_no_exit_code_has_failed(tmp_path):
    before = sweep_results.row("a", {"seed": "0"}, "python")
    row = sweep_results.ended(before, Ended(None, None, "NODE_FAIL"), tmp_path, tmp_path / "log")
    assert (sweep_results.state(before), sweep_results.state(row)) == ("not run", "failed")
    assert (row["exit_code"], row["error"]) == ("-1", "NODE_FAIL")


@pytest.mark.parametrize("package", ["submitit", "ray"])
def test_a_missing_extra_is_named(start, capsys, monkeypatch, package):
    launcher = {"submitit": "slurm"}.get(package, package)
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    assert start("--launcher", launcher) == 2
    assert f"needs its package: pip install -e '.[{launcher}]'" in capsys.readouterr().err
    assert not Path("sweep").exists()


def test_each_run_has_its_gpus(start, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert start("--gpus", "2", "--jobs", "2") == 2
    assert "2 jobs of 2 GPUs do not fit into CUDA_VISIBLE_DEVICES=4,5,6" in capsys.readouterr().err
    assert start("--gpus", "1", "--jobs", "3", "--seeds", "3") == 0
    seen = [(Path("sweep") / name / "attempts").read_text() for name in rows()]
    assert seen == ["4\n", "5\n", "6\n"]


def tell(signum, *ready, times=1):
    """Sends signals to this process once a sweep takes them, and some runs are ready."""
    handler = signal.getsignal(signum)

    def waiting():
        return signal.getsignal(signum) is handler or not all(path.exists() for path in ready)

    def work():
        deadline = time.monotonic() + fake_experiment.FOREVER
        while waiting() and time.monotonic() < deadline:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signum)
            time.sleep(0.25)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_runs_save(start, capsys, signum, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    tell(signum, *(tmp_path / "sweep" / f"end=told,seed={seed}" / "ready" for seed in (0, 1)))
    assert start("--grid", "end=told,well", "--seeds", "2", "--jobs", "2") == 128 + signum
    captured = capsys.readouterr()
    assert f"error: stopped by {signum.name}; to go on: python -m " in captured.err
    assert [row["exit_code"] for row in rows().values()] == [str(128 + signum)] * 2 + ["", ""]
    assert captured.out.count("not run") == 2
    assert Path("sweep/end=told,seed=0.log").read_text().endswith("saved\n")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_kills(start, tmp_path):
    tell(signal.SIGTERM, tmp_path / "sweep" / "end=slowly,seed=0" / "ready", times=2)
    assert start("--grid", "end=slowly") == 143
    assert "saved" not in Path("sweep/end=slowly,seed=0.log").read_text()


@pytest.fixture
def no_unpickling(monkeypatch):
    """The sweep unpickles nothing that submitit writes; jobs, other processes, do."""
    pytest.importorskip("submitit")

    def fail(path):
        raise AssertionError(f"{path} is unpickled")

    monkeypatch.setattr("submitit.core.utils.pickle_load", fail)


@pytest.fixture
def local_cluster(monkeypatch, no_unpickling):
    """`--launcher slurm` by submitit's executor for this machine."""
    monkeypatch.setitem(launchers.LAUNCHERS, "slurm", partial(slurm.on_slurm, cluster="local"))


def test_submitit(start, local_cluster):
    assert start("--launcher", "slurm", "--grid", "end=well,3") == 5
    assert [row["exit_code"] for row in rows().values()] == ["0", "3"]
    assert all(float(row["wall_seconds"]) > 0 for row in rows().values())
    assert json.loads(Path("sweep/.slurm/jobs.json").read_text()) == {}
    assert start("--launcher", "slurm", "--grid", "end=well,3") == 5
    assert [attempts(name) for name in rows()] == [1, 2]


SLURM = {
    # Runs the array's jobs at once, in the background.
    "sbatch": """
cp "$1" {folder}/script
for i in 0 1; do
    SLURM_JOB_ID=7$i SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 \\
        setsid bash "$1" >> {folder}/out 2>&1 &
done
echo "Submitted batch job 7"
""",
    "srun": """
while [ "$1" != {python} ]; do
    [ "$1" = --output ] && out=$2
    shift
done
out=${{out//%A/7}}
out=${{out//%a/$SLURM_ARRAY_TASK_ID}}
touch ${{out//%t/0}}  # so that it has begun
echo $$ > {folder}/$SLURM_ARRAY_TASK_ID
exec "$@"
""",
    "sacct": """
echo 'JobID|State|NodeList'
for i in 0 1; do
    echo "7_$i|$(if [ -e {folder}/cancelled_$i ]; then echo CANCELLED; else echo RUNNING; fi)|here"
done
""",
    "scancel": """
touch {folder}/cancelled_${{1#7_}}
pkill -TERM -P $(cat {folder}/${{1#7_}})
""",
    "scontrol": 'echo "$@" >> {folder}/requeued',
}


@pytest.fixture
def cluster(monkeypatch, tmp_path, no_unpickling):
    """A folder for what a faked Slurm is told."""
    monkeypatch.setattr(slurm, "LATE", 3)
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM.items():
        text = text.format(folder=folder, python=sweep.sys.executable)
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


ASKED = (
    *("--launcher", "slurm", "--jobs", "1", "--cpus", "4", "--gpus", "2"),
    *("--slurm.partition", "long", "--slurm.minutes", "90", "--slurm.memory", "16"),
    *("--slurm.options", "account=mine", "exclusive", "--slurm.setup", "export FROM=setup"),
)


def test_slurm_is_asked_for_what_was_given(start, cluster):
    assert start(*ASKED, "--grid", "end=well,3") == 5
    assert [row["exit_code"] for row in rows().values()] == ["0", "3"]
    lines = (cluster / "script").read_text().splitlines()
    for option in (
        "array=0-1%1",
        "partition=long",
        "time=90",
        "mem=16GB",
        "cpus-per-task=4",
        "gpus-per-node=2",
        "account=mine",
        "exclusive",
        "signal=USR2@120",
        "job-name=sweep",
    ):
        assert f"#SBATCH --{option}" in lines
    assert "export FROM=setup" in lines


def test_slurm_jobs_are_stopped_by_a_signal(start, cluster, tmp_path, monkeypatch):
    # They save after Slurm says that they are over, for as long as this machine takes.
    monkeypatch.setattr(slurm, "LATE", fake_experiment.FOREVER)
    tell(signal.SIGINT, *(tmp_path / "sweep" / f"end=told,seed={i}" / "ready" for i in (0, 1)))
    assert start("--launcher", "slurm", "--grid", "end=told", "--seeds", "2") == 130
    assert [row["exit_code"] for row in rows().values()] == ["143"] * 2
    assert Path("sweep/end=told,seed=0.log").read_text().endswith("saved\n")


def test_slurm_jobs_outlive_the_sweep(start, cluster, tmp_path, monkeypatch):
    """A sweep that is lost while they run is started again, and waits for the same jobs."""
    ready = tmp_path / "sweep" / "end=told,seed=0" / "ready"

    def lost(_):
        if ready.exists():
            raise UserError("the connection is lost")

    argv = ("--launcher", "slurm", "--grid", "end=told,well")
    with monkeypatch.context() as patched:
        patched.setattr(launchers.time, "sleep", lost)
        assert start(*argv) == 2
    (cluster / "script").unlink()
    tell(signal.SIGINT, ready, tmp_path / "sweep" / ".slurm" / "7_1_ended.json")
    assert start(*argv) == 130
    assert not (cluster / "script").exists()  # nothing was submitted
    assert [row["exit_code"] for row in rows().values()] == ["143", "0"]
    assert [attempts(name) for name in rows()] == [1, 1]


def test_slurm_warns_of_the_time_limit(start, cluster, tmp_path):
    """The run saves, and the job is put back into the queue."""
    ready = tmp_path / "sweep" / "end=told,seed=0" / "ready"

    def warn():
        while not ready.exists():
            time.sleep(0.02)
        for pid in (cluster / "0").read_text().split():
            os.kill(int(pid), signal.SIGUSR2)
        while not (cluster / "requeued").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=warn, daemon=True).start()
    assert start("--launcher", "slurm", "--grid", "end=told", "--seeds", "2") == 143
    assert (cluster / "requeued").read_text() == "requeue 7_0\n"
    assert Path("sweep/end=told,seed=0.log").read_text().endswith("saved\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"exit_code": 3, "seconds": 1.5}', (3, 1.5)),
        ('{"exit_code": 3, "seconds": 1.5', "cannot be read (Expecting ',' delimiter"),
        ('{"exit_code": true, "seconds": 1.5}', "its exit_code is no exit code"),
        ('{"exit_code": -1, "seconds": 1.5}', "its exit_code is no exit code"),
        ('{"exit_code": 3}', "its seconds are no seconds"),
        ('{"exit_code": 3, "seconds": 1e999}', "its seconds are no seconds"),
        ('{"exit_code": 3, "seconds": -1.5}', "its seconds are no seconds"),
        ('{"exit_code": 3, "seconds": 1.5, "more": "' + "x" * 1000 + '"}', "more than 1000 bytes"),
        ("\x80\x04]", "cannot be read"),
    ],
)
def test_how_a_job_says_its_run_ended(tmp_path, content, expected):
    utils = pytest.importorskip("submitit.core.utils")
    paths = utils.JobPaths(tmp_path, job_id="7_1")
    assert slurm._read_end(paths) is None
    (tmp_path / "7_1_ended.json").write_text(content)
    ended = slurm._read_end(paths)
    if isinstance(expected, tuple):
        assert ended == Ended(*expected)
    else:
        assert ended[:2] == (None, None) and expected in ended.note
        assert "7_1_ended.json" in ended.note and "\n" not in ended.note


def test_only_ids_of_jobs_are_taken_from_a_folder(tmp_path):
    command = ["python"]
    jobs = {"7_1": "a", "12": "b", "../7": "c", "--help": "d", "7_": "e", "": "f"}
    entries = {name: {"job": job, "command": command} for job, name in jobs.items()}
    (tmp_path / "jobs.json").write_text(json.dumps({**entries, "g": {"job": "7"}, "h": 7}))
    assert list(slurm._read_jobs(tmp_path)) == ["a", "b"]


@pytest.mark.slow
def test_ray(start, tmp_path, capfd):
    """A cluster of this machine takes half a minute to start."""
    pytest.importorskip("ray")
    assert start("--launcher", "ray", "--grid", "end=well,3", "--jobs", "1") == 5
    assert [row["exit_code"] for row in rows().values()] == ["0", "3"]
    tell(signal.SIGTERM, tmp_path / "sweep" / "end=told,seed=0" / "ready")
    assert start("--launcher", "ray", "--grid", "end=told") == 143
    assert rows()["end=told,seed=0"]["exit_code"] == "143"
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_exit_codes_are_documented():
    page = (HERE.parent / "docs" / "experiments.md").read_text()
    assert "| 5 |" in page and "5 a run of a sweep" in command_line.__doc__
