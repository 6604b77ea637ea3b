"""What a chunk records, in buffers on the device."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._pickling import PlainMethods

# The most rows that a chunk keeps on the device, and the most bytes.
MOST_ROWS = 16_384
_MOST_BYTES = 2**24


class Rows(PlainMethods, eqx.Module):
    """Buffers on the device, with a row for every `every` steps.

    `first` is the number of the first row: that of the step `first * every`.
    """

    loss: Array
    values: dict[str, Array]
    first: Int[Array, "*members"]
    every: Int[Array, "*members"]

    @classmethod
    def empty(
        cls,
        loss: Any,
        values: dict[str, Any],
        start: Int[Array, ""],
        every: Int[Array, ""],
        most: int,
    ) -> "Rows":
        """Makes room for `most` rows, or for fewer if they are large.

        `start` is the first step that may be recorded, `every` the distance between two
        rows; `loss` and `values` have the shapes.
        """
        sizes = [np.prod(v.shape) * v.dtype.itemsize for v in (loss, *values.values())]
        rows = int(np.clip(_MOST_BYTES // sum(sizes), 1, most))
        # A step that is not recorded is written to a last row, which is never read.
        room = lambda x: jnp.zeros((rows + 1, *x.shape), x.dtype)
        return cls(
            loss=room(loss),
            values={name: room(value) for name, value in values.items()},
            first=jnp.where(start == 0, 0, jax.lax.div(start - 1, every) + 1),
            every=every,
        )

    @property
    def _room(self) -> int:
        return self.loss.shape[0] - 1

    @property
    def end(self) -> Int[Array, ""]:
        """The first step to record for which there is no row left."""
        most = jnp.iinfo(self.first.dtype).max
        is_far = self.first > most // self.every - self._room
        return jnp.where(is_far, most, (self.first + self._room) * self.every)

    def put(self, step: Array, loss: Array, values: dict[str, Array]) -> "Rows":
        number = jax.lax.div(step, self.every)
        is_due = number * self.every == step
        index = jnp.where(is_due, number - self.first, self._room)
        put = lambda buffer, value: jax.lax.dynamic_update_index_in_dim(
            buffer, value.astype(buffer.dtype), index, 0
        )
        return Rows(
            put(self.loss, loss),
            {name: put(self.values[name], value) for name, value in values.items()},
            self.first,
            self.every,
        )

    def columns(
        self, stop: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Copies steps, losses and values before the step `stop` to the host."""
        rows = jax.device_get(self)
        every = int(rows.every)
        steps = np.arange(int(rows.first) * every, stop, every)
        cut = lambda column: column[: len(steps)].copy()
        return steps, cut(rows.loss), {n: cut(v) for n, v in rows.values.items()}
