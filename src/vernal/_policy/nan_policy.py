"""What to do with non-finite values: `NanPolicy`."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._boundary import PyTree, refuse_taken, step_limit
from .._pickling import Portable
from .finite import all_finite


class Verdict(NamedTuple):
    """What a policy decides about one step.

    **Attributes:**

    - `accept`: whether to take the step. If not, parameters, moments and schedules
        are held.
    - `stop`: whether to end the fit.
    """

    accept: bool | Bool[Array, ""]
    stop: bool | Bool[Array, ""]


class NanCount(NamedTuple):
    """How often one quantity was not finite.

    **Attributes:**

    - `total`: the number of steps at which it was not finite.
    - `first_step`: the first of these steps, counted from zero, or `None`.
    """

    total: int
    first_step: int | None


SKIP_ADVICE = (
    "To go on past such steps, use `nan_policy=vn.SkipStep() | vn.StopAfter(10)`."
)


class NonFiniteError(FloatingPointError):
    """A fit under [`vernal.RaiseOnNan`][] met a value that is not finite.

    **Attributes:**

    - `step`: the number of that step.
    - `paths`: what was not finite: `"loss"`, the paths of gradients, `"update"`.
    - `report`: what [`vernal.Trainer.nan_report`][] returns.
    - `result`: everything up to that step: a `FitResult` from `fit`, a `Trainer` from
        `step`. The step itself is not taken.
    - `explanation`: where the value comes from (the data, the parameters or the model),
        and what to do about it.
    """

    def __init__(
        self,
        step: int,
        paths: Sequence[str],
        report: Mapping[str, NanCount],
        result: Any,
        explanation: str = SKIP_ADVICE,
    ):
        """**Arguments:** see the attributes."""
        self.step: int = step
        self.paths: tuple[str, ...] = tuple(paths)
        self.report: dict[str, NanCount] = dict(report)
        self.result = result
        self.explanation = explanation
        # All arguments, so that it can be copied and pickled.
        super().__init__(step, self.paths, self.report, result, explanation)

    def __str__(self) -> str:
        """Says where, and what to do about it."""
        return (
            f"not finite at step {self.step}: {', '.join(self.paths)}. "
            "The step was not taken: `.result` has everything up to it. "
            f"{self.explanation}"
        )


class NanPolicy(Portable, eqx.Module):
    """What a fit does about non-finite values. The abstract base class.

    A value is non-finite if it is NaN or infinite, in the loss or in the gradients.
    A policy sees both at every step, and decides whether the step is taken and
    whether the fit goes on. It is a pytree, and everything it does happens inside the
    compiled loop. Policies compose: `vn.SkipStep() | vn.StopAfter(10)`.

    To write one, subclass `NanPolicy` and define `init` and `apply`:

    ```python
    class HalveOnNan(vn.NanPolicy):
        def init(self, params):
            return jnp.array(1.0)

        def apply(self, loss, grads, state):
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            state = jnp.where(finite, state, state / 2)
            grads = jax.tree.map(lambda g: state * g, grads)
            return grads, vn.Verdict(accept=finite, stop=state < 1e-3), state
    ```
    """

    def __check_init__(self) -> None:
        refuse_taken(type(self), NanPolicy, free=("raises", "leaves_good_steps"))

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """Makes the state that the policy carries from step to step.

        **Arguments:**

        - `params`: the trained parameters, `None` elsewhere.

        **Returns:**

        A pytree of arrays, `None` if there is nothing to remember. Its structure and
        dtypes stay the same throughout a fit.
        """

    @abc.abstractmethod
    def apply(
        self, loss: Array, grads: PyTree, state: PyTree
    ) -> tuple[PyTree, Verdict, PyTree]:
        """Judges one step.

        **Arguments:**

        - `loss`: the scalar loss.
        - `grads`: its gradients with respect to the trained parameters of the model,
            before any projection.
        - `state`: what `init`, or the previous step, returned.

        **Returns:**

        The gradients to go on with, a [`vernal.Verdict`][], and the new state.
        """

    @property
    def raises(self) -> bool:
        """Whether a fit that this policy has ended raises `NonFiniteError`."""
        return False

    @property
    def leaves_good_steps(self) -> bool:
        """Whether it takes each step without a bad value as it is.

        Such steps need not be shown to it one by one, and run faster. `False` for your
        own policies, unless you define it.
        """
        return False

    def __or__(self, other: "NanPolicy") -> "NanPolicy":
        """Composes two policies: the gradients flow through `self`, then `other`.

        A step is accepted if both accept it; the fit stops if either stops it.
        """
        if not isinstance(other, NanPolicy):
            raise TypeError(
                f"cannot compose a NanPolicy with {other!r}: the right-hand side of "
                "`|` must be a NanPolicy too, for example `vn.StopAfter(10)`."
            )
        return _Both(self, other)


@final
class _Both(NanPolicy):
    first: NanPolicy
    second: NanPolicy

    def init(self, params: PyTree) -> PyTree:
        return self.first.init(params), self.second.init(params)

    def apply(
        self, loss: Array, grads: PyTree, state: PyTree
    ) -> tuple[PyTree, Verdict, PyTree]:
        first_state, second_state = state
        grads, first, first_state = self.first.apply(loss, grads, first_state)
        grads, second, second_state = self.second.apply(loss, grads, second_state)
        verdict = Verdict(first.accept & second.accept, first.stop | second.stop)
        return grads, verdict, (first_state, second_state)

    @property
    def raises(self) -> bool:
        return self.first.raises or self.second.raises

    @property
    def leaves_good_steps(self) -> bool:
        return self.first.leaves_good_steps and self.second.leaves_good_steps


class AbstractStatelessPolicy(NanPolicy):
    """A policy that has nothing to remember."""

    @abc.abstractmethod
    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        """Returns the gradients to go on with, and the verdict."""

    def init(self, params: PyTree) -> None:
        """Returns `None`: there is nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Judges one step, by itself."""
        return *self._judge(loss, grads), None

    @property
    def leaves_good_steps(self) -> bool:
        """It does."""
        return True


@final
class ZeroNans(AbstractStatelessPolicy):
    """Zeroes the non-finite entries of the gradients, and takes the step.

    Momentum still moves a parameter whose gradient was zeroed; [`vernal.SkipStep`][]
    holds it.
    """

    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
        return grads, Verdict(jnp.array(True), jnp.array(False))


@final
class SkipStep(AbstractStatelessPolicy):
    """Does not take a step whose loss or gradients are not finite.

    Parameters, moments and schedule counts are held as they are. The step counter
    goes on, and with it the random key and the minibatch.
    """

    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        return grads, Verdict(all_finite((loss, grads)), jnp.array(False))


@final
class StopFit(AbstractStatelessPolicy):
    """Does not take a step that is not finite, and ends the fit. The default."""

    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        return grads, _stop_unless(all_finite((loss, grads)))


@final
class RaiseOnNan(AbstractStatelessPolicy):
    """Ends the fit at the first bad step, and raises [`vernal.NonFiniteError`][].

    The error is raised by `fit` and `step`, outside compiled code, so that it can name
    the step and the paths. Within your own `jax.jit`, `step` raises a generic error
    through `equinox.error_if`.
    """

    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        return grads, _stop_unless(all_finite((loss, grads)))

    @property
    def raises(self) -> bool:
        """It does."""
        return True


@final
class BreakOnNan(AbstractStatelessPolicy):
    """Opens a breakpoint at a step that is not finite, and then ends the fit."""

    def _judge(self, loss: Array, grads: PyTree) -> tuple[PyTree, Verdict]:
        finite = all_finite((loss, grads))
        eqx.debug.breakpoint_if(~finite)
        return grads, _stop_unless(finite)


def _stop_unless(finite: Bool[Array, ""]) -> Verdict:
    return Verdict(accept=finite, stop=~finite)


@final
class StopAfter(NanPolicy):
    """Ends the fit after `patience` bad steps in a row. It only observes.

    In `vn.ZeroNans() | vn.StopAfter(3)` it sees gradients whose non-finite entries are
    zero already: only the loss can be bad.
    """

    patience: int = eqx.field(static=True)

    def __init__(self, patience: SupportsIndex):
        """**Arguments:**

        - `patience`: the number of bad steps in a row that ends the fit, at least 1.
        """
        self.patience = step_limit(patience, "patience")

    def init(self, params: PyTree) -> Int[Array, ""]:
        """Counts the bad steps in a row from zero."""
        return jnp.array(0, jnp.int32)

    def apply(
        self, loss: Array, grads: PyTree, state: Int[Array, ""]
    ) -> tuple[PyTree, Verdict, Int[Array, ""]]:
        """Counts, and stops when the patience is used up."""
        row = jnp.where(all_finite((loss, grads)), 0, state + 1)
        return grads, Verdict(jnp.array(True), row >= self.patience), row

    @property
    def leaves_good_steps(self) -> bool:
        """It does."""
        return True
