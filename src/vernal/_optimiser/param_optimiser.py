"""An Optax optimiser for each parameter, by path."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike

from .._boundary import (
    boolean,
    first_names,
    nearest_names,
    refuse_foreign,
    whole_number,
)
from .._closure import Closure
from .._tree import (
    NamedTree,
    UnknownPathError,
    atoms,
    by_path,
    is_float,
    is_inexact,
    keep,
    parameters,
    require_atoms,
    resolve,
    strong,
    written,
)
from .groups import Group, listed, make_groups, update_groups
from .param_optimiser_state import Learned, ParamOptimiserState, Rules, known
from .rule_names import rule_name, rule_table
from .transform import AbstractTransform, as_transform

T = TypeVar("T")


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

    It is a pytree whose leaves are the rates: other rates compile nothing again. To
    Optax it is a `GradientTransformationExtraArgs`: it works in `optax.chain`, in
    `optimistix.OptaxMinimiser`, in the fit loops of other libraries. A transformation
    sees only its own parameters, in an ordered dictionary by path. An extra argument
    `value_fn` (for a line search, as in `optax.lbfgs`) becomes a function of these; the
    other parameters are held at their values.
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
        - `default`: the transformation of the parameters without a rule; `None` freezes
            them.
        - `strict`: whether a parameter without a rule is an error.

        **Raises:**

        - `TypeError`: if a rule is not an Optax transformation.
        - `UnknownPathError`: if a selector is an empty tuple.
        """
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"`rules` is of type `{type(rules).__name__}`, but must map selectors "
                'to Optax transformations: `{"power": optax.adam(1e-2)}`. For one '
                "transformation of everything: `ParamOptimiser({}, default=...)`."
            )
        require_atoms(rules, "rules")
        self.selectors = Closure.encode(tuple(rules))
        self.transforms = tuple(
            None if tx is None else as_transform(tx, f"rules[{written(selector)}]")
            for selector, tx in rules.items()
        )
        self.scales = tuple(_as_scale(1.0) for _ in rules)
        self.first = None if first is None else as_transform(first, "first")
        self.default = None if default is None else as_transform(default, "default")
        self.strict = boolean(strict, "strict")

    def owners(self, model: Any, *, filtered: bool = False) -> tuple[int | None, ...]:
        """Finds the group of each leaf of a model, `None` if it is frozen.

        Group `i` is that of rule `i`; the group after the last rule is the default.

        **Arguments:**

        - `model`: any pytree.
        - `filtered`: whether some leaves may have been replaced by `None`, so that a
            rule which matches only these is allowed.

        **Raises:**

        - `UnknownPathError`: if a rule matches nothing.
        - `ValueError`: if two equally specific rules meet on a parameter, or if
            `strict` and a parameter has none.
        """
        selectors = self.selectors.decode()
        filtered = boolean(filtered, "filtered")
        found = resolve(model, selectors, argument="rules", filtered=filtered)
        owners = []
        for (path, leaf), rule in zip(by_path(model).items(), found, strict=True):
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

    @property
    def rules(self) -> Rules:
        """What decides, of any model, which group a leaf belongs to."""
        frozen = tuple(tx is None for tx in (*self.transforms, self.default))
        return Rules((self.selectors.skeleton, frozen))

    def name_of(self, owner: int) -> str:
        """Names a group: by the selector of its rule, or `default`."""
        selectors = self.selectors.decode()
        owner = whole_number(owner, "owner", least=0, most=len(selectors))
        return "default" if owner == len(selectors) else rule_name(selectors[owner])

    def init(self, params: Any) -> ParamOptimiserState:
        """Makes the first state.

        **Arguments:**

        - `params`: a whole model, a filtered one, or a dictionary.
        """
        if type(params).__name__ == "_ParamsPlaceholder":  # of `optax.tree_map_params`
            first = None if self.first is None else self.first.init(params)
            groups = rule_groups(self, (), ())
            states = tuple(group.transform.init(params) for group in groups)
            static: Any = *(Learned() for _ in range(3)), self.rules
            return ParamOptimiserState(first, states, *static)
        found = self.owners(params, filtered=True)
        names, leaves, _ = by_path(parameters(params, found))
        trained = OrderedDict(zip(names, leaves, strict=True))
        owners = tuple(owner for owner in found if owner is not None)
        groups = rule_groups(self, owners, names)
        states = tuple(group.init(trained) for group in groups)
        first = None if self.first is None else self.first.init(trained)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        return ParamOptimiserState(first, states, names, shapes, owners, self.rules)

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
        - `params`: the parameters, or a whole model.
        - `**extra`: `value`, `grad`, `value_fn` and any other argument of the
            transformations.

        **Returns:**

        The updates, zero where a parameter is frozen, and the new state.
        """
        if not isinstance(state, ParamOptimiserState):
            raise TypeError(
                f"`state` is of type `{type(state).__name__}`, not the state of a "
                "ParamOptimiser. Give what its `init` or its last `update` returned."
            )
        paths, shapes, owners = map(known, (state.paths, state.shapes, state.owners))
        like = dict(zip(paths, shapes, strict=True))
        tree = by_path(updates)
        grads = _own(tree, like, "updates")
        whole = values = None
        if params is not None:
            whole = by_path(params)
            values = _own(whole, like, "params")
        extra_of = _extra_of(extra, whole, like)
        first = state.first
        if self.first is not None:
            grads, first = self.first.update(grads, first, values, **extra_of(paths))
        groups = state_groups(self, state, updates)
        moved, states = update_groups(groups, grads, values, extra_of)
        for path, owner in zip(paths, owners, strict=True):
            # The default, after the rules, has no scale.
            if owner < len(self.scales):
                moved[path] *= self.scales[owner].astype(moved[path].dtype)
        new = [
            moved[path] if path in moved else _still(grad)
            for path, grad in tree.items()
        ]
        new_state = ParamOptimiserState(
            first, states, paths, shapes, owners, state.rules
        )
        return tree.structure.unflatten(new), new_state

    def split(self, model: T) -> tuple[T, T]:
        """Splits a model into what the rules train and what is frozen.

        **Returns:**

        The pair `(trainable, frozen)`, each with `None` in the place of the other.
        """
        return keep(model, self.owners(model))

    def with_scale(self, scales: Mapping[Any, ArrayLike]) -> "ParamOptimiser":
        """Multiplies the updates of some rules by a factor, which is 1 unless set.

        The factors are array leaves: other values compile nothing again, and they can
        be vmapped and differentiated.

        **Arguments:**

        - `scales`: from selectors of the rules to scalars. Any member of a tuple of
            selectors names its rule.

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
            for name in (selector, *atoms(selector, "rules")):
                names.setdefault(name, index)
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
            numbers = jax.Array | np.ndarray | np.generic | float | int
            if not isinstance(value, numbers) or jnp.shape(value) != ():
                raise ValueError(
                    f"`scales[{name!r}]` is {value!r}, but must be one number. For a "
                    "factor per element, see `vernal.precondition`."
                )
            refuse_foreign(value, f"`scales[{name!r}]`")
            new[names[name]] = _as_scale(value)
        return eqx.tree_at(lambda o: o.scales, self, tuple(new))

    def summary(self, model: Any) -> str:
        """Tabulates each parameter of a model: shape, dtype, rule, transformation.

        Leaves that look like parameters and are not fitted are listed too: Python
        floats without a rule, Python ints, integer arrays of few elements.
        """
        selectors = (*self.selectors.decode(), "default")
        transforms = (*self.transforms, self.default)
        return rule_table(model, self.owners(model), selectors, transforms)


def rule_groups(
    optimiser: ParamOptimiser,
    owners: Sequence[int],
    paths: Sequence[str],
    states: Sequence[Any] | None = None,
) -> list[Group]:
    """Makes the group of each rule, and of the default, as in the optimiser's state."""
    # A frozen rule keeps its place, so that rules and groups have the same index.
    still: Any = optax.set_to_zero()
    rules = [still if tx is None else tx for tx in optimiser.transforms]
    if optimiser.default is not None:
        rules.append(optimiser.default)
    return make_groups(rules, owners, paths, states)


def state_groups(
    optimiser: ParamOptimiser, state: ParamOptimiserState, like: Any
) -> list[Group]:
    """Makes the groups of a state, for a tree like the parameters.

    Refuses the state of other rules, by which parameters would move at other rates.
    """
    paths, owners = known(state.paths), known(state.owners)
    if state.rules.key != optimiser.rules.key:
        names, own = by_path(like).names, optimiser.owners(like, filtered=True)
        found = dict(zip(names, own, strict=True))
        frozen = [i for i, tx in enumerate(optimiser.transforms) if tx is None]
        expected = [None if owner in frozen else owner for owner in owners]
        count = len(rule_groups(optimiser, (), ()))
        if len(state.groups) != count or [*map(found.get, paths)] != expected:
            groups = "; ".join(listed(members) for members in state.members if members)
            rules = "; ".join(f"`{optimiser.name_of(i)}`" for i in range(count))
            raise ValueError(
                f"The state of the optimiser is that of other rules: for {groups}. "
                f"Its rules, in their order, are now {rules}. Give a trainer another "
                "optimiser by `trainer.replace(optimiser=...)`, not by `eqx.tree_at`: "
                "it keeps the state of each rule. In a loop of your own, begin with "
                "what `init` returns."
            )
    return rule_groups(optimiser, owners, paths, state.groups)


def _extra_of(
    extra: Mapping[str, Any], params: NamedTree | None, shapes: Mapping[str, Any]
) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Returns a function from the members of a group to its extra arguments."""
    given = dict(extra)
    if given.get("value_fn") is not None:
        if params is None:
            raise ValueError(
                "`update` was given `value_fn` without `params`: the value depends on "
                "all parameters. Call `update(grads, state, params, value_fn=...)`."
            )
        given["value_fn"] = params.within(given["value_fn"])
    if "grad" not in given:
        return lambda members: given
    grads = _own(by_path(given["grad"]), shapes, "grad")
    own = lambda members: OrderedDict((name, grads[name]) for name in members)
    return lambda members: given | {"grad": own(members)}


def _own(
    tree: NamedTree, shapes: Mapping[str, Any], name: str
) -> OrderedDict[str, Any]:
    """Returns the trained leaves of a tree, given their shapes by path."""
    leaves = tree.by_name()
    if missing := [path for path in shapes if path not in leaves]:
        raise ValueError(
            f"`{name}` has no leaf at {first_names(missing)}, which the optimiser was "
            "initialised with. Give a tree like the one that `init` was given."
        )
    for path, shape in shapes.items():
        if jnp.shape(leaves[path]) != shape:
            raise ValueError(
                f"`{name}`: the leaf {path!r} has shape {jnp.shape(leaves[path])}, but "
                f"the optimiser was initialised with shape {shape}."
            )
    return OrderedDict((path, leaves[path]) for path in shapes)


def _as_scale(value: ArrayLike) -> Array:
    # One dtype for all, so that setting one compiles nothing. Where it is used it is
    # cast to the dtype of the update.
    dtype = jnp.result_type(float)
    if isinstance(value, jax.Array):
        return strong(value.astype(dtype))
    return jax.device_put(np.array(value, dtype))


def _still(grad: Any) -> Any:
    return jnp.zeros_like(grad) if hasattr(grad, "dtype") else grad
