"""An Optax optimiser for each parameter, by path."""

import functools as ft
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike

from .._boundary import boolean, nearest_names, refuse_foreign, whole_number
from .._closure import Closure
from .._tree import (
    UnknownPathError,
    aligned,
    atoms,
    by_path,
    is_float,
    is_inexact,
    keep,
    named_leaves,
    parameters,
    resolve,
    strong,
)
from .groups import init_groups, update_groups
from .transform import AbstractTransform, Transform, as_transform

T = TypeVar("T")


class ParamOptimiserState(eqx.Module):
    """The state of a [`vernal.ParamOptimiser`][].

    `groups` has the state of each rule, in order, and then that of the default.
    `paths` are the parameters that are trained, `owners` the group of each.
    """

    first: Any
    groups: tuple[Any, ...]
    # Tuples; `_Learned` in what Optax makes to map over.
    paths: Any = eqx.field(static=True)
    shapes: Any = eqx.field(static=True)
    owners: Any = eqx.field(static=True)


class _Learned:
    """What is static in a state that was made without parameters.

    `optax.tree_map_params` makes such a state, compares it with a whole one, and fills
    it with the values of that. It is equal to what it first meets, and remembers that.
    """

    def __init__(self) -> None:
        self.value: Any = None

    def __eq__(self, other: object) -> bool:
        other = _known(other)
        self.value = other if self.value is None else self.value
        return self.value == other

    def __hash__(self) -> int:
        return hash(self.value)


def _known(static: Any) -> Any:
    return static.value if isinstance(static, _Learned) else static


@final
class ParamOptimiser(AbstractTransform):
    """An Optax optimiser for each parameter, or group of parameters, by path.

    ```python
    optimiser = vn.ParamOptimiser({
        ("mean", "std"): optax.adam(1e-2),
        "optics.wfe": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-9)),
        "**.bias": None,  # frozen
        "power": vn.window(optax.sgd(5e-3, momentum=0.5), start=50),
    })
    ```

    A tuple is one group with one joint transformation: clipping by the global norm
    sees the norm of the group. The most specific rule wins: an exact path, then the
    longest node, then a glob by its number of literal segments, then a predicate.

    It is a pytree, whose leaves are the rates: one with other rates compiles nothing
    anew. To Optax it is a `GradientTransformationExtraArgs`, and goes wherever one
    goes: into `optax.chain`, into `optimistix.OptaxMinimiser`, into a fit loop of
    another library. Within, a transformation sees its own parameters alone, in an
    ordered dictionary by path. An extra argument `value_fn` (for a line search, as in
    `optax.lbfgs`) becomes a function of these, the others held at their values.
    """

    selectors: Closure
    transforms: tuple[AbstractTransform | None, ...]
    scales: tuple[Array, ...]
    first: AbstractTransform | None
    default: AbstractTransform | None
    strict: bool = eqx.field(static=True)

    def __init__(
        self,
        rules: Mapping[Any, optax.GradientTransformation | None],
        *,
        first: optax.GradientTransformation | None = None,
        default: optax.GradientTransformation | None = None,
        strict: bool = False,
    ):
        """**Arguments:**

        - `rules`: from selectors (see [`vernal.split`][]) to Optax transformations. A
            rule whose value is `None` freezes its parameters.
        - `first`: a transformation of all trained parameters together, before the
            rules: clipping, preconditioning.
        - `default`: the transformation of the parameters without a rule. Where it is
            `None` they are frozen.
        - `strict`: whether a parameter without a rule is an error.

        **Raises:**

        - `TypeError`: if a rule is not an Optax transformation.
        """
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"`rules` is of type `{type(rules).__name__}`, but must map selectors "
                'to Optax transformations: `{"power": optax.adam(1e-2)}`. For one '
                "transformation of everything, use `default=`."
            )
        for selector in rules:
            list(atoms(selector, "rules"))
        self.selectors = Closure.encode(tuple(rules))
        self.transforms = tuple(
            None if tx is None else as_transform(tx, f"rules[{_named(selector)}]")
            for selector, tx in rules.items()
        )
        self.scales = tuple(_as_scale(1.0) for _ in rules)
        self.first = None if first is None else as_transform(first, "first")
        self.default = None if default is None else as_transform(default, "default")
        self.strict = boolean(strict, "strict")

    def owners(self, model: Any, *, filtered: bool = False) -> tuple[int | None, ...]:
        """Finds the group of each leaf of a model: `None` for a frozen one.

        Group `i` is the rule `i`; the one after the last is the default.

        **Arguments:**

        - `model`: any pytree.
        - `filtered`: whether leaves that rules name may have been replaced by `None`.

        **Raises:**

        - `UnknownPathError`: if a rule matches nothing.
        - `ValueError`: if two equally specific rules meet on a parameter, or if
            `strict` and a parameter has none.
        """
        selectors = self.selectors.decode()
        filtered = boolean(filtered, "filtered")
        found = resolve(model, selectors, argument="rules", filtered=filtered)
        owners = []
        for (path, leaf), rule in zip(by_path(model), found, strict=True):
            if rule is not None:
                owners.append(None if self.transforms[rule] is None else rule)
                continue
            if self.strict and (is_inexact(leaf) or is_float(leaf)):
                what = ", a Python float," if is_float(leaf) else ""
                raise ValueError(
                    f"`rules`: {path!r}{what} has no rule, and `strict=True`. "
                    "Give it one by its own path: `None` to freeze it."
                )
            has_default = self.default is not None and is_inexact(leaf)
            owners.append(len(self.transforms) if has_default else None)
        return tuple(owners)

    def name_of(self, owner: int) -> str:
        """Names a group: by the selector of its rule, or `default`."""
        selectors = self.selectors.decode()
        owner = whole_number(owner, "owner", least=0, most=len(selectors))
        if owner == len(selectors):
            return "default"
        members = _members(selectors[owner])
        return ", ".join(m if isinstance(m, str) else _named(m) for m in members)

    def init(self, params: Any) -> ParamOptimiserState:
        """Makes the first state.

        **Arguments:**

        - `params`: a whole model, a filtered one, or a dictionary.
        """
        if type(params).__name__ == "_ParamsPlaceholder":
            # What `optax.tree_map_params` puts in the place of all parameters.
            first = None if self.first is None else self.first.init(params)
            states = tuple(tx.init(params) for tx in self._groups())
            static: Any = _Learned(), _Learned(), _Learned()
            return ParamOptimiserState(first, states, *static)
        owners = self.owners(params, filtered=True)
        trained = OrderedDict(by_path(parameters(params, owners)))
        paths = tuple(trained)
        groups = tuple(owner for owner in owners if owner is not None)
        leaves = list(trained.values())
        states = init_groups(self._groups(), groups, paths, leaves)
        first = None if self.first is None else self.first.init(trained)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        return ParamOptimiserState(first, states, paths, shapes, groups)

    def update(
        self,
        updates: Any,
        state: ParamOptimiserState,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, ParamOptimiserState]:
        """Turns gradients into updates, each by its own rule.

        **Arguments:**

        - `updates`: the gradients, a tree like the parameters.
        - `state`: the state of the step before.
        - `params`: the parameters; a whole model will do.
        - `**extra`: `value`, `grad`, `value_fn` and whatever else a transformation
            asks for.

        **Returns:**

        The updates, zero where a parameter is frozen, and the new state.
        """
        if not isinstance(state, ParamOptimiserState):
            raise TypeError(
                f"`state` is of type `{type(state).__name__}`, not the state of a "
                "ParamOptimiser. Give what its `init` or its last `update` returned."
            )
        static = map(_known, (state.paths, state.shapes, state.owners))
        state = ParamOptimiserState(state.first, state.groups, *static)
        flat = by_path(updates)
        grads = _own(dict(flat), state.paths, "updates")
        _check_shapes(grads, state, "updates")
        values = None
        if params is not None:
            values = _own(dict(by_path(params)), state.paths, "params")
            _check_shapes(values, state, "params")
        extras = _Extras(extra, params, state.paths)

        first = state.first
        if self.first is not None:
            everyone = tuple(range(len(state.paths)))
            grads, first = self.first.update(
                grads, first, values, **extras.of(everyone, state.paths)
            )
        moved, groups = update_groups(
            self._groups(),
            state.owners,
            state.paths,
            list(grads.values()),
            state.groups,
            None if values is None else list(values.values()),
            extras.of,
        )
        scales = (*self.scales, None)
        scaled = {
            path: update if (scale := scales[owner]) is None else _scaled(update, scale)
            for path, update, owner in zip(
                state.paths, moved, state.owners, strict=True
            )
        }
        new = [scaled[path] if path in scaled else _still(grad) for path, grad in flat]
        return jax.tree.structure(updates).unflatten(new), ParamOptimiserState(
            first, groups, state.paths, state.shapes, state.owners
        )

    def _groups(self) -> list[optax.GradientTransformation]:
        # A frozen rule keeps its place, so that rules and groups have the same index.
        rules = [optax.set_to_zero() if tx is None else tx for tx in self.transforms]
        return rules if self.default is None else [*rules, self.default]  # pyright: ignore[reportReturnType]

    def split(self, model: T) -> tuple[T, T]:
        """Splits a model into what the rules train and what is frozen.

        **Returns:**

        The pair `(trainable, frozen)`, each with `None` in the place of the other.
        """
        return keep(model, [owner is not None for owner in self.owners(model)])

    def with_scale(self, scales: Mapping[Any, ArrayLike]) -> "ParamOptimiser":
        """Multiplies the updates of some rules by a factor, which is 1 unless set.

        The factors are array leaves: other values compile nothing anew, and they can
        be vmapped and differentiated.

        **Arguments:**

        - `scales`: from selectors, as the rules have them, to scalars. A rule with a
            tuple is named by any of its members.

        **Raises:**

        - `UnknownPathError`: if there is no rule of that name.
        """
        if not isinstance(scales, Mapping):
            raise TypeError(
                f"`scales` is {scales!r}, but must map rules to factors: "
                '`{"power": 0.1}`.'
            )
        names: dict[Any, int] = {}
        for index, selector in enumerate(self.selectors.decode()):
            names.setdefault(selector, index)
            for member in _members(selector):
                names.setdefault(member, index)
        new = list(self.scales)
        for name, value in scales.items():
            if name not in names:
                known = [n for n in names if isinstance(n, str)]
                raise UnknownPathError(
                    f"`scales`: there is no rule {name!r}. "
                    f"{nearest_names(str(name), known)}"
                )
            if self.transforms[names[name]] is None:
                raise ValueError(
                    f"`scales`: the rule {name!r} freezes its parameters: there is no "
                    "update to scale."
                )
            is_number = isinstance(value, jax.Array | np.ndarray | np.generic | float)
            if not (is_number or isinstance(value, int)) or jnp.shape(value) != ():
                raise ValueError(
                    f"`scales[{name!r}]` is {value!r}, but must be one number. For a "
                    "factor per element, see `vernal.precondition`."
                )
            refuse_foreign(value, f"`scales[{name!r}]`")
            new[names[name]] = _as_scale(value)
        return eqx.tree_at(lambda o: o.scales, self, tuple(new))

    def summary(self, model: Any) -> str:
        """Tabulates each parameter of a model: shape, dtype, rule, transformation.

        What looks like a parameter and is not fitted is listed too: Python floats
        without a rule of their own, Python ints, integer arrays of few elements.
        """
        selectors = (*self.selectors.decode(), "default")
        rules = (*self.transforms, self.default)
        rows = [("parameter", "shape", "dtype", "rule", "transformation")]
        owners = self.owners(model)
        leaves = [leaf for leaf in named_leaves(model) if leaf.value is not None]
        for leaf, owner in zip(leaves, owners, strict=True):
            rule, name = leaf.unfitted, ""
            if owner is not None:
                rule, name = _named(selectors[owner]), _describe(rules[owner])
            if rule:
                shape = "×".join(map(str, jnp.shape(leaf.value))) or "scalar"
                dtype = getattr(leaf.value, "dtype", None)
                # By its type: an integer may need more bits than there are.
                dtype = dtype or jnp.result_type(type(leaf.value))
                rows.append((leaf.path, shape, str(dtype), rule, name))
        return aligned(rows)


class _Extras:
    """Extra arguments, and what of them one group of parameters is given."""

    def __init__(self, extra: Mapping[str, Any], params: Any, paths: Sequence[str]):
        self.extra = dict(extra)
        self.params = params
        self.paths = paths
        if "grad" in extra:
            self.grad = _own(dict(by_path(extra["grad"])), paths, "grad")

    def of(self, members: tuple[int, ...], names: Sequence[str]) -> dict[str, Any]:
        given = dict(self.extra)
        own = [names[index] for index in members]
        if "grad" in given:
            given["grad"] = OrderedDict((name, self.grad[name]) for name in own)
        if given.get("value_fn") is not None:
            given["value_fn"] = self._value_fn(given["value_fn"])
        return given

    def _value_fn(self, value_fn: Callable[..., Array]) -> Callable[..., Array]:
        if self.params is None:
            raise ValueError(
                "`update` was given `value_fn` without `params`: the value depends on "
                "all parameters. Call `update(grads, state, params, value_fn=...)`."
            )
        flat, structure = by_path(self.params), jax.tree.structure(self.params)

        # A line search passes on the arguments that it finds in the signature.
        @ft.wraps(value_fn)
        def within(group: Mapping[str, Array], *args: Any, **kwargs: Any) -> Array:
            leaves = [group.get(path, leaf) for path, leaf in flat]
            return value_fn(structure.unflatten(leaves), *args, **kwargs)

        return within


# What stands around other transformations, and says nothing of what they do.
_WRAPPERS = ("chain", "identity", "init_empty_state", "with_extra_args_support")


def _own(
    leaves: Mapping[str, Any], paths: Sequence[str], name: str
) -> OrderedDict[str, Any]:
    missing = [path for path in paths if path not in leaves]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"`{name}` has no leaf at {', '.join(map(repr, missing[:3]))}{more}, which "
            "the optimiser was initialised with. Give a tree like the one that `init` "
            "was given."
        )
    return OrderedDict((path, leaves[path]) for path in paths)


def _check_shapes(
    leaves: Mapping[str, Any], state: ParamOptimiserState, name: str
) -> None:
    for (path, leaf), shape in zip(leaves.items(), state.shapes, strict=True):
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"`{name}`: the leaf {path!r} has shape {jnp.shape(leaf)}, but the "
                f"optimiser was initialised with shape {shape}."
            )


def _as_scale(value: ArrayLike) -> Array:
    # One dtype for all, so that a factor which was set has the type of one that was
    # not; it takes that of the update where it is used.
    dtype = jnp.result_type(float)
    if isinstance(value, jax.Array):
        return strong(value.astype(dtype))
    return jnp.asarray(np.asarray(value, dtype))


def _scaled(update: Array, scale: Array) -> Array:
    return update * scale.astype(update.dtype)


def _still(grad: Any) -> Any:
    return jnp.zeros_like(grad) if hasattr(grad, "dtype") else grad


def _members(selector: Any) -> list[Any]:
    if isinstance(selector, tuple):
        return [atom for part in selector for atom in _members(part)]
    return [selector]


def _named(selector: Any) -> str:
    if isinstance(selector, tuple):
        return f"({', '.join(map(_named, selector))})"
    if isinstance(selector, str):
        return repr(selector)
    return getattr(selector, "__name__", repr(selector))


def _describe(tx: AbstractTransform | None) -> str:
    """Names the Optax functions that a transformation was made by."""
    if not isinstance(tx, Transform):
        return type(tx).__name__
    names = sorted(tx.closure.skeleton.function_names)
    makers = dict.fromkeys(name.split(".<locals>")[0] for name in names)
    return ", ".join(name for name in makers if name not in _WRAPPERS)
