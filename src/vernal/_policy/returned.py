"""What `apply` returned, checked: a policy or a criterion may be a user's own."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._boundary import PyTree
from .._tree import LIKE_STATE, cast_alike
from .nan_policy import NanPolicy, Verdict
from .stop_criterion import StepView, StopCriterion


def judged(
    policy: NanPolicy, loss: Array, grads: PyTree, state: PyTree
) -> tuple[PyTree, Verdict, PyTree]:
    """Returns the answer of `policy.apply`, checked and cast."""
    answer = policy.apply(loss, grads, state)
    form = "`(grads, vn.Verdict(accept=..., stop=...), state)`"
    new, verdict, new_state = _entries(policy, answer, form, object, Verdict, object)
    for field, value in verdict._asdict().items():
        if jnp.shape(value) != ():
            raise ValueError(
                f"{_name(policy)} returned a Verdict whose `{field}` has shape "
                f"{jnp.shape(value)}, but it must be a scalar, for the whole step."
            )
    verdict = Verdict(*(jnp.asarray(value, bool) for value in verdict))
    remedy = "Return gradients of the dtypes that it is given."
    new = _cast(policy, "gradients", new, grads, remedy)
    return new, verdict, _cast(policy, "state", new_state, state, LIKE_STATE)


def asked(
    stop: StopCriterion, view: StepView, state: PyTree
) -> tuple[Bool[Array, ""], PyTree]:
    """Returns the answer of `stop.apply`, checked and cast."""
    answer = stop.apply(view, state)
    form = "`(whether to stop, state)`"
    flag, new_state = _entries(stop, answer, form, object, object)
    is_boolean = jnp.issubdtype(jnp.result_type(flag), jnp.bool_)
    if jnp.shape(flag) != () or not is_boolean:
        raise TypeError(
            f"{_name(stop)} must return a boolean scalar first, but returned {flag!r}."
        )
    return jnp.asarray(flag), _cast(stop, "state", new_state, state, LIKE_STATE)


def _name(policy: Any) -> str:
    return f"`{type(policy).__name__}.apply`"


def _entries(policy: Any, answer: Any, form: str, *kinds: type) -> tuple[Any, ...]:
    is_tuple = isinstance(answer, tuple) and len(answer) == len(kinds)
    if not is_tuple or not all(map(isinstance, answer, kinds)):
        raise TypeError(f"{_name(policy)} must return {form}, but returned {answer!r}.")
    return answer


def _cast(policy: Any, what: str, new: PyTree, old: PyTree, remedy: str) -> PyTree:
    whose = f"the {what} that {_name(policy)} returned"
    return cast_alike(new, old, whose, "what it was given", remedy)
