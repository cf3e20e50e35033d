"""What ends an experiment in one line; `experiments.command_line` has the exit codes."""

import signal


class NonFinite(Exception):
    """A metric or a weight is not finite."""


class UserError(Exception):
    """Bad input, in one line that names the culprit and the remedy."""


class RunsFailed(Exception):
    """Runs of a sweep have failed."""


class Finished(Exception):
    """A run is over for a process that writes nothing."""


class Interrupted(Exception):
    """A signal asked to stop, and everything is saved, up to a step if one is given."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
        self.signum = signum
