"""Checks the arguments of a trainer, and finds its parameters."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._boundary import (
    ObjectiveWarning,
    PyTree,
    is_deleted,
    is_explicit,
    is_traced,
    narrowed_leaves,
    prng_key,
    refuse_foreign,
    require_numbers,
    spelled,
    takes_methods,
    warn,
    warn_of_single_leaves,
    without_axes,
)
from .._closure import refuse_static_arrays
from .._constraints import Bijections, Bounds, Priors, Ties, as_bounds, as_priors
from .._optimiser import ParamOptimiser
from .._pickling import module_of
from .._policy import NanPolicy
from .._projection import EigenProjector, encode_near
from .._tree import (
    UnknownPathError,
    by_path,
    cast_like,
    disagreements,
    is_float,
    is_inexact,
    paths,
    ravel_size,
    resolve,
    strong,
)
from .abstract_trainer import AbstractTrainer, own_fields
from .constrain import check_coordinates
from .model_template import ModelTemplate
from .objective import METHODS, defined
from .progress import UNKNOWN, Progress
from .suspect_model import holds_arrays, in_words

T = TypeVar("T")

_HOOKS = {
    "evaluate": ("model", "batch"),
    "transform_grads": ("grads", "model"),
    "constrain": ("model",),
}
_OF_POLICY = {"init": ("params",), "apply": ("loss", "grads", "state")}


def check_class(trainer: AbstractTrainer, key: Any, state: PyTree, priors: Any) -> None:
    """Checks that a trainer's class says what is fitted, and can be called for it."""
    methods, kind = defined(trainer), type(trainer)
    for name in METHODS:
        is_other = getattr(kind, name, None) is not None  # which drops a method
        if name not in methods and (is_other or name in kind.__dataclass_fields__):
            raise TypeError(
                f"`{kind.__name__}.{name}` is not a method. Define it, as `def {name}"
                "(self, model, batch): ...`, or give another name to what else it is."
            )
    if not methods:
        raise TypeError(
            f"`{kind.__name__}` defines none of "
            f"{', '.join(f'`{name}`' for name in METHODS)}. Subclass `Trainer` and "
            "say what is fitted: `def residuals(self, model, batch): ...`."
        )
    _warn_of_differences(kind, methods)
    keyed = () if key is None else ("key=",)
    stateful = () if state is None else ("state=",)
    called: dict[str, tuple[str, ...]] = {
        name: ("model", "batch", *keyed, *(stateful if name == "loss" else ()))
        for name in methods
    }
    try:
        takes_methods(type(trainer), called | _HOOKS, type(trainer).__name__)
    except TypeError as error:
        given = {"key": key, "state": state}
        missing = (k for k, v in given.items() if v is None and f"'{k}'" in str(error))
        hint = "".join(f" Give `{name}=` to the trainer." for name in missing)
        raise TypeError(f"{error}{hint}") from None
    if priors is not None and "loss" in methods:
        raise TypeError(
            f"`priors` are for a likelihood, and `{type(trainer).__name__}` defines "
            "`loss`: beside a mean, or a sum with another scale, they would be too "
            "strong or too weak. Define `residuals` or `nll` instead of it."
        )
    if state is None:
        return
    if "loss" not in methods:
        raise TypeError(
            f"`state` is for a `loss`, which `{type(trainer).__name__}` does not "
            "define: `def loss(self, model, batch, *, state): ...`, which returns "
            "`(scalar, state)`."
        )
    check_state(state)


# What else may be given instead of a model, by an attribute, and where it has one.
_HOLDERS = {
    "stop_reason": ("a result", "result.model"),
    "stop_reasons": ("a result", "result.best"),
}


def checked_model(model: T) -> T:
    """Checks the leaves of a model, and turns those of other libraries into arrays.

    Raises if an array means more than its numbers, has no values or has been deleted,
    or if the model is a trainer, a result or an optimiser.
    """
    if isinstance(model, optax.GradientTransformation):
        raise TypeError(
            "`model` is an Optax transformation. Were `model` and `optimiser` "
            "swapped? The model comes first: `Trainer(model, optimiser)`."
        )
    if found := _holder(model):
        what, remedy = found
        raise TypeError(
            f"`model` is {what}, `{type(model).__name__}`, rather than the model that "
            f"it holds. Give `{remedy}`."
        )
    if any(map(_is_odd, jax.tree.leaves(model))):
        convert = lambda keys, leaf: _as_array(leaf, spelled("model", keys))
        model = jax.tree_util.tree_map_with_path(convert, model)
    return narrowed_leaves(model, "model")


def _holder(model: Any) -> tuple[str, str] | None:
    """Says what else than a model it is, by its type: a `__getattr__` may raise."""
    if isinstance(model, AbstractTrainer):
        return "a trainer", "trainer.model"
    if module_of(type(model)).split(".")[0] != "vernal":
        return None
    return next((_HOLDERS[name] for name in _HOLDERS if hasattr(model, name)), None)


def _is_odd(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return is_deleted(leaf) or is_explicit(leaf)
    if isinstance(leaf, np.ndarray):
        return type(leaf) is not np.ndarray or leaf.dtype.type is np.void
    return not isinstance(leaf, type | np.generic | float | int | str)


def _as_array(leaf: Any, where: str) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{where} has no values ({leaf}). Make the trainer within "
            "`eqx.filter_eval_shape`, together with its model."
        )
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | type)
    if not is_array and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    # Arrays of text and of objects are labels, which are static.
    if not (type(leaf) is np.ndarray and leaf.dtype.kind in "OSU"):
        refuse_foreign(leaf, where)
    return without_axes(leaf) if is_explicit(leaf) else leaf


def check_state(state: PyTree) -> None:
    """Checks the leaves of a loss's state: arrays or numbers, which JAX can hold."""
    remedy = "Pick the arrays by `eqx.filter(state, eqx.is_array)`."
    require_numbers(state, "state", remedy)
    # For its warnings alone.
    narrowed_leaves(state, "state")


def check_own_fields(trainer: AbstractTrainer) -> None:
    own, kind = own_fields(trainer), type(trainer).__name__
    refuse_static_arrays(trainer, f"`{kind}`", own)
    for name, value in own.items():
        # For its warnings alone.
        narrowed_leaves(value, f"{kind}.{name}")
        warn_of_single_leaves(value, f"{kind}.{name}")


# The classes that a warning was given for, once each.
_warned: weakref.WeakSet[type] = weakref.WeakSet()


def _warn_of_differences(kind: type, methods: Sequence[str]) -> None:
    """Warns of residuals beside another method: least squares may leave a term out."""
    others = [name for name in methods if name != "residuals"]
    if "residuals" not in methods or not others or kind in _warned:
        return
    minimised = "loss" if "loss" in methods else "nll"
    likelihood = "nll" if "nll" in methods else "residuals"
    beside = " and ".join(f"`{name}`" for name in others)
    warn(
        f"`{kind.__name__}` defines `residuals` beside {beside}. `fit`, `step` and a "
        f"minimiser in `solve` use `{minimised}`; a least-squares solver in `solve`, "
        "`fisher`, `whiten`, `standard_errors` and `table` use `residuals`; "
        f"`objective` uses `{likelihood}`. What is in one of them alone, such as a "
        "prior or a robust loss, the others leave out. Write it once: as `nll`, "
        "without `residuals`, or as residuals (a normal prior is one more, "
        "`(value - mean) / std`). If it is on purpose: "
        '`warnings.filterwarnings("ignore", category=vn.ObjectiveWarning)`.',
        ObjectiveWarning,
    )
    _warned.add(kind)


def check_arguments(nan_policy: Any, projector: Any, key: Any) -> None:
    if not isinstance(nan_policy, NanPolicy):
        made = isinstance(nan_policy, type) and issubclass(nan_policy, NanPolicy)
        remedy = f"`{nan_policy.__name__}()`" if made else "`vn.SkipStep()`"
        raise TypeError(
            f"`nan_policy` is {nan_policy!r}, not a NanPolicy. Did you mean {remedy}?"
        )
    takes_methods(type(nan_policy), _OF_POLICY, "nan_policy")
    if projector is not None and not isinstance(projector, EigenProjector):
        raise TypeError(
            f"`projector` is of type `{type(projector).__name__}`, but must be an "
            "EigenProjector: `vn.EigenProjector.from_fisher(fmat, params)`."
        )
    if key is not None:
        prng_key(key)


def require_optimiser(trainer: AbstractTrainer) -> None:
    """Refuses a trainer that cannot take a step."""
    if trainer.optimiser is None:
        name = type(trainer).__name__
        raise ValueError(
            f"`{name}` has no optimiser. Give it one: `{name}(model, "
            "optax.adam(1e-2))` or `trainer.replace(optimiser=...)`."
        )


def find_trained(
    model: Any,
    optimiser: Any,
    train: Any,
    projector: EigenProjector | None,
    ties: Ties | None,
) -> tuple[int | None, ...]:
    """Finds which leaves of the model are trained: a tied one never is."""
    ruled = None
    if isinstance(optimiser, ParamOptimiser):
        ruled = optimiser.owners(model)
        refuse_rules_of_tied(optimiser, ruled, model, ties)
    if train is not None:
        owners = resolve(model, [train], argument="train")
    elif ruled is not None:
        owners = ruled
    elif projector is not None:
        names = paths(projector.origin)
        owners = resolve(model, names, argument="projector") if names else ()
    else:
        owners = [0 if is_inexact(leaf) else None for leaf in jax.tree.leaves(model)]
    tied = () if ties is None else ties.indices
    owners = [None if i in tied else owner for i, owner in enumerate(owners)]
    if all(owner is None for owner in owners):
        of_integers = _of_integers(model)
        known = ", ".join(map(repr, paths(model)[:5]))
        raise ValueError(
            "`model` has no parameter to train: "
            + (
                f"it is the class `{model.__name__}`, rather than one of its instances."
                if isinstance(model, type)
                else f"all of its parameters ({known}) are frozen or Python floats, "
                "which are trained where `train` or a rule names them."
                if known
                else f"{of_integers}: make it an array of floats."
                if of_integers
                else "there is no array of floats in it, such as `jnp.array(1.0)`."
                + _of_opaque(model)
            )
        )
    return tuple(owners)


def refuse_rules_of_tied(
    optimiser: ParamOptimiser,
    owners: Sequence[int | None],
    model: Any,
    ties: Ties | None,
) -> None:
    """Refuses a rule that would move nothing, since what it owns follows others."""
    if ties is None:
        return
    followers, rules = set(ties.indices), range(len(optimiser.transforms))
    others = {owner for i, owner in enumerate(owners) if i not in followers}
    for index in ties.indices:
        if owners[index] in rules and owners[index] not in others:
            path = paths(model)[index]
            raise ValueError(
                f"`optimiser` has a rule for {path!r} that moves nothing: it is "
                f"{ties.words[path]}. Give the rule to what it follows."
            )


def _of_opaque(model: PyTree) -> str:
    """Says what helps where JAX does not look into an object; empty if it does."""
    for leaf in jax.tree.leaves(model):
        is_dataclass = dataclasses.is_dataclass(leaf)
        if is_dataclass or holds_arrays(leaf, jax.Array | np.ndarray):
            kind, remedy = in_words(leaf)
            kind = f"the dataclass {kind}" if is_dataclass else f"a {kind}"
            return f" JAX does not look into {kind}: {remedy}."
    return ""


def _of_integers(model: PyTree) -> str:
    """Names the first array of a model that has no floats; empty if it has none."""
    for path, leaf in by_path(model).by_name().items():
        if eqx.is_array(leaf) and not is_inexact(leaf):
            return f"{path!r} is of {leaf.dtype}"
    return ""


def constraints(
    template: ModelTemplate, params: PyTree, bounds: Any, priors: Any
) -> tuple[Bounds | None, Bijections | None, Priors | None]:
    """Makes the constraints that a user gives for the trained parameters."""
    model, trained = template.join(params), set(paths(params))
    tied = {} if template.ties is None else template.ties.words
    named = by_path(model).by_name()

    def unfit(path: str, of_tied: str) -> str | None:
        if path in trained or (path in tied and not of_tied):
            return ""
        if path in tied:
            return f"{tied[path]}. {of_tied}"
        if is_float(named[path]):
            return "a Python float, which is not fitted. Write it as `jnp.array(1.0)`."
        # Frozen: what it has waits for a trainer that fits it.
        return None

    of_tied = "Give the bounds to what it follows."
    return (
        *as_bounds(bounds, model, params, lambda path: unfit(path, of_tied)),
        as_priors(priors, model, lambda path: unfit(path, "")),
    )


def refuse_own_projector(
    projector: EigenProjector | None, bijections: Bijections | None
) -> None:
    """Refuses a user's projector where there are bijections, or one made with them."""
    if not isinstance(projector, EigenProjector):
        return
    if bijections is not None:
        raise ValueError(
            "`projector` is of the parameters, and with a bijection in `bounds` the "
            "fit moves free coordinates. Use `trainer.whiten(batch)`, which whitens "
            "these."
        )
    if projector.is_of_free:
        raise ValueError(
            "`projector` is of free coordinates, made by a trainer with a bijection in "
            "`bounds`, and this one has none. Use `trainer.whiten(batch)`."
        )


def fit_projector(
    projector: EigenProjector | None,
    params: PyTree,
    optimiser: Any,
    *,
    constrained: bool,
) -> tuple[EigenProjector | None, PyTree]:
    """Checks that a projector fits the parameters, and encodes them with it."""
    if projector is None:
        return None, None
    refuse_names_in_latent_space(projector, optimiser)
    shapes, own = (
        {path: leaf.shape for path, leaf in by_path(tree).items()}
        for tree in (params, projector.origin)
    )
    if list(shapes.items()) != list(own.items()):
        odd = sorted(path for path, *_ in disagreements(shapes, own))
        raise ValueError(
            "`projector` was made for other parameters than are trained: they differ "
            f"at {', '.join(map(repr, odd[:5])) or 'their order'}. Make it from "
            "`trainer.params`."
        )
    for path, leaf in by_path(projector.origin).items():
        if not (is_traced(leaf) or np.isfinite(leaf).all()):
            raise ValueError(
                f"`projector` was made at parameters that are not finite in {path!r}. "
                "Move it: `projector.at(params)`."
            )
    if projector.latent_size < ravel_size(params) and constrained:
        raise ValueError(
            "`constrain`, or `bounds`, leads out of the latent space of "
            "`projector`, which has dropped directions that the data do not "
            'constrain. Make the projector with `on_null="prior"`, or drop the '
            "constraint."
        )
    origin = jax.tree.leaves(projector.origin)
    projector = projector.at(
        cast_like(jax.tree.structure(params).unflatten(origin), params)
    )
    return encode(projector, params)


def encode(projector: EigenProjector, params: PyTree) -> tuple[EigenProjector, PyTree]:
    """Encodes parameters, with an origin there where its own would move them."""
    if projector.latent_size == ravel_size(params):
        return encode_near(projector, params)
    # A point off the origin may lie where the latent space does not reach.
    projector = projector.at(params)
    return projector, _to_latent(projector, params)


# As one program, where each operation would be compiled by itself.
_to_latent = eqx.filter_jit(EigenProjector.to_latent)


def refuse_names_in_latent_space(projector: Any, optimiser: Any) -> None:
    """Refuses rules that have no meaning in the latent space of a projector."""
    if projector is None or not isinstance(optimiser, ParamOptimiser):
        return
    if not projector.has_names:
        raise ValueError(
            "`optimiser` is a ParamOptimiser, and `projector` mixes all parameters: "
            "in its latent space they have no names. Use a plain Optax transformation "
            "there, such as `optax.adam(1e-2)`; or whiten each parameter or group by "
            "itself, with `EigenProjector.from_blocks`; or keep the rules, without a "
            "projector, and precondition: "
            "`ParamOptimiser(rules, first=vn.precondition(projector))`."
        )
    names = paths(projector.origin)
    owners = optimiser.owners(projector.origin, filtered=True)
    for block in projector.blocks:
        if len({owners[index] for index in block}) > 1:
            mixed = " and ".join(repr(names[index]) for index in block[:5])
            raise ValueError(
                f"`optimiser` has several rules for {mixed}, which one block of "
                "`projector` mixes. Give them one rule, by a tuple, or a block each."
            )
    try:
        latent_owners = optimiser.owners(projector.latent_like, filtered=True)
    except UnknownPathError:
        latent_owners = None
    for index, block in enumerate(projector.blocks):
        if latent_owners is None or latent_owners[index] != owners[block[0]]:
            raise ValueError(
                f"`optimiser` has another rule for {names[block[0]]!r} in the latent "
                "space of `projector`, where its array has another shape. Name the "
                "parameters, rather than by a predicate on their leaves."
            )


def check_ruled(
    optimiser: Any,
    params: PyTree,
    free: PyTree,
    bijections: Bijections | None,
    otherwise: str = "leave it out of `train`",
) -> None:
    """Refuses a parameter that no rule would move, or one in other coordinates.

    `free` are the free coordinates, the parameters themselves without a bijection;
    `otherwise` is what a user can do beside giving a rule.
    """
    check_coordinates(optimiser, bijections)
    if not isinstance(optimiser, ParamOptimiser):
        return
    owners = optimiser.owners(params, filtered=True)
    names = paths(params)
    idle = [n for n, owner in zip(names, owners, strict=True) if owner is None]
    if idle:
        raise ValueError(
            f"`optimiser` has no rule for {', '.join(map(repr, idle[:5]))}, which is "
            f"trained. Give it one, or a `default`; or {otherwise}."
        )
    of_free = owners if free is params else optimiser.owners(free, filtered=True)
    for name, owner, other in zip(names, owners, of_free, strict=True):
        if owner != other:
            raise ValueError(
                f"`optimiser` has another rule for the free coordinates of {name!r}, "
                "which has a bijection, than for its elements. Name the parameter, "
                "rather than by a predicate on its leaf."
            )


def initial_progress(
    trainer: AbstractTrainer, params: PyTree, latent: PyTree, state: PyTree
) -> Progress:
    """Returns the progress of a trainer that has not taken a step."""
    # NumPy makes these arrays, for which JAX would compile a program each.
    columns = len(jax.tree.leaves(params)) + 2
    no_counts = np.array([[0], [-1], [-1]], np.int32)
    return Progress(
        params=params,
        latent=latent,
        opt_state=initial_opt_state(trainer.optimiser, params, latent),
        policy_state=jax.tree.map(strong, trainer.nan_policy.init(params)),
        state=state,
        best=params,
        best_state=state,
        best_loss=jax.device_put(np.asarray(np.inf, jnp.result_type(float))),
        is_validated=jax.device_put(np.bool_(False)),
        nan_counts=jax.device_put(np.repeat(no_counts, columns, axis=1)),
        step_count=jax.device_put(np.int32(0)),
        stopped=jax.device_put(np.bool_(False)),
        scored_on=jax.device_put(np.uint32(UNKNOWN)),
    )


def initial_opt_state(optimiser: Any, params: PyTree, latent: PyTree) -> PyTree:
    """Returns the first state of an optimiser, as arrays."""
    if optimiser is None:
        return None
    state = optimiser.init(params if latent is None else latent)
    return jax.tree.map(jnp.asarray, state)
