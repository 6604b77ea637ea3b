"""The metric of the parameters at a point: Fisher matrices, and what whitens them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from .._boundary import Params
from .._curvature import (
    Mode,
    Spectrum,
    Subject,
    checked_batch_size,
    checked_mode,
    gauss_newton_matrix,
    hessian_matrix,
    jacobian_of,
    matmul,
    of_jacobian,
    spectrum_of,
    traced,
)
from .._data import as_batch
from .._policy import all_finite
from .._program import program
from .._projection import (
    ROUNDING,
    DenseWhitening,
    EigenProjector,
    OnNull,
    check_options,
    check_rank_kind,
    find_blocks,
    jacobian_cut,
    of_spectrum,
    whiten,
)
from .._step import (
    AbstractTrainer,
    defined,
    explain_non_finite,
    live,
    negative_log_likelihood,
    real_residuals,
    score,
    step_key,
    stripped,
)
from .._tree import as_parameters, ravel_dtype, widest

Blocks = str | Callable[[str, Any], Any] | Sequence[Any] | Mapping[Any, Any]


def fisher(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    """The curvature of `nll`. The documentation is that of `Trainer.fisher`."""
    methods = defined(trainer)
    require_likelihood(trainer, "A Fisher matrix")
    kind = "residuals" if "residuals" in methods else "nll"
    return _matrices(trainer, batch, kind, blocks, batch_size, jac)


def curvature(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    """The Hessian of `loss`. The documentation is that of `Trainer.curvature`."""
    return _matrices(trainer, batch, "loss", blocks, batch_size, jac)


def has_likelihood(trainer: AbstractTrainer) -> bool:
    """Whether a trainer's class defines more than a loss, whose scale is anyone's."""
    return bool({"residuals", "nll"} & set(defined(trainer)))


def require_likelihood(trainer: AbstractTrainer, what: str) -> None:
    if not has_likelihood(trainer):
        raise TypeError(
            f"{what} needs a likelihood, and `{type(trainer).__name__}` defines only "
            "`loss`: error bars from a mean, or from a sum with a penalty, would be "
            "wrong. Define `residuals` or `nll` beside it. (To whiten the parameters, "
            "`curvature` will do.)"
        )


def _matrices(
    trainer: AbstractTrainer,
    batch: Any,
    kind: str,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    batch_size, jac = checked_batch_size(batch_size), checked_mode(jac)
    params = as_parameters(trainer.params)
    bare, batch = stripped(trainer), as_batch(batch)
    selectors = None if blocks is None else _as_selectors(blocks)
    if selectors is None and kind == "residuals" and batch_size is None:
        found, is_finite = _jacobian(bare, batch, jac)
        matrices = (_gram(found, ravel_dtype(params)),)
    else:
        members = _members(params, selectors)
        matrices, is_finite = _compute(bare, batch, kind, members, batch_size, jac)
    _require_finite(matrices, is_finite, f"The curvature of `{kind}`", trainer, batch)
    if selectors is None:
        return matrices[0]
    return OrderedDict(zip(selectors, matrices, strict=True))


def _members(
    params: Params, selectors: tuple[Any, ...] | None
) -> tuple[tuple[int, ...], ...]:
    if selectors is None:
        return (tuple(range(len(jax.tree.leaves(params)))),)
    return find_blocks(params, selectors, "blocks")


def _require_finite(
    found: Any, is_finite: Any, what: str, trainer: AbstractTrainer, batch: Any
) -> None:
    """Refuses what is not finite, unless it is traced.

    **Arguments:**

    - `found`: derivatives, in any tree.
    - `is_finite`: whether what was differentiated is finite. If it is not, its
        derivatives may still be: those of `model - data` know nothing of the data.
    - `what`: what an error calls the derivatives.
    """
    leaves = jax.tree.leaves((found, is_finite))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    has_finite = bool(_all_finite(found))
    if is_finite and has_finite:
        return
    fault = "cannot be computed here" if has_finite else "is not finite"
    is_overflow = is_finite and not any(np.isnan(leaf).any() for leaf in leaves)
    raise ValueError(
        f"{what} of `{type(trainer).__name__}` {fault}. "
        + explain_non_finite(trainer, batch)
        + (_TOO_LARGE if is_overflow else "")
    )


_TOO_LARGE = (
    " If all of them are finite, its elements are too large for their dtype: `whiten` "
    "and `standard_errors` do not form them, where `residuals` is defined; or change "
    "the units of a parameter."
)

_all_finite = jax.jit(all_finite)


def _as_selectors(blocks: Blocks) -> tuple[Any, ...]:
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


def _within(
    trainer: AbstractTrainer,
    batch: Any,
    block: tuple[int, ...],
    evaluate: Callable[..., Any],
) -> tuple[Callable[[list[Array]], Array], list[Array]]:
    """Returns what is evaluated as a function of some of the leaves, and these."""
    key = step_key(trainer)
    leaves, structure = jax.tree.flatten(trainer.params)

    def of_leaves(own: list[Array]) -> Array:
        changed = dict(zip(block, own, strict=True))
        every = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
        there = live(trainer, structure.unflatten(every))
        return evaluate(there, batch, key)

    own = [leaves[index] for index in block]
    return traced(of_leaves, own), own


def _is_finite_at(fn: Callable[[list[Array]], Array], own: list[Array]) -> Array:
    """Whether what is differentiated is finite; it is so for all blocks or for none."""
    return all_finite(fn(own))


def _subject(trainer: AbstractTrainer, kind: str, jac: Mode | None) -> Subject:
    return Subject(f"`{kind}` of `{type(trainer).__name__}`", jac)


@program
def _compute(
    trainer: AbstractTrainer,
    batch: Any,
    kind: str,
    blocks: tuple[tuple[int, ...], ...],
    batch_size: int | None,
    jac: Mode | None,
) -> tuple[tuple[Float[Array, "_ _"], ...], Bool[Array, ""]]:
    """Computes one matrix for each group of leaves, and whether there is a meaning.

    That is, whether what is differentiated is finite.
    """
    of, evaluate = {
        "residuals": (gauss_newton_matrix, real_residuals),
        "nll": (hessian_matrix, negative_log_likelihood),
        "loss": (hessian_matrix, lambda *args: score(*args).loss),
    }[kind]
    subject = _subject(trainer, kind, jac)
    each = [_within(trainer, batch, block, evaluate) for block in blocks]
    found = tuple(of(fn, own, batch_size, subject) for fn, own in each)
    return found, _is_finite_at(*each[0])


@program
def _jacobian(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None
) -> tuple[Float[Array, "N D"], Bool[Array, ""]]:
    """Computes the Jacobian of all residuals, and whether these are finite."""
    (block,) = _members(trainer.params, None)
    subject = _subject(trainer, "residuals", jac)
    fn, own = _within(trainer, batch, block, real_residuals)
    return jacobian_of(fn, own, None, subject), _is_finite_at(fn, own)


@partial(jax.jit, static_argnums=1)
def _gram(jac: Float[Array, "N D"], dtype: np.dtype) -> Float[Array, "D D"]:
    # Residuals of higher precision do not make the parameters any more precise.
    return matmul(jac.T, jac).astype(dtype)


_spectrum = jax.jit(of_jacobian)


@program
def _spectra(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: tuple[tuple[int, ...], ...],
    batch_size: int | None,
    jac: Mode | None,
) -> tuple[tuple[Spectrum, ...], Bool[Array, ""]]:
    """Decomposes the Jacobian of each group of leaves; says if residuals are finite."""
    subject = _subject(trainer, "residuals", jac)
    each = [_within(trainer, batch, block, real_residuals) for block in blocks]
    spectra = tuple(spectrum_of(fn, own, batch_size, subject) for fn, own in each)
    return spectra, _is_finite_at(*each[0])


def _decomposed(
    trainer: AbstractTrainer,
    batch: Any,
    selectors: tuple[Any, ...] | None,
    batch_size: int | None,
    jac: Mode | None,
) -> tuple[tuple[Spectrum, ...], float]:
    """Decomposes the Jacobians of the residuals.

    **Returns:**

    The spectra, in the dtype of the parameters, and the epsilon of the coarsest dtype.
    """
    batch_size, jac = checked_batch_size(batch_size), checked_mode(jac)
    params = as_parameters(trainer.params)
    bare, batch = stripped(trainer), as_batch(batch)
    if selectors is None and batch_size is None:
        found, is_finite = _jacobian(bare, batch, jac)
        spectra = (_spectrum(found),)
    else:
        members = _members(params, selectors)
        spectra, is_finite = _spectra(bare, batch, members, batch_size, jac)
    what = "The Jacobian of `residuals`"
    _require_finite(spectra, is_finite, what, trainer, batch)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(spectra)):
        message = f"{what} of `{type(trainer).__name__}` is not finite."
        spectra = eqx.error_if(spectra, ~all_finite(spectra), message)
    own = widest((ravel_dtype(params), jnp.dtype("float32")))
    dtypes = (ravel_dtype(params), spectra[0].values.dtype)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return jax.tree.map(lambda x: x.astype(own), spectra), eps


WhitenOne = Callable[[Any, Params, int | None, str], DenseWhitening]


def _by_matrix(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
    rtol: float | int | None,
    on_null: OnNull,
) -> tuple[Any, WhitenOne]:
    """Finds Hessians, and what makes a whitening of one."""
    kind = "nll" if has_likelihood(trainer) else "loss"
    found = _matrices(trainer, batch, kind, blocks, batch_size, jac)
    if rtol is None:
        sizes = [max(len(matrix), ROUNDING) for matrix in jax.tree.leaves(found)]
        dtype = jax.tree.leaves(found)[0].dtype
        rtol = max(sizes) * float(jnp.finfo(dtype).eps)

    def whiten_one(
        matrix: Any, own: Params, rank: int | None, name: str
    ) -> DenseWhitening:
        label = f"The Hessian of `{kind}` at this point{name}"
        return whiten(matrix, own, rtol, rank, on_null, "hessian", label)

    return found, whiten_one


def _by_jacobian(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
    rtol: float | int | None,
    on_null: OnNull,
) -> tuple[Any, WhitenOne]:
    """Finds decomposed Jacobians, and what makes a whitening of one."""
    selectors = None if blocks is None else _as_selectors(blocks)
    spectra, eps = _decomposed(trainer, batch, selectors, batch_size, jac)

    def whiten_one(
        spectrum: Any, own: Params, rank: int | None, name: str
    ) -> DenseWhitening:
        size = spectrum.values.size
        check_options(0 if rtol is None else rtol, rank, on_null, size)
        cut = jacobian_cut(size, eps, rtol, rank, on_null)
        return of_spectrum(spectrum, own, cut, f"`residuals`{name}", is_inverse=True)

    if selectors is None:
        return spectra[0], whiten_one
    return OrderedDict(zip(selectors, spectra, strict=True)), whiten_one


def whitening(
    trainer: AbstractTrainer,
    batch: Any,
    batch_size: int | None,
    jac: Mode | None,
    *,
    rtol: float | int | None = None,
    rank: int | None = None,
    on_null: OnNull = "prior",
) -> DenseWhitening:
    """Finds the map that whitens all parameters at the current point."""
    by = _by_jacobian if "residuals" in defined(trainer) else _by_matrix
    found, whiten_one = by(trainer, batch, None, batch_size, jac, rtol, on_null)
    return whiten_one(found, as_parameters(trainer.params), rank, "")


OF_WHITEN = ("blocks", "batch_size", "jac", "optimiser", "rtol", "rank", "on_null")
"""The options of `Trainer.whiten`."""


def whitened(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
    *,
    rtol: float | int | None = None,
    rank: Any = None,
    on_null: OnNull = "prior",
) -> EigenProjector:
    """Makes the projector of `Trainer.whiten`, which has the documentation."""
    check_rank_kind(rank, blocks)
    check_options(0 if rtol is None else rtol, None, on_null, 0)
    if blocks is None:
        options: Any = {"rtol": rtol, "rank": rank, "on_null": on_null}
        made = whitening(trainer, batch, batch_size, jac, **options)
        return EigenProjector._of_vectors(trainer.params, made, "`batch`")
    by = _by_jacobian if "residuals" in defined(trainer) else _by_matrix
    found, whiten_one = by(trainer, batch, blocks, batch_size, jac, rtol, on_null)

    def of_block(
        given: Any, own: Params, rank: int | None, name: str
    ) -> DenseWhitening:
        return whiten_one(given, own, rank, f" (`{name}`)")

    return EigenProjector._of_blocks(found, trainer.params, rank or {}, of_block)
