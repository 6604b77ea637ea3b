"""One transformation for each group of leaves, over flat lists."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optax


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
    for tx, members, state in zip(transforms, all_members, states, strict=True):
        new, new_state = _explained(
            optax.with_extra_args_support(tx).update,
            group_leaves(members, names, updates),
            state,
            None if params is None else group_leaves(members, names, params),
            **_alike(extra_of(members, names), members, names),
        )
        for index in members:
            out[index] = new[names[index]]
        new_states.append(new_state)
    return out, tuple(new_states)


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
