"""What the data say of the parameters: Fisher matrix, errors, likelihood."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from .._boundary import Params, PyTree, refuse_program, spacing
from .._curvature import Mode
from .._data import as_batch
from .._fit import edm_note
from .._program import Version, version_of
from .._projection import EigenProjector
from .._step import AbstractTrainer, live, negative_log_likelihood, step_key, stripped
from .._tree import aligned, as_parameters, element_name, named_leaves, ravel, unravel
from .metric import require_likelihood, whitening

# The rows that a table gives to one array.
_MOST_ROWS = 64


def standard_errors(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> Params:
    """The errors of the parameters, from the data at the current point."""
    require_likelihood(trainer, "A standard error")
    # No projector: where nothing is constrained at all, there is none.
    errors = whitening(trainer, batch, None, jac).errors_of_the_data()
    return unravel(errors, as_parameters(trainer.params))


def _potential(
    _: Version,
    trainer: AbstractTrainer,
    projector: EigenProjector | None,
    batch: Any,
    point: PyTree,
) -> Float[Array, ""]:
    """Evaluates the negative log-likelihood at a point of the latent space."""
    if projector is None:
        params = unravel(point, trainer.params)
    else:
        params = projector.to_params(point)
    there = live(trainer, params)
    # Not the version that it was made for: it may be called without a program.
    with version_of((trainer, batch)).context():
        return negative_log_likelihood(there, batch, step_key(trainer))


def objective(
    trainer: AbstractTrainer, batch: Any
) -> tuple[jax.tree_util.Partial, PyTree]:
    """The likelihood for a sampler, and where to start it."""
    require_likelihood(trainer, "The posterior of a sampler")
    params = as_parameters(trainer.params)
    start = ravel(params) if trainer.projector is None else trainer.latent
    # A pytree, as a module would be, and hashable, as what `jax.jit` is given must be.
    bare, projector, batch = stripped(trainer), trainer.projector, as_batch(batch)
    version = version_of((bare, batch))
    return jax.tree_util.Partial(_potential, version, bare, projector, batch), start


def table(trainer: AbstractTrainer, batch: Any, jac: Mode | None) -> str:
    """The values of all parameters, with their errors if there are data."""
    refuse_program("table", trainer, batch)
    errors = {}
    if batch is not None:
        found = standard_errors(trainer, batch, jac)
        errors = {leaf.path: np.asarray(leaf.value) for leaf in named_leaves(found)}
    trained = {leaf.path for leaf in named_leaves(trainer.params) if leaf.is_parameter}
    rows = [("parameter", "value", "standard error" if errors else "")]
    for leaf in named_leaves(trainer.model):
        if leaf.path in trained:
            error = errors.get(leaf.path)
            rows += _rows(leaf.path, np.asarray(leaf.value), error)
        elif leaf.unfitted:
            size = np.size(leaf.value)
            value = f"{np.asarray(leaf.value).item():.6g}" if size == 1 else "…"
            rows.append((leaf.path, value, leaf.unfitted))
    note = None if batch is None else edm_note(trainer, batch)
    return aligned(rows) if note is None else f"{aligned(rows)}\n{note}"


def _rows(
    path: str, values: np.ndarray, errors: np.ndarray | None
) -> Iterator[tuple[str, str, str]]:
    """Yields a row for each element, with a gap in an array of very many."""
    for index in range(values.size):
        if values.size > _MOST_ROWS and _MOST_ROWS // 2 <= index < values.size - 1:
            if index == _MOST_ROWS // 2:
                yield f"{path}: {values.size - 1 - index} more", "…", ""
            continue
        name = element_name({path: values}, index)
        value = values.flat[index]
        if errors is None:
            yield name, f"{value:.6g}", ""
        else:
            error = float(errors.flat[index])
            value, told = _rounded(float(value), error)
            if 0 < error < (apart := spacing(values.flat[index], values.dtype)):
                told += f", below the spacing of {values.dtype} ({apart:.2g})"
            yield name, value, told


def _rounded(value: float, error: float) -> tuple[str, str]:
    """Writes an error with two significant digits, and its value with as many."""
    if math.isinf(error):
        return f"{value:.6g}", "unconstrained"
    if not (error > 0 and math.isfinite(value)):
        return f"{value:.6g}", f"{error:.2g}"
    # Through its own rounding: of 0.0996 the two digits are those of 0.10.
    last = math.floor(math.log10(float(f"{error:.1e}"))) - 1
    if 1e-4 <= max(abs(value), error) < 1e6:
        decimals = max(-last, 0)
        return f"{value:.{decimals}f}", f"{error:.{decimals}f}"
    first = math.floor(math.log10(abs(value))) if value else last
    return f"{value:.{max(first - last, 0)}e}", f"{error:.1e}"
