"""Whitening of the parameters at the current point of a trainer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._boundary import Params, is_traced
from .._curvature import Spectrum, matmul, of_jacobian, positive
from .._data import as_batch
from .._policy import all_finite
from .._projection import (
    ROUNDING,
    DenseWhitening,
    EigenProjector,
    NullPolicy,
    find_blocks,
    jacobian_rtol,
    make_block_projector,
    make_projector,
    whiten,
    whiten_spectrum,
)
from .._step import AbstractTrainer, bijections_of, defined, in_free_coordinates
from .._tree import as_parameters, ravel_dtype, widest
from .derivatives import (
    Blocks,
    Passes,
    as_selectors,
    by_selector,
    derive,
    has_likelihood,
    matrices,
    require_elements,
    require_finite,
)
from .observed import observed

WhitenOne = Callable[[Any, Params, NullPolicy, str], DenseWhitening]

OF_WHITEN = ("blocks", "batch_size", "jac", "optimiser", "rtol", "rank", "on_null")
"""The options of `Trainer.whiten`."""


def whitened(
    trainer: AbstractTrainer,
    batch: Any,
    blocks: Blocks | None,
    passes: Passes,
    options: Mapping[str, Any],
    holds: bool = False,
) -> EigenProjector:
    """Makes the projector of `Trainer.whiten`; `options` are for `NullPolicy`.

    If it `holds` what is pushed against its bound, the space is only for steps that
    leave it there: its own direction has no length.
    """
    nulls = NullPolicy(**{"on_null": "prior", **options})
    nulls.check_rank_kind(blocks)
    nulls.check()
    is_free = whitens_free(trainer)
    trainer = in_free_coordinates(trainer)
    require_elements(trainer, "A projector")
    selectors = _with_elements(trainer, as_selectors(blocks))
    found, whiten_one = _decomposed(trainer, batch, selectors, passes, holds)
    if selectors is not None:
        return make_block_projector(found, trainer.params, nulls, whiten_one, is_free)
    whitening = whiten_one(found, as_parameters(trainer.params), nulls, "")
    return make_projector(whitening, trainer.params, "`batch`", is_free)


def whitens_free(trainer: AbstractTrainer) -> bool:
    """Whether free coordinates of bijections are whitened, and not parameters."""
    if bijections_of(trainer) is not None:
        return True
    # In the rounds of a solve the trainer is in free coordinates already.
    return trainer.projector is not None and trainer.projector.is_of_free


def _with_elements(
    trainer: AbstractTrainer, selectors: tuple[Any, ...] | None
) -> tuple[Any, ...] | None:
    """Leaves out the blocks without elements, in which there is nothing to whiten."""
    params = as_parameters(trainer.params)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    if selectors is None or all(sizes):
        return selectors
    blocks = find_blocks(params, selectors)
    pairs = zip(selectors, blocks, strict=True)
    kept = tuple(own for own, block in pairs if any(sizes[i] for i in block))
    if not kept:
        raise ValueError(
            f"`blocks`: none of {', '.join(map(repr, selectors))} has elements. Give "
            "the block of a parameter that has."
        )
    return kept


def _decomposed(
    trainer: AbstractTrainer,
    batch: Any,
    selectors: tuple[Any, ...] | None,
    passes: Passes,
    holds: bool,
) -> tuple[Any, WhitenOne]:
    """Returns spectra or Hessians, by selector, and the function that whitens one."""
    if "residuals" in defined(trainer):
        batch = as_batch(batch)
        is_whole = selectors is None and passes.batch_size is None
        kind = "jacobian" if is_whole else "spectrum"
        derived = derive(trainer, batch, kind, selectors, passes, holds=holds)
        spectra = derived.found
        if is_whole:
            spectra = (reduced(spectra[0], derived.value).spectrum,)
        spectra, eps = checked_spectra(trainer, batch, spectra, derived.is_finite)
        return by_selector(selectors, spectra), partial(of_spectrum, eps=eps)
    kind = "nll" if has_likelihood(trainer) else "loss"
    if selectors is None and kind == "nll":
        found = observed(trainer, batch, passes, holds=holds)[0].found[0].hessian
    else:
        found = matrices(trainer, batch, kind, selectors, passes, holds=holds)
    rtol = hessian_rtol(jax.tree.leaves(found))
    return found, partial(of_hessian, kind=f"`{kind}`", rtol=rtol)


def hessian_rtol(hessians: Sequence[Float[Array, "_ _"]]) -> float:
    eps = float(jnp.finfo(hessians[0].dtype).eps)
    return max(*map(len, hessians), ROUNDING) * eps


def of_spectrum(
    spectrum: Spectrum, own: Params, nulls: NullPolicy, name: str, eps: float
) -> DenseWhitening:
    """Finds the map that whitens by the singular values of a Jacobian."""
    size = spectrum.values.size
    nulls.check(size)
    nulls, label = nulls.or_rtol(jacobian_rtol(size, eps)), _label("`residuals`", name)
    return whiten_spectrum(spectrum, own, nulls, eps, label)


def of_hessian(
    matrix: Array, own: Params, nulls: NullPolicy, name: str, kind: str, rtol: float
) -> DenseWhitening:
    """Finds the map that whitens by a Hessian."""
    label = _label(f"The Hessian of {kind} at this point", name)
    return whiten(matrix, own, nulls.or_rtol(rtol), label, "hessian")


def _label(what: str, name: str) -> str:
    return f"{what} ({name})" if name else what


class Reduced(NamedTuple):
    """Residuals and their Jacobian, reduced to the size of the parameters.

    `slope` is the gradient of half the sum of squares, in units of the spectrum.
    """

    spectrum: Spectrum
    slope: Float[Array, " D"]


@jax.jit
def reduced(jac: Float[Array, "N D"], residuals: Float[Array, "..."]) -> Reduced:
    """Decomposes a Jacobian, and finds where its residuals could fall."""
    spectrum = of_jacobian(jac)
    dtype = spectrum.values.dtype
    vector = jax.lax.stop_gradient(residuals.ravel()).astype(dtype)
    jac = jax.lax.stop_gradient(jac).astype(dtype)
    # Divided, since products of small residuals with small derivatives may be zero.
    unit = positive(jnp.max(jnp.abs(vector), initial=0))
    slope = matmul(vector / unit, jac) * spectrum.scale * unit
    return Reduced(spectrum, slope)


def checked_spectra(
    trainer: AbstractTrainer,
    batch: Any,
    spectra: tuple[Spectrum, ...],
    is_finite: Bool[Array, ""],
) -> tuple[tuple[Spectrum, ...], float]:
    """Refuses spectra that are not finite; returns what `in_own_precision` does."""
    what = "The Jacobian of `residuals`"
    require_finite(spectra, is_finite, what, trainer, batch)
    if is_traced(spectra):
        message = f"{what} of `{type(trainer).__name__}` is not finite."
        spectra = eqx.error_if(spectra, ~all_finite(spectra), message)
    return in_own_precision(spectra, as_parameters(trainer.params))


def in_own_precision(
    spectra: tuple[Spectrum, ...], params: Params
) -> tuple[tuple[Spectrum, ...], float]:
    """Returns spectra in the dtype of the parameters, and the coarsest epsilon."""
    own = ravel_dtype(params)
    dtypes = (own, spectra[0].values.dtype)
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    dtype = widest((own, jnp.dtype("float32")))
    # `astype` would compile a program of its own for nothing.
    cast = lambda x: x if x.dtype == dtype else x.astype(dtype)
    return jax.tree.map(cast, spectra), eps
