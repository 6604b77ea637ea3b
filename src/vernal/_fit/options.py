"""The options of a fit."""

from collections.abc import Callable
from typing import Any, TypedDict

import equinox as eqx

from .._boundary import boolean, takes, whole_number
from .._policy import StopCriterion
from .._step import MOST_STEPS
from .._storage import Checkpoints, History
from .._tree import Selector

Callback = Callable[[Any, History], Any]


class FitKeywords(TypedDict, total=False):
    """The keyword arguments of `Trainer.fit`, without those for devices."""

    record: Selector
    every: int
    validation: tuple[Any, int] | None
    stop: StopCriterion | None
    progress: bool
    callback: Callback | None
    chunk: int | None
    checkpoint: Checkpoints | None


OPTIONS = tuple(FitKeywords.__annotations__)
"""The names of the keyword arguments."""


class FitOptions(eqx.Module):
    """The number of steps of a fit and its keyword arguments, checked."""

    steps: int = eqx.field(converter=lambda x: whole_number(x, "steps", least=0))
    record: Any = ()
    every: int = eqx.field(
        default=1,
        converter=lambda x: min(whole_number(x, "every", least=1), MOST_STEPS),
    )
    validation: Any = None
    stop: Any = None
    progress: bool = eqx.field(default=True, converter=lambda x: boolean(x, "progress"))
    callback: Any = None
    chunk: int | None = eqx.field(
        default=None,
        converter=lambda x: x if x is None else whole_number(x, "chunk", least=1),
    )
    checkpoint: Any = None

    def __check_init__(self) -> None:
        callback, checkpoint = self.callback, self.checkpoint
        if callback is not None and not callable(callback):
            raise TypeError(
                f"`callback` is {callback!r}, but must be a function `(trainer, "
                "history)` that returns `None`, `True` to end the fit, or a trainer "
                "to go on with."
            )
        if callback is not None:
            takes(callback, 2, "callback", "callback(trainer, history)")
        if not isinstance(checkpoint, Checkpoints | None):
            raise TypeError(
                f"`checkpoint` is {checkpoint!r}, but must be "
                "`vn.Checkpoints(directory)`."
            )

    def described(self) -> dict[str, Any]:
        """Returns what must be the same in all processes, for a comparison."""
        presence = {"callback": self.callback, "checkpoint": self.checkpoint}
        numbers = {"steps": self.steps, "every": self.every, "chunk": self.chunk}
        return numbers | {name: str(type(x)) for name, x in presence.items()}
