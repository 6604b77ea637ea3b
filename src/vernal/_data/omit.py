"""Leaving out data that are not finite."""

import dataclasses
from typing import TypeVar, cast, final

import jax
import numpy as np
from jaxtyping import Array, Bool

from .._boundary import entrance, refuse_program, spelled_leaves
from .._tree import is_inexact, is_key
from .batch import as_batch

BatchT = TypeVar("BatchT")


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Omitted:
    """What [`vernal.omit`][] left out. It prints as a sentence.

    - `kept`: which data were kept, as booleans.
    - `by_leaf`: how many data are not finite, by leaf of the batch; a datum may count
        in several.
    """

    kept: Bool[np.ndarray, " data"]
    by_leaf: dict[str, int]

    @property
    def count(self) -> int:
        """The number of data that were left out."""
        return int(np.count_nonzero(~self.kept))

    def __str__(self) -> str:
        if not self.count:
            return f"Left out none of {self.kept.size} data."
        where = ", ".join(f"{count} in {name}" for name, count in self.by_leaf.items())
        return (
            f"Left out {self.count} of {self.kept.size} data, the first at "
            f"[{np.argmin(self.kept)}]. Not finite: {where}."
        )


@entrance
def omit(batch: BatchT) -> tuple[BatchT, Omitted]:
    """Leaves out each datum that has a number which is not finite, in any array.

    ```python
    data, omitted = vn.omit((time, flux, error))
    print(omitted)
    ```

    A datum is one index of the first axis; of a symmetric matrix with a row and a
    column for each datum, such as their covariance, of both axes: there, a datum whose
    variance is not finite goes first. Where an array must keep its shape, as an
    image, or the members of [`vernal.fit_many`][], mask what is missing instead: see
    `where` of [`vernal.likelihoods.Gaussian`][].

    **Arguments:**

    - `batch`: a pytree of arrays whose first axes have one length. Leaves that are not
        arrays, and arrays without an axis, stay as they are.

    **Returns:**

    The batch with the data that are left, as JAX's arrays, and what was left out:
    `count`, their number; `kept`, a mask; `by_leaf`, how many are not finite in each
    array.

    **Raises:**

    - `ValueError`: if the first axes differ in length, nothing is left, or a number
        that belongs to no datum is not finite.
    - `TypeError`: for [`vernal.Minibatches`][] and [`vernal.Stream`][]: leave data out
        of the arrays before.
    """
    refuse_program("omit", batch)
    arrays = cast(BatchT, as_batch(batch))
    named = {
        name: leaf
        for name, leaf in spelled_leaves("batch", arrays)
        if isinstance(leaf, jax.Array)
    }
    kept, by_leaf = np.ones(_data_count(named), bool), {}
    for name, leaf in named.items():
        if not is_inexact(leaf):
            continue
        is_finite = np.isfinite(np.asarray(leaf))
        if not leaf.ndim and not is_finite:
            raise ValueError(f"{name} is {leaf}, and belongs to no datum.")
        if not is_finite.all() and _is_of_pairs(leaf):
            # The column of a datum that goes says nothing of the others.
            own = is_finite.diagonal()
            is_finite = is_finite[:, own] & own[:, None]
        is_finite = is_finite.all(axis=tuple(range(1, leaf.ndim)))
        kept &= is_finite
        if not is_finite.all():
            by_leaf[name] = int(np.count_nonzero(~is_finite))
    omitted = Omitted(kept, by_leaf)
    if not kept.any():
        raise ValueError(f"`batch` has no finite datum. {omitted}")
    is_of_data = lambda leaf: isinstance(leaf, jax.Array) and leaf.ndim > 0
    rows = np.flatnonzero(kept)

    def left(leaf: Array) -> Array:
        if kept.all():
            return leaf
        return leaf[rows][:, rows] if _is_of_pairs(leaf) else leaf[rows]

    of_kept = lambda leaf, given: left(leaf) if is_of_data(leaf) else given
    return jax.tree.map(of_kept, arrays, batch), omitted


def _is_of_pairs(leaf: Array) -> bool:
    """Whether an array is a symmetric matrix, as a covariance of the data is.

    Its variances are positive, and no correlation is one, as in a constant array.
    """
    is_square = leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1]
    if not is_square or is_key(leaf) or leaf.dtype == bool:
        return False
    matrix = np.asarray(leaf)
    scale = np.max(np.abs(matrix), initial=0, where=np.isfinite(matrix))
    # It may be rounded.
    if not np.allclose(matrix, matrix.conj().T, 0, 1e-6 * scale, equal_nan=True):
        return False
    variances = np.real(np.diagonal(matrix))
    is_known = np.isfinite(variances)
    roots = np.sqrt(np.where(is_known & (variances > 0), variances, np.nan))
    correlations = np.abs(matrix) / roots[:, None] / roots[None, :]
    is_one = (correlations >= 1) & ~np.eye(len(matrix), dtype=bool)
    return not is_one.any() and bool(np.all(variances[is_known] > 0))


def _data_count(named: dict[str, Array]) -> int:
    """Returns the length of the first axis, which all arrays must share."""
    lengths = {name: len(leaf) for name, leaf in named.items() if leaf.ndim}
    if len(set(lengths.values())) == 1:
        return next(iter(lengths.values()))
    found = ", ".join(f"{length} in {name}" for name, length in lengths.items())
    raise ValueError(
        "A datum is one index of the first axis, whose length all arrays must share. "
        + (f"It is {found}." if found else "`batch` has no array with an axis.")
    )
