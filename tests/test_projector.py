"""Laws of every projector, however it was made; `test_dense.py` and others go on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn

D = 8


# --- trees of eight parameters ---


class Optics(eqx.Module):
    wfe: jax.Array
    name: str | None


class Telescope(eqx.Module):
    """Being a function too, it is what some libraries take for a leaf."""

    flux: jax.Array
    optics: Optics
    position: jax.Array | None

    def __call__(self, x):
        return self.flux * x


def telescope(dtype):
    return Telescope(
        flux=jnp.asarray(1e4, dtype),
        optics=Optics(jnp.arange(6, dtype=dtype).reshape(2, 3) * 1e-2, None),
        position=jnp.asarray([0.5], dtype),
    )


def nested(dtype):
    return {
        "a": {"x": jnp.asarray(2.0, dtype), "y": None, "z": jnp.ones((2, 2), dtype)},
        "b": [jnp.arange(2, dtype=dtype), None, jnp.asarray(-3.0, dtype)],
    }


def plain(dtype):
    return jnp.ones((), dtype), [jnp.zeros(3, dtype), None], -jnp.ones((2, 2), dtype)


def bare(dtype):
    return jnp.linspace(-1, 1, D, dtype=dtype)


def mixed(dtype):
    """The scalar is of another dtype than the rest."""
    other = jnp.float32 if dtype == jnp.float64 else jnp.float16
    return eqx.tree_at(lambda t: t.flux, telescope(dtype), jnp.asarray(100, other))


# --- matrices over them ---


def fisher(rank=D, condition=1e3, units=3.0):
    """A matrix of known rank, of a known condition on it, and of many units."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    spectrum = np.where(np.arange(D) < rank, np.geomspace(1, 1 / condition, D), 0)
    unit = 10.0 ** np.linspace(-units, units, D)
    matrix = (basis * spectrum) @ basis.T
    return unit[:, None] * (matrix + matrix.T) / 2 * unit


def unseen(*elements):
    """The first of the elements is not seen at all; of the others only the sum is."""
    fmat = fisher(units=0)
    first, *rest = elements
    fmat[first, :] = fmat[:, first] = 0
    for element in rest[1:]:
        fmat[element, :] = fmat[rest[0], :]
        fmat[:, element] = fmat[:, rest[0]]
    return fmat


class Product(eqx.Module):
    """The product with a matrix, as a pytree: it compiles once for all matrices."""

    matrix: jax.Array

    def __call__(self, tangent):
        flat, unravel = ravel_pytree(tangent)
        return unravel((self.matrix @ flat).astype(flat.dtype))


def elements(params, selector):
    """Returns where in the flat vector the parameters of a selector are."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(float), params))
    numbered = unravel(jnp.arange(flat.size, dtype=float))
    return np.asarray(ravel_pytree(vn.split(numbered, selector)[0])[0], int)


def blocks_of(matrix, params, selectors):
    found = {}
    for selector in selectors:
        own = elements(params, selector)
        found[selector] = matrix[np.ix_(own, own)]
    return found


def block_diagonal(matrix, params, selectors):
    """What the blocks stand for; a parameter without one has the identity."""
    whole = np.eye(D)
    for selector, block in blocks_of(matrix, params, selectors).items():
        own = elements(params, selector)
        whole[np.ix_(own, own)] = block
    return whole


# --- the table ---


class Case(NamedTuple):
    tree: Callable[[Any], Any]
    matrix: np.ndarray
    make: Callable[..., vn.EigenProjector]
    rank: Any
    """What to keep where a shape cannot depend on values."""
    selectors: tuple[Any, ...] = ()

    def params(self, dtype):
        return self.tree(dtype)

    def projector(self, dtype, **options):
        return self.make(jnp.asarray(self.matrix, dtype), self.tree(dtype), **options)

    def fisher(self):
        """The matrix that is whitened, whatever was given."""
        if self.selectors:
            params = self.tree(jnp.float64)
            return block_diagonal(self.matrix, params, self.selectors)
        return self.matrix


def of_fisher(tree, matrix, rank, **options):
    def make(fmat, params, **more):
        return vn.EigenProjector.from_fisher(fmat, params, **options, **more)

    return Case(tree, matrix, make, rank)


class OfCovariance(Case):
    def fisher(self):
        scale = np.sqrt(np.diag(self.matrix))
        scaled = self.matrix / scale[:, None] / scale
        return np.linalg.pinv(scaled, rtol=1e-9) / scale[:, None] / scale


def of_covariance(tree, matrix, rank, **options):
    def make(cov, params, **more):
        return vn.EigenProjector.from_covariance(cov, params, **options, **more)

    return OfCovariance(tree, matrix, make, rank)


def of_blocks(tree, matrix, rank, **options):
    def make(matrix, params, **more):
        blocks = blocks_of(matrix, params, tuple(rank))
        return vn.EigenProjector.from_blocks(blocks, params, **options, **more)

    return Case(tree, matrix, make, rank, tuple(rank))


def of_matvec(tree, matrix, rank, scale=None):
    def make(matrix, params, rank=rank):
        sizes = None if scale is None else ravel_pytree(params)[1](scale)
        return vn.EigenProjector.from_matvec(
            Product(matrix), params, rank, key=jax.random.key(0), scale=sizes
        )

    return Case(tree, matrix, make, rank)


UNITS = jnp.asarray(10.0 ** np.linspace(3, -3, D))
APART = {("flux", "position"): 2, "optics": 6}
SOME = {("a.x", "b.2"): 2, "a.z": 4}
SINGULAR = {("flux", "position"): 1, "optics": 5}

CASES = {
    "fisher": of_fisher(telescope, fisher(), D),
    "units": of_fisher(nested, fisher(units=9), D),
    "mixed dtypes": of_fisher(mixed, fisher(), D),
    "dropped": of_fisher(plain, fisher(5), 5),
    "an unseen element": of_fisher(telescope, unseen(0, 1, 6), 6),
    "rank": of_fisher(bare, fisher(), 5, rank=5),
    "prior": of_fisher(telescope, unseen(0, 1, 6), 6, on_null="prior"),
    "no information": of_fisher(nested, np.zeros((D, D)), None, on_null="prior"),
    "covariance": of_covariance(nested, fisher(), D),
    "covariance dropped": of_covariance(telescope, fisher(5), 5),
    "covariance prior": of_covariance(plain, fisher(5), 5, on_null="prior"),
    "blocks": of_blocks(telescope, fisher(), APART),
    "blocks of mixed dtypes": of_blocks(mixed, fisher(), APART),
    "some blocks": of_blocks(nested, fisher(), SOME),
    "a bare array as a block": of_blocks(bare, fisher(), {"**": D}),
    "blocks dropped": of_blocks(telescope, unseen(0, 1, 6), SINGULAR),
    "blocks prior": of_blocks(
        telescope, unseen(0, 1, 6), SINGULAR, on_null="prior"
    ),
    "matvec": of_matvec(telescope, fisher(units=0), 5),
    "matvec of mixed dtypes": of_matvec(mixed, fisher(units=0), 5),
    "matvec of every direction": of_matvec(nested, fisher(units=0), D),
    "matvec scaled": of_matvec(plain, fisher(), 3, UNITS),
}
DTYPES = (jnp.float32, jnp.float64)


class Made(NamedTuple):
    case: Case
    dtype: Any
    projector: vn.EigenProjector

    @property
    def eps(self):
        """The epsilon of the coarsest leaf."""
        leaves = jax.tree.leaves(self.projector.origin)
        return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)

    def latent(self, key=0):
        zero, unravel = ravel_pytree(self.projector.to_latent(self.projector.origin))
        return unravel(jax.random.normal(jax.random.key(key), zero.shape, zero.dtype))

    def tangent(self, key=0):
        """A tree like the parameters, each element of the size it moves by."""
        start, unravel = ravel_pytree(self.projector.origin)
        size = np.linalg.norm(wide(self.projector.matrix), axis=1)
        noise = np.asarray(jax.random.normal(jax.random.key(key), start.shape))
        return unravel(jnp.asarray(noise * size, start.dtype))


@pytest.fixture(
    params=[(name, dtype) for name in CASES for dtype in DTYPES],
    ids=lambda param: f"{param[0]}, {param[1].__name__}",
    scope="module",
)
def made(request):
    name, dtype = request.param
    return Made(CASES[name], dtype, CASES[name].projector(dtype))


def wide(array):
    return np.asarray(array, np.float64)


def flat(tree):
    return wide(ravel_pytree(tree)[0])


def assert_close(found, expected, size, eps):
    """Compares two vectors, each element with what may cancel in it."""
    np.testing.assert_array_less(abs(found - expected), 100 * eps * (size + 1e-300))


def assert_same_kind(found, expected):
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert kind(found) == kind(expected)


# --- the laws ---


def test_it_whitens(made):
    fmat = made.case.fisher()
    matrix = wide(made.projector.matrix)
    assert matrix.shape == (D, made.projector.latent_size)
    if made.case.make(jnp.asarray(made.case.matrix), made.case.params(jnp.float64)):
        pass


