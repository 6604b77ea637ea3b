"""A transformation for each label of a tree of parameters, at linear cost."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, no_type_check

import jax.tree_util as jtu
import optax

from .._boundary import checked, dotted
from .._tree import by_path
from .groups import group_leaves, init_groups, listed, update_groups
from .transform import require_transformation


@checked
def partition(
    transforms: Mapping[Any, Any],
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

    # Known by their code, which a type checker must not wrap.
    @no_type_check
    def init_fn(params: Any) -> optax.transforms.PartitionState:
        names, leaves, _ = named_tree(params)
        if not leaves:
            # Nothing to divide. Optax's `tree_map_params` comes with such a tree, and
            # looks for it in the state.
            states = tuple(tx.init(params) for tx in transforms.values())
        else:
            owners = leaf_owners(param_labels, params, names, transforms)
            states = init_groups(tuple(transforms.values()), owners, names, leaves)
        return _as_state(transforms, states)

    @no_type_check
    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, optax.transforms.PartitionState]:
        states = [state.inner_states[label].inner_state for label in transforms]
        names, leaves, treedef = named_tree(updates)
        if not leaves:
            new_states = []
            for tx, inner in zip(transforms.values(), states, strict=True):
                tx = optax.with_extra_args_support(tx)
                updates, new = tx.update(updates, inner, params, **extra)
                new_states.append(new)
            return updates, _as_state(transforms, new_states)
        owners = leaf_owners(param_labels, updates, names, transforms)
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


def named_tree(tree: Any) -> tuple[tuple[str, ...], list[Any], Any]:
    """Takes a tree apart: names that all differ, leaves, structure."""
    flat, treedef = jtu.tree_flatten_with_path(tree)
    names = tuple(dotted(path) for path, _ in flat)
    if len(set(names)) < len(names):
        names = tuple(jtu.keystr(path) for path, _ in flat)
    return names, [leaf for _, leaf in flat], treedef


def leaf_owners(
    param_labels: Any, tree: Any, names: Sequence[str], transforms: Mapping[Any, Any]
) -> list[int]:
    """Finds the index of the transformation of each leaf."""
    labels = param_labels(tree) if _is_function(param_labels) else param_labels
    flat, treedef = jtu.tree_flatten(labels)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        at = [path for path, _ in by_path(labels)]
        odd = [n for n in names if not any(f"{n}.".startswith(f"{p}.") for p in at)]
        odd += [p for p in at if not any(f"{n}.".startswith(f"{p}.") for n in names)]
        raise ValueError(
            "The labels do not match the tree: give a tree of the same structure, or a "
            f"prefix of it. They differ at {listed(odd)}. JAX says: {error}"
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
            + "; ".join(f"the label {k!r} of {listed(v)}" for k, v in unknown.items())
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
    own_names, leaves, treedef = named_tree(params)
    values = dict(zip(own_names, leaves, strict=True))
    odd = [name for name in names if name not in values]
    wanted = set(names)
    # A whole model comes with leaves that have no gradient, e.g. functions.
    odd += [n for n, v in values.items() if n not in wanted and hasattr(v, "dtype")]
    if odd:
        raise ValueError(
            "The updates and the parameters have different structures: "
            f"{listed(odd)} found in one only."
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
