"""Calls `loss`, `nll` or `residuals` of a trainer, and checks what they return."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._boundary import PyTree, spelled_leaves
from .._data import Source, Whole, as_given, in_whole
from .._likelihoods import AbstractLikelihood, Gaussian, require_known
from .._tree import at_least_single, cast_alike, is_inexact, widest
from .abstract_trainer import AbstractTrainer, priors_of, progress_of, with_progress
from .outer import warn_of_flat_pairs, warn_of_outer

Term = Array | AbstractLikelihood

METHODS = ("loss", "residuals", "nll")

# How many leaves of a batch a note of an error has.
_MOST_SHAPES = 8


class Scored(NamedTuple):
    """A loss, its metrics and the new state."""

    loss: Float[Array, ""]
    metrics: dict[str, Any]
    state: PyTree


def defined(trainer: AbstractTrainer) -> tuple[str, ...]:
    """Returns which of the three methods a trainer's class defines."""
    kind = type(trainer)
    return tuple(name for name in METHODS if callable(getattr(kind, name, None)))


def live(trainer: AbstractTrainer, params: Any) -> Any:
    """Returns the trainer with other parameters, as its own methods should see it."""
    return with_progress(
        trainer, eqx.tree_at(lambda p: p.params, progress_of(trainer), params)
    )


def step_key(trainer: AbstractTrainer) -> PRNGKeyArray | None:
    """Returns the key of the next step, if the trainer has a key."""
    if trainer.key is None:
        return None
    return jax.random.fold_in(trainer.key, trainer.step_count)


def score(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None, model: Any = None
) -> Scored:
    """Evaluates `loss` if it is defined, else the negative log-likelihood.

    `model` is the trainer's own by default.
    """
    if "loss" not in defined(trainer):
        return Scored(negative_log_likelihood(trainer, batch, key, model), {}, None)
    model = trainer.model if model is None else model
    options = {} if trainer.state is None else {"state": trainer.state}
    returned = _call(trainer, "loss", model, batch, key, **options)
    loss, metrics, state = _taken_apart(trainer, returned)
    if options:
        what, remedy = "The state that `loss` returns", "Give `state=` as {}."
        state = cast_alike(state, trainer.state, what, "`state`", remedy)
    named = {str(k): _as_metric(trainer, k, v) for k, v in metrics.items()}
    return Scored(_as_scalar(trainer, "loss", loss), named, state)


def loss_at(params: Any, trainer: AbstractTrainer, batch: Any, key: Any = None) -> Any:
    """Returns the loss of a step; without a random key, of the next one."""
    key = step_key(trainer) if key is None else key
    return score(live(trainer, params), batch, key).loss


def _taken_apart(
    trainer: AbstractTrainer, returned: Any
) -> tuple[Any, dict[Any, Any], Any]:
    """Splits what `loss` returned into the loss, the metrics and the state."""
    parts = returned if isinstance(returned, tuple) else (returned,)
    has_state = trainer.state is not None
    match parts if has_state else (*parts, None):
        case (loss, state):
            return loss, {}, state
        case (loss, dict() as metrics, state):
            return loss, metrics, state
    found = f"a tuple of {len(parts)}" if len(parts) > 1 else "one value"
    expected = (
        "with `state=` the pair `(scalar, state)`, or `(scalar, metrics, state)` with "
        "a dict of metrics"
        if has_state
        else "a scalar, or the pair `(scalar, dict of metrics)`"
    )
    raise TypeError(
        f"`{type(trainer).__name__}.loss` returned {found}. It must return {expected}."
    )


def evaluate(trainer: AbstractTrainer, batch: Any) -> Float[Array, ""]:
    """Scores a trainer's model on a validation batch."""
    value = _noted(trainer.evaluate, trainer.model, batch)
    return _as_scalar(trainer, "evaluate", value)


def metric_shapes(trainer: AbstractTrainer, batch: Any) -> dict[str, Any]:
    """Returns the shapes of the metrics of a loss, without evaluating it."""
    return eqx.filter_eval_shape(
        lambda t, b: score(t, b, t.key).metrics, trainer, batch
    )


def negative_log_likelihood(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None, model: Any = None
) -> Float[Array, ""]:
    """Evaluates `nll` if it is defined, else that of `residuals`, with the priors.

    Of arrays it is half the sum of their squares.
    """
    given, model = model, trainer.model if model is None else model
    if "nll" in defined(trainer):
        value = _as_scalar(trainer, "nll", _call(trainer, "nll", model, batch, key))
    else:
        terms = residual_terms(trainer, batch, key, given)
        value, *others = (_nll_of(trainer, term) for term in terms)
        for other in others:
            dtype = widest((value.dtype, other.dtype))
            value = value.astype(dtype) + other.astype(dtype)
    if (priors := priors_of(trainer)) is not None:
        value = value + priors.penalty(model).astype(value.dtype)
    return value


def _nll_of(trainer: AbstractTrainer, term: Term) -> Float[Array, ""]:
    if isinstance(term, AbstractLikelihood):
        return _as_scalar(trainer, "residuals", term.nll())
    # A sum in half precision overflows at 65504, or has two digits.
    term = at_least_single(term)
    squares = jnp.square(jnp.abs(term) if jnp.iscomplexobj(term) else term)
    return _as_scalar(trainer, "residuals", 0.5 * jnp.sum(squares))


def real_residuals(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None
) -> Float[Array, " N"]:
    """Evaluates `residuals` as one real vector: real parts, then imaginary parts.

    Half the sum of their squares is the negative log-likelihood. Behind them are the
    rows of priors: see `prior_count`.
    """
    arrays = [_array_of(term) for term in residual_terms(trainer, batch, key)]
    return _with_rows(trainer, arrays)


def scoring_residuals(
    trainer: AbstractTrainer,
    batch: Any,
    key: PRNGKeyArray | None,
    met: set[type] | None = None,
) -> Float[Array, " N"]:
    """Evaluates residuals whose Jacobian is that of the expected Fisher matrix.

    They are others than `real_residuals` for likelihoods that are not normal. The
    classes of the likelihoods are put into `met`.
    """
    terms = residual_terms(trainer, batch, key)
    if met is not None:
        met |= {type(term) for term in terms if isinstance(term, AbstractLikelihood)}
    arrays = [
        term.scoring_residuals() if isinstance(term, AbstractLikelihood) else term
        for term in terms
    ]
    return _with_rows(trainer, arrays)


def _array_of(term: Term) -> Array:
    return term.residuals() if isinstance(term, AbstractLikelihood) else term


def count_of(term: Term) -> int | Int[Array, ""]:
    """Returns the number of data of a term; complex ones count twice."""
    if isinstance(term, AbstractLikelihood):
        return term.count()
    return term.size * (2 if jnp.iscomplexobj(term) else 1)


def prior_rows(trainer: AbstractTrainer, *_: Any) -> Float[Array, " rows"]:
    """Evaluates the rows of the priors, which there are."""
    priors = priors_of(trainer)
    assert priors is not None
    return priors.rows(trainer.model)


def _with_rows(trainer: AbstractTrainer, arrays: list[Array]) -> Float[Array, " N"]:
    rows = list[Array]()
    for flat in map(jnp.ravel, arrays):
        rows += (flat.real, flat.imag) if jnp.iscomplexobj(flat) else (flat,)
    if (priors := priors_of(trainer)) is not None:
        rows.append(priors.rows(trainer.model).astype(rows[0].dtype))
    if len(rows) == 1:
        return rows[0]
    dtype = widest(row.dtype for row in rows)
    return jnp.concatenate([row.astype(dtype) for row in rows])


class DataKind(NamedTuple):
    """What `residuals` returned, besides their values.

    - `size`: the number of data; complex ones count twice.
    - `is_robust`: whether a loss bears outliers, and is no likelihood.
    - `has_scale`: whether some have a distribution of known scale, as counts have.
    """

    size: int | Int[Array, ""]
    is_robust: bool
    has_scale: bool


def real_residuals_and_kind(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None
) -> tuple[Float[Array, " N"], DataKind]:
    """Evaluates `real_residuals`, and says what the data are."""
    terms = residual_terms(trainer, batch, key)
    likelihoods = [term for term in terms if isinstance(term, AbstractLikelihood)]
    kind = DataKind(
        sum(map(count_of, terms)),
        is_robust=any(term.is_robust for term in likelihoods),
        has_scale=any(not isinstance(term, Gaussian) for term in likelihoods),
    )
    return _with_rows(trainer, [_array_of(term) for term in terms]), kind


def residual_terms(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None, model: Any = None
) -> list[Term]:
    """Evaluates `residuals`: its arrays and likelihoods."""
    return [term for _, term in _named_terms(trainer, batch, key, model)]


def _named_terms(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None, model: Any
) -> list[tuple[str, Term]]:
    """Evaluates `residuals`, and says where each array or likelihood is in it."""
    # The score of another model is not fitted: it may be differentiated by the data, of
    # which the model and the parameters are functions after a fit.
    is_fitted = model is None
    model = trainer.model if model is None else model
    returned = _call(trainer, "residuals", model, batch, key)
    is_likelihood = lambda x: isinstance(x, AbstractLikelihood)
    named = list(spelled_leaves("residuals", returned, is_likelihood))
    terms = [term for _, term in named]
    if not terms or not all(hasattr(x, "shape") or is_likelihood(x) for x in terms):
        raise TypeError(
            f"`{type(trainer).__name__}.residuals` returned a "
            f"{type(returned).__name__}. It must return an array, such as "
            "`(model(x) - y) / sigma`, a likelihood, such as "
            "`vn.likelihoods.Poisson(model(x), counts)`, or a pytree of these."
        )
    arrays = list(map(_array_of, terms))
    if len(arrays) == 1 and jnp.ndim(arrays[0]) == 0:
        raise ValueError(
            f"`{type(trainer).__name__}.residuals` returned a scalar. It must return "
            "an array, with a residual for each datum: of one datum, "
            "`jnp.atleast_1d(...)`. For a sum over data, define `nll`."
        )
    for array in arrays:
        _check_residuals(trainer, array, batch)
    count = sum(array.size for array in arrays)
    sums = lambda batch: _sums(_call(trainer, "residuals", model, batch, key))
    warn_of_flat_pairs(trainer, count, batch, sums)
    param, what = jax.tree.leaves(trainer.params)[0], f"`{type(trainer).__name__}`"
    known = lambda term: require_known(
        term, param, f"{what} returned a `{type(term).__name__}`"
    )
    return [
        (where, known(term) if is_fitted and is_likelihood(term) else term)
        for where, term in named
    ]


def _sums(returned: Any) -> list[Array]:
    is_likelihood = lambda x: isinstance(x, AbstractLikelihood)
    terms = jax.tree.leaves(returned, is_leaf=is_likelihood)
    return [jnp.sum(_array_of(term)) for term in terms]


def residuals_by_place(
    trainer: AbstractTrainer, batch: Any, key: PRNGKeyArray | None
) -> dict[str, tuple[Term, Array]]:
    """Evaluates `residuals`: what is where in it, and its array in its own shape."""
    named = _named_terms(trainer, batch, key, None)
    return {where: (term, _array_of(term)) for where, term in named}


def _check_residuals(trainer: AbstractTrainer, residuals: Array, batch: Any) -> None:
    if not is_inexact(residuals):
        raise TypeError(
            f"`{type(trainer).__name__}.residuals` returned an array of dtype "
            f"{residuals.dtype}, whose gradient is zero. It must return real or "
            "complex floating-point numbers."
        )
    if 0 in residuals.shape:
        raise ValueError(
            f"`{type(trainer).__name__}.residuals` returned an array of shape "
            f"{residuals.shape}, which has no residual in it. The batch is empty, and "
            "any model would fit it."
        )
    warn_of_outer(trainer, residuals, batch)


def require_all_data(trainer: AbstractTrainer, source: Source) -> None:
    """Refuses priors with a part of the data at each step."""
    if priors_of(trainer) is not None and not isinstance(in_whole(source), Whole):
        raise ValueError(
            "`priors` need all of the data at each step: with a batch at a time they "
            "would count in full for each. Fit the whole data, or write the prior into "
            "`nll`, with its share for each batch."
        )


def prior_count(trainer: AbstractTrainer) -> int:
    """Returns how many of the last rows of `real_residuals` are of priors."""
    priors = priors_of(trainer)
    return 0 if priors is None else priors.count(trainer.model)


def _call(
    trainer: AbstractTrainer,
    name: str,
    model: Any,
    batch: Any,
    key: PRNGKeyArray | None,
    **options: Any,
) -> Any:
    if key is not None:
        options["key"] = key
    return _noted(getattr(trainer, name), model, batch, **options)


def _noted(method: Any, model: Any, batch: Any, **options: Any) -> Any:
    """Calls a method of the user; notes at an error which shapes the batch has."""
    given = as_given(batch)
    try:
        return method(model, given, **options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        leaves = list(spelled_leaves("batch", given))[:_MOST_SHAPES]
        known = [(where, getattr(leaf, "shape", None)) for where, leaf in leaves]
        told = [f"{where} {shape}" for where, shape in known if shape is not None]
        note = f"The shapes of the batch: {', '.join(told)}."
        # By default `evaluate` calls another method.
        if told and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _as_metric(trainer: AbstractTrainer, name: Any, value: Any) -> Array:
    if hasattr(value, "dtype") or isinstance(value, int | float | complex):
        return jnp.asarray(value)
    raise TypeError(
        f"`{type(trainer).__name__}.loss` returned the metric {name!r} as a "
        f"{type(value).__name__}. A metric is an array or a number."
    )


def _as_scalar(trainer: AbstractTrainer, name: str, value: Any) -> Float[Array, ""]:
    where = f"`{type(trainer).__name__}.{name}`"
    if not isinstance(value, jax.Array | float | int) and not hasattr(value, "dtype"):
        raise TypeError(
            f"{where} returned a {type(value).__name__}, but must return a scalar."
        )
    array = jnp.asarray(value)
    if array.shape != ():
        raise ValueError(
            f"{where} returned an array of shape {array.shape}, but must return a "
            "scalar. Sum or average it; if it is a vector of residuals, define "
            "`residuals` instead."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{where} returned a scalar of dtype {array.dtype}, but must return a "
            "real floating-point one."
        )
    return array
