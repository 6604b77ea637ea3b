"""A model, or the state of a loss, given by a user: checked, and made arrays."""

from typing import Any, TypeVar

import jax
import numpy as np
import optax

from .._boundary import (
    PyTree,
    is_deleted,
    is_explicit,
    narrowed_leaves,
    refuse_foreign,
    require_numbers,
    spelled,
    without_axes,
)
from .._pickling import module_of
from .abstract_trainer import AbstractTrainer

T = TypeVar("T")

# What else may be given instead of a model, by an attribute, and where it has one.
_HOLDERS = {
    "stop_reason": ("a result", "result.model"),
    "stop_reasons": ("a result", "result.best"),
}


def checked_model(model: T) -> T:
    """Checks the leaves of a model, and turns those of other libraries into arrays.

    Raises if an array means more than its numbers, has no values or has been deleted,
    or if the model is a trainer, a result or an optimiser.
    """
    if isinstance(model, optax.GradientTransformation):
        raise TypeError(
            "`model` is an Optax transformation. Were `model` and `optimiser` "
            "swapped? The model comes first: `Trainer(model, optimiser)`."
        )
    if found := _holder(model):
        what, remedy = found
        raise TypeError(
            f"`model` is {what}, `{type(model).__name__}`, rather than the model that "
            f"it holds. Give `{remedy}`."
        )
    if any(map(_is_odd, jax.tree.leaves(model))):
        convert = lambda keys, leaf: _as_array(leaf, spelled("model", keys))
        model = jax.tree_util.tree_map_with_path(convert, model)
    return narrowed_leaves(model, "model")


def _holder(model: Any) -> tuple[str, str] | None:
    """Says what else than a model it is, by its type: a `__getattr__` may raise."""
    if isinstance(model, AbstractTrainer):
        return "a trainer", "trainer.model"
    if module_of(type(model)).split(".")[0] != "vernal":
        return None
    return next((_HOLDERS[name] for name in _HOLDERS if hasattr(model, name)), None)


def _is_odd(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return is_deleted(leaf) or is_explicit(leaf)
    if isinstance(leaf, np.ndarray):
        return type(leaf) is not np.ndarray or leaf.dtype.type is np.void
    return not isinstance(leaf, type | np.generic | float | int | str)


def _as_array(leaf: Any, where: str) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{where} has no values ({leaf}). Make the trainer within "
            "`eqx.filter_eval_shape`, together with its model."
        )
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | type)
    if not is_array and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    # Arrays of text and of objects are labels, which are static.
    if not (type(leaf) is np.ndarray and leaf.dtype.kind in "OSU"):
        refuse_foreign(leaf, where)
    return without_axes(leaf) if is_explicit(leaf) else leaf


def check_state(state: PyTree) -> None:
    """Checks the leaves of a loss's state: arrays or numbers, which JAX can hold."""
    remedy = "Pick the arrays by `eqx.filter(state, eqx.is_array)`."
    require_numbers(state, "state", remedy)
    # For its warnings alone.
    narrowed_leaves(state, "state")
