"""A warning of single integers in a model, which are often meant to be fitted."""

import contextlib
import weakref
from typing import Any

import jax
import numpy as np

from .._boundary import PyTree, warn_once
from .._constraints import Ties
from .._optimiser import ParamOptimiser
from .._tree import by_path


def warn_of_integers(
    kind: type, model: PyTree, optimiser: Any, ties: Ties | None
) -> None:
    """Warns, once for a class and what it finds, of integers that nobody holds.

    These are arrays of no dimensions that would be trained if they were floats. Python
    integers, unsigned ones, such as keys, and longer arrays are meant as they are.
    """
    leaves, structure = jax.tree.flatten(model)
    places = [i for i, leaf in enumerate(leaves) if _is_one_integer(leaf)]
    if isinstance(optimiser, ParamOptimiser) and places:
        floats = [np.zeros(()) if i in places else x for i, x in enumerate(leaves)]
        owners: Any = [None] * len(leaves)
        # Rules may refuse these floats, but there are none.
        with contextlib.suppress(ValueError):
            owners = optimiser.owners(structure.unflatten(floats))
        places = [i for i in places if owners[i] is not None]
    tied = () if ties is None else ties.indices
    all_names = by_path(model).names
    names = [all_names[i] for i in places if i not in tied]
    if not names:
        return
    known = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    is_one = len(names) == 1
    warn_once(
        f"`model`: {known} {'is' if is_one else 'are'} not fitted: integers are "
        "constants. To fit one, make it a float, as `jnp.array(70.0)`. To keep one, "
        "make it a Python `int`, or name in `train=` what is fitted.",
        UserWarning,
        of=(warn_of_integers, weakref.ref(kind), tuple(names)),
    )


def _is_one_integer(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    # Not a difference of times, which NumPy takes for a signed integer; the dtype of
    # keys has no kind.
    return is_array and leaf.shape == () and getattr(leaf.dtype, "kind", "") == "i"
