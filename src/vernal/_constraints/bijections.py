"""Parameters that are functions of others: of free coordinates, of their real parts."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._boundary import PyTree, is_traced, refuse_taken
from .._closure import Closure
from .._pickling import PlainMethods, Portable
from .._program import program
from .._tree import by_path, is_inexact
from .owned import replaced, shape_of

# What libraries call the two directions: `Bijection`, distreqx and Distrax; flowjax;
# NumPyro.
_FORWARD, _INVERSE = ("forward", "transform", "__call__"), ("inverse", "inv")


class Bijection(Portable, eqx.Module):
    """A map from free coordinates to a parameter. The abstract base class.

    Free coordinates are any real numbers. There may be fewer of them than elements of
    the parameter, as for fractions that sum to one. To write one, subclass it and
    define `forward` and `inverse`:

    ```python
    class Positive(vn.Bijection):
        def forward(self, free):
            return jnp.exp(free)

        def inverse(self, value):
            return jnp.log(value)
    ```

    It is a pytree: other numbers in it compile nothing again.
    """

    def __check_init__(self) -> None:
        refuse_taken(type(self), Bijection)

    @abc.abstractmethod
    def forward(self, free: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the parameter. It has a derivative everywhere."""

    @abc.abstractmethod
    def inverse(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the free coordinates of a parameter."""


class Bijections(Portable, PlainMethods, eqx.Module):
    """The bijections of some parameters, by path."""

    maps: dict[str, Closure]

    def forward(self, free: PyTree) -> PyTree:
        return replaced(free, self._images(free, _FORWARD))

    def inverse(self, params: PyTree) -> PyTree:
        return replaced(params, self._images(params, _INVERSE))

    def moved(self, free: PyTree, old: PyTree, new: PyTree) -> PyTree:
        """Returns the coordinates of `new`; where `old` has not moved, `free`."""
        at, before = by_path(free).by_name(), by_path(old).by_name()
        found = self._images(new, _INVERSE)
        for path, x in by_path(new).items():
            if path in self.maps:
                own = jnp.where(jnp.any(x != before[path]), found[path], at[path])
                found[path] = at[path] if x is before[path] else own
        return replaced(new, found)

    def of_mapped(self, free: PyTree, params: PyTree) -> PyTree:
        """Returns parameters with the free coordinates of those that have a map."""
        at = by_path(free).by_name()
        return replaced(params, {path: at[path] for path in self.maps})

    def required(self, params: PyTree) -> PyTree:
        """Returns the free coordinates of parameters; refuses any that have none."""
        free, again, is_close = _there_and_back(self, params)
        at = by_path(free).by_name()
        for path, x in by_path(params).items():
            if path in self.maps:
                _check(path, x, at[path], again[path], is_close[path])
        if is_traced(self, params):
            message = "A parameter is not what its bijection, of `bounds`, can return."
            are_finite = (jnp.all(jnp.isfinite(at[path])) for path in self.maps)
            flags = [*is_close.values(), *are_finite]
            return eqx.error_if(free, ~jnp.all(jnp.stack(flags)), message)
        return free

    def resized(self, free: PyTree, params: PyTree) -> tuple[str, ...]:
        """Lists the parameters with fewer or more coordinates than elements."""
        pairs = zip(by_path(free).items(), jax.tree.leaves(params), strict=True)
        return tuple(path for (path, at), x in pairs if at.size != x.size)

    def flat_map(self, path: str, free: Array) -> Callable[[Array], Array]:
        """Returns the map of one parameter, of flat arrays."""
        forward = _method(self.maps[path].decode(), _FORWARD)
        return lambda flat: jnp.ravel(forward(flat.reshape(free.shape)))

    def of_element(
        self, path: str, free: Array, place: Any
    ) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """Returns the map of one element, given the others, and its inverse."""
        forward, back = self.flat_map(path, free), self.maps[path].decode()
        value, flat = forward(free.ravel()), free.ravel()
        inverse = lambda own: _method(back, _INVERSE)(own.reshape(free.shape)).ravel()
        return (
            lambda x: forward(flat.at[place].set(x))[place],
            lambda x: inverse(value.at[place].set(x))[place],
        )

    def log_abs_det(self, free: PyTree) -> Float[Array, ""]:
        """Returns the logarithm of the volume of parameters for that of coordinates."""
        at, total = by_path(free).by_name(), jnp.zeros((), jnp.result_type(float))
        for path in self.maps:
            jacobian = jax.jacfwd(self.flat_map(path, at[path]))
            _, volume = jnp.linalg.slogdet(jacobian(at[path].ravel()))
            total += volume.astype(total.dtype)
        return total

    def _images(self, tree: PyTree, names: tuple[str, ...]) -> dict[str, Array]:
        leaves, found = by_path(tree).by_name(), {}
        for path, closure in self.maps.items():
            x = leaves[path]
            found[path] = jnp.asarray(_method(closure.decode(), names)(x), x.dtype)
        return found


class _Parts(NamedTuple):
    real: Array
    imag: Array


class RealParts(eqx.Module):
    """The map to complex parameters from their real and imaginary parts.

    Then follow the maps of free coordinates, if there are any.
    """

    bijections: Bijections | None
    structure: Any = eqx.field(static=True)
    """That of the complex parameters."""

    def forward(self, parts: PyTree) -> PyTree:
        join = lambda x: lax.complex(*x) if isinstance(x, _Parts) else x
        leaves = map(join, self.structure.flatten_up_to(parts))
        params = self.structure.unflatten(leaves)
        return params if self.bijections is None else self.bijections.forward(params)


def real_parts(params: PyTree) -> PyTree:
    """Returns parameters with two arrays, `real` and `imag`, for each complex one."""
    part = lambda x: _Parts(x.real, x.imag) if jnp.iscomplexobj(x) else x
    return jax.tree.map(part, params)


@program
def _there_and_back(
    bijections: Bijections, params: PyTree
) -> tuple[PyTree, dict[str, Array], dict[str, Bool[Array, ""]]]:
    """Returns free coordinates, what these are mapped to, and whether it is close."""
    free, before = bijections.inverse(params), by_path(params).by_name()
    again = by_path(bijections.forward(free)).by_name()
    again = {path: again[path] for path in bijections.maps}
    return free, again, {path: _is_close(before[path], x) for path, x in again.items()}


def is_bijection(given: Any) -> bool:
    """Whether an object has both directions of a bijection."""
    both = _method(given, _FORWARD), _method(given, _INVERSE)
    return None not in both and not isinstance(given, type)


def as_bijection(given: Any, path: str, leaf: Array) -> Closure:
    """Makes a pytree of the bijection of one parameter, and checks its shapes."""
    shape = leaf
    for names in (_INVERSE, _FORWARD):
        method = _method(given, names)
        shape = shape_of(method, shape, f"`bounds`: the bijection of {path!r}")
        if not is_inexact(shape) or not shape.size:
            raise ValueError(
                f"`bounds`: the bijection of {path!r} returns {shape}, but must return "
                "one array of at least one real number, both ways."
            )
    if shape.shape != leaf.shape:
        raise ValueError(
            f"`bounds`: the bijection of {path!r} returns an array of shape "
            f"{shape.shape}, and the parameter has shape {leaf.shape}."
        )
    return Closure.encode(jax.tree.map(_as_leaf, given))


def _as_leaf(leaf: Any) -> Any:
    # So another number in a bijection compiles nothing again.
    is_number = type(leaf) is float or isinstance(leaf, np.ndarray)
    return jnp.asarray(leaf) if is_number else leaf


def _method(given: Any, names: tuple[str, ...]) -> Callable[[Array], Any] | Any:
    found = (getattr(given, name, None) for name in names)
    return next(filter(callable, found), None)


def tolerance_of(value: Array) -> Array:
    """Returns the relative error up to which a map returns a value."""
    return jnp.sqrt(jnp.finfo(value.dtype).eps).astype(value.dtype)


def _is_close(value: Array, again: Array) -> Any:
    size = jnp.max(jnp.abs(value))
    return jnp.all(jnp.abs(again - value) <= tolerance_of(value) * size)


def _check(path: str, value: Array, free: Array, again: Array, is_close: Any) -> None:
    if is_traced(value, free, again):
        return
    show = lambda x: np.array2string(np.asarray(x), precision=6, threshold=8)
    if not np.isfinite(free).all():
        raise ValueError(
            f"`bounds`: {path!r} starts at {show(value)}, where the free coordinates "
            "of its bijection are not finite: on the edge of what it can return, or "
            "beyond. Start within; or give a pair `(low, high)`, if the answer may lie "
            "on the edge."
        )
    if not is_close:
        raise ValueError(
            f"`bounds`: {path!r} starts at {show(value)}, which its bijection does not "
            f"return: of its free coordinates that makes {show(again)}. Start there."
        )
