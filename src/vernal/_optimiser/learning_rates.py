"""The learning rates of an optimiser, read off its functions and its state."""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from .._boundary import PyTree
from .._projection import EigenProjector
from .._tree import ByName, by_path, paths, uniquely_named
from .groups import Group, Leaves
from .makers import maker
from .param_optimiser import ParamOptimiser, state_groups
from .partition import partition_groups
from .rate_check import Cells, cells
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
            for block, rate in zip(projector.blocks, rates, strict=True)
            for index in block
        }
        rates = [of_leaf[index] for index in range(len(names))]
    return ByName(zip(names, rates, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Factor:
    """What the gradient of one parameter has been multiplied by so far.

    `value` is `None` if it is not known. `has_rate`: whether a rate is part of it.
    """

    value: float | None = 1.0
    has_rate: bool = False

    @property
    def rate(self) -> float | None:
        """Returns the rate of descent."""
        # Subtracted, so that no zero is negative.
        return 0.0 - self.value if self.has_rate and self.value is not None else None

    def times(self, number: float | None, *, has_rate: bool = True) -> "Factor":
        """Returns the factor after one more."""
        if self.value is None or number is None:
            return _UNKNOWN
        return Factor(self.value * number, self.has_rate or has_rate)

    def normalised(self) -> "Factor":
        # Zero stays zero: nothing is left of the gradient.
        if not self.value:
            return self
        return Factor(math.copysign(1.0, self.value))

    def if_normal(self) -> "Factor":
        """Returns the factor after only some gradients are normalised."""
        return self if self.value in (-1.0, 0.0, 1.0) else _UNKNOWN


_UNKNOWN = Factor(None)
_ZERO = Factor(0.0, has_rate=True)
_same, _lost = lambda factor: factor, lambda factor: _UNKNOWN


def _through(update: Any, state: Any, factors: Any, params: Any) -> Any:
    """Returns the factors after one transformation."""
    owner = getattr(update, "__self__", None)
    if isinstance(owner, Transform):
        return _through(owner.decode().update, state, factors, params)
    if isinstance(owner, ParamOptimiser):
        return _by_rule(owner, state, factors, params)
    name = maker(update)
    if name in _AROUND_OTHERS:
        return _AROUND_OTHERS[name](cells(update), state, factors, params)
    if name in _OF_GRADIENTS:
        return jax.tree.map(_OF_GRADIENTS[name](cells(update), state), factors)
    return _unknown(factors)


def _unknown(factors: Any) -> Any:
    return jax.tree.map(_lost, factors)


def _number(value: Any) -> float | None:
    """Returns a real number as a float, and `None` for anything else."""
    array = np.asarray(value)
    return float(array) if array.shape == () and array.dtype.kind != "c" else None


# Transformations of gradients.


def _times(number: Any, *, has_rate: bool = True) -> Callable[[Factor], Factor]:
    value = _number(number)
    return lambda factor: factor.times(value, has_rate=has_rate)


def _to_norm(cells: Cells, state: Any) -> Callable[[Factor], Factor]:
    scaled = _times(cells["scale_factor"], has_rate=False)
    return lambda factor: scaled(factor.normalised())


_KEEP = """
    adaptive_grad_clip add_decayed_weights add_noise centralize clip clip_by_block_rms
    clip_by_global_norm ema identity keep_params_nonnegative monitor
    scale_by_param_block_norm scale_by_param_block_rms scale_by_shape snapshot trace
    zero_nans
"""
_NORMALISE = """
    normalize scale_by_acprop scale_by_adadelta scale_by_adam scale_by_adamax
    scale_by_ademamix scale_by_adan scale_by_adopt scale_by_amsgrad scale_by_belief
    scale_by_factored_rms scale_by_lbfgs scale_by_lion scale_by_muon scale_by_novograd
    scale_by_rms scale_by_rss scale_by_sign scale_by_simplified_ademamix scale_by_sm3
    scale_by_stddev scale_by_yogi
"""
_NORMALISE_SOME = "scale_by_radam scale_by_trust_ratio"

# What a transformation does to a factor, given its cells and its state. That of all
# others, those of a user among them, is not known.
_OF_GRADIENTS: dict[str, Callable[[Cells, Any], Callable[[Factor], Factor]]] = {
    "optax.scale": lambda cells, _: _times(cells["step_size"]),
    "optax.scale_by_schedule": lambda cells, state: _times(
        cells["step_size_fn"](state.count)
    ),
    "optax.scale_by_optimistic_gradient": lambda cells, _: _times(
        cells["alpha"], has_rate=False
    ),
    "optax.normalize_by_update_norm": _to_norm,
    "optax.set_to_zero": lambda *_: lambda _: _ZERO,
    "optax.stateless": lambda cells, _: (
        _same if maker(cells["f"]) == "vernal.precondition" else _lost
    ),
} | {
    f"optax.{name}": lambda *_, change=change: change
    for names, change in (
        (_KEEP, _same),
        (_NORMALISE, Factor.normalised),
        (_NORMALISE_SOME, Factor.if_normal),
    )
    for name in names.split()
}


# Transformations of transformations.


def _chain(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    for update, inner in zip(cells["update_fns"], state, strict=True):
        factors = _through(update, inner, factors, params)
    return factors


def _named_chain(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    for name, tx in cells["transforms"]:
        factors = _through(tx.update, state[name], factors, params)
    return factors


def _inside(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    return _through(cells["inner"].update, state.inner_state, factors, params)


def _window(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    count, stop = _number(state.count), cells["stop"]
    if count is None:
        return _unknown(factors)
    if count < cells["start"] or (stop is not None and count >= stop):
        return jax.tree.map(lambda _: _ZERO, factors)
    return _inside(cells, state, factors, params)


def _flatten(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    found = set(jax.tree.leaves(factors))
    if len(found) != 1:
        return _unknown(factors)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    after = _through(cells["inner"].update, state, found.pop(), flat)
    return jax.tree.map(lambda _: after, factors)


def _inject(cells: Cells, state: Any, factors: Any, params: Any) -> Any:
    values = dict(state.hyperparams)
    for name, schedule in cells["sched_hps"].items():
        # Others may need what only the next step knows, e.g. the loss.
        if type(schedule) is not optax.schedules.WrappedSchedule:
            return _unknown(factors)
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
    tree = uniquely_named(params)
    args = cells["transforms"], cells["param_labels"], params, tree.names, state
    old = tree._replace(leaves=jax.tree.leaves(factors))
    new = _in_groups(partition_groups(*args), old.by_name(), tree.by_name())
    return tree.structure.unflatten([new[name] for name in tree.names])


def _by_rule(optimiser: ParamOptimiser, state: Any, factors: Any, params: Any) -> Any:
    tree, values = by_path(factors), by_path(params).by_name()
    old, like = (
        OrderedDict((path, leaves[path]) for path in state.paths)
        for leaves in (tree.by_name(), values)
    )
    if optimiser.first is not None:
        old = _through(optimiser.first.update, state.first, old, like)
    groups = state_groups(optimiser, state, params)
    new = _in_groups(groups, old, like)
    # The default, after the rules, has no scale.
    scales = [*map(_number, optimiser.scales), 1.0]
    for path, owner in zip(state.paths, state.owners, strict=True):
        new[path] = new[path].times(scales[owner], has_rate=False)
    return tree.structure.unflatten([new.get(name, _ZERO) for name in tree.names])


def _in_groups(
    groups: Sequence[Group], factors: Leaves, params: Leaves
) -> dict[str, Factor]:
    """Returns the factors by name, after each group's own transformation."""
    new: dict[str, Factor] = {}
    for group in groups:
        update, own = group.transform.update, group.own
        new |= _through(update, group.state, own(factors), own(params))
    return new


# Those of Optax and of this package.
_AROUND_OTHERS: dict[str, Callable[[Cells, Any, Any, Any], Any]] = {
    "optax.chain": _chain,
    "optax.named_chain": _named_chain,
    "optax.with_extra_args_support": lambda cells, *args: _through(
        cells["tx"].update, *args
    ),
    "optax.apply_if_finite": _inside,
    "optax.flatten": _flatten,
    "optax.inject_hyperparams": _inject,
    "optax.masked": _masked,
    "optax.partition": _partition,
    "vernal.partition": _own_partition,
    "vernal.window": _window,
}
