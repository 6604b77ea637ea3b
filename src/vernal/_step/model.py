"""What may be a model or the state of a loss: checked, and turned into arrays."""

from typing import Any, TypeVar

import jax
import numpy as np
import optax

from .._boundary import (
    PyTree,
    is_deleted,
    narrowed_model,
    refuse_foreign,
    refuse_sparse,
    require_number,
    spelled,
)
from .._pickling import module_of

T = TypeVar("T")

# What a user has at hand that holds a model, by the attribute that tells it.
_HOLDERS = {
    "_progress": ("a trainer", "trainer.model"),
    "stop_reason": ("a result", "result.model"),
    "stop_reasons": ("a result", "result.best"),
}


def checked_model(model: T) -> T:
    """Checks the leaves of a model, and turns those of other libraries into arrays.

    **Raises:**

    - `TypeError`: if an array of it means more than its numbers or has no values, or it
        is a trainer or an optimiser.
    - `ValueError`: if an array of it has been deleted.
    """
    _refuse_optimiser(model)
    if module_of(type(model)).startswith("vernal") or hasattr(model, "_progress"):
        _refuse_holder(model)
    if any(map(_is_odd, jax.tree.leaves(model))):
        flat, structure = jax.tree_util.tree_flatten_with_path(model)
        model = structure.unflatten(
            [_as_array(leaf, spelled("model", keys)) for keys, leaf in flat]
        )
    return narrowed_model(model)


def _refuse_optimiser(model: Any) -> None:
    if isinstance(model, optax.GradientTransformation):
        raise TypeError(
            "`model` is an Optax transformation. Were `model` and `optimiser` "
            "swapped? The model comes first: `Trainer(model, optimiser)`."
        )


def _refuse_holder(model: Any) -> None:
    for attribute, (what, remedy) in _HOLDERS.items():
        if hasattr(model, attribute):
            raise TypeError(
                f"`model` is {what}, `{type(model).__name__}`, rather than the model "
                f"that it holds. Give `{remedy}`."
            )


def _is_odd(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return is_deleted(leaf)
    if isinstance(leaf, np.ndarray):
        return type(leaf) is not np.ndarray or leaf.dtype.type is np.void
    return not isinstance(leaf, type | np.generic | float | int | str)


def _as_array(leaf: Any, where: str) -> Any:
    is_foreign = not isinstance(leaf, jax.Array | np.ndarray | np.generic | type)
    if is_foreign and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    # Arrays of text and of objects are labels, which are static.
    is_label = type(leaf) is np.ndarray and leaf.dtype.kind in "OSU"
    if isinstance(leaf, jax.Array | np.ndarray) and not is_label:
        refuse_foreign(leaf, where)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{where} has no values ({leaf}). Make the trainer within "
            "`eqx.filter_eval_shape`, together with its model."
        )
    refuse_sparse(leaf, where)
    return leaf


def check_state(state: PyTree) -> None:
    """Checks that every leaf of a loss's state is an array or a number."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        require_number(
            leaf,
            spelled("state", keys),
            "Pick the arrays by `eqx.filter(state, eqx.is_array)`.",
        )
