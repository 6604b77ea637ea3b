"""Null directions: which they are, what becomes of them, and their names."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from .._boundary import Params, one_of, whole_number
from .._tree import element_name

OnNull = Literal["drop", "raise", "prior"]


@dataclasses.dataclass(frozen=True)
class NullPolicy:
    """The options `rtol`, `rank` and `on_null` of the constructors of a projector.

    With blocks, `rank` is a mapping from their selectors.
    """

    rtol: float | int | None = None
    rank: Any = None
    on_null: OnNull = "drop"

    def or_rtol(self, default: float) -> "NullPolicy":
        """Returns the policy with a threshold, `default` if none was given."""
        return dataclasses.replace(self, rtol=default) if self.rtol is None else self

    def of_block(self, selector: Any) -> "NullPolicy":
        return dataclasses.replace(self, rank=(self.rank or {}).get(selector))

    def check_rank_kind(self, blocks: Any) -> None:
        """Checks that there is a rank for each block, or one where there are none."""
        is_mapping = isinstance(self.rank, Mapping)
        if self.rank is not None and is_mapping != (blocks is not None):
            raise TypeError(
                "`rank` must be a mapping from the selectors in `blocks` to whole "
                "numbers, or one number where there are no blocks, but it is "
                f"{self.rank!r}."
            )

    def check(self, size: int | None = None) -> None:
        """Checks the options; `rank` only where the number of directions is known."""
        one_of(self.on_null, get_args(OnNull), "on_null")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(
                f"`rtol` must be at least 0 and less than 1, not {self.rtol}: it is a "
                "fraction of the largest eigenvalue."
            )
        if self.rank is None or size is None:
            return
        whole_number(self.rank, "rank", least=1, most=size)
        if self.rank < size and self.on_null == "raise":
            raise ValueError(
                f"`rank={self.rank}` leaves {size - self.rank} null directions, but "
                '`on_null="raise"` allows none. Use `"drop"` or `"prior"`, or leave '
                "`rank` out."
            )


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
