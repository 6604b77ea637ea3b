"""What the data say of the parameters: Fisher matrix, errors, likelihood."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ._arrival import edm_note
from ._blocks import find_blocks
from ._curvature import checked_batch_size, gauss_newton_matrix, hessian_matrix
from ._data import as_batch
from ._dense import whiten
from ._modes import Mode, Subject, checked_mode
from ._objective import (
    defined,
    live,
    negative_log_likelihood,
    real_residuals,
    score,
    step_key,
)
from ._paths import named_leaves
from ._projector import EigenProjector
from ._ravel import as_parameters, element_name, ravel, unravel
from ._table import aligned
from ._typing import Params, PyTree

Blocks = str | Callable[[str, Any], Any] | Sequence[Any] | Mapping[Any, Any]

# Of an eigenvalue that is zero rounding leaves so many times the machine epsilon, with
# room to spare: it has summed over all the data.
_ROUNDING = 64

# The rows that a table gives to one array.
_MOST_ROWS = 64


def fisher(
    trainer: Any,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    """The curvature of `nll`. The documentation is that of `Trainer.fisher`."""
    methods = defined(trainer)
    require_likelihood(trainer, "A Fisher matrix")
    kind = "residuals" if "residuals" in methods else "nll"
    return _matrices(trainer, batch, kind, blocks, batch_size, jac)


def curvature(
    trainer: Any,
    batch: Any,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    """The Hessian of `loss`. The documentation is that of `Trainer.curvature`."""
    return _matrices(trainer, batch, "loss", blocks, batch_size, jac)


def has_likelihood(trainer: Any) -> bool:
    """Whether a trainer's class defines more than a loss, whose scale is anyone's."""
    return bool({"residuals", "nll"} & set(defined(trainer)))


def require_likelihood(trainer: Any, what: str) -> None:
    if not has_likelihood(trainer):
        raise TypeError(
            f"{what} needs a likelihood, and `{type(trainer).__name__}` defines only "
            "`loss`: error bars from a mean, or from a sum with a penalty, would be "
            "wrong. Define `residuals` or `nll` beside it. (To whiten the parameters, "
            "`curvature` will do.)"
        )


def _matrices(
    trainer: Any,
    batch: Any,
    kind: str,
    blocks: Blocks | None,
    batch_size: int | None,
    jac: Mode | None,
) -> Any:
    batch_size, jac = checked_batch_size(batch_size), checked_mode(jac)
    params = as_parameters(trainer.params)
    bare, batch = trainer._bare(), as_batch(batch)
    if blocks is None:
        everything = tuple(range(len(jax.tree.leaves(params))))
        (matrix,) = _compute(bare, batch, kind, (everything,), batch_size, jac)
        return matrix
    selectors = _as_selectors(blocks)
    members = find_blocks(params, selectors, "blocks")
    matrices = _compute(bare, batch, kind, members, batch_size, jac)
    return OrderedDict(zip(selectors, matrices, strict=True))


def _as_selectors(blocks: Blocks) -> tuple[Any, ...]:
    if isinstance(blocks, str) or callable(blocks):
        return (blocks,)
    is_optimiser = isinstance(blocks, optax.GradientTransformation)
    if not isinstance(blocks, Sequence | Mapping) or is_optimiser or not blocks:
        raise TypeError(
            f"`blocks` is {blocks!r}, but must be a sequence of selectors, one for "
            'each matrix: `("position", "flux")`; `vn.paths(trainer.params)` gives '
            "each parameter its own, the rules of a ParamOptimiser each rule."
        )
    return tuple(tuple(b) if isinstance(b, list) else b for b in blocks)


@eqx.filter_jit
def _compute(
    trainer: Any,
    batch: Any,
    kind: str,
    blocks: tuple[tuple[int, ...], ...],
    batch_size: int | None,
    jac: Mode | None,
) -> tuple[Float[Array, "D D"], ...]:
    """Computes one matrix for each group of leaves."""
    subject = Subject(f"`{kind}` of `{type(trainer).__name__}`", jac)
    key = step_key(trainer)
    leaves, structure = jax.tree.flatten(trainer.params)

    def within(block: tuple[int, ...], evaluate: Callable[..., Any]) -> Any:
        def of_leaves(own: list[Array]) -> Array:
            changed = dict(zip(block, own, strict=True))
            every = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
            there = live(trainer, structure.unflatten(every))
            return evaluate(there, batch, key)

        return of_leaves

    matrices = []
    for block in blocks:
        own = [leaves[index] for index in block]
        of = hessian_matrix
        match kind:
            case "residuals":
                of, fn = gauss_newton_matrix, within(block, real_residuals)
            case "nll":
                fn = within(block, negative_log_likelihood)
            case _:
                fn = within(block, lambda *args: score(*args).loss)
        matrices.append(of(fn, own, batch_size, subject))
    return tuple(matrices)


def null_threshold(matrices: Sequence[Float[Array, "D D"]]) -> float:
    """Tells the `rtol` below which a direction of a computed matrix is null."""
    noise = [max(len(m), _ROUNDING) * float(jnp.finfo(m.dtype).eps) for m in matrices]
    return max(noise)


def standard_errors(trainer: Any, batch: Any, jac: Mode | None) -> Params:
    """The errors of the parameters, from the Fisher matrix at the current point."""
    require_likelihood(trainer, "A standard error")
    matrix = fisher(trainer, batch, None, None, jac)
    params = as_parameters(trainer.params)
    # No projector: where nothing is constrained at all, there is none.
    rtol = null_threshold([matrix])
    whitening = whiten(matrix, params, rtol, None, "prior", "fmat", "fisher")
    return unravel(whitening.errors_of_the_data(), params)


def _potential(
    trainer: Any, projector: EigenProjector | None, batch: Any, point: PyTree
) -> Float[Array, ""]:
    """Evaluates the negative log-likelihood at a point of the latent space."""
    if projector is None:
        params = unravel(point, trainer.params)
    else:
        params = projector.to_params(point)
    there = live(trainer, params)
    return negative_log_likelihood(there, batch, step_key(trainer))


def objective(trainer: Any, batch: Any) -> tuple[jax.tree_util.Partial, PyTree]:
    """The likelihood for a sampler, and where to start it."""
    require_likelihood(trainer, "The posterior of a sampler")
    params = as_parameters(trainer.params)
    start = ravel(params) if trainer.projector is None else trainer.latent
    # A pytree, as a module would be, and hashable, as what `jax.jit` is given must be.
    bare, projector, batch = trainer._bare(), trainer.projector, as_batch(batch)
    return jax.tree_util.Partial(_potential, bare, projector, batch), start


def table(trainer: Any, batch: Any, jac: Mode | None) -> str:
    """The values of all parameters, with their errors if there are data."""
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
        elif leaf.is_parameter:
            size = np.size(leaf.value)
            value = f"{np.asarray(leaf.value).item():.6g}" if size == 1 else "…"
            rows.append((leaf.path, value, "frozen"))
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
            yield name, *_rounded(float(value), float(errors.flat[index]))


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
