"""Laws of every projector, however it was made; `test_dense.py` and others go on."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    places = [
        np.arange(end - leaf.size, end, dtype=float)
        for end, leaf in zip(ends, leaves, strict=True)
    ]
    chosen, _ = vn.split(structure.unflatten(places), selector)
    return np.concatenate(jax.tree.leaves(chosen)).astype(int)


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
    fisher: Callable[[np.ndarray, Any], np.ndarray] = lambda matrix, params: matrix
    """The matrix that is whitened, where it is not the one that was given."""
    basis: Callable[[Any], Any] = lambda projector: np.eye(projector.latent_size)
    """Latent vectors, as columns, in whose span it is whitened."""

    def given(self, dtype):
        return jnp.asarray(self.matrix, dtype)


def of_fisher(tree, matrix, rank, /, **options):
    def make(fmat, params, **more):
        return vn.EigenProjector.from_fisher(fmat, params, **options | more)

    return Case(tree, matrix, make, rank)


def pseudo_inverse(matrix, params):
    scale = np.sqrt(np.diag(matrix))
    scaled = matrix / scale[:, None] / scale
    return np.linalg.pinv(scaled, rtol=1e-5) / scale[:, None] / scale


def of_covariance(tree, matrix, rank, /, **options):
    def make(cov, params, **more):
        return vn.EigenProjector.from_covariance(cov, params, **options | more)

    return Case(tree, matrix, make, rank, pseudo_inverse)


def of_blocks(tree, matrix, rank, /, **options):
    def make(matrix, params, **more):
        blocks = blocks_of(matrix, params, tuple(rank))
        return vn.EigenProjector.from_blocks(blocks, params, **options | more)

    def whole(matrix, params):
        return block_diagonal(matrix, params, tuple(rank))

    return Case(tree, matrix, make, rank, whole)


def of_matvec(tree, matrix, rank, scale=None):
    def make(matrix, params, rank=rank):
        sizes = None if scale is None else ravel_pytree(params)[1](scale)
        return vn.EigenProjector.from_matvec(
            Product(matrix), params, rank, key=jax.random.key(0), scale=sizes
        )

    leading = lambda projector: projector._whitenings[0].vectors
    return Case(tree, matrix, make, rank, basis=leading)


UNITS = jnp.asarray(10.0 ** np.linspace(3, -3, D))
APART = {("flux", "position"): 2, "optics": 6}
SOME = {("a.x", "b.2"): 2, "a.z": 4}
SINGULAR = {("flux", "position"): 1, "optics": 5}

CASES = {
    "units": of_fisher(nested, fisher(units=9), D),
    "mixed dtypes": of_fisher(mixed, fisher(), D),
    "dropped": of_fisher(plain, fisher(5), 5),
    "rank": of_fisher(bare, fisher(), 5, rank=5),
    "prior": of_fisher(telescope, unseen(0, 1, 6), 6, on_null="prior"),
    "no information": of_fisher(nested, np.zeros((D, D)), None, on_null="prior"),
    "covariance": of_covariance(nested, fisher(), D),
    "covariance dropped": of_covariance(telescope, fisher(5), 5),
    "covariance prior": of_covariance(plain, fisher(5), 5, on_null="prior"),
    "blocks of mixed dtypes": of_blocks(mixed, fisher(), APART),
    "some blocks": of_blocks(nested, fisher(), SOME),
    "a bare array as a block": of_blocks(bare, fisher(), {"": D}),
    "blocks dropped": of_blocks(telescope, unseen(0, 1, 6), SINGULAR),
    "matvec scaled": of_matvec(telescope, fisher(), 5, UNITS),
    "matvec of mixed dtypes": of_matvec(mixed, fisher(units=0), 5),
}
IN_SINGLE_PRECISION = (
    "units",
    "mixed dtypes",
    "prior",
    "covariance",
    "some blocks",
    "blocks dropped",
    "matvec scaled",
)
TABLE = [(name, jnp.float64) for name in CASES]
TABLE += [(name, jnp.float32) for name in IN_SINGLE_PRECISION]
# One of each way to be made, in the precision that forgives least.
AS_FOR_USERS = [
    (name, jnp.float32) for name in ("covariance", "blocks dropped", "matvec scaled")
]


def is_for_users(name, dtype):
    return (name, dtype) in AS_FOR_USERS


def marks(name, dtype):
    if "mixed" in name:
        yield pytest.mark.loose_dtypes
    if is_for_users(name, dtype):
        yield pytest.mark.as_compiled


@eqx.filter_jit
def derivatives(projector, latent, grads):
    """The Jacobian of `to_params` in the flat latent vector, and its transpose."""
    vector, unravel = ravel_pytree(latent)
    forward = lambda vector: ravel_pytree(projector.to_params(unravel(vector)))[0]
    transpose = jax.vjp(projector.to_params, latent)[1]
    return jax.jacfwd(forward)(vector), transpose(grads)


@dataclass(frozen=True)
class Made:
    case: Case
    dtype: Any
    params: Any
    projector: vn.EigenProjector

    @property
    def eps(self):
        """The epsilon of the coarsest leaf."""
        leaves = jax.tree.leaves(self.params)
        return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)

    def latent(self, key=0):
        normal = np.random.default_rng(key).normal
        draw = lambda leaf: jnp.asarray(normal(size=leaf.shape), leaf.dtype)
        return jax.tree.map(draw, self.like)

    @functools.cached_property
    def like(self):
        return jax.eval_shape(self.projector.to_latent, self.params)

    @functools.cached_property
    def derivatives(self):
        """Of what is affine, at any point."""
        latent = jax.tree.map(jnp.zeros_like, self.latent())
        return derivatives(self.centred, latent, self.gradient())

    def tangent(self, key=0):
        """A tree like the parameters, each element about as large as its error."""
        noise = np.random.default_rng(key).normal(size=D)
        return self.unravelled(noise * self.sizes)

    def gradient(self, key=1):
        """A tree like the parameters, each element about as large as their inverse."""
        noise = np.random.default_rng(key).normal(size=D)
        return self.unravelled(noise / np.where(self.sizes > 0, self.sizes, 1))

    @functools.cached_property
    def sizes(self):
        """How far each element moves."""
        return np.linalg.norm(wide(self.projector.matrix), axis=1)

    def unravelled(self, vector):
        leaves, structure = jax.tree.flatten(self.params)
        parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
        return structure.unflatten(
            jnp.asarray(part.reshape(leaf.shape), leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        )

    @functools.cached_property
    def centred(self):
        """Around zero, since `x0 + P u` rounds away what is small beside `x0`."""
        return self.projector.at(jax.tree.map(jnp.zeros_like, self.params))


def table(*more, rows=TABLE):
    """The table, with marks: those that are compiled as for users may have more."""
    return [
        pytest.param(
            (name, dtype),
            id=f"{name}, {dtype.__name__}",
            marks=[*marks(name, dtype), *(more if is_for_users(name, dtype) else ())],
        )
        for name, dtype in rows
    ]


@pytest.fixture(params=table(), scope="module")
def made(request):
    return made_of(*request.param)


@functools.cache
def made_of(name, dtype):
    case = CASES[name]
    params = case.tree(dtype)
    return Made(case, dtype, params, case.make(case.given(dtype), params))


def wide(array):
    return np.asarray(array, np.float64)


def flat(tree):
    return np.concatenate([wide(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def assert_within(found, expected, size):
    """Compares element by element, each with the size of what cancels in it."""
    excess = abs(wide(found) - wide(expected)) - wide(size)
    assert excess.max(initial=-1) <= 0, (found, expected)


def assert_same_kind(found, expected):
    kind = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert kind(found) == kind(expected)


# --- the laws ---


# One of each way to be made, and of each kind of tree, where much is compiled.
some = pytest.mark.parametrize(
    "made",
    table(rows=[(name, jnp.float64) for name in IN_SINGLE_PRECISION]),
    indirect=True,
)


# Single precision forgives least.
@pytest.mark.parametrize("made", table(pytest.mark.seams), indirect=True)
def test_it_whitens_what_is_kept(made):
    """`P^T F P = I` to the precision that the condition allows, but for priors."""
    fmat = made.case.fisher(wide(made.case.given(made.dtype)), made.params)
    scale = np.sqrt(np.where(np.diag(fmat) > 0, np.diag(fmat), 1))
    matrix = wide(made.projector.matrix) * scale[:, None]
    assert matrix.shape == (D, made.projector.latent_size)
    matrix = matrix @ wide(made.case.basis(made.projector))
    scaled, rank = fmat / scale[:, None] / scale, int(made.projector.rank)
    white = np.linalg.eigvalsh(matrix.T @ scaled @ matrix)
    expected = np.arange(white.size) >= white.size - rank
    known = np.linalg.eigvalsh(scaled)
    condition = known[-1] / known[-rank] if rank else 1
    atol = 15 * float(jnp.finfo(made.dtype).eps) * condition
    np.testing.assert_allclose(white, expected, atol=atol)


def test_it_is_affine_and_keeps_dtypes(made):
    projector, latent = made.projector, made.latent()
    params = projector.to_params(latent)
    assert_same_kind(params, made.params)
    matrix, vector = wide(projector.matrix), flat(latent)
    start = flat(made.params)
    size = abs(start) + abs(matrix) @ abs(vector)
    assert_within(flat(params), start + matrix @ vector, 20 * made.eps * size)


def test_the_origin_is_zero(made):
    zero = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), made.latent())
    assert eqx.tree_equal(made.projector.to_params(zero), made.projector.origin)
    assert eqx.tree_equal(made.projector.to_latent(made.projector.origin), zero)
    assert eqx.tree_equal(made.projector.origin, made.params)


def test_to_latent_undoes_to_params(made):
    centred, latent = made.centred, made.latent()
    found = centred.to_latent(centred.to_params(latent))
    assert_same_kind(found, latent)
    np.testing.assert_allclose(flat(found), flat(latent), atol=1e3 * made.eps)


def test_to_params_undoes_to_latent(made):
    """Of every point that the latent space reaches; all of them, if none is dropped."""
    centred = made.centred
    point = made.tangent()
    if made.projector.latent_size < D:
        point = centred.to_params(made.latent())
    found = centred.to_params(centred.to_latent(point))
    assert_same_kind(found, point)
    sizes = np.linalg.norm(wide(made.projector.matrix), axis=1)
    assert_within(flat(found), flat(point), 1e3 * made.eps * sizes)


def test_the_matrix_is_the_jacobian_of_to_params(made):
    """Its columns are in the order of the flat latent tree."""
    jacobian = wide(made.derivatives[0])
    matrix = wide(made.centred.matrix)
    sizes = np.linalg.norm(matrix, axis=1)[:, None]
    assert_within(jacobian, matrix, 100 * made.eps * sizes)


def test_pull_back_is_the_transpose(made):
    grads = made.gradient()
    found = made.projector.pull_back(grads)
    assert_same_kind(found, made.latent())
    size = abs(wide(made.projector.matrix)).T @ abs(flat(grads))
    assert_within(flat(found), flat(made.derivatives[1]), 100 * made.eps * size)


def test_precondition_is_p_p_transpose(made):
    grads = made.gradient()
    found = made.projector.precondition(grads)
    assert_same_kind(found, made.params)
    matrix = wide(made.projector.matrix)
    size = abs(matrix) @ (abs(matrix).T @ abs(flat(grads)))
    expected = matrix @ (matrix.T @ flat(grads))
    assert_within(flat(found), expected, 100 * made.eps * size)


def test_log_abs_det_is_that_of_the_matrix(made):
    matrix = wide(made.projector.matrix)
    # A change of units by hand: the singular values of so graded a matrix, which are
    # wanted where it is not square, are not as accurate.
    unit = abs(matrix).max(axis=1)
    if made.projector.latent_size == D:
        expected = np.linalg.slogdet(matrix / unit[:, None])[1] + np.log(unit).sum()
    else:
        expected = np.log(np.linalg.svd(matrix, compute_uv=False)).sum()
    np.testing.assert_allclose(
        made.projector.log_abs_det, expected, atol=1e4 * made.eps
    )


def test_standard_errors_are_those_of_p_p_transpose(made):
    errors = made.projector.standard_errors()
    assert_same_kind(errors, made.params)
    found, variances = flat(errors), np.diag(wide(made.projector.covariance()))
    np.testing.assert_allclose(found, np.sqrt(variances), rtol=1e3 * made.eps)
    is_finite = np.isfinite(found)
    rows = np.linalg.norm(wide(made.projector.matrix), axis=1)
    np.testing.assert_allclose(found[is_finite], rows[is_finite], rtol=100 * made.eps)


@some
def test_no_gradient_flows_into_its_arrays(made):
    def everything(projector):
        params = projector.to_params(made.latent())
        reals = (
            params,
            projector.to_latent(params),
            projector.pull_back(params),
            projector.precondition(params),
            projector.matrix,
            projector.origin,
            projector.eigenvalues,
            projector.log_abs_det,
            projector.condition_number,
        )
        return sum(jnp.sum(x).astype(float) for x in jax.tree.leaves(reals))

    grads = eqx.filter_jit(eqx.filter_grad(everything))(made.projector)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@some
def test_it_goes_through_jit_and_vmap(made):
    projector = made.projector
    assert eqx.tree_equal(jax.jit(lambda p: p)(projector), projector)
    every = lambda projector, latent, grads: (
        projector.to_params(latent),
        projector.pull_back(grads),
        projector.precondition(grads),
        projector.to_latent(projector.to_params(latent)),
    )
    pairs = [(made.latent(key), made.gradient(key)) for key in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)
    mapped = jax.jit(jax.vmap(every, in_axes=(None, 0, 0)))(projector, *stacked)
    for k, pair in enumerate(pairs):
        expected = every(projector, *pair)
        one = jax.tree.map(lambda x, k=k: np.asarray(x)[k], mapped)
        assert_same_kind(one, expected)
        for found, leaf in zip(
            jax.tree.leaves(one), jax.tree.leaves(expected), strict=True
        ):
            scale = np.max(abs(wide(leaf)), initial=1e-30)
            np.testing.assert_allclose(found, leaf, atol=1e3 * made.eps * scale)


@pytest.mark.parametrize(
    "name", ["units", "dropped", "prior", "covariance", "some blocks", "blocks dropped"]
)
def test_it_is_made_under_jit(name):
    case = CASES[name]
    params, given = case.tree(jnp.float64), case.given(jnp.float64)
    expected = case.make(given, params)
    make = lambda given, params: case.make(given, params, rank=case.rank)
    found = eqx.filter_jit(make)(given, params)
    assert_same_kind(found, expected)
    sizes = np.linalg.norm(wide(expected.matrix), axis=1)
    first, second = (wide(p.matrix) @ wide(p.matrix).T for p in (found, expected))
    assert_within(first, second, 1e-9 * sizes[:, None] * sizes)


def test_a_point_is_no_part_of_what_is_differentiated():
    """Neither the matrix from which it was made nor the origin is trained."""
    case = CASES["some blocks"]

    def everything(given, params):
        projector = case.make(given, params)
        zero = projector.to_latent(projector.origin)
        reals = projector.to_params(zero), projector.matrix, projector.log_abs_det
        return sum(jnp.sum(x) for x in jax.tree.leaves(reals))

    params, given = case.tree(jnp.float64), case.given(jnp.float64)
    grads = jax.grad(everything, argnums=(0, 1))(given, params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
