"""Sources of the batches of a fit: one batch, minibatches, or a user's loader."""

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, Generic, NamedTuple, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._boundary import (
    PyTree,
    entrance,
    narrowed_leaves,
    prng_key,
    spelled_leaves,
    takes,
    whole_number,
)
from .._pickling import Portable
from .batch import ManyBatches, as_batch

Batch = TypeVar("Batch")


@final
class Whole(eqx.Module, Generic[Batch]):
    """One batch, used whole at every step."""

    batch: Batch

    def start(self, step: Int[Array, ""]) -> None:
        """Returns nothing: each step has the same batch."""

    def next(self, cursor: None, step: Int[Array, ""]) -> tuple[Batch, None]:
        """Returns the batch."""
        return self.batch, None


class _Epoch(NamedTuple):
    number: Int[Array, ""]
    order: Int[Array, " examples"]


@final
class Minibatches(ManyBatches, Portable, eqx.Module):
    """Batches of `size` examples, shuffled again on the device for each epoch.

    At the end of an epoch fewer than `size` examples may be left over; they are
    dropped, and the next epoch shuffles all examples again. Which examples a batch
    holds depends only on `key` and on the trainer's step count, so a fit in two parts
    sees the same batches as a fit in one.

    ```python
    data = vn.Minibatches((images, labels), 32, key=jax.random.key(0))
    trainer.fit(data, steps=10 * data.steps_per_epoch)
    ```
    """

    arrays: PyTree
    size: int = eqx.field(static=True)
    key: PRNGKeyArray

    @entrance
    def __init__(self, arrays: PyTree, size: int, *, key: PRNGKeyArray):
        """**Arguments:**

        - `arrays`: a pytree of arrays, with the examples along the first axis of each.
        - `size`: the number of examples in a batch.
        - `key`: a PRNG key for the shuffles.

        **Raises:**

        - `ValueError`: if the arrays disagree in length, or `size` is not between 1
            and that length.
        """
        self.arrays = as_batch(arrays, "arrays")
        self.size = whole_number(size, "size", least=1)
        self.key = prng_key(key)
        lengths = {}
        for where, leaf in spelled_leaves("arrays", self.arrays):
            is_array = isinstance(leaf, jax.Array)
            if not is_array or not leaf.ndim:
                what = "a scalar" if is_array else repr(leaf)
                raise ValueError(
                    f"{where} is {what}. Each leaf must be an array with the examples "
                    "along its first axis."
                )
            lengths.setdefault(leaf.shape[0], where)
        if not lengths:
            raise ValueError("`arrays` has no array in it: there are no examples.")
        if len(lengths) > 1:
            (a, first), (b, second), *_ = lengths.items()
            raise ValueError(
                f"`arrays` is ragged: {first} has {a} examples and {second} has {b}. "
                "The first axes must be equally long."
            )
        if self.size > self.examples:
            raise ValueError(
                f"`size` is {self.size}, but there are only {self.examples} examples. "
                "For all of them at every step, pass the arrays themselves to `fit`."
            )

    @property
    def examples(self) -> int:
        """The number of examples."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in one pass over the examples."""
        return self.examples // self.size

    def _epoch(self, number: Int[Array, ""]) -> _Epoch:
        key = jax.random.fold_in(self.key, number)
        return _Epoch(number, jax.random.permutation(key, self.examples))

    def start(self, step: Int[Array, ""]) -> _Epoch:
        """Shuffles the epoch that `step` lies in."""
        return self._epoch(step // self.steps_per_epoch)

    def next(self, cursor: _Epoch, step: Int[Array, ""]) -> tuple[PyTree, _Epoch]:
        """Returns the batch of one step."""
        number, index = jnp.divmod(step, self.steps_per_epoch)
        cursor = jax.lax.cond(
            number == cursor.number, lambda: cursor, lambda: self._epoch(number)
        )
        rows = jax.lax.dynamic_slice(cursor.order, (index * self.size,), (self.size,))
        take = lambda array: array.at[rows].get(mode="promise_in_bounds")
        return jax.tree.map(take, self.arrays), cursor


@final
class Stream(ManyBatches):
    """One batch a step from your own loader.

    Python reads the loader, and the next fit goes on where the last one left it. A fit
    that its NaN policy or `stop` ends may have read a batch or two beyond that step,
    which the next fit does not see. Batches of one structure and shape share one
    compilation. Each new shape compiles once, and so does each new value of a leaf that
    is not an array, such as an integer.

    !!! example

        ```python
        trainer.fit(vn.Stream(loader), steps=1000)
        trainer.fit(vn.Stream(lambda step: batches_from(step)), steps=1000)
        ```
    """

    def __init__(self, source: Iterable[Any] | Callable[[int], Iterable[Any]]):
        """**Arguments:**

        - `source`: an iterable of batches; or a function that takes the number of
            steps already taken, and returns an iterable of the batches from there on.
        """
        if isinstance(source, str | bytes) or hasattr(source, "keys"):
            raise TypeError(
                f"`source` is a {type(source).__name__}, which would be read key by "
                "key or letter by letter. A Stream takes an iterable of batches; for "
                "the same batch at every step, pass it to `fit` as it is."
            )
        if _is_one_batch(source):
            raise TypeError(
                "`source` is a tuple of arrays, which is one batch. A Stream takes an "
                "iterable of batches; for the same batch at every step, pass it to "
                "`fit` as it is."
            )
        if isinstance(source, FunctionType):
            takes(source, 1, "source", "source(step)")
        if not isinstance(source, Iterable) and not callable(source):
            raise TypeError(
                f"`source` is {source!r}, which cannot be iterated over. A Stream "
                "takes an iterable of batches, or a function `step -> iterable`."
            )
        self._source = source
        self._iterator: Iterator[Any] | None = None
        self.unused: list[Any] = []
        """The batch that a fit has read without taking a step, if there is one."""

    def __getstate__(self) -> dict[str, Any]:
        for held in (self._source, self._iterator):
            # Pickle keeps the place of an iterator over a list or a tuple.
            if isinstance(held, Iterator) and not isinstance(held, _OF_SEQUENCES):
                raise TypeError(
                    f"A Stream over a {type(held).__name__} cannot be pickled: only "
                    "this process knows its place in it. Give `Stream` a function of "
                    "a module, `step -> iterable`, which begins where a fit begins."
                )
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Earlier versions had no `unused`.
        vars(self).update({"unused": []} | state)

    @property
    def can_resume(self) -> bool:
        """Whether the stream can be opened at any step."""
        return not isinstance(self._source, Iterable)

    def open(self, step: int) -> Iterator[Any]:
        """Returns the iterator to take batches from, at the given step."""
        if not isinstance(self._source, Iterable):
            batches = self._source(step)
            if not isinstance(batches, Iterable) or _is_one_batch(batches):
                raise TypeError(
                    f"`source` returned {batches!r} for step {step}, but must return "
                    "an iterable of all batches from that step on: let it be a "
                    "generator, which yields one batch after another."
                )
            return iter(batches)
        if self._iterator is None:
            self._iterator = iter(self._source)
        return self._iterator


_OF_SEQUENCES = tuple({type(iter(kind())) for kind in (list, tuple)})


def _is_one_batch(batches: Any) -> bool:
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    of_arrays = isinstance(batches, tuple) and all(map(is_array, batches))
    return isinstance(batches, dict) or (of_arrays and len(batches) > 0)


class StreamExhaustedError(RuntimeError):
    """A [`vernal.Stream`][] ended before the fit did.

    **Attributes:**

    - `result`: the `FitResult` up to there, so that nothing is lost.
    """

    def __init__(self, taken: int, steps: int, result: Any):
        """Says how far the stream went."""
        self.result = result
        super().__init__(taken, steps, result)

    def __str__(self) -> str:
        """Says how far the stream went, and what to do about it."""
        taken, steps, _ = self.args
        return (
            f"`data`: the stream ran dry after {taken} of {steps} steps. Everything up "
            "to there is in `.result`. Ask for fewer `steps`, or let the stream repeat "
            "(a generator that loops for ever, `itertools.cycle`)."
        )


Source = Whole[Any] | Minibatches | Stream


def as_source(data: Any) -> Source:
    """Returns the source of batches that `fit` was given, or makes one of a batch."""
    if isinstance(data, Minibatches):
        # They may be in float64, made while `jax_enable_x64` was on.
        arrays = narrowed_leaves(data.arrays, "data.arrays")
        is_same = arrays is data.arrays
        return data if is_same else eqx.tree_at(lambda d: d.arrays, data, arrays)
    if isinstance(data, Stream):
        return data
    if isinstance(data, Iterator):
        raise TypeError(
            f"`data` is {type(data).__name__!r}, an iterator. To take one batch a step "
            "from it, wrap it: `fit(vn.Stream(data), steps)`."
        )
    return Whole(as_batch(data, "data"))


def batch_shapes(source: Whole[Any] | Minibatches, step: Int[Array, ""]) -> Any:
    """Returns the shapes of a batch, without making one."""
    return eqx.filter_eval_shape(source.next, source.start(step), step)[0]


def in_whole(source: Source) -> Source:
    """Returns minibatches of all examples as one batch: they differ by their order."""
    if isinstance(source, Minibatches) and source.size == source.examples:
        return Whole(source.arrays)
    return source
