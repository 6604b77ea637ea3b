"""The report and the table of a trainer."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from .._boundary import boolean, refuse_program, whole_number
from .._curvature import IndefiniteError
from .._data import as_batch
from .._minimum import (
    Site,
    distance_of,
    minimum_note,
    saddle_words,
    second_look,
    slope_note,
    surroundings,
    what_falls,
)
from .._projection import DenseWhitening
from .._report import (
    ParameterRow,
    Report,
    criteria,
    p_value,
    p_value_note,
    parameter_rows,
)
from .._step import (
    AbstractTrainer,
    defined,
    in_free_coordinates,
    stripped,
    template_of,
    tied_words,
)
from .._tree import aligned, as_parameters, element_name, named_leaves, short_number
from .counts import OfCounts, expected_deviance, of_counts
from .derivatives import Passes
from .elements import elements_of, held_elements, scaled, tied_of
from .expansion import (
    NO_SCATTER,
    Around,
    OfElements,
    expanded,
    penalty_of,
    seen_again,
)
from .laplace import ErrorOptions, Laplace, laplace
from .observed import observed
from .propagate import pinned_text, propagated
from .sandwich import few_text

# The most rows that one array has in a table.
_MOST_ROWS = 64

ROUNDING = (
    "rounding may hide how well the data constrain what is unconstrained here: compute "
    "in float64"
)

# The resolution of null directions in float64.
_OF_FLOAT64 = math.sqrt(np.finfo(np.float64).eps)


def report(
    trainer: AbstractTrainer, batch: Any, data_count: int | None, options: ErrorOptions
) -> Report:
    """Implements `Trainer.report`."""
    refuse_program("report", trainer, batch)
    is_scaled = boolean(options.scale_errors, "scale_errors")
    if data_count is not None:
        data_count = whole_number(data_count, "data_count", least=1)
    trainer = in_free_coordinates(trainer)
    try:
        here, found, counts = _around(trainer, batch, "A report", options)
    except IndefiniteError as error:
        lost = _lost(trainer, batch, options, error)
        return _report_of_values(trainer, lost, data_count)
    if data_count is not None:
        _check_count(data_count, here, counts)
        here = here._replace(data_count=data_count, zero_count=0)
    scale = here.error_scale(is_scaled)
    distance, degrees = here.distance, here.degrees_of_freedom
    chi, own = here.chi_squared, here.of_elements(trainer)
    tied, of_tied = _tied(trainer, here, scale)
    aic, bic, expected, chance = None, None, None, p_value(chi, degrees)
    if here.data is None or not here.data.is_robust:
        sizes = here.data_count, here.fitted_count
        aic, bic = criteria(here.deviance, here.norm, *sizes, is_scaled)
    if counts is not None:
        known = expected_deviance(counts, found, here)
        expected = (math.nan, math.nan) if known is None else (known.mean, known.std)
        chance = None if known is None else known.p_value(here.deviance)
    return Report(
        chi_squared=chi,
        data_count=here.data_count,
        free_count=here.free_count,
        effective_count=here.fitted_count,
        degrees_of_freedom=degrees,
        reduced_chi_squared=here.reduced_chi_squared,
        expected_deviance=expected,
        p_value=chance,
        aic=aic,
        bic=bic,
        prior_penalty=here.penalty,
        edm=math.nan if distance is None else float(distance.edm),
        error_kind=here.kind,
        error_scale=scale,
        parameters=tuple(_rows(trainer, own, tied, scale)),
        correlation_matrix=own.correlations(),
        # A fit of as many parameters as data has no p-value, however many counts.
        note=_joined(
            _note(trainer, here, counts, chance is None and bool(degrees)),
            # Without error bars chi-squared has no distribution.
            None if is_scaled else _p_value_note(trainer, here, chance, counts),
            of_tied,
            here.zeros_note(),
        ),
    )


def _check_count(data_count: int, here: Around, counts: OfCounts | None) -> None:
    """Refuses a number of data that cannot be theirs."""
    if data_count < here.fitted_count:
        raise ValueError(
            f"`data_count` is {data_count}, but the data constrain "
            f"{here.fitted_count:.4g} directions: there are at least as many data."
        )
    if here.data_count is not None and data_count > here.data_count:
        raise ValueError(
            f"`data_count` is {data_count}, but there are {here.data_count} residuals, "
            "and no more data than these."
        )
    if counts is not None and data_count != here.data_count:
        raise ValueError(
            "`data_count` cannot stand beside counts, whose deviance is compared datum "
            "by datum. Give the likelihood the mask of what is missing, as in "
            "`vn.likelihoods.Poisson(..., where=)`, and leave it out."
        )


def _around(
    trainer: AbstractTrainer, batch: Any, what: str, options: ErrorOptions
) -> tuple[Around, Laplace, OfCounts | None]:
    """Looks around the current point, and at the data if some of them are counts."""
    found = laplace(trainer, batch, what, options.jac, options.kind)
    here = seen_again(trainer, batch, expanded(trainer, batch, found))
    is_known = here.data is None or here.data.is_robust or not here.data.has_scale
    return here, found, None if is_known else of_counts(trainer, batch)


def _note(
    trainer: AbstractTrainer, here: Around, counts: OfCounts | None, is_few: bool
) -> str | None:
    """Returns what there is to say of the fit and its errors, a line for each."""
    params, of_point, of_data = trainer.params, None, None
    if here.distance is not None:
        of_point = minimum_note(here.distance, params)
        if of_point is None and here.kind == "expected":
            of_point = slope_note(here.distance, params)
    if of_point is None and hidden_by_rounding(here.whitening).any():
        of_point = ROUNDING
    if counts is not None:
        of_data = counts.note(here.kind == "sandwich", is_few)
    return _joined(of_point, of_data, few_text(here.is_of_few, params))


def _p_value_note(
    trainer: AbstractTrainer,
    here: Around,
    chance: float | None,
    counts: OfCounts | None,
) -> str | None:
    """Says what a p-value near 0 or 1 means, where nothing else explains it."""
    distance = here.distance
    is_short = distance is not None and minimum_note(distance, trainer.params)
    # The sandwich has errors of any scatter, and a forecast has none.
    is_exact = here.kind == "sandwich" or not here.chi_squared
    if is_short or is_exact or here.zeros_note():
        return None
    return p_value_note(chance, counts is not None)


def _joined(*notes: str | None) -> str | None:
    return "\n".join(filter(None, notes)) or None


def hidden_by_rounding(whitening: DenseWhitening) -> Bool[np.ndarray, " D"]:
    """Returns which elements, if their errors are infinite, float64 may constrain."""
    null = np.asarray(whitening.vectors, float)[:, np.asarray(whitening.is_null)]
    # An element that does nothing is a null direction by itself, in any precision.
    is_idle = np.square(null).sum(axis=1) > 1 - whitening.resolution
    is_known = np.count_nonzero(is_idle) == null.shape[1]
    is_fine = is_known or whitening.resolution <= _OF_FLOAT64
    return np.zeros_like(is_idle) if is_fine else ~is_idle


def table(trainer: AbstractTrainer, batch: Any, options: ErrorOptions) -> str:
    """Implements `Trainer.table`."""
    refuse_program("table", trainer, batch)
    scale_errors = boolean(options.scale_errors, "scale_errors")
    trainer, own, tied = in_free_coordinates(trainer), None, {}
    note, scale, held = None, 1.0, set[str]()
    try:
        if batch is not None:
            here, _, counts = _around(trainer, batch, "A standard error", options)
            scale = here.error_scale(scale_errors)
            own = here.of_elements(trainer)
            tied, of_tied = _tied(trainer, here, scale)
            note = _joined(_note(trainer, here, counts, False), of_tied)
    except IndefiniteError as error:
        _, held, note = _lost(trainer, batch, options, error)
    head = "parameter", "value", "" if batch is None else "standard error"
    rows = _rows(trainer, own, tied, scale, _MOST_ROWS)
    cells = (row.cells() for row in _marked(rows, held))
    text = aligned([head, *cells])
    return text if note is None else f"{text}\n{note}"


def _tied(
    trainer: AbstractTrainer, here: Around, scale: float
) -> tuple[dict[str, np.ndarray], str | None]:
    """Returns the errors of what is tied to others, and what makes them too small.

    They are those of a function of the others; what is complex has none.
    """
    if (tied := tied_of(trainer, trainer.model)) is None:
        return {}, None
    _, found, pinned, _ = propagated(trainer, tied, here, scale)
    errors = {path: np.asarray(x, float) for path, x in found.items()}
    return errors, pinned_text(trainer, pinned, "what is tied to others")


class _Lost(NamedTuple):
    """What there is to say of a point where an `nll` has no errors.

    - `edm`: how far it is from a minimum, NaN if something else is minimised.
    - `held`: the names of the elements that are held at their bounds.
    - `note`: why there are no errors, and what helps.
    """

    edm: float
    held: set[str]
    note: str


def _lost(
    trainer: AbstractTrainer, batch: Any, options: ErrorOptions, error: IndefiniteError
) -> _Lost:
    """Looks at a point at which an `nll` curves downwards; `residuals` have errors."""
    if "residuals" in defined(trainer):
        raise error
    if options.scale_errors:
        raise ValueError(NO_SCATTER) from error
    # By the program that has just run.
    derived, _ = observed(trainer, batch, Passes(jac=options.jac), holds=True)
    params, (hessian, gradient) = as_parameters(trainer.params), derived.found[0]
    at = derived.held, params, trainer.projector
    flags, elements = held_elements(trainer, derived.held), elements_of(trainer)
    held = {element_name(elements, int(i)) for i in np.flatnonzero(np.asarray(flags))}
    edm, note = math.nan, f"no errors: {error}"
    if what_falls(trainer) == "nll":
        local = surroundings(derived.value, gradient, hessian, *at)
        site = Site(stripped(trainer), as_batch(batch), "nll")
        # At a kink, too, the loss only seems to curve downwards.
        distance = second_look(site, local, distance_of(local))
        edm = float(distance.edm)
        if distance.is_saddle:
            words = saddle_words(distance, params, _GO_ON)
            note = f"no errors, as it is not at a minimum: the loss {words}"
    return _Lost(edm, held, note)


_GO_ON = (
    "fit on, with more steps (`max_steps=`) if it took them all; or start from "
    "elsewhere"
)


def _report_of_values(
    trainer: AbstractTrainer, lost: _Lost, data_count: int | None
) -> Report:
    """Reports what there is without errors: no criterion is of this point."""
    rows = tuple(_marked(_rows(trainer, None, {}, 1.0), lost.held))
    size = sum(row.is_free for row in rows)
    return Report(
        data_count=data_count,
        free_count=size,
        effective_count=size,
        prior_penalty=penalty_of(trainer),
        edm=lost.edm,
        error_kind="observed",
        parameters=rows,
        correlation_matrix=np.full((size, size), np.nan),
        note=lost.note,
    )


def _marked(rows: Iterator[ParameterRow], held: set[str]) -> Iterator[ParameterRow]:
    """Marks the elements that are held at their bounds."""
    for row in rows:
        if row.name in held:
            status = f"at its bound ({short_number(row.value)})"
            row = row._replace(status=status, is_free=False)
        yield row


def _rows(
    trainer: AbstractTrainer,
    own: OfElements | None,
    tied: dict[str, np.ndarray],
    scale: float,
    most: int | None = None,
) -> Iterator[ParameterRow]:
    """Yields a row for each element; without their own errors, there are none.

    The parameters of the trainer may be free coordinates.
    """
    free = [leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter]
    bijections = template_of(trainer).bijections
    model, errors, fixed = trainer.model, None, set()
    if own is not None:
        errors = own._replace(errors=scaled(own.errors, scale)).by_path(trainer)
        fixed = {
            element_name({path: errors[path]}, int(index))
            for path in (() if bijections is None else bijections.maps)
            for index in np.flatnonzero(np.isnan(errors[path]))
        }
        errors |= tied
    for row in parameter_rows(model, free, errors, tied_words(trainer), most):
        yield row._replace(status="fixed") if row.name in fixed else row
