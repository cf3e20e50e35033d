"""Where metrics go besides metrics.jsonl: TensorBoard, and Weights & Biases if asked for.

Both take scalars, histograms and pictures of a step. TensorBoard's are written at once, not by the
thread that tensorboardX has for it: that one dies of a full disk, and whoever waits for it hangs.
"""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError


class TensorBoard:
    """Writes events to a folder, from a step on; what is there of it or later is not shown."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # a second and a half
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        # Named after the second otherwise, in which a run can end and begin again.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(session_log=log, step=step, wall_time=time.time()))

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes values by their names."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary.scalar(f"{kind}/{name}", value))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes how an array's values are distributed."""
        from tensorboardX import summary

        self._write(step, summary.histogram(name, values.ravel(), bins="auto"))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture."""
        from tensorboardX.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=png, colorspace=3)
        self._write(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Brings everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(summary=summary, step=step, wall_time=time.time()))


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
