"""Why a compiled function was compiled again: `explain_retrace`."""

from typing import Any, cast

from jax.core import Tracer

from .describe import Described, abstract, describe

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
    lines = dict.fromkeys(_differences(describe(old), describe(new)))
    return "\n".join(lines) or _NOTHING


def _differences(old: Described | None, new: Described | None) -> list[str]:
    """Returns a line for each difference, outer ones first."""
    if old is None or new is None:
        place = cast(Described, old or new).place
        return [place.line(_said(_text(old), _text(new)))]
    if old.array is not None and new.array is not None:
        texts = _array_differences(old.array, new.array)
        return [old.place.line(text, separator=": ") for text in texts]
    lines = []
    if not _is_same(old.key, new.key):
        lines.append(old.place.line(_said(_text(old), _text(new))))
        if _text(old) != _text(new):
            return lines
    for name in {**old.parts, **new.parts}:
        lines += _differences(old.parts.get(name), new.parts.get(name))
    if not lines and not _is_same(old.rest, new.rest):
        lines.append(old.place.line(_REST, separator=": "))
    return lines


def _text(described: Described | None) -> str:
    return "absent" if described is None else described.text()


def _said(old: str, new: str) -> str:
    if old == new:
        return f"is another {new.removeprefix('the ').removeprefix('a ')} than before"
    return f"was {old}, is {new}"


def _is_same(old: Any, new: Any) -> bool:
    """Whether two static values are one to JAX, which compares them by `==`."""
    try:
        return old is new or bool(old == new)
    except (TypeError, ValueError):
        return False


def _array_differences(old: Any, new: Any) -> list[str]:
    """Returns how two arrays differ in what a program is compiled for."""
    before, after = abstract(old), abstract(new)
    texts = [
        f"{name.replace('_', ' ')} {_said(str(own), str(other))}"
        for name in ("shape", "dtype", "weak_type")
        if (own := getattr(before, name, False))
        != (other := getattr(after, name, False))
    ]
    if not texts and (before != after or not _are_together(old, new)):
        places = (str(_sharding(x) or "left to JAX") for x in (old, new))
        texts.append(f"sharding {_said(*places)}")
    return texts


def _are_together(old: Any, new: Any) -> bool:
    if isinstance(old, Tracer) or isinstance(new, Tracer):
        return True
    before, after = _sharding(old), _sharding(new)
    if before is None or after is None:
        return before is after
    return before.is_equivalent_to(after, old.ndim)


def _sharding(array: Any) -> Any:
    """Returns the sharding of an array, `None` where it is left to JAX."""
    return array.sharding if getattr(array, "committed", False) else None
