import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from stand_in import Config, Inner

from experiments import workdir as workdirs
from experiments.errors import UserError
from experiments.run_config import DeviceConfig, RunConfig


@dataclass(frozen=True)
class Part:
    epochs: int = 2
    path: str | None = None


@dataclass(frozen=True)
class Nested:
    data: Part = field(default_factory=Part)
    search: Part = field(default_factory=Part)
    run: DeviceConfig = field(default_factory=RunConfig)
    workdir: Path | None = None


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder, config, facts=None):
    workdirs.write_config(config, folder, facts)


def test_another_config(tmp_path):
    write(tmp_path / "run", Config())
    (tmp_path / "run" / "checkpoints").mkdir()
    workdirs.check(tmp_path / "run", Config(workdir=tmp_path, run=RunConfig(7, 1.0, 5, "skip")))
    before = contents(tmp_path)
    for refuse in (workdirs.check, lambda folder, config: write(folder, config)):
        with pytest.raises(UserError) as error:
            refuse(tmp_path / "run", Config(Inner(betas=(0.5, 0.9)), epochs=3))
        message = str(error.value)
        assert "epochs is 2 there, 3 here" in message
        assert "inner.betas is [0.9, 0.99] there, [0.5, 0.9] here" in message
        assert "rate" not in message
        assert "another --workdir, or --fork NEWDIR" in message
    assert before == contents(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Nested(search=Part(epochs=3)), None),
        (Nested(search=Part(epochs=1)), "search.epochs is 2 there, 1 here"),
        (Nested(data=Part(path="/elsewhere")), None),
        (Nested(data=Part(epochs=3)), "data.epochs is 2 there, 3 here"),
        (Nested(search=Part(path="/elsewhere")), "search.path is None there"),
    ],
)
def test_what_may_change(tmp_path, config, reason):
    write(tmp_path, Nested())
    if reason is None:
        workdirs.check(tmp_path, config)
        write(tmp_path, config)
        workdirs.check(tmp_path, config)
        return
    with pytest.raises(UserError, match=reason):
        workdirs.check(tmp_path, config)


def test_without_checkpoints_nothing_may_grow(tmp_path):
    """And no --fork is advised, where there is none."""
    first, grown = (Nested(search=Part(epochs=n), run=DeviceConfig()) for n in (2, 3))
    write(tmp_path, first)
    with pytest.raises(UserError, match="search.epochs is 2 there, 3 here.*or another --workdir$"):
        workdirs.check(tmp_path, grown)


def test_no_run(tmp_path):
    workdirs.check(tmp_path / "missing", Config())
    workdirs.check(tmp_path, Config())
    assert not (tmp_path / "missing").exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds files but no run .*another --workdir"):
        workdirs.check(tmp_path, Config())
    with pytest.raises(UserError, match="give another --workdir"):
        workdirs.check(tmp_path / "thesis.tex", Config())


@pytest.mark.parametrize("content", ["", "[]", "null", '{"epochs"', "[" * 100_000])
def test_a_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json cannot be read"):
        workdirs.check(tmp_path, Config())


def test_facts_are_kept_and_compared(tmp_path):
    write(tmp_path, Config(), {"data": "abc"})
    write(tmp_path, Config())
    assert json.loads((tmp_path / "config.json").read_text())["facts"]["data"] == "abc"
    write(tmp_path, Config(), {"data": "abc", "more": "1"})
    with pytest.raises(UserError, match="data is abd here, but abc where the run"):
        write(tmp_path, Config(), {"data": "abd"})


HOLD = """
import sys
from pathlib import Path
from experiments import workdir
with workdir.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    """As long as it lives: a lock that a killed process leaves behind is none."""
    root = Path(__file__).parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        before = contents(tmp_path)
        message = f"{tmp_path} is in use by process {holder.pid} on .*wait for it"
        with pytest.raises(UserError, match=message):
            with workdirs.opened(tmp_path, Config()):
                pass
        assert before == contents(tmp_path)
        holder.kill()
    with workdirs.opened(tmp_path, Config()) as folder:
        assert folder == tmp_path
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
        workdirs.check(tmp_path, Config())  # the lock is no content
    assert not list(tmp_path.iterdir())


def test_where_locks_are_not_known_a_warning_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(workdirs.fcntl, "flock", refuse)
    with workdirs.opened(tmp_path / "run", Config()) as folder:
        (folder / "cells.json").touch()
    (line,) = capsys.readouterr().err.splitlines()
    expected = f"warning: {tmp_path}/run cannot be locked (Operation not supported); see to it that"
    assert line.startswith(expected)
    assert list(folder.iterdir()) == [folder / "cells.json"]


def test_a_folder_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="bad input"):
        with workdirs.opened(tmp_path / "runs" / "a", Config()):
            raise ValueError("bad input")
    assert not list(tmp_path.iterdir())
    with workdirs.opened(tmp_path / "runs" / "a", Config()) as folder:
        (folder / "cells.json").touch()
    assert contents(tmp_path) == {tmp_path / "runs" / "a" / "cells.json": b""}


def make_run(folder):
    write(folder, Config(), {"data": "abc"})
    (folder / "metrics.jsonl").write_text("a line")
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "checkpoints" / "5" / "array").write_text("numbers")


def test_a_fork_goes_on_in_a_copy(tmp_path):
    source, target = tmp_path / "run", tmp_path / "fork"
    make_run(source)
    before = contents(source)
    changed = Config(epochs=9)
    with workdirs.opened(source, changed, fork=target) as folder:
        assert folder == target
        assert json.loads((target / "config.json").read_text())["epochs"] == 9
        assert (target / "checkpoints" / "5" / "array").read_text() == "numbers"
        (target / "metrics.jsonl").write_text("another line")
    assert {path: text for path, text in contents(source).items() if path.name != ".lock"} == before
    with workdirs.opened(source, changed, fork=target):  # the same command goes on there
        assert (target / "metrics.jsonl").read_text() == "another line"
    with pytest.raises(UserError, match="epochs is 9 there, 8 here"):
        with workdirs.opened(source, Config(epochs=8), fork=target):
            pass


def test_a_fork_of_nothing_or_onto_something(tmp_path):
    with pytest.raises(UserError, match="holds no run to fork"):
        with workdirs.opened(tmp_path / "missing", Config(), fork=tmp_path / "fork"):
            pass
    assert not (tmp_path / "fork").exists()
    make_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match="full holds files but no run; give another --fork"):
        with workdirs.opened(tmp_path / "run", Config(), fork=tmp_path / "full"):
            pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read .*give another --workdir"):
        with workdirs.opened(tmp_path / "file" / "run", Config()):
            pass


READ_ONLY = """
mount -t tmpfs tmpfs "$0" && mkdir "$0/run" && mount -o remount,ro "$0" || exit 77
exec "$1" -c '
import sys
from pathlib import Path
from stand_in import Config
from experiments import workdir as workdirs
from experiments.errors import UserError
for name in ("new", "run"):
    try:
        with workdirs.opened(Path(sys.argv[1]) / name, Config()):
            sys.exit(1)
    except UserError as error:
        print(error)
' "$0"
"""


def test_a_read_only_file_system(tmp_path):
    """In a mount of its own, where the system lets a user make one."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY]
    try:
        done = subprocess.run(
            [*command, tmp_path, sys.executable],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for name, line in zip(("new", "run"), lines, strict=True):
        assert line.startswith(f"cannot write to {tmp_path / name} (")
        assert "Read-only file system" in line


def test_of_many_fields_that_differ_some_are_shown(tmp_path):
    write(tmp_path, Config())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {f"x{i}": i for i in range(8)}))
    with pytest.raises(UserError, match="x4 is 4 there, missing here; and 3 more. Give the fields"):
        workdirs.check(tmp_path, Config())


def test_a_config_of_another_version_says_so(tmp_path):
    """A field that has come since cannot be given: the version explains it."""
    write(tmp_path, Config())
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["epochs"]
    saved["facts"]["version"] = "0.0.9"
    path.write_text(json.dumps(saved))
    before = path.read_bytes()
    with pytest.raises(UserError, match="another config, of version 0.0.9 of darts_jax: epochs is"):
        workdirs.check(tmp_path, Config())
    assert path.read_bytes() == before
