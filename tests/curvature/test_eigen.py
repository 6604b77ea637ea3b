import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zodiax.optimisation as seed
from hypothesis import given, settings, strategies as st

import vernal as vn


def spectral(size, condition, units=0.0, dtype=np.float64, key=0):
    """A matrix in units of `10**±units`, and what it is without them.

    Without units it has a unit diagonal and a condition of about `condition`.
    """
    rng = np.random.default_rng(key)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (basis * np.geomspace(1, 1 / condition, size)) @ basis.T
    scale = 1 / np.sqrt(np.diag(matrix))
    matrix = scale[:, None] * matrix * scale
    matrix = (matrix + matrix.T) / 2
    unit = 10.0 ** rng.permutation(np.linspace(-units, units, size))
    return (unit[:, None] * matrix * unit).astype(dtype), matrix, unit


def identity_defect(projection, fmat):
    """`max|PᵀFP - I|`, in extended precision so that only P is on trial."""
    wide, fisher = (
        np.asarray(projection, np.longdouble),
        np.asarray(fmat, np.longdouble),
    )
    scale = np.sqrt(np.diag(fisher))
    wide, fisher = wide * scale[:, None], fisher / scale[:, None] / scale
    return float(np.max(abs(wide.T @ fisher @ wide - np.eye(len(wide)))))


def condition_of(fmat):
    wide = np.asarray(fmat, np.float64)
    scale = np.sqrt(np.diag(wide))
    return np.linalg.cond(wide / scale[:, None] / scale)


def eye_with(place, value):
    matrix = np.eye(3)
    matrix[place] = value
    return matrix


def with_signs_of(columns, other):
    columns, other = np.asarray(columns), np.asarray(other)
    return columns * np.sign(np.sum(columns * other, axis=0, keepdims=True))


# --- decompose ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalise", [False, True])
def test_decompose_is_that_of_the_seed(dtype, normalise):
    matrix = jnp.asarray(spectral(6, 1e3, dtype=dtype)[0])
    values, vectors = vn.decompose(matrix, normalise=normalise)
    expected_values, expected_vectors = seed.decompose(matrix, normalise=normalise)
    assert values.dtype == vectors.dtype == dtype
    rtol = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(values, expected_values, rtol=rtol * 1e3)
    expected_vectors = np.asarray(expected_vectors).T
    vectors = with_signs_of(np.asarray(vectors).T, expected_vectors)
    np.testing.assert_allclose(vectors, expected_vectors, atol=rtol * 1e3)


def test_decompose_sorts_rows_of_eigenvectors():
    matrix = jnp.diag(jnp.array([1.0, 5.0, -2.0, 3.0]))
    values, vectors = map(np.asarray, vn.decompose(matrix))
    np.testing.assert_allclose(values, [5, 3, 1, -2])
    np.testing.assert_allclose(vectors @ matrix, values[:, None] * vectors, atol=1e-14)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-14)


def test_decompose_of_a_matrix_that_is_not_symmetric():
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(4, 4))
    matrix = jnp.asarray(basis @ np.diag([3.0, -1, 7, 2]) @ np.linalg.inv(basis))
    values, vectors = map(np.asarray, vn.decompose(matrix, hermitian=False))
    np.testing.assert_allclose(values, [7, 3, 2, -1], rtol=1e-10)
    np.testing.assert_allclose(vectors @ matrix.T, values[:, None] * vectors, atol=1e-9)
    for ours, theirs in zip(
        (values, vectors), seed.decompose(matrix, hermitian=False), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_decompose_of_a_complex_hermitian_matrix():
    matrix = jnp.array([[2, 1j], [-1j, 2]])
    values, vectors = vn.decompose(matrix)
    np.testing.assert_allclose(values, [3, 1])
    for value, vector in zip(np.asarray(values), np.asarray(vectors), strict=True):
        np.testing.assert_allclose(np.dot(matrix, vector), value * vector, atol=1e-14)


def test_decompose_takes_integers_and_numpy_arrays():
    values, _ = vn.decompose(np.array([[2, 1], [1, 2]]))
    np.testing.assert_allclose(values, [3, 1])


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"`matrix`.*\(2, 3\)"),
        (np.ones(3), {}, r"`matrix`.*\(3,\)"),
        (np.zeros((0, 0)), {}, "`matrix` is empty"),
        (eye_with((1, 2), np.nan), {}, r"finite.*\[1, 2\]"),
        (np.array([[0.0, 1], [-1, 0]]), {"hermitian": False}, r"complex.*\[0\]"),
        (np.zeros((2, 2)), {"normalise": True}, "normalise.*0"),
        (-np.diag([0.0, 1]), {"normalise": True}, "normalise.*0"),
    ],
)
def test_decompose_says_what_is_wrong(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        vn.decompose(matrix, **options)


def test_decompose_refuses_a_complex_matrix_that_is_not_hermitian():
    with pytest.raises(TypeError, match="complex"):
        vn.decompose(jnp.eye(2, dtype=complex), hermitian=False)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (eye_with((1, 2), np.nan), {}, "finite"),
        (np.array([[0.0, 1], [-1, 0]]), {"hermitian": False}, "complex eigenvalues"),
        (np.zeros((2, 2)), {"normalise": True}, "normalise"),
    ],
)
def test_decompose_under_jit_raises_when_it_runs(matrix, options, message):
    run = eqx.filter_jit(lambda x: vn.decompose(x, **options))
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(run(matrix))


# --- eigen_projection ---

seeds_projection = jax.jit(seed.eigen_projection)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("argument", ["fmat", "cov"])
def test_projection_is_that_of_the_seed(dtype, argument):
    matrix = spectral(7, 1e2, units=3, dtype=dtype)[0]
    ours = vn.eigen_projection(**{argument: matrix})
    theirs = seeds_projection(**{argument: matrix})
    assert ours.dtype == dtype
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    scale = abs(theirs).max(axis=1, keepdims=True)
    ours, theirs = ours / scale, theirs / scale
    np.testing.assert_allclose(
        with_signs_of(ours, theirs), theirs, atol=2e3 * np.finfo(dtype).eps
    )


ACCURACY = [
    (np.float64, size, condition, units)
    for size in (2, 60)
    for condition in (1e0, 1e4, 1e8, 1e12)
    for units in (0, 12)
] + [
    (np.float32, size, condition, units)
    for size in (2, 60)
    for condition in (1e0, 1e3, 1e5)
    for units in (0, 12)
]


@pytest.mark.as_compiled
@pytest.mark.parametrize(("dtype", "size", "condition", "units"), ACCURACY)
def test_projection_whitens_whatever_the_units(dtype, size, condition, units):
    fmat = spectral(size, condition, units, dtype)[0]
    projection = vn.eigen_projection(fmat)
    # A sum of so many terms has a rounding of its own.
    bound = np.finfo(dtype).eps * (10 * condition_of(fmat) + size)
    assert identity_defect(projection, fmat) <= bound


@pytest.mark.parametrize("units", [0, 12])
def test_projection_of_a_covariance_is_its_square_root(units):
    cov, matrix, unit = spectral(8, 1e6, units)
    projection = np.asarray(vn.eigen_projection(cov=cov)) / unit[:, None]
    np.testing.assert_allclose(projection @ projection.T, matrix, atol=1e-14)


def test_projection_orders_columns_by_eigenvalue():
    fmat = spectral(6, 1e3, units=2)[0]
    projection = np.asarray(vn.eigen_projection(fmat)) * np.sqrt(np.diag(fmat))[:, None]
    information = 1 / np.sum(projection**2, axis=0)
    assert np.all(np.diff(information) < 0)


def test_projection_takes_the_symmetric_part_and_integers():
    expected = vn.eigen_projection(jnp.array([[2.0, 1], [1, 4]]))
    for fmat in (np.array([[2, 1], [1, 4]]), np.array([[2, 2], [0, 4]])):
        np.testing.assert_allclose(vn.eigen_projection(fmat), expected, rtol=1e-14)


def test_projection_is_the_same_under_jit_and_vmap():
    stack = np.stack([spectral(5, 10, 2, key=k)[0] for k in range(3)])
    plain = np.stack([vn.eigen_projection(fmat) for fmat in stack])
    jitted = np.stack(list(map(jax.jit(vn.eigen_projection), stack)))
    mapped = jax.jit(jax.vmap(vn.eigen_projection))(stack)
    np.testing.assert_allclose(jitted, plain, rtol=1e-10)
    np.testing.assert_allclose(mapped, plain, rtol=1e-10)


def test_projection_has_a_derivative():
    fmat = spectral(4, 10)[0]
    slope = jax.jit(jax.grad(lambda x: jnp.sum(vn.eigen_projection(x) ** 2)))(fmat)
    # The sum of squares is the trace of the inverse.
    inverse = np.linalg.inv(fmat)
    np.testing.assert_allclose(slope, -inverse @ inverse, rtol=1e-9)


SINGULAR = np.array([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]])
INDEFINITE = np.array([[1.0, 0, 2], [0, 1, 0], [2, 0, 1]])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), r"`fmat`.*\(2, 3\)"),
        (eye_with((0, 2), np.inf), r"finite.*\[0, 2\]"),
        (eye_with((1, 1), 0), r"not positive.*\[1, 1\]"),
        (eye_with((2, 2), -4), r"not positive.*\[2, 2\]: -4"),
        (SINGULAR, r"singular.*eigenvalue \[2\].*\[1, 2\]"),
        (INDEFINITE, r"indefinite.*minimum.*gauss_newton.*eigenvalue \[2\].*\[0, 2\]"),
    ],
)
def test_projection_says_what_is_wrong_and_where(matrix, message):
    with pytest.raises(ValueError, match=message):
        vn.eigen_projection(matrix)
    if matrix.shape == (3, 3):
        with pytest.raises(ValueError, match="`cov`"):
            vn.eigen_projection(cov=matrix)
        with pytest.raises(RuntimeError, match="`fmat`"):
            jax.block_until_ready(eqx.filter_jit(vn.eigen_projection)(matrix))


def test_projection_takes_one_matrix():
    with pytest.raises(ValueError, match="either"):
        vn.eigen_projection()
    with pytest.raises(ValueError, match="both given"):
        vn.eigen_projection(jnp.eye(2), jnp.eye(2))


def test_projection_refuses_a_complex_matrix():
    with pytest.raises(TypeError, match="`fmat` must be real"):
        vn.eigen_projection(jnp.eye(2, dtype=complex))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([1, 3, 5]),
    st.floats(0, 10),
    st.floats(0, 12),
    st.integers(0, 2**31),
)
def test_projection_whitens_any_matrix(size, digits, units, key):
    fmat = spectral(size, 10**digits, units, key=key)[0]
    bound = 10 * np.finfo(float).eps * condition_of(fmat)
    assert identity_defect(vn.eigen_projection(fmat), fmat) <= bound
