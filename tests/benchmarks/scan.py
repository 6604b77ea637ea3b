"""The loop that one would write by hand: what `fit` and `fit_many` are held against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def chi_squared(model: Any, batch: Any) -> jax.Array:
    x, y, sigma = batch
    return 0.5 * jnp.sum(jnp.square((model(x) - y) / sigma))


def scan_by_hand(loss: Any, tx: Any, steps: int) -> Callable[[Any, Any], Any]:
    """Returns a function `(model, batch) -> (the end, the losses)`."""

    def run(model: Any, batch: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            model, state = carry
            value, grads = jax.value_and_grad(loss)(model, batch)
            updates, state = tx.update(grads, state, model)
            return (optax.apply_updates(model, updates), state), value

        return jax.lax.scan(body, (model, tx.init(model)), None, length=steps)

    return run
