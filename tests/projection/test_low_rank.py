"""`EigenProjector.from_matvec`: the leading directions of a matrix never formed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

D, RANK = 100, 12
SPECTRA = {
    "geometric": 10.0 ** -np.linspace(0, 5, D),
    "identity": np.ones(D),
    "repeated": np.repeat([10.0, 3.0, 1.0], [5, 7, D - 12]),
    "clustered": np.concatenate([[10.0] * 4, np.linspace(3, 1, D - 4)]),
    "dominated": np.concatenate([[1e3], np.linspace(2, 1, D - 1)]),
    "low rank": np.concatenate([np.linspace(5, 1, 20), np.zeros(D - 20)]),
    "one": np.array([3.0]),
}


def matrix_of(values, dtype=jnp.float64):
    rng = np.random.default_rng(len(values))
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return jnp.asarray(basis * values @ basis.T, dtype)


class Product(eqx.Module):
    """A function of which every matrix of one size is a case: compiled once."""

    matrix: jax.Array

    def __call__(self, tree):
        return {"a": self.matrix @ tree["a"]}


def make(matrix, rank=RANK, **options):
    rank = min(rank, len(matrix))
    params = {"a": jnp.zeros(len(matrix), matrix.dtype)}
    options = {"key": jax.random.key(1), **options}
    return vn.EigenProjector.from_matvec(Product(matrix), params, rank, **options)


@eqx.filter_jit
def pulled_back(projector, gradient):
    """The gradient by the latent vector, as JAX finds it."""
    return jax.vjp(projector.to_params, jnp.zeros_like(gradient["a"]))[1](gradient)[0]


# In single precision those whose directions are hard to tell apart, or to see.
HARD = ("geometric", "clustered", "dominated", "low rank")


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float64) for name in SPECTRA] + [(name, jnp.float32) for name in HARD],
)
def test_laws(name, dtype):
    spectrum = SPECTRA[name]
    matrix, eps = matrix_of(spectrum, dtype), float(jnp.finfo(dtype).eps)
    projector = make(matrix)
    rank = projector.rank
    assert projector.latent_size == len(spectrum)
    np.testing.assert_allclose(
        projector.eigenvalues, spectrum[:rank], rtol=200 * eps * spectrum[0]
    )
    # On the kept directions the matrix is the identity...
    vectors = np.asarray(projector._whitenings[0].vectors, np.float64)
    whitening = np.asarray(projector.matrix, np.float64)
    white = whitening.T @ np.asarray(matrix_of(spectrum)) @ whitening
    kept = vectors.T @ white @ vectors
    condition = spectrum[0] / spectrum[rank - 1]
    np.testing.assert_allclose(kept, np.eye(rank), atol=100 * eps * condition)
    # ...and on the others close to it, on average.
    if rank < len(spectrum) and spectrum[-1] > 0:
        rest = (np.trace(white) - rank) / (len(spectrum) - rank)
        np.testing.assert_allclose(rest, 1.0, atol=0.3)
    latent = jnp.asarray(np.random.default_rng(0).normal(size=len(spectrum)), dtype)
    there = projector.to_params(latent)
    np.testing.assert_allclose(
        projector.to_latent(there), latent, atol=1e3 * eps * condition
    )
    _, log_det = np.linalg.slogdet(whitening)
    np.testing.assert_allclose(projector.log_abs_det, log_det, atol=1e3 * eps * D)
    gradient = {"a": latent}
    pulled = pulled_back(projector, gradient)
    np.testing.assert_allclose(
        projector.pull_back(gradient), pulled, rtol=1e-3, atol=1e-4
    )
    errors = np.linalg.norm(whitening, axis=1)
    np.testing.assert_allclose(projector.standard_errors()["a"], errors, rtol=1e-3)


class Diagonal(eqx.Module):
    """The same of a diagonal matrix, which may have many rows."""

    values: jax.Array

    def __call__(self, tree):
        return {"a": self.values * tree["a"]}


TALL = 3000
TALL_SPECTRA = {
    "identity": np.ones(TALL),
    "two values": np.repeat([100.0, 1.0], [3, TALL - 3]),
    "steep": np.exp(-0.5 * np.arange(TALL)),
}


@pytest.mark.loose_dtypes
def test_few_directions_of_many_rows_are_orthonormal():
    """The QR decomposition is that of a Gram matrix there, in which digits are lost."""
    dtype = jnp.float32
    params, eps = {"a": jnp.zeros(TALL, dtype)}, float(jnp.finfo(dtype).eps)
    for spectrum in TALL_SPECTRA.values():
        matvec = Diagonal(jnp.asarray(spectrum, dtype))
        key = jax.random.key(1)
        found = vn.EigenProjector.from_matvec(matvec, params, 6, key=key)
        vectors = np.asarray(found.whitenings[0].vectors, float)
        gram = vectors.T @ vectors
        np.testing.assert_allclose(gram, np.eye(6), rtol=0, atol=50 * eps)


@pytest.mark.seams
def test_where_every_direction_is_found_it_is_the_inverse():
    matrix = matrix_of(np.linspace(4, 1, RANK))
    covariance = make(matrix).covariance()
    np.testing.assert_allclose(covariance, np.linalg.inv(matrix), atol=1e-12)


def test_a_complement_without_curvature_has_no_bound():
    spectrum = np.where(np.arange(D) < RANK, np.linspace(5, 1, D), 0)
    projector = make(matrix_of(spectrum))
    assert np.isinf(projector.standard_errors()["a"]).all()
    softest = 1 / np.sqrt(projector.eigenvalues[-1])
    step = projector.to_params(jnp.ones(D) / D**0.5)
    assert jnp.linalg.norm(step["a"]) <= softest * (1 + 1e-9)
    with pytest.raises(ValueError, match="one by one"):
        projector.null_space()


def test_scale_makes_units_harmless():
    matrix = matrix_of(SPECTRA["geometric"])
    units = jnp.where(jnp.arange(D) % 2 == 0, 1e-9, 1e9)
    scaled = matrix / units[:, None] / units[None]
    plain, other = make(matrix), make(scaled, scale={"a": units})
    np.testing.assert_allclose(other.eigenvalues, plain.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(other.matrix / units[:, None], plain.matrix, atol=1e-6)


class Field(vn.Trainer):
    """A map of which few combinations are measured well, and all a little."""

    def residuals(self, model, batch):
        design, measured = batch
        return jnp.concatenate([design @ model["map"] - measured, 0.1 * model["map"]])


def test_thousands_of_parameters():
    size = 5_000
    design = jax.random.normal(jax.random.key(0), (30, size)) / size**0.5 * 50
    batch = design, jnp.linspace(-1, 1, 30)
    model = {"map": jnp.zeros(size)}

    def residuals(params):
        return Field.residuals(None, params, batch)

    matvec = vn.gauss_newton_matvec(residuals, model)
    projector = vn.EigenProjector.from_matvec(matvec, model, 30, key=jax.random.key(2))
    np.testing.assert_allclose(projector.eigenvalues.min(), 2500, rtol=0.2)
    trainer = Field(model, optax.sgd(0.5), projector=projector)
    losses = trainer.fit(batch, 30).history.loss
    # The same without a projector, at a rate that the stiff directions bear.
    matrix, point = np.asarray(design), np.zeros(size)
    for _ in range(30):
        misfit = matrix @ point - np.asarray(batch[1])
        target = 0.5 * (misfit @ misfit + 0.01 * point @ point)
        point = point - 1e-5 * (matrix.T @ misfit + 0.01 * point)
    assert losses[-1] < 0.1 * target
    with pytest.raises(ValueError, match="from_blocks"):
        Field(model, vn.ParamOptimiser({"map": optax.sgd(1.0)}), projector=projector)


def test_compiles_once():
    traces = 0

    def residuals(params):
        nonlocal traces
        traces += 1
        return jnp.sin(params["a"]) * jnp.arange(1.0, 31.0)

    for point in (jnp.zeros(30), jnp.linspace(1.0, 2.0, 30)):
        matvec = vn.gauss_newton_matvec(residuals, {"a": point})
        vn.EigenProjector.from_matvec(matvec, {"a": point}, 5, key=jax.random.key(0))
        if point[0] == 0:
            once = traces
    assert traces == once


def test_under_jit():
    matrix = matrix_of(SPECTRA["geometric"])

    @jax.jit
    def latent(matrix, x):
        return make(matrix).to_latent({"a": x})

    found = latent(matrix, jnp.ones(D))
    # The signs of eigenvectors do not matter here: the map is symmetric.
    expected = make(matrix).to_latent({"a": jnp.ones(D)})
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_under_vmap():
    """Of a small complement the mean is exact."""
    spectra = np.stack([np.linspace(4.0, 1.0, 6), np.linspace(9.0, 2.0, 6)])
    make_one = lambda values: make(jnp.diag(values), rank=2)
    many = eqx.filter_vmap(make_one)(jnp.asarray(spectra))
    assert many.latent_size == 6
    curvature = spectra[:, 2:].mean(axis=1)
    found = many.whitenings[0].curvature
    np.testing.assert_allclose(found, curvature, rtol=1e-12)
    latent = eqx.filter_vmap(lambda p: p.to_latent({"a": jnp.ones(6)}))(many)
    whitened = np.column_stack([spectra[:, :2], *[curvature] * 4])
    np.testing.assert_allclose(latent, np.sqrt(whitened), rtol=1e-6)


PARAMS = {"a": jnp.zeros(4)}
DIAGONAL = jnp.asarray([4.0, 3.0, 2.0, 1.0])


def product(*diagonal, below=0.0):
    """The product with a matrix of a diagonal, and of equal elements below it."""
    return Product(jnp.asarray(np.diag(diagonal) + np.tril(np.full((4, 4), below), -1)))


BAD = {
    "rank 0": (lambda t: t, {"rank": 0}, ValueError, "`rank` is 0"),
    "rank above": (lambda t: t, {"rank": 5}, ValueError, "`rank` is 5, .* at most 4"),
    "rank half": (lambda t: t, {"rank": 1.5}, Exception, "rank"),
    "no function": (3, {}, Exception, "matvec"),
    "structure": (lambda t: {"b": t["a"]}, {}, ValueError, "structure"),
    "shape": (lambda t: {"a": t["a"][:2]}, {}, ValueError, "shape"),
    "not symmetric": (
        product(1, 1, 1, 1, below=1.0),
        {},
        ValueError,
        "not the product with a symmetric",
    ),
    "not finite": (product(*[np.nan] * 4), {}, ValueError, "not finite"),
    "indefinite": (
        product(2.5, 1.5, 0.5, -0.5),
        {},
        ValueError,
        "gauss_newton_matvec",
    ),
    "flat": (product(1, 0, 0, 0), {}, ValueError, "Lower it. Only 1"),
    "scale": (lambda t: t, {"scale": {"a": -DIAGONAL}}, ValueError, "`scale`"),
    "scale shape": (lambda t: t, {"scale": {"a": jnp.ones(3)}}, ValueError, "`scale`"),
    "key": (lambda t: t, {"key": 0}, Exception, "key"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    matvec, options, error, message = BAD[name]
    options = {"rank": 2, "key": jax.random.key(0)} | options
    rank = options.pop("rank")
    with pytest.raises(error, match=message):
        vn.EigenProjector.from_matvec(matvec, PARAMS, rank, **options)
