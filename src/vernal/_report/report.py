"""`Report`: what there is to say of a fit."""

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from .._minimum import chi_squared_p_value
from .._policy import StopReason
from .._tree import aligned, short_number, unknown_name
from .rows import ParameterRow, written

Section = list[tuple[str, ...]]
"""The rows of a table; the first one is its head."""

# The most rows of parameters and of correlations.
_MOST_ROWS, _MOST_PAIRS = 64, 12
_LEAST_CORRELATION = 0.1

# Beyond it a p-value is no accident.
_LEAST_CHANCE = 1e-6

# An error of more times its value says nothing of a relative one.
_MOST_RELATIVE = 100


class Correlation(NamedTuple):
    """The correlation of two elements, by their names."""

    first: str
    second: str
    value: float


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Report:
    r"""What [`vernal.Trainer.report`][] returns: how good a fit is, and its parameters.

    It prints as text, and shows as tables in a notebook. `report["a.width"]` is the row
    of one element. What is not known is `None`.

    **Attributes:**

    - `chi_squared`: $\chi^2$, the sum of squared `residuals`; of a likelihood its
        deviance, such as Cash's statistic of [`vernal.likelihoods.Poisson`][]. `None`
        for an `nll`, and for [`vernal.likelihoods.Robust`][].
    - `data_count`: $N$, the number of residuals; complex ones count twice, missing ones
        (`where=`) not at all.
    - `free_count`: the number of free parameters, element by element.
    - `degrees_of_freedom`: $N - k$, where $k$ counts the directions that the data
        constrain, `effective_count`.
    - `effective_count`: $k$. This is `free_count`, unless a parameter is unconstrained
        or has a prior: see below. With `priors` it need not be whole.
    - `reduced_chi_squared`: $\chi^2 / (N - k)$.
    - `expected_deviance`: for counts, the mean and the standard deviation that the
        deviance has if the model is right, given the parameters that were fitted: few
        counts scatter less than $\chi^2$ does, and a fit takes its share. NaN where
        there are fewer than five counts for each parameter, or some are not whole
        numbers; `None` for other data. See Kaastra, Astronomy & Astrophysics 605
        (2017), A51, and McCullagh, Journal of the American Statistical Association 81
        (1986), 104.
    - `p_value`: the probability of a $\chi^2$ at least as large, if the model is right
        and the residuals are in units of their error bars. For counts, the deviance is
        compared with `expected_deviance`, and with the skewness that it has: a shifted
        gamma distribution, which is that of $\chi^2$ for large counts. Of a few counts
        it is none, since each moves the deviance by as much as it scatters. Fewer than
        ten are simulated if nothing is fitted to them, as with a signal at its bound
        above a known background; else the p-value is `None`, and the note says so. With
        `priors` the truth is taken to be drawn from them; then $\chi^2$ has the mean
        $N - k$, and where data and priors share a direction a scatter somewhat smaller
        than this distribution.
    - `aic`, `bic`: Akaike's and the Bayesian information criterion, `None` for a robust
        loss, which is no likelihood, and the latter also without data; with $L$ as
        below,

        $$\mathrm{AIC} = -2 \log L + 2 k, \qquad
          \mathrm{BIC} = -2 \log L + k \log N.$$
    - `prior_penalty`: $-2 \log$ of the priors at this point, without the constants of
        normal ones: for these the sum of $((x - \mu) / \sigma)^2$. `None` without
        priors. It is no part of $\chi^2$ and $L$, which are of the data alone.
    - `edm`: the estimated distance to the minimum, see [`vernal.FitResult`][]; NaN
        where it is not known.
    - `stop_reason`: why the fit ended, for the report of a result.
    - `error_kind`: which matrix the errors come from: `"expected"`, `"observed"` or
        `"sandwich"`, see [`vernal.Trainer.standard_errors`][].
    - `error_scale`: the factor of all errors, 1 without `scale_errors`.
    - `parameters`: a row for each element, with `name`, `value`, `error`, `status` and
        `is_free`. The error is infinite if the data do not constrain the element, and
        NaN if it is not free, or complex and tied. The status says what else there is
        to know, such as "frozen"; often it is empty.
    - `correlation_matrix`: the correlations of the free elements, in the order of
        `parameters`; NaN where an error is infinite.

    With `priors`, $k$ is the effective number of parameters, the trace of the smoother:

    $$k = \operatorname{tr} F_d (F_d + F_p)^+$$

    with the curvature $F_d$ of the negative log-likelihood of the data, and $F_p$ of
    that of the priors. A direction that the data see better than its prior counts as
    nearly one, and one that the prior dominates as nearly none. Elements held at their
    bounds count for nothing. See Spiegelhalter et al., *Bayesian measures of model
    complexity and fit*, Journal of the Royal Statistical Society B 64 (2002), 583, and
    Hastie and Tibshirani, *Generalized Additive Models* (1990).

    For `residuals` $-2 \log L = \chi^2$: without the constant
    $\sum_i \log 2 \pi \sigma_i^2$, which is the same for all models of the same data.
    With `scale_errors` the error bars are not known. Then the highest likelihood over
    their scale counts, $-2 \log L = N \log(\chi^2 / N)$, again without a constant. This
    is what lmfit calls AIC and BIC, whatever its `scale_covar`. For an `nll` it is
    twice the `nll`, with whatever constant this has; criteria of models can be compared
    only if these agree.
    """

    # `Any` stands for `None`: with `None` itself, type checkers would ask users for an
    # `assert` before each use.
    chi_squared: float | Any = None
    data_count: int | Any = None
    free_count: int
    effective_count: int | float
    degrees_of_freedom: int | float | Any = None
    reduced_chi_squared: float | Any = None
    expected_deviance: tuple[float, float] | Any = None
    p_value: float | Any = None
    aic: float | Any = None
    bic: float | Any = None
    prior_penalty: float | Any = None
    edm: float = math.nan
    error_kind: str
    stop_reason: StopReason | None = None
    error_scale: float = 1.0
    parameters: tuple[ParameterRow, ...]
    correlation_matrix: Float[np.ndarray, "D D"]
    note: str | None = None
    """Where to go on, if it is not at a minimum, or why its numbers mislead, as where
    the p-value is below 1e-6 or above 1 - 1e-6."""

    def __getitem__(self, name: str) -> ParameterRow:
        """Returns the row of one element, by its name."""
        rows = {row.name: row for row in self.parameters}
        if name not in rows:
            raise unknown_name("The report has no row", name, rows)
        return rows[name]

    @property
    def correlations(self) -> tuple[Correlation, ...]:
        """All pairs of free elements and their correlations, the largest first.

        A pair has the fields `first`, `second` and `value`.
        """
        rows, columns = np.triu_indices(len(self.correlation_matrix), 1)
        values = self.correlation_matrix[rows, columns]
        kept = np.flatnonzero(np.isfinite(values))
        order = kept[np.argsort(-abs(values[kept]), kind="stable")]
        names = [row.name for row in self.parameters if row.is_free]
        return tuple(
            Correlation(names[i], names[j], float(value))
            for i, j, value in zip(
                rows[order], columns[order], values[order], strict=True
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as dictionaries, lists, numbers and strings.

        `parameters` is a dictionary by name.
        """
        found = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        del found["correlation_matrix"]
        reason = None if self.stop_reason is None else str(self.stop_reason)
        return found | {
            "stop_reason": reason,
            "parameters": {
                row.name: {"value": row.value, "error": row.error, "status": row.status}
                for row in self.parameters
            },
            "correlations": [tuple(pair) for pair in self.correlations],
        }

    def to_dataframe(self) -> Any:
        """Returns the parameters as a `pandas.DataFrame`, with their names as index.

        The columns are `value`, `error` and `status`.

        **Raises:**

        - `ImportError`: if pandas is not installed.
        """
        columns = ("value", "error", "status")
        cells = {
            name: [getattr(row, name) for row in self.parameters] for name in columns
        }
        names = [row.name for row in self.parameters]
        return pandas().DataFrame(cells, index=pandas().Index(names, name="parameter"))

    def __str__(self) -> str:
        """Returns the report as plain text."""
        text = "\n\n".join(aligned(section) for section in _sections(self))
        return text if self.note is None else f"{text}\n\n{self.note}"

    def __repr__(self) -> str:
        chi = self.chi_squared
        shown = "" if chi is None else f"chi_squared={chi:.6g}, "
        dof = self.degrees_of_freedom
        shown += "" if dof is None else f"degrees_of_freedom={number(dof)}, "
        return f"Report({shown}free_count={self.free_count})"

    def _repr_html_(self) -> str:
        tables = "".join(map(_table, _sections(self)))
        note = "" if self.note is None else f"<p>{html.escape(self.note)}</p>"
        return f"<div>{tables}{note}</div>"


def _table(section: Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    head, *body = section
    rows = "".join(row(cells, "td") for cells in body)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{rows}</tbody></table>"


def _sections(report: Report) -> Iterator[Section]:
    reason = "" if report.stop_reason is None else str(report.stop_reason)
    yield [("fit", reason), *_facts(report)]
    heads = ("parameter", "value", "standard error", "relative")
    yield [heads, *map(_cells, _shortened(report.parameters))]
    pairs = [p for p in report.correlations if abs(p.value) >= _LEAST_CORRELATION]
    if pairs:
        shown = [(f"{a}, {b}", f"{value:+.3f}") for a, b, value in pairs[:_MOST_PAIRS]]
        more = len(pairs) - len(shown)
        rest = [(f"{more} more, in `report.correlations`", "…")] if more else []
        yield [(f"correlations of at least {_LEAST_CORRELATION}", ""), *shown, *rest]


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    is_scaled = report.error_scale != 1
    expected = report.expected_deviance
    name = "chi-squared" if expected is None else "deviance"
    is_whole = report.effective_count == report.free_count
    # How many data an `nll` has is not seen.
    is_counted = report.aic is None or report.data_count is not None
    facts = {
        "data": report.data_count,
        "free parameters": report.free_count,
        "effective parameters": None if is_whole else report.effective_count,
        "degrees of freedom": report.degrees_of_freedom,
        name: report.chi_squared,
        f"reduced {name}": report.reduced_chi_squared,
        "expected deviance": expected,
        # Without error bars chi-squared has no distribution.
        "p-value": None if is_scaled else report.p_value,
        "AIC": report.aic,
        "BIC": report.bic if is_counted else "needs `data_count=`",
        "prior penalty": report.prior_penalty,
        "edm": report.edm,
        "errors multiplied by": report.error_scale if is_scaled else None,
    }
    for name, value in facts.items():
        first = value[0] if isinstance(value, tuple) else value
        if isinstance(value, str):
            yield name, value
        elif first is not None and not math.isnan(first):
            is_pair = isinstance(value, tuple)
            yield name, " ± ".join(written(*value)) if is_pair else number(value)
    if report.error_kind == "sandwich":
        yield "errors", "from the scatter of the data (sandwich)"


def number(value: int | float) -> str:
    """Writes an integer in full, and another number with six digits or ten."""
    return str(value) if isinstance(value, int) else short_number(value)


def _cells(row: ParameterRow) -> tuple[str, str, str, str]:
    relative = ""
    if row.value and abs(row.error) < _MOST_RELATIVE * abs(row.value):
        percent = 100 * abs(row.error / row.value)
        # With two digits, a large one without an exponent.
        text = f"{percent:.2g}"
        relative = f"{float(text):.0f} %" if percent >= 99.5 else f"{text} %"
    return (*row.cells(), relative)


def _shortened(rows: Sequence[ParameterRow]) -> Sequence[ParameterRow]:
    """Leaves out the middle of many rows."""
    gap = len(rows) - _MOST_ROWS
    if gap <= 0:
        return rows
    half = _MOST_ROWS // 2
    between = ParameterRow(f"{gap} more, in `report.parameters`", None, math.nan, "")
    return [*rows[:half], between, *rows[half + gap :]]


def pandas() -> Any:
    """Imports pandas where it is used."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise ImportError(
            "`to_dataframe` makes a table of pandas, which is not installed: "
            "`pip install pandas`. `to_dict` needs nothing."
        ) from None
    return pandas


def p_value(chi_squared: float | None, degrees: int | float | None) -> float | None:
    """Returns the probability of a larger chi-squared, if it has a distribution."""
    if chi_squared is None or degrees is None or degrees <= 0:
        return None
    return float(chi_squared_p_value(chi_squared, degrees))


def p_value_note(chance: float | None, is_of_counts: bool) -> str | None:
    """Says what a p-value means that no right model has, with right error bars."""
    if chance is None or _LEAST_CHANCE <= chance <= 1 - _LEAST_CHANCE:
        return None
    if chance < _LEAST_CHANCE:
        what = (
            "the counts, or these scatter more than those of Poisson do"
            if is_of_counts
            else "the data, or their error bars are too small"
        )
        return (
            f"p-value below {_LEAST_CHANCE:.0e}: the model does not describe {what}. "
            "The errors hold for neither"
        )
    what = (
        "counts of Poisson do"
        if is_of_counts
        else "their error bars say. These are too large, or none were given "
        "(`scale_errors=True` takes them from the scatter)"
    )
    return (
        f"p-value above 1 - {_LEAST_CHANCE:.0e}: the data scatter less than {what}; "
        "or the data are smoothed, have been fitted before, or are without noise"
    )


def criteria(
    deviance: float,
    norm: float | None,
    data_count: int | None,
    fitted_count: int | float,
    is_scaled: bool,
) -> tuple[float, float | None]:
    """Returns AIC and BIC; `is_scaled` says whether the error bars are not known.

    `norm` is the root of a deviance that underflows.
    """
    if is_scaled and data_count and norm:
        deviance = data_count * (2 * math.log(norm) - math.log(data_count))
    elif is_scaled and data_count:
        ratio = deviance / data_count
        deviance = data_count * math.log(ratio) if ratio > 0 else -math.inf
    bic = deviance + fitted_count * math.log(data_count) if data_count else None
    return deviance + 2 * fitted_count, bic
