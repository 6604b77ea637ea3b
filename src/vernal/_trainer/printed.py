"""What `print(trainer)` shows, and the short `repr` of tracebacks."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._constraints import Bounds
from .._optimiser import ParamOptimiser
from .._step import (
    AbstractTrainer,
    bijections_of,
    bounds_of,
    priors_of,
    progress_of,
    template_of,
    tied_words,
)
from .._tree import aligned, named_leaves, short_number

_MOST_ROWS = 64


def in_short(trainer: AbstractTrainer) -> str:
    """Describes a trainer in one line. Never raises."""
    parts = ["..."]
    # It may be half made, or have anything for its leaves.
    with contextlib.suppress(Exception):
        progress = progress_of(trainer)
        node = template_of(trainer).structure.node_data()
        model = "array" if node is None else node[0].__name__
        params = jax.tree.leaves(progress.params)
        count, is_stacked = len(params), np.ndim(progress.step_count)
        parts = [model, f"{count} parameter{'' if count == 1 else 's'}"]
        shapes = [np.shape(leaf)[is_stacked:] for leaf in params]
        if (numbers := sum(map(math.prod, shapes))) != count:
            parts.append(f"{numbers:,} number{'' if numbers == 1 else 's'}")
        if is_stacked:
            parts.append(f"{len(progress.step_count)} members")
        parts.append(f"step_count={_value(progress.step_count)}")
        parts.append(f"best_loss={_value(progress.best_loss)}")
    return f"{type(trainer).__name__}({', '.join(parts)})"


def printed(trainer: AbstractTrainer) -> str:
    """Tabulates the parameters of a trainer: values, and which are fitted by what."""
    line = in_short(trainer)
    with contextlib.suppress(Exception):
        return f"{line}\n{aligned(_rows(trainer))}"
    return line


def _rows(trainer: AbstractTrainer) -> list[tuple[str, str, str]]:
    trained = _trained_by(trainer) | tied_words(trainer)
    for path, words in _constrained(trainer):
        trained[path] = f"{trained.get(path, '')}, {words}".lstrip(", ")
    rows = []
    for leaf in named_leaves(trainer.model):
        if fate := trained.get(leaf.path) or leaf.unfitted:
            rows.append((leaf.path, _value(leaf.value), fate))
    more = len(rows) - _MOST_ROWS
    shown = [*rows[:_MOST_ROWS], *([(f"{more} more", "…", "")] if more > 0 else [])]
    return [("parameter", "value", ""), *shown]


def _constrained(trainer: AbstractTrainer) -> Iterator[tuple[str, str]]:
    """Yields the bounds, the bijections and the priors, each with its path."""
    bounds, priors = bounds_of(trainer) or Bounds({}, {}), priors_of(trainer)
    bijections = template_of(trainer).bijections or bijections_of(trainer)
    for path in bounds.low | bounds.high:
        sides = (side.get(path) for side in (bounds.low, bounds.high))
        low, high = ("" if side is None else _value(side) for side in sides)
        yield path, f"within ({low or '-inf'}, {high or 'inf'})"
    for path, closure in {} if bijections is None else bijections.maps.items():
        yield path, f"by {type(closure.decode()).__name__}"
    if priors is not None:
        for path, prior in priors.normal.items():
            yield path, f"prior {_value(prior.mean)} ± {_value(prior.std)}"
        for path, closure in priors.others.items():
            yield path, f"prior {type(closure.decode()).__name__}"


def _trained_by(trainer: AbstractTrainer) -> dict[str, str]:
    """Says of each trained parameter what trains it."""
    names = [leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter]
    optimiser, trained = trainer.optimiser, dict.fromkeys(names, "trained")
    if isinstance(optimiser, ParamOptimiser):
        # A predicate may ask of a leaf what this one does not have.
        with contextlib.suppress(Exception):
            owners = optimiser.owners(trainer.params, filtered=True)
            for name, owner in zip(names, owners, strict=True):
                if owner is not None:
                    trained[name] = f"trained by {optimiser.name_of(owner)}"
    return trained


def _value(leaf: Any) -> str:
    """Writes one number out, and of an array the dtype and the shape."""
    if isinstance(leaf, int):
        return str(leaf)
    if isinstance(leaf, float | complex):
        return short_number(leaf)
    kind = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if np.size(leaf) != 1 or isinstance(leaf, jax.core.Tracer):
        return kind
    try:
        number = np.asarray(leaf).item()
    except Exception:  # Deleted, or on a device of another process.
        return kind
    # Integers in full.
    is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    return str(number) if is_integer else short_number(number)
