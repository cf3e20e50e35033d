"""Writing files whole or not at all."""

import os
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file in one go: who reads it sees the old content or the new one.

    Raises:
      OSError: if it cannot be written; what was there before is kept.
    """
    path = Path(path)
    # A rename is atomic, a write is not. The temporary file lies beside the file because a rename
    # cannot cross file systems.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
