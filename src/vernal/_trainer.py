"""`Trainer`: a model, an optimiser and their policies, as one immutable pytree."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._closures import Closure
from ._data import Minibatches, Stream, as_batch
from ._history import History
from ._loop import fit as run_fit, no_optimiser
from ._nonfinite import NanCount, NanPolicy, NonFiniteError, StopFit
from ._objective import METHODS, defined, metric_shapes
from ._optimiser import ParamOptimiser
from ._parts import Parts, parameters, strong
from ._paths import is_inexact, paths, resolve
from ._projector import EigenProjector
from ._result import FitResult
from ._step import Progress, advance, grad_norm, initial_progress, require_alike
from ._transform import AbstractTransform, as_transform
from ._typing import prng_key

Model = TypeVar("Model")
Batch = TypeVar("Batch")
SelfT = TypeVar("SelfT", bound="Trainer[Any, Any]")


class StepInfo(NamedTuple):
    """What one step tells of itself.

    **Attributes:**

    - `loss`: the loss at the parameters before the step.
    - `grad_norm`: the norm of its gradient in the model's own parameters.
    - `accepted`: whether the step was taken.
    - `stopped`: whether the trainer has stopped, and takes no further step.
    - `metrics`: what the loss returned beside the scalar.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    accepted: Bool[Array, ""]
    stopped: Bool[Array, ""]
    metrics: dict[str, Any]


class Trainer(eqx.Module, Generic[Model, Batch]):
    """Fits a model. To be subclassed: the subclass says what is minimised.

    ```python
    class LineFit(vn.Trainer):
        def residuals(self, model, batch):
            x, y, sigma = batch
            return (model(x) - y) / sigma

    trainer = LineFit(model, optax.adam(1e-2))
    result = trainer.fit((x, y, sigma), steps=500)
    ```

    A subclass defines at least one of

    - `loss(self, model, batch) -> scalar`, or `-> (scalar, dict of metrics)`;
    - `residuals(self, model, batch) -> array`, whose sum of squares is a chi-squared;
    - `nll(self, model, batch) -> scalar`, the negative log-likelihood.

    Where there is no `loss`, the negative log-likelihood is minimised, which for
    `residuals` is half their sum of squares. With `key=`, the three are called with a
    keyword argument `key` too, another one at every step. It may also define the hooks
    `transform_grads` and `constrain`, and have fields of its own, by an `__init__`
    that calls `super().__init__(...)`. All of them are pure functions: what they need
    is in their arguments and in `self`, where `self.model` is `model`.

    A trainer is a pytree of arrays, and immutable: `step` and `fit` return a new one.
    It goes through `jax.jit`, `jax.vmap` and `jax.lax.scan` as it is.

    **Attributes:**

    - `optimiser`, `nan_policy`, `projector`, `key`: as they were given.
    """

    optimiser: AbstractTransform | None
    nan_policy: NanPolicy
    projector: EigenProjector | None
    key: PRNGKeyArray | None
    _parts: Parts
    _progress: Progress

    def __init__(
        self,
        model: Model,
        optimiser: optax.GradientTransformation | None = None,
        *,
        train: Any = None,
        nan_policy: NanPolicy = StopFit(),  # noqa: B008
        projector: EigenProjector | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `model`: any `equinox.Module`, any pytree.
        - `optimiser`: a [`vernal.ParamOptimiser`][] or any Optax transformation.
        - `train`: a selector (see [`vernal.split`][]) of the parameters to fit; all
            else is frozen. By default those that the rules of the optimiser train;
            else those of the projector; else every array of floats.
        - `nan_policy`: what to do with values that are not finite.
        - `projector`: fits in its latent space instead of the parameters'.
        - `key`: a PRNG key, for a loss that draws random numbers.

        **Raises:**

        - `TypeError`: if the class defines none of `loss`, `residuals`, `nll`, or an
            argument is of the wrong kind.
        - `UnknownPathError`: if a selector matches nothing.
        - `ValueError`: if there is nothing to train, or the projector does not fit.
        """
        _check_class(self)
        _check_arguments(nan_policy, projector, key)
        self.nan_policy = nan_policy
        self.key = key
        self.optimiser = (
            None if optimiser is None else as_transform(optimiser, "optimiser")
        )
        owners = _trained(model, self.optimiser, train, projector)
        params = parameters(model, owners)
        self._parts = Parts(model, owners)
        self.projector, latent = _fitted(projector, params, self.optimiser)
        self._progress = initial_progress(
            params,
            latent,
            _opt_state(self.optimiser, params, latent),
            jax.tree.map(strong, nan_policy.init(params)),
        )

    # What a subclass may override.

    def transform_grads(self, grads: PyTree, model: Model) -> PyTree:
        """A hook: changes the gradients after the NaN policy, before the optimiser.

        **Arguments:**

        - `grads`: the gradients of the trained parameters, `None` elsewhere.
        - `model`: the model at which they were taken.
        """
        return grads

    def constrain(self, model: Model) -> Model:
        """A hook: changes the model after each update, to clip or to renormalise."""
        return model

    # What a trainer holds.

    @property
    def params(self) -> PyTree:
        """The trained parameters: the model with `None` for all that is not trained."""
        return self._progress.params

    @property
    def model(self) -> Model:
        """The model with the current values."""
        return self._parts.join(self._progress.params)

    @property
    def best(self) -> Model:
        """The model with the lowest finite loss that was scored.

        A step scores the parameters that it starts from, so that the last iterate of a
        fit is not scored until there is a further step.
        """
        return self._parts.join(self._progress.best)

    @property
    def best_loss(self) -> Float[Array, ""]:
        """The loss of `best`: infinite before the first step."""
        return self._progress.best_loss

    @property
    def step_count(self) -> Int[Array, ""]:
        """The number of steps, those that were not accepted included."""
        return self._progress.step_count

    @property
    def stopped(self) -> Bool[Array, ""]:
        """Whether the NaN policy has ended the fit. `replace` lets it go on."""
        return self._progress.stopped

    @property
    def opt_state(self) -> PyTree:
        """The state of the optimiser."""
        return self._progress.opt_state

    @property
    def latent(self) -> PyTree:
        """The coordinates in the projector's space, `None` if there is no projector."""
        return self._progress.latent

    # What a trainer does.

    def step(self: SelfT, batch: Batch) -> tuple[SelfT, StepInfo]:
        """Takes one compiled step.

        **Arguments:**

        - `batch`: what the loss is given, any pytree.

        **Returns:**

        The trainer after the step, and a [`vernal.StepInfo`][]. A trainer that has
        stopped is returned as it is.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        """
        if self.optimiser is None:
            raise no_optimiser(self)
        progress, info = _step(self, as_batch(batch))
        trainer = self._at(progress)
        if not self.nan_policy.raises:
            return trainer, info
        if isinstance(info.stopped, jax.core.Tracer):
            progress = eqx.error_if(
                progress,
                info.stopped,
                "A value is not finite, and the policy is RaiseOnNan.",
            )
            return self._at(progress), info
        if info.stopped:
            raise trainer._non_finite_error(trainer)
        return trainer, info

    def fit(
        self: SelfT,
        data: Batch | Minibatches | Stream,
        steps: int,
        *,
        record: Any = (),
        every: int = 1,
        progress: bool = True,
        callback: Callable[[Any, History], Any] | None = None,
        chunk: int | None = None,
    ) -> FitResult[SelfT, Model]:
        """Takes many steps, in one compiled program.

        **Arguments:**

        - `data`: one batch, any pytree, used whole at every step; or
            [`vernal.Minibatches`][]; or a [`vernal.Stream`][].
        - `steps`: how many steps to take from here. The number can be changed without
            compiling anew.
        - `record`: what the history keeps beside the loss: `"grad_norm"` (in the
            model's parameters), selectors (the values before the update), names of
            metrics.
        - `every`: keep every so many steps only; the loss too.
        - `progress`: whether to show a progress bar, where there is a terminal or a
            notebook to show it in.
        - `callback`: a function `(trainer, history)`, called on the host after every
            chunk of steps. It may return `True` to end the fit, or a trainer of the
            same structure to go on with.
        - `chunk`: the number of steps between two calls. By default as many as take
            about half a second.

        **Returns:**

        A [`vernal.FitResult`][]. Ctrl-C ends a fit between two chunks, with the result
        up to there.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        - `StreamExhaustedError`: if a stream ends before the fit.
        - `UnknownPathError`: if `record` names what there is not.
        """
        return run_fit(
            self,
            data,
            steps,
            record=record,
            every=every,
            progress=progress,
            callback=callback,
            chunk=chunk,
        )

    def nan_report(self) -> dict[str, NanCount]:
        """Tells what was not finite, how often, and when first.

        **Returns:**

        A dictionary with one [`vernal.NanCount`][] for `"loss"`, for the gradient of
        each trained parameter by its path, and for `"update"`: steps whose new
        parameters or optimiser state would not have been finite, and which therefore
        were not taken. (Where a parameter is called so itself, its path is the key,
        and the other's is `"<loss>"` or `"<update>"`.)
        """
        totals, firsts, _ = jax.device_get(self._progress.nan_counts)
        return {
            name: NanCount(int(total), int(first) if first >= 0 else None)
            for name, total, first in zip(self._watched(), totals, firsts, strict=True)
        }

    def _watched(self) -> tuple[str, ...]:
        names = paths(self.params)
        free = lambda name: f"<{name}>" if name in names else name
        return (free("loss"), *names, free("update"))

    def _non_finite_error(self, result: Any) -> NonFiniteError:
        *_, lasts = jax.device_get(self._progress.nan_counts)
        step = int(lasts.max())
        watched = zip(self._watched(), lasts, strict=True)
        bad = [name for name, last in watched if last == step]
        return NonFiniteError(step, bad, self.nan_report(), result)

    def replace(
        self: SelfT,
        *,
        model: Model | None = None,
        optimiser: optax.GradientTransformation | None = None,
        nan_policy: NanPolicy | None = None,
    ) -> SelfT:
        """Changes some of what the trainer holds, and keeps what still fits.

        The state of an optimiser or a policy is kept if the new one's has the same
        structure, shapes and dtypes, and made anew otherwise. The step count, the best
        and the counts of `nan_report` are kept. A trainer that has stopped goes on.

        **Arguments:**

        - `model`: a model of the same structure, with other values.
        - `optimiser`: another optimiser, or the same one with another rate.
        - `nan_policy`: another policy.
        """
        old = self._progress
        params, latent, parts = old.params, old.latent, self._parts
        if model is not None:
            if jax.tree.structure(model) != parts.structure:
                raise ValueError(
                    "`model` has another structure than the one that is fitted. For "
                    "another model, make a new trainer."
                )
            kinds = [0 if kind == "trained" else None for kind in parts.kinds]
            require_alike(parameters(model, kinds), params, "`model`")
            params = _cast_like(parameters(model, kinds), params)
            parts = Parts(model, kinds)
            if self.projector is not None:
                latent = self.projector.to_latent(params)
                params = self.projector.to_params(latent)
        transform = self.optimiser
        opt_state = old.opt_state
        if optimiser is not None:
            transform = as_transform(optimiser, "optimiser")
            _fitted(self.projector, params, transform)
            opt_state = _kept(opt_state, _opt_state(transform, params, latent))
        policy, policy_state = self.nan_policy, old.policy_state
        if nan_policy is not None:
            _check_arguments(nan_policy, None, None)
            policy = nan_policy
            fresh = jax.tree.map(strong, policy.init(params))
            policy_state = _kept(policy_state, fresh)
        progress = Progress(
            params=params,
            latent=latent,
            opt_state=opt_state,
            policy_state=policy_state,
            best=old.best,
            best_loss=old.best_loss,
            nan_counts=old.nan_counts,
            step_count=old.step_count,
            stopped=jnp.zeros_like(old.stopped),
        )
        return _with(
            self,
            optimiser=transform,
            nan_policy=policy,
            _parts=parts,
            _progress=progress,
        )

    def _at(self: SelfT, progress: Progress) -> SelfT:
        return _with(self, _progress=progress)

    def _overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Trainer, hook)


def _with(trainer: SelfT, **fields: Any) -> SelfT:
    """Copies a trainer with other fields, its class's own `__init__` aside.

    As unflattening it would, without the flattening: this stands between the chunks
    of every fit.
    """
    new = object.__new__(type(trainer))
    vars(new).update(vars(trainer), **fields)
    return new


@eqx.filter_jit
def _step(trainer: Any, batch: Any) -> tuple[Progress, StepInfo]:
    def take() -> tuple[Progress, StepInfo]:
        progress, outcome = advance(trainer, batch)
        return progress, StepInfo(
            outcome.loss,
            grad_norm(outcome.grads),
            outcome.accepted,
            progress.stopped,
            outcome.metrics,
        )

    def stay() -> tuple[Progress, StepInfo]:
        nan, no = jnp.full_like(trainer.best_loss, jnp.nan), jnp.asarray(False)
        metrics = jax.tree.map(_blank, metric_shapes(trainer, batch))
        return trainer._progress, StepInfo(nan, nan, no, ~no, metrics)

    return jax.lax.cond(trainer.stopped, stay, take)


def _blank(like: jax.ShapeDtypeStruct) -> Array:
    inexact = jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.full(like.shape, jnp.nan if inexact else 0, like.dtype)


def _check_class(trainer: Any) -> None:
    if not defined(trainer):
        raise TypeError(
            f"`{type(trainer).__name__}` defines none of "
            f"{', '.join(f'`{name}`' for name in METHODS)}. Subclass `Trainer` and "
            "say what is fitted: `def residuals(self, model, batch): ...`."
        )


def _check_arguments(nan_policy: Any, projector: Any, key: Any) -> None:
    if not isinstance(nan_policy, NanPolicy):
        made = isinstance(nan_policy, type) and issubclass(nan_policy, NanPolicy)
        remedy = f"`{nan_policy.__name__}()`" if made else "`vn.SkipStep()`"
        raise TypeError(
            f"`nan_policy` is {nan_policy!r}, not a NanPolicy. Did you mean {remedy}?"
        )
    if projector is not None and not isinstance(projector, EigenProjector):
        raise TypeError(
            f"`projector` is of type `{type(projector).__name__}`, but must be an "
            "EigenProjector: `vn.EigenProjector.from_fisher(fmat, params)`."
        )
    if key is not None:
        prng_key(key)


def _trained(
    model: Any, optimiser: Any, train: Any, projector: EigenProjector | None
) -> tuple[int | None, ...]:
    """Finds which leaves of the model are trained."""
    by_rules = type(optimiser) is ParamOptimiser
    ruled = cast(ParamOptimiser, optimiser).owners(model) if by_rules else ()
    if train is not None:
        owners = resolve(model, [train], argument="train")
    elif by_rules:
        owners = ruled
    elif projector is not None:
        names = paths(projector.origin)
        owners = resolve(model, names, argument="projector") if names else ()
    else:
        owners = [0 if is_inexact(leaf) else None for leaf in jax.tree.leaves(model)]
    if all(owner is None for owner in owners):
        known = ", ".join(map(repr, paths(model)[:5]))
        raise ValueError(
            "`model` has no parameter to train: "
            + (
                f"all of its parameters ({known}) are frozen or Python floats, which "
                "are trained where `train` or a rule names them."
                if known
                else "there is no array of floats in it."
            )
        )
    return tuple(owners)


def _fitted(
    projector: EigenProjector | None, params: PyTree, optimiser: Any
) -> tuple[EigenProjector | None, PyTree]:
    """Checks that a projector fits the parameters, and returns it with their latent."""
    if projector is None:
        return None, None
    if type(optimiser) is ParamOptimiser:
        raise ValueError(
            "`optimiser` is a ParamOptimiser, and `projector` mixes all parameters: "
            "in its latent space they have no names. Use a plain Optax transformation "
            "there, such as `optax.adam(1e-2)`."
        )
    names, own = paths(params), paths(projector.origin)
    if names != own:
        odd = sorted(set(names) ^ set(own))
        raise ValueError(
            "`projector` was made for other parameters than are trained: they differ "
            f"at {', '.join(map(repr, odd[:5])) or 'their order'}. Make it from "
            "`trainer.params`."
        )
    return projector, projector.to_latent(params)


def _opt_state(optimiser: Any, params: PyTree, latent: PyTree) -> PyTree:
    if optimiser is None:
        return None
    return optimiser.init(params if latent is None else latent)


def _cast_like(new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _kept(old: PyTree, new: PyTree) -> PyTree:
    """Keeps a state if its like is what a new one would be."""
    kind = lambda tree: [
        (jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)
    ]
    same = jax.tree.structure(old) == jax.tree.structure(new) and kind(old) == kind(new)
    return old if same else new


class _FunctionTrainer(Trainer[Model, Batch]):
    """The trainer of a loss that is a plain function."""

    function: Closure

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any):
        self.function = Closure.encode(function)
        super().__init__(*args, **options)

    def loss(self, model: Model, batch: Batch, **key: Any) -> Any:
        return self.function.decode()(model, batch, **key)


def fit(
    loss: Callable[..., Any],
    model: Model,
    optimiser: optax.GradientTransformation,
    data: Any,
    steps: int,
    *,
    train: Any = None,
    nan_policy: NanPolicy = StopFit(),  # noqa: B008
    projector: EigenProjector | None = None,
    key: PRNGKeyArray | None = None,
    **options: Any,
) -> FitResult[Trainer[Model, Any], Model]:
    """Fits a model in one call, without a subclass of [`vernal.Trainer`][].

    ```python
    def loss(model, batch):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)

    result = vn.fit(loss, model, optax.adam(1e-2), (x, y), steps=500)
    ```

    **Arguments:**

    - `loss`: a function `(model, batch) -> scalar`, or `-> (scalar, dict of metrics)`.
        With `key=` it is called with a keyword argument `key` too.
    - `model`, `optimiser`, `train`, `nan_policy`, `projector`, `key`: as for
        [`vernal.Trainer`][].
    - `data`, `steps`, `**options`: as for [`vernal.Trainer.fit`][].

    **Returns:**

    A [`vernal.FitResult`][].
    """
    if not callable(loss):
        raise TypeError(
            f"`loss` is {loss!r}, but must be a function `(model, batch) -> scalar`."
        )
    trainer = _FunctionTrainer(
        loss,
        model,
        optimiser,
        train=train,
        nan_policy=nan_policy,
        projector=projector,
        key=key,
    )
    return trainer.fit(data, steps, **options)
