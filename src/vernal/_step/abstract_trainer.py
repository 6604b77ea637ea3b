"""The interface of a trainer for all folders below `Trainer` itself.

Only this file reads and writes the private fields of a trainer. It has functions rather
than methods, because a user's subclass may have fields of the same names.
"""

# pyright: reportPrivateUsage=false

import abc
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic
from weakref import WeakValueDictionary

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from typing_extensions import TypeVar

from .._boundary import ModuleMeta, PyTree, is_x64_on
from .._constraints import Bijections, Bounds, Priors, RealParts, real_parts
from .._optimiser import ParamOptimiser
from .._pickling import Portable, QuickMethods, build
from .._policy import NanPolicy, StopFit
from .._program import prepared
from .._projection import EigenProjector
from .model_template import ModelTemplate
from .progress import Progress

TrainerT = TypeVar("TrainerT", bound="AbstractTrainer[Any, Any]")
ModuleT = TypeVar("ModuleT", bound=eqx.Module)

if TYPE_CHECKING:
    Model = TypeVar("Model", default=Any)
    Batch = TypeVar("Batch", default=Any)

    class _Meta(ModuleMeta):
        """For type checkers: a subclass inherits `__init__`.

        With Equinox's metaclass they believe that each subclass has a new one, with an
        argument for each field.
        """

else:
    # In a union, beartype cannot take a default of `Any`, which Python 3.13 tells it.
    Model = TypeVar("Model", default=object)
    Batch = TypeVar("Batch", default=object)
    _Meta = ModuleMeta


class AbstractTrainer(
    Portable, QuickMethods, eqx.Module, Generic[Model, Batch], metaclass=_Meta
):
    """A model, an optimiser and policies: the configuration, and the progress of a fit.

    A trainer whose progress is `None` is a configuration: it goes into compiled
    programs beside the progress, which changes. The arrays of a stacked trainer have a
    row for each member.
    """

    # `Any` stands for `None`: with `None` itself, type checkers would ask users for an
    # `assert` before each use.
    optimiser: ParamOptimiser | Any
    nan_policy: NanPolicy
    projector: EigenProjector | Any
    key: PRNGKeyArray | None
    _bounds: Bounds | None
    _bijections: Bijections | None
    _priors: Priors | None
    _template: ModelTemplate
    _progress: Progress

    # Hooks that a subclass may override.

    def transform_grads(self, grads: PyTree, model: Model) -> PyTree:
        """Hook: changes the gradients after the NaN policy, before the optimiser.

        **Arguments:**

        - `grads`: the gradients of the trained parameters, `None` elsewhere.
        - `model`: the model at which they were computed.
        """
        return grads

    def constrain(self, model: Model) -> Model:
        """Hook: changes the model after each update, to clip or to renormalise.

        Only changes of trained parameters count. If a projector couples an element that
        it changes with others, it must clip each element to an interval: the clipping
        then becomes a projection in the metric of the projector, and the fit ends at
        the best point that the constraint allows. With a [`vernal.precondition`][] that
        couples such elements an error is raised. An L-BFGS, or another line search,
        knows nothing of it and stops elsewhere: a fit warns.
        """
        return model

    @abc.abstractmethod
    def evaluate(self, model: Model, batch: Batch) -> Float[Array, ""]:
        """Scores a model on a validation batch."""

    # What a trainer holds.

    @property
    def params(self) -> PyTree:
        """The trained parameters: the model with `None` for everything not trained."""
        return self._progress.params

    @property
    def model(self) -> Model:
        """The model with the current values."""
        return self._template.join(self._progress.params)

    @property
    def best(self) -> Model:
        """The model with the lowest finite loss that was scored.

        A step scores the parameters that it starts from, so the last iterate of a fit
        is not scored before the next step. In a fit with `validation` it is the model
        with the lowest score there; after a fit with `best=False`, the model itself.
        The losses are those of one set of data: see [`vernal.FitResult.best`][].
        """
        return self._template.join(self._progress.best)

    @property
    def best_loss(self) -> Float[Array, "*members"]:
        """The loss of `best`, or its validation score: infinite before the first."""
        return self._progress.best_loss

    @property
    def state(self) -> PyTree:
        """The state that the loss carries from step to step, `None` without one."""
        # A copy: a state of Equinox is invalid as soon as there is a newer one.
        return jax.tree.map(lambda leaf: leaf, self._progress.state)

    @property
    def best_state(self) -> PyTree:
        """The state that belongs to `best`."""
        return jax.tree.map(lambda leaf: leaf, self._progress.best_state)

    @property
    def step_count(self) -> Int[Array, "*members"]:
        """The number of steps, with those that were not accepted."""
        return self._progress.step_count

    @property
    def stopped(self) -> Bool[Array, "*members"]:
        """Whether the NaN policy has ended the fit; after `replace` it can go on."""
        return self._progress.stopped

    @property
    def opt_state(self) -> PyTree:
        """The state of the optimiser."""
        return self._progress.opt_state

    @property
    def latent(self) -> PyTree:
        """What the optimiser moves, if that is not the parameters themselves.

        These are the coordinates in the projector's space; without a projector, the
        free coordinates of bijections; without these, `None`.
        """
        return self._progress.latent


# As one program, where each operation would be compiled by itself.
to_params = eqx.filter_jit(EigenProjector.to_params)


def progress_of(trainer: AbstractTrainer) -> Progress:
    """Returns what a fit changes of a trainer."""
    return trainer._progress


def with_progress(trainer: TrainerT, progress: Progress, **fields: Any) -> TrainerT:
    """Returns the trainer with another progress, and perhaps other fields."""
    return changed(trainer, _progress=progress, **fields)


def config_of(trainer: TrainerT) -> TrainerT:
    """Returns the trainer without its progress: what a fit does not change."""
    return changed(trainer, _progress=None)


def own_fields(trainer: AbstractTrainer) -> dict[str, Any]:
    """Returns the fields that the class of a trainer adds."""
    common = AbstractTrainer.__annotations__
    return {name: x for name, x in vars(trainer).items() if name not in common}


def template_of(trainer: AbstractTrainer) -> ModelTemplate:
    """Returns the model without its trained parameters."""
    return trainer._template


def tied_words(trainer: AbstractTrainer) -> dict[str, str]:
    """Returns what a table says of each tied parameter, by path."""
    ties = trainer._template.ties
    return {} if ties is None else ties.words


def bounds_of(trainer: AbstractTrainer) -> Bounds | None:
    """Returns the intervals that the parameters lie in, if there are any."""
    return trainer._bounds


def bijections_of(trainer: AbstractTrainer) -> Bijections | None:
    """Returns the maps from free coordinates to parameters, if there are any."""
    return trainer._bijections


def in_free_coordinates(trainer: TrainerT) -> TrainerT:
    """Returns a trainer whose parameters are the free coordinates of its bijections.

    Its model is the same. It has no bijections: its template applies them.
    """
    bijections, progress = trainer._bijections, trainer._progress
    if bijections is None:
        return trainer
    free, latent = progress.latent, None
    if trainer.projector is not None:
        free, latent = to_params(trainer.projector, free), free
        # Rounding would move what is on a bound.
        free = bijections.of_mapped(free, progress.params)
    template = changed(trainer._template, bijections=bijections)
    progress = changed(progress, params=free, latent=latent, best=free)
    fields = {"_bijections": None, "_template": template, "_progress": progress}
    return changed(trainer, **fields)


def in_real_coordinates(trainer: TrainerT) -> TrainerT:
    """Returns a trainer in free coordinates, whose complex ones are pairs of real ones.

    It is for derivatives of its loss: its state is not that of its optimiser.
    """
    trainer = in_free_coordinates(trainer)
    template, progress = trainer._template, trainer._progress
    params = progress.params
    if not any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        return trainer
    maps = RealParts(template.bijections, jax.tree.structure(params))
    template = changed(template, bijections=maps)
    progress = changed(progress, params=real_parts(params))
    return changed(trainer, _template=template, _progress=progress)


def from_free_coordinates(
    trainer: AbstractTrainer, free: PyTree, latent: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the `params` and the `latent` of a trainer at free coordinates.

    `latent` is their place in the space of the projector, `None` without one.
    """
    bijections = trainer._bijections
    if bijections is None:
        return free, latent
    return bijections.forward(free), free if latent is None else latent


def with_bounds(trainer: TrainerT, bounds: Bounds | None) -> TrainerT:
    return changed(trainer, _bounds=bounds)


def priors_of(trainer: AbstractTrainer) -> Priors | None:
    return trainer._priors


def stripped(trainer: TrainerT) -> TrainerT:
    """Returns the trainer with only what its loss depends on.

    So trainers with different optimisers share the programs that evaluate the loss.
    """
    progress = trainer._progress
    fields: dict[str, Any] = dict.fromkeys(vars(progress))
    for name in ("params", "state", "step_count"):
        fields[name] = getattr(progress, name)
    return changed(
        trainer,
        optimiser=None,
        nan_policy=StopFit(),
        projector=None,
        _progress=changed(progress, **fields),
    )


def precision_of(trainer: AbstractTrainer) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that has the precision in which a trainer was made."""
    return jax.enable_x64(is_x64_on() or trainer.best_loss.dtype == jnp.float64)


def prepared_config(trainer: Any) -> Any:
    """Returns the trainer for a program that is called again and again."""
    template, optimiser = prepared(trainer._template, trainer.optimiser)
    return changed(trainer, optimiser=optimiser, _template=template)


def member_axes(step_count: Int[Array, " members"]) -> Callable[[Any], int | None]:
    """Returns the `in_axes` by which `vmap` takes each member of a stacked trainer."""
    size = len(step_count)
    # Arrays that all members share may have no rows.
    return lambda x: 0 if eqx.is_array(x) and x.shape[:1] == (size,) else None


def overrides(trainer: AbstractTrainer, hook: str) -> bool:
    return getattr(type(trainer), hook) is not getattr(AbstractTrainer, hook)


def is_constrained(trainer: AbstractTrainer) -> bool:
    """Whether a step may end elsewhere than where the optimiser goes."""
    return overrides(trainer, "constrain") or bounds_of(trainer) is not None


# What vernal itself has made, whose parameters are where its coordinates say. By its
# identity, since a module hashes by its arrays. What users change, as by
# `equinox.tree_at`, is another object.
_made = WeakValueDictionary[int, Progress]()


def note_made(progress: Progress | None) -> None:
    """Notes a progress that vernal has made, or looked at."""
    if progress is not None:
        _made[id(progress)] = progress


def is_made(trainer: AbstractTrainer) -> bool:
    """Whether vernal has made, or looked at, the progress of a trainer."""
    return _made.get(id(trainer._progress)) is trainer._progress


def changed(module: ModuleT, **fields: Any) -> ModuleT:
    """Copies a module with other fields, without the `__init__` of its class.

    Flattening would do the same, but slower: this runs between the chunks of each fit.
    """
    note_made(fields.get("_progress"))
    old = object.__getattribute__(module, "__dict__")
    return build(type(module), {**old, **fields})
