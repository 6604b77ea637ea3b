"""Errors of the model's own elements, from those of free coordinates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree
from .._constraints import Bijections
from .._curvature import column_norms
from .._projection import ROUNDING, DenseWhitening
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
    moved = _without_rounding(bijections, params, moved, whitening.roots)
    scale = column_norms(moved.T).astype(whitening.scale.dtype)
    return dataclasses.replace(
        whitening,
        scale=scale,
        vectors=moved.astype(scale.dtype) / scale[:, None],
        null_vectors=jnp.zeros((scale.size, 0), scale.dtype),
        eigenvalues=jnp.full_like(scale, jnp.nan),
    )


def _without_rounding(
    bijections: Bijections,
    params: PyTree,
    moved: Float[Array, "E D"],
    roots: Float[Array, " D"],
) -> Float[Array, "E D"]:
    """Puts zero where an element of a bijection is moved by rounding alone.

    As are the ones of a matrix of correlations. That is less than the spacing of the
    element itself, and than rounding of what moves most in the same array: an element
    far from zero, or one of a small array beside a large one, may have one of these.
    """
    elements, found, begin = by_path(bijections.forward(params)), [], 0
    for path, leaf in elements.items():
        rows = moved[begin : begin + leaf.size]
        begin += leaf.size
        if path in bijections.maps:
            sizes = jnp.abs(rows) * jnp.abs(roots).astype(rows.dtype)[None, :]
            largest = jnp.max(sizes, axis=0, keepdims=True, initial=0)
            values = jnp.abs(leaf).astype(rows.dtype).reshape(-1, 1)
            noise = ROUNDING * float(jnp.finfo(leaf.dtype).eps)
            is_noise = sizes <= noise * jnp.minimum(values, largest)
            rows = jnp.where(is_noise, 0, rows)
        found.append(rows)
    return jnp.concatenate(found)


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


def with_held(whitening: DenseWhitening, held: Any) -> DenseWhitening:
    """Returns a map along which some of the coordinates do not move."""
    scale = jnp.where(held, 0, whitening.scale)
    return eqx.tree_at(lambda w: w.scale, whitening, scale)


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
