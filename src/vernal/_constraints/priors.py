"""Prior distributions of parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._boundary import PyTree, entrance, is_traced, refuse_foreign
from .._closure import Closure
from .._curvature import matmul
from .._pickling import PlainMethods, Portable, module_of
from .._tree import by_path, ravel
from .owned import owned, require_wide, shape_of

# So close to an end of its prior a parameter does not stop by accident.
_NEAR = 1e-2


class Normal(Portable, PlainMethods, eqx.Module):
    r"""A normal distribution, as a prior of a parameter.

    $$\log p(x) = -\frac{(x - \mu)^2}{2 \sigma^2} - \log(\sigma \sqrt{2 \pi})$$

    What is minimised has the first term only, as it has for residuals.

    **Attributes:**

    - `mean`, `std`: $\mu$ and $\sigma$, in the units of the parameter.
    """

    mean: Float[Array, "..."]
    std: Float[Array, "..."]

    @entrance
    def __init__(self, mean: ArrayLike, std: ArrayLike):
        """**Arguments:**

        - `mean`, `std`: numbers, or arrays that broadcast to the parameter. Where an
            element of it has no prior, give a `std` far larger than its error.

        **Raises:**

        - `ValueError`: if `std` is not positive, or one of them is not finite.
        """
        self.mean, self.std = _as_floats(mean, "mean"), _as_floats(std, "std")
        if is_traced(self.mean, self.std):
            is_proper = jnp.isfinite(self.mean).all() & (self.std > 0).all()
            message = "`mean` must be finite, and `std` finite and positive."
            is_bad = ~(is_proper & jnp.isfinite(self.std).all())
            self.mean, self.std = eqx.error_if((self.mean, self.std), is_bad, message)
            return
        for value, name in ((self.mean, "mean"), (self.std, "std")):
            if not np.isfinite(value).all():
                remedy = (
                    " An element without a prior takes a `std` far larger than its "
                    "error, such as 1e6 times that."
                    if name == "std" and np.size(value) > 1
                    else ""
                )
                raise ValueError(f"`{name}` is {value}, but must be finite.{remedy}")
        if not (np.asarray(self.std) > 0).all():
            raise ValueError(f"`std` is {std}, but must be positive.")

    @entrance
    def log_prob(self, value: ArrayLike) -> Float[Array, "..."]:
        """Returns the logarithm of the density, element by element."""
        value = _as_floats(value, "value")
        mean, std = self.mean.astype(value.dtype), self.std.astype(value.dtype)
        unit = (value - mean) / std
        return -0.5 * jnp.square(unit) - jnp.log(std) - 0.5 * np.log(2 * np.pi)


class Priors(Portable, PlainMethods, eqx.Module):
    """Priors of some parameters, by path: normal ones, and others."""

    normal: dict[str, Normal]
    others: dict[str, Closure]

    def rows(self, model: PyTree) -> Float[Array, " rows"]:
        """Returns a residual for each element that has a prior.

        Half the sum of their squares is the negative logarithm of a normal density; of
        another one they have the gradient, and the curvature where that is positive.
        """
        named = by_path(model).by_name()
        rows = [_row(p, named[path]) for path, p in self.normal.items()]
        rows += [_local_rows(p, named[path]) for path, p in self.others.items()]
        return ravel(rows)

    def count(self, model: PyTree) -> int:
        named = by_path(model).by_name()
        return sum(named[path].size for path in (*self.normal, *self.others))

    def required(self, model: PyTree, params: PyTree) -> PyTree:
        """Returns the parameters of a model that the priors allow; refuses any others.

        A normal prior allows all of them.
        """
        for path, density in self._densities(model).items():
            is_allowed = jnp.all(jnp.isfinite(density))
            message = (
                f"`priors`: the density of {path!r} is zero or not finite where it "
                "starts{}. Start where its prior allows."
            )
            if is_traced(is_allowed):
                params = eqx.error_if(params, ~is_allowed, message.format(""))
            elif not is_allowed:
                start = by_path(model).by_name()[path]
                raise ValueError(message.format(f", at {start}"))
        return params

    def allow(self, model: PyTree) -> Bool[Array, ""]:
        """Whether a model is where none of the densities is zero."""
        flags = [jnp.all(jnp.isfinite(x)) for x in self._densities(model).values()]
        return jnp.all(jnp.stack([jnp.array(True), *flags]))

    def ends(self, model: PyTree, is_near: bool) -> dict[str, tuple[Any, Any]]:
        """Returns the ends of each prior that has any, `None` for the other side.

        With `is_near`, of those at an end of which an element is.
        """
        named, found = by_path(model).by_name(), {}
        for path, closure in self.others.items():
            prior = closure.decode()
            ends = _ends(prior)
            is_at_one = any(_is_near(named[path], end, prior) for end in ends)
            if is_at_one if is_near else ends != (None, None):
                found[path] = ends
        return found

    def penalty(self, model: PyTree) -> Float[Array, ""]:
        """Returns the negative logarithm of the density.

        Without the constants of the normal priors: it is half the sum of squared `rows`
        for these.
        """
        named = by_path(model).by_name()
        terms = [
            0.5 * jnp.sum(jnp.square(_row(prior, named[path])))
            for path, prior in self.normal.items()
        ]
        terms += [-jnp.sum(x) for x in self._densities(model).values()]
        return jnp.sum(ravel(terms))

    def _densities(self, model: PyTree) -> dict[str, Array]:
        named = by_path(model).by_name()
        priors = self.others.items()
        return {path: _density(own.decode(), named[path]) for path, own in priors}


def _row(prior: Normal, value: Array) -> Array:
    mean, std = (
        jnp.broadcast_to(part.astype(value.dtype), value.shape)
        for part in (prior.mean, prior.std)
    )
    return (value - mean) / std


def _local_rows(prior: Closure, value: Array) -> Array:
    """Returns rows with the gradient and the curvature of a prior at this value."""
    log_prob, point = prior.decode().log_prob, jax.lax.stop_gradient(value.ravel())
    density = lambda flat: -jnp.sum(log_prob(flat.reshape(value.shape)))
    slope = jax.grad(density)(point)
    if jax.eval_shape(log_prob, value).shape == value.shape:
        # Each element has a prior of its own.
        curvature = jax.jvp(jax.grad(density), (point,), (jnp.ones_like(point),))[1]
        turn = lambda vector: vector
    else:
        curvature, vectors = jnp.linalg.eigh(jax.hessian(density)(point))
        turn = lambda vector: matmul(vectors.T, vector)
    root = jnp.sqrt(jnp.maximum(curvature, 0))
    here = jnp.where(root > 0, turn(slope) / jnp.where(root > 0, root, 1), 0)
    moved = root * turn(value.ravel() - point)
    return moved + jax.lax.stop_gradient(here)


def as_priors(given: Any, model: PyTree, reasons: Any) -> Priors | None:
    if given is None:
        return None
    normal: dict[str, Normal] = {}
    others: dict[str, Closure] = {}
    leaves = by_path(model).by_name()
    for path, prior in owned(given, "priors", model, reasons).items():
        leaf = jnp.asarray(leaves[path])
        if (known := _as_normal(prior)) is not None:
            normal[path] = known
            density = lambda x, p=known: _row(p, x)
        else:
            if not callable(getattr(prior, "log_prob", None)):
                raise TypeError(
                    f"`priors`: that of {path!r} is {prior!r}, which has no method "
                    "`log_prob`. Give `vn.Normal(mean, std)`, or a distribution of "
                    "NumPyro or Distrax."
                )
            prior = jax.tree.map(_as_array, prior)
            others[path], density = Closure.encode(prior), prior.log_prob
        found = shape_of(density, leaf, f"`priors`: that of {path!r}")
        if jnp.issubdtype(found.dtype, jnp.complexfloating):
            raise TypeError(f"`priors`: {path!r} is complex, and a prior is of reals.")
        require_wide(found.shape, path, leaf, "`priors`: that")
    return Priors(normal, others) if normal or others else None


def _density(prior: Any, value: Array) -> Array:
    """Returns the logarithm of a density: minus infinity beyond its ends.

    There NumPyro has a finite value, unless told to look (`validate_args`). At an end,
    where a fit may be held, and of what has no ends (an angle, a simplex), it is right.
    """
    density = prior.log_prob(value)
    low, high = _ends(prior)
    if low is None and high is None:
        return density
    is_within = jnp.ones_like(value, bool)
    if low is not None:
        is_within &= value >= low
    if high is not None:
        is_within &= value <= high
    axes = tuple(range(value.ndim - prior.support.event_dim, value.ndim))
    return jnp.where(jnp.all(is_within, axes), density, -jnp.inf)


def _ends(prior: Any) -> tuple[Any, Any]:
    """Returns the ends of the support of a distribution, `None` where none is told."""
    if _library(prior) != "numpyro":
        return None, None
    own = getattr(prior.support, "base_constraint", prior.support)
    if type(own).__name__ == "_Circular":
        return None, None
    low, high = (getattr(own, f"{side}_bound", None) for side in ("lower", "upper"))
    return low, high


def _is_near(value: Any, end: Any, prior: Any) -> bool:
    """Whether an element is at an end of a prior, beside its standard deviation."""
    if end is None:
        return False
    try:
        width = np.sqrt(np.asarray(prior.variance, float))
    except (AttributeError, NotImplementedError):
        width = np.inf
    return bool(np.any(abs(np.asarray(value, float) - np.asarray(end)) < _NEAR * width))


def _library(prior: Any) -> str:
    return module_of(type(prior)).split(".")[0]


_LIBRARIES = ("numpyro", "distrax", "tensorflow_probability", "flowjax", "distreqx")


def _as_normal(prior: Any) -> Normal | None:
    """Returns a normal distribution, of whatever library, as ours."""
    if isinstance(prior, Normal):
        return prior
    if type(prior).__name__ != "Normal" or _library(prior) not in _LIBRARIES:
        return None
    loc, scale = getattr(prior, "loc", None), getattr(prior, "scale", None)
    return None if loc is None or scale is None else Normal(loc, scale)


def _as_array(leaf: Any) -> Any:
    # So another number in a distribution compiles nothing again.
    return jnp.asarray(leaf, float) if type(leaf) in (int, float) else leaf


def _as_floats(value: Any, name: str) -> Array:
    """Returns numbers that a user gives as an array of floats."""
    refuse_foreign(value, f"`{name}`")
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    kinds = jnp.integer, jnp.floating
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(
            f"`{name}` is {value!r}, but must be a real number or an array."
        )
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # of what is infinite its own error tells
        return jnp.asarray(array, jnp.result_type(float))
