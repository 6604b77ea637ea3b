"""What is fitted: a user's `loss`, `nll` or `residuals`, called and checked."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

METHODS = ("loss", "residuals", "nll")


class Scored(NamedTuple):
    """A loss, and the metrics that were returned beside it."""

    loss: Float[Array, ""]
    metrics: dict[str, Any]


def defined(trainer: Any) -> tuple[str, ...]:
    """Lists which of the three methods a trainer's class defines."""
    kind = type(trainer)
    return tuple(name for name in METHODS if callable(getattr(kind, name, None)))


def live(trainer: Any, params: Any) -> Any:
    """Returns the trainer as its methods see it when they are called at `params`."""
    return trainer._at(eqx.tree_at(lambda p: p.params, trainer._progress, params))


def step_key(trainer: Any) -> PRNGKeyArray | None:
    """Returns the key of the step that comes next, if the trainer has a key."""
    if trainer.key is None:
        return None
    return jax.random.fold_in(trainer.key, trainer.step_count)


def score(trainer: Any, batch: Any, key: PRNGKeyArray | None) -> Scored:
    """Evaluates what a trainer's class minimises.

    That is `loss` where it is defined, else the negative log-likelihood.
    """
    if "loss" not in defined(trainer):
        return Scored(negative_log_likelihood(trainer, batch, key), {})
    returned = _call(trainer, "loss", batch, key)
    if isinstance(returned, tuple):
        if len(returned) != 2 or not isinstance(returned[1], dict):
            raise TypeError(
                f"`{type(trainer).__name__}.loss` returned a tuple of "
                f"{len(returned)}. It must return a scalar, or the pair "
                "`(scalar, dict of metrics)`."
            )
        loss, metrics = returned
        named = {str(k): _as_metric(trainer, k, v) for k, v in metrics.items()}
        return Scored(_as_scalar(trainer, "loss", loss), named)
    return Scored(_as_scalar(trainer, "loss", returned), {})


def metric_shapes(trainer: Any, batch: Any) -> dict[str, Any]:
    """Finds the metrics that a trainer's loss returns, without evaluating it."""
    return eqx.filter_eval_shape(
        lambda t, b: score(t, b, t.key).metrics, trainer, batch
    )


def negative_log_likelihood(
    trainer: Any, batch: Any, key: PRNGKeyArray | None
) -> Float[Array, ""]:
    """Evaluates `nll` where it is defined, else half the sum of squared residuals."""
    if "nll" in defined(trainer):
        nll = _call(trainer, "nll", batch, key)
        return _as_scalar(trainer, "nll", nll)
    residuals = _residuals(trainer, batch, key)
    squares = jnp.square(jnp.abs(residuals) if _is_complex(residuals) else residuals)
    return _as_scalar(trainer, "residuals", 0.5 * jnp.sum(squares))


def real_residuals(
    trainer: Any, batch: Any, key: PRNGKeyArray | None
) -> Float[Array, " N"]:
    """Evaluates `residuals` as one real vector: of a complex one, both its parts."""
    residuals = _residuals(trainer, batch, key)
    if jnp.ndim(residuals) == 0:
        raise ValueError(
            f"`{type(trainer).__name__}.residuals` returned a scalar. It must return "
            "an array, with a residual for each datum; for a scalar, define `nll`."
        )
    flat = jnp.ravel(residuals)
    return jnp.concatenate([flat.real, flat.imag]) if _is_complex(flat) else flat


def _residuals(trainer: Any, batch: Any, key: PRNGKeyArray | None) -> Array:
    residuals = _call(trainer, "residuals", batch, key)
    if not hasattr(residuals, "shape"):
        raise TypeError(
            f"`{type(trainer).__name__}.residuals` returned a "
            f"{type(residuals).__name__}. It must return one array, such as "
            "`(model(x) - y) / sigma`."
        )
    return residuals


def _call(trainer: Any, name: str, batch: Any, key: PRNGKeyArray | None) -> Any:
    method = getattr(trainer, name)
    options = {} if key is None else {"key": key}
    return method(trainer.model, batch, **options)


def _as_metric(trainer: Any, name: Any, value: Any) -> Array:
    if hasattr(value, "dtype") or isinstance(value, int | float | complex):
        return jnp.asarray(value)
    raise TypeError(
        f"`{type(trainer).__name__}.loss` returned the metric {name!r} as a "
        f"{type(value).__name__}. A metric is an array or a number."
    )


def _is_complex(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.complexfloating))


def _as_scalar(trainer: Any, name: str, value: Any) -> Float[Array, ""]:
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
