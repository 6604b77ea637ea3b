"""A dictionary of optimisers for a dictionary of parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._boundary import checked, require_numbers
from .partition import partition
from .transform import require_transformation


@checked
def map_optimisers(
    params: Mapping[Any, Any], optimisers: Mapping[Any, Any], strict: bool = False
) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """Gives each entry of a dictionary of parameters its own optimiser.

    **Arguments:**

    - `params`: from names to parameters, each a pytree of numbers and arrays. Integers
        become floats.
    - `optimisers`: from names to Optax transformations. A tuple of names gives each of
        them that transformation. A parameter without an optimiser is frozen; an
        optimiser without a parameter is ignored.
    - `strict`: whether both must have the same names.

    **Returns:**

    The optimiser of the whole dictionary, and its first state.

    **Raises:**

    - `TypeError`: if an optimiser is not an Optax transformation.
    - `ValueError`: if `strict` and the names differ.
    """
    # JAX does not sort a tuple of names beside a name.
    params = _unpacked(params)
    require_numbers(params, "params", "Leave it out.")
    params = jax.tree.map(_as_float, params)
    optimisers = _unpacked(optimisers)
    for name, tx in optimisers.items():
        require_transformation(tx, f"optimisers[{name!r}]")
    without = {
        "an optimiser": [name for name in params if name not in optimisers],
        "a parameter": [name for name in optimisers if name not in params],
    }
    odd = [f"without {x}: {', '.join(map(repr, n))}" for x, n in without.items() if n]
    if strict and odd:
        raise ValueError(
            "With `strict=True` parameters and optimisers must have the same names. "
            f"These are {'; '.join(odd)}."
        )
    transforms = {name: optimisers.get(name, optax.set_to_zero()) for name in params}
    optim = partition(transforms, {name: name for name in params})
    return optim, optim.init(params)


def _unpacked(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """Gives each name of a tuple of names its own entry."""
    return {
        name: value
        for names, value in mapping.items()
        for name in (names if isinstance(names, tuple) else (names,))
    }


def _as_float(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        return jnp.asarray(leaf)
    return jnp.asarray(leaf, float)
