"""What a fit keeps of each step, and where it puts it inside a compiled loop."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from ._history import History
from ._objective import score
from ._paths import UnknownPathError, dotted, nearest_names, paths, resolve
from ._step import Outcome

GRAD_NORM = "grad_norm"

# A chunk keeps its rows on the device: many of them, but not without bound.
_MOST_ROWS = 16_384
_MOST_BYTES = 2**24


class Record(eqx.Module):
    """What is recorded beside the loss: static, and compared by value."""

    grad_norm: bool = eqx.field(static=True)
    paths: tuple[str, ...] = eqx.field(static=True)
    metrics: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, trainer: Any, record: Any, batch: Any):
        """**Arguments:**

        - `trainer`: whose fit it is.
        - `record`: what the user named.
        - `batch`: the structure of a batch, or a function that returns it.
        """
        if isinstance(record, str) or callable(record):
            record = (record,)
        self.grad_norm = GRAD_NORM in record
        chosen, metrics = [], []
        for name in record:
            if isinstance(name, str) and name == GRAD_NORM:
                continue
            try:
                chosen += _selected(trainer, name)
            except UnknownPathError:
                known = _metric_names(trainer, batch)
                if name not in known:
                    raise _unknown(trainer, name, known) from None
                metrics.append(name)
        self.paths = tuple(dict.fromkeys(chosen))
        self.metrics = tuple(metrics)

    def values(self, params: PyTree, outcome: Outcome) -> dict[str, Array]:
        """Picks what is recorded of one step."""
        values = {}
        if self.grad_norm:
            values[GRAD_NORM] = optax.global_norm(outcome.grads)
        if self.paths:
            wanted = set(self.paths)
            flat, _ = jax.tree_util.tree_flatten_with_path(params)
            by_path = {dotted(keys): leaf for keys, leaf in flat}
            values |= {path: by_path[path] for path in self.paths if path in wanted}
        return values | {name: outcome.metrics[name] for name in self.metrics}


def _selected(trainer: Any, selector: Any) -> list[str]:
    model = trainer.model
    owners = resolve(model, [selector], argument="record")
    trained = set(paths(trainer.params))
    flat, _ = jax.tree_util.tree_flatten_with_path(model)
    named = [dotted(k) for (k, _), o in zip(flat, owners, strict=True) if o is not None]
    kept = [path for path in named if path in trained]
    if not kept:
        raise ValueError(
            f"`record`: {selector!r} selects frozen parameters alone "
            f"({', '.join(named[:3])}), which never change."
        )
    return kept


def _metric_names(trainer: Any, batch: Any) -> list[str]:
    """Finds the metrics that a loss returns, by tracing it."""
    metrics = eqx.filter_eval_shape(
        lambda t, b: score(t, t.model, b, t.key).metrics, trainer, batch()
    )
    return list(metrics)


def _unknown(trainer: Any, name: Any, metrics: Sequence[str]) -> UnknownPathError:
    known = [*paths(trainer.params), *metrics, GRAD_NORM]
    return UnknownPathError(
        f"`record`: {name!r} is neither a parameter nor a metric that the loss "
        f"returns. {nearest_names(str(name), known)}"
    )


class Rows(eqx.Module):
    """A buffer of recorded rows on the device, filled from the top."""

    steps: Int[Array, " rows"]
    loss: Array
    values: dict[str, Array]
    filled: Int[Array, ""]

    @classmethod
    def empty(cls, loss: Any, values: dict[str, Any]) -> "Rows":
        """Makes room for as many rows as is reasonable, given what one row holds."""
        sizes = [np.prod(v.shape) * v.dtype.itemsize for v in (loss, *values.values())]
        # One more than can be filled: a row that is not to be kept is written there
        # too, and overwritten by the next.
        rows = int(np.clip(_MOST_BYTES // (4 + sum(sizes)), 1, _MOST_ROWS)) + 1
        room = lambda x: jnp.zeros((rows, *x.shape), x.dtype)
        return cls(
            jnp.zeros(rows, jnp.int32),
            room(loss),
            {name: room(value) for name, value in values.items()},
            jnp.asarray(0, jnp.int32),
        )

    @property
    def full(self) -> Array:
        """Whether there is no room for another row."""
        return self.filled >= self.steps.shape[0] - 1

    def add(
        self, step: Array, loss: Array, values: dict[str, Array], keep: Array
    ) -> "Rows":
        """Writes a row, and moves on to the next if this one is to be kept."""
        put = lambda buffer, value: jax.lax.dynamic_update_index_in_dim(
            buffer, value.astype(buffer.dtype), self.filled, 0
        )
        return Rows(
            put(self.steps, step),
            put(self.loss, loss),
            {name: put(self.values[name], value) for name, value in values.items()},
            self.filled + keep.astype(jnp.int32),
        )

    def to_history(self) -> History:
        """Copies the rows to the host."""
        rows = jax.device_get(self)
        n = int(rows.filled)
        return History(
            rows.steps[:n].copy(),
            rows.loss[:n].copy(),
            {name: value[:n].copy() for name, value in rows.values.items()},
        )
