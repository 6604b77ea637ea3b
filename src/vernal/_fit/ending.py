"""Why a fit ended, and what could still fall, in words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._minimum import Distance, along, endless_words, saddle_words
from .._policy import StopReason
from .._step import defined, in_real_coordinates, prior_ends

# What users give as `atol`, at most.
_USUAL_ATOL = 1e-6

# A quarter of at least so many steps says how fast a loss falls. Near a minimum each
# falls by a small part of the one before, and by hardly any of the whole fall.
_LEAST_STEPS, _LEAST_LEFT, _LEAST_SHARE = 32, 0.5, 1e-3

# A smaller part of the loss is no fall: rounding, or steps that hardly move.
_LEAST_FALL = 1e-6

_NO_LOWEST = (
    "has no lowest value: check its sign, and whether a term is missing, such as the "
    "norm of a density"
)


class Ending(NamedTuple):
    """The end of a fit.

    - `distance`: how far it is to the minimum, `None` where it is not known.
    - `losses`: those that were recorded.
    - `name`: what a user calls the trainer.
    - `more`: what allows a solver more steps.
    """

    trainer: Any
    stop_reason: StopReason
    distance: Distance | None
    losses: np.ndarray
    name: str = "result.trainer"
    more: str = "`max_steps=` allows more"

    def explain(self) -> str:
        return " ".join(filter(None, (self._explained(), self._falling())))

    def _falling(self) -> str:
        """Says that the loss falls as if without end; a sum of squares does not."""
        losses = np.asarray(self.losses, float)
        if defined(self.trainer) == ("residuals",):
            return ""
        if np.isneginf(losses).any():
            return f"The loss fell to minus infinity: it {_NO_LOWEST}."
        size = len(losses) // 4
        is_open = self.stop_reason is StopReason.MAX_STEPS and np.isfinite(losses).all()
        if not is_open or len(losses) < _LEAST_STEPS:
            return ""
        then, before, now = losses[[-1 - 2 * size, -1 - size, -1]]
        whole, distance = losses[0] - now, self.distance
        # The slow way to a minimum that can be seen from here is another matter.
        if distance is not None and not distance.is_saddle and distance.edm < whole:
            return ""
        is_steady = before - now > _LEAST_LEFT * (then - before) > 0
        is_fall = whole > _LEAST_FALL * abs(losses[0])
        if not (is_fall and is_steady and before - now > _LEAST_SHARE * whole):
            return ""
        return (
            f"It still fell from {before:.6g} to {now:.6g} in the last {size} steps, "
            f"hardly slower than before: perhaps it {_NO_LOWEST}."
        )

    def _explained(self) -> str:
        distance = self.distance
        is_known = distance is not None and np.isfinite(distance.edm)
        if distance is None or not (is_known or distance.is_steep):
            is_stalled = self.stop_reason is StopReason.STALLED
            why = " Its derivatives there are not finite." if is_stalled else ""
            return f"{self._ended}{why}{self._beside if is_stalled else ''}"
        is_short = self.stop_reason is not StopReason.CONVERGED
        params = in_real_coordinates(self.trainer).params
        said = [self._ended]
        if distance.is_saddle:
            is_on_way = self.stop_reason is StopReason.MAX_STEPS
            remedy = ["it may do so on the way"] if is_on_way else []
            return f"{said[0]} The loss {saddle_words(distance, params, *remedy)}."
        if distance.is_endless:
            reason = str(self.stop_reason).removesuffix(".")
            return f"{reason}{endless_words(distance, params)}."
        direction = np.asarray(distance.direction, float)
        where = along(direction, params) if is_short else ""
        if distance.edm > 0:
            much = f"about {distance.edm:.3g} (edm)"
            said.append(f"The loss could still fall by {much}{where}.")
            remedy = distance.remedy or (self._remedy if distance.is_short else "")
            said += [f"{remedy}."] if remedy else []
        else:
            said.append("The loss could still fall by less than can be measured.")
        return " ".join(said) + (self._beside if is_short else "")

    @property
    def _ended(self) -> str:
        """Says why the fit ended, and what helps if that was for want of steps."""
        if self.stop_reason is not StopReason.MAX_STEPS:
            return str(self.stop_reason)
        return (
            f"{self.stop_reason} These were {len(self.losses)}: {self.more}, and "
            f"`{self.name}.solve(solver, batch)` goes on from here."
        )

    @property
    def _remedy(self) -> str:
        """Says what helps a solver that stopped too early."""
        loss = float(self.trainer.best_loss)
        if 0 < loss < _USUAL_ATOL:
            return "The `atol` of a solver may be larger than this loss: give `atol=0`"
        is_real = not any(map(jnp.iscomplexobj, jax.tree.leaves(self.trainer.params)))
        if self.trainer.projector is not None or not is_real:
            return ""
        return (
            "If parameters differ in scale, go on in a whitened space: "
            f"`{self.name}.whiten(batch)`"
        )

    @property
    def _beside(self) -> str:
        """Says that a parameter is at an end of its prior, and what helps."""
        return prior_ends(self.trainer, is_near=True)
