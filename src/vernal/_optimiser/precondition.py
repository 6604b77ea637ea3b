"""Natural gradients inside Optax: `precondition`."""

from itertools import zip_longest
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax

from .._boundary import require_numbers
from .._projection import EigenProjector
from .._tree import by_path


def precondition(
    projector: EigenProjector | Any,
) -> optax.GradientTransformation:
    r"""Preconditions gradients by a Fisher matrix: natural gradient descent.

    $$g \mapsto P P^\top g$$

    where $P P^\top = F^{-1}$ for a projector of a Fisher matrix $F$ of full rank. As
    the `first` of a [`vernal.ParamOptimiser`][] it gives natural gradients, with one
    rate for each parameter:

    ```python
    vn.ParamOptimiser(
        {"position": optax.sgd(0.5), "flux": optax.sgd(1.0)},
        first=vn.precondition(projector),
    )
    ```

    See Amari, *Natural gradient works efficiently in learning*, Neural Computation 10
    (1998).

    **Arguments:**

    - `projector`: a [`vernal.EigenProjector`][] of the parameters; or a tree like them,
        whose entries scale the gradients.

    **Returns:**

    An Optax transformation without a state.
    """
    is_projector = isinstance(projector, EigenProjector)
    like = projector.origin if is_projector else projector
    remedy = "Give an EigenProjector, or a tree of scales like the parameters."
    if not jax.tree.leaves(like):
        raise ValueError(f"`projector` holds no array. {remedy}")
    if not is_projector:
        require_numbers(projector, "projector", remedy)

    # Known by its code, which a type checker must not wrap.
    @no_type_check
    def update(updates: Any, params: Any) -> Any:
        _check(updates, like)
        grads, structure = jax.tree.flatten(updates)
        own = jax.tree.structure(like).unflatten(grads)
        if is_projector:
            new = projector.precondition(own)
        else:
            new = jax.tree.map(lambda g, s: (g * s).astype(g.dtype), own, projector)
        return structure.unflatten(jax.tree.leaves(new))

    return optax.stateless(update)


def _check(updates: Any, like: Any) -> None:
    """Compares leaf by leaf: inside an optimiser a tree is a dictionary by path."""
    found, own = (
        [f"{name!r} of shape {jnp.shape(leaf)}" for name, leaf in by_path(tree).items()]
        for tree in (updates, like)
    )
    for gradient, parameter in zip_longest(found, own, fillvalue="nothing more"):
        if gradient != parameter:
            raise ValueError(
                f"`precondition` was made for {parameter} where the gradients have "
                f"{gradient}. Make it from the parameters that are trained, in the "
                "same order."
            )
