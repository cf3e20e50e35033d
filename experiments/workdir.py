"""The folder of a run: who may write to it, and which config it belongs to.

A folder is one run's: config.json tells which. Another config is refused, but for the fields that
may change (`ALWAYS`, `GROWING`, and all of "run"), or goes on elsewhere, in a copy.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from darts_jax import __version__
from darts_jax.files import read_json, write_text
from experiments import distributed
from experiments.errors import UserError
from experiments.run_config import RunConfig

CONFIG = "config.json"  # files of a workdir
LOCK = ".lock"
CHECKPOINTS = "checkpoints"  # a folder of it, of a search or a training
APART = ("workdir", "run")  # fields that are no part of what is computed
SOURCES = ("data.path", "stream.workers")  # fields that say where from, not what
# Fields that may change; each of the methods, of `experiments.regret`, has a file of its own.
ALWAYS = (*SOURCES, "seeds_at_once", "methods")
GROWING = ("search.epochs", "train.epochs")  # fields that may grow where checkpoints go on
MISSING = "missing"
MAX_SHOWN, MAX_CHARACTERS = 5, 100  # of fields that differ, and of each value


@contextmanager
def opened(workdir: Path, config: Any, fork: Path | None = None) -> Iterator[Path]:
    """The folder of a run, for this process alone until the end; in others of a run, just its name.

    Args:
      workdir: the folder, which need not exist.
      config: of the run, a dataclass.
      fork: another folder, to go on in from a copy.

    Raises:
      UserError: if another process has it, it is another run's, or it cannot be written. Nothing in
        it is changed then.
    """
    if not distributed.is_first():
        yield fork or workdir
        return
    if fork is not None:
        _fork(workdir, fork, config)
        workdir = fork
    check(workdir, config)
    with locked(workdir):
        yield workdir


def check(workdir: Path, config: Any) -> None:
    """Raises a UserError if the folder holds another run, or something else. Writes nothing."""
    saved = _read_config(workdir)
    if saved is None:
        return
    goes_on = isinstance(getattr(config, "run", None), RunConfig)  # from checkpoints, as it can
    differing = _differing(saved, flatten(_fields(config)), GROWING if goes_on else ())
    if differing:
        version = saved.get("facts", {}).get("version", __version__)
        other = "" if version == __version__ else f", of version {_show(version)} of darts_jax"
        remedy = " or another --workdir"
        if (workdir / CHECKPOINTS).is_dir():  # of a search or a training
            remedy = " another --workdir, or --fork NEWDIR to go on from there with these"
        raise UserError(
            f"{workdir} holds a run with another config{other}: {'; '.join(differing)}. Give the"
            f" fields of that run,{remedy}{f'; this is version {__version__}' if other else ''}"
        )


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Inside, no other process can lock the folder, which is made if need be.

    The lock ends with the process, however that ends. A folder that was made, and into which
    nothing has been written, is removed at the end.

    Raises:
      UserError: if another process has the lock.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = _lock(workdir)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or not be empty
            (workdir / LOCK).unlink()
            file.close()
            for folder in made:
                folder.rmdir()


def _lock(workdir: Path) -> TextIO:
    """The open lock file, which this process holds; with a warning where locks are not known."""
    while True:
        file = (workdir / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{workdir} is in use by {holder}; wait for it to end, or give another --workdir"
            ) from None
        except OSError as error:
            print(
                f"warning: {workdir} cannot be locked ({error.strerror}); see to it that no other"
                " process uses it",
                file=sys.stderr,
                flush=True,
            )
            return file
        # Who had the lock may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (workdir / LOCK).stat()):
                return file
        file.close()


@contextmanager
def writing(workdir: Path, kind: type[OSError] = OSError) -> Iterator[None]:
    """Inside, an OSError, or the one given, is a UserError that names the workdir."""
    try:
        yield
    except kind as error:
        raise UserError(
            f"cannot write to {workdir} ({error}); make room there or allow it, or give"
            " another --workdir. What was saved before is kept"
        ) from error


def write_config(config: Any, workdir: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes config.json, which `check` reads; makes the folder if need be.

    Only in the first process of a run.

    Args:
      config: a dataclass.
      workdir: the folder.
      facts: what else makes a run what it is, such as the hash of its data: name -> JSON value.

    Raises:
      UserError: if the folder is another run's, or the facts are not those it began with.
    """
    if not distributed.is_first():
        return
    check(workdir, config)
    known = (_read_config(workdir) or {}).get("facts") or {}
    for name, value in (facts or {}).items():
        if known.get(name, value) != value:
            raise UserError(
                f"{name} is {value} here, but {_show(known[name])} where the run in {workdir}"
                " began; give it back what it had, or start anew in another --workdir"
            )
    _write(workdir, config, {**known, **(facts or {})})


def _write(workdir: Path, config: Any, facts: Mapping[str, Any]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    content = {**_fields(config), "facts": {**facts, "version": __version__}}
    write_text(workdir / CONFIG, json.dumps(content, indent=2) + "\n")


def _read_config(workdir: Path) -> dict[str, Any] | None:
    """What config.json holds; None if there is no run in the folder.

    Raises:
      UserError: if there is something else in it, or the file cannot be read.
    """
    try:
        saved = read_json(workdir / CONFIG)
        if not isinstance(saved.get("facts", {}), dict):
            raise ValueError("its facts are not an object")
        return saved
    except FileNotFoundError:
        if workdir.exists() and any(path.name != LOCK for path in workdir.iterdir()):
            raise UserError(
                f"{workdir} holds files but no run (no {CONFIG}); give another --workdir"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir}/{CONFIG} cannot be read ({error}); give another --workdir"
        ) from error


def _differing(
    saved: Mapping[str, Any], current: Mapping[str, Any], growing: Sequence[str]
) -> list[str]:
    """What keeps a run from going on with other fields, a text for each."""
    saved = flatten({name: value for name, value in saved.items() if name != "facts"})
    texts = []
    for name in sorted(saved.keys() | current.keys()):
        there, here = saved.get(name, MISSING), current.get(name, MISSING)
        if there == here or name in ALWAYS:
            continue
        if name in growing and type(there) is type(here) is int and here > there:
            continue
        texts.append(f"{_show(name)} is {_show(there)} there, {_show(here)} here")
    if len(texts) > MAX_SHOWN:
        texts[MAX_SHOWN:] = [f"and {len(texts) - MAX_SHOWN} more"]
    return texts


def _show(value: Any) -> str:
    """A value of a file as part of one line, whatever it is."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return " ".join(text.split())[:MAX_CHARACTERS]


def _fork(source: Path, target: Path, config: Any) -> None:
    """Copies the run of a folder to another, which becomes that of the config.

    Does nothing if it is that already: the same command goes on.
    """
    if (target / CONFIG).exists():
        return
    if _read_config(source) is None:
        raise UserError(f"{source} holds no run to fork; give --workdir the folder of one")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} holds files but no run; give another --fork")
    with locked(source), writing(target):
        copy = target.with_name(target.name + ".copying")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(LOCK))
        _write(copy, config, {})
        if target.exists():
            target.rmdir()
        copy.rename(target)


def computed(config: Any) -> dict[str, Any]:
    """The fields that decide what is computed, flat, and in which program."""
    return {name: v for name, v in flatten(_fields(config)).items() if name not in SOURCES}


def _fields(config: Any) -> dict[str, Any]:
    """The config as JSON holds it, without what is no part of what is computed."""
    fields = dataclasses.asdict(config)
    for name in APART:
        fields.pop(name, None)
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
