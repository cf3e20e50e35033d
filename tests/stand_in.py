"""A config such as an experiment's."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from experiments.run_config import RunConfig


@dataclass(frozen=True)
class Inner:
    """Nested."""

    rate: float = 0.1
    """Rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Betas."""


@dataclass(frozen=True)
class Config:
    """Stand-in."""

    inner: Inner = field(default_factory=Inner)
    epochs: int = 2
    """Epochs to run."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(log_every=1)
    )
    workdir: Path | None = None
    """Where to."""
