"""Projectors and errors from a Jacobian have twice the digits of those from J^T J."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn

N, D = 30, 5
NAMES = ("a", "b[0]", "b[1]", "b[2]", "c")


def tree(dtype=jnp.float64):
    zeros = jnp.zeros(D, dtype)
    return {"a": zeros[0], "b": zeros[1:4], "none": None, "c": zeros[4]}


def orthogonal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def prescribed(condition, units=0.0, dtype=np.float64, rows=N, nullity=0):
    """A Jacobian of known singular values, but for its rounding."""
    values = np.geomspace(1, 1 / condition, D)
    values[D - nullity :] = 0
    left, right = orthogonal(max(rows, D), D, 0), orthogonal(D, D, 1)
    unit = 10.0 ** np.linspace(-units, units, D)
    return ((left * values) @ right.T * unit)[:rows].astype(dtype)


def scaled(jac):
    """The Jacobian in extended precision and without units, and the units."""
    wide = np.asarray(jac, np.longdouble)
    norms = np.sqrt(np.sum(wide**2, axis=0))
    norms = np.where(norms > 0, norms, 1)
    return wide / norms, norms


def defect(projector, jac):
    """The largest element of P^T F P - I, in extended precision."""
    design, norms = scaled(jac)
    white = design @ (np.asarray(projector.matrix, np.longdouble) * norms[:, None])
    return float(np.max(abs(white.T @ white - np.eye(white.shape[1]))))


SPECTRA = [
    (np.float64, condition, units)
    for condition in (1, 1e2, 1e6, 1e9, 1e12)
    for units in (0, 100)
] + [
    (np.float32, condition, units)
    for condition in (1, 1e2, 1e4, 1e5)
    for units in (0, 30)
]


@pytest.mark.parametrize(("dtype", "condition", "units"), SPECTRA)
def test_the_defect_is_that_of_one_condition_number(dtype, condition, units):
    jac = prescribed(condition, units, dtype)
    projector = vn.EigenProjector.from_jacobian(jac, tree(dtype))
    assert projector.rank == D
    cond = np.linalg.cond(scaled(jac)[0].astype(float))
    eps = float(np.finfo(dtype).eps)
    assert defect(projector, jac) <= 50 * eps * cond
    found = projector.eigenvalues / projector.eigenvalues[0]
    expected = np.linalg.svd(scaled(jac)[0].astype(float), compute_uv=False) ** 2
    expected /= expected[0]
    np.testing.assert_allclose(found, expected, rtol=50 * eps * cond)
    np.testing.assert_allclose(
        projector.condition_number, 1 / expected[-1], rtol=50 * eps * cond
    )


@pytest.mark.parametrize(("dtype", "condition", "units"), SPECTRA)
def test_errors_are_those_of_the_singular_values(dtype, condition, units):
    jac = prescribed(condition, units, dtype)
    design, norms = scaled(jac)
    _, values, rows = np.linalg.svd(design.astype(float), full_matrices=False)
    expected = np.sqrt(np.sum((rows.T / values) ** 2, axis=1))
    errors = vn.EigenProjector.from_jacobian(jac, tree(dtype)).standard_errors()
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(errors)]) * norms
    rtol = 50 * float(np.finfo(dtype).eps) * values[0] / values[-1]
    # The oracle itself has no more digits than float64.
    np.testing.assert_allclose(found.astype(float), expected, rtol=rtol)


# --- what the data do not constrain ---


@pytest.mark.parametrize("rows", [N, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("on_null", ["drop", "prior"])
def test_null_directions(on_null, dtype, rows):
    nullity = 2
    jac = prescribed(1e2, 6.0, dtype, rows, nullity)
    projector = vn.EigenProjector.from_jacobian(jac, tree(dtype), on_null=on_null)
    assert projector.rank == D - nullity
    assert projector.latent_size == (D if on_null == "prior" else D - nullity)
    design, norms = scaled(jac)
    for null in projector.null_space():
        vector = np.array([null.get(name, 0) for name in NAMES])
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-3)
        residual = np.linalg.norm((design @ vector).astype(float))
        assert residual <= 100 * np.finfo(dtype).eps
    steps = np.asarray(projector.matrix, np.longdouble) * norms[:, None]
    white = (design @ steps).astype(float)
    expected = np.arange(projector.latent_size) < D - nullity
    atol = 1e4 * np.finfo(dtype).eps
    np.testing.assert_allclose(white.T @ white, np.diag(expected), atol=atol)


def test_an_element_that_is_not_seen_has_the_scale_one():
    jac = prescribed(10.0, 3.0)
    jac[:, 2] = 0
    projector = vn.EigenProjector.from_jacobian(jac, tree(), on_null="prior")
    assert projector.null_space() == ({"b[1]": 1.0},)
    np.testing.assert_allclose(projector.standard_errors()["b"][1], 1.0)
    dropped = vn.EigenProjector.from_jacobian(jac, tree())
    assert np.isinf(dropped.standard_errors()["b"][1])
    with pytest.raises(ValueError, match=r"`jac` does not constrain 1 of 5.*b\[1\]"):
        vn.EigenProjector.from_jacobian(jac, tree(), on_null="raise")


def test_rank_and_rtol():
    jac = prescribed(1e4)
    whole = vn.EigenProjector.from_jacobian(jac, tree())
    part = vn.EigenProjector.from_jacobian(jac, tree(), rank=3)
    assert (part.rank, part.latent_size) == (3, 3)
    np.testing.assert_allclose(part.matrix, whole.matrix[:, :3])
    values = np.asarray(whole.eigenvalues / whole.eigenvalues[0])
    rtol = float(np.sqrt(values[2] * values[3]))
    assert vn.EigenProjector.from_jacobian(jac, tree(), rtol=rtol).rank == 3


def test_a_well_conditioned_one_is_that_of_the_fisher_matrix():
    jac = prescribed(5.0, 3.0)
    found = vn.EigenProjector.from_jacobian(jac, tree())
    expected = vn.EigenProjector.from_fisher(jac.T @ jac, tree())
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-12)
    np.testing.assert_allclose(found.log_abs_det, expected.log_abs_det, rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), expected.covariance(), rtol=1e-10)


@pytest.mark.seams
def test_under_jit_and_vmap():
    stack = jnp.stack([prescribed(1e9), prescribed(2.0), prescribed(1e3, nullity=1)])
    make = lambda jac: vn.EigenProjector.from_jacobian(jac, tree(), on_null="prior")
    mapped = jax.jit(jax.vmap(make))(stack)
    np.testing.assert_array_equal(mapped.rank, [D, D, D - 1])
    for k, jac in enumerate(stack[:2]):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], mapped)
        assert defect(one, jac) <= 50 * np.finfo(float).eps * np.linalg.cond(jac)
    with pytest.raises(ValueError, match="`rank` must be given"):
        jax.jit(lambda jac: vn.EigenProjector.from_jacobian(jac, tree()))(stack[0])


BAD = {
    "shape": (np.ones((N, 4)), {}, ValueError, r"`jac` has shape \(30, 4\).*5 elem"),
    "vector": (np.ones(D), {}, ValueError, r"`jac` has shape \(5,\)"),
    "empty": (np.ones((0, D)), {}, ValueError, r"`jac` has shape \(0, 5\)"),
    "complex": (np.ones((N, D)) * 1j, {}, TypeError, "`jac` must be real"),
    "NaN": (np.full((N, D), np.nan), {}, ValueError, r"`jac`.*not finite.*\[0, 0\]"),
    "rank": (prescribed(1), {"rank": 6}, ValueError, "`rank` is 6, .* at most 5"),
    "rtol": (prescribed(1), {"rtol": 2.0}, ValueError, "`rtol`"),
    "null": (prescribed(1, nullity=2), {"rank": 4}, ValueError, "Only 3 of 5"),
    "nothing": (np.zeros((N, D)), {}, ValueError, "`jac` constrains no parameter"),
    "block": (
        prescribed(1),
        {"blocks": ("a", "d")},
        vn.UnknownPathError,
        "'d'",
    ),
    "rank of blocks": (prescribed(1), {"blocks": ("a",), "rank": 1}, TypeError, "map"),
    "ranks": (prescribed(1), {"rank": {"a": 1}}, TypeError, "`blocks`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    jac, options, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        vn.EigenProjector.from_jacobian(jac, tree(), **options)


# --- trainers ---


class Linear(vn.Trainer):
    """Residuals in a shape of their own, of a design that is the batch."""

    def residuals(self, model, batch):
        flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(model)])
        return (batch @ flat).reshape(2, -1)


class Complex(vn.Trainer):
    """The same in a complex plane; with a key, which changes nothing."""

    def residuals(self, model, batch, key=None):
        flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(model)])
        half = len(batch) // 2
        return jax.lax.complex(batch[:half] @ flat, batch[half:] @ flat)


ILL = prescribed(1e9, 6.0)
BLOCKS = (("a", "c"), "b")

WAYS = {
    "whole": {},
    "forward": {"jac": "fwd"},
    "reverse": {"jac": "bwd"},
    "one at a time": {"batch_size": 1},
    "three at a time": {"batch_size": 3},
    "seven at a time": {"batch_size": 7},
    "forward, some at a time": {"batch_size": 3, "jac": "fwd"},
    "reverse, some at a time": {"batch_size": 4, "jac": "bwd"},
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [(Linear, way) for way in WAYS]
    + [(Complex, way) for way in ("whole", "reverse", "reverse, some at a time")],
)
def test_every_way_to_a_whitening_has_the_digits(kind, way):
    key = jax.random.key(0) if kind is Complex else None
    trainer = kind(tree(), key=key)
    cond = np.linalg.cond(scaled(ILL)[0].astype(float))
    projector = trainer.whiten(jnp.asarray(ILL), **WAYS[way]).projector
    assert projector.rank == D
    assert defect(projector, ILL) <= 100 * np.finfo(float).eps * cond


@pytest.mark.parametrize("batch_size", [None, 3])
def test_blocks_have_the_digits(batch_size):
    trainer = Linear(tree())
    options = {"blocks": BLOCKS, "batch_size": batch_size}
    for projector in (
        trainer.whiten(jnp.asarray(ILL), **options).projector,
        vn.EigenProjector.from_jacobian(ILL, tree(), blocks=BLOCKS),
    ):
        for columns, whitening in zip(
            ([0, 4], [1, 2, 3]), projector._whitenings, strict=True
        ):
            part = np.asarray(whitening.matrix(), np.longdouble)
            white = ILL[:, columns].astype(np.longdouble) @ part
            excess = white.T @ white - np.eye(len(columns))
            cond = np.linalg.cond(scaled(ILL[:, columns])[0].astype(float))
            assert np.max(abs(excess)) <= 100 * np.finfo(float).eps * cond


def test_jacobian_is_that_of_jax():
    def residuals(params):
        return jnp.stack([params["a"] * params["b"], params["b"] ** 2 + params["c"]])

    params = jax.tree.map(lambda x: x + 0.3, tree())
    parts = jax.jacobian(residuals)(params)
    expected = np.concatenate(
        [np.reshape(x, (6, -1)) for x in jax.tree.leaves(parts)], axis=1
    )
    for options in ({}, {"jac": "bwd"}, {"batch_size": 2}):
        found = vn.jacobian(residuals, params, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    with pytest.raises(ValueError, match="`batch_size`"):
        vn.jacobian(residuals, params, batch_size=0)


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, y, sigma = batch
        return (model["slope"] * x + model["offset"] - y) / sigma


TIMES = {
    "years": (np.linspace(2010, 2024, 60), np.float32, 3e-3),
    "a night of BJD": (np.linspace(2460000.7, 2460001.1, 50), np.float64, 1e-5),
    "angstroms": (np.linspace(6560, 6566, 60), np.float32, 3e-2),
}


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("name", TIMES)
def test_a_line_far_from_its_origin(name):
    x, dtype, rtol = TIMES[name]
    sigma, rng = 0.1, np.random.default_rng(0)
    y = 0.5 * (x - x.mean()) + 3 + sigma * rng.normal(size=x.size)
    batch = tuple(jnp.asarray(v, dtype) for v in (x, y, np.full(x.size, sigma)))
    zero = jnp.zeros((), dtype)
    trainer = Line({"slope": zero, "offset": zero})
    # Of the data as they are in that precision.
    x, y, sigma = (np.asarray(v, np.longdouble) for v in batch)
    spread = np.sum((x - x.mean()) ** 2)
    errors = trainer.standard_errors(batch)
    expected = sigma[0] / np.sqrt(spread)
    np.testing.assert_allclose(errors["slope"], float(expected), rtol=rtol)
    offset = sigma[0] * np.sqrt(1 / x.size + x.mean() ** 2 / spread)
    np.testing.assert_allclose(errors["offset"], float(offset), rtol=rtol)
    assert "unconstrained" not in trainer.table(batch)
    white = trainer.whiten(batch)
    assert white.projector.rank == 2
    result = white.solve(optx.BFGS(1e-6, 1e-6), batch)
    slope = np.sum((x - x.mean()) * y) / spread
    best = np.sum(((y - y.mean() - slope * (x - x.mean())) / sigma) ** 2)
    chi = jnp.sum(trainer.residuals(result.model, batch) ** 2)
    np.testing.assert_allclose(chi, float(best), rtol=max(rtol, 1e-6))


# --- what is wrong is said in the user's words ---


def test_what_is_not_finite_is_refused():
    trainer, bad = Linear(tree()), jnp.asarray(ILL).at[3, 1].set(jnp.nan)
    calls = (
        lambda: trainer.fisher(bad),
        lambda: trainer.whiten(bad),
        lambda: trainer.standard_errors(bad),
        lambda: trainer.whiten(bad, blocks=BLOCKS),
        lambda: trainer.fisher(bad, blocks=BLOCKS, batch_size=1),
    )
    for call in calls:
        with pytest.raises(ValueError, match="`residuals` of `Linear` is not finite"):
            call()
    with pytest.raises(RuntimeError, match="`residuals` of `Linear` is not finite"):
        jax.block_until_ready(jax.jit(lambda b: trainer.standard_errors(b))(bad))
    assert jnp.isnan(jax.jit(lambda batch: trainer.fisher(batch))(bad)).any()


def test_units_whose_squares_are_not_representable():
    dtype = np.float32
    jac = prescribed(10.0, 30.0, dtype)
    trainer = Linear(tree(dtype))
    with pytest.raises(ValueError, match="too large"):
        trainer.fisher(jnp.asarray(jac))
    _, norms = scaled(jac)
    for options in ({}, {"batch_size": 2}):
        white = trainer.whiten(jnp.asarray(jac), **options)
        assert white.projector.rank == D
        assert defect(white.projector, jac) <= 1e3 * np.finfo(dtype).eps
    errors = jax.tree.leaves(trainer.standard_errors(jnp.asarray(jac)))
    found = np.concatenate([np.ravel(x) for x in errors]) * norms
    assert np.all((found + 1e-5 >= 1) & (found < 20))


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"blocks": BLOCKS}])
def test_no_gradient_flows_through_a_whitening(options):
    def total(batch):
        projector = Linear(tree()).whiten(batch, **options).projector
        return jnp.sum(projector.matrix) + projector.log_abs_det

    assert not jnp.any(jax.grad(total)(jnp.asarray(ILL)))


OPTIONS = {
    "on_null": ({"on_null": "dorp"}, ValueError, "`on_null` is 'dorp'"),
    "rtol": ({"rtol": 1.5}, ValueError, "`rtol`"),
    "rank": ({"rank": 9}, ValueError, "`rank` is 9, .* at most 5"),
    "ranks": ({"rank": {"a": 1}}, TypeError, "`rank` must be a mapping"),
    "rank of blocks": ({"rank": 1, "blocks": BLOCKS}, TypeError, "`rank` must be a"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_of_whiten(name):
    options, error, message = OPTIONS[name]
    with pytest.raises(error, match=message):
        Linear(tree()).whiten(jnp.asarray(ILL), **options)


def test_a_hessian_that_is_no_minimum():
    class Saddle(vn.Trainer):
        def nll(self, model, batch):
            return model["a"] ** 2 - model["b"] @ model["b"]

    match = "The Hessian of `nll` at this point.*not a minimum.*define `residuals`"
    for blocks in (None, ("a", "b")):
        with pytest.raises(ValueError, match=match) as info:
            Saddle(tree(), train=("a", "b")).whiten(None, blocks=blocks)
        assert "fmat" not in str(info.value)


@pytest.mark.parametrize("blocks", [None, ("steep", "other")])
@pytest.mark.parametrize("size", [4e37, 1e38, 3e38])
def test_a_column_whose_error_underflows_is_refused(size, blocks):
    """It would count as one of zeros, which the data do not constrain."""
    jac = np.array([[0, 2], [size, 0], [size, 0]], np.float32)
    params = {"other": jnp.zeros((), "f4"), "steep": jnp.zeros((), "f4")}
    make = lambda jac: vn.EigenProjector.from_jacobian(
        jac[:, ::-1], params, blocks=blocks, on_null="prior"
    ).standard_errors()
    if size * 2**0.5 < 8e37:
        np.testing.assert_allclose(make(jac)["steep"], 1 / size / 2**0.5, rtol=1e-5)
        return
    with pytest.raises(ValueError, match=r"beyond 8.5e.37.* zero in .*of steep"):
        make(jac)
    with pytest.raises(RuntimeError, match=r"beyond 8.5e.37"):
        eqx.filter_jit(make)(jnp.asarray(jac))
