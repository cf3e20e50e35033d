"""What every experiment shares at the shell: presets, one-line errors, exit codes, the cache.

Exit codes: 0 done; 2 bad input; 3 a metric or a weight is not finite; 4 another process of the run
is lost; 5 a run of a sweep has failed; 130 (SIGINT, Ctrl-C) and 143 (SIGTERM) stopped, to be
resumed.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from darts_jax.data import quiet_absl
from darts_jax.genotype import nearest
from experiments import distributed
from experiments.errors import Finished, Interrupted, NonFinite, RunsFailed, UserError

Config = TypeVar("Config")

COMPILER = "compiler"  # name of the thread that compiles


def guard(module: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Runs `main(argv)`, and returns the exit code; what went wrong is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    resume = command(module, argv)
    try:
        with quiet_absl():
            main(argv)
    except Finished:
        return 0
    except UserError as error:
        return distributed.leave(_fail(error, 2))
    except NonFinite as error:
        return _fail(error, 3)
    except RunsFailed as error:
        return _fail(f"{error}; to try them again: {resume}", 5)
    except Interrupted as error:
        code = _fail(f"{error}; to go on: {resume}", 128 + error.signum)
        if any(thread.name == COMPILER for thread in threading.enumerate()):
            # The compiler cannot be asked to stop, and is not waited for.
            sys.stdout.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        code = _fail(f"stopped at once; to go on: {resume}", 128 + signal.SIGINT)
        return distributed.leave(code)
    except Exception as error:
        if not distributed.started():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = str(error).splitlines()[0]
            return distributed.leave(_fail(distributed.lost(reason), distributed.LOST))
        traceback.print_exc()
        return distributed.leave(1)
    return 0


def command(module: str, argv: Sequence[str]) -> str:
    """The command line of a module, as a shell reads it."""
    return shlex.join(["python", "-m", module, *argv])


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside, a ValueError is the user's: it becomes a UserError of one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def check_at_least(*rows: tuple[str, float, float]) -> None:
    """Raises a ValueError for the first (flag, value, least) whose value is less, or no number."""
    for name, value, least in rows:
        if not value >= least:
            raise ValueError(f"--{name} is {value}; give at least {least}")


def check_below_one(*rows: tuple[str, float]) -> None:
    """Raises a ValueError for the first (flag, value) that is 1 or more."""
    for name, value in rows:
        if not value < 1:
            raise ValueError(f"--{name} is {value}; give less than 1")


def check_seed(seed: int, count: int = 1) -> None:
    """Raises a ValueError if one of `count` seeds from this one on is not in [0, 2**32)."""
    check_at_least(("seed", seed, 0))
    if seed + count > 2**32:
        raise ValueError(f"--seed is {seed}; give less than 2**32, all seeds included")


def check_positive(*rows: tuple[str, float]) -> None:
    """Raises a ValueError for the first (flag, value) that is not positive and finite."""
    for name, value in rows:
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; give more than 0, and no infinity")


def parse(
    presets: Mapping[str, tuple[str, Config]], argv: Sequence[str], module: str, description: str
) -> tuple[str, Config]:
    """Reads `[preset] [--field value ...]`: the preset's name, and its config with the fields set.

    Args:
      presets: name -> (description, config), a frozen dataclass; the first is the default.
      argv: the arguments.
      module: the experiment's, as "experiments.search_cnn".
      description: for `--help`.

    Raises:
      UserError: if the preset is unknown, naming the nearest.
      SystemExit: by tyro, for `--help` or a field that it cannot read.
    """
    preset, *rest = argv if argv and not argv[0].startswith("-") else (next(iter(presets)), *argv)
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}; use one of: {nearest(preset, presets)}")
    listing = "\n".join(f"  {name}: {text}" for name, (text, _) in presets.items())
    config = tyro.cli(
        type(presets[preset][1]),
        default=presets[preset][1],
        args=rest,
        prog=f"python -m {module} [preset]",
        description=f"{description}\n\nPresets, the first one if none is given:\n{listing}\n\n"
        f"Defaults below are those of {preset}.",
    )
    return preset, config


def flags(config: Any, default: Any, prefix: str = "") -> list[str]:
    """The arguments that make a config, a dataclass, out of another of its class.

    Fields that are None in the config cannot be told, and those that are no leaf of a command line
    are left out.
    """
    found: list[str] = []
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(default, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            # The fields of `RunConfig` have no prefix.
            found += flags(value, before, prefix if name == "run" else f"{prefix}{name}.")
        elif value == before or value is None:
            continue
        elif isinstance(value, bool):
            found.append(f"--{prefix}{name}" if value else f"--{prefix}no-{name}")
        elif isinstance(value, int | float | str | Path):
            found += [f"--{prefix}{name}", str(value)]
    return found


def data_flags(config: Any, default: Any) -> list[str]:
    """The arguments by which another experiment reads the same data: its name, path and limit."""
    own = {name: getattr(config, name) for name in ("name", "path", "limit")}
    return flags(dataclasses.replace(default, **own), default, "data.")


def next_command(module: str, argv: Sequence[str], seed: int) -> str:
    """The command line of a module with another seed, and without the folders of this one."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument in ("--seed", "--workdir", "--fork"):
            next(rest)  # its value
        elif not argument.startswith(("--seed=", "--workdir=", "--fork=")):
            kept.append(argument)
    return command(module, [*kept, "--seed", str(seed)])


def enable_compilation_cache() -> None:
    """Keeps every compiled program for the next run, in JAX_COMPILATION_CACHE_DIR if that is set.

    Else in the user's cache folder; where that cannot be written, nothing is kept.
    """
    # The threshold is 1 s; the small programs of an initialisation add up to more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "darts_jax"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
