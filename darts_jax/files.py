"""Files: written whole or not at all, and read as what they should hold."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 30


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one go: who reads it sees the old content or the new one.

    Raises:
      OSError: if it cannot be written; what was there before is kept.
    """
    path = Path(path)
    # A rename is atomic, a write is not. The temporary file lies beside the file because a rename
    # cannot cross file systems.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, compressed (.npz), as `write_bytes` does."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **{name: np.asarray(value) for name, value in arrays.items()})
    write_bytes(path, content.getvalue())


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      path: of the file.
      limit: bytes that it may have.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is larger, cannot be read, is not JSON in UTF-8, holds a number that JSON
        does not have (NaN, Infinity), is nested too deeply, or is no object; one line, without the
        path.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        with Path(path).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"more than {limit} bytes")
        found = json.loads(content.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(found, dict):
        raise ValueError("not an object")
    level: list[Any] = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise ValueError("nested too deeply")
    return found
