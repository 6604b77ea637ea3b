"""Why a compiled function was compiled again: `explain_retrace`."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax

from .._closure import Closure, strict_key
from .describe import abstract, describe, describe_content, short_text, word

_NOTHING = (
    "Nothing differs: a compiled function takes both without compiling again. If it "
    "did compile, look at its other arguments, and whether the function itself, or "
    "what it is a method of, was defined again."
)


_REST = (
    "something differs that has no name: a value that its code reads, or a variable "
    "that it writes to"
)


def explain_retrace(old: Any, new: Any) -> str:
    """Says why a jitted function that was called with `old` compiles again for `new`.

    ```python
    print(vn.explain_retrace(trainer, other))
    # optimiser.transforms.0: b1 of `scale_by_adam` was 0.9, is 0.8
    # params.power: shape was (), is (3,)
    ```

    Arrays are compared by what is compiled for: shape, dtype, weak type, sharding.
    Everything else is static, as it is to `equinox.filter_jit`, and compared by value:
    fields, functions, Python numbers, the structure. Values of arrays, learning rates
    among them, never matter. (Nor do those of floats in a batch that is given to `fit`,
    which makes arrays of them.)

    **Arguments:**

    - `old`, `new`: two pytrees: trainers, models, batches, or tuples of all arguments.

    **Returns:**

    A line for each difference, with the path that leads to it; or a sentence that
    starts with "Nothing differs".
    """
    lines = dict.fromkeys(_line(*found) for found in _differences(old, new, set()))
    if not lines and jax.tree.structure(old) != jax.tree.structure(new):
        # A trainer compares the static fields of its model more strictly than JAX.
        strictly = _differences(old, new, set(), is_strict=True)
        lines = dict.fromkeys(_line(*found) for found in strictly)
    return "\n".join(lines) or _NOTHING


def _line(steps: tuple[tuple[str, str], ...], text: str) -> str:
    path, variable, owner = [], [], ""
    for name, function in steps:
        if function:
            variable, owner = [name], function
        elif name:
            (variable if owner else path).append(name)
    if owner:
        # The transformations within an `optax.chain`.
        name = ".".join(variable).replace("content.", "part ")
        text = f"{name} of `{owner}`{text}"
    return ": ".join(filter(None, (".".join(path), text.lstrip(": "))))


def _differences(
    old: Any, new: Any, met: set[Any], is_strict: bool = False
) -> Iterator[tuple[Any, str]]:
    """Yields the differences of two trees that were not `met` yet, outer ones first.

    A difference is a pair of the steps that lead there, and a text. A step is a name,
    and the function that has a variable of that name, if there is one.
    """
    if old is new:
        return
    if eqx.is_array(old) and eqx.is_array(new):
        yield from (((), text) for text in _array_differences(old, new))
        return
    if isinstance(old, Closure) and isinstance(new, Closure):
        yield from _closure_differences(old, new)
        return
    one, other = describe(old), describe(new)
    if not _is_same(one.key, other.key):
        yield (), _said(one.text(), other.text())
        if one.text() != other.text():
            return
    if one is old and one.parts:
        # What two functions share is compared once.
        if (one, other) in met:
            return
        met.add((one, other))
    for name in one.static | other.static:
        before, after = one.static.get(name, _ABSENT), other.static.get(name, _ABSENT)
        if not (_is_equal if is_strict else _is_same)(before, after):
            what = " static," if name else " its structure"
            texts = short_text(before), short_text(after)
            yield ((name, ""),), what + _said(*texts)
    for name in one.parts | other.parts:
        before, after = one.parts.get(name, _ABSENT), other.parts.get(name, _ABSENT)
        for steps, text in _differences(before, after, met, is_strict):
            yield ((name, one.function), *steps), text


_ABSENT = word("absent")


def _closure_differences(old: Closure, new: Closure) -> Iterator[tuple[Any, str]]:
    is_same = old.skeleton == new.skeleton
    leaves = zip(old.leaves, new.leaves, strict=False)
    if is_same and not any(_array_differences(*pair) for pair in leaves):
        return
    before, after = (describe_content(x.decode(), {}) for x in (old, new))
    yield from list(_differences(before, after, set())) or [((), _REST)]


def _said(old: str, new: str) -> str:
    if old == new:
        return f" is another {new.removeprefix('the ').removeprefix('a ')} than before"
    return f" was {old}, is {new}"


def _is_same(old: Any, new: Any) -> bool:
    """Whether two static values are one to JAX, which compares them by `==`."""
    try:
        return old is new or bool(old == new)
    except (TypeError, ValueError):
        return False


def _is_equal(old: Any, new: Any) -> bool:
    """Whether two static values are one to a trainer: `1` is not `True`."""
    return _is_same(old, new) and strict_key(old) == strict_key(new)


def _array_differences(old: Any, new: Any) -> list[str]:
    """Returns how two arrays differ in what a program is compiled for."""
    arrays = abstract(old), abstract(new)
    is_placed = lambda array: getattr(array, "committed", False)
    # `None` is left to JAX.
    one, other = (x.sharding if is_placed(x) else None for x in (old, new))
    if arrays[0] == arrays[1] and (
        one.is_equivalent_to(other, old.ndim) if one and other else one is other
    ):
        return []
    texts = []
    for name in ("shape", "dtype", "weak_type"):
        before, after = (str(getattr(array, name, False)) for array in arrays)
        if before != after:
            texts.append(f": {name.replace('_', ' ')}{_said(before, after)}")
    places = (str(place or "left to JAX") for place in (one, other))
    return texts or [f": sharding{_said(*places)}"]
