import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import Config, Inner

from experiments import command_line
from experiments.errors import NonFinite

PRESETS = {"small": ("quick", Config()), "large": ("slow", Config(epochs=50))}


def parse(*argv):
    return command_line.parse(PRESETS, argv, "experiments.stand_in", "A stand-in.")


def test_presets_and_overrides():
    assert parse() == ("small", Config())
    assert parse("large") == ("large", Config(epochs=50))
    assert parse("--epochs", "7") == ("small", Config(epochs=7))
    name, config = parse("large", "--inner.rate", "0.5", "--workdir", "a/b")
    assert (name, config) == ("large", Config(Inner(rate=0.5), 50, workdir=Path("a/b")))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(command_line.UserError, match="^unknown preset 'smal'; use one of: small$"):
        parse("smal")


def test_help_lists_presets_and_explains_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for text in ("A stand-in.", "small: quick", "large: slow", "--inner.rate", "Epochs to run."):
        assert text in output


def raising(error):
    def main(_):
        raise error

    return main


TO_GO_ON = "to go on: python -m experiments.x a --b 'c d'"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (command_line.UserError("give less"), 2, "give less"),
        (NonFinite("step 3: nan"), 3, "step 3: nan"),
        (
            command_line.Interrupted(signal.SIGINT, 7),
            130,
            f"stopped by SIGINT after step 7; {TO_GO_ON}",
        ),
        (
            command_line.Interrupted(signal.SIGTERM, 7),
            143,
            f"stopped by SIGTERM after step 7; {TO_GO_ON}",
        ),
        (KeyboardInterrupt(), 130, f"stopped at once; {TO_GO_ON}"),
    ],
)
def test_exit_codes(capsys, error, code, text):
    assert command_line.guard("experiments.x", raising(error), ["a", "--b", "c d"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {text}\n")


def test_success_and_defects_are_not_disguised():
    assert command_line.guard("experiments.x", lambda argv: None, []) == 0
    with pytest.raises(ValueError, match="a defect"):
        command_line.guard("experiments.x", raising(ValueError("a defect")), [])


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([], "--seed 3"),
        (["small", "--epochs", "3", "--seed", "2"], "small --epochs 3 --seed 3"),
        (["--workdir", "runs/a b", "--inner.rate=0.5"], "--inner.rate=0.5 --seed 3"),
        (["--seed=2", "--workdir=a", "--epochs", "4"], "--epochs 4 --seed 3"),
        (["--data", "a b", "--seeds", "4"], "--data 'a b' --seeds 4 --seed 3"),
    ],
)
def test_the_next_command_is_this_one_with_another_seed(argv, command):
    expected = f"python -m experiments.x {command}"
    assert command_line.next_command("experiments.x", argv, seed=3) == expected


CACHE = """
import jax
from experiments import command_line
command_line.enable_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""


def cache_directory(**environment):
    command = [sys.executable, "-c", CACHE]
    root = Path(__file__).parent.parent
    output = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert not output.stderr
    return output.stdout.strip()


def test_compilation_cache(tmp_path):
    given = str(tmp_path / "given")
    assert cache_directory(HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=given) == given
    assert cache_directory(HOME=str(tmp_path)) == str(tmp_path / ".cache" / "darts_jax")
    assert cache_directory(XDG_CACHE_HOME=given) == str(tmp_path / "given" / "darts_jax")
    (tmp_path / "file").touch()  # where no folder can be made
    assert cache_directory(HOME=str(tmp_path / "file")) == "None"
