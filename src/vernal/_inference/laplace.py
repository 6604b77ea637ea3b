"""The normal approximation of the likelihood around a point: Laplace's."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from .._curvature import Mode
from .._projection import DenseWhitening, NullPolicy
from .._step import AbstractTrainer, DataKind, defined
from .._tree import as_parameters, ravel_size
from .derivatives import (
    Derived,
    ErrorKind,
    Passes,
    checked_kind,
    derive,
    require_elements,
    require_likelihood,
)
from .observed import error_bar, observed
from .sandwich import sandwich
from .whiten import (
    Reduced,
    checked_spectra,
    hessian_rtol,
    of_hessian,
    of_spectrum,
    reduced,
)


class ErrorOptions(NamedTuple):
    """The options that `Trainer.report` shares with all that has errors."""

    scale_errors: bool
    jac: Mode | None
    kind: ErrorKind | None


# Directions that the data do not constrain are kept, and marked.
NULLS = NullPolicy(on_null="prior")


class Laplace(NamedTuple):
    """A normal distribution of the parameters, and the derivatives that it is made of.

    - `whitening`: its covariance is that of the parameters.
    - `expected`: that of the expected Fisher matrix; of an `nll`, the same.
    - `derived`: the derivatives of `residuals`, or of `nll`.
    - `reduced`: of the Jacobian, the spectrum in the dtype of the parameters; `None`
        for an `nll`.
    - `kind`: which matrix the covariance comes from.
    - `is_of_few`: as of a `Sandwich`.
    """

    whitening: DenseWhitening
    expected: DenseWhitening
    derived: Derived
    reduced: Reduced | None
    kind: ErrorKind
    is_of_few: Any = False

    @property
    def slope(self) -> tuple[Float[Array, " D"], Any]:
        """The gradient of what falls, and the units that it is in."""
        if self.reduced is None:
            return self.derived.found[0].gradient, 1.0
        return self.reduced.slope, self.reduced.spectrum.scale


def laplace(
    trainer: AbstractTrainer,
    batch: Any,
    what: str,
    jac: Mode | None,
    kind: ErrorKind | None,
    *,
    holds: bool = True,
) -> Laplace:
    """Approximates the likelihood at the current point, by the program of `whiten`.

    Errors call the result `what`. Unless it `holds` what is pushed against its bound,
    the bounds are not looked at.
    """
    require_likelihood(trainer, what)
    require_elements(trainer, what)
    kind = checked_kind(trainer, kind)
    passes, params = Passes(jac=jac), as_parameters(trainer.params)
    if "residuals" not in defined(trainer):
        return _observed(trainer, batch, passes, holds)
    derived = derive(trainer, batch, "jacobian", None, passes, holds)
    parts = reduced(derived.found[0], derived.value)
    spectra = (parts.spectrum,)
    (spectrum,), eps = checked_spectra(trainer, batch, spectra, derived.is_finite)
    parts = parts._replace(spectrum=spectrum)
    expected = whitening = of_spectrum(spectrum, params, NULLS, "", eps)
    if (kind := kind_of(kind, derived.data)) != "expected":
        bar = error_bar(derived, ravel_size(params))
        whitening = _observed(trainer, batch, passes, holds, bar).whitening
    is_of_few = False
    if kind == "sandwich":
        found = sandwich(trainer, batch, passes, derived, expected, whitening)
        whitening, is_of_few = found.checked(trainer), found.is_of_few
    return Laplace(whitening, expected, derived, parts, kind, is_of_few)


def kind_of(kind: ErrorKind | None, data: DataKind | None) -> ErrorKind:
    """Chooses the kind of errors, by default the one that suits the data."""
    if kind is not None:
        return kind
    return "sandwich" if data is not None and data.is_robust else "expected"


def _observed(
    trainer: AbstractTrainer, batch: Any, passes: Passes, holds: bool, bar: Any = 1.0
) -> Laplace:
    """Approximates a likelihood by its Hessian; `bar` is as in `observed`."""
    derived, name = observed(trainer, batch, passes, holds, bar)
    hessian = derived.found[0].hessian
    params, rtol = as_parameters(trainer.params), hessian_rtol((hessian,))
    whitening = of_hessian(hessian, params, NULLS, "", name, rtol)
    return Laplace(whitening, whitening, derived, None, "observed")
