"""Errors of the model's own elements, from those of free coordinates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._boundary import PyTree
from .._constraints import Bijections
from .._curvature import column_norms
from .._projection import DenseWhitening
from .._step import AbstractTrainer, template_of, tied_words
from .._tree import as_parameters, by_path, ravel, unravel


def elements_of(trainer: AbstractTrainer) -> PyTree:
    """Returns the model's own parameters; those of the trainer are free coordinates."""
    bijections = template_of(trainer).bijections
    if bijections is None:
        return trainer.params
    return bijections.forward(trainer.params)


def whitening_of_elements(
    trainer: AbstractTrainer, whitening: DenseWhitening
) -> DenseWhitening:
    """Returns a map like that of the free coordinates to the model's own elements.

    It knows the errors and the correlations of the elements. Its vectors are not
    orthonormal: there may be more elements than coordinates.
    """
    bijections = template_of(trainer).bijections
    if bijections is None:
        return whitening
    return _pushed(bijections, as_parameters(trainer.params), whitening)


@eqx.filter_jit
def _pushed(
    bijections: Bijections, params: PyTree, whitening: DenseWhitening
) -> DenseWhitening:
    flat = ravel(params)
    elements = lambda flat: ravel(bijections.forward(unravel(flat, params)))
    _, push = jax.linearize(elements, flat)
    columns = whitening.scale[:, None] * whitening.vectors
    moved = jax.vmap(push, in_axes=1, out_axes=1)(columns.astype(flat.dtype))
    scale = column_norms(moved.T).astype(whitening.scale.dtype)
    return dataclasses.replace(
        whitening,
        scale=scale,
        vectors=moved.astype(scale.dtype) / scale[:, None],
        null_vectors=jnp.zeros((scale.size, 0), scale.dtype),
        eigenvalues=jnp.full_like(scale, jnp.nan),
    )


def held_elements(
    trainer: AbstractTrainer, held: Bool[Array | np.ndarray, " D"]
) -> Bool[Array | np.ndarray, " E"]:
    """Returns which elements are held at their bounds, given which coordinates are."""
    bijections, free = template_of(trainer).bijections, trainer.params
    if bijections is None:
        return held
    elements = jax.eval_shape(bijections.forward, free)
    sizes = [leaf.size for leaf in jax.tree.leaves(free)]
    flags = jnp.split(jnp.asarray(held), np.cumsum(sizes)[:-1])
    pairs = zip(by_path(elements).items(), flags, strict=True)
    # What has a bijection has no bound.
    none = lambda x: jnp.zeros(x.size, bool)
    return jnp.concatenate(
        [none(x) if path in bijections.maps else own for (path, x), own in pairs]
    )


def tied_of(
    trainer: AbstractTrainer, model: Any
) -> Callable[[Any], dict[str, Array]] | None:
    """Returns a function of the model: its tied parameters that have standard errors.

    Complex ones have none. `None` if there are no others.
    """
    leaves = by_path(model).by_name()
    names = [p for p in tied_words(trainer) if not jnp.iscomplexobj(leaves[p])]
    of_model = lambda model: {p: by_path(model).by_name()[p] for p in names}
    return of_model if names else None


def scaled(errors: Any, scale: Any) -> np.ndarray:
    """Multiplies errors, on the host: without scatter, infinite ones stay infinite."""
    known = np.asarray(errors)
    is_known = np.isfinite(known)
    finite = np.asarray(scale, known.dtype) * np.where(is_known, known, 0)
    return np.where(is_known, finite, known)
