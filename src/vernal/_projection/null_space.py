"""Names of directions in the space of parameters."""

from collections.abc import Iterable, Mapping

import numpy as np

from .._boundary import Params
from .._tree import element_name


def name_direction(
    params: Params, direction: np.ndarray, least: float
) -> dict[str, float]:
    """Maps the names of elements to their weights in `direction`, if above `least`.

    The largest weight comes first, and is positive.
    """
    order = np.argsort(-abs(direction), kind="stable")
    sign = np.sign(direction[order[0]])
    return {
        element_name(params, int(index)): float(sign * direction[index])
        for index in order
        if abs(direction[index]) > least
    }


def list_parameters(params: Params, direction: np.ndarray) -> str:
    """Lists the names of the elements with the largest weights, at most ten."""
    vector = direction.astype(float)
    names = list(name_direction(params, vector, 0.1 * float(np.max(abs(vector)))))
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def written_directions(directions: Iterable[Mapping[str, float]]) -> str:
    """Writes directions in an error, each as the weights of its elements."""
    return "; ".join(
        " and ".join(f"{name} ({weight:+.3g})" for name, weight in direction.items())
        for direction in directions
    )


def name_null_space(
    params: Params, null_vectors: np.ndarray, least: float
) -> tuple[dict[str, float], ...]:
    """Names a sparse basis of the space that the columns of `null_vectors` span."""
    basis = _sparse_basis(null_vectors.T.astype(float))
    return tuple(name_direction(params, vector, least) for vector in basis)


def _sparse_basis(rows: np.ndarray) -> np.ndarray:
    """Combines rows so that each has a column where the others are 0 (Gauss–Jordan)."""
    basis = rows.copy()
    for step in range(len(basis)):
        rest = abs(basis[step:])
        row, column = np.unravel_index(np.argmax(rest), rest.shape)
        basis[[step, step + row]] = basis[[step + row, step]]
        basis[step] /= basis[step, column]
        others = np.arange(len(basis)) != step
        basis[others] -= np.outer(basis[others, column], basis[step])
    return basis / np.linalg.norm(basis, axis=1, keepdims=True)
