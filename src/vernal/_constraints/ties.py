"""Parameters that follow others."""

import graphlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from .._boundary import PyTree, takes
from .._closure import Closure
from .._pickling import PlainMethods, Portable
from .._tree import (
    UnknownPathError,
    by_path,
    cast_like,
    is_inexact,
    resolve,
    strong,
)
from .owned import owned


class Ties(Portable, PlainMethods, eqx.Module):
    """Which leaves of a model follow others, in an order in which they can be set.

    A source is the index of a leaf, or a function of the model. `rounds` has the
    indices of the leaves of each round, whose sources are set in the rounds before.
    """

    sources: Closure
    rounds: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    indices: tuple[int, ...] = eqx.field(static=True)
    """The indices of the tied leaves."""
    followed: tuple[tuple[str, str], ...] = eqx.field(static=True)
    """The path of each tied leaf, and what it follows."""

    @property
    def words(self) -> dict[str, str]:
        """What a table says of each tied leaf, by path."""
        return {path: f"tied to {followed}" for path, followed in self.followed}

    def set(self, leaves: Sequence[Any], structure: Any) -> list[Any]:
        found, sources = list(leaves), self.sources.decode()
        if not all(eqx.is_array_like(found[index]) for index in self.indices):
            # `equinox.tree_at` looks for leaves: what is tied is none of a trainer.
            for index in self.indices:
                found[index] = "a tied parameter"
            return found
        for round_ in self.rounds:
            model = structure.unflatten(found)
            for index in round_:
                source = sources[index]
                new = source(model) if callable(source) else found[source]
                found[index] = cast_like(jnp.asarray(new), leaves[index])
        return found


def as_ties(given: Any, model: PyTree) -> Ties | None:
    if given is None:
        return None
    chosen, named = owned(given, "ties", model, lambda _: ""), by_path(model)
    # A Python float becomes an array where it is tied, as where it is trained.
    leaves = [strong(x) if name in chosen else x for name, x in named.items()]
    names = named.names
    sources: dict[int, Any] = {}
    reads: dict[int, set[int]] = {}
    for path, source in chosen.items():
        index = names.index(path)
        if isinstance(source, str):
            sources[index] = found = _leaf_named(source, model, path)
            reads[index], like = {found}, leaves[found]
        elif callable(source):
            takes(source, 1, "ties", "fn(model)")
            sources[index] = source
            reads[index], like = _read(source, leaves, named.structure, path)
        else:
            raise TypeError(
                f"`ties`: {path!r} is tied to {source!r}, but must be tied to the path "
                "of a parameter, or to a function of the model: `lambda model: 2 * "
                "model.a.width`."
            )
        shape = jnp.shape(like)
        if jnp.iscomplexobj(like) and not jnp.iscomplexobj(leaves[index]):
            raise TypeError(
                f"`ties`: {path!r} is real, and what it is tied to is complex."
            )
        if shape != jnp.shape(leaves[index]):
            raise ValueError(
                f"`ties`: {path!r} has shape {jnp.shape(leaves[index])}, and what it "
                f"is tied to has shape {shape}."
            )
    if not sources:
        return None
    in_words = lambda source: "a function" if callable(source) else names[source]
    return Ties(
        sources=Closure.encode(sources),
        rounds=_in_order(reads, names),
        indices=tuple(sources),
        followed=tuple((names[i], in_words(source)) for i, source in sources.items()),
    )


# What is in an expression. It may be in the key of a dictionary too.
_OPERATORS = frozenset("+-/() ")


def _leaf_named(source: str, model: PyTree, path: str) -> int:
    try:
        owners = resolve(model, [source], argument="ties")
    except UnknownPathError:
        is_product = "*" in source.replace("**.", "").replace("*.", "").strip("*")
        if not (is_product or _OPERATORS & set(source)):
            raise
        raise ValueError(
            f"`ties`: {path!r} is tied to {source!r}, which is not the path of a "
            "parameter. For an expression give a function: `lambda model: 2 * "
            "model.a.width`."
        ) from None
    found = [index for index, owner in enumerate(owners) if owner is not None]
    if len(found) != 1:
        raise ValueError(
            f"`ties`: {path!r} is tied to {source!r}, which names {len(found)} "
            "parameters. Name one, or give a function of the model."
        )
    return found[0]


def _read(
    source: Callable[[Any], Any], leaves: Sequence[Any], structure: Any, path: str
) -> tuple[set[int], Any]:
    """Finds which leaves a function reads, and the kind of array it returns."""
    places = [index for index, leaf in enumerate(leaves) if is_inexact(leaf)]

    def of_arrays(arrays: Iterable[Array]) -> Array:
        changed = dict(zip(places, arrays, strict=True))
        every = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
        return jnp.asarray(source(structure.unflatten(every)))

    try:
        closed = jax.make_jaxpr(of_arrays)([jnp.asarray(leaves[i]) for i in places])
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`ties`: what {path!r} is tied to cannot be evaluated: {error}"
        ) from error
    # What is only printed is not read.
    eqns = [equation for equation in closed.jaxpr.eqns if equation.outvars]
    # Looks within functions that are jitted, which seem to read all of the model.
    _, is_read = dce_jaxpr(closed.jaxpr.replace(eqns=eqns), [True])
    return set(itertools.compress(places, is_read)), closed.out_avals[0]


def _in_order(
    reads: dict[int, set[int]], names: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Sorts tied leaves into rounds; refuses a circle."""
    sorter = graphlib.TopologicalSorter(
        {index: sources & reads.keys() for index, sources in reads.items()}
    )
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        circle = [repr(names[index]) for index in reversed(error.args[1])]
        raise ValueError(
            f"`ties` go round in a circle: {' follows '.join(circle)}. Leave one of "
            "them free."
        ) from None
    rounds = []
    while sorter:
        rounds.append(sorter.get_ready())
        sorter.done(*rounds[-1])
    return tuple(rounds)
