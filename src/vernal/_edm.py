"""The estimated distance to the minimum: how far a loss could still fall."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._precision import matmul
from ._ravel import element_name
from ._typing import Params

# A loss that can fall by this fraction of its scatter is at its minimum.
TOLERANCE = 1e-3

# Rounding leaves a singular value that is zero at this many machine epsilons.
_ROUNDING = 64

# Conjugate gradients take at most so many products.
_MOST_PRODUCTS = 64

# Without scatter, parameters that are right to this fraction are right.
_EXACT = 1e-8


class Distance(NamedTuple):
    r"""How far a point is from a minimum, in units of what is minimised.

    - `edm`: $\frac12 g^\top F^{-1} g$, NaN where it cannot be had.
    - `limit`: what of it is too little to matter.
    - `is_saddle`: whether the loss curves downwards, or is flat wherever one looks.
    - `is_complete`: whether `edm` is more than a lower bound.
    - `direction`: where the minimum is; each parameter in units of its own scale, and
        the whole of length one.
    """

    edm: Float[Array, ""]
    limit: Float[Array, ""]
    is_saddle: Bool[Array, ""]
    is_complete: Bool[Array, ""]
    direction: Float[Array, " D"]

    @property
    def is_minimum(self) -> bool:
        """Whether the loss cannot fall any further, of numbers on the host."""
        return bool(self.is_complete and self.edm <= self.limit and not self.is_saddle)

    @property
    def is_short(self) -> bool:
        """Whether it can."""
        return bool(self.edm > self.limit or (self.is_saddle and self.edm >= 0))


def of_residuals(
    jacobian: Float[Array, "N D"],
    residuals: Float[Array, " N"],
    flat: Float[Array, " D"],
    eps: Float[np.ndarray, " D"],
    basis: Float[Array, "D L"] | None = None,
) -> Distance:
    r"""Finds the distance by a QR of the Jacobian, never by $J^\top J$.

    With the orthonormal columns $Q$ that span those of $J$ it is
    $\frac12 \lVert Q^\top r \rVert^2$.

    **Arguments:**

    - `jacobian`, `residuals`: $J$ and $r$.
    - `flat`: the parameters.
    - `eps`: the spacing of each parameter, relative to itself.
    - `basis`: the directions that are free, all of them by default.
    """
    scale = _column_norms(jacobian)
    free = jacobian if basis is None else matmul(jacobian, basis)
    own = scale if basis is None else _column_norms(free)
    count, size = free.shape
    together = jnp.column_stack([free / own, residuals])
    # Of a NaN LAPACK may not come back.
    is_finite = jnp.all(jnp.isfinite(together))
    together = jnp.where(is_finite, together, 0)
    factor = jnp.linalg.qr(together, mode="r")
    left, values, right = jnp.linalg.svd(factor[:size, :size], full_matrices=False)
    noise = max(_ROUNDING, size) * float(jnp.finfo(values.dtype).eps)
    is_kept = (values > noise * values[0]) & (values > 0)
    along = jnp.where(is_kept, matmul(left.T, factor[:size, size]), 0)
    edm = 0.5 * jnp.sum(jnp.square(along))
    step = -matmul(right.T, along / jnp.where(is_kept, values, 1)) / own
    step = step if basis is None else matmul(basis, step)

    loss = 0.5 * jnp.sum(jnp.square(residuals))
    degrees = jnp.maximum(count - jnp.sum(is_kept), 1)
    limit = jnp.fmax(TOLERANCE * 2 * loss / degrees, _rounding(loss, flat * scale, eps))
    # Without scatter there is nothing but the parameters themselves to measure by.
    is_exact = loss - edm <= 0.1 * edm
    exact = 0.5 * jnp.sum(jnp.square(np.maximum(eps, _EXACT) * flat * scale))
    limit = jnp.where(is_exact, jnp.fmax(limit, exact), limit)
    return Distance(
        jnp.where(is_finite, edm, jnp.nan),
        limit,
        # Far out a model may underflow, and nothing depends on any parameter.
        ~jnp.any(is_kept) & (loss > 0),
        jnp.array(True),
        _unit(scale * step),
    )


def of_hessian(
    loss: Float[Array, ""],
    gradient: Float[Array, " D"],
    hessian: Float[Array, "D D"],
    flat: Float[Array, " D"],
    eps: Float[np.ndarray, " D"],
    limit: Any,
    basis: Float[Array, "D L"] | None = None,
) -> Distance:
    """Finds the distance by the eigenvalues of the scaled Hessian.

    **Arguments:**

    - `loss`, `gradient`, `hessian`: of what is minimised.
    - `flat`, `eps`, `basis`: as for `of_residuals`.
    - `limit`: what of it is too little to matter, rounding aside.
    """
    scale = _nonzero(jnp.sqrt(jnp.abs(jnp.diag(hessian))))
    rounding = _rounding(loss, flat * scale, eps)
    own = scale
    if basis is not None:
        hessian = matmul(matmul(basis.T, hessian), basis)
        gradient = matmul(basis.T, gradient)
        own = _nonzero(jnp.sqrt(jnp.abs(jnp.diag(hessian))))
    scaled, slope = hessian / own / own[:, None], gradient / own
    is_finite = jnp.all(jnp.isfinite(scaled)) & jnp.all(jnp.isfinite(slope))
    scaled = jnp.where(is_finite, (scaled + scaled.T) / 2, 0)
    values, vectors = jnp.linalg.eigh(scaled)
    eps_here = float(jnp.finfo(values.dtype).eps)
    largest = jnp.max(jnp.abs(values))
    is_kept = jnp.abs(values) > max(_ROUNDING, len(values)) * eps_here * largest
    along = jnp.where(is_kept, matmul(vectors.T, slope), 0)
    curvature = jnp.where(is_kept, jnp.abs(values), 1)
    edm = 0.5 * jnp.sum(jnp.square(along) / curvature)
    step = -matmul(vectors, along / curvature) / own
    step = step if basis is None else matmul(basis, step)
    return Distance(
        # Without any curvature, as of a sum of absolute values, nobody knows.
        jnp.where(is_finite & (largest > 0), edm, jnp.nan),
        jnp.fmax(limit, rounding),
        # What rounding makes of a zero is smaller.
        values[0] < -(eps_here**0.5) * largest,
        jnp.array(True),
        _unit(scale * step),
    )


def of_products(
    loss: Float[Array, ""],
    gradient: Float[Array, " D"],
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    limit: Any,
) -> Distance:
    """Finds the distance by conjugate gradients, where no matrix is formed.

    Each iteration brings it closer, from below.

    **Arguments:**

    - `loss`, `gradient`: of what is minimised.
    - `product`: that of its curvature with a vector.
    - `precondition`: the product with a rough inverse of the curvature.
    - `limit`: as for `of_hessian`.
    """
    eps = float(jnp.finfo(gradient.dtype).eps)
    first = precondition(gradient)
    size = jnp.vdot(gradient, first)

    def goes_on(carry: Any) -> Array:
        count, _, _, _, now, _, is_saddle = carry
        is_left = (now > 1e-6 * size) & jnp.isfinite(now)
        return (count < _MOST_PRODUCTS) & is_left & ~is_saddle

    def iterate(carry: Any) -> Any:
        count, step, rest, heading, now, edm, _ = carry
        image = product(heading)
        curved = jnp.vdot(heading, image)
        scale = jnp.linalg.norm(heading) * jnp.linalg.norm(image)
        is_saddle = curved < -(eps**0.5) * scale
        is_flat = curved <= eps * scale
        length = jnp.where(is_flat, 0, now / jnp.where(is_flat, 1, curved))
        step = step + length * heading
        new = rest - length * image
        solved = precondition(new)
        then = jnp.where(is_flat, 0, jnp.vdot(new, solved))
        edm = edm + 0.5 * length * now
        heading = solved + then / now * heading
        return count + 1, step, new, heading, then, edm, is_saddle

    zero, no = jnp.zeros_like(gradient), jnp.array(False)
    start = (0, zero, gradient, first, size, jnp.zeros_like(size), no)
    _, step, _, _, now, edm, is_saddle = jax.lax.while_loop(goes_on, iterate, start)
    return Distance(
        edm,
        jnp.fmax(limit, 4 * eps * jnp.abs(loss)),
        is_saddle,
        now <= 1e-6 * size,
        _unit(-step),
    )


def _rounding(loss: Array, flat: Array, eps: np.ndarray) -> Array:
    """Estimates what rounding of the loss, and of the parameters, may hide."""
    of_params = 0.5 * jnp.sum(jnp.square(16 * eps * flat))
    return 4 * jnp.finfo(loss.dtype).eps * jnp.abs(loss) + of_params


def _column_norms(matrix: Array) -> Array:
    """Returns the norms of columns whose squares need not be representable."""
    units = _nonzero(jnp.max(jnp.abs(matrix), axis=0, initial=0))
    return units * _nonzero(jnp.linalg.norm(matrix / units, axis=0))


def _nonzero(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1)


def _unit(step: Array) -> Array:
    length = jnp.linalg.norm(step)
    return step / jnp.where(length > 0, length, 1)


def along(direction: np.ndarray, params: Params) -> str:
    """Names the parameters that a direction involves most, with their weights."""
    order = np.argsort(-abs(direction), kind="stable")
    names = [
        f"{element_name(params, int(index))} ({direction[index]:+.2g})"
        for index in order[:5]
        if abs(direction[index]) > 0.1
    ]
    return f", along {', '.join(names)}" if names else ""
