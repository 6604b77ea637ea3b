"""`unroll`: a fit as one pure function, to take gradients through."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from .._boundary import MOST_STEPS, entrance, whole_number
from .._data import Minibatches, Stream, Whole, as_batch, batch_shapes
from .._program import program
from .._step import (
    AbstractTrainer,
    Progress,
    TrainerT,
    advance,
    data_mark,
    is_scored_otherwise,
    live_if,
    noted,
    progress_of,
    raised_if_bad,
    ranked,
    require_all_data,
    require_one,
    require_optimiser,
    scored_parts,
    scorer_of,
    stepped_on,
    warn_of_sums,
    with_progress,
)


@entrance
def unroll(
    trainer: TrainerT,
    batch: Any,
    steps: int,
    *,
    segment: int | None = None,
) -> tuple[TrainerT, Float[Array, " steps"]]:
    """Takes steps as a pure function, to be differentiated through.

    ```python
    def validation_loss(log_scales):
        scales = {name: jnp.exp(s) for name, s in log_scales.items()}
        optimiser = trainer.optimiser.with_scale(scales)
        fitted, _ = vn.unroll(trainer.replace(optimiser=optimiser), train, 100)
        return fitted.evaluate(fitted.model, held_out)

    jax.grad(validation_loss)({"mean": 0.0, "power": 0.0})
    ```

    The steps are those of [`vernal.Trainer.step`][]: policy, hooks, projector, key,
    state, best. It passes through `jax.jit`, `jax.vmap` and JAX's derivatives of any
    order, forward and reverse: with respect to rates, `with_scale`, the data, the
    start, your own fields of the trainer. There is no history, no validation and no
    progress bar; to fit, use [`vernal.Trainer.fit`][].

    A step that is not taken changes neither the parameters nor the derivatives, and its
    loss is a constant. After a trainer has stopped, its losses are NaN with a gradient
    of zero, so `jnp.nanmean(losses)` can be differentiated. Under [`vernal.ZeroNans`][]
    a step with non-finite entries is taken; it has no derivative, and gradients through
    it are NaN.

    For gradients in reverse mode some states of the fit are kept, and the steps between
    them are computed again, by `jax.checkpoint`: this takes the memory of twice the
    square root of `steps` states, and of one step. Side effects of a loss, such as
    `jax.debug.print`, may happen more than once a step.

    **Arguments:**

    - `trainer`: a trainer with an optimiser. An optimiser with an open-ended loop, such
        as the zoom line search of `optax.lbfgs`, has forward derivatives only.
    - `batch`: one batch, any pytree, used whole at every step; or
        [`vernal.Minibatches`][].
    - `steps`: the number of steps. Each number compiles another program.
    - `segment`: the number of steps between two kept states. By default about the
        square root of `steps`. 1 keeps all states, which is faster, and takes less
        memory if one step needs much more of it than the parameters. 0 keeps all
        intermediate values of each step, and computes nothing again.

    **Returns:**

    The trainer after the steps, and the loss before each of them.

    **Raises:**

    - `TypeError`: if `batch` is a [`vernal.Stream`][].
    - `ValueError`: if the trainer has priors and `batch` is `Minibatches`.
    - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][]; in compiled code an
        error of Equinox.
    """
    if not isinstance(trainer, AbstractTrainer):
        raise TypeError(f"`trainer` is {trainer!r}, but must be a `vernal.Trainer`.")
    require_one(trainer, "unroll")
    steps = whole_number(steps, "steps", least=0, most=MOST_STEPS)
    if segment is not None:
        segment = whole_number(segment, "segment", least=0)
    require_optimiser(trainer)
    source = _source(batch)
    require_all_data(trainer, source)
    if steps == 0:
        return trainer, jnp.zeros(0, trainer.best_loss.dtype)
    length = _segment_near_root(steps) if segment is None else segment
    scorer = scorer_of(trainer, source)
    mark = np.uint32(data_mark(source, scored_parts(trainer)))
    marks = jax.device_put((mark, np.bool_(is_scored_otherwise(trainer, scorer))))
    progress, losses = _run(trainer, source, marks, steps, length)
    after = noted(with_progress(trainer, progress), scorer)
    return raised_if_bad(trainer, after), losses


def _source(batch: Any) -> Whole[Any] | Minibatches:
    if isinstance(batch, Minibatches):
        return batch
    if isinstance(batch, Stream | Iterator):
        raise TypeError(
            f"`batch` is of type `{type(batch).__name__}`, which is read from Python, "
            "but an unrolled fit is one pure program. Give it one batch, or all of the "
            "data as `vn.Minibatches(arrays, size, key=key)`; or call `trainer.step` "
            "in a loop."
        )
    return Whole(as_batch(batch, "batch"))


def _segment_near_root(steps: int) -> int:
    """Returns about the square root of a number, which it divides if that is near."""
    # A remainder is a second loop to compile.
    root = math.isqrt(steps)
    near = range(max(root // 2, 1), 2 * root + 1)
    return min(near, key=lambda length: (steps % length > 0, abs(length - root)))


@program
def _run(
    trainer: AbstractTrainer,
    source: Whole[Any] | Minibatches,
    marks: tuple[UInt32[Array, ""], Bool[Array, ""]],
    steps: int,
    segment: int,
) -> tuple[Progress, Float[Array, " steps"]]:
    """Takes the steps that come before the trainer stops."""
    old = progress_of(trainer)
    start = stepped_on(old, *marks)
    warn_of_sums(trainer, batch_shapes(source, start.step_count))

    def step(carry: tuple[Progress, Any], _: None) -> tuple[Any, Float[Array, ""]]:
        progress, cursor = carry

        def take() -> tuple[Any, Float[Array, ""]]:
            batch, place = source.next(cursor, progress.step_count)
            new, loss = _differentiable_step(with_progress(trainer, progress), batch)
            return (new, place), loss

        def stay() -> tuple[Any, Float[Array, ""]]:
            return carry, jnp.full_like(progress.best_loss, jnp.nan)

        return lax.cond(progress.stopped, stay, take)

    carry = start, source.start(start.step_count)
    (progress, _), losses = _scan(step, carry, steps, segment)
    return progress, losses


def _scan(
    step: Callable[[Any, None], tuple[Any, Array]], carry: Any, steps: int, segment: int
) -> tuple[Any, Float[Array, " steps"]]:
    """`lax.scan` that keeps the carry once a segment for gradients.

    Within a segment that is computed again, each step is computed again by itself: its
    intermediate values may be as large as the data.
    """
    again = lambda fn: jax.checkpoint(fn, prevent_cse=False)
    if segment == 0 or steps == 1:
        return lax.scan(step, carry, length=steps)
    if segment == 1 or segment >= steps:
        return lax.scan(again(step), carry, length=steps)

    def take(carry: Any, _: None) -> tuple[Any, Array]:
        return lax.scan(again(step), carry, length=segment)

    carry, losses = lax.scan(again(take), carry, length=steps // segment)
    if not steps % segment:
        return carry, losses.ravel()
    carry, last = lax.scan(again(step), carry, length=steps % segment)
    return carry, jnp.concatenate([losses.ravel(), last])


def _differentiable_step(
    trainer: AbstractTrainer, batch: Any
) -> tuple[Progress, Float[Array, ""]]:
    """Takes a step, and keeps its non-finite values out of the derivatives.

    The derivatives of a step that is not taken would be zero times non-finite values,
    which is NaN. So nothing flows into such a step. A first step, without derivatives,
    finds out whether it is taken; the compiler merges the two.
    """
    old = progress_of(trainer)
    _, seen = advance(*live_if(False, (trainer, batch)))
    new, outcome = advance(*live_if(seen.accepted, (trainer, batch)))
    loss = live_if(seen.accepted, outcome.loss)

    def held() -> Progress:
        return dataclasses.replace(
            live_if(False, new),
            params=old.params,
            latent=old.latent,
            opt_state=old.opt_state,
            state=old.state,
            **ranked(old, loss)._asdict(),
        )

    return lax.cond(seen.accepted, lambda: new, held), loss
