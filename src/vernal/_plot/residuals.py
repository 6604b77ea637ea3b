"""Residuals as points, and how good a fit is in one line."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._boundary import first_names, in_few_words, spelled_leaves
from .._data import as_batch
from .._program import program
from .._report import Report
from .._step import defined, residuals_by_place, step_key, stripped
from .._trainer import Trainer
from .arguments import as_numbers
from .axes import as_label

_evaluate = program(residuals_by_place)


def collect_points(
    trainer: Trainer[Any, Any], batch: Any, x: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Evaluates `residuals`, which belong to `x`: a label, places and values for each.

    Of complex ones there are both parts; missing data are NaN.
    """
    if "residuals" not in defined(trainer):
        raise TypeError(
            f"`{type(trainer).__name__}` defines no `residuals`, which this is a "
            "picture of. Draw the model beside the data: `vernal.plot.band`."
        )
    found = _evaluate(stripped(trainer), as_batch(batch), step_key(trainer))
    places = _places(x, found)
    for where, (term, array) in found.items():
        values, label = np.asarray(array), where.strip("`") * (len(found) > 1)
        if (mask := getattr(term, "where", None)) is not None:
            values = np.where(np.asarray(mask), values, np.nan)
        parts = {"": values}
        if np.iscomplexobj(values):
            label = label or "residuals"
            parts = {".real": np.real(values), ".imag": np.imag(values)}
        for suffix, part in parts.items():
            yield as_label(label + suffix), places[where].ravel(), part.ravel()


def _places(x: Any, terms: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns where each residual belongs, by default its index in its array."""
    shapes = {where: np.shape(array) for where, (_, array) in terms.items()}
    if x is None:
        index = lambda shape: np.arange(int(np.prod(shape))).reshape(shape)
        return {where: index(shape) for where, shape in shapes.items()}
    # One array may be given as a list of numbers.
    is_one, found = "`residuals`" in shapes, dict[str, np.ndarray]()
    given = {"`residuals`": x} if is_one else dict(spelled_leaves("residuals", x))
    for where, shape in shapes.items():
        own = as_numbers(given.get(where))
        if own is None or given.keys() != shapes.keys():
            raise ValueError(
                f"`x` is {in_few_words(x)}, but must have an array of numbers for each "
                f"of {first_names(list(shapes), str)}."
            )
        try:
            found[where] = np.broadcast_to(own, shape)
        except ValueError:
            raise ValueError(
                f"`x` has shape {own.shape} for {where}, which does not broadcast to "
                f"their shape, {shape}."
            ) from None
    return found


def goodness(report: Report) -> str:
    """Says how good a fit is, as far as that is known."""
    if report.chi_squared is None:
        return ""
    name = r"$\chi^2$" if report.expected_deviance is None else "deviance"
    said = f"{name} = {report.chi_squared:.4g}"
    said += f", {report.degrees_of_freedom:.4g} degrees of freedom"
    is_known = report.p_value is not None and report.error_scale == 1
    return said + (f", p = {report.p_value:.2g}" if is_known else "")
