"""Why a fit or a solve ended."""

import enum


class StopReason(enum.Enum):
    """Why a fit or a solve ended. Prints as a sentence."""

    STEPS_TAKEN = "All steps were taken."
    ALL_SKIPPED = (
        "No step was accepted: every one had a value that is not finite "
        "(`trainer.nan_report()` says which)."
    )
    TAKEN_BEFORE = "All steps had been taken before: the checkpoint has the result."
    NON_FINITE = (
        "Ended at a value that is not finite: `trainer.nan_report()` says where."
    )
    POLICY = "The NaN policy ended the fit."
    DATA_EXHAUSTED = "The stream ran dry."
    CALLBACK = "The callback ended the fit."
    INTERRUPTED = "The fit was interrupted from the keyboard."
    TERMINATED = "The process was told to end (SIGTERM); the checkpoint has its state."
    ERROR = "An error ended the fit."
    CRITERION = "The criterion of `stop` was met."
    NO_PATIENCE = "The validation has not improved, and `stop` has no more patience."
    CONVERGED = "Converged."
    STALLED = "Stopped short of a minimum."
    NO_MINIMUM = "There is no minimum this way: the loss only approaches a limit."
    MAX_STEPS = "The solver took `max_steps` steps and has not converged."
    DIVERGED = "The solver diverged."
    FAILED = "The solver gave up: one of its steps had no solution."

    @property
    def is_failure(self) -> bool:
        """Whether the parameters are not an answer: the fit broke off, or stopped short
        of a minimum, or there is none."""
        return self in _FAILURES

    @property
    def in_short(self) -> str:
        """A few words, such as "max steps", for a table."""
        return self.name.lower().replace("_", " ")

    def __str__(self) -> str:
        """The sentence."""
        return self.value


AT_NON_FINITE = (StopReason.NON_FINITE, StopReason.ALL_SKIPPED)
"""The reasons of a fit that non-finite values have ended, or left without a step."""

_FAILURES = frozenset(
    {
        *AT_NON_FINITE,
        StopReason.POLICY,
        StopReason.ERROR,
        StopReason.STALLED,
        StopReason.NO_MINIMUM,
        StopReason.MAX_STEPS,
        StopReason.DIVERGED,
        StopReason.FAILED,
    }
)
