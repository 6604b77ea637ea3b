"""What to do with non-finite values: the two checks of zodiax, and `NanPolicy`."""

import abc
import functools as ft
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from .._boundary import PyTree, whole_number
from .._pickling import Portable

T = TypeVar("T")


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, float | complex) or (
        hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    )


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in the inexact leaves of a tree is finite."""
    flags = [is_finite(x) for x in jax.tree.leaves(tree) if _is_inexact(x)]
    return ft.reduce(operator.and_, flags, jnp.array(True))


def is_finite(array: ArrayLike) -> Bool[Array, ""]:
    """Whether every number in an array is finite.

    The largest magnitude tells: it is infinite or NaN if any is. To reduce floats is
    three times as fast on a CPU as to reduce the booleans of `isfinite`.
    """
    if jnp.size(array) == 0:
        return jnp.array(True)
    if jnp.iscomplexobj(array):
        # The magnitude of a finite number may overflow.
        array = jnp.stack([jnp.real(array), jnp.imag(array)])
    return jnp.isfinite(jnp.max(jnp.abs(array)))


def debug_nan_check(grads: T) -> T:
    """Opens a breakpoint if there is a NaN in the gradients.

    Infinities do not open it. Integer and `None` leaves are passed over.

    **Arguments:**

    - `grads`: any pytree.

    **Returns:**

    `grads` itself.
    """
    leaves = filter(_is_inexact, jax.tree.leaves(grads))
    flags = [jnp.any(jnp.isnan(leaf)) for leaf in leaves]
    eqx.debug.breakpoint_if(ft.reduce(operator.or_, flags, jnp.array(False)))
    return grads


def zero_nan_check(grads: T) -> T:
    """Replaces every NaN in the gradients by zero.

    Infinities stay, and each leaf keeps its dtype; integer and `None` leaves are
    passed over. To look for infinities too, and for a loss that is not finite, give
    a `Trainer` the policy [`vernal.ZeroNans`][].

    **Arguments:**

    - `grads`: any pytree.

    **Returns:**

    A pytree of the same structure.
    """
    return jax.tree.map(
        lambda x: jnp.where(jnp.isnan(x), 0, x) if _is_inexact(x) else x, grads
    )


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

    - `step`: the step at which that happened.
    - `paths`: what was not finite at that step: `"loss"`, the paths of gradients,
        `"update"`.
    - `report`: the whole of [`vernal.Trainer.nan_report`][].
    - `result`: what there was when it happened: a `FitResult` from `fit`, a `Trainer`
        from `step`. The step that failed is not taken, so nothing in it is poisoned.
    - `explanation`: sentences that say where it comes from: the data, the parameters or
        the model; and what to do about it.
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
        # The arguments as they are, so that a copy and a pickle can be made of it.
        super().__init__(step, self.paths, self.report, result, explanation)

    def __str__(self) -> str:
        """The message: where, and what to do about it."""
        return (
            f"not finite at step {self.step}: {', '.join(self.paths)}. "
            "The step was not taken: `.result` has everything up to it. "
            f"{self.explanation}"
        )


class NanPolicy(Portable, eqx.Module):
    """The abstract base of what is done with non-finite values.

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
            finite = jnp.isfinite(loss)
            state = jnp.where(finite, state, state / 2)
            grads = jax.tree.map(lambda g: state * g, grads)
            return grads, vn.Verdict(accept=finite, stop=state < 1e-3), state
    ```
    """

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


@final
class ZeroNans(NanPolicy):
    """Zeroes the non-finite entries of the gradients, and takes the step.

    Momentum still moves a parameter whose gradient was zeroed; [`vernal.SkipStep`][]
    holds it.
    """

    def init(self, params: PyTree) -> None:
        """Has nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Zeroes what is not finite."""
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
        return grads, Verdict(jnp.array(True), jnp.array(False)), None


@final
class SkipStep(NanPolicy):
    """Does not take a step whose loss or gradients are not finite.

    Parameters, moments and schedule counts are held as they are. The step counter
    goes on, and with it the random key and the minibatch.
    """

    def init(self, params: PyTree) -> None:
        """Has nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Accepts finite steps alone."""
        return grads, Verdict(all_finite((loss, grads)), jnp.array(False)), None


@final
class StopFit(NanPolicy):
    """Does not take a step that is not finite, and ends the fit. The default."""

    def init(self, params: PyTree) -> None:
        """Has nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Stops at the first step that is not finite."""
        finite = all_finite((loss, grads))
        return grads, Verdict(finite, ~finite), None


@final
class StopAfter(NanPolicy):
    """Ends the fit after `patience` bad steps in a row. It only observes.

    What it observes depends on where it stands: in `vn.ZeroNans() | vn.StopAfter(3)`
    it sees gradients that have been mended already, and only the loss can be bad.
    """

    patience: int = eqx.field(static=True)

    def __init__(self, patience: SupportsIndex):
        """**Arguments:**

        - `patience`: how many bad steps in a row are one too many, at least 1.
        """
        self.patience = whole_number(patience, "patience", least=1)

    def init(self, params: PyTree) -> Int[Array, ""]:
        """Counts the bad steps in a row from zero."""
        return jnp.array(0, jnp.int32)

    def apply(
        self, loss: Array, grads: PyTree, state: Int[Array, ""]
    ) -> tuple[PyTree, Verdict, Int[Array, ""]]:
        """Counts, and stops when the patience is spent."""
        row = jnp.where(all_finite((loss, grads)), 0, state + 1)
        return grads, Verdict(jnp.array(True), row >= self.patience), row


@final
class RaiseOnNan(NanPolicy):
    """Ends the fit at the first bad step, and raises [`vernal.NonFiniteError`][].

    The error is raised by `fit` and `step`, outside compiled code, so that it can name
    the step and the paths. Within a user's own `jax.jit`, `step` raises a generic
    error through `equinox.error_if`.
    """

    def init(self, params: PyTree) -> None:
        """Has nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Stops at the first step that is not finite."""
        return StopFit().apply(loss, grads, state)

    @property
    def raises(self) -> bool:
        """It does."""
        return True


@final
class BreakOnNan(NanPolicy):
    """Opens a breakpoint at a step that is not finite, and then ends the fit."""

    def init(self, params: PyTree) -> None:
        """Has nothing to remember."""

    def apply(
        self, loss: Array, grads: PyTree, state: None
    ) -> tuple[PyTree, Verdict, None]:
        """Breaks, then stops."""
        eqx.debug.breakpoint_if(~all_finite((loss, grads)))
        return StopFit().apply(loss, grads, state)
