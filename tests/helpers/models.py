"""Small models that the tests share, and what is fitted to them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import vernal as vn


class Line(eqx.Module):
    """Two numbers, and a function of them: to some libraries it looks like one."""

    slope: jax.Array
    offset: jax.Array

    def __call__(self, x):
        return self.slope * x + self.offset


class Positive(vn.Bijection):
    def forward(self, free):
        return jnp.exp(free)

    def inverse(self, value):
        return jnp.log(value)


class Gaussian(eqx.Module):
    mean: jax.Array
    std: jax.Array
    power: jax.Array

    def __call__(self, x):
        return self.power * jnp.exp(-0.5 * ((x - self.mean) / self.std) ** 2)


class Pair(NamedTuple):
    left: Any
    right: Any


class Zoo(eqx.Module):
    """Every kind of node and leaf that a model may have."""

    scalar: jax.Array
    layers: list[Any]
    table: dict[str, Any]
    pair: Pair
    nothing: None
    count: jax.Array
    flag: jax.Array
    number: float
    integer: int
    wave: jax.Array
    host: np.ndarray
    activation: Callable[..., Any]
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.scalar * x


def line(slope=0.5, offset=-1.0, dtype=jnp.float64):
    return Line(jnp.asarray(slope, dtype), jnp.asarray(offset, dtype))


def gaussian():
    return Gaussian(*(jnp.asarray(v, jnp.float64) for v in (0.3, 1.2, 0.8)))


def zoo():
    return Zoo(
        scalar=jnp.asarray(1.5),
        layers=[
            {"weight": jnp.full((2, 3), 0.5), "bias": jnp.zeros(2)},
            {"weight": jnp.full((1, 2), -0.5), "bias": jnp.ones(1)},
        ],
        table={"a.b": jnp.arange(2.0), "a": {"c": jnp.asarray(4.0)}, "none": None},
        pair=Pair(jnp.asarray(2.0, jnp.float32), (jnp.asarray(3.0), None)),
        nothing=None,
        count=jnp.asarray(3),
        flag=jnp.asarray([True, False]),
        number=0.25,
        integer=7,
        wave=jnp.asarray([1 + 2j, -1j]),
        host=np.arange(3.0),
        activation=jax.nn.relu,
        name="zoo",
    )


ZOO_PATHS = (
    "scalar",
    "layers.0.bias",
    "layers.0.weight",
    "layers.1.bias",
    "layers.1.weight",
    "table.a.c",
    "table.a.b",
    "pair.left",
    "pair.right.0",
    "number",
    "wave",
    "host",
)


class LineFit(vn.Trainer):
    def loss(self, model, batch):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)


class GaussianFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y, sigma = batch
        return (model(x) - y) / sigma


class Pull(vn.Trainer):
    """Draws a model of any tree towards zero: no forward model is needed."""

    def loss(self, model, batch):
        leaves = [leaf for leaf in jax.tree.leaves(model) if eqx.is_inexact_array(leaf)]
        parts = (jnp.sum(jnp.abs(leaf - batch) ** 2) for leaf in leaves)
        return sum(part.astype(jnp.float64) for part in parts)


def line_batch(n=16, dtype=jnp.float64):
    x = jnp.linspace(-1, 1, n, dtype=dtype)
    return x, (2 * x + 1).astype(dtype)


def gaussian_batch(n=20):
    x = jnp.linspace(-4, 4, n)
    y = 1.5 * jnp.exp(-0.5 * ((x - 0.5) / 0.9) ** 2)
    return x, y, jnp.full(n, 0.1)


# Where things go wrong on purpose: one batch a step, scripted.


class Script(eqx.Module):
    """What is multiplied to the loss and to the gradients of `a` and `b` at a step."""

    loss: Any = 1.0
    a: Any = 1.0
    b: Any = 1.0


@jax.custom_vjp
def poisoned(value, factor):
    """`value` itself, with a gradient that is multiplied by `factor`."""
    return value


poisoned.defvjp(
    lambda value, factor: (value, factor),
    lambda factor, cotangent: (cotangent * factor, jnp.zeros_like(factor)),
)


def script(steps):
    """Batches from a string: `.` good, `l` loss, `a`, `b` gradients, `i` inf in `a`.

    Good ones make it up to eight, so that all scripts share their compilations.

    `u` is a gradient so large that Adam's second moment in float32 overflows.
    """
    factors = {
        ".": {},
        "l": {"loss": jnp.nan},
        "L": {"loss": -jnp.inf},
        "a": {"a": jnp.nan},
        "b": {"b": jnp.nan},
        "i": {"a": jnp.inf},
        "u": {"a": 1e20},
    }
    chosen = [
        {"loss": 1.0, "a": 1.0, "b": 1.0} | factors[c] for c in steps.ljust(8, ".")
    ]
    return Script(
        **{
            name: jnp.asarray([c[name] for c in chosen], jnp.float32)
            for name in ("loss", "a", "b")
        }
    )


def at(batches, index):
    return jax.tree.map(lambda x: x[index], batches)


class TwoFit(vn.Trainer):
    """Two float32 parameters, `a` with two entries; the batch says what goes wrong."""

    def loss(self, model, batch):
        a, b = poisoned(model["a"], batch.a), poisoned(model["b"], batch.b)
        value = jnp.sum((a - 1) ** 2) + (b + 2) ** 2
        # Added, since a factor of NaN would spread to the gradients.
        return value + jax.lax.stop_gradient(
            jnp.where(jnp.isfinite(batch.loss), 0, batch.loss)
        )


def two():
    return {"a": jnp.asarray([3.0, -1.0], jnp.float32), "b": jnp.asarray(0.5, "f4")}


def same(a, b):
    """Whether two trees are equal to the bit, types and structure included."""
    a, b = (eqx.filter(tree, eqx.is_array) for tree in (a, b))
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(jax.random.key_data(x) if _is_key(x) else x).tobytes()
        == np.asarray(jax.random.key_data(y) if _is_key(y) else y).tobytes()
        for x, y in pairs
    )


def same_results(result, expected):
    return same((result.trainer, result.history), (expected.trainer, expected.history))


def close(ours, theirs, rtol=None):
    """Requires the arrays of two trees to be equal to rounding, and of one dtype."""
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    ours, theirs = (eqx.filter(tree, is_array) for tree in (ours, theirs))
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        default, least = (1e-5, 2e-6) if a.dtype == jnp.float32 else (1e-9, 0)
        tolerance = default if rtol is None else max(rtol, least)
        if _is_key(a):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-12)


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
