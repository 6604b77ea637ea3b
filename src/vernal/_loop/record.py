"""What a fit records of each step."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from .._boundary import PyTree, nearest_names
from .._optimiser import ParamOptimiser
from .._pickling import PlainMethods
from .._step import AbstractTrainer, Outcome, metric_shapes, tied_words, tree_norm
from .._tree import UnknownPathError, by_path, paths, resolve

GRAD_NORM = "grad_norm"
GRAD_NORMS = "grad_norms"
UPDATE_RATIOS = "update_ratios"
LOSS = "loss"
_NORMS = (GRAD_NORM, GRAD_NORMS, UPDATE_RATIOS)

_AMBIGUOUS = (
    "{!r} is the name of {}, and of something else that can be recorded. Rename the "
    "one or the other."
)

COLUMNS = ("steps", "loss", "validation", "validation_steps")

# The name of each rule, and the leaves that it owns.
Rules = tuple[tuple[str, tuple[int, ...]], ...]


class LackingMetricError(UnknownPathError):
    """A loss does not return, for some batch, a metric that is recorded."""

    def __str__(self) -> str:
        name, metrics, *step = self.args
        where = f"at step {step[0]}" if step else "for a later batch"
        found = ", ".join(map(repr, metrics)) or "none"
        return (
            f"`record`: the loss returned no metric {name!r} {where}; there are "
            f"{found}. What is recorded must be returned for every batch: return "
            "`jnp.nan` where it has no value."
        )


class Record(PlainMethods, eqx.Module):
    """What is recorded beside the loss: static, and compared by value."""

    norms: tuple[str, ...] = eqx.field(static=True)
    rules: Rules = eqx.field(static=True)
    paths: tuple[str, ...] = eqx.field(static=True)
    metrics: tuple[str, ...] = eqx.field(static=True)
    others: tuple[str, ...] = eqx.field(static=True)
    """The other names in `record`: no metric may have one of them."""

    def __init__(self, trainer: AbstractTrainer, record: Any, batch: Callable[[], Any]):
        """`record` is the user's; `batch` returns a batch, or its shapes."""
        if isinstance(record, str) or callable(record):
            record = (record,)
        if not isinstance(record, tuple | list):
            raise TypeError(
                f"`record` is {record!r}, but must be a tuple of names and selectors: "
                '`record=("grad_norm", "mean")`.'
            )
        names = [name for name in record if isinstance(name, str)]
        self.norms = tuple(name for name in _NORMS if name in names)
        self.rules = _rules(trainer) if set(self.norms) - {GRAD_NORM} else ()
        chosen, metrics = [], []
        shapes = functools.cache(lambda: metric_shapes(trainer, batch()))
        for name in record:
            if isinstance(name, str) and name in _NORMS:
                continue
            try:
                chosen += _selected(trainer, name)
            except UnknownPathError:
                known = shapes()
                if name == LOSS and name not in known:
                    continue
                if name not in known:
                    all_known = [*paths(trainer.params), *known, *_NORMS]
                    raise UnknownPathError(
                        f"`record`: {name!r} is neither a parameter nor a metric that "
                        f"the loss returns. {nearest_names(str(name), all_known)}"
                    ) from None
                metrics.append(name)
        self.paths = tuple(dict.fromkeys(chosen))
        self.metrics = tuple(metrics)
        self.others = tuple(name for name in names if name not in metrics)
        parameters = paths(trainer.params)
        for name in self.norms:
            if name in parameters:
                raise ValueError(f"`record`: {_AMBIGUOUS.format(name, 'a parameter')}")
        for name in (*self.paths, *self.metrics):
            if name in COLUMNS:
                raise ValueError(
                    f"`record`: {name!r} is a column of every history, and cannot be "
                    "recorded as a parameter or a metric beside it. Rename that."
                )

    def values(self, old: PyTree, new: PyTree, outcome: Outcome) -> dict[str, Array]:
        """Picks what is recorded of a step from the parameters before and after it."""
        for name in self.others:
            if name in outcome.metrics:
                raise ValueError(f"`record`: {_AMBIGUOUS.format(name, 'a metric')}")
        norms = self._norms(old, new, outcome.grads)
        return norms | self._parameters(old) | self._picked(outcome.metrics)

    def shapes(
        self, trainer: AbstractTrainer, batch: Callable[[], Any]
    ) -> dict[str, Any]:
        """Returns the shape and dtype of each of the values."""
        norms = dict.fromkeys(self._norm_names(), trainer.best_loss)
        known = metric_shapes(trainer, batch()) if self.metrics else {}
        return norms | self._parameters(trainer.params) | self._picked(known)

    def _picked(self, metrics: dict[str, Any]) -> dict[str, Any]:
        if lacking := [name for name in self.metrics if name not in metrics]:
            raise LackingMetricError(lacking[0], tuple(metrics))
        return {name: metrics[name] for name in self.metrics}

    @property
    def names(self) -> str:
        """All that is recorded, in one text."""
        return ", ".join((*self.norms, *self.paths, *self.metrics))

    def _norm_names(self) -> Iterator[str]:
        for norm in self.norms:
            if norm == GRAD_NORM:
                yield norm
            else:
                # The name for one rule is in the singular.
                yield from (f"{norm[:-1]}[{name}]" for name, _ in self.rules)

    def _norms(self, old: PyTree, new: PyTree, grads: PyTree) -> dict[str, Array]:
        grads, old, new = map(jax.tree.leaves, (grads, old, new))
        pick = lambda leaves, members: [leaves[index] for index in members]

        def computed() -> Iterator[Array]:
            if GRAD_NORM in self.norms:
                yield tree_norm(grads)
            if GRAD_NORMS in self.norms:
                yield from (tree_norm(pick(grads, own)) for _, own in self.rules)
            if UPDATE_RATIOS in self.norms:
                for _, own in self.rules:
                    moved = [new[index] - old[index] for index in own]
                    yield tree_norm(moved) / tree_norm(pick(old, own))

        return dict(zip(self._norm_names(), computed(), strict=True))

    def _parameters(self, params: PyTree) -> dict[str, Array]:
        if not self.paths:
            return {}
        leaves = by_path(params).by_name()
        return {path: leaves[path] for path in self.paths}


def _selected(trainer: AbstractTrainer, selector: Any) -> list[str]:
    model = trainer.model
    owners = resolve(model, [selector], argument="record")
    trained = set(paths(trainer.params))
    both = zip(by_path(model).items(), owners, strict=True)
    named = [path for (path, _), owner in both if owner is not None]
    kept = [path for path in named if path in trained]
    if not kept:
        tied = tied_words(trainer)
        if named[0] in tied:
            raise ValueError(
                f"`record`: {named[0]!r} is {tied[named[0]]}. Record what it follows."
            )
        raise ValueError(
            f"`record`: {selector!r} selects frozen parameters alone "
            f"({', '.join(named[:3])}), which never change."
        )
    return kept


def _rules(trainer: AbstractTrainer) -> Rules:
    """Finds the rules of an optimiser; without rules, each parameter is one."""
    optimiser, params = trainer.optimiser, trainer.params
    if not isinstance(optimiser, ParamOptimiser):
        return tuple((path, (index,)) for index, path in enumerate(paths(params)))
    owners = optimiser.owners(params, filtered=True)
    present = sorted({owner for owner in owners if owner is not None})
    members = [tuple(i for i, o in enumerate(owners) if o == p) for p in present]
    names = [optimiser.name_of(owner) for owner in present]
    # Two predicates may have the same name.
    numbered = [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]
    return tuple(zip(numbered, members, strict=True))
