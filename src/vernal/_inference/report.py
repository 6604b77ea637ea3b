"""The report of a trainer."""

import math
from typing import Any

from .._boundary import boolean, refuse_program, whole_number
from .._curvature import Mode
from .._minimum import edm_note
from .._report import Report, criteria, p_value
from .._step import AbstractTrainer, in_free_coordinates
from .expansion import around
from .laplace import ErrorKind
from .rows import rows


def report(
    trainer: AbstractTrainer,
    batch: Any,
    scale_errors: bool,
    data_count: int | None,
    jac: Mode | None,
    kind: ErrorKind | None,
) -> Report:
    """Implements `Trainer.report`."""
    refuse_program("report", trainer, batch)
    is_scaled = boolean(scale_errors, "scale_errors")
    if data_count is not None:
        data_count = whole_number(data_count, "data_count", least=1)
    trainer = in_free_coordinates(trainer)
    here = around(trainer, batch, "A report", jac, kind)
    if data_count is not None:
        here = here._replace(data_count=data_count, zero_count=0)
    scale = here.error_scale(is_scaled)
    distance, degrees = here.distance, here.degrees_of_freedom
    chi, own = here.chi_squared, here.of_elements(trainer)
    aic, bic = None, None
    if here.data is None or not here.data.is_robust:
        counts = here.data_count, here.fitted_count
        aic, bic = criteria(here.deviance, *counts, is_scaled)
    return Report(
        chi_squared=chi,
        data_count=here.data_count,
        free_count=here.free_count,
        degrees_of_freedom=degrees,
        reduced_chi_squared=here.reduced_chi_squared,
        p_value=p_value(chi, degrees),
        aic=aic,
        bic=bic,
        prior_penalty=here.penalty,
        edm=math.nan if distance is None else float(distance.edm),
        error_kind=here.kind,
        stop_reason=None,
        error_scale=scale,
        parameters=tuple(rows(trainer, (here, own), scale)),
        correlation_matrix=own.correlations(),
        note=None if distance is None else edm_note(distance, trainer.params),
    )
