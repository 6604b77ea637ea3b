"""Where a value that is not finite comes from, and whether there are data at all."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._boundary import PyTree, debugged, is_debugged, is_traced, spelled_leaves, warn
from .._data import Minibatches, as_batch
from .._likelihoods import Gaussian, Poisson, Robust
from .._policy import SKIP_ADVICE
from .._program import Steep, program, said_of_steep, steep
from .._tree import by_path, is_inexact
from .abstract_trainer import (
    AbstractTrainer,
    changed,
    overrides,
    priors_of,
    progress_of,
    stripped,
    template_of,
    with_progress,
)
from .nan_report import is_at_bad_step
from .objective import (
    defined,
    live,
    loss_at,
    negative_log_likelihood,
    real_residuals,
    real_residuals_and_kind,
    residuals_by_place,
    score,
    step_key,
)

# How many leaves are named.
_MOST_NAMED = 4

# Losses below it are worth a look, whatever their dtype and that of the residuals.
_TINY = float(jnp.finfo(jnp.float32).tiny)

_ALL_FINITE = "The data, the parameters, the loss and its gradient are finite."

DATA_ADVICE = (
    "Leave such data out of the batch (`vn.omit`), or mask them (`where=` of "
    "`vn.likelihoods`)."
)

_GRADIENT_REMEDY = (
    "Look for `jnp.sqrt`, `jnp.linalg.norm`, `jnp.log`, `jnp.arctan2` or a power below "
    "one at zero, for `jnp.arccos` or `jnp.arcsin` at 1 or -1, and for a `jnp.where` "
    "that hides a value which is not finite: its gradient still meets that value."
)

_STEEP_REMEDY = (
    "Keep its argument from that value: by a bound, by `jnp.clip` to a little less, or "
    "by a `jnp.where` before it. One behind it does not help: the gradient still meets "
    "that value."
)

_SINGLE_REMEDY = " Look, too, for numbers whose square is beyond the range of float32."


class Diagnosis(NamedTuple):
    """Sentences about what is not finite.

    **Attributes:**

    - `data`: about leaves of the batch.
    - `others`: about the model, and about what is computed from both.
    """

    data: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """All of it, as sentences."""
        return " ".join((*self.data, *self.others))

    @property
    def has_nothing(self) -> bool:
        """Whether all that was looked at is finite."""
        return self == Diagnosis((), (_ALL_FINITE,))

    @property
    def advised(self) -> str:
        """All of it, and what to do about it in a fit."""
        return f"{self} {DATA_ADVICE if self.data else SKIP_ADVICE}".lstrip()

    @property
    def advised_on_data(self) -> str:
        """All of it, and what to do about it in a solve, which skips no step."""
        return f"{self} {DATA_ADVICE}" if self.data else str(self)


def diagnosed(trainer: AbstractTrainer, batch: Any) -> Diagnosis:
    """Says in sentences where a non-finite value comes from.

    Names the non-finite leaves of the batch, parameters and frozen arrays; then the
    trainer's method, or the gradient, which it evaluates in a program of its own. After
    a bad step, with the random key and the minibatch of that step.

    Under `jax_debug_nans` or `jax_debug_infs`, raises a `FloatingPointError` at the
    operation instead.
    """
    if is_traced(trainer.params, batch):
        return Diagnosis((), ("Outside of `jax.jit` it can be said where from.",))
    data, model = bad_data(batch), _bad_model(trainer)
    if is_at_bad_step(trainer):
        progress = progress_of(trainer)
        before = progress.step_count - 1
        trainer = with_progress(trainer, changed(progress, step_count=before))
    bare, batch = _at_step(trainer, batch)
    if is_debugged():
        _raise_at_origin(bare, batch)
    results = _bad_results(bare, batch)
    if results:
        results = (*_empty(batch), *results)
    if data or model:
        said = (f"{result[0].upper()}{result[1:]}" for result in results)
        return Diagnosis(data, (*model, *said))
    if results:
        first, *rest = results
        first = f"The data and the parameters are finite: {first}"
        return Diagnosis((), (first, *rest))
    return Diagnosis((), (_ALL_FINITE, *_bad_update(trainer, batch)))


def warn_of_no_data(
    where: str, losses: np.ndarray, ended: Callable[[Any], tuple[AbstractTrainer, Any]]
) -> list[int]:
    """Warns if each loss, or each score, is zero though the model need not be right.

    Either no datum is left, or the squares of all residuals are too small for their
    dtype. `losses` have a row for each step, and a column for each of many trainers;
    those are named. `ended` returns a trainer and its batch, by index.
    `where` is what the warning begins with. Returns which of many have no data.
    """
    # NaN follows the last step of one of many.
    sizes = abs(losses)
    is_small = (sizes < _TINY).any(axis=0) & ~(sizes >= _TINY).any(axis=0)
    places = np.argwhere(is_small)
    for row, found in enumerate(places):
        index = int(found[0]) if is_small.ndim else ()
        which = f" of member {index}" if is_small.ndim else ""
        if _lacks_data(*ended(index)):
            warn(
                f"`{where}`: no datum{which} is left, so that any model fits: "
                "`where` of the likelihood is false for all. It is true for each datum "
                "that is there, unlike the mask of a masked array."
                + _of_others([i for i in places.ravel().tolist() if i != index])
            )
            rest = places[row:].ravel().tolist()
            return [i for i in rest if i == index or _lacks_data(*ended(i))]
        if small := _too_small(*ended(index)):
            which = f", member {index}" if is_small.ndim else ""
            warn(
                f"`{where}`{which}: {small}, so that any model fits. Fit in larger "
                "units, or divide what is squared by its error."
            )
            return []
    return []


def _of_others(members: list[int]) -> str:
    """Names the other members whose loss is zero."""
    if not members:
        return ""
    more = f" and of {len(members) - 8} more" if len(members) > 8 else ""
    named = ", ".join(map(str, members[:8]))
    return f" The loss of member {named}{more} is zero, too."


def _lacks_data(trainer: AbstractTrainer, batch: Any) -> bool:
    """Whether the residuals that are minimised are those of no datum."""
    if defined(trainer) != ("residuals",) or priors_of(trainer) is not None:
        return False
    left = _evaluated(*_at_step(trainer, batch), _data_left)
    return left is not None and int(left) == 0


def _too_small(trainer: AbstractTrainer, batch: Any) -> str:
    """Says how small are the numbers whose loss is zero; empty if they are not."""
    of = _small_residuals if "residuals" in defined(trainer) else _small_loss
    with contextlib.suppress(Exception):  # of the user's code: it is no answer
        return of(*_at_step(trainer, batch))
    return ""


def _small_residuals(trainer: AbstractTrainer, batch: Any) -> str:
    """They may be that small at a minimum: so must be what the model adds to them."""
    largest, moved = map(np.asarray, _evaluate(trainer, batch, _sizes))
    limit = float(jnp.finfo(largest.dtype).tiny) ** 0.5
    if not (0 < largest < limit and moved < limit):
        return ""
    found = f"the residuals are {largest:.2g} at most"
    return f"{found}, and their squares are zero in {largest.dtype}"


def _small_loss(trainer: AbstractTrainer, batch: Any) -> str:
    """What a user squares is not seen, but its loss in float64 is."""
    args = trainer, batch, step_key(trainer)
    with jax.enable_x64(True):
        loss = float(_loss(*jax.tree.map(_doubled, args)))
    is_lost = float(_loss(*args)) == 0 < abs(loss) < float(jnp.finfo(np.float32).tiny)
    return f"the loss is {loss:.2g}, which is zero in float32" if is_lost else ""


def _doubled(leaf: Any) -> Any:
    is_single = getattr(leaf, "dtype", None) in (np.float32, np.complex64)
    return leaf.astype(np.promote_types(leaf.dtype, np.float64)) if is_single else leaf


def _data_left(trainer: AbstractTrainer, batch: Any, key: Any) -> int | Int[Array, ""]:
    return real_residuals_and_kind(trainer, batch, key)[1].size


def _sizes(
    trainer: AbstractTrainer, batch: Any, key: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the largest residual, and how far the parameters move any."""
    params = trainer.params
    of = lambda params: real_residuals(live(trainer, params), batch, key)
    residuals, moves = jax.jvp(of, (params,), (params,))
    largest = lambda x: jnp.max(jnp.abs(x), initial=0)
    return largest(residuals), largest(moves)


def bad_data(batch: Any, argument: str = "batch") -> tuple[str, ...]:
    """Says of each leaf of a batch how many of its numbers are not finite, and where.

    In [`vernal.Minibatches`][] it looks at all the examples. The leaves are named as
    those of the user's `argument`.
    """
    is_whole = isinstance(batch, Minibatches)
    tree = batch.arrays if is_whole else as_batch(batch)
    of_all = " of all the examples" if is_whole else ""
    bad = _bad_leaves(spelled_leaves(argument, tree))
    return _abridged([f"{where} {what}{of_all}." for where, what in bad])


def _at_step(trainer: AbstractTrainer, batch: Any) -> tuple[AbstractTrainer, Any]:
    """Returns a bare trainer and the batch of its step."""
    if isinstance(batch, Minibatches):
        step = trainer.step_count
        batch = batch.next(batch.start(step), step)[0]
    return stripped(trainer), as_batch(batch)


def _empty(batch: Any) -> tuple[str, ...]:
    """Names the arrays of a batch that have no numbers: a mean over nothing is NaN."""
    leaves = spelled_leaves("batch", as_batch(batch))
    return _abridged([f"{w} is empty." for w, leaf in leaves if 0 in np.shape(leaf)])


def _bad_update(trainer: AbstractTrainer, batch: Any) -> tuple[str, ...]:
    """Says which hook, or else that the optimiser, makes an update that is not finite.

    The hooks are tried at the parameters before the step.
    """
    *_, lasts = jax.device_get(progress_of(trainer).nan_counts)
    if lasts[-1] < lasts.max() or lasts[-1] < 0:
        return ()
    hooks = {"transform_grads": _changed_gradients, "constrain": _constrained}
    own = [name for name in hooks if overrides(trainer, name)]
    for name in own:
        changed = _evaluated(stripped(trainer), batch, hooks[name])
        if bad := _bad_paths(changed):
            return (f"What `{name}` returns is not finite in {bad}.",)
    makers = " or ".join(["the optimiser", *(f"`{name}`" for name in own)])
    return (f"The update that {makers} made of it is not.",)


def _bad_model(trainer: AbstractTrainer) -> tuple[str, ...]:
    trained = set(by_path(trainer.params).names)
    kind = lambda path: "parameter" if path in trained else "frozen value"
    bad = _bad_leaves(by_path(trainer.model).items())
    return _abridged([f"The {kind(path)} {path!r} {what}." for path, what in bad])


def _abridged(sentences: list[str]) -> tuple[str, ...]:
    more = len(sentences) - _MOST_NAMED
    if more <= 0:
        return tuple(sentences)
    return (*sentences[:_MOST_NAMED], f"{more} more leaves are not finite.")


def _bad_leaves(named: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Lists the name of each leaf that is not finite, and what is wrong with it."""
    is_number = lambda leaf: is_inexact(leaf) or isinstance(leaf, float | complex)
    described = [(name, _described(leaf)) for name, leaf in named if is_number(leaf)]
    return [(name, what) for name, what in described if what]


def _bad_paths(tree: PyTree) -> str:
    """Lists the paths of the first leaves that are not finite; empty if all are."""
    names = [repr(path) for path, _ in _bad_leaves(by_path(tree).items())]
    return ", ".join(names[:_MOST_NAMED]) + ", ..." * (len(names) > _MOST_NAMED)


@jax.jit
def _counts(array: Any) -> Any:
    # On the devices where it lies: only two counts and two places come to the host.
    flags = jnp.isnan(array).ravel(), jnp.isinf(array).ravel()
    return [(jnp.sum(flag), jnp.argmax(flag)) for flag in flags]


def _described(leaf: Any) -> str:
    """Says what is not finite in an array; empty if all of it is."""
    shape, parts = np.shape(leaf), []
    if math.prod(shape) == 0:
        return ""
    (nans, first_nan), (infinities, first_infinity) = jax.device_get(_counts(leaf))
    if not shape:
        return "is NaN" if nans else "is infinite" if infinities else ""
    for count, first, one, many in (
        (nans, first_nan, "NaN", "NaNs"),
        (infinities, first_infinity, "infinity", "infinities"),
    ):
        if count:
            what = f"1 {one}, at" if count == 1 else f"{count} {many}, the first at"
            parts.append(f"{what} {_index(first, shape)}")
    return f"has {', and '.join(parts)}" if parts else ""


def _index(flat: Any, shape: tuple[int, ...]) -> str:
    return str([int(i) for i in np.unravel_index(int(flat), shape)])


def _bad_results(trainer: AbstractTrainer, batch: Any) -> tuple[str, ...]:
    """Says which of a trainer's methods, or which gradient, is not finite."""
    methods = defined(trainer)
    found = [_bad_result(trainer, batch, name) for name in methods]
    if any(found):
        return tuple(sentence for sentence in found if sentence)
    if bad := _bad_result(trainer, batch, ""):
        return (bad,)
    if bad := _bad_paths(_evaluated(trainer, batch, _gradients)):
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(trainer.params)}
        is_single = bool(dtypes & {"float32", "complex64"})
        fault = f"the loss is finite, but not its gradient in {bad}."
        found = _evaluated(trainer, batch, _steep)
        if found and (where := said_of_steep(jax.device_get(found))):
            return fault, f"The derivative of {where} is not finite.", _STEEP_REMEDY
        return fault, _GRADIENT_REMEDY + _SINGLE_REMEDY * is_single
    return ()


def _bad_result(trainer: AbstractTrainer, batch: Any, name: str) -> str:
    """Says whether a method's result is finite; without a name, the loss's."""
    if name == "residuals":
        return _bad_residuals(trainer, batch)
    method = negative_log_likelihood if name == "nll" else _loss
    what = f"`{name}`" if name else "half the sum of squared `residuals`"
    return _bad_value(what, _evaluated(trainer, batch, method))


def _bad_residuals(trainer: AbstractTrainer, batch: Any) -> str:
    """Says which of the arrays and likelihoods in `residuals` are not finite."""
    found, said = _evaluated(trainer, batch, residuals_by_place) or {}, []
    for where, (term, value) in found.items():
        if bad := _bad_value(where, value):
            is_known = isinstance(term, Gaussian | Poisson | Robust)
            why = term.impossible() if is_known else ""
            of_batch = _error_bars(batch, term) if why else _zeros(batch, value)
            said.append(" ".join((bad, *([why] if why else []), *of_batch)))
    return " ".join(_abridged(said))


def _bad_value(what: str, value: Any) -> str:
    """Says whether a result is finite, and where it is not; empty if it is."""
    if not is_inexact(value) or not _described(value):
        return ""
    (nans, first_nan), (_, first_infinity) = jax.device_get(_counts(value))
    kind, first = ("NaN", first_nan) if nans else ("infinite", first_infinity)
    if not value.shape and float(value.real) == -math.inf:
        return f"{what} is minus infinity: check its sign."
    if not value.shape:
        return f"{what} is {kind}."
    size = value.size if value.ndim == 1 else f"shape {value.shape}"
    return f"{what} is {kind} first at {_index(first, value.shape)} of {size}."


def _zeros(batch: Any, residuals: Array) -> tuple[str, ...]:
    """Names the leaves of a batch that are zero just where residuals are not finite."""
    zeros = [
        f"{where} is 0 there."
        for where, leaf in spelled_leaves("batch", batch)
        if isinstance(leaf, jax.Array) and leaf.size == residuals.size
        if jnp.issubdtype(leaf.dtype, jnp.number) and _is_zero_at_bad(leaf, residuals)
    ]
    remedy = (
        "If it is an error bar, it may not be 0: leave that datum out; or, if it is "
        "the root of a count, return `vn.likelihoods.Poisson`."
    )
    return (*zeros[:_MOST_NAMED], remedy) if zeros else ()


def _error_bars(batch: Any, term: Any) -> tuple[str, ...]:
    """Names the leaves of a batch that the bad error bars of a likelihood are from."""
    if not isinstance(term, Gaussian):
        return ()
    named = [
        f"{where} is not positive there."
        for where, leaf in spelled_leaves("batch", batch)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number)
        if _has_signs_of(leaf, term)
    ]
    remedy = (
        "Leave such data out, or mask them (`where=`); or, if the error bars are roots "
        "of counts, return `vn.likelihoods.Poisson`."
    )
    return (*named[:_MOST_NAMED], remedy)


def _has_signs_of(leaf: Array, term: Gaussian) -> bool:
    """Whether a leaf has the signs of the error bars: their roots have them, too."""
    shape = term.std.shape
    with contextlib.suppress(ValueError):  # of another shape
        wide = leaf.reshape(shape) if leaf.size == term.std.size else leaf
        return bool(_are_signs(jnp.broadcast_to(wide, shape), term.std, term.where))
    return False


@jax.jit
def _are_signs(leaf: Array, std: Array, where: Array | None) -> Array:
    is_same = jnp.sign(leaf).astype(std.dtype) == jnp.sign(std)
    return jnp.all(is_same if where is None else is_same | ~where)


@jax.jit
def _is_zero_at_bad(leaf: Array, residuals: Array) -> Any:
    is_zero = leaf.ravel() == 0
    return jnp.all(is_zero != jnp.isfinite(residuals.ravel())) & ~jnp.all(is_zero)


def _loss(trainer: AbstractTrainer, batch: Any, key: Any) -> Any:
    return score(trainer, batch, key).loss


def _changed_gradients(trainer: AbstractTrainer, batch: Any, key: Any) -> PyTree:
    return trainer.transform_grads(_gradients(trainer, batch, key), trainer.model)


def _constrained(trainer: AbstractTrainer, batch: Any, key: Any) -> PyTree:
    return template_of(trainer).trained(trainer.constrain(trainer.model))


def _gradients(trainer: AbstractTrainer, batch: Any, key: Any) -> PyTree:
    return jax.grad(loss_at)(trainer.params, trainer, batch, key)


def _steep(trainer: AbstractTrainer, batch: Any, key: Any) -> Steep:
    loss = lambda params: loss_at(params, trainer, batch, key)
    function = jax.make_jaxpr(loss)(trainer.params)
    return steep(function, jax.tree.leaves(trainer.params))


def _raise_at_origin(trainer: AbstractTrainer, batch: Any) -> None:
    """Evaluates the loss and its gradient one operation after the other."""
    key = step_key(trainer)
    with debugged(), jax.disable_jit():
        for evaluate in (score, _gradients):
            try:
                evaluate(trainer, batch, key)
            except FloatingPointError:
                raise
            except Exception:
                # What is explained is another error, as in `_evaluated`.
                return


def _evaluated(trainer: AbstractTrainer, batch: Any, method: Callable[..., Any]) -> Any:
    """Evaluates a method, `None` if that fails: what is explained is another error."""
    with contextlib.suppress(Exception):
        return _evaluate(trainer, batch, method)
    return None


@program
def _evaluate(trainer: AbstractTrainer, batch: Any, method: Callable[..., Any]) -> Any:
    return method(trainer, batch, step_key(trainer))
