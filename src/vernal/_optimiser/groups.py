"""One transformation for each group of leaves, over flat lists."""

import functools
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.core import Tracer

from .._closure import Closure, Skeleton
from .transform import AbstractTransform, Transform, window


def group_members(
    owners: Sequence[int | None], number: int
) -> tuple[tuple[int, ...], ...]:
    """Returns the indices of each group's leaves, in order.

    **Arguments:**

    - `owners`: the group of each leaf; `None` for a leaf without one.
    - `number`: how many groups there are.
    """
    members: list[list[int]] = [[] for _ in range(number)]
    for index, owner in enumerate(owners):
        if owner is not None:
            members[owner].append(index)
    return tuple(map(tuple, members))


def init_groups(
    transforms: Sequence[optax.GradientTransformation],
    owners: Sequence[int | None],
    names: Sequence[str],
    leaves: Sequence[Any],
) -> tuple[Any, ...]:
    """Makes the state of each group.

    **Arguments:**

    - `transforms`: one for each group.
    - `owners`: the group of each leaf; `None` for a leaf without one.
    - `names`: of the leaves, each different.
    - `leaves`: the parameters.

    **Returns:**

    One state for each group.
    """
    return tuple(
        _explained(tx.init, group_leaves(members, names, leaves))
        for tx, members in zip(
            transforms, group_members(owners, len(transforms)), strict=True
        )
    )


def update_groups(
    transforms: Sequence[optax.GradientTransformation],
    owners: Sequence[int | None],
    names: Sequence[str],
    updates: Sequence[Any],
    states: Sequence[Any],
    params: Sequence[Any] | None,
    extra_of: Callable[[tuple[int, ...], Sequence[str]], Mapping[str, Any]],
) -> tuple[list[Any], tuple[Any, ...]]:
    """Updates each group by its own transformation.

    **Arguments:**

    - `transforms`, `owners`, `names`: as in `init_groups`.
    - `updates`: the gradient of each leaf.
    - `states`: of each group.
    - `params`: the value of each leaf, or `None`.
    - `extra_of`: the extra arguments of a group, given the indices of its leaves and
        the names of all. Those that are dictionaries by the names of its leaves are
        handed on like the leaves.

    **Returns:**

    The update of each leaf, zero for one without a group, and the new states.
    """
    out = [
        jnp.zeros_like(u) if owner is None else u
        for u, owner in zip(updates, owners, strict=True)
    ]
    new_states = []
    all_members = group_members(owners, len(transforms))
    # Outside a trace there is none to share, and what is compiled has other bits.
    is_traced = any(isinstance(update, Tracer) for update in updates)
    kinds = [
        _kind(tx, [updates[i] for i in members]) if is_traced and members else None
        for tx, members in zip(transforms, all_members, strict=True)
    ]
    frequency = Counter(kind.key for kind in kinds if kind is not None)
    for tx, members, state, kind in zip(
        transforms, all_members, states, kinds, strict=True
    ):
        update = optax.with_extra_args_support(tx).update
        args = (
            group_leaves(members, names, updates),
            state,
            None if params is None else group_leaves(members, names, params),
        )
        extra = _alike(extra_of(members, names), members, names)
        done = None
        if kind is not None:
            shared = kind.shared_update if frequency[kind.key] > 1 else update
            done = _update_nameless(shared, kind, args, extra)
        new, new_state = done or _explained(update, *args, **extra)
        for index in members:
            out[index] = new[names[index]]
        new_states.append(new_state)
    return out, tuple(new_states)


# The functions of these look at no name of a parameter. JAX's caches hash no key of a
# dictionary: a thousand groups of a key each would be a thousand traces of everything
# that Optax calls, each one found among all of the others.
_NAMELESS = ("optax", "jax", "jaxlib", inspect.unwrap(window).__globals__["__name__"])


class _Kind(NamedTuple):
    """A transformation that cannot look at names; groups of one key share a trace."""

    closure: Closure
    words: frozenset[str]
    avals: tuple[Any, ...]

    @property
    def key(self) -> tuple[Skeleton, tuple[Any, ...]]:
        return self.closure.skeleton, self.avals

    def shared_update(self, *args: Any, **extra: Any) -> Any:
        return _shared(self.closure.skeleton)(self.closure.leaves, args, extra)


def _kind(tx: Any, leaves: Sequence[Any]) -> _Kind | None:
    if isinstance(tx, AbstractTransform):
        closure = tx.closure if isinstance(tx, Transform) else None
    else:
        closure = Closure.encode(tx)
    words = None if closure is None else _words(closure.skeleton)
    if closure is None or words is None:
        return None
    avals = tuple((jnp.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
    return _Kind(closure, words, avals)


@functools.lru_cache(maxsize=4096)
def _words(skeleton: Skeleton) -> frozenset[str] | None:
    return skeleton.words() if skeleton.is_made_of(_NAMELESS) else None


@functools.lru_cache(maxsize=4096)
def _shared(skeleton: Skeleton) -> Callable[..., Any]:
    # Inline, so that the program is the one that a trace of each group makes.
    @functools.partial(jax.jit, inline=True)
    def update(leaves: Any, args: Any, extra: Any) -> Any:
        tx = optax.with_extra_args_support(Closure(leaves, skeleton).decode())
        return tx.update(*args, **extra)

    return update


def _update_nameless(
    update: Callable[..., Any],
    kind: _Kind,
    args: tuple[Any, ...],
    extra: Mapping[str, Any],
) -> Any:
    """Updates a group under names that all groups of its size have.

    Returns `None` where it must be done under its own.
    """
    functions = {name for name, arg in extra.items() if callable(arg)}
    if functions & kind.words:
        return None
    extra = {name: arg for name, arg in extra.items() if name not in functions}
    names = tuple(args[0])
    aliases = tuple(map(str, range(len(names))))
    try:
        args, extra = _renamed((args, extra), names, aliases)
        return _renamed(update(*args, **extra), aliases, names)
    except (TypeError, ValueError):
        # Once more, for an error that has the names.
        return None


def _renamed(tree: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    keys = set(old)

    def is_group(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == keys

    def rename(node: Any) -> Any:
        if not is_group(node):
            return node
        return type(node)(zip(new, map(node.__getitem__, old), strict=True))

    return jtu.tree_map(rename, tree, is_leaf=is_group)


def group_leaves(
    members: tuple[int, ...],
    names: Sequence[str],
    leaves: Sequence[Any] | Mapping[int, Any],
) -> dict[str, Any]:
    """Returns the leaves of one group as its transformation sees them, by name.

    **Arguments:**

    - `members`: the indices of the group's leaves.
    - `names`, `leaves`: of all.
    """
    # JAX sorts the keys of a plain dictionary, and a sum over the leaves in another
    # order has other bits. It is the faster by far, though, and one leaf has one order.
    kind = dict if len(members) == 1 else OrderedDict
    return kind((names[i], leaves[i]) for i in members)


def _alike(
    extra: Mapping[str, Any], members: tuple[int, ...], names: Sequence[str]
) -> dict[str, Any]:
    own = {names[i] for i in members}

    def alike(arg: Any) -> Any:
        if isinstance(arg, dict) and arg.keys() == own:
            return group_leaves(members, names, {i: arg[names[i]] for i in members})
        return arg

    return {name: alike(arg) for name, arg in extra.items()}


def _explained(fn: Callable[..., Any], leaves: Any, *args: Any, **extra: Any) -> Any:
    try:
        return fn(leaves, *args, **extra)
    except AttributeError as error:
        if not isinstance(error.obj, dict) or not isinstance(leaves, Mapping):
            raise
        likely = [p for p in leaves if error.name in p.split(".")] or [*leaves]
        raise AttributeError(
            f"The transformation of {listed(leaves)} has a function (a mask, labels) "
            f"that asks the parameters for the attribute {error.name!r}. Within a rule "
            "it is given the rule's own leaves, in an ordered dictionary by path: ask "
            f"for `params[{likely[0]!r}]`, or use `jax.tree.map`."
        ) from error
    except (TypeError, ValueError) as error:
        frames = inspect.getinnerframes(error.__traceback__, context=0)  # pyright: ignore
        if not any(frame.filename == inspect.getfile(jtu.tree_map) for frame in frames):
            raise
        raise ValueError(
            f"The transformation of {listed(leaves)} met trees that do not match. It "
            "sees its own leaves only, in a dictionary by path. Where its "
            "configuration is a tree of the whole model's shape (a mask, labels), or "
            "an extra argument is, give a function of the parameters instead, or such "
            "a dictionary: a `collections.OrderedDict`, or a `dict` if it has one "
            "leaf. A state must come from this transformation's own `init`. JAX says: "
            f"{error}"
        ) from error


def listed(paths: Any) -> str:
    """Names paths in an error: the first few, and how many more there are."""
    paths = list(paths)
    shown = ", ".join(f"`{path}`" for path in paths[:8])
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
