"""How a run goes, which every experiment lets its user choose, and what that asks of JAX."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from darts_jax import checkpoint
from experiments import command_line, distributed
from experiments.command_line import check_at_least, check_positive
from experiments.distributed import Distributed

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"


@dataclass(frozen=True)
class DeviceConfig:
    """What every experiment may ask of its device."""

    deterministic: bool = field(default=False, kw_only=True)
    """Let a GPU give the same bits each time, which costs speed; a CPU always does."""


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """How a run goes. On the same workdir, all of it may change from one time to the next."""

    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    save_minutes: float = 5.0
    """Minutes from one checkpoint to the next; each epoch ends with one in any case."""
    keep: int = checkpoint.KEEP
    """Checkpoints to keep: so many of the newest, and the one of the smallest evaluation loss."""
    on_nan: Literal["halt", "skip"] = "halt"
    """When a loss, gradient or alpha is not finite: stop, or leave out what that step would change,
    ten times in a row at most."""
    fork: Path | None = None
    """Folder for a copy of the run in --workdir, to go on in with other fields; of a search or a
    training alone."""
    profile: int = 0
    """Steps to trace, from the second on, for TensorBoard or Perfetto; they go to profile/."""
    wandb: str | None = None
    """Project of Weights & Biases to record to as well; its package is an extra."""
    distributed: Distributed = field(default_factory=Distributed)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether steps leave out what is not finite."""
        return self.on_nan == "skip"


def check_run(config: RunConfig) -> None:
    """Raises a ValueError for a field out of range."""
    check_at_least(
        ("log-every", config.log_every, 1), ("keep", config.keep, 1), ("profile", config.profile, 0)
    )
    check_positive(("save-minutes", config.save_minutes))


def require_alone(config: RunConfig) -> None:
    """Raises a ValueError if it asks for what a single search or training alone can do.

    The runs inside an experiment of several would refuse the fields of a fork, one by one.
    """
    distributed.require_single(config.distributed)
    if config.fork is not None:
        raise ValueError(
            "--fork is for searches and trainings alone; start this experiment anew, in another"
            " --workdir"
        )


def prepare(config: RunConfig) -> None:
    """Sets up JAX, its processes included. Call it before any other use of it.

    Raises:
      ValueError: if the processes of the run are not found.
    """
    prepare_device(config)
    distributed.initialize(config.distributed)


def prepare_device(config: DeviceConfig) -> None:
    """Sets up JAX for one process: determinism, and the cache. Call it before any other use."""
    if config.deterministic:
        # Read once, when the device is first used.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    command_line.enable_compilation_cache()
