"""Groups of leaves, each updated by its own transformation."""

import functools
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import optax
from jax.core import Tracer

from .._boundary import first_names
from .._closure import Closure, Skeleton
from .._tree import shape_and_dtype
from .schedule import window
from .transform import AbstractTransform, Transform

Leaves = Mapping[str, Any]
"""The leaves of a tree, or one value for each, by name."""


class Group(NamedTuple):
    """Leaves that share one transformation, and its state.

    `members` are the names of the leaves, in the order of the tree.
    """

    transform: optax.GradientTransformation
    members: tuple[str, ...]
    state: Any = None

    def own(self, leaves: Leaves) -> dict[str, Any]:
        """Returns the group's leaves as its transformation sees them."""
        # JAX sorts the keys of a plain dictionary, and a sum in another order has other
        # bits. For one leaf there is one order, and a plain dictionary is much faster.
        kind = dict if len(self.members) == 1 else OrderedDict
        return kind((name, leaves[name]) for name in self.members)

    def init(self, leaves: Leaves) -> Any:
        return _explained(self.transform.init, self.own(leaves))


def make_groups(
    transforms: Sequence[optax.GradientTransformation],
    owners: Sequence[int],
    names: Sequence[str],
    states: Sequence[Any] | None = None,
) -> list[Group]:
    """Makes a group for each transformation, given the index of each leaf's."""
    members: list[list[str]] = [[] for _ in transforms]
    for owner, name in zip(owners, names, strict=True):
        members[owner].append(name)
    states = [None] * len(members) if states is None else states
    return [
        Group(tx, tuple(own), state)
        for tx, own, state in zip(transforms, members, states, strict=True)
    ]


def update_groups(
    groups: Sequence[Group],
    updates: Leaves,
    params: Leaves | None,
    extra_of: Callable[[Sequence[str]], Mapping[str, Any]],
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Updates each group by its own transformation.

    `extra_of` returns the extra arguments of a group, given its members: a dictionary
    by these becomes like the updates of the group.
    """
    # Outside a trace there is nothing to share, and a compiled update has other bits.
    is_traced = any(isinstance(update, Tracer) for update in updates.values())
    traces = [
        _nameless(x, updates) if is_traced and x.members else None for x in groups
    ]
    frequency = Counter(trace.key for trace in traces if trace is not None)
    new: dict[str, Any] = {}
    states = []
    for group, trace in zip(groups, traces, strict=True):
        update = optax.with_extra_args_support(group.transform).update
        values = None if params is None else group.own(params)
        args = group.own(updates), group.state, values
        members = set(group.members)
        extra = {
            name: group.own(arg) if _is_by_name(arg, members) else arg
            for name, arg in extra_of(group.members).items()
        }
        done = None
        if trace is not None:
            shared = trace.shared_update if frequency[trace.key] > 1 else update
            done = _update_nameless(shared, trace, args, extra)
        moved, state = done or _explained(update, *args, **extra)
        new |= {name: moved[name] for name in group.members}
        states.append(state)
    return new, tuple(states)


def _is_by_name(node: Any, names: set[str]) -> bool:
    return isinstance(node, dict) and node.keys() == names


# The functions of these modules look at no name of a parameter. JAX's caches do not
# hash the keys of a dictionary: a thousand groups of one leaf each would be a thousand
# traces of everything that Optax calls, each one looked up among all the others.
_NAMELESS = ("optax", "jax", "jaxlib", window.__module__)


class _Nameless(NamedTuple):
    """A transformation that looks at no names; groups of one key share a trace."""

    closure: Closure
    words: frozenset[str]
    avals: tuple[Any, ...]

    @property
    def key(self) -> tuple[Skeleton, tuple[Any, ...]]:
        return self.closure.skeleton, self.avals

    def shared_update(self, *args: Any, **extra: Any) -> Any:
        return _shared(self.closure.skeleton)(self.closure.leaves, args, extra)


def _nameless(group: Group, leaves: Leaves) -> _Nameless | None:
    tx = group.transform
    if isinstance(tx, AbstractTransform) and not isinstance(tx, Transform):
        return None
    closure = tx.closure if isinstance(tx, Transform) else Closure.encode(tx)
    words = _words(closure.skeleton)
    if words is None:
        return None
    avals = tuple(shape_and_dtype(leaves[name]) for name in group.members)
    return _Nameless(closure, words, avals)


@functools.lru_cache(maxsize=4096)
def _words(skeleton: Skeleton) -> frozenset[str] | None:
    return skeleton.words() if skeleton.is_made_of(_NAMELESS) else None


@functools.lru_cache(maxsize=4096)
def _shared(skeleton: Skeleton) -> Callable[..., Any]:
    # Inline, so that the program is the same as without sharing.
    @functools.partial(jax.jit, inline=True)
    def update(leaves: Any, args: Any, extra: Any) -> Any:
        tx = optax.with_extra_args_support(Closure(leaves, skeleton).decode())
        return tx.update(*args, **extra)

    return update


def _update_nameless(
    update: Callable[..., Any],
    trace: _Nameless,
    args: tuple[Any, ...],
    extra: Mapping[str, Any],
) -> Any:
    """Updates a group under aliases; returns `None` where it needs its own names."""
    functions = {name for name, arg in extra.items() if callable(arg)}
    if functions & trace.words:
        return None
    extra = {name: arg for name, arg in extra.items() if name not in functions}
    names = tuple(args[0])
    aliases = tuple(map(str, range(len(names))))
    try:
        args, extra = _renamed((args, extra), names, aliases)
        return _renamed(update(*args, **extra), aliases, names)
    except Exception:
        # It is called again under its own names, which the error then has.
        return None


def _renamed(tree: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    is_own = functools.partial(_is_by_name, names=set(old))

    def rename(node: Any) -> Any:
        if not is_own(node):
            return node
        return type(node)(zip(new, map(node.__getitem__, old), strict=True))

    return jtu.tree_map(rename, tree, is_leaf=is_own)


def _explained(fn: Callable[..., Any], leaves: Any, *args: Any, **extra: Any) -> Any:
    try:
        return fn(leaves, *args, **extra)
    except Exception as error:
        if clearer := _clearer(error, leaves):
            raise clearer from error
        if isinstance(leaves, Mapping):
            error.add_note(f"This is from the transformation of {listed(leaves)}.")
        raise


def _clearer(error: Exception, leaves: Any) -> Exception | None:
    """Returns an error that says what helps, if that is known."""
    if isinstance(error, AttributeError):
        if not isinstance(error.obj, dict) or not isinstance(leaves, Mapping):
            return None
        likely = [p for p in leaves if error.name in p.split(".")] or [*leaves]
        return AttributeError(
            f"The transformation of {listed(leaves)} has a function (a mask, labels) "
            f"that asks the parameters for the attribute {error.name!r}. Within a rule "
            "it is given the rule's own leaves, in an ordered dictionary by path: ask "
            f"for `params[{likely[0]!r}]`, or use `jax.tree.map`."
        )
    # Older releases of JAX do not export the class of errors of promotion.
    is_plain = type(error).__name__ != "TypePromotionError"
    if not (isinstance(error, TypeError | ValueError) and is_plain):
        return None
    frames = inspect.getinnerframes(error.__traceback__, context=0)  # pyright: ignore
    if not any(frame.filename == inspect.getfile(jtu.tree_map) for frame in frames):
        return None
    return ValueError(
        f"The transformation of {listed(leaves)} met trees that do not match. It "
        "sees its own leaves only, in a dictionary by path. Where its "
        "configuration is a tree of the whole model's shape (a mask, labels), or "
        "an extra argument is, give a function of the parameters instead, or such "
        "a dictionary: a `collections.OrderedDict`, or a `dict` if it has one "
        "leaf. A state must come from this transformation's own `init`. JAX says: "
        f"{error}"
    )


def listed(paths: Any) -> str:
    """Names paths in an error: the first few, and how many more there are."""
    return first_names([*paths], "`{}`".format)
