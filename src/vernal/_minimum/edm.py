"""The estimated distance to the minimum: how far a loss could still fall."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._boundary import Params
from .._curvature import Spectrum, column_norms, matmul, square_factor
from .._tree import element_name

# A loss that can fall by this fraction of its scatter is at its minimum.
TOLERANCE = 1e-3

# A table shows no difference below about so many times that: a fifth of an error bar.
_WORTH_A_NOTE = 20

# Rounding leaves a singular value that is zero at this many machine epsilons.
_ROUNDING = 64

# Conjugate gradients take at most this many products.
_MOST_PRODUCTS = 64

# Without scatter, parameters that are right to this fraction count as exact.
_EXACT = 1e-8


class Distance(NamedTuple):
    r"""How far a point is from a minimum, in units of what is minimised.

    - `edm`: $\frac12 g^\top F^{-1} g$, NaN where it is not known.
    - `tolerance`: the largest `edm` of a minimum, beside the rounding of the loss.
    - `rounding`: how far the loss can fall unseen, since it is rounded.
    - `is_saddle`: whether the point cannot be a minimum: the loss curves downwards, is
        flat in every direction, or has derivatives that are not finite.
    - `is_complete`: whether `edm` is more than a lower bound.
    - `direction`: the direction of the minimum, of length one, with each parameter in
        units of its scale.
    """

    edm: Float[Array | np.ndarray, ""]
    tolerance: Float[Array | np.ndarray, ""]
    rounding: Float[Array | np.ndarray, ""]
    is_saddle: Bool[Array | np.ndarray, ""]
    is_complete: Bool[Array | np.ndarray, ""]
    direction: Float[Array | np.ndarray, " D"]

    @property
    def is_far(self) -> bool:
        """Whether a table would show the difference. For numbers on the host."""
        return bool(self.edm > _WORTH_A_NOTE * self.tolerance)

    @property
    def noise(self) -> Any:
        """The largest fall of the loss that means nothing. For numbers on the host."""
        return np.fmax(self.tolerance, self.rounding)

    @property
    def is_short(self) -> bool:
        """Whether the loss can fall further. For numbers on the host."""
        return bool(self.edm > self.noise or self.is_far or self.is_saddle)

    @property
    def is_minimum(self) -> bool:
        """Whether the loss cannot fall any further. For numbers on the host."""
        is_known = self.is_complete and not np.isnan(self.edm)
        return bool(is_known and not self.is_short)

    @property
    def remedy(self) -> str:
        """What helps where rounding hides the minimum. For numbers on the host."""
        if not (self.is_far and self.edm <= self.rounding):
            return ""
        dtype = self.edm.dtype
        wider = "" if dtype == np.float64 else "compute in float64, or "
        return (
            f"The loss is rounded, in {dtype}, by more than that: {wider}leave "
            "constants out of it"
        )


class Triangle(NamedTuple):
    """Residuals and their Jacobian at a point, reduced to a matrix of few rows.

    - `factor`: the factor $R$ of the columns of the Jacobian, each divided by its
        norm, and of the residuals as the last column.
    - `turn`: the matrix that turns a step in these units into one of the parameters in
        units of their scales.
    - `loss`: half the sum of squares, NaN if a derivative is not finite.
    - `size`: the number of residuals that are not zero.
    - `rounding`: how far the loss can fall unseen.
    - `spacing`: the distance that the spacing of the parameters may hide.
    - `exact`: the distance that counts as zero without scatter.
    - `has_fallen`: whether the loss has fallen on the way.
    - `scale`: the norms of the columns of the Jacobian.
    - `is_held`: whether all parameters are held at their bounds.
    """

    factor: Float[Array, "L+1 L+1"]
    turn: Float[Array, "D L"] | None
    loss: Float[Array, ""]
    size: Int[Array, ""]
    rounding: Float[Array, ""]
    spacing: Float[Array, ""]
    exact: Float[Array, ""]
    has_fallen: Bool[Array, ""]
    scale: Float[Array, " D"]
    is_held: Any = False

    @property
    def slope(self) -> Float[Array, " L"]:
        """The gradient, in units of the columns."""
        return matmul(self.factor[:-1, :-1].T, self.factor[:-1, -1])


class Spectral(NamedTuple):
    """The same as `Triangle`, by singular values.

    - `values`: the singular values.
    - `inner`: the products of the residuals with the left singular vectors.
    - `right`: the right singular vectors, as rows.
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
    is_held: Any = False


class Curved(NamedTuple):
    """The gradient and the Hessian at a point, in units of the Hessian's diagonal.

    `turn`, `loss` and `rounding` are as in `Triangle`; `tolerance` is as in `Distance`,
    `scale` the root of the diagonal.
    """

    slope: Float[Array, " L"]
    hessian: Float[Array, "L L"]
    turn: Float[Array, "D L"] | None
    loss: Float[Array, ""]
    rounding: Float[Array, ""]
    tolerance: Float[Array, ""]
    scale: Float[Array, " D"]
    is_held: Any = False


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
        return 0.5 * ((16 * self.eps * (self.flat * scale)) ** 2).sum()

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
    """Estimates how far a loss can fall unseen, since it is rounded."""
    return 4 * jnp.finfo(loss.dtype).eps * abs(loss)


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
    loss: Any = None,
) -> Triangle:
    """Reduces residuals and their Jacobian by a QR; `fall` is how far the loss fell.

    `loss` is by default half the sum of squares.
    """
    scale = own = column_norms(jacobian)
    free = jacobian
    if point.basis is not None:
        free = matmul(jacobian, point.basis)
        own = column_norms(free)
    together = jnp.column_stack([free / own[None, :], residuals])
    # LAPACK may not return if there is a NaN.
    is_finite = jnp.all(jnp.isfinite(together))
    together = jnp.where(is_finite, together, 0)
    loss = 0.5 * jnp.sum(jnp.square(residuals)) if loss is None else loss
    loss = jnp.where(is_finite, loss, jnp.nan)
    return Triangle(
        factor=square_factor(together),
        turn=point.turn(scale, own),
        loss=loss,
        # Missing data have residuals of zero.
        size=jnp.count_nonzero(residuals),
        rounding=rounding_of(loss),
        spacing=point.spacing(scale),
        exact=point.exact(scale),
        has_fallen=jnp.asarray(fall > 0),
        scale=scale,
    )


def curved(
    loss: Any,
    gradient: Any,
    hessian: Any,
    point: Point,
    tolerance: Any,
) -> Curved:
    """Scales a Hessian; `tolerance` is without the spacing of the parameters.

    Arrays of NumPy stay on the host, where nothing is compiled.
    """
    is_known = isinstance(hessian, np.ndarray)
    of: Any = np if is_known else jnp
    multiply: Any = np.matmul if is_known else matmul

    def units(matrix: Any) -> Any:
        root = of.sqrt(of.abs(of.diagonal(matrix)))
        return of.where(root > 0, root, 1)

    scale = own = units(hessian)
    spacing = point.spacing(scale)
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
        tolerance=of.fmax(tolerance, spacing),
        scale=scale,
    )


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
    return _of_spectral(_by_svd(local) if isinstance(local, Triangle) else local)


def spectral(
    spectrum: Spectrum, slope: Any, squares: Any, size: int, point: Point
) -> Spectral:
    """Makes a `Spectral`, on the host, from a decomposition of the Jacobian.

    `slope` is the gradient in units of the spectrum, `squares` the sum of the squares
    of `size` residuals.
    """
    loss = np.asarray(0.5 * squares)
    scale, values, vectors = (np.asarray(x, float) for x in spectrum)
    roots, right = np.sqrt(np.maximum(values, 0)), vectors.T
    inner = right @ np.asarray(slope, float) / np.where(roots > 0, roots, np.inf)
    turn = None
    if point.basis is not None:
        basis = np.asarray(point.basis, float)
        free = roots[:, None] * right @ (basis / scale[:, None])
        own = np.linalg.norm(free, axis=0)
        own = np.where(own > 0, own, 1)
        is_kept = roots > _noise(len(roots), loss.dtype) * roots[0]
        left, roots, right = np.linalg.svd(free / own, full_matrices=False)
        inner, turn = left.T @ np.where(is_kept, inner, 0), point.turn(1 / scale, own)
    ends = point.spacing(1 / scale), point.exact(1 / scale), False
    return Spectral(roots, inner, right, turn, loss, size, rounding_of(loss), *ends)


def _noise(size: int, dtype: Any) -> float:
    """Returns what rounding leaves of a singular value that is zero."""
    return max(_ROUNDING, size) * float(jnp.finfo(dtype).eps)


def _by_svd(local: Triangle) -> Spectral:
    factor = local.factor.astype(float)
    left, values, right = np.linalg.svd(factor[:-1, :-1])
    inner = left.T @ factor[:-1, -1]
    return Spectral(values, inner, right, *local[1:-2], local.is_held)


def _of_spectral(local: Spectral) -> Distance:
    r"""Finds the distance by singular values.

    With the orthonormal columns $Q$ that span those of $J$ it is
    $\frac12 \lVert Q^\top r \rVert^2$.
    """
    values, loss = local.values, local.loss
    noise = _noise(len(values), loss.dtype)
    is_kept = (values > noise * values[0]) & (values > 0)
    along = np.where(is_kept, local.inner, 0)
    edm = 0.5 * np.sum(np.square(along))
    step = -local.right.T @ (along / np.where(is_kept, values, 1))

    degrees = max(local.size - np.sum(is_kept), 1)
    tolerance = np.fmax(TOLERANCE * 2 * loss / degrees, local.spacing)
    # Without scatter only the spacing of the parameters sets a scale.
    if loss - edm <= 0.1 * edm:
        tolerance = np.fmax(tolerance, local.exact)
    # Far from the data a model may underflow, and no residual depends on a parameter.
    is_flat = not is_kept.any() and not (loss == 0 and local.has_fallen)
    is_flat = is_flat and not local.is_held
    return _distance(edm, tolerance, is_flat, local, step)


def _of_curved(local: Curved) -> Distance:
    """Finds the distance by the eigenvalues of the scaled Hessian."""
    slope, hessian = local.slope.astype(float), local.hessian.astype(float)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    eps, largest = np.finfo(local.hessian.dtype).eps, np.abs(values).max()
    is_kept = np.abs(values) > max(_ROUNDING, len(values)) * eps * largest
    along = np.where(is_kept, vectors.T @ slope, 0)
    curvature = np.where(is_kept, np.abs(values), 1)
    edm, is_flat = 0.5 * np.sum(np.square(along) / curvature), not slope.any()
    if largest == 0 and not is_flat:
        # Without curvature, as for a sum of absolute values, it is not known.
        edm = np.nan
    # Rounding makes less than this of a zero.
    curves_down = values[0] < -(eps**0.5) * largest
    is_saddle = (largest == 0 and is_flat and not local.is_held) or curves_down
    step = -vectors @ (along / curvature)
    return _distance(edm, local.tolerance, is_saddle, local, step)


def _distance(
    edm: Any, tolerance: Any, is_saddle: Any, local: Any, step: np.ndarray
) -> Distance:
    dtype = local.loss.dtype
    step = step if local.turn is None else local.turn @ step
    length = np.linalg.norm(step)
    return Distance(
        np.asarray(edm, dtype),
        np.asarray(tolerance, dtype),
        np.asarray(local.rounding, dtype),
        np.asarray(is_saddle),
        np.asarray(True),
        (step / length if length > 0 else step).astype(dtype),
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
    length = jnp.linalg.norm(step)
    return Distance(
        jnp.where(jnp.isfinite(loss), edm, jnp.nan),
        jnp.asarray(tolerance, loss.dtype),
        rounding_of(loss),
        is_saddle,
        now <= 1e-6 * size,
        -step / jnp.where(length > 0, length, 1),
    )


def unknown(like: Array | np.ndarray) -> Distance:
    """Returns a distance that is not known, in the dtype of the parameters."""
    nan, no = np.asarray(np.nan, like.dtype), np.asarray(False)
    return Distance(nan, nan, nan, no, no, np.zeros(like.shape, like.dtype))


def truth_p_values(
    distance: Distance, directions: int, squares: tuple[float, int] | None
) -> tuple[float, float]:
    r"""Returns how probable it is that the truth is as far from the minimum.

    There $2\,\mathrm{edm}$ has the distribution of chi-squared, with a degree of
    freedom for each of the `directions` that are constrained. That is the first number.
    The second holds for errors of any scale: the share that $2\,\mathrm{edm}$ has in
    the `squares` of residuals, a sum and its count, has the distribution of beta.
    """
    # A dependency of JAX.
    from scipy.special import betainc

    edm = float(distance.edm)
    if not distance.is_far:
        return 1.0, 1.0
    known = float(chi_squared_p_value(2 * edm, directions))
    if squares is None:
        return known, known
    total, count = squares
    if count <= directions:
        return known, 1.0
    rest = min(max(1 - 2 * edm / total, 0.0), 1.0)
    return known, float(betainc((count - directions) / 2, directions / 2, rest))


def chi_squared_p_value(value: Any, degrees: Any) -> Any:
    """Returns the probability of a larger chi-squared: 1 without degrees of freedom."""
    # A dependency of JAX. In 32 bits JAX's own has few digits.
    from scipy.special import chdtrc

    degrees = np.asarray(degrees, float)
    return np.where(degrees > 0, chdtrc(degrees, value), 1.0)


def edm_note(distance: Distance, params: Params) -> str | None:
    """Returns a note for a table if a trainer is not at a minimum."""
    if distance.is_saddle:
        return "not at a minimum: the loss is flat here, or curves downwards"
    if not distance.is_far:
        return None
    where = along(np.asarray(distance.direction, float), params)
    remedy = f". {distance.remedy}" if distance.remedy else ""
    return f"not at a minimum: edm {distance.edm:.3g}{where}{remedy}"


def along(direction: np.ndarray, params: Params) -> str:
    """Names the parameters that a direction involves most, with their weights."""
    order = np.argsort(-abs(direction), kind="stable")
    names = [
        f"{element_name(params, int(index))} ({direction[index]:+.2g})"
        for index in order[:5]
        if abs(direction[index]) > 0.1
    ]
    return f", along {', '.join(names)}" if names else ""
