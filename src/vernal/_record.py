"""What a fit keeps of each step, and where it puts it inside a compiled loop."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._history import History
from ._objective import metric_shapes
from ._paths import UnknownPathError, dotted, nearest_names, paths
from ._selectors import resolve
from ._step import Outcome, grad_norm
from ._typing import PyTree

GRAD_NORM = "grad_norm"
LOSS = "loss"

# A chunk keeps its rows on the device: many of them, but not without bound.
MOST_ROWS = 16_384
_MOST_BYTES = 2**24


class Record(eqx.Module):
    """What is recorded beside the loss: static, and compared by value."""

    grad_norm: bool = eqx.field(static=True)
    paths: tuple[str, ...] = eqx.field(static=True)
    metrics: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, trainer: Any, record: Any, batch: Callable[[], Any]):
        """**Arguments:**

        - `trainer`: whose fit it is.
        - `record`: what the user named.
        - `batch`: a function that returns a batch, or its shapes.
        """
        if isinstance(record, str) or callable(record):
            record = (record,)
        if not isinstance(record, tuple | list):
            raise TypeError(
                f"`record` is {record!r}, but must be a tuple of names and selectors: "
                '`record=("grad_norm", "mean")`.'
            )
        self.grad_norm = GRAD_NORM in record
        chosen, metrics = [], []
        for name in record:
            if isinstance(name, str) and name == GRAD_NORM:
                continue
            try:
                chosen += _selected(trainer, name)
            except UnknownPathError:
                known = metric_shapes(trainer, batch())
                if name == LOSS:
                    continue
                if name not in known:
                    raise _unknown(trainer, name, known) from None
                metrics.append(name)
        self.paths = tuple(dict.fromkeys(chosen))
        self.metrics = tuple(metrics)

    def values(self, params: PyTree, outcome: Outcome) -> dict[str, Array]:
        """Picks what is recorded of one step."""
        norm = {GRAD_NORM: grad_norm(outcome.grads)} if self.grad_norm else {}
        metrics = {name: outcome.metrics[name] for name in self.metrics}
        return norm | self._parameters(params) | metrics

    def shapes(self, trainer: Any, batch: Callable[[], Any]) -> dict[str, Any]:
        """Tells the shape and dtype of each of the values."""
        norm = {GRAD_NORM: trainer.best_loss} if self.grad_norm else {}
        known = metric_shapes(trainer, batch()) if self.metrics else {}
        metrics = {name: known[name] for name in self.metrics}
        return norm | self._parameters(trainer.params) | metrics

    def _parameters(self, params: PyTree) -> dict[str, Array]:
        if not self.paths:
            return {}
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        by_path = {dotted(keys): leaf for keys, leaf in flat}
        return {path: by_path[path] for path in self.paths}


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


def _unknown(trainer: Any, name: Any, metrics: Iterable[str]) -> UnknownPathError:
    known = [*paths(trainer.params), *metrics, GRAD_NORM]
    return UnknownPathError(
        f"`record`: {name!r} is neither a parameter nor a metric that the loss "
        f"returns. {nearest_names(str(name), known)}"
    )


class Rows(eqx.Module):
    """Buffers on the device, with a row for every step that is recorded."""

    loss: Array
    values: dict[str, Array]

    @classmethod
    def empty(cls, loss: Any, values: dict[str, Any], most: int) -> "Rows":
        """Makes room for `most` rows, or as many as is reasonable for their size."""
        sizes = [np.prod(v.shape) * v.dtype.itemsize for v in (loss, *values.values())]
        rows = int(np.clip(_MOST_BYTES // sum(sizes), 1, most))
        # A step that is not to be recorded is written all the same, to a last row that
        # nobody reads.
        room = lambda x: jnp.zeros((rows + 1, *x.shape), x.dtype)
        return cls(room(loss), {name: room(value) for name, value in values.items()})

    @property
    def room(self) -> int:
        """How many steps can be recorded."""
        return self.loss.shape[0] - 1

    def put(self, index: Array, loss: Array, values: dict[str, Array]) -> "Rows":
        """Writes one row."""
        put = lambda buffer, value: jax.lax.dynamic_update_index_in_dim(
            buffer, value.astype(buffer.dtype), index, 0
        )
        return Rows(
            put(self.loss, loss),
            {name: put(self.values[name], value) for name, value in values.items()},
        )

    def to_history(self, start: int, stop: int, every: int) -> History:
        """Copies the rows to the host.

        **Arguments:**

        - `start`, `stop`: the first step of the chunk, and that after its last.
        - `every`: how many steps lie between two rows.
        """
        rows = jax.device_get(self)
        steps = np.arange(-(-start // every) * every, stop, every)
        return History(
            steps,
            rows.loss[: len(steps)].copy(),
            {name: value[: len(steps)].copy() for name, value in rows.values.items()},
        )
