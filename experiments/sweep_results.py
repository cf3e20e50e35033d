"""What came of the runs of a sweep: results.csv, which is also how a sweep knows what is done."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from darts_jax.files import write_text
from experiments.errors import UserError
from experiments.metrics import METRICS
from experiments.tasks import Ended
from experiments.workdir import writing

RESULTS = "results.csv"  # file of a sweep's folder
NAME, CODE, SECONDS, ERROR, COMMAND = "run", "exit_code", "wall_seconds", "error", "command"
OWN = (CODE, SECONDS, ERROR, COMMAND)
STATES = {"": "not run", "0": "done", "130": "stopped", "143": "stopped"}  # by exit code
TAIL = 10_000  # bytes of a log in which its last line is looked for

Row = dict[str, str]


def read(workdir: Path) -> dict[str, Row]:
    """The rows of results.csv, by run; none if there is no file.

    Raises:
      UserError: if it is something else.
    """
    path = workdir / RESULTS
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval="", strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away") from error
    if any({NAME, *OWN} - row.keys() or None in row for row in rows):
        raise UserError(f"{path} has not the columns of a sweep; move it away")
    return {row[NAME]: row for row in rows}


def write(workdir: Path, rows: Mapping[str, Row], fields: Sequence[str]) -> None:
    """Writes results.csv in one go: a row a run; `fields` come first after the run's name."""
    named = dict.fromkeys((NAME, *fields, *OWN))
    columns = [*named, *sorted({name for row in rows.values() for name in row} - {*named})]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    with writing(workdir):
        write_text(workdir / RESULTS, text.getvalue())


def row(name: str, fields: Mapping[str, str], command: str) -> Row:
    """Of a run that has not ended yet."""
    return {NAME: name, **fields, CODE: "", SECONDS: "", ERROR: "", COMMAND: command}


def ended(before: Row, end: Ended, folder: Path, log: Path) -> Row:
    """The row of a run that has ended, its last metrics included.

    An exit code that nobody knows is -1.
    """
    code = "-1" if end.code is None else str(end.code)
    seconds = "" if end.seconds is None else f"{end.seconds:.1f}"
    error = "" if STATES.get(code) else end.note or last_line(log)
    return {**before, CODE: code, SECONDS: seconds, ERROR: error, **final_metrics(folder)}


def last_line(log: Path) -> str:
    """The last line of a file that is not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"no log ({error.strerror})"
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def final_metrics(folder: Path) -> Row:
    """The numbers in the last line of kind "epoch" of each metrics.jsonl in a folder.

    Those of a folder in it have its path before them.
    """
    found: Row = {}
    for path in sorted(folder.rglob(METRICS)):
        place = path.parent.relative_to(folder).as_posix()
        prefix = "" if place == "." else f"{place}/"
        for name, value in _last_epoch(path).items():
            if type(value) in (int, float) and math.isfinite(value):
                found[prefix + name] = repr(value)
    return found


def _last_epoch(path: Path) -> dict[str, object]:
    lines = []
    with suppress(OSError):
        lines = path.read_bytes().splitlines()
    for line in reversed(lines):
        with suppress(ValueError):  # a killed run may have begun a line
            parsed = json.loads(line)
            if isinstance(parsed, dict) and parsed.get("kind") == "epoch":
                return parsed
    return {}


def state(row: Row) -> str:
    """What a person calls it."""
    return STATES.get(row[CODE], "failed")


def table(rows: Sequence[Row]) -> Table:
    """The table that a sweep ends with."""
    found = Table(title="Runs", title_justify="left")
    for name in ("run", "state", "exit code", "seconds", "last line of its log"):
        found.add_column(name, overflow="fold", no_wrap=name in ("state", "seconds"))
    for each in rows:
        cells = (each[NAME], state(each), each[CODE], each[SECONDS], each[ERROR])
        found.add_row(*map(escape, cells))
    return found
