"""A config such as an experiment's."""

from dataclasses import dataclass, field
from pathlib import Path


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
    workdir: Path | None = None
    """Where to."""
