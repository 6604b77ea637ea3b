"""A transformation for each label of a tree of parameters, at linear cost."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, no_type_check

import jax.tree_util as jtu
import optax

from .._boundary import checked
from .._tree import NamedTree, by_path, uniquely_named
from .groups import Group, listed, make_groups, update_groups
from .transform import require_transformation


@checked
def partition(
    transforms: Mapping[Any, Any],
    param_labels: Any,
    *,
    mask_compatible_extra_args: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Gives the parameters of each label their own transformation.

    The updates are those of `optax.partition`, to the last bit. The cost grows with the
    number of parameters, and not with its square.

    A transformation sees only the parameters of its own label, in a dictionary by
    dotted path, e.g. `layers.0.weight`: a `collections.OrderedDict`, or a `dict` if
    there is only one. A mask that is a function of the parameters is called with this
    dictionary: in it, the path of a leaf is one key, the dotted path.

    **Arguments:**

    - `transforms`: from labels to Optax transformations.
    - `param_labels`: a tree of labels, of the structure of the parameters or a prefix
        of it; or a function from the parameters to such a tree. A module is a tree,
        even if it can be called.
    - `mask_compatible_extra_args`: whether a transformation is given only its own
        leaves of each extra argument that has the structure of the updates.

    **Returns:**

    An Optax transformation. Its state is an `optax.transforms.PartitionState`. An extra
    argument `value_fn` becomes, for each label, a function of its own parameters, the
    others held at their values.

    **Raises:**

    - `TypeError`: if one of `transforms` is not an Optax transformation.
    - `ValueError`: when it is used, if a label has no transformation, or if trees do
        not match.
    """
    transforms = {
        label: require_transformation(tx, f"transforms[{label!r}]")
        for label, tx in transforms.items()
    }

    # Known by their code, which a type checker must not wrap.
    @no_type_check
    def init_fn(params: Any) -> optax.transforms.PartitionState:
        tree = uniquely_named(params)
        if not tree.leaves:
            # `optax.tree_map_params` gives such a tree, and looks for it in the state.
            states = [tx.init(params) for tx in transforms.values()]
        else:
            leaves = tree.by_name()
            groups = partition_groups(transforms, param_labels, params, tree.names)
            states = [group.init(leaves) for group in groups]
        return _as_state(transforms, states)

    @no_type_check
    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, optax.transforms.PartitionState]:
        names, leaves, structure = tree = uniquely_named(updates)
        if not leaves:
            new_states = []
            for label, tx in transforms.items():
                tx = optax.with_extra_args_support(tx)
                inner = state.inner_states[label].inner_state
                updates, new = tx.update(updates, inner, params, **extra)
                new_states.append(new)
            return updates, _as_state(transforms, new_states)
        groups = partition_groups(transforms, param_labels, updates, names, state)
        given, values = dict(extra), None
        if params is not None:
            whole = uniquely_named(params)
            values = _aligned(whole, names)
            if callable(value_fn := extra.get("value_fn")):
                given["value_fn"] = whole.within(value_fn)
        # A bare array's structure is that of any scalar.
        is_bare = jtu.treedef_is_leaf(structure)
        alike = {
            name: dict(zip(names, jtu.tree_leaves(arg), strict=True))
            for name, arg in given.items()
            if (name == "grad" or not is_bare) and jtu.tree_structure(arg) == structure
        }

        def extra_of(members: Sequence[str]) -> dict[str, Any]:
            # Where a transformation owns every leaf, what has the structure of the
            # updates must keep it.
            if not mask_compatible_extra_args and len(members) < len(names):
                return given
            own = {k: {n: arg[n] for n in members} for k, arg in alike.items()}
            return given | own

        new, states = update_groups(groups, tree.by_name(), values, extra_of)
        updates = structure.unflatten([new[name] for name in names])
        return updates, _as_state(transforms, states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_state(
    labels: Mapping[Any, Any], states: Sequence[Any]
) -> optax.transforms.PartitionState:
    inner = map(optax.MaskedState, states)
    return optax.transforms.PartitionState(dict(zip(labels, inner, strict=True)))


def partition_groups(
    transforms: Mapping[Any, optax.GradientTransformation],
    param_labels: Any,
    tree: Any,
    names: Sequence[str],
    state: Any = None,
) -> list[Group]:
    """Makes the groups of a partition of `tree`, whose leaves have these names."""
    labels = _leaf_labels(param_labels, tree, names)
    index: dict[Hashable, int] = {label: i for i, label in enumerate(transforms)}
    unknown: dict[Any, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        if label not in index:
            unknown.setdefault(label, []).append(name)
    if unknown:
        raise ValueError(
            "There is no transformation for "
            + "; ".join(f"the label {k!r} of {listed(v)}" for k, v in unknown.items())
            + f". The known labels are {', '.join(map(repr, transforms))}."
        )
    states = None
    if state is not None:
        states = [state.inner_states[label].inner_state for label in transforms]
    owners = [index[label] for label in labels]
    return make_groups(tuple(transforms.values()), owners, names, states)


def _leaf_labels(param_labels: Any, tree: Any, names: Sequence[str]) -> list[Any]:
    labels = param_labels(tree) if _is_function(param_labels) else param_labels
    flat, treedef = jtu.tree_flatten(labels)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        at = by_path(labels).names
        odd = [n for n in names if not any(f"{n}.".startswith(f"{p}.") for p in at)]
        odd += [p for p in at if not any(f"{n}.".startswith(f"{p}.") for n in names)]
        raise ValueError(
            "The labels do not match the tree: give a tree of the same structure, or a "
            f"prefix of it. They differ at {listed(odd)}. JAX says: {error}"
        ) from error
    return [
        label
        for label, subtree in zip(flat, subtrees, strict=True)
        for _ in range(jtu.tree_structure(subtree).num_leaves)
    ]


def _is_function(param_labels: Any) -> bool:
    # A callable module is a tree of labels. A method and a partial application are
    # pytrees too, but are called.
    return callable(param_labels) and (
        jtu.treedef_is_leaf(jtu.tree_structure(param_labels))
        or isinstance(param_labels, functools.partial)
        or hasattr(param_labels, "__func__")
    )


def _aligned(params: NamedTree, names: Sequence[str]) -> dict[str, Any]:
    """Returns the parameters by name, if they match the updates."""
    values, wanted = params.by_name(), set(names)
    odd = [name for name in names if name not in values]
    # A whole model has leaves without a gradient, e.g. functions.
    odd += [n for n, v in values.items() if n not in wanted and hasattr(v, "dtype")]
    if odd:
        raise ValueError(
            "The updates and the parameters have different structures: "
            f"{listed(odd)} found in one only."
        )
    return values
