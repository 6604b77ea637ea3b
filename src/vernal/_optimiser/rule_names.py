"""What rules and transformations are called, and the table of both."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from .._tree import aligned, atoms, named_leaves, written
from .transform import Transform

# These wrap other transformations, and say nothing about what those do.
_WRAPPERS = ("chain", "identity", "init_empty_state", "with_extra_args_support")


def rule_name(selector: Any) -> str:
    """Names a rule by its selector, without quotes and brackets."""
    parts = atoms(selector, "rules")
    return ", ".join(x if isinstance(x, str) else written(x) for x in parts)


def rule_table(
    model: Any,
    owners: Sequence[int | None],
    selectors: Sequence[Any],
    transforms: Sequence[optax.GradientTransformation | None],
) -> str:
    """Implements `ParamOptimiser.summary`; `owners` are the rules of the leaves."""
    rows = [("parameter", "shape", "dtype", "rule", "transformation")]
    leaves = [leaf for leaf in named_leaves(model) if leaf.value is not None]
    for leaf, owner in zip(leaves, owners, strict=True):
        rule, name = leaf.unfitted, ""
        if owner is not None:
            rule, name = written(selectors[owner]), _makers(transforms[owner])
        if rule:
            shape = "×".join(map(str, jnp.shape(leaf.value))) or "scalar"
            dtype = getattr(leaf.value, "dtype", None)
            # By its type: an integer may need more bits than there are.
            dtype = dtype or jnp.result_type(type(leaf.value))
            rows.append((leaf.path, shape, str(dtype), rule, name))
    return aligned(rows)


def _makers(tx: Any) -> str:
    """Names the Optax functions that a transformation was made by."""
    if not isinstance(tx, Transform):
        return type(tx).__name__
    names = sorted(tx.closure.skeleton.function_names)
    makers = dict.fromkeys(name.split(".<locals>")[0] for name in names)
    return ", ".join(name for name in makers if name not in _WRAPPERS)
