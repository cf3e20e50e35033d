"""Where metrics go besides metrics.jsonl: TensorBoard, and Weights & Biases if asked for.

Both take scalars, histograms and pictures of a step. Of tensorboardX, the formats serve, and not
its writer: that one has a thread, which dies of a full disk, and whoever waits for it then hangs.
"""

import hashlib
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError


class TensorBoard:
    """Writes events to a folder, from a step on; what is there of it or later is not shown."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.proto import event_pb2  # a second and a half

        folder.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        # TensorBoard reads the files of a folder in the order of their names.
        stamp = f"{time.time():.6f}.{os.uname().nodename}.{os.getpid()}"
        self._file = (folder / f"events.out.tfevents.{stamp}").open("ab")
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(0, file_version="brain.Event:2")
        self._write(step, session_log=log)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes values by their names."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=summary.scalar(f"{kind}/{name}", value))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes how an array's values are distributed."""
        from tensorboardX import summary

        self._write(step, summary=summary.histogram(name, values.ravel(), bins="auto"))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture."""
        from tensorboardX.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=png, colorspace=3)
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Brings everything to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        def checked(part: bytes) -> bytes:
            return part + struct.pack("<I", masked_crc32c(part))

        data = self._event(step=step, wall_time=time.time(), **content).SerializeToString()
        self._file.write(checked(struct.pack("<Q", len(data))) + checked(data))


class Wandb:
    """Records to a project of Weights & Biases; a run that resumes goes on there."""

    def __init__(self, project: str, workdir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "--wandb needs its package: pip install -e '.[wandb]', or leave --wandb out"
            ) from None
        self._wandb = wandb
        # The same folder is the same run, whichever process goes on with it.
        name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, id=name, name=workdir.name, dir=str(workdir), resume="allow"
        )

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records values by their names."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Records how an array's values are distributed."""
        self._run.log({name: self._wandb.Histogram(values.ravel())}, step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Records a picture."""
        import io

        from PIL import Image

        self._run.log({name: self._wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def flush(self) -> None:
        """Nothing: it is recorded by another process."""

    def close(self) -> None:
        """Ends the recording."""
        self._run.finish()
