"""Warnings of data whose digits are lost, and of a sum over pairs, or a mean."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr

from .._boundary import (
    rounded_integers,
    spelled_leaves,
    warn_of_rounded_integers,
    warn_of_single_leaves,
    warn_once,
)
from .._data import Minibatches, Source, Stream
from .._program import (
    jaxpr_of,
    mean_over,
    sums_over_pairs,
    turned_into_floats,
)
from .abstract_trainer import AbstractTrainer
from .objective import (
    defined,
    evaluate,
    live,
    negative_log_likelihood,
    step_key,
)
from .out_of_range import warn_of_look_ups
from .outer import pairs_text
from .traced_loss import inputs_of, loss_at, places_of_arrays


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
            _warn_of_rounded(suspects, jaxpr, batch, (name, data))
    warn_of_look_ups(data, name, seen)


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
    warn_once(
        f"The {what} of `{kind.__name__}` sums over {pairs_text(size)}",
        UserWarning,
        of=(_warn_of_pairs, what, weakref.ref(kind)),
    )


def _warn_of_mean(trainer: AbstractTrainer, jaxpr: Jaxpr | None, batch: Any) -> None:
    if jaxpr is None:
        return
    data = inputs_of(jaxpr, places_of_arrays(batch))
    if (size := mean_over(jaxpr, data)) is None:
        return
    kind = type(trainer)
    warn_once(
        f"`nll` of `{kind.__name__}` is a mean over {size} data. A negative log-"
        "likelihood is a sum over them: by a mean the errors are too large by the root "
        "of that number, and priors weigh too much. Return `jnp.sum` in place of "
        "`jnp.mean`. What is only minimised may be a mean: call that `loss`. If the "
        "divisor is another number, such as a variance, divide before you sum.",
        UserWarning,
        of=(_warn_of_mean, weakref.ref(kind)),
    )


def _warn_of_rounded(
    suspects: list[int], jaxpr: Jaxpr, batch: Any, named: tuple[str, Any]
) -> None:
    places = places_of_arrays(batch)
    lossy = {places[i] for i in turned_into_floats(jaxpr, inputs_of(jaxpr, places))}
    leaves = list(spelled_leaves(*named))
    for i in sorted(lossy.intersection(suspects)):
        where, leaf = leaves[i]
        warn_of_rounded_integers(np.asarray(leaf), where)


def _nll(trainer: AbstractTrainer, batch: Any) -> Any:
    here = live(trainer, trainer.params)
    return negative_log_likelihood(here, batch, step_key(trainer))
