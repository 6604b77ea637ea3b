"""The surroundings of a point, as a compiled program finds them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._curvature import Spectrum, column_norms, matmul, square_factor
from .edm import Distance

# Rounding leaves a singular value that is zero at this many machine epsilons.
ROUNDING = 64

# Without scatter, parameters that are right to this fraction count as exact.
_EXACT = 1e-8


class Triangle(NamedTuple):
    """Residuals and their Jacobian at a point, reduced to a matrix of few rows.

    - `factor`: the factor $R$ of the columns of the Jacobian of the data, each divided
        by the norm that it has with the priors, and of their residuals as the last
        column.
    - `priors`: the rows of the priors, in the same units.
    - `turn`: the matrix that turns a step in these units into one of the parameters in
        units of their scales.
    - `loss`: half the sum of squares, NaN if a derivative is not finite.
    - `size`: the number of residuals that are not zero.
    - `rounding`: how far the loss can fall unseen.
    - `spacing`: the distance that the spacing of the parameters may hide.
    - `exact`: the distance that counts as zero without scatter.
    - `has_fallen`: whether the loss has fallen on the way.
    - `scale`: the norms of the columns of the Jacobian.
    - `flat`: the parameters.
    - `held`: which parameters are held at their bounds.
    """

    factor: Float[Array, "L+1 L+1"]
    priors: Float[Array, "P L+1"]
    turn: Float[Array, "D L"] | None
    loss: Float[Array, ""]
    size: Int[Array, ""]
    rounding: Float[Array, ""]
    spacing: Float[Array, ""]
    exact: Float[Array, ""]
    has_fallen: Bool[Array, ""]
    scale: Float[Array, " D"]
    flat: Float[Array | np.ndarray, " D"]
    held: Any = False

    @property
    def slope(self) -> Float[Array, " L"]:
        """The gradient, in units of the columns."""
        rows = jnp.vstack([self.factor, self.priors])
        return matmul(rows[:, :-1].T, rows[:, -1])


class Spectral(NamedTuple):
    """The same as `Triangle`, by singular values.

    - `values`: the singular values.
    - `inner`: the products of the residuals with the left singular vectors.
    - `right`: the right singular vectors, as rows.
    - `scale`: the norms of the columns of the Jacobian.
    """

    values: Float[np.ndarray, " K"]
    inner: Float[np.ndarray, " K"]
    right: Float[np.ndarray, "K L"]
    turn: Float[Array | np.ndarray, "D L"] | None
    loss: Float[Array | np.ndarray, ""]
    size: Any
    rounding: Any
    spacing: Any
    exact: Any
    has_fallen: Any
    scale: Any
    flat: Any
    held: Any = False


class Curved(NamedTuple):
    """The gradient and the Hessian at a point, in units of the Hessian's diagonal.

    `turn`, `loss`, `rounding` and `spacing` are as in `Triangle`; `tolerance` is as in
    `Distance`, `scale` the root of the diagonal, `flat` are the parameters.
    """

    slope: Float[Array, " L"]
    hessian: Float[Array, "L L"]
    turn: Float[Array, "D L"] | None
    loss: Float[Array, ""]
    rounding: Float[Array, ""]
    tolerance: Float[Array, ""]
    spacing: Float[Array, ""]
    scale: Float[Array, " D"]
    flat: Float[Array | np.ndarray, " D"]
    held: Any = False


Local = Triangle | Spectral | Curved | Distance
"""What a compiled program finds out about the surroundings of a point."""


class Point(NamedTuple):
    """Where a distance is measured.

    - `flat`: the parameters.
    - `eps`: the spacing of each parameter, relative to itself.
    - `basis`: the directions that are free, `None` for all.
    """

    flat: Float[Array | np.ndarray, " D"]
    eps: Float[np.ndarray, " D"]
    basis: Float[Array, "D L"] | None = None

    def spacing(self, scale: Any) -> Any:
        """Estimates the distance that the spacing of the parameters may hide."""
        return 0.5 * ((self.eps * (self.flat * scale)) ** 2).sum()

    def exact(self, scale: Any) -> Any:
        """Returns the distance that counts as zero without scatter."""
        eps = np.maximum(self.eps, _EXACT)
        return 0.5 * ((eps * self.flat * scale) ** 2).sum()

    def turn(self, scale: Any, own: Any) -> Any:
        """Returns what turns steps in units of `own` into ones in units of `scale`."""
        if self.basis is None:
            return None
        return scale[:, None] * self.basis / own[None, :]


def rounding_of(loss: Any) -> Any:
    """Estimates how far a loss can fall unseen, since it is rounded.

    Below the smallest number of its dtype it is zero.
    """
    info = jnp.finfo(loss.dtype)
    return 4 * info.eps * abs(loss) + info.tiny


def underflows(diagonal: Any, flat: Any) -> Any:
    """Says of each parameter whether its second derivative was lost by its unit.

    It has the square of the unit below, such as of a kilogram for the mass of a star.
    """
    tiny = jnp.finfo(diagonal.dtype).tiny
    return (abs(diagonal) < tiny) & (abs(flat) > 0.1 / tiny**0.5)


def triangle(
    jacobian: Float[Array, "N D"],
    residuals: Float[Array, " N"],
    point: Point,
    fall: Any,
    loss: Any,
    priors: int,
) -> Triangle:
    """Reduces residuals and their Jacobian by a QR; `fall` is how far the loss fell.

    The last rows, so many as `priors`, are of priors.
    """
    scale = own = column_norms(jacobian)
    # What does nothing has no spacing that would matter: its norm is 1 by convention.
    known = jnp.where(jnp.any(jacobian != 0, axis=0), scale, 0)
    free = jacobian
    if point.basis is not None:
        free = matmul(jacobian, point.basis)
        own = column_norms(free)
    together = jnp.column_stack([free / own[None, :], residuals])
    # LAPACK may not return if there is a NaN.
    is_finite = jnp.all(jnp.isfinite(together))
    together = jnp.where(is_finite, together, 0)
    loss = jnp.where(is_finite, loss, jnp.nan)
    count = len(together) - priors
    return Triangle(
        factor=square_factor(together[:count]),
        priors=together[count:],
        turn=point.turn(scale, own),
        loss=loss,
        # Missing data have residuals of zero.
        size=jnp.count_nonzero(residuals),
        rounding=rounding_of(loss),
        spacing=point.spacing(known),
        exact=point.exact(known),
        has_fallen=jnp.asarray(fall > 0),
        scale=scale,
        flat=point.flat,
    )


def curved(
    loss: Any, gradient: Any, hessian: Any, point: Point, tolerance: Any
) -> Curved:
    """Scales a Hessian.

    Arrays of NumPy stay on the host, where nothing is compiled.
    """
    is_known = isinstance(hessian, np.ndarray)
    of: Any = np if is_known else jnp
    multiply: Any = np.matmul if is_known else matmul

    def units(matrix: Any) -> Any:
        root = of.sqrt(of.abs(of.diagonal(matrix)))
        return of.where(root > 0, root, 1)

    scale = own = units(hessian)
    spacing = point.spacing(of.where(of.diagonal(hessian) != 0, scale, 0))
    # What is held at a bound, or does nothing, has no gradient either.
    is_lost = of.any(underflows(of.diagonal(hessian), point.flat) & (gradient != 0))
    if point.basis is not None:
        hessian = multiply(multiply(point.basis.T, hessian), point.basis)
        gradient = multiply(point.basis.T, gradient)
        own = units(hessian)
    slope, hessian = gradient / own, hessian / own[None, :] / own[:, None]
    is_finite = of.all(of.isfinite(slope)) & of.all(of.isfinite(hessian)) & ~is_lost
    return Curved(
        slope=slope,
        hessian=hessian,
        turn=point.turn(scale, own),
        loss=of.where(is_finite, loss, np.asarray(np.nan, loss.dtype)),
        rounding=rounding_of(loss),
        tolerance=tolerance,
        spacing=spacing,
        scale=scale,
        flat=point.flat,
    )


def spectral(
    spectrum: Spectrum, slope: Any, squares: Any, size: int, point: Point
) -> Spectral:
    """Makes a `Spectral`, on the host, from a decomposition of the Jacobian.

    `slope` is the gradient in units of the spectrum, `squares` the sum of the squares
    of `size` residuals.
    """
    dtype = spectrum.values.dtype
    scale, values, vectors = (np.asarray(x, float) for x in spectrum)
    roots, right = np.sqrt(np.maximum(values, 0)), vectors.T
    inner = right @ np.asarray(slope, float) / np.where(roots > 0, roots, np.inf)
    turn = None
    if point.basis is not None:
        basis = np.asarray(point.basis, float)
        free = roots[:, None] * right @ (basis / scale[:, None])
        own = np.linalg.norm(free, axis=0)
        own = np.where(own > 0, own, 1)
        is_kept = roots > noise_of_zero(len(roots), dtype) * roots[0]
        left, roots, right = np.linalg.svd(free / own, full_matrices=False)
        inner, turn = left.T @ np.where(is_kept, inner, 0), point.turn(1 / scale, own)
    known = np.where(np.square(vectors) @ values > 0, 1 / scale, 0)
    ends = point.spacing(known), point.exact(known), False, 1 / scale, point.flat
    loss = np.asarray(0.5 * squares)
    with np.errstate(over="ignore"):
        rounding = rounding_of(loss.astype(dtype))
    return Spectral(roots, inner, right, turn, loss, size, rounding, *ends)


def noise_of_zero(size: int, dtype: Any) -> float:
    """Returns what rounding leaves of a singular value that is zero."""
    return max(ROUNDING, size) * float(jnp.finfo(dtype).eps)
