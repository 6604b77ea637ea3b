"""Standard errors, and the likelihood for samplers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import (
    Params,
    PyTree,
    boolean,
    in_few_words,
    is_traced,
    refuse_meaning,
    refuse_program,
    warn,
)
from .._closure import Closure
from .._curvature import Mode, Spectrum, after, equilibrated_eigh, positive
from .._data import as_batch
from .._minimum import chi_squared_p_value
from .._policy import all_finite
from .._program import Version, version_of
from .._projection import DenseWhitening, EigenProjector, whiten_spectrum
from .._step import (
    AbstractTrainer,
    DataKind,
    bijections_of,
    bounds_of,
    defined,
    from_free_coordinates,
    in_free_coordinates,
    live,
    negative_log_likelihood,
    priors_of,
    step_key,
    stripped,
    template_of,
)
from .._tree import as_parameters, is_inexact, ravel, ravel_size, unravel
from .derivatives import (
    Derived,
    ErrorKind,
    Passes,
    derive,
    require_elements,
    require_likelihood,
)
from .elements import (
    elements_of,
    held_elements,
    scaled,
    tied_of,
    whitening_of_elements,
    with_held,
)
from .expansion import (
    NO_SCATTER,
    Fall,
    expanded,
    may_be_masked,
    may_mislead,
    possible_fall,
    require_scatter,
    warn_if_misleading,
    warn_if_of_few,
    zeros_of,
    zeros_text,
)
from .laplace import NULLS, ErrorOptions, kind_of, laplace
from .observed import error_bar, observed
from .propagate import run_propagate
from .sandwich import sandwich
from .whiten import hessian_rtol, in_own_precision, of_spectrum, reduced


def standard_errors(
    trainer: AbstractTrainer, batch: Any, options: ErrorOptions
) -> Params:
    """Implements `Trainer.standard_errors`."""
    scale_errors, jac, kind = options
    if boolean(scale_errors, "scale_errors"):
        refuse_program("standard_errors(scale_errors=True)", trainer, batch)
    if is_traced(trainer, batch):
        traced = lambda x: _constant(x) if is_traced(x) and is_inexact(x) else x
        trainer, batch = jax.tree.map(traced, (trainer, batch))
    trainer = in_free_coordinates(trainer)
    here = laplace(trainer, batch, "A standard error", jac, kind)
    whitening = whitening_of_elements(trainer, here.whitening)
    errors = jnp.asarray(whitening.errors_of_the_data())
    is_known = not is_traced(trainer, batch, here)
    if is_known and (scale_errors or may_mislead(trainer, here)):
        found = expanded(trainer, batch, here)
        scale = found.error_scale(scale_errors)
        warn_if_misleading(trainer, batch, found, "standard_errors", scale_errors)
        warn_if_of_few(trainer, found, "standard_errors")
        errors = jax.device_put(scaled(errors, scale))
    if bounds_of(trainer) is not None:
        held = held_elements(trainer, here.derived.held)
        errors = jnp.where(held, jnp.nan, errors)
    return unravel(errors, as_parameters(elements_of(trainer)))


@jax.custom_jvp
def _constant(x: Array) -> Array:
    """Returns what it is given, and refuses to be differentiated."""
    return x


@_constant.defjvp
def _refuse(*_: Any) -> Any:
    raise TypeError(
        "`standard_errors` cannot be differentiated: it decomposes a matrix whose "
        "eigenvalues may be equal. Differentiate the inverse of "
        "`trainer.fisher(batch)`; or, if the errors are constants, call it with "
        "`jax.lax.stop_gradient` of the trainer and the batch."
    )


class Scatter(NamedTuple):
    """What there is to know of the scatter of residuals.

    - `norm`: the root of the sum of their squares, which may be too small for them.
    - `data`: what they are.
    - `rank`: the number of directions that they constrain.
    - `zeros`: how many data have residuals of zero, whatever the parameters.
    """

    norm: Float[Array, "..."]
    data: DataKind
    rank: Int[Array, "..."]
    zeros: Int[Array, "..."]

    @property
    def squares(self) -> Float[np.ndarray, "..."]:
        """The sum of the squares. For numbers on the host."""
        with np.errstate(over="ignore"):
            return np.square(np.asarray(self.norm, float))

    def error_scales(
        self, trainer: AbstractTrainer, kind: ErrorKind | None
    ) -> Float[np.ndarray, " members"]:
        """Returns the root of each member's reduced chi-squared, NaN without any."""
        of_any = lambda flags: bool(np.any(flags))
        if kind is None and of_any(self.data.is_robust):
            kind = "sandwich"
        has_priors, has_scale = priors_of(trainer) is not None, self.data.has_scale
        require_scatter(kind or "expected", has_priors, of_any(has_scale))
        degrees = np.asarray(self.data.size) - np.asarray(self.rank)
        if not of_any(degrees > 0):
            raise ValueError(NO_SCATTER)
        # Residuals may be of missing data.
        zeros, sizes = np.broadcast_arrays(self.zeros, self.data.size)
        suspects = np.flatnonzero(may_be_masked(zeros, sizes))
        if suspects.size:
            first, others = suspects[0], suspects.size - 1
            where = f" of member {first}" + f" (and of {others} more)" * bool(others)
            warn(zeros_text(int(zeros[first]), int(sizes[first]), where))
        return np.sqrt(self.squares / np.where(degrees > 0, degrees, np.nan))


class KnownErrors(NamedTuple):
    """Standard errors, NaN where there are none.

    - `own`: those of the parameters.
    - `tied`: those of tied parameters that are real, by path.
    - `fall`: how far chi-squared could still fall.
    - `scatter`: that of `residuals`, `None` without any.
    - `lacks_scatter`: whether there are none as the data of a sandwich do not scatter.
    - `is_of_few`: as of a `Sandwich`, of what is not held.
    """

    own: Params
    tied: dict[str, Array]
    fall: Fall
    scatter: Scatter | None
    lacks_scatter: Bool[Array, "..."]
    is_of_few: Bool[Array, "... D"]

    def goodness(self, trainer: AbstractTrainer) -> dict[str, np.ndarray]:
        """Returns how good the fit of each member is, by the names of a report."""
        # The rows of priors are among the residuals.
        if self.scatter is None or priors_of(trainer) is not None:
            return {}
        if np.any(self.scatter.data.is_robust):
            return {}
        squares, rank = self.scatter.squares, np.asarray(self.scatter.rank)
        count = np.broadcast_to(self.scatter.data.size, squares.shape)
        found = {
            "chi_squared": squares,
            "data_count": count,
            "degrees_of_freedom": count - rank,
        }
        if np.any(self.scatter.data.has_scale):
            # The deviance of counts has a distribution of its own.
            return found
        chance = chi_squared_p_value(squares, count - rank)
        return found | {"p_value": np.where(count > rank, chance, np.nan)}

    def scaled(self, trainer: AbstractTrainer, kind: ErrorKind | None) -> "KnownErrors":
        """Multiplies the errors of each member by the scatter of its residuals."""
        if self.scatter is None:
            raise ValueError(NO_SCATTER)
        scales = self.scatter.error_scales(trainer, kind)

        def of_each(errors: Array) -> Array:
            factor = scales.reshape(-1, *[1] * (errors.ndim - 1))
            return jax.device_put(scaled(errors, factor))

        own, tied = jax.tree.map(of_each, (self.own, self.tied))
        return self._replace(own=own, tied=tied)


def errors_or_nan(
    trainer: AbstractTrainer, batch: Any, jac: Mode | None, kind: ErrorKind | None
) -> KnownErrors:
    """Computes the standard errors in a compiled program.

    There are none if derivatives are not finite, or the loss curves downwards, or the
    data of a sandwich do not scatter.
    """
    require_likelihood(trainer, "A standard error")
    require_elements(trainer, "A standard error")
    trainer, passes = in_free_coordinates(trainer), Passes(jac=jac)
    scatter, lacks_scatter = None, jnp.zeros((), bool)
    is_of_few = jnp.zeros(ravel_size(as_parameters(trainer.params)), bool)
    if "residuals" not in defined(trainer):
        whitening, derived, is_good, fall = _by_hessian(trainer, batch, passes, 1.0)
    else:
        whitening, derived, is_good, fall = _by_jacobian(trainer, batch, passes)
        expected, scatter = whitening, _scatter(derived, whitening)
        if (kind := kind_of(kind, derived.data)) != "expected":
            bar = error_bar(derived, ravel_size(as_parameters(trainer.params)))
            wait = lambda leaf: after(leaf, expected.roots)
            later = live(trainer, jax.tree.map(wait, trainer.params))
            whitening, _, is_curved, _ = _by_hessian(later, batch, passes, bar)
            is_good &= is_curved
        if kind == "sandwich":
            found = sandwich(trainer, batch, passes, derived, expected, whitening)
            is_good &= found.is_finite
            lacks_scatter = is_good & found.lacks_scatter
            whitening, is_of_few = found.whitening, found.is_of_few
    errors, held = whitening_of_elements(trainer, whitening), derived.held
    has_errors = is_good & ~lacks_scatter
    is_of_few &= has_errors & ~held
    is_known = has_errors & ~held_elements(trainer, held)
    known = jnp.where(is_known, errors.errors_of_the_data(), jnp.nan)
    own = unravel(known, as_parameters(elements_of(trainer)))
    fall = fall._replace(chi_squared=jnp.where(is_good, fall.chi_squared, jnp.nan))
    of_tied = {}
    if (tied := tied_of(trainer, trainer.model)) is not None:
        free = with_held(whitening, held)
        closure, one = Closure.encode(tied), jnp.ones(())
        still = None if bounds_of(trainer) is None else held
        _, found, *_ = run_propagate(stripped(trainer), closure, free, one, still)
        clear = lambda e: jnp.where(has_errors, e, jnp.nan)
        of_tied = jax.tree.map(clear, found)
    return KnownErrors(own, of_tied, fall, scatter, lacks_scatter, is_of_few)


def _scatter(derived: Derived, whitening: DenseWhitening) -> Scatter:
    unit = positive(jnp.max(jnp.abs(derived.deviances), initial=0))
    norm = unit * jnp.linalg.norm(derived.deviances / unit)
    missing = derived.deviances.size - derived.data.size
    zeros = zeros_of(derived.found[0], derived.deviances, missing)
    return Scatter(norm, derived.data, jnp.sum(whitening.roots > 0), zeros)


# LAPACK may not return if there is a NaN: what is not finite is replaced.
_Known = tuple[DenseWhitening, Derived, Bool[Array, ""], Fall]


def _by_jacobian(trainer: AbstractTrainer, batch: Any, passes: Passes) -> _Known:
    derived = derive(trainer, batch, "jacobian", None, passes, holds=True)
    (jacobian,), params = derived.found, as_parameters(trainer.params)
    is_good = derived.is_finite & all_finite(jacobian)
    found = reduced(jnp.where(is_good, jacobian, 0), derived.value)
    (spectrum,), eps = in_own_precision((found.spectrum,), params)
    whitening = of_spectrum(spectrum, params, NULLS, "", eps)
    fall = possible_fall(whitening, found.slope, spectrum.scale)
    return whitening, derived, is_good, fall


def _by_hessian(
    trainer: AbstractTrainer, batch: Any, passes: Passes, bar: Any
) -> _Known:
    derived, _ = observed(trainer, batch, passes, True, bar)
    (expansion,), params = derived.found, as_parameters(trainer.params)
    hessian = expansion.hessian
    is_good = derived.is_finite & all_finite(hessian)
    is_good &= jnp.all(jnp.diag(hessian) >= 0)
    eye = jnp.eye(ravel_size(params), dtype=hessian.dtype)
    hessian = jnp.where(is_good, hessian, eye)
    scale, values, vectors = equilibrated_eigh(hessian)
    rtol = hessian_rtol((hessian,))
    is_good &= values[-1] >= -rtol * values[0]
    spectrum, nulls = Spectrum(1 / scale, values, vectors), NULLS.or_rtol(rtol)
    whitening = whiten_spectrum(spectrum, params, nulls, rtol, "")
    return whitening, derived, is_good, possible_fall(whitening, expansion.gradient, 1)


def _potential(
    _: Version,
    trainer: AbstractTrainer,
    projector: EigenProjector | None,
    batch: Any,
    point: PyTree,
) -> Float[Array, ""]:
    """Computes the negative log-likelihood at a latent point."""
    params = _at(trainer, projector, point)
    # The present version, since it may be called without a program.
    with version_of((trainer, batch)).context():
        key, bounds = step_key(trainer), bounds_of(trainer)
        within = params if bounds is None else bounds.clip(params)
        value = negative_log_likelihood(live(trainer, within), batch, key)
        if (bijections := template_of(trainer).bijections) is not None:
            # It is the density of the parameters, not that of free coordinates.
            value -= bijections.log_abs_det(params).astype(value.dtype)
        if bounds is None:
            return value
        # In a latent space rounding moves what is on a bound.
        errors = None if projector is None else projector.standard_errors()
        return jnp.where(bounds.contain(params, errors), value, jnp.inf)


def _at(
    trainer: AbstractTrainer, projector: EigenProjector | None, point: PyTree
) -> Params:
    if projector is None:
        return unravel(point, trainer.params)
    return projector.to_params(point)


def params_at(trainer: AbstractTrainer, point: PyTree) -> Params:
    """Implements `Trainer.params_at`."""
    inner, bounds = in_free_coordinates(trainer), bounds_of(trainer)
    refuse_meaning(point, "`vector` is", "its mask would be lost")
    if inner.projector is None:
        like = ravel(as_parameters(inner.params))
        shape = getattr(point, "shape", None)
        if not is_inexact(point) or shape != like.shape:
            is_array = hasattr(point, "dtype")
            what = f"{point.dtype}{shape}" if is_array else in_few_words(point)
            raise ValueError(
                f"`vector` is {what}, but must be an array of floats of the shape "
                f"{like.shape}, as `objective` takes it. For many vectors, use "
                "`jax.vmap(trainer.params_at)`."
            )
    free = _at(inner, inner.projector, point)
    params, _ = from_free_coordinates(trainer, free, None)
    return params if bounds is None else bounds.clip(params)


def objective(
    trainer: AbstractTrainer, batch: Any
) -> tuple[jax.tree_util.Partial, PyTree]:
    """Implements `Trainer.objective`."""
    require_likelihood(trainer, "The posterior of a sampler")
    if (bijections := bijections_of(trainer)) is not None:
        own, trainer = trainer.params, in_free_coordinates(trainer)
        for path in bijections.resized(trainer.params, own):
            raise ValueError(
                f"`objective` is the density of the elements of the parameters, and "
                f"{path!r} has none: its bijection has another number of free "
                "coordinates. Write that parameter in free coordinates, in the model."
            )
    params = as_parameters(trainer.params)
    start = ravel(params) if trainer.projector is None else trainer.latent
    # A pytree, and hashable, as an argument of `jax.jit` must be.
    bare, projector, batch = stripped(trainer), trainer.projector, as_batch(batch)
    version = version_of((bare, batch))
    return jax.tree_util.Partial(_potential, version, bare, projector, batch), start
