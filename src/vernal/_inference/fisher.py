"""Fisher matrices, and the curvature of a loss."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from .._boundary import one_of
from .._curvature import matmul
from .._data import as_batch
from .._step import AbstractTrainer, bijections_of, defined, in_free_coordinates
from .._tree import as_parameters, paths, ravel_dtype, ravel_size
from .derivatives import Passes, derive, require_finite

FisherKind = Literal["expected", "observed"]
ErrorKind = Literal["expected", "observed", "sandwich"]
Blocks = str | Callable[[str, Any], Any] | Sequence[Any] | Mapping[Any, Any]


def fisher(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    passes: Passes,
    kind: FisherKind | None = None,
) -> Any:
    """Implements `Trainer.fisher`."""
    require_likelihood(trainer, "A Fisher matrix")
    _refuse_resized(trainer, "fisher")
    kind = checked_kind(trainer, kind, FisherKind)
    is_observed = kind == "observed" or "residuals" not in defined(trainer)
    name = "nll" if is_observed else "fisher"
    return matrices(trainer, batch, name, blocks, passes)


def checked_kind(trainer: AbstractTrainer, kind: Any, kinds: Any = ErrorKind) -> Any:
    """Checks the argument `kind`; refuses one that an `nll` alone does not have."""
    if kind is not None:
        one_of(kind, get_args(kinds), "kind")
    if kind in (None, "observed") or "residuals" in defined(trainer):
        return kind
    raise TypeError(
        f'`kind` is "{kind}", which needs what each datum contributes, and '
        f"`{type(trainer).__name__}` defines `nll`, which is the sum. Define "
        "`residuals`; for counts, it may return `vn.likelihoods.Poisson(rate, counts)`."
    )


def curvature(
    trainer: AbstractTrainer, batch: Any, blocks: Blocks | None, passes: Passes
) -> Any:
    """Implements `Trainer.curvature`."""
    _refuse_resized(trainer, "curvature")
    return matrices(trainer, batch, "loss", blocks, passes)


def _refuse_resized(trainer: AbstractTrainer, name: str) -> None:
    """Refuses the matrix of elements that are not free of each other."""
    bijections = bijections_of(trainer)
    if bijections is None:
        return
    free = in_free_coordinates(trainer).params
    for path in bijections.resized(free, trainer.params):
        raise ValueError(
            f"`{name}` is of the elements of the parameters, and those of {path!r} are "
            "not free of each other: its bijection has another number of free "
            "coordinates, and the inverse of the matrix would not be a covariance. "
            "`whiten`, `standard_errors`, `report` and `propagate` use the free "
            "coordinates."
        )


def has_likelihood(trainer: AbstractTrainer) -> bool:
    """Whether a trainer's class defines more than a loss, whose scale is arbitrary."""
    return bool({"residuals", "nll"} & set(defined(trainer)))


def require_likelihood(trainer: AbstractTrainer, what: str) -> None:
    """Refuses to compute `what` from a loss alone."""
    if not has_likelihood(trainer):
        raise TypeError(
            f"{what} needs a likelihood, and `{type(trainer).__name__}` defines only "
            "`loss`: error bars from a mean, or from a sum with a penalty, would be "
            "wrong. Define `residuals` or `nll` beside it. (To whiten the parameters, "
            "`curvature` will do.)"
        )


def require_elements(trainer: AbstractTrainer, what: str) -> None:
    """Refuses to compute `what` of parameters that have no elements."""
    params = as_parameters(trainer.params)
    if not ravel_size(params):
        named = map(repr, paths(params))
        raise ValueError(
            f"{what} is of the elements of the parameters, and those that `train` "
            f"chooses have none: {', '.join(named)}. Train others."
        )


def matrices(
    trainer: AbstractTrainer,
    batch: Any,
    kind: str,
    blocks: Blocks | None,
    passes: Passes,
    holds: bool = False,
) -> Any:
    """Computes the matrix of a `kind` of `derive`, or with blocks one by selector.

    `holds` is as in `derive`.
    """
    selectors, batch = as_selectors(blocks), as_batch(batch)
    if selectors is None and kind == "fisher" and passes.batch_size is None:
        (jac,), is_finite, *_ = derive(trainer, batch, "jacobian", None, passes)
        found = (_gram(jac, ravel_dtype(as_parameters(trainer.params))),)
    else:
        derived = derive(trainer, batch, kind, selectors, passes, holds)
        found, is_finite = derived.found, derived.is_finite
        if kind != "fisher":
            found = tuple(expansion.hessian for expansion in found)
    name = kind if kind in defined(trainer) else "residuals"
    require_finite(found, is_finite, f"The curvature of `{name}`", trainer, batch)
    return by_selector(selectors, found)


@partial(jax.jit, static_argnums=1)
def _gram(jac: Float[Array, "N D"], dtype: np.dtype) -> Float[Array, "D D"]:
    # Residuals of higher precision do not make the parameters more precise.
    return matmul(jac.T, jac).astype(dtype)


def as_selectors(blocks: Blocks | None) -> tuple[Any, ...] | None:
    """Returns a selector for each block, `None` where there are none."""
    if blocks is None:
        return None
    if isinstance(blocks, str) or callable(blocks):
        return (blocks,)
    is_optimiser = isinstance(blocks, optax.GradientTransformation)
    if not isinstance(blocks, Sequence | Mapping) or is_optimiser or not blocks:
        raise TypeError(
            f"`blocks` is {blocks!r}, but must be a sequence of selectors, one for "
            'each matrix: `("position", "flux")`; `vn.paths(trainer.params)` gives '
            "each parameter its own, the rules of a ParamOptimiser each rule."
        )
    return tuple(tuple(b) if isinstance(b, list) else b for b in blocks)


def by_selector(selectors: tuple[Any, ...] | None, found: Sequence[Any]) -> Any:
    """Returns what was found for each block as a dictionary; without blocks, alone."""
    if selectors is None:
        return found[0]
    return OrderedDict(zip(selectors, found, strict=True))
