"""What a fit checks after each step: its validation, and whether to end."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree, step_limit, takes_methods, unaddressed
from .._data import as_batch
from .._pickling import PlainMethods, build
from .._policy import StepView, StopCriterion, StopReason, asked
from .._step import (
    AbstractTrainer,
    Best,
    Outcome,
    Progress,
    evaluate,
    held_best,
    progress_of,
    ranked,
)
from .._tree import strong, to_arrays

_OF_CRITERION = {"init": ("params",), "apply": ("view", "state"), "reason": ("state",)}


class MonitorState(eqx.Module):
    """What a monitor keeps from step to step."""

    score: Float[Array, ""]
    stop_state: PyTree
    is_over: Bool[Array, ""]


class Validation(eqx.Module):
    """A batch to score the model on, after every `every` steps."""

    batch: PyTree
    every: Int[Array, ""]


class Monitor(PlainMethods, eqx.Module):
    """The validation and the stop criterion of a fit, each of which may be `None`."""

    validation: Validation | None
    stop: StopCriterion | None

    def __init__(self, validation: Any, stop: Any):
        """**Arguments:** as those of `Trainer.fit`."""
        self.validation = None
        if validation is not None:
            batch, every = _pair(validation)
            batch = as_batch(batch, "validation")
            every = step_limit(every, "validation[1]")
            self.validation = Validation(batch, jax.device_put(np.int32(every)))
        self.stop = stop
        if stop is None:
            return
        if not isinstance(stop, StopCriterion):
            made = isinstance(stop, type) and issubclass(stop, StopCriterion)
            remedy = f" Did you mean `{stop.__name__}(...)`?" if made else ""
            raise TypeError(
                f"`stop` is {stop!r}, but must be a StopCriterion, such as "
                f"`vn.Converged(1e-8, 20)`.{remedy}"
            )
        takes_methods(type(stop), _OF_CRITERION, "stop")
        if stop.needs_validation and validation is None:
            raise ValueError(
                f"`stop` is {stop!r}, which watches a validation, and there is none. "
                "Pass `validation=(batch, every)`."
            )

    def placed(
        self, batch: Callable[[PyTree], PyTree], rest: Callable[[PyTree], PyTree]
    ) -> "Monitor":
        """Returns the same with its batch, and the rest, put elsewhere."""
        validation = self.validation
        if validation is not None:
            validation = Validation(batch(validation.batch), rest(validation.every))
        return build(Monitor, {"validation": validation, "stop": rest(self.stop)})

    @property
    def fingerprint(self) -> str:
        """Identifies the criterion, also in another process."""
        text = unaddressed(repr(self.stop))
        values = [np.asarray(x.array).tobytes() for x in to_arrays(self.stop).values()]
        return hashlib.sha256(b"|".join([text.encode(), *values])).hexdigest()

    def init(self, progress: Progress) -> MonitorState | None:
        """Makes the first state, `None` if there is nothing to monitor."""
        if self.validation is None and self.stop is None:
            return None
        none_yet = np.asarray(np.inf, progress.best_loss.dtype)
        stop_state = None
        if self.stop is not None:
            stop_state = jax.tree.map(strong, self.stop.init(progress.params))
        no = jax.device_put(np.bool_(False))
        return MonitorState(jax.device_put(none_yet), stop_state, no)

    def is_due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        if self.validation is None:
            return jnp.array(False)
        return count % self.validation.every == 0

    def look(
        self,
        trainer: AbstractTrainer,
        outcome: Outcome,
        state: MonitorState,
        is_due: Bool[Array, ""],
    ) -> tuple[Progress, MonitorState]:
        """Validates a trainer after a step, if that is due, and asks the criterion.

        Returns its progress, with the best by validation, and the new state. `is_due`
        is one answer for all of many trainers.
        """
        old, score = progress_of(trainer), state.score
        progress = old
        if (validation := self.validation) is not None:

            def score_it() -> tuple[Best, Float[Array, ""]]:
                new = evaluate(trainer, validation.batch).astype(state.score.dtype)
                return ranked(old, new), new

            leave_it = lambda: (held_best(old), state.score)
            best, score = lax.cond(is_due, score_it, leave_it)
            progress = dataclasses.replace(old, **best._asdict())
        if self.stop is None:
            return progress, MonitorState(score, None, state.is_over)
        view = StepView(
            step_count=progress.step_count,
            loss=outcome.loss,
            grads=outcome.grads,
            params=progress.params,
            accepted=outcome.accepted,
            validation=score,
            is_validated=is_due,
        )
        is_over, stop_state = asked(self.stop, view, state.stop_state)
        return progress, MonitorState(score, stop_state, is_over)

    def reason(self, state: MonitorState | None) -> StopReason | None:
        """Returns why the criterion has ended the fit, `None` if it has not."""
        if self.stop is None or state is None or not state.is_over:
            return None
        return self.stop.reason(state.stop_state)


def _pair(validation: Any) -> tuple[Any, Any]:
    if not isinstance(validation, tuple) or len(validation) != 2:
        found = type(validation).__name__
        if isinstance(validation, tuple):
            found = f"a tuple of {len(validation)}"
        raise TypeError(
            "`validation` must be a pair `(batch, every)`: the batch to score the "
            f"model on, and the number of steps between two scores. It is {found}."
        )
    return validation
