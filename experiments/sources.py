"""Where an evaluation finds its cells when none are named."""

from pathlib import Path

from darts_jax.files import read_json


def saved_genotype(workdir: Path) -> str | None:
    """The genotype that the run in a folder was given, if there is one."""
    try:
        return read_json(workdir / "config.json")["genotype"]
    except (OSError, ValueError, KeyError, TypeError):  # `workdir.check` tells what is wrong
        return None


def newest_search(experiment: str) -> str | None:
    """The file of cells that an experiment wrote last, in the folders it has by default."""
    files = Path("runs").glob(f"{experiment}-*/genotype.json")
    found = sorted(files, key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None
