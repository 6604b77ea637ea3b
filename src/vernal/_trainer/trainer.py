"""`Trainer`: a model, an optimiser and their policies, as one immutable pytree."""

from collections.abc import Callable
from typing import Any, overload

import equinox as eqx
import jax
import jax.core
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from typing_extensions import TypeVar

from .._boundary import (
    PyTree,
    entrance,
    is_debugged,
    narrowed_tree,
    refuse_traced,
    refuse_unknown,
    undebugged,
)
from .._curvature import Mode
from .._data import Minibatches, Stream, as_batch
from .._devices import ANYWHERE, Sharding, placement, same_inputs
from .._fit import FitKeywords, FitResult, OneTrainer, fit
from .._inference import (
    OF_WHITEN,
    Blocks,
    Passes,
    curvature,
    fisher,
    objective,
    standard_errors,
    table,
    whitened,
)
from .._loop import StepInfo, run_step
from .._optimiser import ParamOptimiser, as_transform, learning_rates
from .._policy import (
    NanCount,
    NanPolicy,
    StopCriterion,
    StopFit,
)
from .._projection import EigenProjector
from .._solve import SolveOptions, Solver, solve
from .._step import (
    AbstractTrainer,
    Batch,
    Model,
    ModelTemplate,
    Progress,
    changed,
    check_arguments,
    check_class,
    check_ruled,
    checked_model,
    diagnosed,
    find_trained,
    fit_projector,
    initial_opt_state,
    initial_progress,
    nan_report,
    no_optimiser,
    overrides,
    precision_of,
    raise_if_non_finite,
    replaced_fields,
    reproject,
    require_precision,
    score,
    step_key,
    with_progress,
)
from .._storage import Checkpoints, History
from .._tree import Selector, parameters, strong
from .printed import in_short, printed

SelfT = TypeVar("SelfT", bound="Trainer[Any, Any]")
Answer = bool | np.bool_ | Bool[Array, ""] | None


class Trainer(AbstractTrainer[Model, Batch]):
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
    `residuals` is half their sum of squares. Define one of them, if it will do: of
    several, each method uses its own, and `residuals` beside another is warned of.

    With `key=`, the three are called with a keyword argument `key` too, another one at
    every step. With `state=`, `loss` is called with a keyword argument `state`, and
    returns the new one last: `(scalar, state)` or `(scalar, metrics, state)`. A class
    may also define `evaluate` and the hooks `transform_grads` and `constrain`, and have
    fields of its own, by an `__init__` that calls `super().__init__(...)`. All of them
    are pure functions: what they need is in their arguments and in `self`, where
    `self.model` is `model`.

    A trainer is a pytree of arrays, and immutable: `step` and `fit` return a new one.
    It goes through `jax.jit`, `jax.vmap` and `jax.lax.scan` as it is.

    **Attributes:**

    - `optimiser`, `nan_policy`, `projector`, `key`: as they were given.
    """

    # Or `None`, as the user knows best: with that instead of `Any` a type checker would
    # ask for an `assert` before each use.
    optimiser: ParamOptimiser | Any
    nan_policy: NanPolicy
    projector: EigenProjector | Any
    key: PRNGKeyArray | None
    _template: ModelTemplate
    _progress: Progress

    @undebugged
    def __init__(
        self,
        model: Model,
        optimiser: optax.GradientTransformation | None = None,
        *,
        train: Selector | None = None,
        nan_policy: NanPolicy = StopFit(),  # noqa: B008
        projector: EigenProjector | None = None,
        key: PRNGKeyArray | None = None,
        state: PyTree = None,
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
        - `state`: what the loss carries from step to step beside the parameters: an
            `equinox.nn.State`, or any pytree of arrays. A step that is not accepted
            holds it.

        **Raises:**

        - `TypeError`: if the class defines none of `loss`, `residuals`, `nll`, or an
            argument is of the wrong kind.
        - `UnknownPathError`: if a selector matches nothing.
        - `ValueError`: if there is nothing to train, or the projector does not fit.
        """
        check_arguments(nan_policy, projector, key)
        check_class(self, key, state)
        model = checked_model(model)
        projector, nan_policy, state = narrowed_tree((projector, nan_policy, state))
        self.nan_policy = nan_policy
        self.key = key
        self.optimiser = (
            None if optimiser is None else as_transform(optimiser, "optimiser")
        )
        owners = find_trained(model, self.optimiser, train, projector)
        params = parameters(model, owners)
        self._template = ModelTemplate(model, owners)
        self.projector, latent = fit_projector(
            projector,
            params,
            self.optimiser,
            constrained=overrides(self, "constrain"),
        )
        check_ruled(self.optimiser, params)
        self._progress = initial_progress(
            params,
            latent,
            initial_opt_state(self.optimiser, params, latent),
            jax.tree.map(strong, nan_policy.init(params)),
            jax.tree.map(strong, state),
        )

    # What a subclass may override.

    def evaluate(self, model: Model, batch: Batch) -> Float[Array, ""]:
        """Scores a model on the batch of `fit(validation=...)`: lower is better.

        By default it is the loss. Override it for what the loss does in training
        alone:

        ```python
        def evaluate(self, model, batch):
            images, labels = batch
            logits = jax.vmap(eqx.nn.inference_mode(model))(images)
            return jnp.mean(jnp.argmax(logits, axis=1) != labels)
        ```

        **Arguments:**

        - `model`: the model after a step. The state that goes with it is `self.state`.
        - `batch`: the validation batch.

        **Returns:**

        A scalar.
        """
        return score(self, batch, step_key(self), model).loss

    # What a trainer does.

    @entrance
    def step(
        self: SelfT,
        batch: Batch,
        *,
        mesh: Mesh | None = None,
        sharding: Sharding | None = None,
    ) -> tuple[SelfT, StepInfo]:
        """Takes one compiled step.

        **Arguments:**

        - `batch`: what the loss is given, any pytree.
        - `mesh`, `sharding`: as for [`vernal.Trainer.fit`][]. The trainer that is
            returned lies on the mesh.

        **Returns:**

        The trainer after the step, and a [`vernal.StepInfo`][]. A trainer that has
        stopped is returned as it is.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        """
        require_precision(self)
        if self.optimiser is None:
            raise no_optimiser(self)
        place = placement(self, mesh, sharding)
        is_traced = isinstance(self.step_count, jax.core.Tracer)
        # Within a user's own program it is theirs to say which mesh there is.
        around = ANYWHERE if is_traced else place
        with same_inputs("step", around) as require_same, around.context():
            batch = as_batch(batch)
            require_same(self, batch, sharding=sharding)
            batch, trainer = place.batch(batch, "batch"), place.put(self)
            progress, info = run_step(trainer, batch, place)
        trainer = with_progress(trainer, progress)
        raises = self.nan_policy.raises
        if not (raises or is_debugged()):
            return trainer, info
        if isinstance(info.stopped, jax.core.Tracer):
            if not raises:
                return trainer, info
            progress = eqx.error_if(
                progress,
                info.stopped,
                "A value is not finite, and the policy is RaiseOnNan.",
            )
            return with_progress(self, progress), info
        if not self.stopped and trainer.stopped:
            diagnosis = diagnosed(place.put(trainer), batch)
            raise_if_non_finite(trainer, trainer, diagnosis.advised)
        return trainer, info

    @entrance
    def fit(
        self: SelfT,
        data: Batch | Minibatches | Stream,
        steps: int,
        *,
        record: Selector = (),
        every: int = 1,
        validation: tuple[Batch, int] | None = None,
        stop: StopCriterion | None = None,
        progress: bool = True,
        callback: Callable[[SelfT, History], SelfT | Answer] | None = None,
        chunk: int | None = None,
        checkpoint: Checkpoints | None = None,
        mesh: Mesh | None = None,
        sharding: Sharding | None = None,
    ) -> FitResult[SelfT, Model]:
        """Takes many steps, in one compiled program.

        **Arguments:**

        - `data`: one batch, any pytree, used whole at every step; or
            [`vernal.Minibatches`][]; or a [`vernal.Stream`][].
        - `steps`: how many steps to take from here. The number can be changed without
            compiling anew.
        - `record`: what the history keeps beside the loss: `"grad_norm"` (in the
            model's parameters), selectors (the values before the update), names of
            metrics; `"grad_norms"` and `"update_ratios"`, for each rule of the
            optimiser the norm of its gradients, and that of its updates over that of
            its parameters, as `history["grad_norm[mean]"]` and
            `history["update_ratio[mean]"]` (zero at a step that was not taken, and not
            finite where all of the parameters are zero).
        - `every`: keep every n-th step only, of the loss too.
        - `validation`: a pair `(batch, n)`: after every `n` steps `evaluate` scores the
            model on that batch, and `best` is the one with the lowest score. With
            another batch than that of the fit before, `replace(model=trainer.model)`
            lets the best begin anew.
        - `stop`: [`vernal.Converged`][], [`vernal.Patience`][] or a criterion of one's
            own, a [`vernal.StopCriterion`][]. Each fit begins to count anew.
        - `progress`: whether to show a progress bar, where there is a terminal or a
            notebook to show it in.
        - `callback`: a function `(trainer, history)`, called on the host after every
            chunk of steps. It may return `True` to end the fit, or a trainer of the
            same structure to go on with.
        - `chunk`: the number of steps between two calls. By default as many as take
            about half a second.
        - `checkpoint`: a [`vernal.Checkpoints`][], where the fit writes its state, and
            from where it goes on if it was killed: it then does what is left of its
            `steps`.
        - `mesh`: devices that share the work, such as
            `jax.make_mesh((8,), ("data",))`. Each batch is split along the first axis
            of the mesh, of all else each device has a copy; the result is that of one
            device, to rounding. An array of the batch whose first axis is not one of
            examples stays as it is where it lies on the mesh already. In several
            processes each gives all of the data, or of a [`vernal.Stream`][] its share
            of each batch.
        - `sharding`: with a mesh, a dictionary from selectors to the
            `jax.sharding.PartitionSpec` by which arrays of the model too large for one
            device are split, with their moments. The trainer then stays on the mesh.

        **Returns:**

        A [`vernal.FitResult`][]. Ctrl-C ends a fit between two chunks, pressed again at
        once, with the result up to there. A fit that ends at a value that is not finite
        warns of where it comes from. Any other error that a fit meets on its way (in
        the callback, in the data) has the result up to there as its attribute `result`.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        - `MismatchError`: if the checkpoint is of another model or optimiser.
        - `StreamExhaustedError`: if a stream ends before the fit.
        - `UnknownPathError`: if `record` names what there is not.
        """
        require_precision(self)
        subject = OneTrainer(placement(self, mesh, sharding))
        keywords: FitKeywords = {
            "record": record,
            "every": every,
            "validation": validation,
            "stop": stop,
            "progress": progress,
            "callback": callback,
            "chunk": chunk,
            "checkpoint": checkpoint,
        }
        return fit(subject, self, data, steps, keywords)

    @entrance
    def solve(
        self: SelfT,
        solver: Solver,
        batch: Batch,
        *,
        max_steps: int = 256,
        rewhiten: bool = True,
        jac: Mode | None = None,
        mesh: Mesh | None = None,
    ) -> FitResult[SelfT, Model]:
        """Solves for the parameters with a solver of Optimistix.

        ```python
        trainer.whiten(batch).solve(optx.BFGS(rtol=1e-8, atol=1e-8), batch).model
        trainer.solve(optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8), batch).model
        ```

        If there is a projector the solver works in its latent space, where its
        tolerances and its first steps are in error bars. The whole is one compiled
        program, for any `max_steps` up to 256, and then up to each power of two.

        A minimiser minimises what `fit` minimises; a least-squares solver, half the
        sum of squared `residuals`. With `key=` the random numbers are those of one
        step, the same throughout.

        **Arguments:**

        - `solver`: an Optimistix minimiser; or, where `residuals` is defined, a
            least-squares solver.
        - `batch`: what the loss is given, any pytree.
        - `max_steps`: the number of steps after which to give up.
        - `rewhiten`: whether to go on in a space that is whitened anew where the solver
            stops short of a minimum: as [`vernal.Trainer.whiten`][] does by default,
            in the same blocks, with the mode `jac`. It replaces any space that has all
            directions, from `from_fisher` and `from_covariance` too. `max_steps`
            counts all steps.
        - `jac`: `"fwd"` or `"bwd"`, the mode of differentiation; by default the one
            that works.
        - `mesh`: devices that share the work, as for [`vernal.Trainer.fit`][].

        **Returns:**

        A [`vernal.FitResult`][], whose `stop_reason` tells how the solver ended, and
        whose `edm` by how much the loss could still fall. What a solver's own
        tolerances say is checked: it is `CONVERGED` where `edm` is below a thousandth
        of the scatter (of the reduced chi-squared for `residuals`, of one for `nll`, of
        the fall so far for `loss`), or of what rounding leaves; else `STALLED`. The
        history has the loss that the solver reported at each step, before the step.
        The moments of an optimiser start anew. Where it ends at a value that is not
        finite, a warning says where that comes from: the data, a parameter, a method.

        **Raises:**

        - `TypeError`: if `solver` is none, or is a least-squares solver of a class
            that does not define `residuals`; if a parameter is complex; or if there
            is no derivative, in the mode that was asked for or in any.
        - `ValueError`: if the class defines `transform_grads` or `constrain`.
        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].

        An error that is raised while the solver runs, such as by `eqx.error_if`, has
        the result up to there as its attribute `result`.
        """
        require_precision(self)
        options = SolveOptions(max_steps, rewhiten, jac)
        return solve(self, solver, batch, options, mesh)

    # The space of the parameters.

    @overload
    def fisher(
        self,
        batch: Batch,
        *,
        blocks: None = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> Float[Array, "D D"]: ...
    @overload
    def fisher(
        self,
        batch: Batch,
        *,
        blocks: Blocks,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> dict[Any, Float[Array, "_ _"]]: ...
    @entrance
    def fisher(
        self,
        batch: Batch,
        *,
        blocks: Any = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> Any:
        r"""The Fisher matrix of the trained parameters at the current point.

        It is $J^\top J$ with the Jacobian $J$ of `residuals`, where that is defined;
        else the Hessian of `nll`. Those of independent exposures add up. It compiles
        once for each class and each set of shapes.

        **Arguments:**

        - `batch`: what the methods are given, any pytree.
        - `blocks`: selectors (see [`vernal.split`][]) for a matrix each, such as
            `("position", "flux")`. What is between the blocks is not computed.
        - `batch_size`: the number of columns to compute at a time, to bound memory.
            Where forward mode alone is possible, or asked for, the Jacobian is kept.
        - `jac`: how to differentiate: `"fwd"` in forward mode, `"bwd"` in reverse mode.
            By default in the mode that is possible; where it is not the better one, a
            warning says so once. A `while_loop` has forward mode alone, a `custom_vjp`
            (such as diffrax's default adjoint) reverse mode alone.

        **Returns:**

        A matrix of shape `(D, D)`, in the order of
        `jax.flatten_util.ravel_pytree(trainer.params)`; with `blocks`, a dictionary of
        matrices by selector, for [`vernal.EigenProjector.from_blocks`][].

        **Raises:**

        - `TypeError`: if the class defines only `loss`: error bars from a mean would be
            wrong; if a parameter is complex; or if there is no mode.
        - `UnknownPathError`, `ValueError`: if a block matches nothing, or two overlap.
        """
        require_precision(self)
        return fisher(self, batch, blocks, Passes(batch_size, jac))

    @overload
    def curvature(
        self,
        batch: Batch,
        *,
        blocks: None = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> Float[Array, "D D"]: ...
    @overload
    def curvature(
        self,
        batch: Batch,
        *,
        blocks: Blocks,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> dict[Any, Float[Array, "_ _"]]: ...
    @entrance
    def curvature(
        self,
        batch: Batch,
        *,
        blocks: Any = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> Any:
        """The Hessian of what is minimised, at the current point: for whitening only.

        A loss that is a mean, or has a penalty, says nothing of error bars.

        **Arguments:** and **Returns:** as [`vernal.Trainer.fisher`][].
        """
        require_precision(self)
        return curvature(self, batch, blocks, Passes(batch_size, jac))

    @entrance
    def reproject(
        self: SelfT,
        projector: EigenProjector | None,
        optimiser: optax.GradientTransformation | None = None,
    ) -> SelfT:
        """Goes on in the latent space of another projector, from the current point.

        The moments of the optimiser start anew. All else is kept; the best too, since
        it is kept in the model's own parameters.

        **Arguments:**

        - `projector`: the projector; `None` to go on in the parameters themselves.
        - `optimiser`: an optimiser for that space. By default the present one, but for
            a [`vernal.ParamOptimiser`][] in a space where parameters have no names:
            the result then has none, and can `solve`.
        """
        require_precision(self)
        return reproject(self, projector, optimiser)

    @entrance
    def whiten(
        self: SelfT,
        batch: Batch,
        *,
        optimiser: optax.GradientTransformation | None = None,
        blocks: Blocks | None = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
        **options: Any,
    ) -> SelfT:
        """Goes on in a latent space that is whitened at the current point.

        By the singular values of the Jacobian of `residuals`, where that is defined
        (see [`vernal.EigenProjector.from_jacobian`][]); else by the Hessian of `nll` or
        `loss`. No shape depends on values, so that whitening at another point compiles
        nothing anew.

        ```python
        trainer = trainer.whiten(batch, optimiser=optax.adam(0.1))
        ```

        **Arguments:**

        - `batch`, `blocks`, `batch_size`, `jac`: as for [`vernal.Trainer.fisher`][].
        - `optimiser`: as for [`vernal.Trainer.reproject`][].
        - `**options`: as for [`vernal.EigenProjector.from_fisher`][]; with `blocks`, as
            for [`vernal.EigenProjector.from_blocks`][]. But `on_null` is `"prior"`:
            what is not seen from here, such as the width of a peak without height, may
            be seen later, and keeps a scale of its own. By default `rtol` is as in
            [`vernal.EigenProjector.from_jacobian`][]; for a Hessian it is at least 64
            times the machine epsilon, which is what summing over data may leave of a
            zero.

        **Raises:**

        - `ValueError`: if the derivatives are not finite, or a Hessian has a negative
            eigenvalue; under `jax.jit`, an error when the program runs.
        """
        refuse_unknown(options, OF_WHITEN, "whiten")
        require_precision(self)
        projector = whitened(self, batch, blocks, Passes(batch_size, jac), options)
        return self.reproject(projector, optimiser)

    @entrance
    def standard_errors(self, batch: Batch, *, jac: Mode | None = None) -> Model:
        """The standard errors of the parameters, from the data at the current point.

        They are those of the Fisher matrix; where `residuals` is defined, by way of the
        singular values of its Jacobian, which have twice the digits. Infinite for a
        parameter that the data do not constrain.

        **Arguments:**

        - `batch`: all of the data.
        - `jac`: as for [`vernal.Trainer.fisher`][].

        **Returns:**

        A tree like the parameters.

        **Raises:**

        As [`vernal.Trainer.fisher`][].
        """
        require_precision(self)
        return standard_errors(self, batch, jac)

    @entrance
    def table(self, batch: Batch | None = None, *, jac: Mode | None = None) -> str:
        """Tabulates the parameters, element by element.

        **Arguments:**

        - `batch`: all of the data, for the standard errors; without it there are none.
        - `jac`: as for [`vernal.Trainer.fisher`][].

        **Returns:**

        A table of each parameter's path, its value, and its standard error or that it
        is frozen or unconstrained. An error smaller than the distance of the value to
        the next one in its dtype is marked. What looks like a parameter and is not
        fitted is listed: Python floats and ints, integer arrays of few elements.
        """
        if batch is not None:
            require_precision(self)
        return table(self, batch, jac)

    @entrance
    def objective(
        self, batch: Batch
    ) -> tuple[Callable[[PyTree], Float[Array, ""]], PyTree]:
        """The negative log-likelihood as a function, for a sampler.

        ```python
        potential, start = trainer.whiten(batch).objective(batch)
        kernel = numpyro.infer.NUTS(potential_fn=potential)
        ```

        **Arguments:**

        - `batch`: all of the data.

        **Returns:**

        The pair `(fn, start)`: a pure function of the latent vector, or, if there is no
        projector, of the flat vector in the order of
        `jax.flatten_util.ravel_pytree(trainer.params)`; and that vector now.

        **Raises:**

        As [`vernal.Trainer.fisher`][].
        """
        require_precision(self)
        return objective(self, batch)

    # Diagnosis and change.

    def nan_report(self) -> dict[str, NanCount]:
        """Tells what was not finite, how often, and when first.

        **Returns:**

        A dictionary with one [`vernal.NanCount`][] for `"loss"`, for the gradient of
        each trained parameter by its path, and for `"update"`: steps whose new
        parameters or optimiser state would not have been finite, and which therefore
        were not taken. (Where a parameter is called so itself, its path is the key,
        and the other's is `"<loss>"` or `"<update>"`.)
        """
        refuse_traced("nan_report", self._progress.nan_counts)
        return nan_report(self)

    def learning_rates(self) -> dict[str, float | None]:
        """Tells the learning rate of each parameter in the next update.

        The product of the factors that the optimiser's transformations have: the rate
        itself, its schedule at the count in the optimiser's state, the factor of
        `with_scale`; zero while a [`vernal.window`][] is closed. Positive is downhill.
        What a transformation makes of the gradient beside that, such as momentum, the
        second moments of Adam and clipping, is not counted; nor is a factor that stands
        before one which divides it out again, as Adam does.

        Outside of `jax.jit` only, as schedules are evaluated.

        **Returns:**

        A dictionary with a float for each trained parameter by its path. `None` where
        no rate can be told: of a line search, of `optax.scale_by_adam()` alone, of a
        transformation of your own. In the latent space of a projector a rate is that
        of the coordinates to which the parameter belongs.

        **Raises:**

        - `ValueError`: if there is no optimiser.
        """
        if self.optimiser is None:
            raise no_optimiser(self)
        refuse_traced("learning_rates", self)
        with precision_of(self):
            return learning_rates(
                self.optimiser,
                self.opt_state,
                self.params,
                self.projector,
                self.latent,
            )

    @entrance
    def replace(
        self: SelfT,
        *,
        model: Model | None = None,
        optimiser: optax.GradientTransformation | None = None,
        nan_policy: NanPolicy | None = None,
        state: PyTree = None,
    ) -> SelfT:
        """Changes some of what the trainer holds, and keeps what still fits.

        The state of an optimiser or a policy is kept if the new one's has the same
        structure, shapes and dtypes, and made anew otherwise; what is kept goes on, the
        counts of schedules among it. Hyperparameters in the state, those of
        `optax.inject_hyperparams`, become the new optimiser's wherever these differ
        from the ones that the old optimiser began with. The step count and the
        counts of `nan_report` are kept, and the best too, unless the model is another.
        A trainer that has stopped goes on. Of a stacked trainer each member is changed.

        **Arguments:**

        - `model`: a model of the same structure, with other values.
        - `optimiser`: another optimiser, or the same one with another rate.
        - `nan_policy`: another policy.
        - `state`: a state of the same structure, with other values.
        """
        require_precision(self)
        return changed(
            self, **replaced_fields(self, model, optimiser, nan_policy, state)
        )

    def __repr__(self) -> str:
        """One line: the class, the model, how far it is. `print` shows more."""
        return in_short(self)

    def __str__(self) -> str:
        """A table of the parameters, and what happens to each.

        What looks like a parameter and is not fitted is listed: Python floats, which
        are frozen unless named, Python ints, and integer arrays of few elements.
        """
        return printed(self)
