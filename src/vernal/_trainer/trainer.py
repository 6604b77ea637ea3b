"""`Trainer`: a model, an optimiser and their policies, as one immutable pytree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.core
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray
from typing_extensions import TypeVar

from .._boundary import (
    PyTree,
    entrance,
    narrowed_tree,
    off_mesh,
    refuse_taken,
    refuse_traced,
    refuse_unknown,
    unmeshed_entrance,
)
from .._constraints import as_ties
from .._curvature import Mode
from .._data import Minibatches, Stream, as_batch
from .._devices import ANYWHERE, Sharding, placement, same_inputs
from .._fit import FitKeywords, FitResult, OneTrainer, fit
from .._inference import (
    OF_WHITEN,
    Blocks,
    ErrorKind,
    ErrorOptions,
    FisherKind,
    Passes,
    curvature,
    draw,
    fisher,
    objective,
    params_at,
    propagate,
    report,
    standard_errors,
    table,
    whitened,
)
from .._loop import StepInfo, run_step
from .._optimiser import ParamOptimiser, as_transform, learning_rates
from .._policy import NanCount, NanPolicy, StopCriterion, StopFit
from .._profile import Options as ProfileOptions, Profile, intervals, profile
from .._projection import EigenProjector
from .._report import Propagated, Report
from .._solve import SolveOptions, Solver, solve
from .._step import (
    AbstractTrainer,
    Batch,
    Model,
    ModelTemplate,
    changed,
    check_arguments,
    check_class,
    check_own_fields,
    check_ruled,
    checked_model,
    constraints,
    diagnosed,
    find_trained,
    fit_projector,
    in_free_coordinates,
    initial_progress,
    is_constrained,
    is_made,
    nan_report,
    note_made,
    precision_of,
    prepared_config,
    raised_if_bad,
    refuse_own_projector,
    refuse_stacked,
    refuse_strays,
    replaced_fields,
    reproject,
    require_one,
    require_optimiser,
    require_parts,
    require_precision,
    score,
    step_key,
    warn_of_constants,
    with_progress,
)
from .._storage import Checkpoints, History
from .._tree import Selector, parameters, strong
from .printed import in_short, printed

SelfT = TypeVar("SelfT", bound="Trainer[Any, Any]")
Answer = bool | np.bool_ | Bool[Array, ""] | None


class Trainer(AbstractTrainer[Model, Batch]):
    """Fits a model. Subclass it, and define what to minimise.

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

    Without a `loss`, the negative log-likelihood is minimised: `nll`, or half the sum
    of squared `residuals` (of complex ones, of their absolute values). Define only one
    of them if you can: of several, each method uses its own, and `residuals` beside
    another gives a warning.

    With `key=`, all three also receive a keyword argument `key`, a new one at every
    step. With `state=`, `loss` also receives a keyword argument `state`, and returns
    the new state last: `(scalar, state)` or `(scalar, metrics, state)`. A subclass may
    also define `evaluate` and the hooks `transform_grads` and `constrain`, and add its
    own fields in an `__init__` that calls `super().__init__(...)`. All of these are
    pure functions of their arguments and of `self`, where `self.model` is `model`.

    A trainer is an immutable pytree of arrays: `step` and `fit` return a new one. It
    passes through `jax.jit`, `jax.vmap` and `jax.lax.scan`.

    **Attributes:**

    - `optimiser`, `nan_policy`, `projector`, `key`: the arguments of those names.
    """

    @entrance
    def __init__(
        self,
        model: Model,
        optimiser: optax.GradientTransformation | None = None,
        *,
        train: Selector | None = None,
        nan_policy: NanPolicy = StopFit(),  # noqa: B008
        projector: EigenProjector | None = None,
        bounds: Mapping[Any, Any] | None = None,
        ties: Mapping[Any, str | Callable[[Model], Any]] | None = None,
        priors: Mapping[Any, Any] | None = None,
        key: PRNGKeyArray | None = None,
        state: PyTree = None,
    ):
        """**Arguments:**

        - `model`: any `equinox.Module`, any pytree.
        - `optimiser`: a [`vernal.ParamOptimiser`][] or any Optax transformation.
        - `train`: a selector (see [`vernal.split`][]) of the parameters to fit; all
            others are frozen. By default the parameters that the optimiser has rules
            for, else those of the projector, else every array of floats.
        - `nan_policy`: what to do with non-finite values.
        - `projector`: fits in its latent space instead of in the parameters.
        - `bounds`: a dictionary from selectors to pairs `(low, high)`, numbers or
            arrays that broadcast, `None` for no bound: `{"**.flux": (0, None)}`. The
            parameters never leave them. `solve` and a fit that has converged end at the
            lowest loss within the bounds, on a bound where it lies there; a parameter
            that the loss pushes against its bound is held there for the errors of the
            others. In the place of a pair may be a [`vernal.Bijection`][], or one of
            NumPyro, flowjax or distreqx: the fit then moves its free coordinates.
        - `ties`: a dictionary from selectors to what they follow: the path of another
            parameter, or a function of the model. `{"b.width": "a.width", "c.width":
            lambda model: 2 * model.a.width}`. A tied parameter is not free.
        - `priors`: a dictionary from selectors to distributions, anything with
            `log_prob`: `{"slope": vn.Normal(0, 1)}`. They are part of the likelihood
            in all that is computed: what is minimised, its curvature, the errors. They
            need `residuals` or `nll`, and all of the data at each step. A frozen
            parameter's priors, and its bounds, count for nothing: so trainers that fit
            other parameters can share them.
        - `key`: a PRNG key, for a loss that draws random numbers.
        - `state`: what the loss carries from step to step beside the parameters: an
            `equinox.nn.State`, or any pytree of arrays. A step that is not accepted
            leaves it unchanged.

        **Raises:**

        - `TypeError`: if the class has no method `loss`, `residuals` or `nll`, or has
            a field of the name of a property, field or method of every trainer; or if
            an argument is of the wrong kind.
        - `UnknownPathError`: if a selector matches nothing.
        - `ValueError`: if there is nothing to train; if the projector does not fit; if
            bounds are the wrong way round, or the start is outside of them, or is not
            what a bijection can return; if ties go round in a circle; or if a tied
            parameter has a bound or a rule of its own, or a Python float that is not
            fitted has a bound.
        """
        check_arguments(nan_policy, projector, key)
        refuse_taken(type(self), Trainer)
        check_class(self, key, state, priors)
        model = checked_model(model)
        projector, nan_policy, state = narrowed_tree((projector, nan_policy, state))
        self.nan_policy = nan_policy
        self.key = key
        # Declared as in the base: else type checkers find types of their own.
        self.optimiser: ParamOptimiser | Any = (
            None if optimiser is None else as_transform(optimiser, "optimiser")
        )
        tied = as_ties(ties, model)
        owners = find_trained(model, self.optimiser, train, projector, tied)
        if train is None and projector is None:
            warn_of_constants(type(self), model, self.optimiser, tied)
        params = parameters(model, owners)
        self._template = ModelTemplate(model, owners, tied)
        self._bounds, self._bijections, self._priors = constraints(
            self._template, params, bounds, priors
        )
        if self._bounds is not None:
            params = self._bounds.required(params)
        if self._priors is not None:
            params = self._priors.required(self._template.join(params), params)
        free = params
        refuse_own_projector(projector, self._bijections)
        if self._bijections is not None:
            free = self._bijections.required(params)
        self.projector: EigenProjector | Any
        self.projector, latent = fit_projector(
            projector, params, self.optimiser, constrained=is_constrained(self)
        )
        check_ruled(self.optimiser, params, free, self._bijections)
        latent = latent if free is params else free
        state = jax.tree.map(strong, state)
        self._progress = initial_progress(self, params, latent, state)
        note_made(self._progress)

    def __check_init__(self) -> None:
        check_own_fields(self)

    # What a subclass may override.

    def evaluate(self, model: Model, batch: Batch) -> Float[Array, ""]:
        """Scores a model on the batch of `fit(validation=...)`: lower is better.

        By default the score is the loss. Override it if the loss does something that
        is for training only, such as dropout: a warning names a layer that does.

        ```python
        def evaluate(self, model, batch):
            images, labels = batch
            logits = jax.vmap(eqx.nn.inference_mode(model))(images)
            return jnp.mean(jnp.argmax(logits, axis=1) != labels)
        ```

        **Arguments:**

        - `model`: the model after a step; `self.state` is its state.
        - `batch`: the validation batch.

        **Returns:**

        A scalar.
        """
        refuse_stacked(self, "evaluate")
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

        To donate a new trainer to a program of your own, copy it first, by
        `jax.tree.map(jnp.copy, trainer)`: its best are its parameters themselves.

        **Arguments:**

        - `batch`: the batch that the loss is called with, any pytree.
        - `mesh`, `sharding`: as for [`vernal.Trainer.fit`][]. The returned trainer
            stays on the mesh.

        **Returns:**

        The trainer after the step, and a [`vernal.StepInfo`][]. A trainer that has
        stopped is returned unchanged.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        """
        require_one(self, "step")
        self = off_mesh(self)
        require_optimiser(self)
        place = placement(self, mesh, sharding)
        is_traced = isinstance(self.step_count, jax.core.Tracer)
        # Within a user's own program the user sets the mesh.
        around = ANYWHERE if is_traced else place
        with same_inputs("step", around) as require_same, around.context():
            batch = as_batch(batch)
            require_same(self, batch, sharding=sharding)
            batch, trainer = place.batch(batch, "batch"), place.put(self)
            is_same = place.mesh is None and not is_traced
            given = prepared_config(trainer) if is_same else trainer
            progress, info = run_step(given, batch, place)
        trainer = with_progress(trainer, progress)
        explanation = lambda: diagnosed(place.put(trainer), batch).advised
        return raised_if_bad(self, trainer, explanation), info

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
        best: bool = True,
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
        - `steps`: the number of steps to take from here. Another number compiles
            nothing again.
        - `record`: what the history keeps beside the loss: `"grad_norm"` (in the
            model's parameters), selectors (the values before the update), names of
            metrics. `"grad_norms"` and `"update_ratios"` record for each rule of the
            optimiser the norm of its gradients, and the norm of its updates divided by
            that of its parameters, as `history["grad_norm[mean]"]` and
            `history["update_ratio[mean]"]` (zero at a step that was not taken,
            non-finite where all of the parameters are zero).
        - `every`: records only every n-th step. This holds for the loss too.
        - `validation`: a pair `(batch, n)`: after every `n` steps `evaluate` scores the
            model on that batch, and `best` is the model with the lowest score.
            Another batch begins with another best.
        - `stop`: [`vernal.Converged`][], [`vernal.Patience`][] or your own
            [`vernal.StopCriterion`][]. It starts afresh in each fit.
        - `best`: whether to keep the best model, which takes memory for one more copy
            of the parameters, or for a few during the fit. After `best=False`
            `result.best` is an error; `trainer.best` is the model after the last step,
            and `best_loss` infinite.
        - `progress`: whether to show a progress bar, in a terminal or a notebook.
        - `callback`: a function `(trainer, history)`, called on the host after every
            chunk of steps. It may return `True` to end the fit, or a trainer of the
            same structure to go on with. A fit that the NaN policy has ended goes on
            only if that trainer has other parameters. To go on from the same ones, fit
            again, from `result.trainer.replace(...)`.
        - `chunk`: the number of steps between two calls. By default as many as take
            about half a second; up to two where a chunk begins slowly, with copies of
            a large model. The first chunk has one step, or, of a fit like one before,
            as many as take a quarter of a second.
        - `checkpoint`: a [`vernal.Checkpoints`][]: the fit writes its state there. The
            same program, started again after it was killed, takes the rest of its
            `steps` from there.
        - `mesh`: devices that share the work, such as
            `jax.make_mesh((8,), ("data",))`. Each batch is split along the first axis
            of the mesh; of everything else each device has a copy. The result is that
            of one device, up to rounding. If the first axis of an array in the batch
            does not count examples, put the array onto the mesh first: it then stays
            as it is. In several processes, each passes all of the data, or its share
            of each batch of a [`vernal.Stream`][].
        - `sharding`: with a mesh, for arrays of the model that are too large for one
            device: a dictionary from selectors to the `jax.sharding.PartitionSpec` that
            splits them and their moments. The trainer then stays on the mesh.

        **Returns:**

        A [`vernal.FitResult`][]. Ctrl-C ends a fit after the current chunk, a second
        one at once, with the result up to there. If a fit ends at a non-finite value,
        a warning says where that comes from. Any other error during the fit (in the
        callback, in the data) has the result up to there as its attribute `result`.

        **Raises:**

        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].
        - `MismatchError`: if the checkpoint is of another model or optimiser.
        - `StreamExhaustedError`: if a stream ends before the fit.
        - `UnknownPathError`: if `record` names something that does not exist.
        - `ValueError`: if there is a `validation` with `best=False`.
        """
        require_one(self, "fit")
        self = off_mesh(self)
        subject = OneTrainer(placement(self, mesh, sharding))
        keywords: FitKeywords = {
            "record": record,
            "every": every,
            "validation": validation,
            "stop": stop,
            "best": best,
            "progress": progress,
            "callback": callback,
            "chunk": chunk,
            "checkpoint": checkpoint,
        }
        return fit(subject, self, data, steps, keywords)

    @unmeshed_entrance
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

        With a projector the solver works in its latent space, where tolerances and
        first steps are in error bars. One compiled program serves any `max_steps` up to
        256, and another one each range up to the next power of two.

        A minimiser minimises what `fit` minimises; a least-squares solver, half the
        sum of squared `residuals`. With `key=`, all evaluations use the random numbers
        of one step.

        **Arguments:**

        - `solver`: an Optimistix minimiser; or, where `residuals` is defined, a
            least-squares solver.
        - `batch`: the batch that the loss is called with, any pytree.
        - `max_steps`: the number of steps after which to give up.
        - `rewhiten`: whether to whiten again, and go on, where the solver stops short
            of a minimum; and to begin again from the start, whitening often, where it
            has not converged after 128 steps (or 4 for each parameter): as
            [`vernal.Trainer.whiten`][] does by default, in the same blocks, with the
            mode `jac`. This replaces every latent space without dropped directions,
            also that of `from_fisher` or `from_covariance`.
            `max_steps` counts all steps but those that a second start within bounds
            takes in vain.
        - `jac`: `"fwd"` or `"bwd"`, the mode of differentiation; by default the one
            that works.
        - `mesh`: devices that share the work, as for [`vernal.Trainer.fit`][].

        **Returns:**

        A [`vernal.FitResult`][]. Its `stop_reason` says how the solver ended, its `edm`
        by how much the loss could still fall. A solver's own verdict is checked: the
        reason is `CONVERGED` only where `edm` is below a thousandth of the scatter (the
        reduced chi-squared for `residuals`, one for `nll`, the fall so far for `loss`),
        or below what rounding of the loss hides, up to a fifth of an error bar along
        each direction; else `STALLED`, or `NO_MINIMUM` where the loss only approaches a
        limit as a parameter runs off. The history has the loss that the solver
        reported at each step, before the step. The moments of an optimiser start
        afresh. If the solver ends at a non-finite value, a warning says where that
        comes from: the data, a parameter, a method.

        **Raises:**

        - `TypeError`: if `solver` is not a solver, or is a least-squares solver and the
            class does not define `residuals`; if a parameter is complex; or if there
            is no derivative, in the mode that was asked for or in any.
        - `ValueError`: if the class defines `transform_grads` or `constrain`.
        - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][].

        An error raised while the solver runs, such as by `eqx.error_if`, has the result
        up to there as its attribute `result`.
        """
        require_one(self, "solve")
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
        kind: FisherKind | None = None,
    ) -> Float[Array, "D D"]: ...
    @overload
    def fisher(
        self,
        batch: Batch,
        *,
        blocks: Blocks,
        batch_size: int | None = None,
        jac: Mode | None = None,
        kind: FisherKind | None = None,
    ) -> dict[Any, Float[Array, "_ _"]]: ...
    @unmeshed_entrance
    def fisher(
        self,
        batch: Batch,
        *,
        blocks: Any = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
        kind: FisherKind | None = None,
    ) -> Any:
        r"""Returns the Fisher matrix of the trained parameters at the current point.

        It is $J^\top J$ with the Jacobian $J$ of `residuals`, where that is defined;
        else the Hessian of `nll`. Where `residuals` returns a likelihood, it is the
        expected Fisher matrix, such as $J^\top \mathrm{diag}(1 / \mu) J$ of
        [`vernal.likelihoods.Poisson`][], which no start makes negative. Priors are part
        of it; parameters at their bounds are as free as any. The matrices of
        independent exposures add up. It compiles once for each class and each set of
        shapes.

        **Arguments:**

        - `batch`: the batch that the methods are called with, any pytree.
        - `blocks`: selectors (see [`vernal.split`][]), with a matrix for each, such as
            `("position", "flux")`. Entries between the blocks are not computed.
        - `batch_size`: the number of columns to compute at a time, to bound memory.
            In forward mode the whole Jacobian is in memory nevertheless.
        - `jac`: how to differentiate: `"fwd"` in forward mode, `"bwd"` in reverse mode.
            By default in the mode that works; if it is not the better one, a warning
            says so once. A `while_loop` has forward mode only, a `custom_vjp` (such as
            diffrax's default adjoint) reverse mode only.
        - `kind`: `"expected"` as above, from first derivatives; `"observed"` for the
            Hessian of the negative log-likelihood, with second ones. By default the
            former where `residuals` is defined, the latter for an `nll`.

        **Returns:**

        A matrix of shape `(D, D)`, in the order of
        `jax.flatten_util.ravel_pytree(trainer.params)`; with `blocks`, a dictionary of
        matrices by selector, for [`vernal.EigenProjector.from_blocks`][].

        **Raises:**

        - `TypeError`: if the class defines only `loss`, as error bars from a mean would
            be wrong; if a parameter is complex; if neither mode works; or if `kind`
            is `"expected"` and the class defines `nll` alone.
        - `UnknownPathError`, `ValueError`: if a block matches nothing, or two overlap.
        """
        require_one(self, "fisher")
        return fisher(self, batch, blocks, Passes(batch_size, jac), kind)

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
    @unmeshed_entrance
    def curvature(
        self,
        batch: Batch,
        *,
        blocks: Any = None,
        batch_size: int | None = None,
        jac: Mode | None = None,
    ) -> Any:
        """Returns the Hessian of the loss at the current point, for whitening only.

        A loss that is a mean, or has a penalty, does not give error bars.

        **Arguments:** and **Returns:** as [`vernal.Trainer.fisher`][].
        """
        require_one(self, "curvature")
        return curvature(self, batch, blocks, Passes(batch_size, jac))

    @unmeshed_entrance
    def reproject(
        self: SelfT,
        projector: EigenProjector | None,
        optimiser: optax.GradientTransformation | None = None,
    ) -> SelfT:
        """Continues in the latent space of another projector, from the current point.

        The moments of the optimiser start afresh. Everything else is kept, also the
        best, which is stored in the model's own parameters.

        **Arguments:**

        - `projector`: the projector; `None` to continue in the parameters themselves.
            With a bijection in `bounds` it must be `None`: see `whiten`. Its origin
            moves to the current point if it is so far that rounding would be felt.
        - `optimiser`: an optimiser for that space. By default the present one; but a
            [`vernal.ParamOptimiser`][] cannot go into a space where parameters have no
            names: the result then has no optimiser, and can `solve`.
        """
        require_one(self, "reproject")
        refuse_own_projector(projector, self._bijections)
        return reproject(self, projector, optimiser)

    @unmeshed_entrance
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
        """Continues in a latent space that is whitened at the current point.

        It uses the singular values of the Jacobian of `residuals`, where that is
        defined (see [`vernal.EigenProjector.from_jacobian`][]); else the Hessian of
        `nll` or `loss`. Whitening at another point compiles nothing again.

        ```python
        trainer = trainer.whiten(batch, optimiser=optax.adam(0.1))
        ```

        **Arguments:**

        - `batch`, `blocks`, `batch_size`, `jac`: as for [`vernal.Trainer.fisher`][]. A
            block without elements is left out.
        - `optimiser`: as for [`vernal.Trainer.reproject`][].
        - `**options`: as for [`vernal.EigenProjector.from_fisher`][]; with `blocks`, as
            for [`vernal.EigenProjector.from_blocks`][]. By default `on_null` is
            `"prior"`: a direction that the data do not constrain here, such as the
            width of a peak without height, may be constrained later, and keeps its own
            scale. `rtol` is as in [`vernal.EigenProjector.from_jacobian`][]; for a
            Hessian it is at least 64 times the machine epsilon, since sums over data
            leave zeros of about that size.

        **Raises:**

        - `ValueError`: if the derivatives are not finite, or a Hessian has a negative
            eigenvalue; under `jax.jit`, an error when the program runs. If no parameter
            has an element.
        """
        refuse_unknown(options, OF_WHITEN, "whiten")
        require_one(self, "whiten")
        projector = whitened(self, batch, blocks, Passes(batch_size, jac), options)
        return reproject(self, projector, optimiser)

    @unmeshed_entrance
    def standard_errors(
        self,
        batch: Batch,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Model:
        r"""Returns the standard errors of the parameters at the current point.

        They are those of the Fisher matrix; where `residuals` is defined, they are
        computed from the singular values of its Jacobian, with twice the digits. A
        parameter that the data do not constrain has an infinite error.

        It warns if the model is farther from the minimum than the truth of simulated
        data would be, or where there is no minimum. Within a compiled program nothing
        is said.

        **Arguments:**

        - `batch`: all of the data.
        - `scale_errors`: as for [`vernal.Trainer.report`][].
        - `jac`: as for [`vernal.Trainer.fisher`][].
        - `kind`: the matrix that they come from:
            - `"expected"`, `"observed"`: the inverse of the Fisher matrix, as for
                [`vernal.Trainer.fisher`][]. They are right if the data have the
                likelihood that is fitted, and their error bars are right. Where
                the gradient that a fit leaves may account for some of the curvature,
                the Hessian is taken closer to the minimum, without the curvature
                that comes of rounding there.
            - `"sandwich"`: $H^{-1} S^\top S H^{-1}$, with the Hessian $H$ and the
                gradient of each datum's negative log-likelihood as a row of $S$. It
                takes the scatter from the data themselves, which need not have the
                likelihood that is fitted, but must be independent, and many: a warning
                names parameters whose error is from fewer than five of them. A prior
                counts as a measurement with its own error. It needs `residuals`.

            By default it is the sandwich for [`vernal.likelihoods.Robust`][], and else
            as for [`vernal.Trainer.fisher`][].

        **Returns:**

        A tree like the parameters.

        **Raises:** as [`vernal.Trainer.fisher`][], and as [`vernal.Trainer.report`][]
        if `scale_errors` finds no scatter; a `ValueError` if the sandwich finds none:
        there are no more data than free parameters, or the model predicts them exactly;
        and a `TypeError` if it is differentiated.

        For the sandwich see Huber, *The behavior of maximum likelihood estimates under
        nonstandard conditions*, Proceedings of the Fifth Berkeley Symposium (1967), and
        White, *Maximum likelihood estimation of misspecified models*, Econometrica 50
        (1982).
        """
        require_one(self, "standard_errors")
        return standard_errors(self, batch, ErrorOptions(scale_errors, jac, kind))

    @unmeshed_entrance
    def table(
        self,
        batch: Batch | None = None,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> str:
        """Tabulates the parameters, element by element.

        **Arguments:**

        - `batch`: all of the data, for the standard errors; by default there are none.
        - `scale_errors`, `jac`, `kind`: as for [`vernal.Trainer.report`][].

        **Returns:**

        A table with the path of each parameter, its value, and its standard error, or
        whether it is frozen or unconstrained. An error is marked if it is smaller than
        the spacing of the value's dtype. Values that look like parameters but are not
        fitted are listed too: Python floats and ints, integer arrays of few elements.
        Where an `nll` curves downwards there are no errors, and a line says why.
        """
        if batch is not None:
            require_one(self, "table")
        return table(self, batch, ErrorOptions(scale_errors, jac, kind))

    @unmeshed_entrance
    def report(
        self,
        batch: Batch,
        *,
        scale_errors: bool = False,
        data_count: int | None = None,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Report:
        """Reports how good the fit is, with the parameters, errors and correlations.

        ```python
        report = result.report(batch)
        print(report)
        report.reduced_chi_squared, report["mean"].error
        ```

        It costs as much as [`vernal.Trainer.standard_errors`][], whose program it
        shares.

        **Arguments:**

        - `batch`: all of the data.
        - `scale_errors`: for residuals whose error bars are not known: multiplies all
            errors by the root of the reduced chi-squared. Residuals that a mask by hand
            makes zero count as data, so that it is too small. If two of them or more,
            and one in a hundred, are zero whatever the parameters, a warning says so,
            and without `scale_errors` too the note of the report.
        - `data_count`: the number of data. By default that of the residuals; give it
            if some of these are priors or masked by hand, which also silences the
            warning and the note. For an `nll` it is not known, and BIC needs it.
        - `jac`: as for [`vernal.Trainer.fisher`][].
        - `kind`: as for [`vernal.Trainer.standard_errors`][].

        **Returns:**

        A [`vernal.Report`][]. Where an `nll` curves downwards it has values alone, and
        a note says why.

        **Raises:**

        - as [`vernal.Trainer.fisher`][].
        - `ValueError`: if `scale_errors` finds no scatter: there are no `residuals`, or
            not more of them than parameters; or if the scale is known, or taken from
            the scatter already (`priors`, counts, the sandwich).
        - `ValueError`: if `data_count` is more than there are residuals, or fewer than
            the directions that they constrain; or, beside counts, another number.
        """
        require_one(self, "report")
        options = ErrorOptions(scale_errors, jac, kind)
        return report(self, batch, data_count, options)

    @unmeshed_entrance
    def propagate(
        self,
        fn: Callable[[Model], Any],
        batch: Batch,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Propagated:
        r"""Returns a function of the model, and its standard error.

        ```python
        ratio = lambda model: model.a.flux / model.b.flux
        value, error = trainer.propagate(ratio, batch)
        curve, errors = trainer.propagate(lambda model: model(x), batch)
        print(trainer.propagate(ratio, batch))  # 0.331 ± 0.012
        ```

        The error is $\sqrt{\mathrm{diag}(G C G^\top)}$, with the Jacobian $G$ of the
        function and the covariance $C$ of the parameters. It is that of a linear
        function; [`vernal.Trainer.draw`][] knows better where `fn` curves within the
        errors. No matrix of outputs by outputs, or outputs by parameters, is formed. It
        compiles once for each `fn`, compared by value. It warns as
        [`vernal.Trainer.standard_errors`][] does.

        **Arguments:**

        - `fn`: a function of the model, which returns real arrays: one, or any pytree
            of them.
        - `batch`: all of the data.
        - `scale_errors`, `jac`, `kind`: as for [`vernal.Trainer.report`][].

        **Returns:**

        The value, and a tree like it with the standard errors: a pair, which prints as
        lines, see [`vernal.Propagated`][]. An error is infinite if
        `fn` depends on a direction that the data do not constrain. It is NaN where `fn`
        depends only on parameters that are held at their bounds, which have no error
        (a warning says so); where it depends on free ones too, it is that of the free
        ones, with a warning: [`vernal.Trainer.intervals`][] knows those of what is
        held. It is NaN, too,
        where the function or its derivative is not finite, as that of a root at zero; a
        warning names the output. It is zero where `fn` depends on no parameter, and
        where its derivative vanishes, as that of a step, of rounding, or of a square at
        zero: [`vernal.Trainer.draw`][] has the scatter.

        **Raises:** as [`vernal.Trainer.report`][]; and a `TypeError` if `fn` returns
        anything but real floating-point numbers, or uses NumPy, `float` or `if` on
        traced arrays.
        """
        require_one(self, "propagate")
        return propagate(self, fn, batch, ErrorOptions(scale_errors, jac, kind))

    @unmeshed_entrance
    def draw(
        self,
        key: PRNGKeyArray,
        count: int,
        batch: Batch,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Model:
        """Draws models from Laplace's approximation of the likelihood.

        That is a normal distribution of the parameters around the current ones, with
        the covariance of [`vernal.Trainer.standard_errors`][]. It is cut off at bounds
        and where a prior is zero, and what is held at a bound stays there, without
        scatter. It warns as [`vernal.Trainer.standard_errors`][] does.

        ```python
        models = trainer.draw(jax.random.key(0), 1_000, batch)
        curves = eqx.filter_vmap(lambda model: model(x))(models)
        ```

        **Arguments:**

        - `key`: a PRNG key.
        - `count`: the number of models.
        - `batch`: all of the data.
        - `scale_errors`, `jac`, `kind`: as for [`vernal.Trainer.report`][].

        **Returns:**

        The models, stacked: one whose arrays have a row for each, frozen ones too. Row
        `i` of all arrays is one draw; the rows are independent, in no order. Joined to
        vectors, `jax.vmap(lambda m: ravel_pytree(m)[0])(models)`, its columns are in
        the order of `ravel_pytree(trainer.model)`.

        **Raises:** as [`vernal.Trainer.report`][]; and a `ValueError` that names the
        directions which the data do not constrain, if there are any, or says that
        priors allow next to none of the models.
        """
        require_one(self, "draw")
        options = ErrorOptions(scale_errors, jac, kind)
        return draw(self, key, count, batch, options)

    @overload
    def profile(
        self,
        solver: Solver,
        batch: Batch,
        name: str,
        values: ArrayLike | Sequence[float] | None = None,
        *,
        scale_errors: bool = False,
        max_steps: int = 256,
        jac: Mode | None = None,
    ) -> Profile[Model]: ...
    @overload
    def profile(
        self,
        solver: Solver,
        batch: Batch,
        name: list[str] | tuple[str, ...] | None = None,
        values: Mapping[str, ArrayLike | Sequence[float]] | None = None,
        *,
        scale_errors: bool = False,
        max_steps: int = 256,
        jac: Mode | None = None,
    ) -> dict[str, Profile[Model]]: ...
    @unmeshed_entrance
    def profile(
        self,
        solver: Solver,
        batch: Batch,
        name: str | Sequence[str] | None = None,
        values: Any = None,
        *,
        scale_errors: bool = False,
        max_steps: int = 256,
        jac: Mode | None = None,
    ) -> Profile[Model] | dict[str, Profile[Model]]:
        r"""Follows the likelihood along parameters, with all others at their best.

        ```python
        profile = trainer.profile(solver, batch, "power")
        profile.values, profile.delta
        vernal.plot.profile(profile)

        profiles = trainer.profile(solver, batch)
        profiles["power"].delta
        ```

        Where the likelihood is normal, $\Delta\chi^2$ is the parabola of the standard
        error. One compiled program finds all points of all parameters: from each value
        to the next by Newton steps in a space that is whitened at the minimum. The
        solver takes over where these do not converge. A projector is not used: all
        parameters are free.

        **Arguments:**

        - `solver`: as for [`vernal.Trainer.solve`][]. It must minimise the likelihood.
        - `batch`: all of the data.
        - `name`: one element of the parameters, as reports name it: `"power"`,
            `"wfe[6]"`. Or a sequence of elements and selectors (see
            [`vernal.split`][]); by default all elements, but those that a bijection
            couples to others.
        - `values`: the values of that element; of several, a dictionary of them by
            name. By default 21, within the bounds, as far as three standard errors on
            either side, with a bijection those of its free coordinate; from a bound, to
            where the likelihood has fallen as it does at three standard errors.
        - `scale_errors`: for residuals whose error bars are not known: takes for them
            the root of the reduced chi-squared at the minimum, so that the errors are
            those of [`vernal.Trainer.report`][] with it.
        - `max_steps`: the most steps of the solver for each value.
        - `jac`: as for [`vernal.Trainer.solve`][].

        **Returns:**

        A [`vernal.Profile`][] of one name; otherwise a dictionary of them by the names
        of elements. A warning names values at which the solver finds no minimum, or at
        which the likelihood is higher than at the minimum.

        **Raises:**

        - as [`vernal.Trainer.fisher`][] and [`vernal.Trainer.solve`][].
        - `UnknownPathError`: if there is no such parameter.
        - `ValueError`: if it is frozen or tied, or one name has several elements; if
            the trainer is not at a minimum; if `solver` minimises something else than
            the likelihood; if `values` are not finite, or outside of the bounds; or
            if a bijection couples the element to others.
        - `ValueError`: if `scale_errors` finds no scatter or a known scale, as
            [`vernal.Trainer.report`][]; or if all residuals are zero.
        """
        require_one(self, "profile")
        options = ProfileOptions(max_steps, jac, scale_errors)
        return profile(self, solver, batch, name, values, options)

    @unmeshed_entrance
    def intervals(
        self,
        solver: Solver,
        batch: Batch,
        names: Sequence[str] | str | None = None,
        level: float = 0.683,
        *,
        scale_errors: bool = False,
        max_steps: int = 256,
        jac: Mode | None = None,
    ) -> dict[str, tuple[float, float]]:
        r"""Finds the intervals of the parameters by profile likelihood.

        ```python
        low, high = trainer.intervals(solver, batch)["power"]
        ```

        An interval ends where $\Delta\chi^2$, as of [`vernal.Trainer.profile`][],
        reaches the quantile of $\chi^2$ with one degree of freedom at `level`. Where
        the likelihood is normal these are the value plus and minus standard errors;
        else they are honest where those are not. Both sides of all parameters are
        searched at once, by the program of `profile`.

        See James and Roos, *Minuit: a system for function minimization and analysis of
        the parameter errors and correlations*, Computer Physics Communications 10
        (1975): these are the intervals of MINOS.

        **Arguments:**

        - `solver`, `batch`, `scale_errors`, `max_steps`, `jac`: as for
            [`vernal.Trainer.profile`][].
        - `names`: elements, such as `"wfe[6]"`, or selectors of parameters (see
            [`vernal.split`][]). By default as for `profile`.
        - `level`: the probability of an interval.

        **Returns:**

        A dictionary from the names of elements to `(low, high)`, values of the
        parameter. An end is the bound where the interval reaches it, and infinite where
        the likelihood never falls so far; a warning says where float32 may hide that it
        does. It is NaN, with a warning, where it is not found, as where the likelihood
        is not finite before it does, or jumps, where the model raises an error, or
        where float32 rounds too much to tell it.

        **Raises:**

        - as [`vernal.Trainer.profile`][].
        - `ValueError`: if `level` is not between 0 and 1; or if the likelihood is
            higher on the way than at the minimum. The error has the model there as its
            attribute `model`: fit again from it.
        """
        require_one(self, "intervals")
        options = ProfileOptions(max_steps, jac, scale_errors)
        return intervals(self, solver, batch, names, level, options)

    @unmeshed_entrance
    def objective(
        self, batch: Batch
    ) -> tuple[Callable[[PyTree], Float[Array, ""]], PyTree]:
        """Returns the negative log-likelihood as a function, for a sampler.

        Priors are part of it (normal ones without the constant in their logarithm, as
        `residuals` are), and it is infinite beyond bounds. With bijections it is
        the density of the parameters by their free coordinates: the logarithm of the
        change of volume is subtracted, so its minimum is not the best fit.

        ```python
        potential, start = trainer.whiten(batch).objective(batch)
        kernel = numpyro.infer.NUTS(potential_fn=potential)
        ```

        **Arguments:**

        - `batch`: all of the data.

        **Returns:**

        The pair `(fn, start)`: a pure function of the latent vector, or, without a
        projector, of the flat vector in the order of
        `jax.flatten_util.ravel_pytree(trainer.params)`, with bijections that of the
        free coordinates; and the current vector. [`vernal.Trainer.params_at`][] has
        the parameters at a vector.

        **Raises:** as [`vernal.Trainer.fisher`][].
        """
        require_one(self, "objective")
        return objective(self, batch)

    def params_at(self, vector: PyTree) -> PyTree:
        """Returns the parameters at a vector that `objective` is a function of.

        ```python
        samples = jax.vmap(trainer.params_at)(vectors)
        ```

        **Arguments:**

        - `vector`: what [`vernal.Trainer.objective`][] takes, such as one sample.

        **Returns:**

        The trained parameters, a tree like `params`, within their bounds.

        **Raises:**

        - `ValueError`: if the vector has another shape than the current one.
        """
        require_precision(self)
        refuse_stacked(self, "params_at")
        return params_at(self, vector)

    # Diagnosis and change.

    def nan_report(self) -> dict[str, NanCount]:
        """Counts the non-finite values, and says at which step each was first seen.

        **Returns:**

        A dictionary with one [`vernal.NanCount`][] for `"loss"`, for the gradient of
        each trained parameter by its path, and for `"update"`: steps that were not
        taken, because their new parameters or optimiser state would not have been
        finite. (If a parameter has one of these names, the other key is `"<loss>"` or
        `"<update>"`.)
        """
        refuse_stacked(self, "nan_report")
        refuse_traced("nan_report", self._progress.nan_counts)
        return nan_report(self)

    def learning_rates(self) -> dict[str, float | None]:
        """Returns the learning rate of each parameter in the next update.

        It is the product of the factors in the optimiser's transformations: the rate
        itself, its schedule at the count in the optimiser's state, the factor of
        `with_scale`; zero while a [`vernal.window`][] is closed. Positive is downhill.
        What else a transformation does to the gradient (momentum, the second moments of
        Adam, clipping) does not count, nor does a factor that a later transformation
        divides out again, as Adam does.

        It evaluates schedules, and works outside of `jax.jit` only.

        **Returns:**

        A dictionary with a float for each trained parameter by its path; `None` where
        the rate is not known: for a line search, for `optax.scale_by_adam()` alone, for
        your own transformation. In the latent space of a projector it is the rate of
        the coordinates to which the parameter belongs.

        **Raises:**

        - `ValueError`: if there is no optimiser.
        """
        refuse_stacked(self, "learning_rates")
        require_optimiser(self)
        refuse_traced("learning_rates", self)
        with precision_of(self):
            inner = in_free_coordinates(self)
            return learning_rates(
                self.optimiser,
                self.opt_state,
                inner.params,
                self.projector,
                inner.latent,
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
        """Changes parts of the trainer, and keeps the state that still fits.

        The state of an optimiser or a policy, with the counts of schedules, is kept if
        that of the new one has the same structure, shapes and dtypes; otherwise it
        starts afresh. In a [`vernal.ParamOptimiser`][] that is so for each rule, which
        keeps its state if it has the same parameters as before. A state also starts
        afresh with a policy of another class, and where the numbers in it mean
        something else to the new optimiser: the states of `optax.adam` and
        `optax.adamax` look alike, and have squares of gradients in one, their largest
        values in the other. Another rate, schedule, decay or `b1` changes no meaning.
        Hyperparameters in the state, those of `optax.inject_hyperparams`,
        become the new optimiser's wherever these differ from the ones that the old
        optimiser began with. The step count and the counts of `nan_report` are kept;
        with a `model` the best begins anew, except that a fit keeps its own where a
        callback does this. A trainer that has stopped can go on. In a stacked trainer,
        each member is changed. There, a model, an optimiser or a policy whose arrays
        all have the shapes of those before has a row for each member.

        Which leaves of the model are trained stays. To freeze or thaw some, make a new
        trainer: `Fit(trainer.model, optimiser)`. A rule for what `train` left out does
        nothing, nor does one for a frozen leaf where the old optimiser has no rules.

        **Arguments:**

        - `model`: a model of the same structure, with other values.
        - `optimiser`: another optimiser, or the same one with another rate.
        - `nan_policy`: another policy.
        - `state`: a state of the same structure, with other values.

        **Raises:**

        - `ValueError`: if `model` has another structure or other shapes; or if rules
            of `optimiser` leave out a parameter, or name what the old ones left out;
            or if arrays may be those of each member or of all.
        """
        require_precision(self)
        was_made = is_made(self)
        if model is None and not was_made:
            refuse_strays(self)
        fields = replaced_fields(self, model, optimiser, nan_policy, state)
        trainer = changed(self, **fields)
        if not was_made:
            require_parts(trainer)
        return trainer

    def __repr__(self) -> str:
        """Returns one line: the class, the model, its progress. `print` shows more."""
        return in_short(self)

    def __str__(self) -> str:
        """Returns a table of the parameters, and what happens to each.

        Values that look like parameters but are not fitted are listed too: Python
        floats, which are frozen unless named, Python ints, integer arrays of few
        elements.
        """
        return printed(self)
