"""The report of a trainer."""

import math
from typing import Any

from .._boundary import boolean, refuse_program, whole_number
from .._curvature import Mode
from .._minimum import edm_note
from .._report import Report, criteria, p_value, parameter_rows
from .._step import AbstractTrainer
from .expansion import around


def report(
    trainer: AbstractTrainer,
    batch: Any,
    scale_errors: bool,
    data_count: int | None,
    jac: Mode | None,
) -> Report:
    """Implements `Trainer.report`."""
    refuse_program("report", trainer, batch)
    is_scaled = boolean(scale_errors, "scale_errors")
    if data_count is not None:
        data_count = whole_number(data_count, "data_count", least=1)
    here = around(trainer, batch, jac, "A report")
    if data_count is not None:
        here = here._replace(data_count=data_count)
    scale = here.error_scale(is_scaled)
    errors = here.errors()
    by_path = here.by_path(scale * errors)
    distance, degrees = here.distance, here.degrees_of_freedom
    chi = here.deviance if here.has_residuals else None
    aic, bic = criteria(here.deviance, here.data_count, here.rank, is_scaled)
    return Report(
        chi_squared=chi,
        data_count=here.data_count,
        free_count=here.whitening.scale.size,
        degrees_of_freedom=degrees,
        reduced_chi_squared=here.reduced_chi_squared,
        p_value=p_value(chi, degrees),
        aic=aic,
        bic=bic,
        edm=math.nan if distance is None else float(distance.edm),
        stop_reason=None,
        error_scale=scale,
        parameters=tuple(parameter_rows(trainer.model, by_path, by_path)),
        correlation_matrix=here.whitening.correlations_of_the_data(errors),
        note=None if distance is None else edm_note(distance, trainer.params),
    )
