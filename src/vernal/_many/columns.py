"""Many results as columns and as a table: a row for each member."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._boundary import PyTree
from .._policy import StopReason
from .._report import plus_minus
from .._step import AbstractTrainer, bounds_of
from .._tree import aligned, by_path, element_name, short_number

Columns = dict[str, np.ndarray]

# The most rows and columns of a table.
_MOST_MEMBERS, _MOST_COLUMNS = 1_000, 12


def by_element(tree: Any) -> Columns:
    """Returns a column for each element of stacked parameters, by its name."""
    columns = {}
    for path, leaf in by_path(tree).items():
        rows = np.asarray(leaf)
        like = {path: rows[0]}
        for index, column in enumerate(rows.reshape(len(rows), -1).T):
            columns[element_name(like, index)] = column
    return columns


class Met(NamedTuple):
    """Bounds, by the name of each element.

    - `flags`: whether it is at one, in each member.
    - `limited`: whether it has one.
    """

    flags: Columns
    limited: Columns


class ByElement(NamedTuple):
    """Columns by the names of elements.

    - `values`, `errors`: those of the elements; the latter may be none.
    - `met`: which values are at a bound.
    - `words`: what there is to say of a column.
    - `goodness`: columns beside them, which say how good a fit is.
    """

    values: Columns
    errors: Columns
    met: Met
    words: dict[str, str]
    goodness: Columns


def as_columns(
    values: Columns, errors: Columns, at_bound: Columns, **others: Any
) -> dict[str, Any]:
    """Joins columns; another one with the name of a parameter has it in brackets."""
    columns: dict[str, Any] = {}
    for name, column in values.items():
        columns[name] = column
        if name in errors:
            columns[f"error[{name}]"] = errors[name]
        if name in at_bound:
            columns[f"at_bound[{name}]"] = at_bound[name]
    taken = set(columns)
    for name, column in others.items():
        columns[f"<{name}>" if name in taken else name] = column
    return columns


def as_table(
    found: ByElement, losses: np.ndarray, reasons: Sequence[StopReason]
) -> str:
    """Writes a row for each member, and a line about those that failed."""
    values, errors, met, words, _ = found
    flags_of = held(errors, met)
    names = list(values)[:_MOST_COLUMNS]
    more = len(values) - len(names)
    rest = [f"{more} more"] if more else []
    heads = (f"{n} ({words[n]})" if n in words else n for n in names)
    head = "member", *heads, *rest, "best loss", "ended"
    rows: list[Sequence[str]] = [head]
    for index in _shown(len(reasons)):
        if index is None:
            rows.append(["…"] * len(head))
            continue
        at_bound = {name for name, flags in flags_of.items() if flags[index]}
        own = [
            f"{short_number(values[n][index])} (at its bound)"
            if n in at_bound
            # What is tied to that alone has no error either.
            else _cell(values[n][index], errors.get(n), index, n in words and at_bound)
            for n in names
        ]
        end = short_number(losses[index]), reasons[index].in_short
        rows.append([str(index), *own, *("…" for _ in rest), *end])
    return "\n".join([aligned(rows), *_failures(reasons)])


def bounds_met(trainer: AbstractTrainer) -> tuple[PyTree, PyTree]:
    """Finds which elements of the parameters are at a bound, and which have one."""
    bounds, params = bounds_of(trainer), trainer.params
    assert bounds is not None
    limits = bounds.limits(params)
    is_on = lambda x, low, high: (x <= low) | (x >= high)
    has_one = lambda _, low, high: jnp.isfinite(low) | jnp.isfinite(high)
    return jax.tree.map(is_on, params, *limits), jax.tree.map(has_one, params, *limits)


def held(errors: Columns, met: Met) -> Columns:
    """Finds what is held at its bound: it alone has no error in its member.

    A column for each element that has a bound, if there are errors.
    """
    if not errors or not met.flags:
        return {}
    lost = [np.isnan(errors[name]) & ~at for name, at in met.flags.items()]
    is_broken = np.any(lost, axis=0)
    limited = {n: at for n, at in met.flags.items() if met.limited[n].any()}
    return {n: np.isnan(errors[n]) & at & ~is_broken for n, at in limited.items()}


def _shown(size: int) -> Iterator[int | None]:
    """Yields the members that have a row, and `None` for a gap."""
    half = _MOST_MEMBERS // 2
    for index in range(size):
        if size <= _MOST_MEMBERS or not half < index < size - half:
            yield index
        elif index == half + 1:
            yield None


def _cell(value: Any, errors: np.ndarray | None, index: int, is_still: Any) -> str:
    if errors is None or (is_still and math.isnan(errors[index])):
        return short_number(value)
    return plus_minus(float(value), float(errors[index]))


def _failures(reasons: Sequence[StopReason]) -> Iterator[str]:
    failed: dict[StopReason, list[str]] = {}
    for index, reason in enumerate(reasons):
        if reason.is_failure:
            failed.setdefault(reason, []).append(str(index))
    if failed:
        count = sum(map(len, failed.values()))
        said = (f"{', '.join(own)} ({r.in_short})" for r, own in failed.items())
        yield f"{count} of {len(reasons)} failed: {'; '.join(said)}"
