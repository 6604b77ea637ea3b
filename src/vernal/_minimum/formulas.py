"""The formulas of the estimated distance to the minimum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .edm import TOLERANCE, Distance, unknown
from .leftover import leftover
from .local import Curved, Spectral, Triangle, noise_of_zero, rounding_of

# Residuals that scatter by a few spacings of the parameters have no scatter of their
# own, and parameters that are off by many of them are exact. A decomposition leaves
# some times the rounding of the loss.
_FEW_ULPS, _MANY_ULPS, _ROUNDED = 4, 16, 16

# A part of the distance that is not worth a look.
_NEXT_TO_NOTHING = 1e-2

# The square of a spacing, as a part of that of the parameter, above which many of them
# are an error that counts: in half precision they are some per cent.
_COARSE = 1e-9

# Conjugate gradients take at most this many products.
_MOST_PRODUCTS = 64


def distance_of(local: Any) -> Distance:
    """Finds the distance from a `Local` by NumPy.

    The matrices are small, and a program would compile for each shape.
    """
    local = jax.device_get(local)
    if isinstance(local, Distance):
        return local
    if not np.isfinite(local.loss):
        distance = unknown(np.zeros(0, local.loss.dtype))
        return distance._replace(is_saddle=np.asarray(True))
    if isinstance(local, Curved):
        return _of_curved(local)
    return _of_spectral(by_svd(local) if isinstance(local, Triangle) else local)


def by_svd(local: Triangle) -> Spectral:
    """Decomposes residuals and their Jacobian, on the host."""
    rows = np.vstack([local.factor, local.priors]).astype(float)
    left, values, right = np.linalg.svd(rows[:, :-1], full_matrices=False)
    inner, loss = left.T @ rows[:, -1], local.loss
    if loss < np.finfo(loss.dtype).tiny:
        # Squares that are too small for their dtype are none for a double.
        loss = 0.5 * np.sum(np.square(rows[:, -1]))
    known = local.size, local.rounding, local.spacing, local.exact, local.has_fallen
    here = local.scale, local.flat, local.held
    return Spectral(values, inner, right, local.turn, loss, *known, *here)


def _of_spectral(local: Spectral) -> Distance:
    r"""Finds the distance by singular values.

    With the orthonormal columns $Q$ that span those of $J$ it is
    $\frac12 \lVert Q^\top r \rVert^2$.
    """
    values, loss = local.values, local.loss
    noise = noise_of_zero(len(values), local.rounding.dtype)
    is_kept = (values > noise * values.max(initial=0)) & (values > 0)
    along = np.where(is_kept, local.inner, 0)
    edm = 0.5 * np.sum(np.square(along))
    step = -local.right.T @ (along / np.where(is_kept, values, 1))

    degrees = max(local.size - np.sum(is_kept), 1)
    tolerance, spacing = TOLERANCE * 2 * loss / degrees, local.spacing
    # What is left at the minimum is rounding, that of values and of the decomposition:
    # without scatter only the precision of the parameters sets a scale.
    if loss - edm <= max(_ROUNDED * local.rounding, _FEW_ULPS**2 * spacing):
        size = 0.5 * np.sum(np.square(np.asarray(local.flat, float) * local.scale))
        ulps = _FEW_ULPS if spacing > _COARSE * size else _MANY_ULPS
        spacing = np.fmax(ulps**2 * spacing, local.exact)
    unseen, rows = max(tolerance, local.rounding), values[:, None] * local.right
    rows = np.where(is_kept[:, None], rows, 0)
    spacing = _hidden(edm, spacing, unseen, rows, along, local)
    # Far from the data a model may underflow, and no residual depends on a parameter.
    is_exact = loss == 0 and (local.has_fallen or np.any(local.held))
    is_flat = not (is_kept.any() or is_exact or np.all(local.held))
    found = _distance(edm, (tolerance, spacing), is_flat, local, step)
    if local.turn is not None or not found.is_short:
        return found
    # A step that is longer than a parameter may lead nowhere.
    size = abs(np.asarray(local.flat, float) * local.scale)
    return found._replace(is_leap=bool(is_flat or np.any(abs(step) > size)))


def _of_curved(local: Curved) -> Distance:
    """Finds the distance by the eigenvalues of the scaled Hessian."""
    slope, hessian = local.slope.astype(float), local.hessian.astype(float)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    eps, largest = np.finfo(local.hessian.dtype).eps, np.abs(values).max(initial=0)
    noise = noise_of_zero(len(values), local.hessian.dtype)
    is_kept = np.abs(values) > noise * largest
    along = np.where(is_kept, vectors.T @ slope, 0)
    curvature = np.where(is_kept, np.abs(values), 1)
    edm, is_flat = 0.5 * np.sum(np.square(along) / curvature), not slope.any()
    if largest == 0 and not is_flat:
        # Without curvature, as for a sum of absolute values, it is not known.
        edm = np.nan
    # Rounding makes less than this of a zero.
    curves_down = values.min(initial=0) < -(eps**0.5) * largest
    is_saddle = (largest == 0 and is_flat and not np.all(local.held)) or curves_down
    step = -vectors @ (along / curvature)
    if curves_down:
        # Downhill; without a slope, its largest element is positive.
        way = vectors[:, 0]
        step = way * (-np.sign(way @ slope) or np.sign(way[abs(way).argmax()]))
    unseen, roots = max(local.tolerance, local.rounding), np.sqrt(curvature)
    rows = np.where(is_kept, roots, 0)[:, None] * vectors.T
    spacing = _hidden(edm, local.spacing, unseen, rows, along / roots, local)
    found = _distance(edm, (local.tolerance, spacing), is_saddle, local, step)
    left = leftover(values, vectors.T @ slope, vectors, local.loss, noise, 1.0)
    is_steep = bool(steep_part(local, found.visible, values, vectors).any())
    return found._replace(is_unclear=bool(left.is_unclear), is_steep=is_steep)


def steep_part(
    local: Curved,
    fall: Any,
    values: Float[np.ndarray, " L"],
    vectors: Float[np.ndarray, "L L"],
) -> Float[np.ndarray, " L"]:
    """Returns the part of the slope along which there is no curvature.

    Curvature that rounding may hide bounds the fall from below: a part is zero if it
    says less than `fall`. An element without any second derivative has no such unit.
    `values` and `vectors` decompose the Hessian.
    """
    slope = local.slope.astype(float)
    noise = noise_of_zero(len(values), local.hessian.dtype)
    hidden = noise * np.abs(values).max(initial=0)
    is_alone = ~np.any(local.hessian, axis=0)
    part = vectors @ np.where(np.abs(values) > hidden, 0, vectors.T @ slope)
    part = np.where(is_alone, 0, part)
    if part @ part <= max(2 * hidden * fall, noise**2 * (slope @ slope)):
        part = np.zeros_like(part)
    return np.where(is_alone, slope, part)


def _hidden(
    edm: Any, spacing: Any, unseen: Any, rows: np.ndarray, ends: np.ndarray, local: Any
) -> Any:
    """Returns the `spacing`, or zero where it is that of parameters which are right.

    A date of millions of days has a spacing that could hide any distance. It hides that
    of the date, and what this does to others, but not theirs. `rows` times a step, plus
    `ends`, have half the sum of squares that falls by `edm`.
    """
    if not unseen < edm <= spacing:
        return spacing
    # A dependency of JAX.
    from scipy.linalg import null_space

    shares = np.square(np.asarray(local.flat, float) * local.scale)
    shares, order = spacing * shares / shares.sum(), np.argsort(shares)
    limit = max(unseen, _NEXT_TO_NOTHING * edm)
    coarse = order[np.cumsum(shares[order]) > limit]
    if local.turn is None:
        free, moved = np.delete(rows, coarse, axis=1), rows[:, coarse]
    else:
        turn = np.asarray(local.turn, float)
        free, moved = rows @ null_space(turn[coarse]), rows @ np.linalg.pinv(turn)
        moved = moved[:, coarse]
    left, values, _ = np.linalg.svd(free, full_matrices=False)
    noise = noise_of_zero(len(values), np.float64)
    left = left[:, values > noise * values.max(initial=0)].T
    rest = 0.5 * np.sum(np.square(left @ ends))
    limit += np.square(left @ moved).sum(axis=0) @ shares[coarse]
    return spacing if rest <= limit else 0.0


def _distance(
    edm: Any, tolerances: tuple[Any, Any], is_saddle: Any, local: Any, step: np.ndarray
) -> Distance:
    tolerance, spacing = tolerances
    step = step if local.turn is None else local.turn @ step
    length = np.linalg.norm(step)
    return Distance(
        np.asarray(edm, float),
        np.asarray(tolerance, float),
        np.asarray(local.rounding),
        np.asarray(spacing, float),
        np.asarray(is_saddle),
        np.asarray(True),
        (step / length if length > 0 else step).astype(local.rounding.dtype),
        is_held=np.any(local.held),
    )


def of_products(
    loss: Float[Array, ""],
    gradient: Float[Array, " D"],
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    tolerance: Any,
) -> Distance:
    """Finds the distance by conjugate gradients, from below, without a matrix.

    `product` multiplies with the curvature, `precondition` with a rough inverse.
    """
    eps = float(jnp.finfo(gradient.dtype).eps)
    first = precondition(gradient)
    size = jnp.vdot(gradient, first)
    hidden = jnp.fmax(jnp.asarray(tolerance, loss.dtype), rounding_of(loss))

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
        # A slope without curvature says that it falls by more than rounding hides.
        is_steep = is_flat & ~is_saddle & (now**2 > 2 * eps * scale * hidden)
        then = jnp.where(is_flat, 0, jnp.vdot(new, solved))
        then = jnp.where(is_steep, jnp.nan, then)
        edm = edm + 0.5 * length * now
        # Along the heading of a saddle it curves downwards.
        is_way = is_saddle | is_steep
        heading = jnp.where(is_way, heading, solved + then / now * heading)
        return count + 1, step, new, heading, then, edm, is_saddle

    zero, no = jnp.zeros_like(gradient), jnp.array(False)
    start = (0, zero, gradient, first, size, jnp.zeros_like(size), no)
    end = jax.lax.while_loop(goes_on, iterate, start)
    _, step, _, heading, now, edm, is_saddle = end
    is_steep = jnp.isnan(now) & jnp.isfinite(edm)
    step = jnp.where(is_saddle | is_steep, heading, step)
    length = jnp.linalg.norm(step)
    return Distance(
        jnp.where(jnp.isfinite(loss), edm, jnp.nan),
        jnp.asarray(tolerance, loss.dtype),
        rounding_of(loss),
        jnp.zeros_like(loss),
        is_saddle,
        now <= 1e-6 * size,
        -step / jnp.where(length > 0, length, 1),
        is_steep=is_steep,
    )
