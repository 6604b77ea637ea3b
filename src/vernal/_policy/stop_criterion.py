"""When to end a fit: `StopCriterion`, `Converged`, `Patience`."""

import abc
import math
from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import PyTree, refuse_taken, step_limit
from .._pickling import Portable
from .stop_reason import StopReason


class StepView(NamedTuple):
    """What a criterion sees of each step.

    **Attributes:**

    - `step_count`: the number of steps taken, this one included.
    - `loss`: the loss before the step.
    - `grads`: its gradients, `None` for what is not trained.
    - `params`: the parameters after the step.
    - `accepted`: whether the step was taken. If not, the parameters are as they were.
    - `validation`: the last score of a validation, infinite before the first.
    - `is_validated`: whether that was after this step.
    """

    step_count: Int[Array, ""]
    loss: Float[Array, ""]
    grads: PyTree
    params: PyTree
    accepted: Bool[Array, ""]
    validation: Float[Array, ""]
    is_validated: Bool[Array, ""]


class StopCriterion(Portable, eqx.Module):
    """When a fit ends. The abstract base class.

    A criterion sees every step, inside the compiled loop. It is a pytree. Criteria
    compose: `vn.Converged(1e-8, 20) | vn.Patience(5)` stops where either does.

    To write one, subclass it and define `init` and `apply`:

    ```python
    class FlatEnough(vn.StopCriterion):
        norm: float

        def init(self, params):
            return None

        def apply(self, view, state):
            return optax.tree.norm(view.grads) < self.norm, state
    ```
    """

    def __check_init__(self) -> None:
        refuse_taken(type(self), StopCriterion, free=("needs_validation",))

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """Makes the state that the criterion carries from step to step.

        **Arguments:**

        - `params`: the trained parameters, `None` elsewhere.

        **Returns:**

        A pytree of arrays, `None` if there is nothing to remember. Its structure and
        dtypes stay the same throughout a fit.
        """

    @abc.abstractmethod
    def apply(
        self, view: StepView, state: Any
    ) -> tuple[bool | Bool[Array, ""], PyTree]:
        """Looks at one step.

        **Arguments:**

        - `view`: a [`vernal.StepView`][].
        - `state`: what `init`, or the previous step, returned.

        **Returns:**

        Whether to end the fit, and the new state.
        """

    @property
    def needs_validation(self) -> bool:
        """Whether it needs a fit with `validation`."""
        return False

    def reason(self, state: Any) -> StopReason:
        """Returns the `stop_reason` of a fit that this criterion has ended."""
        return StopReason.CRITERION

    def __or__(self, other: "StopCriterion") -> "StopCriterion":
        """Composes two criteria: the fit ends as soon as either stops it."""
        if not isinstance(other, StopCriterion):
            raise TypeError(
                f"cannot compose a StopCriterion with {other!r}: the right-hand side "
                "of `|` must be one too, for example `vn.Patience(5)`."
            )
        return _Either(self, other)


@final
class _Either(StopCriterion):
    first: StopCriterion
    second: StopCriterion

    def init(self, params: PyTree) -> PyTree:
        # NumPy makes the flag, for which JAX would compile a program.
        no = jax.device_put(np.bool_(False))
        return self.first.init(params), self.second.init(params), no

    def apply(self, view: StepView, state: Any) -> tuple[Bool[Array, ""], PyTree]:
        first, second, _ = state
        is_first, first = self.first.apply(view, first)
        is_second, second = self.second.apply(view, second)
        is_first = jnp.asarray(is_first)
        return is_first | is_second, (first, second, is_first)

    @property
    def needs_validation(self) -> bool:
        return self.first.needs_validation or self.second.needs_validation

    def reason(self, state: Any) -> StopReason:
        first, second, is_first = state
        return self.first.reason(first) if is_first else self.second.reason(second)


@final
class Converged(StopCriterion):
    """Ends a fit whose loss no longer falls.

    It does so if `patience` steps in a row have not brought the loss from its value
    before them, $L_0$, to below $L_0 - \\max(r |L_0|, a)$, with the tolerances $r$ and
    $a$. Small decreases add up. Steps that were not accepted do not count.

    Let `patience` be longer than the optimiser waits before it first moves a parameter
    (`vernal.window`, `vernal.delay`, `optax.MultiSteps`).

    This is for a loss without noise. With minibatches the loss falls and rises: watch
    a validation instead, with [`vernal.Patience`][].
    """

    rtol: float = eqx.field(static=True)
    patience: int = eqx.field(static=True)
    atol: float = eqx.field(static=True)

    def __init__(self, rtol: float | int, patience: int, *, atol: float | int = 0.0):
        """**Arguments:**

        - `rtol`: the fraction of itself by which the loss has to fall.
        - `patience`: the number of steps in which it has to fall, at least 1.
        - `atol`: the least amount by which it has to fall. For a negative
            log-likelihood, 0.01 is far less than the data can resolve.
        """
        self.rtol = _tolerance(rtol, "rtol")
        self.patience = step_limit(patience, "patience")
        self.atol = _tolerance(atol, "atol")

    def init(self, params: PyTree) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Remembers a loss, and how long ago it was."""
        return _infinite_and_zero()

    def apply(self, view: StepView, state: Any) -> tuple[Bool[Array, ""], PyTree]:
        """Counts the steps since the loss has fallen."""
        reference, waited = state
        margin = jnp.maximum(self.rtol * jnp.abs(reference), self.atol)
        fallen = (view.loss < reference - margin) | jnp.isinf(reference)
        counts = view.accepted & jnp.isfinite(view.loss)
        reference = jnp.where(counts & fallen, view.loss, reference)
        waited = jnp.where(counts, jnp.where(fallen, 0, waited + 1), waited)
        return waited >= self.patience, (reference, waited)

    def reason(self, state: Any) -> StopReason:
        """It has converged."""
        return StopReason.CONVERGED


@final
class Patience(StopCriterion):
    """Ends a fit after `n` validations in a row without a new lowest score.

    ```python
    trainer.fit(data, 100_000, validation=(held_out, 500), stop=vn.Patience(5))
    ```

    `result.best` is the model with the lowest score.
    """

    n: int = eqx.field(static=True)

    def __init__(self, n: int):
        """**Arguments:**

        - `n`: the number of validations, at least 1.
        """
        self.n = step_limit(n, "n")

    def init(self, params: PyTree) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Remembers the lowest score, and how many validations ago it was."""
        return _infinite_and_zero()

    def apply(self, view: StepView, state: Any) -> tuple[Bool[Array, ""], PyTree]:
        """Counts the validations since the lowest."""
        lowest, waited = state
        is_lower = view.is_validated & (view.validation < lowest)
        waited = jnp.where(is_lower, 0, waited + view.is_validated.astype(waited.dtype))
        lowest = jnp.where(is_lower, view.validation, lowest)
        return waited >= self.n, (lowest, waited)

    @property
    def needs_validation(self) -> bool:
        """It does."""
        return True

    def reason(self, state: Any) -> StopReason:
        """It has no more patience."""
        return StopReason.NO_PATIENCE


def _infinite_and_zero() -> tuple[Float[Array, ""], Int[Array, ""]]:
    infinite = np.asarray(np.inf, jnp.result_type(float))
    return jax.device_put(infinite), jax.device_put(np.int32(0))


def _tolerance(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float | np.number) and not isinstance(
        value, bool
    )
    if not is_number or not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"`{name}` is {value!r}, but must be a number that is not negative."
        )
    return float(value)
