"""Differentiation in forward or reverse mode, whichever is possible.

The functions here are those that `traced` returns: a user's function is called once,
however many modes are tried.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._boundary import PyTree, RefusedError, warn_once

Mode = Literal["fwd", "bwd"]

Flat = Callable[[Array], Array]
"""A function of a flat vector."""

_WORDS = {
    "fwd": "forward mode",
    "bwd": "reverse mode",
    "fwd-bwd": "forward over reverse mode",
    "bwd-bwd": "reverse over reverse mode",
    "fwd-fwd": "forward over forward mode",
}

_REMEDY = (
    "A loop of unknown length (`jax.lax.while_loop`) has forward mode alone, a "
    "`jax.custom_vjp` reverse mode alone, and one within the other neither. With "
    "diffrax, `diffeqsolve(..., adjoint=diffrax.DirectAdjoint())` has both, "
    "`diffrax.ForwardMode()` forward mode and the default reverse mode."
)


class Subject(NamedTuple):
    """The function that is differentiated, and the mode that the user asked for."""

    name: str
    """Its name in messages, such as "`residuals` of `LineFit`"."""
    jac: Mode | None = None
    is_quiet: bool = False
    """Whether there is no warning about the mode."""


def checked_mode(jac: Any) -> Mode | None:
    if jac is not None and not (isinstance(jac, str) and jac in ("fwd", "bwd")):
        raise ValueError(
            f'`jac` is {jac!r}, but must be "fwd" (forward mode: a pass for each '
            'parameter), "bwd" (reverse mode: a pass for each datum) or `None`, for '
            "the one that is possible."
        )
    return jac


def traced(fn: Callable[[PyTree], PyTree], point: PyTree) -> Callable[[PyTree], PyTree]:
    """Traces a function once, and raises its own errors."""
    return cast(Any, eqx.filter_closure_convert(fn, point))


_REMEDIES = {
    "Reverse-mode differentiation does not work": (
        "Give the loop a length that is known, by `jax.lax.scan` or a "
        "`jax.lax.fori_loop` between Python numbers; or use "
        '`trainer.solve(solver, batch, jac="fwd")`.'
    ),
    "IO callbacks do not support JVP": "To print or to log, use `jax.debug.callback`.",
}


@contextlib.contextmanager
def in_reverse(name: str) -> Iterator[None]:
    """Adds a remedy to the error if a function has no reverse mode."""
    try:
        yield
    except ValueError as error:
        said = _first_line(error)
        for start, remedy in _REMEDIES.items():
            if said.startswith(start):
                raise TypeError(
                    f"{name} cannot be differentiated in reverse mode, which a step "
                    f"takes. JAX says: {said}. {remedy}"
                ) from error
        raise


def choose_mode(
    fn: Callable[[PyTree], PyTree],
    point: PyTree,
    subject: Subject,
    order: tuple[Mode, ...] = ("fwd", "bwd"),
) -> Mode:
    """Finds the first mode of `order` in which `fn` can be differentiated at `point`.

    Modes are tried on shapes alone, at no cost when the program runs. Raises a
    `TypeError` if there is no mode.
    """

    def pull(x: PyTree, _: PyTree) -> PyTree:
        value, pull = jax.vjp(fn, x)
        return pull(value)

    ways = {"fwd": lambda x, tangent: jax.jvp(fn, (x,), (tangent,))[1], "bwd": pull}
    mapped = {mode: _mapped(ways[mode]) for mode in order}
    return cast(Mode, first_possible(mapped, point, subject)[0])


def _mapped(product: Callable[[PyTree, PyTree], Any]) -> Callable[[PyTree], Any]:
    """Maps a product with tangents: a `custom_vjp` fails only where it is used."""
    many = lambda point: jax.tree.map(lambda x: x[None], point)
    return lambda point: jax.vmap(product, (None, 0))(point, many(point))


def first_possible(
    ways: Mapping[str, Callable[[PyTree], Any]], point: PyTree, subject: Subject
) -> tuple[str, Callable[[PyTree], Any]]:
    """Finds the first of several functions that JAX can trace, and returns it traced.

    Each has a derivative in it, and a name that ends with the mode of the first one. A
    warning, once for each subject, says which one is used if it is not the first.
    """
    failures: dict[str, Exception] = {}
    for way, fn in ways.items():
        if subject.jac is not None and not way.endswith(subject.jac):
            continue
        try:
            found = traced(fn, point)
        except RefusedError:
            raise
        # JAX and its libraries raise several kinds, and promise none.
        except Exception as error:
            failures[way] = error
            continue
        if failures and not subject.is_quiet:
            _warn(subject.name, way, failures)
        return way, found
    said = "; ".join(f"{_WORDS[w]}: {_first_line(e)}" for w, e in failures.items())
    asked = f' with `jac="{subject.jac}"`' if subject.jac else ""
    error = TypeError(
        f"{subject.name} cannot be differentiated{asked}. JAX says, of {said}. "
        f"{_REMEDY}"
    )
    raise error from list(failures.values())[-1]


def _warn(name: str, way: str, failures: Mapping[str, Exception]) -> None:
    first, error = next(iter(failures.items()))
    mode = way.split("-")[-1]
    # Only the mode of the first derivative changes the cost.
    if mode == first.split("-")[-1]:
        return
    passes = "parameter" if mode == "fwd" else "datum"
    warn_once(
        f"{name} cannot be differentiated in {_WORDS[first]} ({_first_line(error)}). "
        f"{_WORDS[way].capitalize()} is used, which takes a pass for each {passes}. "
        f'`jac="{mode}"` asks for it, without this warning.',
        UserWarning,
        (name, mode),
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def columns(
    product: Callable[[Array], Any], like: Array, batch_size: int | None = None
) -> Any:
    """Maps the unit vectors, `batch_size` at a time; the first axis is for vectors."""
    size = like.size

    def image(index: Array) -> Any:
        # Made one by one: the identity would be a second matrix in memory.
        return product(jax.nn.one_hot(index, size, dtype=like.dtype))

    if batch_size is None:
        return jax.vmap(image)(jnp.arange(size))
    return jax.lax.map(image, jnp.arange(size), batch_size=min(batch_size, size))


def gradient(fn: Flat, flat: Float[Array, " D"], subject: Subject) -> Array:
    """Computes the gradient of a scalar function, in reverse mode if possible."""
    ways = {"bwd": lambda x: jax.grad(fn)(x), "fwd": _forward_gradient(fn)}
    return first_possible(ways, flat, subject)[1](flat)


def _forward_gradient(fn: Flat) -> Flat:
    return lambda x: columns(_pushed(fn, x), x)


def _pushed(fn: Flat, x: Array) -> Flat:
    """Returns the product with the Jacobian.

    It can be nested through any loop; `jax.linearize` cannot, in some versions of JAX.
    """
    return lambda tangent: jax.jvp(fn, (x,), (tangent,))[1]


def jacobian_matrix(
    fn: Flat, flat: Float[Array, " D"], subject: Subject, batch_size: int | None = None
) -> Float[Array, "N D"]:
    """Computes the Jacobian: columns in forward mode, if possible, or else rows."""

    def reverse(x: Array) -> Array:
        like = jnp.zeros_like(fn(x))
        return columns(transposed_product(fn, x), like, batch_size)

    forward = lambda x: columns(jax.linearize(fn, x)[1], x, batch_size).T
    return first_possible({"fwd": forward, "bwd": reverse}, flat, subject)[1](flat)


def transposed_product(fn: Flat, x: Array) -> Flat:
    """Returns the product with the transposed Jacobian, by reverse mode."""
    _, pull = jax.vjp(fn, x)
    return lambda cotangent: pull(cotangent)[0]


def hessian_matrix(
    fn: Flat, flat: Float[Array, " D"], subject: Subject, batch_size: int | None = None
) -> Float[Array, "D D"]:
    """Computes the Hessian of a scalar function, and makes it symmetric."""
    ways = {
        way: lambda x, product=product: columns(product(x), x, batch_size)
        for way, product in _hessian_products(fn).items()
    }
    matrix = first_possible(ways, flat, subject)[1](flat)
    return (matrix + matrix.T) / 2


def hessian_product(
    fn: Flat, flat: Float[Array, " D"], subject: Subject
) -> Callable[[Array], Array]:
    """Returns the product of a Hessian with vectors; all else is computed first."""
    products = _hessian_products(fn)
    ways = {
        way: _mapped(lambda x, tangent, product=product: product(x)(tangent))
        for way, product in products.items()
    }
    return products[first_possible(ways, flat, subject)[0]](flat)


def _hessian_products(fn: Flat) -> dict[str, Callable[[Array], Flat]]:
    """Returns several ways to the product of a Hessian at a point with vectors."""
    return {
        "fwd-bwd": lambda x: jax.linearize(jax.grad(fn), x)[1],
        # A Hessian is its own transpose.
        "bwd-bwd": lambda x: transposed_product(jax.grad(fn), x),
        "fwd-fwd": lambda x: _pushed(_forward_gradient(fn), x),
    }


def gauss_newton_products(
    fn: Flat, flat: Float[Array, " D"]
) -> tuple[Flat, Flat] | None:
    """Returns the products with a Jacobian and its transpose, without forming it.

    Returns `None` if both are not possible.
    """

    def forward(x: Array) -> tuple[Flat, Flat]:
        _, push = jax.linearize(fn, x)
        transposed = jax.linear_transpose(push, x)
        return push, lambda cotangent: transposed(cotangent)[0]

    def reverse(x: Array) -> tuple[Flat, Flat]:
        pull = transposed_product(fn, x)
        transposed = jax.linear_transpose(pull, fn(x))
        return lambda tangent: transposed(tangent)[0], pull

    for products in (forward, reverse):

        def both(x: Array, tangent: Array, products: Any = products) -> Array:
            push, pull = products(x)
            return pull(push(tangent))

        try:
            jax.eval_shape(jax.vmap(both, (None, 0)), flat, flat[None])
        except Exception:
            continue
        return products(flat)
    return None
