"""What is saved at a position, and belongs to parameters by their names.

The state of a rule is at the index of the rule, and a projector has rows in the order
of the parameters. A program may have either in another order than the one before.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.tree_util as jtu

from .._boundary import PyTree, dotted, first_names
from .._optimiser import (
    Maker,
    ParamOptimiser,
    ParamOptimiserState,
    as_makers,
    joins_parameters,
    state_makers,
)
from .._projection import EigenProjector
from .._step import AbstractTrainer, Progress
from .._tree import MismatchError, to_arrays

T = TypeVar("T")

Members = Sequence[Sequence[str]]
"""The parameters of each group, in the order of the groups."""

# The field of a snapshot with the optimiser's state, and the name before the paths of
# the hyperparameters that it began with.
OPT_STATE, BEGUN = "opt_state", "begun"

# In these, arrays are in the order of the leaves of one field.
_IN_ORDER = {
    EigenProjector: ("_origin", "a projector"),
    Progress: ("params", "the report of NaN"),
}


class Meaning(NamedTuple):
    """What the numbers in an optimiser's state mean, `None` if a file does not say."""

    made_by: list[Maker] | None = None
    """What made the state, rules without parameters aside."""
    groups: dict[str, Members] = {}  # noqa: RUF012
    """The groups of each state of a `ParamOptimiser`, by its path."""

    def rules(self, trainer: AbstractTrainer) -> list[int] | None:
        """Lists the rules here of the groups there, as far as both are known."""
        here, there = _groups_of(trainer).get(OPT_STATE), self.groups.get(OPT_STATE)
        if here is None or there is None:
            return None
        found = zip(there, places(there, here), strict=True)
        return [place for members, place in found if members and place is not None]

    def is_elsewhere(self, trainer: AbstractTrainer) -> bool:
        """Whether a rule has another place here than it had there."""
        here, there = _groups_of(trainer), self.groups
        pairs = [(there[path], here[path]) for path in there.keys() & here.keys()]
        return any(places(old, own) != [*range(len(old))] for old, own in pairs)


def meaning_of(trainer: AbstractTrainer) -> Meaning:
    groups, tx = _groups_of(trainer), trainer.optimiser
    own = groups[OPT_STATE] if isinstance(tx, ParamOptimiser) else ()
    used = [index for index, members in enumerate(own) if members]
    return Meaning([*state_makers(tx, used)], groups)


def as_meaning(header: Mapping[str, Any]) -> Meaning:
    """Reads it from a header, in which anything may be."""
    groups = header.get("groups", {})
    for members in groups.values():
        if not all(isinstance(name, str) for own in members for name in own):
            raise ValueError(f"the groups of its optimiser are {groups!r}")
    return Meaning(as_makers(header.get("made_by")), groups)


def _groups_of(trainer: AbstractTrainer) -> dict[str, Members]:
    return groups_in({OPT_STATE: trainer.opt_state})


def groups_in(tree: PyTree) -> dict[str, Members]:
    """Lists the groups of each state of a `ParamOptimiser` in a tree, by its path.

    Of the optimisers themselves it lists the names of the rules.
    """
    names = lambda tx: [[tx.name_of(index)] for index in range(len(tx.transforms))]
    found = _nodes(tree, (ParamOptimiserState, ParamOptimiser))
    return {
        path: names(node) if isinstance(node, ParamOptimiser) else node.members
        for path, node in found
    }


def _nodes(
    tree: PyTree, kinds: tuple[type, ...], keys: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yields each node of some kinds with its path, those within others too."""
    is_one = lambda node: isinstance(node, kinds)
    for way, node in jtu.tree_leaves_with_path(tree, is_leaf=is_one):
        if is_one(node):
            yield dotted((*keys, *way)), node
            for field in dataclasses.fields(node):
                own = (*keys, *way, jtu.GetAttrKey(field.name))
                yield from _nodes(getattr(node, field.name), kinds, own)


def places(there: Members, here: Members) -> list[int | None]:
    """Finds for each group there the one here that has the same parameters.

    Groups without any are told apart by their order.
    """
    left = defaultdict[frozenset[str], list[int]](list)
    for index, own in enumerate(here):
        left[frozenset(own)].append(index)
    same = (left[frozenset(own)] for own in there)
    return [indices.pop(0) if indices else None for indices in same]


def in_place(
    saved: Mapping[str, T], trainer: AbstractTrainer, meaning: Meaning, source: str
) -> dict[str, T]:
    """Gives the state of each rule the path that it has in this trainer.

    Raises a `MismatchError` where no rule is for the same parameters, and where a
    projector has them in another order.
    """
    require_order(saved, {"projector": trainer.projector}, source)
    pair = _out_of_order(saved, to_arrays({"params": trainer.params}), "params")
    has_state = any(_beneath(saved, OPT_STATE))
    if pair and has_state and joins_parameters(trainer.optimiser):
        raise _other_order(*pair, "`optax.flatten`", source)
    here, there = _groups_of(trainer), dict(meaning.groups)
    if not isinstance(trainer.optimiser, ParamOptimiser) or OPT_STATE not in there:
        require_same_groups(saved, there, here, source)
        return dict(saved)
    old, own = there.pop(OPT_STATE), here.pop(OPT_STATE)
    new = {str(index): place for index, place in enumerate(places(old, own))}
    for index, members in enumerate(old):
        path = f"{OPT_STATE}.groups.{index}"
        if members and new[str(index)] is None and list(_beneath(saved, path)):
            raise _other_rules(path, members, own, source)
    require_same_groups(_moved(saved, new), _moved(there, new), here, source)
    return _moved(saved, new)


def _moved(saved: Mapping[str, T], places: Mapping[str, int | None]) -> dict[str, T]:
    """Renames what is beneath the groups, by their places.

    What has none is left out: it is the state of a rule for no parameter.
    """
    found = {}
    for path, value in saved.items():
        field, mark, rest = path.partition(".groups.")
        if mark and field in (OPT_STATE, BEGUN):
            index, dot, way = rest.partition(".")
            if (place := places.get(index)) is None:
                continue
            path = f"{field}{mark}{place}{dot}{way}"
        found[path] = value
    return found


def require_same_groups(
    saved: Iterable[str],
    there: Mapping[str, Members],
    here: Mapping[str, Members],
    source: str,
) -> None:
    """Refuses what belongs to a rule whose place here is that of another rule."""
    for path in there.keys() & here.keys():
        for index, place in enumerate(places(there[path], here[path])):
            if place == index:
                continue
            group, rule = (_joined(path, f"{x}.{index}") for x in ("groups", "scales"))
            # A rule may be written otherwise, but a group has what parameters it has.
            odd = rule if place is not None and any(_beneath(saved, rule)) else group
            if any(_beneath(saved, odd)):
                raise _other_rules(odd, there[path][index], here[path], source)


def _other_rules(
    path: str, members: Sequence[str], here: Members, source: str
) -> MismatchError:
    rules = "; ".join(first_names(own) for own in here[:5] if own) or "no parameter"
    return MismatchError(
        f"{source} holds, at {path!r}, the numbers of a rule for just "
        f"{first_names(members)}. Here the rules are for: {rules}. Give each rule the "
        "parameters that it had; rules within another transformation or tree need the "
        "order that they had, too. `load` can also leave the state of a trainer out, "
        'with `reset="opt_state"`.'
    )


def require_order(saved: Iterable[str], like: PyTree, source: str) -> None:
    """Refuses arrays that have the parameters in another order than here."""
    saved, own = [*saved], [*to_arrays(like)]
    for path, node in _nodes(like, tuple(_IN_ORDER)):
        kinds = (about for kind, about in _IN_ORDER.items() if isinstance(node, kind))
        field, what = next(kinds)
        place = _joined(path, field)
        if pair := _out_of_order(saved, own, place):
            raise _other_order(*pair, what, source)


def _out_of_order(
    saved: Iterable[str], own: Iterable[str], node: str
) -> tuple[str, str] | None:
    """Finds the first two paths beneath a node that have the place of each other."""
    there, here = ([*_beneath(paths, node)] for paths in (saved, own))
    if sorted(there) != sorted(here):
        return None  # It is refused as another tree.
    pairs = zip(there, here, strict=True)
    name = lambda path: path.removeprefix(f"{node}.")
    return next(((name(old), name(new)) for old, new in pairs if old != new), None)


def _other_order(old: str, new: str, what: str, source: str) -> MismatchError:
    return MismatchError(
        f"{source} has the parameters in another order: {old!r} is there where {new!r} "
        f"is here, and {what} has them by that order, not by name. Give the model its "
        "fields in the order that they had. To go on with the new order, load it so, "
        "and make a new trainer from its parameters."
    )


def positions(saved: Iterable[str], own: Iterable[str], field: str) -> list[int]:
    """Finds where each leaf of a field is among those that were saved."""
    there = {path: index for index, path in enumerate(_beneath(saved, field))}
    return [there[path] for path in _beneath(own, field)]


def _beneath(paths: Iterable[str], node: str) -> Iterator[str]:
    return (p for p in paths if not node or p == node or p.startswith(f"{node}."))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
