"""Parameters, and functions of them, as rows of a table: value, error, status."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._boundary import spacing
from .._tree import Leaf, element_name, named_leaves, short_number

# As many as a date in days has, with its errors of hundredths of a second.
_MOST_CHARACTERS = 16

# After the first: as float64 has, and one more.
_MOST_DIGITS = 16


class ParameterRow(NamedTuple):
    """One element of a parameter.

    - `name`: its path and index, such as `wfe[6]`.
    - `value`: its value, `None` for an array that is not fitted.
    - `error`: its standard error: infinite if the data do not constrain it, NaN if it
        is not fitted or there is none.
    - `status`: what else there is to know of it, such as "frozen" or "unconstrained".
    - `is_free`: whether it is fitted, and not held at a bound.
    """

    name: str
    # `Any` stands for a complex number and for `None`.
    value: float | Any
    error: float
    status: str
    is_free: bool = False

    def cells(self) -> tuple[str, str, str]:
        """Returns the name, and the value and the error as text."""
        value, error = written(self.value, self.error)
        return self.name, value, ", ".join(filter(None, (error, self.status)))


def _status(value: Any, error: float | None) -> str:
    """Says what there is to know of a free element beside its value and its error."""
    if error is None:
        return ""
    if math.isinf(error):
        return "unconstrained"
    if math.isnan(error):
        return f"at its bound ({short_number(value)})"
    if 0 < error < (apart := spacing(value, value.dtype)):
        return f"below the spacing of {value.dtype} ({apart:.2g})"
    return ""


def parameter_rows(
    model: Any,
    free: Collection[str],
    errors: Mapping[str, np.ndarray] | None,
    tied: Mapping[str, str],
    most: int | None = None,
) -> Iterator[ParameterRow]:
    """Yields a row for each element of what is `free`, and one for each other leaf.

    What is `tied` to something else has a row for each element too, which says so. An
    array of more than `most` elements has a gap.
    """
    for leaf in named_leaves(model):
        own = None if errors is None else errors.get(leaf.path)
        if leaf.path in free:
            yield from _elements(leaf, own, most)
        elif leaf.path in tied:
            for row in _elements(leaf, own, most):
                yield row._replace(status=tied[leaf.path], is_free=False)
        elif leaf.unfitted:
            is_one = np.size(leaf.value) == 1
            value = np.asarray(leaf.value).item() if is_one else None
            yield ParameterRow(leaf.path, value, math.nan, leaf.unfitted)


def _elements(
    leaf: Leaf, errors: np.ndarray | None, most: int | None
) -> Iterator[ParameterRow]:
    values = np.asarray(leaf.value)
    gap = range(0)
    if most is not None and values.size > most:
        gap = range(most // 2, values.size - 1)
    for index in range(values.size):
        if index in gap:
            if index == gap[0]:
                name = f"{leaf.path}: {len(gap)} more"
                yield ParameterRow(name, None, math.nan, "")
            continue
        name, value = element_name({leaf.path: values}, index), values.flat[index]
        error = None if errors is None else float(errors.flat[index])
        own = math.nan if error is None else error
        is_free = error is None or not math.isnan(error)
        yield ParameterRow(name, value.item(), own, _status(value, error), is_free)


def written(value: Any, error: float) -> tuple[str, str]:
    """Writes an error with two significant digits, and its value to the same place.

    Without a finite error, there is none to write.
    """
    if value is None:
        return "…", ""
    if not math.isfinite(error) or isinstance(value, complex):
        return short_number(value), ""
    if not (error > 0 and math.isfinite(value)):
        return short_number(value), f"{error:.2g}"
    # Rounded first: the two digits of 0.0996 are those of 0.10.
    last = math.floor(math.log10(float(f"{error:.1e}"))) - 1
    decimals, size = max(-last, 0), max(abs(value), error)
    fixed = f"{value:.{decimals}f}"
    # A large number too, if it has no zeros in the place of digits.
    if size >= 1e-4 and (size < 1e6 or last <= 0) and len(fixed) <= _MOST_CHARACTERS:
        return fixed, f"{error:.{decimals}f}"
    first = math.floor(math.log10(abs(value))) if value else last
    digits = min(max(first - last, 0), _MOST_DIGITS)
    return f"{value:.{digits}e}", f"{error:.1e}"


def plus_minus(value: Any, error: float) -> str:
    """Writes a value and its error in one cell."""
    text, shown = written(value, error)
    if math.isinf(error):
        return f"{text} (unconstrained)"
    return f"{text} ± {shown or 'nan'}"


# The most lines of one array.
_MOST_LINES = 16


class Propagated(NamedTuple):
    """What [`vernal.Trainer.propagate`][] returns: `value, error = ...`.

    It prints as a line for each element, `name = value ± error`, with the digits that
    the error leaves. Of an array of more than 16 elements the middle is left out.

    **Attributes:**

    - `value`: what the function returned.
    - `error`: a tree like it, with the standard errors.
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        """Returns the lines; a single number has no name."""
        leaves = [leaf for leaf in named_leaves(self.error) if leaf.is_parameter]
        errors = {leaf.path: np.asarray(leaf.value) for leaf in leaves}
        rows = list(parameter_rows(self.value, errors, errors, {}, _MOST_LINES))
        names = [row.name for row in rows if row.value is not None]
        width = max(map(len, names), default=0)
        return "\n".join(_line(row, width) for row in rows)

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        # For notebooks, which show what `repr` returns otherwise.
        printer.text(str(self))


def _line(row: ParameterRow, width: int) -> str:
    if row.value is None:
        return row.name.removeprefix(": ")  # a gap
    text = plus_minus(row.value, row.error)
    return f"{row.name:{width}} = {text}" if row.name else text
