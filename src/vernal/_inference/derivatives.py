"""Derivatives of what a trainer fits, with respect to blocks of its parameters."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from .._boundary import is_traced, one_of
from .._constraints import flat_flags, held_at
from .._curvature import (
    Expansion,
    Mode,
    Subject,
    checked_batch_size,
    checked_mode,
    expansion_of,
    gauss_newton_matrix,
    jacobian_of,
    matmul,
    spectrum_of,
    traced,
)
from .._data import as_batch
from .._minimum import minimised, underflows
from .._policy import all_finite
from .._program import program
from .._projection import Block, find_blocks
from .._step import (
    AbstractTrainer,
    DataKind,
    bijections_of,
    bounds_of,
    defined,
    diagnosed,
    in_free_coordinates,
    live,
    negative_log_likelihood,
    prior_count,
    prior_rows,
    pushed,
    real_residuals,
    real_residuals_and_kind,
    score,
    scoring_residuals,
    step_key,
    stripped,
)
from .._tree import as_parameters, by_path, paths, ravel_dtype, ravel_size

# Kinds of derivatives: what is differentiated, how, and its name in messages.
_KINDS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "fisher": (scoring_residuals, gauss_newton_matrix, "residuals"),
    "jacobian": (scoring_residuals, jacobian_of, "residuals"),
    "spectrum": (scoring_residuals, spectrum_of, "residuals"),
    "deviance": (real_residuals, jacobian_of, "residuals"),
    "nll": (negative_log_likelihood, expansion_of, "nll"),
    "priors": (prior_rows, jacobian_of, "priors"),
    "loss": (lambda *args: score(*args).loss, expansion_of, "loss"),
}


class Passes(NamedTuple):
    """How to differentiate: `batch_size` and `jac` of `Trainer.fisher`."""

    batch_size: int | None = None
    jac: Mode | None = None


class Derived(NamedTuple):
    """Derivatives, one for each block, and what is known beside them.

    - `is_finite`: whether what was differentiated is.
    - `value`: its value.
    - `held`: which elements are held at their bounds, in the order of `ravel`.
    - `deviances`: the residuals whose squares are the deviances of the data, then those
        of priors, and `data`: what they are. `None` if none were differentiated.
    """

    found: tuple[Any, ...]
    is_finite: Bool[Array, ""]
    value: Array
    held: Bool[Array, " D"]
    # `Any` stands for `None`.
    deviances: Float[Array, " N"] | Any
    data: DataKind | Any


def derive(
    trainer: AbstractTrainer,
    batch: Any,
    kind: str,
    selectors: tuple[Any, ...] | None,
    passes: Passes,
    holds: bool = False,
) -> Derived:
    """Computes derivatives at the current point, for the block of each selector.

    Without selectors, all parameters are one block. If it `holds` those elements that
    are pushed against their bounds, their derivatives are zero.
    """
    batch_size, jac = checked_batch_size(passes.batch_size), checked_mode(passes.jac)
    params = as_parameters(trainer.params)
    if selectors is None:
        blocks = (tuple(range(len(jax.tree.leaves(params)))),)
    else:
        blocks = find_blocks(params, selectors)
    # One program for both: `whiten` holds nothing, and the errors after it do.
    is_held = None if bounds_of(trainer) is None else np.asarray(holds)
    args = stripped(trainer), as_batch(batch), kind, blocks, batch_size, jac, is_held
    derived = run_derive(*args)
    # The data alone need not constrain a parameter that has a prior.
    if kind in ("nll", "loss") and not is_traced(derived, params):
        for block, expansion in zip(blocks, derived.found, strict=True):
            _require_units(trainer, block, expansion, derived.held, kind)
    return derived


def _require_units(
    trainer: AbstractTrainer, block: Block, expansion: Expansion, held: Any, name: str
) -> None:
    """Refuses second derivatives that are zero because of a parameter's unit.

    Those of an element that is `held` at its bound are zero anyway.
    """
    named = by_path(trainer.params)
    ends = np.cumsum([leaf.size for leaf in named.leaves])[:-1]
    kept = np.split(~np.asarray(held), ends)
    ends = np.cumsum([named.leaves[index].size for index in block])[:-1]
    diagonals = np.split(np.diagonal(np.asarray(expansion.hessian)), ends)
    for index, piece in zip(block, diagonals, strict=True):
        flat = np.asarray(named.leaves[index], float).ravel()
        lost = underflows(piece, flat) & kept[index]
        if lost.any():
            path = named.names[index]
            raise ValueError(
                f"The second derivative of `{name}` by {path!r}, which is "
                f"{flat[lost][0]:.3g}, is zero in {piece.dtype}: it has the square of "
                "that unit below. Fit it in a larger unit, as a number near one; or "
                "use float64."
            )


@program
def run_derive(
    trainer: AbstractTrainer,
    batch: Any,
    kind: str,
    blocks: tuple[Block, ...],
    batch_size: int | None,
    jac: Mode | None,
    is_held: Bool[Array | np.ndarray, ""] | None,
) -> Derived:
    evaluate, derivative, name = _KINDS[kind]
    met: set[type] = set()
    if evaluate is scoring_residuals:
        evaluate = partial(evaluate, met=met)
    held: dict[str, Array] = {}
    if is_held is not None:
        falls = minimised(trainer, batch, "loss" if kind == "loss" else "residuals")
        edges = pushed(trainer, falls)
        held = {path: is_pushed & is_held for path, is_pushed in edges.items()}
    subject = Subject(f"`{name}` of `{type(trainer).__name__}`", jac)
    each = [_within(trainer, batch, block, evaluate, held) for block in blocks]
    found = tuple(derivative(fn, own, batch_size, subject) for fn, own in each)
    # It is finite for all blocks or for none.
    fn, own = each[0]
    value = fn(own)
    flags, deviances, data = flat_flags(held, trainer.params), None, None
    if name == "residuals":
        key, size = step_key(trainer), value.size - prior_count(trainer)
        deviances, data = value, DataKind(size, False, False)
        if met:
            deviances, data = real_residuals_and_kind(trainer, batch, key)
    return Derived(found, all_finite(value), value, flags, deviances, data)


def _within(
    trainer: AbstractTrainer,
    batch: Any,
    block: Block,
    evaluate: Callable[..., Any],
    held: dict[str, Array],
) -> tuple[Callable[[list[Array]], Array], list[Array]]:
    """Returns `evaluate` as a function of the leaves of a block, and these leaves."""
    key = step_key(trainer)
    leaves, structure = jax.tree.flatten(trainer.params)

    def of_leaves(own: list[Array]) -> Array:
        changed = dict(zip(block, own, strict=True))
        every = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
        params = held_at(structure.unflatten(every), held)
        return evaluate(live(trainer, params), batch, key)

    own = [leaves[index] for index in block]
    return traced(of_leaves, own), own


def require_finite(
    found: Any, is_finite: Any, what: str, trainer: AbstractTrainer, batch: Any
) -> None:
    """Refuses derivatives, called `what`, if they or their function are not finite.

    The derivatives alone do not show it: those of `model - data` do not depend on the
    data. Traced ones are not checked.
    """
    if is_traced(found, is_finite):
        return
    has_finite = bool(_all_finite(found))
    if is_finite and has_finite:
        return
    fault = "cannot be computed here" if has_finite else "is not finite"
    is_overflow = is_finite and not any(
        np.isnan(leaf).any() for leaf in jax.tree.leaves(found)
    )
    told = diagnosed(trainer, batch)
    # Squares of residuals do not fall without end.
    is_open = told.has_nothing and "residuals" not in defined(trainer)
    raise ValueError(
        f"{what} of `{type(trainer).__name__}` {fault}. {told}"
        + (_RUN_OFF if is_open else "")
        + (_TOO_LARGE if is_overflow else "")
    )


_RUN_OFF = (
    " Only its second derivatives are not, as where parameters have run off since the "
    "loss falls without end: if `result.history.loss` does, check its sign. "
    "`table()`, without a batch, shows the values alone."
)


_TOO_LARGE = (
    " If all of them are finite, its elements are too large for their dtype: `whiten` "
    "and `standard_errors` do not form them, where `residuals` is defined; or change "
    "the units of a parameter."
)

_all_finite = jax.jit(all_finite)


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
