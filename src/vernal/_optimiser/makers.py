"""By which functions a transformation was made, and so what its state means."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from .._closure import Skeleton
from .param_optimiser import ParamOptimiser
from .rate_check import Cells, cells
from .rule_names import rule_name
from .transform import Transform

# The states of these have the same meaning: averages of gradients, and of their squares
# or of the squares of their distance from that average.
_SAME_STATE = {
    "scale_by_radam": "scale_by_adam",
    "scale_by_yogi": "scale_by_adam",
    "scale_by_acprop": "scale_by_belief",
}


class Maker(NamedTuple):
    """The function that made a transformation which has a state."""

    rule: str
    """The rule that it is for; `""` for all parameters."""
    name: str
    """Its name in Optax; `""` for a user's own, which may be renamed or wrapped."""

    @property
    def meaning(self) -> str:
        """The same for two whose states mean the same if they look the same."""
        return _SAME_STATE.get(self.name, self.name)


def maker(fn: Any) -> str:
    """Names the function that made this one, by its code: wrappers copy names."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return ""
    package = fn.__globals__.get("__name__", "").split(".")[0]
    return f"{package}.{code.co_qualname.split('.<locals>')[0]}"


def state_makers(tx: Any, groups: Sequence[int] | None = None) -> Iterator[Maker]:
    """Lists what of an optimiser has a state, wrappers of transformations aside.

    Of a `ParamOptimiser` only these `groups` may be listed, in their order.
    """
    if isinstance(tx, ParamOptimiser):
        names = [*map(rule_name, tx.selectors.decode()), "default", "first"]
        rules = *tx.transforms, tx.default, tx.first
        last = len(rules) - 1
        for index in range(len(rules)) if groups is None else (*groups, last):
            makers = state_makers(rules[index])
            yield from (Maker(one.rule or names[index], one.name) for one in makers)
    elif isinstance(tx, Transform):
        # To find them takes a trace of each `init`: a thousand rules may be alike.
        skeleton = tx.closure.skeleton
        if skeleton not in _KNOWN:
            _KNOWN[skeleton] = tuple(state_makers(tx.decode()))
        yield from _KNOWN[skeleton]
    elif tx is not None and (inner := list(_inner(tx))):
        for one in inner:
            yield from state_makers(one)
    elif tx is not None and _has_state(tx):
        package, _, name = maker(tx.update).partition(".")
        yield Maker("", name if package == "optax" else "")


def joins_parameters(tx: Any) -> bool:
    """Whether a part of an optimiser makes one vector of parameters, in their order."""
    if tx is None:
        return False
    return maker(tx.update) == "optax.flatten" or any(map(joins_parameters, _inner(tx)))


_KNOWN: weakref.WeakKeyDictionary[Skeleton, tuple[Maker, ...]] = (
    weakref.WeakKeyDictionary()
)


def _inner(tx: optax.GradientTransformation) -> Iterator[Any]:
    """Yields the transformations that one is made of; `None` for a frozen rule."""
    owner, name = _owner(tx), maker(tx.update)
    if isinstance(owner, Transform | ParamOptimiser) and owner is not tx:
        yield owner
    elif isinstance(owner, Transform):
        yield owner.decode()
    elif isinstance(owner, ParamOptimiser):
        yield from (owner.first, owner.default, *owner.transforms)
    elif type(owner).__module__.startswith(("optax.", "vernal.")):
        held = _transformations(vars(owner))
        # An object may hold the transformation that its own methods make.
        yield from (one for one in held if _owner(one) is not owner)
    elif name == "optax.chain":
        fns = cells(tx.init)["init_fns"], cells(tx.update)["update_fns"]
        yield from map(optax.GradientTransformation, *fns)
    elif name == "optax.inject_hyperparams":
        yield _injected(cells(tx.init))
    elif name.startswith(("optax.", "vernal.")):
        yield from _transformations(cells(tx.update))


def _owner(tx: optax.GradientTransformation) -> Any:
    return getattr(tx.update, "__self__", None)


def _transformations(held: Any) -> Iterator[optax.GradientTransformation]:
    if isinstance(held, optax.GradientTransformation):
        yield held
    elif isinstance(held, Mapping | tuple | list):
        values: Iterable[Any] = held.values() if isinstance(held, Mapping) else held
        for value in values:
            yield from _transformations(value)


def _injected(held: Cells) -> optax.GradientTransformation:
    """Makes what `optax.inject_hyperparams` makes at first."""
    scheduled = {name: fn(fn.init()) for name, fn in held["sched_hps"].items()}
    values = {**held["other_hps"], **held["numeric_hps"], **scheduled}
    return held["inner_factory"](**values)


def _has_state(tx: optax.GradientTransformation) -> bool:
    if maker(tx.init) == "optax.init_empty_state":
        return False
    try:
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((), "float32"))
    except Exception:  # A function of a user may want parameters of its own names.
        return True
    return bool(jax.tree.leaves(state))


def as_makers(written: Any) -> list[Maker] | None:
    """Reads what was written of makers as JSON, if anything was."""
    if written is None:
        return None
    found = [Maker(*pair) for pair in written]
    if not all(isinstance(text, str) for pair in found for text in pair):
        raise ValueError(f"the makers of its optimiser are {written!r}")
    return found


def other_maker(
    old: Iterable[Maker], new: Iterable[Maker]
) -> tuple[Maker, Maker] | None:
    """Finds the first pair of makers whose states have different meanings.

    Those of another number of transformations do not look alike anyway.
    """
    old, new = [*old], [*new]
    pairs = zip(old, new, strict=True) if len(old) == len(new) else ()
    is_other = lambda one, two: one.name and two.name and one.meaning != two.meaning
    return next((pair for pair in pairs if is_other(*pair)), None)
