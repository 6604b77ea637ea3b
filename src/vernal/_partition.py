"""Groups of leaves, each with a transformation of its own, at linear cost."""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optax

from ._paths import dotted
from ._transform import require_transformation

# The mechanism: flat leaves, each with the index of the group that owns it.


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
            f"The transformation of {_listed(leaves)} met trees that do not match. It "
            "sees its own leaves only, in a dictionary by path. Where its "
            "configuration is a tree of the whole model's shape (a mask, labels), or "
            "an extra argument is, give a function of the parameters instead, or such "
            "a dictionary: a `collections.OrderedDict`, or a `dict` if it has one "
            "leaf. A state must come from this transformation's own `init`. JAX says: "
            f"{error}"
        ) from error


def _listed(paths: Any) -> str:
    paths = list(paths)
    shown = ", ".join(f"`{path}`" for path in paths[:8])
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


# The same, for a tree and a tree of labels.


def partition(
    transforms: Mapping[Any, optax.GradientTransformation],
    param_labels: Any,
    *,
    mask_compatible_extra_args: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gives each label's parameters a transformation of their own.

    As `optax.partition`, with the same updates to the last bit, at a cost that grows
    with the number of parameters and not with its square.

    Inside, a transformation sees the parameters of its own label only, in a dictionary
    by dotted path, e.g. `layers.0.weight`: a `collections.OrderedDict`, or a `dict` if
    there is but one. A mask given as a function of the parameters is called with that,
    so that a function that asks for the path of a leaf meets one key, the dotted path.

    **Arguments:**

    - `transforms`: from labels to Optax transformations.
    - `param_labels`: a tree of labels, of the structure of the parameters or a prefix
        of it; or a function that makes one of the parameters. A module is a tree, even
        if it can be called.
    - `mask_compatible_extra_args`: whether a transformation is given its own leaves
        only of each extra argument that has the structure of the updates.

    **Returns:**

    An Optax transformation. Its state is an `optax.transforms.PartitionState`. An extra
    argument `value_fn` becomes, for each label, a function of its own parameters, the
    others held at their values.

    **Raises:**

    `TypeError` if one of `transforms` is no Optax transformation. When it is used:
    `ValueError` if a label has no transformation, or trees do not match.
    """
    transforms = {
        label: require_transformation(tx, f"transforms[{label!r}]")
        for label, tx in transforms.items()
    }

    def init_fn(params: Any) -> optax.transforms.PartitionState:
        names, leaves, _ = _named_leaves(params)
        if not leaves:
            # Nothing to divide. Optax's `tree_map_params` comes with such a tree, and
            # looks for it in the state.
            states = tuple(tx.init(params) for tx in transforms.values())
        else:
            owners = _owners(param_labels, params, names, transforms)
            states = init_groups(tuple(transforms.values()), owners, names, leaves)
        return _as_state(transforms, states)

    def update_fn(
        updates: Any,
        state: optax.transforms.PartitionState,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, optax.transforms.PartitionState]:
        inner_states: Any = state.inner_states
        states = [inner_states[label].inner_state for label in transforms]
        names, leaves, treedef = _named_leaves(updates)
        if not leaves:
            new_states = []
            for tx, inner in zip(transforms.values(), states, strict=True):
                tx = optax.with_extra_args_support(tx)
                updates, new = tx.update(updates, inner, params, **extra)
                new_states.append(new)
            return updates, _as_state(transforms, new_states)
        owners = _owners(param_labels, updates, names, transforms)
        values, fill = None, None
        if params is not None:
            values, fill = _aligned(params, names)

        def extra_of(members: tuple[int, ...], names: Sequence[str]) -> dict[str, Any]:
            given = dict(extra)
            # What had the structure of the updates, and is given whole, must have it
            # still where a transformation owns every leaf.
            if mask_compatible_extra_args or len(members) == len(names):
                for name, arg in extra.items():
                    # A bare array's structure is that of any scalar.
                    bare = jtu.treedef_is_leaf(treedef) and name != "grad"
                    if not bare and jtu.tree_structure(arg) == treedef:
                        given[name] = group_leaves(members, names, jtu.tree_leaves(arg))
            value_fn = extra.get("value_fn")
            if callable(value_fn) and fill is not None:
                given["value_fn"] = _within(value_fn, fill, members, names)
            return given

        new_updates, new_states = update_groups(
            tuple(transforms.values()), owners, names, leaves, states, values, extra_of
        )
        return treedef.unflatten(new_updates), _as_state(transforms, new_states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_state(
    labels: Mapping[Any, Any], states: Sequence[Any]
) -> optax.transforms.PartitionState:
    inner = map(optax.MaskedState, states)
    return optax.transforms.PartitionState(dict(zip(labels, inner, strict=True)))


def _named_leaves(tree: Any) -> tuple[tuple[str, ...], list[Any], Any]:
    flat, treedef = jtu.tree_flatten_with_path(tree)
    names = tuple(dotted(path) for path, _ in flat)
    if len(set(names)) < len(names):
        names = tuple(jtu.keystr(path) for path, _ in flat)
    return names, [leaf for _, leaf in flat], treedef


def _owners(
    param_labels: Any, tree: Any, names: Sequence[str], transforms: Mapping[Any, Any]
) -> list[int]:
    labels = param_labels(tree) if _is_function(param_labels) else param_labels
    flat, treedef = jtu.tree_flatten(labels)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        at = [dotted(path) for path, _ in jtu.tree_flatten_with_path(labels)[0]]
        odd = [n for n in names if not any(f"{n}.".startswith(f"{p}.") for p in at)]
        odd += [p for p in at if not any(f"{n}.".startswith(f"{p}.") for n in names)]
        raise ValueError(
            "The labels do not match the tree: give a tree of the same structure, or a "
            f"prefix of it. They differ at {_listed(odd)}. JAX says: {error}"
        ) from error
    spread = [
        label
        for label, subtree in zip(flat, subtrees, strict=True)
        for _ in range(jtu.tree_structure(subtree).num_leaves)
    ]
    index: dict[Hashable, int] = {label: i for i, label in enumerate(transforms)}
    unknown: dict[Any, list[str]] = {}
    for name, label in zip(names, spread, strict=True):
        if label not in index:
            unknown.setdefault(label, []).append(name)
    if unknown:
        raise ValueError(
            "There is no transformation for "
            + "; ".join(f"the label {k!r} of {_listed(v)}" for k, v in unknown.items())
            + f". The known labels are {', '.join(map(repr, transforms))}."
        )
    return [index[label] for label in spread]


def _is_function(param_labels: Any) -> bool:
    # A callable module is a tree of labels; a method or a partial application of a
    # function is a pytree as well, and yet is meant to be called.
    return callable(param_labels) and (
        jtu.treedef_is_leaf(jtu.tree_structure(param_labels))
        or isinstance(param_labels, functools.partial)
        or hasattr(param_labels, "__func__")
    )


def _aligned(
    params: Any, names: Sequence[str]
) -> tuple[list[Any], Callable[[Mapping[str, Any]], Any]]:
    """The parameters by the updates' names, and the whole tree around new ones."""
    own_names, leaves, treedef = _named_leaves(params)
    values = dict(zip(own_names, leaves, strict=True))
    odd = [name for name in names if name not in values]
    wanted = set(names)
    # A whole model comes with leaves that have no gradient, e.g. functions.
    odd += [n for n, v in values.items() if n not in wanted and hasattr(v, "dtype")]
    if odd:
        raise ValueError(
            "The updates and the parameters have different structures: "
            f"{_listed(odd)} found in one only."
        )

    def fill(own: Mapping[str, Any]) -> Any:
        return treedef.unflatten([own.get(n, v) for n, v in values.items()])

    return [values[name] for name in names], fill


def _within(
    value_fn: Callable[..., Any],
    fill: Callable[[Mapping[str, Any]], Any],
    members: tuple[int, ...],
    names: Sequence[str],
) -> Callable[..., Any]:
    # A line search passes on the arguments that it finds in the function's signature.
    @functools.wraps(value_fn)
    def within(own: Any, *args: Any, **kwargs: Any) -> Any:
        return value_fn(fill(own), *args, **kwargs)

    return within
