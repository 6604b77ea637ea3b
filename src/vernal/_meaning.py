"""Arrays that mean more than the numbers in them."""

from typing import Any

import numpy as np


def refuse_meaning(leaf: Any, where: str, loss: str) -> None:
    """Refuses arrays that mean more than the numbers which would be taken of them.

    **Arguments:**

    - `leaf`: anything.
    - `where`: how the error begins, such as "`batch` has the leaf 'x',".
    - `loss`: what would become of a mask, such as "JAX would compute with what is
        masked".
    """
    if isinstance(leaf, np.ma.MaskedArray):
        remedy = (
            "Leave those data out (`y.compressed()`, and `x[~y.mask]` of all else), or "
            "give them no weight: `y.filled(0)` with an infinite sigma."
            if np.ma.is_masked(leaf)
            else "Nothing is masked in this one: give `y.data`."
        )
        raise TypeError(f"{where} a masked array, and {loss}. {remedy}")
    if isinstance(leaf, np.ndarray) and type(leaf) not in (np.ndarray, np.memmap):
        unit = " (of a Quantity, `x.to_value(unit)`)" if hasattr(leaf, "unit") else ""
        raise TypeError(
            f"{where} a {type(leaf).__name__}, an array that means more than its "
            f"numbers, and the rest would be dropped. Give the numbers: "
            f"`numpy.asarray(x)`{unit}."
        )
