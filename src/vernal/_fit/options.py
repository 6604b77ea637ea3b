"""The options of a fit."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

from .._boundary import boolean, step_limit, takes, whole_number
from .._policy import StopCriterion
from .._storage import Checkpoints, History
from .._tree import Selector

Callback = Callable[[Any, History], Any]


class FitKeywords(TypedDict, total=False):
    """The keyword arguments of `Trainer.fit`, without those for devices."""

    record: Selector
    every: int
    validation: tuple[Any, int] | None
    stop: StopCriterion | None
    best: bool
    progress: bool
    callback: Callback | None
    chunk: int | None
    checkpoint: Checkpoints | None


OPTIONS = tuple(FitKeywords.__annotations__)
"""The names of the keyword arguments."""


@dataclasses.dataclass
class FitOptions:
    """The number of steps of a fit and its keyword arguments, checked."""

    steps: int
    record: Any = ()
    every: int = 1
    validation: Any = None
    stop: Any = None
    best: bool = True
    progress: bool = True
    callback: Any = None
    chunk: int | None = None
    checkpoint: Any = None

    def __post_init__(self) -> None:
        self.steps = whole_number(self.steps, "steps", least=0)
        self.every = step_limit(self.every, "every")
        self.progress = boolean(self.progress, "progress")
        self.best = boolean(self.best, "best")
        if not self.best and self.validation is not None:
            raise ValueError(
                "`best=False` keeps no best, and `validation` is what `best` is chosen "
                "by. Leave out the one or the other."
            )
        if self.chunk is not None:
            self.chunk = whole_number(self.chunk, "chunk", least=1)
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
        numbers["best"] = self.best
        return numbers | {name: str(type(x)) for name, x in presence.items()}
