"""Derivatives forwards or backwards, whichever a function allows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Function = Callable[[Array], Array]


def works(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a function can be traced."""
    try:
        jax.eval_shape(fn, *args)
    except Exception:
        return False
    return True


def first_that_works(
    fn: Function, flat: Array, ways: tuple[Callable[..., Any], ...]
) -> Any:
    """Differentiates in the first of some ways that works, `None` if none does."""
    for way in ways:
        if works(lambda flat, way=way: jax.tree.leaves(way(fn, flat)), flat):
            return way(fn, flat)
    return None


def mode_of(fn: Callable[[Any], Any], point: Any, preferred: str) -> str:
    """Chooses between `"fwd"` and `"bwd"`.

    **Arguments:**

    - `fn`: a function of a tree.
    - `point`: where it is to be differentiated.
    - `preferred`: the mode to take if both work, or none.
    """
    other = "bwd" if preferred == "fwd" else "fwd"
    if _goes(fn, point, preferred) or not _goes(fn, point, other):
        return preferred
    return other


def _goes(fn: Callable[[Any], Any], point: Any, mode: str) -> bool:
    if mode == "fwd":
        return works(lambda x: jax.jvp(fn, (x,), (x,))[1], point)
    return works(lambda x: (lambda y, pull: pull(y))(*jax.vjp(fn, x)), point)


# Of a vector.


def forward_jacobian(fn: Function, flat: Array) -> tuple[Array, Array]:
    """Returns the Jacobian, a column at a time, and the vector."""
    vector, push = jax.linearize(fn, flat)
    return jax.vmap(push, out_axes=1)(_identity(flat)), vector


def reverse_jacobian(fn: Function, flat: Array) -> tuple[Array, Array]:
    """Returns the Jacobian, a row at a time, and the vector."""
    vector, pull = jax.vjp(fn, flat)
    return jax.vmap(pull)(_identity(vector))[0], vector


def jacobian_products(fn: Function, flat: Array) -> tuple[Array, Function, Function]:
    """Returns the vector, and the products with the Jacobian and its transpose."""
    vector, push = jax.linearize(fn, flat)
    pull = jax.linear_transpose(push, flat)
    return vector, push, lambda v: pull(v)[0]


# Of a scalar.


def forward_gradient(fn: Function, flat: Array) -> tuple[Array, Float[Array, " D"]]:
    """Returns the value and the gradient."""
    value, push = jax.linearize(fn, flat)
    return value, jax.vmap(push)(_identity(flat))


def reverse_gradient(fn: Function, flat: Array) -> tuple[Array, Float[Array, " D"]]:
    """Returns the value and the gradient."""
    return jax.value_and_grad(fn)(flat)


GRADIENTS = (reverse_gradient, forward_gradient)


def forward_over_reverse(fn: Function, flat: Array) -> tuple[Array, Array, Array]:
    """Returns the value, the gradient and the Hessian."""
    return _hessian(reverse_gradient, forward_jacobian, fn, flat)


def forward_twice(fn: Function, flat: Array) -> tuple[Array, Array, Array]:
    """Returns the value, the gradient and the Hessian."""
    return _hessian(forward_gradient, forward_jacobian, fn, flat)


def reverse_twice(fn: Function, flat: Array) -> tuple[Array, Array, Array]:
    """Returns the value, the gradient and the Hessian."""
    return _hessian(reverse_gradient, reverse_jacobian, fn, flat)


HESSIANS = (forward_over_reverse, forward_twice, reverse_twice)


def _hessian(
    gradient_of: Callable[..., Any],
    jacobian_of: Callable[..., Any],
    fn: Function,
    flat: Array,
) -> tuple[Array, Array, Array]:
    hessian, gradient = jacobian_of(lambda x: gradient_of(fn, x)[1], flat)
    return fn(flat), gradient, hessian


def hessian_products(fn: Function, flat: Array) -> tuple[Array, Array, Function]:
    """Returns the value, the gradient, and the product with the Hessian."""
    gradient, product = jax.linearize(jax.grad(fn), flat)
    return fn(flat), gradient, product


def _identity(flat: Array) -> Array:
    return jnp.eye(flat.size, dtype=flat.dtype)
