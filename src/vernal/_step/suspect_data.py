"""Warnings of data whose digits are lost, and of a sum over pairs, or a mean."""

import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
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
from .._program import mean_over, sums_over_pairs, turned_into_floats
from .abstract_trainer import AbstractTrainer
from .objective import (
    defined,
    evaluate,
    live,
    negative_log_likelihood,
    score,
    step_key,
)


def warn_of_suspect_data(
    source: Source,
    name: str,
    trainer: AbstractTrainer,
    seen: Callable[[], tuple[AbstractTrainer, Any]],
) -> None:
    """Warns of coordinates in float32, and of integers that the model turns into it.

    A difference of integers is exact, and so is an index: only those that become floats
    as they are count. Of a stream nothing is looked at. `seen` returns a trainer, and a
    batch of the data as it sees it, or their shapes.
    """
    if isinstance(source, Stream):
        return
    data = source.arrays if isinstance(source, Minibatches) else source.batch
    warn_of_single_leaves(data, name)
    if suspects := rounded_integers(data):
        trainer, batch = seen()
        if (jaxpr := _traced(_loss, trainer, batch)) is not None:
            _warn_of_rounded(suspects, jaxpr, batch, (name, data))


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
        jaxpr = _traced(_loss, trainer, batch)
        _warn_of_pairs("loss", trainer, jaxpr)
        if "nll" in methods:
            own = _traced(_nll, trainer, batch) if "loss" in methods else jaxpr
            _warn_of_mean(trainer, own, batch)
    if validation is not None:
        jaxpr = _traced(evaluate, trainer, validation)
        _warn_of_pairs("score of the validation", trainer, jaxpr)


def _warn_of_pairs(what: str, trainer: AbstractTrainer, jaxpr: Jaxpr | None) -> None:
    if jaxpr is None or (size := sums_over_pairs(jaxpr)) is None:
        return
    kind = type(trainer)
    warn_once(
        f"The {what} of `{kind.__name__}` sums over {size} x {size} pairs: an array of "
        f"shape ({size}, 1) broadcasts against one of shape ({size},), so that each "
        "datum is compared with each value of the model, and the fit and its errors "
        "are wrong. Give them one shape, such as by `y[:, 0]`. If it is on purpose, "
        "make the column of a vector, by `y[:, 0][:, None]`.",
        UserWarning,
        of=(_warn_of_pairs, what, weakref.ref(kind)),
    )


def _warn_of_mean(trainer: AbstractTrainer, jaxpr: Jaxpr | None, batch: Any) -> None:
    if jaxpr is None or (size := mean_over(jaxpr, _inputs(jaxpr, batch)[0])) is None:
        return
    kind = type(trainer)
    warn_once(
        f"`nll` of `{kind.__name__}` is a mean over {size} data. A negative log-"
        "likelihood is a sum over them: by a mean the errors are too large by the root "
        "of that number, and priors weigh too much. Return `jnp.sum` in place of "
        "`jnp.mean`. What is only minimised may be a mean: call that `loss`.",
        UserWarning,
        of=(_warn_of_mean, weakref.ref(kind)),
    )


def _inputs(jaxpr: Jaxpr, batch: Any) -> tuple[list[Any], list[int]]:
    """Returns the variables of the arrays of a batch, and which of its leaves they are.

    The batch comes last.
    """
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(jax.tree.leaves(batch)) if is_array(leaf)]
    return jaxpr.invars[len(jaxpr.invars) - len(places) :], places


def _warn_of_rounded(
    suspects: list[int], jaxpr: Jaxpr, batch: Any, named: tuple[str, Any]
) -> None:
    inputs, places = _inputs(jaxpr, batch)
    lossy = {places[i] for i in turned_into_floats(jaxpr, inputs)}
    leaves = list(spelled_leaves(*named))
    for i in sorted(lossy.intersection(suspects)):
        where, leaf = leaves[i]
        warn_of_rounded_integers(np.asarray(leaf), where)


def _loss(trainer: AbstractTrainer, batch: Any) -> Any:
    return score(live(trainer, trainer.params), batch, step_key(trainer)).loss


def _nll(trainer: AbstractTrainer, batch: Any) -> Any:
    here = live(trainer, trainer.params)
    return negative_log_likelihood(here, batch, step_key(trainer))


def _traced(fn: Callable[..., Any], *args: Any) -> Jaxpr | None:
    try:
        return eqx.filter_make_jaxpr(fn)(*args)[0].jaxpr
    except Exception:  # what a fit meets, if it takes a step, it raises itself
        return None
