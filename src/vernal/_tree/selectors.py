"""Selectors: paths, nodes, globs and predicates that choose parameters of a tree."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax

from .._boundary import entrance, first_names, in_few_words, nearest_names, takes
from .paths import Leaf, UnknownPathError, is_float, is_inexact, named_leaves

T = TypeVar("T")
Selector = str | Callable[[str, Any], Any] | Sequence[Any]

# Stands, in the text of a glob, for a dot inside a dictionary's key, which does not
# separate two segments.
_INNER_DOT = "\0"

# How specific a selector is that is the path of a leaf.
_BY_PATH = 3, 0


class _Match(NamedTuple):
    """A leaf that a selector matches: how specifically, and whether by its own path."""

    leaf: int
    specificity: tuple[int, int]
    named: bool


class _Index:
    """Every leaf and every node of a tree, by path."""

    def __init__(self, leaves: list[Leaf]):
        self.leaves = leaves
        # The leaves at and beneath each path, and whether the path is the leaf's own.
        self.places: dict[str, list[tuple[int, bool]]] = {}
        # Globs are compared with the same paths, in which inner dots are marked.
        self.glob_names: dict[str, set[str]] = {}
        for i, leaf in enumerate(leaves):
            # A tree that is a leaf itself has the empty path.
            for depth in range(min(1, len(leaf.segments)), len(leaf.segments) + 1):
                prefix = leaf.segments[:depth]
                name = ".".join(prefix)
                marked = ".".join(s.replace(".", _INNER_DOT) for s in prefix)
                self.glob_names.setdefault(name, set()).add(marked)
                is_own = depth == len(leaf.segments)
                self.places.setdefault(name, []).append((i, is_own))

    @property
    def parameters(self) -> list[str]:
        return [leaf.path for leaf in self.leaves if leaf.is_parameter]

    def match(self, atom: Any) -> Iterator[_Match]:
        if callable(atom):
            for i, leaf in enumerate(self.leaves):
                if is_inexact(leaf.value) and bool(atom(leaf.path, leaf.value)):
                    yield _Match(i, (0, 0), False)
        elif atom in self.places or "*" not in atom:
            beneath = 2, atom.count(".")
            for i, is_own in self.places.get(atom, ()):
                yield _Match(i, _BY_PATH if is_own else beneath, is_own)
        else:
            segments = atom.split(".")
            specificity = (1, sum("*" not in segment for segment in segments))
            names_leaf = "*" not in segments[-1]
            pattern = re.compile(_glob_regex(segments), re.DOTALL)
            for name, marked in self.glob_names.items():
                if any(map(pattern.fullmatch, marked)):
                    for i, is_own in self.places[name]:
                        yield _Match(i, specificity, names_leaf and is_own)


def _glob_regex(segments: list[str]) -> str:
    """Translates a glob: `*` stays within one segment, `**` spans any number."""
    pattern, joint = "", ""
    for segment in segments:
        if segment == "**":
            # The joint moves inside, since zero segments have no dot.
            pattern += r"(?:[^.]*\.)*" if joint == "" else r"(?:\.[^.]*)*"
            joint = joint and r"\."
        else:
            # A key of a dictionary may be empty.
            pattern += joint + "[^.]*".join(map(re.escape, segment.split("*")))
            joint = rf"[.{_INNER_DOT}]"
    if segments[-1] == "**" and joint == "":
        pattern += "[^.]*"
    return pattern


def atoms(selector: Any, argument: str) -> Iterator[Any]:
    """Lists the paths, globs and predicates that a selector is made of."""
    if isinstance(selector, str):
        yield selector
    elif callable(selector):
        takes(selector, 2, argument, "predicate(path, leaf)")
        yield selector
    elif isinstance(selector, tuple | list):
        for part in selector:
            yield from atoms(part, argument)
    else:
        raise TypeError(
            f"`{argument}` has the selector {in_few_words(selector)}. A selector is a "
            "path, a glob, a predicate `(path, leaf) -> bool`, or a tuple of these."
        )


def require_atoms(selectors: Iterable[Any], argument: str) -> None:
    """Refuses what is no selector, and an empty tuple, which matches nothing."""
    for selector in selectors:
        if not list(atoms(selector, argument)):
            raise UnknownPathError(
                f"`{argument}`: the selector {written(selector)} is empty, and matches "
                "nothing. Leave it out."
            )


def resolve(
    tree: Any, selectors: Sequence[Any], *, argument: str, filtered: bool = False
) -> tuple[int | None, ...]:
    """Returns the index of the selector that owns each leaf of a tree, or `None`.

    The most specific wins: an exact path, then the longest node, then a glob by its
    number of literal segments, then a predicate. If the tree is `filtered`, some leaves
    may have been replaced by `None`, and a selector may match only these. An error
    calls the selectors `argument`.
    """
    leaves = named_leaves(tree)
    index = _Index(leaves)
    claims: list[list[tuple[tuple[int, int], int]]] = [[] for _ in leaves]
    for rule, selector in enumerate(selectors):
        for atom in atoms(selector, argument):
            matches = list(index.match(atom))
            # A predicate is not asked about replaced leaves.
            found = filtered and callable(atom) and any(x.value is None for x in leaves)
            for match in matches:
                value = leaves[match.leaf].value
                if is_inexact(value) or (match.named and is_float(value)):
                    claims[match.leaf].append((match.specificity, rule))
                    found = True
                elif filtered and value is None:
                    found = True
            if not found:
                _refuse(tree, index, atom, matches, argument)
    return tuple(
        _winner(leaf, claim, selectors, argument)
        for leaf, claim in zip(leaves, claims, strict=True)
        if leaf.value is not None
    )


def _winner(
    leaf: Leaf, claims: list[Any], selectors: Sequence[Any], argument: str
) -> int | None:
    if not claims:
        return None
    highest = max(specificity for specificity, _ in claims)
    best = list(dict.fromkeys(rule for spec, rule in claims if spec == highest))
    if len(best) > 1:
        first, second = (written(selectors[rule]) for rule in best[:2])
        remedy = (
            ": both name it. Leave it out of one."
            if highest == _BY_PATH
            else ". Give that parameter a rule with its exact path, or narrow one of "
            "the two."
        )
        raise ValueError(
            f"`{argument}`: the rules {first} and {second} are equally specific on "
            f"{leaf.path!r}{remedy}"
        )
    return best[0]


def written(selector: Any) -> str:
    """Writes a selector as Python does; a predicate by its name."""
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, tuple | list):
        return f"({', '.join(map(written, selector))})"
    return getattr(selector, "__name__", repr(selector))


def _refuse(
    tree: Any, index: _Index, atom: Any, matches: list[_Match], argument: str
) -> None:
    """Raises an error that says why a selector finds no parameter."""
    name = written(atom)
    if not isinstance(atom, str):
        raise UnknownPathError(
            f"`{argument}`: the predicate {name} is true of no parameter. The "
            f"parameters are {first_names(index.parameters) or 'none'}."
        )
    matched = [index.leaves[match.leaf] for match in matches]
    if present := [leaf for leaf in matched if leaf.value is not None]:
        leaf = present[0]
        what = f"{name} names" if len(present) == 1 else f"{name} finds nothing but"
        kind = f"a leaf of type {type(leaf.value).__name__}"
        if hasattr(leaf.value, "dtype"):
            kind = f"an array of dtype {leaf.value.dtype}"
        remedy = "Only arrays of floats can be trained: convert it, or leave it out."
        if is_float(leaf.value):
            remedy = f"A Python float is trained where its own path {leaf.path!r} is."
        raise TypeError(f"`{argument}`: {what} {leaf.path!r}, {kind}. {remedy}")
    if matches:
        raise UnknownPathError(
            f"`{argument}`: {name} is `None` in this tree, or masked: there is nothing "
            "to train."
        )
    if _is_attribute(tree, atom):
        raise TypeError(
            f"`{argument}`: {name} is a static field or a property, not a leaf of the "
            "tree. Only array leaves can be trained: drop `static=True`, or leave it "
            "out."
        )
    path, bracket, _ = atom.partition("[")
    if bracket and path in index.parameters:
        remedy = _OF_ELEMENTS.get(argument, "Name the whole parameter.")
        raise UnknownPathError(
            f"`{argument}`: {name} is one element, and selectors choose whole "
            f"parameters. {remedy.format(path=path)}"
        )
    raise UnknownPathError(
        f"`{argument}`: {name} matches nothing. {_nearest(atom, index)}"
    )


# How to say something of one element.
_OF_ELEMENTS = {
    "bounds": "Give arrays with an infinity where there is no bound: "
    "`{{{path!r}: (low_array, high_array)}}`.",
    "priors": "Give arrays, with a large `std` where there is no prior: "
    "`{{{path!r}: vn.Normal(mean_array, std_array)}}`.",
    "train": "To hold an element of {path!r}, give the parameter a `vn.Bijection` in "
    "`bounds`, of which `forward` inserts the element and `inverse` deletes it; or "
    "split the array in the model.",
    "ties": "Tie {path!r} as a whole; or split the array in the model.",
}


def _is_attribute(tree: Any, path: str) -> bool:
    node = tree
    for segment in path.split("."):
        if isinstance(node, dict):
            node = next((v for k, v in node.items() if str(k) == segment), None)
        elif isinstance(node, tuple | list) and segment.isdecimal():
            node = node[int(segment)] if int(segment) < len(node) else None
        else:
            # A property is not computed: it may raise.
            node = inspect.getattr_static(node, segment, None)
    return node is not None


def _nearest(atom: str, index: _Index) -> str:
    parameters = index.parameters
    # If only the last segment is right, likeness of the whole path is a poor guide.
    tail = atom.rsplit(".", 1)[-1]
    same_tail = [p for p in parameters if p.rsplit(".", 1)[-1] == tail]
    if same_tail and not difflib.get_close_matches(atom, parameters, n=1):
        return f"Did you mean {' or '.join(map(repr, same_tail[:3]))}?"
    nodes = [path for path, of in index.places.items() if not all(own for _, own in of)]
    return nearest_names(atom, [*parameters, *nodes])


def keep(tree: T, owners: Sequence[int | None]) -> tuple[T, T]:
    """Splits a tree into the leaves with an owner and the rest, with `None` in gaps."""
    is_kept = [owner is not None for owner in owners]
    return eqx.partition(tree, jax.tree.structure(tree).unflatten(is_kept))


@entrance
def split(tree: T, selector: Selector) -> tuple[T, T]:
    """Splits a pytree into the parameters that a selector chooses and the rest.

    Both parts have the structure of the tree, with `None` in place of leaves of the
    other part, as with `equinox.partition`; `equinox.combine` joins them again.

    !!! example

        ```python
        >>> import vernal as vn
        >>> vn.split({"power": 1.0, "mean": 2.0}, "power")
        ({'mean': None, 'power': 1.0}, {'mean': 2.0, 'power': None})

        ```

    **Arguments:**

    - `tree`: any pytree.
    - `selector`: a path; a node, for every parameter beneath it; a glob, in which `*`
        stands for one segment and `**` for any number (`layers.*.bias`, `**.bias`);
        a predicate `(path, leaf) -> bool`, asked about every array of floats; or a
        tuple of these. A Python float is selected only by its own name.

    **Returns:**

    The pair `(selected, rest)`.

    **Raises:**

    - `UnknownPathError`: if a selector matches nothing; it names the nearest paths.
    - `TypeError`: if a selector names a leaf that is not a parameter.
    """
    return keep(tree, resolve(tree, [selector], argument="selector"))
