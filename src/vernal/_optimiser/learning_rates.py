"""The learning rates of an optimiser, read off its functions and its state."""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from .._boundary import PyTree, dotted
from .._projection import EigenProjector
from .._tree import by_path, paths
from .groups import group_leaves, group_members
from .param_optimiser import ParamOptimiser
from .partition import leaf_owners, named_tree
from .transform import Transform


def learning_rates(
    optimiser: Any,
    opt_state: PyTree,
    params: PyTree,
    projector: EigenProjector | None,
    latent: PyTree,
) -> dict[str, float | None]:
    """Implements `Trainer.learning_rates`."""
    point = params if projector is None else latent
    start = jax.tree.map(lambda _: Factor(), point)
    ends = _through(optimiser.update, opt_state, start, point)
    rates = [factor.rate for factor in jax.tree.leaves(ends)]
    names = paths(params)
    if projector is not None:
        of_leaf = {
            index: rate
            for block, rate in zip(projector._blocks, rates, strict=True)
            for index in block
        }
        rates = [of_leaf[index] for index in range(len(names))]
    return dict(zip(names, rates, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Factor:
    """What the gradient of one parameter has been multiplied by so far.

    `value` is `None` if that cannot be told; `told`: whether there was a rate in it.
    """

    value: float | None = 1.0
    told: bool = False

    @property
    def rate(self) -> float | None:
        """The rate of descent."""
        # Subtracted, so that no zero is negative.
        return 0.0 - self.value if self.told and self.value is not None else None

    def times(self, number: float | None, *, told: bool = True) -> "Factor":
        """The factor after one more."""
        if self.value is None or number is None:
            return _UNKNOWN
        return Factor(self.value * number, self.told or told)

    def normalised(self) -> "Factor":
        """The factor after what makes the same updates of gradients of any scale."""
        # What is zero stays so: of the gradient there is nothing left.
        if not self.value:
            return self
        return Factor(math.copysign(1.0, self.value))

    def if_normal(self) -> "Factor":
        """The factor after what normalises some gradients, and others not."""
        return self if self.value in (-1.0, 0.0, 1.0) else _UNKNOWN


_UNKNOWN = Factor(None)

# A step through one transformation: what is in its function's cells, its state, the
# factors as a tree like the parameters, the parameters; to the factors after it.
Cells = Mapping[str, Any]
Step = Callable[[Cells, Any, Any, Any], Any]


def _through(update: Any, state: Any, factors: Any, params: Any) -> Any:
    """Follows the factors through one transformation."""
    owner = getattr(update, "__self__", None)
    if isinstance(owner, Transform):
        return _through(owner._decode().update, state, factors, params)
    if isinstance(owner, ParamOptimiser):
        return _by_rule(owner, state, factors, params)
    step = _STEPS.get(_maker(update))
    if step is None:
        return _each(lambda _: _UNKNOWN, factors)
    return step(_cells(update), state, factors, params)


def _maker(fn: Any) -> str:
    """Names the function that made this one, by its code: wrappers copy names."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return ""
    package = fn.__globals__.get("__name__", "").split(".")[0]
    return f"{package}.{code.co_qualname.split('.<locals>')[0]}"


def _cells(fn: Any) -> Cells:
    contents = (cell.cell_contents for cell in fn.__closure__ or ())
    return dict(zip(fn.__code__.co_freevars, contents, strict=True))


def _each(fn: Callable[[Factor], Factor], factors: Any) -> Any:
    return jax.tree.map(fn, factors)


def _number(value: Any) -> float | None:
    """A real number as a float, and `None` for what is none."""
    array = np.asarray(value)
    return float(array) if array.shape == () and array.dtype.kind != "c" else None


# Transformations of gradients.


def _scale(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    number = _number(cells["step_size"])
    return _each(lambda factor: factor.times(number), factors)


def _schedule(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    number = _number(cells["step_size_fn"](state.count))
    return _each(lambda factor: factor.times(number), factors)


def _optimistic(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    number = _number(cells["alpha"])
    return _each(lambda factor: factor.times(number, told=False), factors)


def _unit_norm(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    number = _number(cells["scale_factor"])
    return _each(lambda f: f.normalised().times(number, told=False), factors)


def _stop(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _each(lambda _: Factor(0.0, told=True), factors)


def _keep(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return factors


def _normalise(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _each(Factor.normalised, factors)


def _normalise_some(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _each(Factor.if_normal, factors)


def _function(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    is_known = _maker(cells["f"]) == "vernal.precondition"
    return factors if is_known else _each(lambda _: _UNKNOWN, factors)


# Transformations of transformations.


def _chain(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    for update, inner in zip(cells["update_fns"], state, strict=True):
        factors = _through(update, inner, factors, params)
    return factors


def _named_chain(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    for name, tx in cells["transforms"]:
        factors = _through(tx.update, state[name], factors, params)
    return factors


def _with_extra_args(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _through(cells["tx"].update, state, factors, params)


def _inside(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _through(cells["inner"].update, state.inner_state, factors, params)


def _window(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    count, stop = _number(state.count), cells["stop"]
    if count is None:
        return _each(lambda _: _UNKNOWN, factors)
    if count < cells["start"] or (stop is not None and count >= stop):
        return _stop(cells, state, factors, params)
    return _inside(cells, state, factors, params)


def _flatten(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    found = set(jax.tree.leaves(factors))
    if len(found) != 1:
        return _each(lambda _: _UNKNOWN, factors)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    after = _through(cells["inner"].update, state, found.pop(), flat)
    return _each(lambda _: after, factors)


def _inject(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    values = dict(state.hyperparams)
    for name, schedule in cells["sched_hps"].items():
        # Any other may ask for what only the next step knows, e.g. the loss.
        if type(schedule) is not optax.schedules.WrappedSchedule:
            return _each(lambda _: _UNKNOWN, factors)
        values[name] = schedule(state.hyperparams_states[name])
    tx = cells["inner_factory"](**cells["other_hps"], **values)
    return _through(tx.update, state.inner_state, factors, params)


def _masked(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    mask = cells["mask"]
    found = jax.tree.leaves(jax.tree.map(callable, mask))
    mask = mask(params) if found and all(found) else mask
    return _under_mask(cells["inner"], mask, state, factors, params)


def _under_mask(tx: Any, mask: Any, state: Any, factors: Any, params: Any) -> Any:
    node = optax.MaskedNode()
    shown, own = (
        jax.tree.map(lambda m, x: x if m else node, mask, tree)
        for tree in (factors, params)
    )
    after = _through(tx.update, state.inner_state, shown, own)
    return jax.tree.map(lambda m, new, old: new if m else old, mask, after, factors)


def _partition(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    labels = cells["param_labels"]
    labels = labels(params) if callable(labels) else labels
    for group, tx in cells["transforms"].items():
        mask = jax.tree.map(lambda label, own=group: label == own, labels)
        inner = state.inner_states[group]
        factors = _under_mask(tx, mask, inner, factors, params)
    return factors


def _own_partition(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    transforms = cells["transforms"]
    names, values, treedef = named_tree(params)
    owners = leaf_owners(cells["param_labels"], params, names, transforms)
    states = [state.inner_states[label].inner_state for label in transforms]
    old = jax.tree.leaves(factors)
    updates = [tx.update for tx in transforms.values()]
    return treedef.unflatten(_in_groups(updates, states, owners, names, old, values))


def _in_groups(
    updates: Sequence[Any],
    states: Sequence[Any],
    owners: Sequence[int | None],
    names: Sequence[str],
    factors: Sequence[Factor],
    params: Sequence[Any],
) -> list[Factor]:
    """Follows each group through its own transformation; without one it rests."""
    after = [Factor(0.0, told=True) for _ in factors]
    members = group_members(owners, len(updates))
    for update, state, own in zip(updates, states, members, strict=True):
        shown, values = (group_leaves(own, names, x) for x in (factors, params))
        new = _through(update, state, shown, values)
        for index in own:
            after[index] = new[names[index]]
    return after


def _by_rule(optimiser: ParamOptimiser, state: Any, factors: Any, params: Any) -> Any:
    own, like = (_picked(tree, state.paths) for tree in (factors, params))
    if optimiser.first is not None:
        own = _through(optimiser.first.update, state.first, own, like)
    after = _in_groups(
        [tx.update for tx in optimiser._groups()],
        state.groups,
        state.owners,
        state.paths,
        [own[path] for path in state.paths],
        list(like.values()),
    )
    # The default, after the rules, has no scale.
    scales = [*map(_number, optimiser.scales), 1.0]
    scaled = {
        path: factor.times(scales[owner], told=False)
        for path, factor, owner in zip(state.paths, after, state.owners, strict=True)
    }
    still = Factor(0.0, told=True)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: scaled.get(dotted(keys), still), factors
    )


def _picked(tree: Any, names: Sequence[str]) -> OrderedDict[str, Any]:
    found = dict(by_path(tree))
    return OrderedDict((name, found[name]) for name in names)


# What each function of Optax, and of this package, does to a factor. Of all others,
# those of a user among them, nobody knows.
_STEPS: dict[str, Step] = {
    "optax.scale": _scale,
    "optax.scale_by_schedule": _schedule,
    "optax.scale_by_optimistic_gradient": _optimistic,
    "optax.normalize_by_update_norm": _unit_norm,
    "optax.set_to_zero": _stop,
    "optax.stateless": _function,
    "optax.chain": _chain,
    "optax.named_chain": _named_chain,
    "optax.with_extra_args_support": _with_extra_args,
    "optax.apply_if_finite": _inside,
    "optax.flatten": _flatten,
    "optax.inject_hyperparams": _inject,
    "optax.masked": _masked,
    "optax.partition": _partition,
    "vernal.partition": _own_partition,
    "vernal.window": _window,
} | {
    f"optax.{name}": step
    for step, names in (
        (
            _keep,
            (
                "adaptive_grad_clip",
                "add_decayed_weights",
                "add_noise",
                "centralize",
                "clip",
                "clip_by_block_rms",
                "clip_by_global_norm",
                "ema",
                "identity",
                "keep_params_nonnegative",
                "monitor",
                "scale_by_param_block_norm",
                "scale_by_param_block_rms",
                "scale_by_shape",
                "snapshot",
                "trace",
                "zero_nans",
            ),
        ),
        (
            _normalise,
            (
                "normalize",
                "scale_by_acprop",
                "scale_by_adadelta",
                "scale_by_adam",
                "scale_by_adamax",
                "scale_by_ademamix",
                "scale_by_adan",
                "scale_by_adopt",
                "scale_by_amsgrad",
                "scale_by_belief",
                "scale_by_factored_rms",
                "scale_by_lbfgs",
                "scale_by_lion",
                "scale_by_muon",
                "scale_by_novograd",
                "scale_by_rms",
                "scale_by_rss",
                "scale_by_sign",
                "scale_by_simplified_ademamix",
                "scale_by_sm3",
                "scale_by_stddev",
                "scale_by_yogi",
            ),
        ),
        (_normalise_some, ("scale_by_radam", "scale_by_trust_ratio")),
    )
    for name in names
}
