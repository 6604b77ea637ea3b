"""Warnings of data that are not what they seem, and of a sum over pairs, or a mean."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr

from .._boundary import (
    PyTree,
    integers_at_hand,
    rounded_integers,
    spelled_leaves,
    warn_of_rounded_integers,
    warn_of_single_leaves,
    warn_once_of,
)
from .._data import Minibatches, Source, Stream
from .._program import (
    LookUp,
    Version,
    jaxpr_of,
    look_ups,
    mean_over,
    sums_over_pairs,
    turned_into_floats,
    version_of,
)
from .._tree import by_path, shape_and_dtype
from .abstract_trainer import AbstractTrainer
from .objective import (
    defined,
    evaluate,
    live,
    loss_at,
    negative_log_likelihood,
    step_key,
)
from .outer import pairs_text


def warn_of_suspect_data(
    source: Source, name: str, seen: Callable[[], tuple[AbstractTrainer, Any]]
) -> None:
    """Warns of coordinates in float32, and of integers that the model turns into it.

    A difference of integers is exact, and so is an index: only those that become floats
    as they are count. It also warns of an index out of range. Of a stream nothing is
    looked at. `seen` returns a trainer, and a batch of the data as it sees it, or their
    shapes.
    """
    if isinstance(source, Stream):
        return
    data = source.arrays if isinstance(source, Minibatches) else source.batch
    warn_of_single_leaves(data, name)
    if suspects := rounded_integers(data):
        trainer, batch = seen()
        if (jaxpr := jaxpr_of(loss_at, trainer.params, trainer, batch)) is not None:
            lossy = turned_into_floats(jaxpr, _inputs(jaxpr, batch))
            for i, (where, leaf) in enumerate(spelled_leaves(name, data)):
                if i in lossy.intersection(suspects):
                    warn_of_rounded_integers(np.asarray(leaf), where)
    _warn_of_look_ups(data, name, seen)


def _inputs(jaxpr: Jaxpr, batch: Any) -> dict[Any, int]:
    """Returns the inputs that are the arrays of a batch, which comes last.

    Beside each is the place of the array among the leaves of the batch.
    """
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(jax.tree.leaves(batch)) if is_array(leaf)]
    inputs = jaxpr.invars[len(jaxpr.invars) - len(places) :]
    return dict(zip(inputs, places, strict=True))


def _warn_of_look_ups(
    data: PyTree, name: str, seen: Callable[[], tuple[AbstractTrainer, Any]]
) -> None:
    """Warns, once for a class, of data that index beyond a parameter.

    Such as instruments that are numbered from 1.
    """
    integers = integers_at_hand(data).items()
    ends = {i: (int(x.min()), int(x.max())) for i, x in integers if x.size}
    if not ends:
        return
    trainer, batch = seen()
    shapes = [leaf.shape for leaf in jax.tree.leaves(trainer.params)]
    # Most models have no parameter that these could index.
    is_out = lambda low, high: any(low < -n or high >= n for n in sum(shapes, ()))
    if not any(is_out(*both) for both in ends.values()):
        return
    leaves, names = list(spelled_leaves(name, data)), by_path(trainer.params).names
    for found in sorted(_look_ups(trainer, batch)):
        low, high = ends.get(found.integers, (found.low, found.high))
        if high > found.high:
            end, edge = f"up to {high}", f"{found.high} is the largest"
        elif low < found.low:
            end, edge = f"down to {low}", f"{found.low} is the least"
        else:
            continue
        of, where = [repr(names[i]) for i in found.arrays], leaves[found.integers][0]
        warn_once_of(
            type(trainer),
            f"{where} has numbers {end}, and indexes {' and '.join(of)} by them "
            f"along an axis of {found.size}, where {edge} that is within. JAX "
            "raises no error, and takes the nearest element. The first index is 0. "
            'If it is on purpose, write `array.at[index].get(mode="clip")`.',
            _warn_of_look_ups,
            where,
            found,
        )


def _look_ups(trainer: AbstractTrainer, batch: Any) -> frozenset[LookUp]:
    """Finds what arrays of a batch index; what is known is not looked for again."""
    kinds = tuple(map(shape_and_dtype, jax.tree.leaves((trainer, batch))))
    known = _known.setdefault(version_of((trainer, batch)), {})
    if kinds not in known:
        params, known[kinds] = trainer.params, frozenset()
        jaxpr = jaxpr_of(loss_at, params, trainer, batch)
        if jaxpr is not None:
            own = jaxpr.invars[: len(jax.tree.leaves(params))]
            known[kinds] = look_ups(jaxpr, _inputs(jaxpr, batch), own)
    return known[kinds]


# By the code that a version is of: a script may fit many times.
_known: weakref.WeakKeyDictionary[Version, dict[Any, frozenset[LookUp]]]
_known = weakref.WeakKeyDictionary()


def warn_of_sums(trainer: AbstractTrainer, batch: Any, validation: Any = None) -> None:
    """Warns, once for a class, of a loss that sums over all pairs of data.

    Also of a score of the batch of `validation`, if there is one, and of an `nll` that
    is a mean. This traces the loss. So programs call it while they are traced
    themselves; under `jax.disable_jit` nothing is.
    """
    if not isinstance(trainer.step_count, Tracer):
        return
    methods = defined(trainer)
    if not {"loss", "nll"}.isdisjoint(methods):
        jaxpr = jaxpr_of(loss_at, trainer.params, trainer, batch)
        _warn_of_pairs("loss", trainer, jaxpr)
        if "nll" in methods:
            own = jaxpr_of(_nll, trainer, batch) if "loss" in methods else jaxpr
            _warn_of_mean(trainer, own, batch)
    if validation is not None:
        jaxpr = jaxpr_of(evaluate, trainer, validation)
        _warn_of_pairs("score of the validation", trainer, jaxpr)


def _warn_of_pairs(what: str, trainer: AbstractTrainer, jaxpr: Jaxpr | None) -> None:
    if jaxpr is None or (size := sums_over_pairs(jaxpr)) is None:
        return
    kind = type(trainer)
    text = f"The {what} of `{kind.__name__}` sums over {pairs_text(size)}"
    warn_once_of(kind, text, _warn_of_pairs, what)


def _warn_of_mean(trainer: AbstractTrainer, jaxpr: Jaxpr | None, batch: Any) -> None:
    if jaxpr is None or (size := mean_over(jaxpr, _inputs(jaxpr, batch))) is None:
        return
    warn_once_of(
        type(trainer),
        f"`nll` of `{type(trainer).__name__}` is a mean over {size} data. A negative "
        "log-likelihood is a sum over them: by a mean the errors are too large by the "
        "root of that number, and priors weigh too much. Return `jnp.sum` in place of "
        "`jnp.mean`. What is only minimised may be a mean: call that `loss`. If the "
        "divisor is another number, such as a variance, divide before you sum.",
        _warn_of_mean,
    )


def _nll(trainer: AbstractTrainer, batch: Any) -> Any:
    here = live(trainer, trainer.params)
    return negative_log_likelihood(here, batch, step_key(trainer))
