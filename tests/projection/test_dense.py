"""`EigenProjector` from a whole matrix: what is true of no other."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn


class Optics(eqx.Module):
    wfe: jax.Array
    name: str | None


class Telescope(eqx.Module):
    flux: jax.Array
    optics: Optics
    position: jax.Array | None


def telescope(dtype=jnp.float64, other=None):
    """Eight parameters, the scalar of another dtype if one is given."""
    return Telescope(
        flux=jnp.asarray(1e4, other or dtype),
        optics=Optics(jnp.arange(6, dtype=dtype).reshape(2, 3) * 1e-2, None),
        position=jnp.asarray([0.5], dtype),
    )


NAMES = (
    "flux",
    *(f"optics.wfe[{i},{j}]" for i in range(2) for j in range(3)),
    "position[0]",
)
D = len(NAMES)


def fisher(rank=D, condition=1e3, units=3.0, dtype=np.float64, key=0):
    """A Fisher matrix of known rank, and of a known condition on it."""
    rng = np.random.default_rng(key)
    basis, _ = np.linalg.qr(rng.normal(size=(D, D)))
    spectrum = np.where(np.arange(D) < rank, np.geomspace(1, 1 / condition, D), 0)
    unit = 10.0 ** np.linspace(-units, units, D)
    matrix = (basis * spectrum) @ basis.T
    return jnp.asarray((unit[:, None] * (matrix + matrix.T) / 2 * unit).astype(dtype))


def two_null_directions():
    """The flux is not seen at all; of `wfe[0,0]` and `wfe[1,2]` only the sum is."""
    fmat = np.array(fisher(units=0))
    fmat[0, :] = fmat[:, 0] = 0
    fmat[6, :] = fmat[1, :]
    fmat[:, 6] = fmat[:, 1]
    return jnp.asarray(fmat)


# --- what P is ---


@pytest.mark.parametrize("units", [0, 3, 12])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(np.float64, 1), (np.float64, 1e6), (np.float64, 1e12), (np.float32, 1e5)],
)
def test_from_fisher_whitens(units, dtype, condition):
    fmat = fisher(condition=condition, units=units, dtype=dtype)
    projector = vn.EigenProjector.from_fisher(fmat, telescope(dtype))
    wide = np.asarray(projector.matrix, np.longdouble)
    exact = np.asarray(fmat, np.longdouble)
    scale = np.sqrt(np.diag(exact))
    wide, exact = wide * scale[:, None], exact / scale[:, None] / scale
    defect = np.max(abs(wide.T @ exact @ wide - np.eye(D)))
    assert defect <= 10 * np.finfo(dtype).eps * np.linalg.cond(exact.astype(float))


def test_matrix_is_that_of_eigen_projection():
    for fmat, projector, plain in (
        (fisher(), vn.EigenProjector.from_fisher, vn.eigen_projection),
        (
            fisher(),
            vn.EigenProjector.from_covariance,
            lambda cov: vn.eigen_projection(cov=cov),
        ),
    ):
        expected = plain(fmat)
        np.testing.assert_allclose(
            abs(projector(fmat, telescope()).matrix), abs(expected), rtol=1e-8
        )


def test_dropped_directions_leave_the_rest_white():
    fmat = fisher(5)
    projector = vn.EigenProjector.from_fisher(fmat, telescope())
    assert (projector.rank, projector.latent_size) == (5, 5)
    assert projector.eigenvalues.shape == (D,)
    matrix = projector.matrix
    np.testing.assert_allclose(matrix.T @ fmat @ matrix, np.eye(5), atol=1e-10)


def test_to_latent_of_a_point_out_of_reach_is_the_metric_projection():
    fmat = fisher(5)
    projector = vn.EigenProjector.from_fisher(fmat, telescope())
    start, unravel = ravel_pytree(telescope())
    shift = jax.random.normal(jax.random.key(0), (D,)) / jnp.sqrt(jnp.diag(fmat))
    expected = projector.matrix.T @ fmat @ shift
    found = projector.to_latent(unravel(start + shift))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_condition_number_counts_what_is_kept():
    projector = vn.EigenProjector.from_fisher(fisher(5), telescope())
    values = projector.eigenvalues
    np.testing.assert_allclose(projector.condition_number, values[0] / values[4])
    assert projector.condition_number < 1e6


# --- uncertainty ---


@pytest.mark.parametrize("units", [0, 3, 12])
def test_covariance_is_the_inverse(units):
    fmat = fisher(units=units)
    unit = 10.0 ** np.linspace(-units, units, D)
    expected = np.linalg.inv(np.asarray(fmat) / np.outer(unit, unit))
    from_fisher = vn.EigenProjector.from_fisher(fmat, telescope())
    found = from_fisher.covariance() * np.outer(unit, unit)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    errors = ravel_pytree(from_fisher.standard_errors())[0] * unit
    np.testing.assert_allclose(errors, np.sqrt(np.diag(expected)), rtol=1e-9)

    from_covariance = vn.EigenProjector.from_covariance(fmat, telescope())
    found = from_covariance.covariance() / np.outer(unit, unit)
    np.testing.assert_allclose(found, fmat / np.outer(unit, unit), atol=1e-13)


def test_covariance_on_the_constrained_part_is_the_pseudo_inverse():
    fmat = fisher(5, units=0)
    projector = vn.EigenProjector.from_fisher(fmat, telescope())
    scale = jnp.sqrt(jnp.diag(fmat))
    expected = jnp.linalg.pinv(fmat / jnp.outer(scale, scale), rtol=1e-10)
    matrix = projector.matrix * scale[:, None]
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", ["from_fisher", "from_covariance"])
def test_a_dropped_direction_has_infinite_errors(make):
    make = getattr(vn.EigenProjector, make)
    projector = make(two_null_directions(), telescope())
    errors = projector.standard_errors()
    assert jnp.isinf(errors.flux)
    np.testing.assert_array_equal(
        jnp.isinf(errors.optics.wfe), [[True, False, False], [False, False, True]]
    )
    assert jnp.isfinite(errors.position[0])
    covariance = projector.covariance()
    np.testing.assert_allclose(
        jnp.sqrt(jnp.diag(covariance)), ravel_pytree(errors)[0], rtol=1e-14
    )
    # The two go opposite ways; neither of them has to do with the flux.
    assert covariance[1, 6] == covariance[6, 1] == -jnp.inf
    assert jnp.isfinite(covariance[0, 1:]).all()
    assert jnp.isfinite(covariance[2:6, :]).sum() == 4 * D


def test_a_prior_is_as_wide_as_the_scale_of_the_parameter():
    fmat = two_null_directions()
    projector = vn.EigenProjector.from_fisher(fmat, telescope(), on_null="prior")
    assert (projector.rank, projector.latent_size) == (D - 2, D)
    errors = projector.standard_errors()
    # A row of zeros tells no scale.
    np.testing.assert_allclose(errors.flux, 1)
    direction = np.zeros(D)
    direction[1], direction[6] = 1, -1
    scale = 1 / jnp.sqrt(fmat[1, 1])
    variance = direction @ projector.covariance() @ direction / 2
    np.testing.assert_allclose(variance, scale**2, rtol=1e-9)
    np.testing.assert_array_equal(jnp.isfinite(projector.covariance()), True)


# --- null directions by name ---


@pytest.mark.parametrize("on_null", ["drop", "prior"])
@pytest.mark.parametrize("make", ["from_fisher", "from_covariance"])
def test_null_space_names_combinations(make, on_null):
    make = getattr(vn.EigenProjector, make)
    space = make(two_null_directions(), telescope(), on_null=on_null).null_space()
    flux, pair = sorted(space, key=len)
    assert flux == {"flux": pytest.approx(1)}
    assert pair.keys() == {"optics.wfe[0,0]", "optics.wfe[1,2]"}
    assert sorted(pair.values()) == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert max(pair, key=pair.get) == next(iter(pair))


def test_null_space_is_the_null_space_in_units_of_the_scale():
    fmat = fisher(5)
    projector = vn.EigenProjector.from_fisher(fmat, telescope())
    scale = np.asarray(1 / jnp.sqrt(jnp.diag(fmat)))
    space = projector.null_space()
    assert len(space) == 3
    for null in space:
        vector = np.array([null.get(name, 0) for name in NAMES])
        np.testing.assert_allclose(np.linalg.norm(vector), 1)
        np.testing.assert_allclose(scale * (fmat @ (scale * vector)), 0, atol=1e-10)


def test_a_full_rank_has_no_null_space():
    assert vn.EigenProjector.from_fisher(fisher(), telescope()).null_space() == ()


def test_names_of_a_bare_array_and_of_a_bare_scalar():
    names = vn.EigenProjector.from_fisher(
        jnp.zeros((1, 1)), jnp.ones(1), on_null="prior"
    )
    assert names.null_space() == ({"[0]": 1.0},)


def test_raise_names_the_parameters():
    with pytest.raises(ValueError, match=r"2 of 8 directions.*flux") as info:
        vn.EigenProjector.from_fisher(
            two_null_directions(), telescope(), on_null="raise"
        )
    for name in ("optics.wfe[0,0]", "optics.wfe[1,2]"):
        assert name in str(info.value)
    assert "position" not in str(info.value)
    full = vn.EigenProjector.from_fisher(fisher(), telescope(), on_null="raise")
    assert full.rank == D


# --- rank and rtol ---


def test_rank_keeps_the_leading_directions():
    whole = vn.EigenProjector.from_fisher(fisher(), telescope())
    part = vn.EigenProjector.from_fisher(fisher(), telescope(), rank=3)
    assert (part.rank, part.latent_size) == (3, 3)
    np.testing.assert_allclose(part.matrix, whole.matrix[:, :3])


def test_rtol_decides_what_is_null():
    whole = vn.EigenProjector.from_fisher(fisher(), telescope())
    values = np.asarray(whole.eigenvalues / whole.eigenvalues[0])
    rtol = float(np.sqrt(values[4] * values[5]))
    part = vn.EigenProjector.from_fisher(fisher(), telescope(), rtol=rtol)
    assert part.rank == 5


def test_a_small_negative_eigenvalue_is_null():
    fmat = jnp.array([[1, 1 + 1e-16], [1 + 1e-16, 1]])
    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    assert vn.EigenProjector.from_fisher(fmat, params).rank == 1
    fmat = jnp.array([[1, 1 + 1e-6], [1 + 1e-6, 1]])
    assert vn.EigenProjector.from_fisher(fmat, params, rtol=1e-5).rank == 1
    with pytest.raises(ValueError, match="indefinite"):
        vn.EigenProjector.from_fisher(fmat, params)


def test_made_under_jit_and_vmap():
    stack = jnp.stack([fisher(5, key=k) for k in range(3)])
    make = lambda fmat: vn.EigenProjector.from_fisher(fmat, telescope(), rank=5)
    mapped = eqx.filter_jit(eqx.filter_vmap(make))(stack)
    found = jax.jit(jax.vmap(lambda p: p.to_latent(p.to_params(jnp.ones(5)))))(mapped)
    np.testing.assert_allclose(found, np.ones((3, 5)), atol=1e-4)
    assert (mapped.rank, mapped.latent_size) == (5, 5)
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[k], mapped)
        np.testing.assert_allclose(
            abs(one.matrix), abs(make(stack[k]).matrix), rtol=1e-7
        )


@pytest.mark.parametrize(
    "transform", [jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])]
)
def test_rank_is_asked_for_under_jit_and_vmap(transform):
    make = lambda fmat: vn.EigenProjector.from_fisher(fmat, telescope())
    with pytest.raises(ValueError, match="`rank` must be given"):
        transform(make)(fisher())


def test_null_space_is_not_known_under_jit():
    projector = vn.EigenProjector.from_fisher(fisher(5), telescope())
    with pytest.raises(ValueError, match="outside"):
        jax.jit(lambda p: p.null_space())(projector)


# --- errors ---

INDEFINITE = fisher().at[2, 2].multiply(0.01)


@pytest.mark.parametrize(
    ("fmat", "options", "message"),
    [
        (jnp.ones((3, 4)), {}, r"`fmat`.*\(3, 4\)"),
        (jnp.eye(3), {}, r"`fmat` has shape \(3, 3\).*8 elements.*\(8, 8\)"),
        (fisher().at[1, 2].set(jnp.nan), {}, r"finite.*\[1, 2\]"),
        (
            fisher().at[4, 4].set(-1),
            {},
            r"negative.*minimum.*gauss_newton.*optics.wfe\[1,0\]",
        ),
        (fisher().at[4, 4].set(0), {}, r"zero.*gauss_newton.*optics.wfe\[1,0\]"),
        (INDEFINITE, {}, r"negative.*minimum.*gauss_newton.*optics.wfe\[0,1\]"),
        (INDEFINITE, {"on_null": "prior"}, "gauss_newton"),
        (INDEFINITE, {"rank": 2}, "gauss_newton"),
        (jnp.zeros((D, D)), {}, "constrains no parameter"),
        (fisher(), {"rank": 0}, "`rank` is 0, .* at least 1"),
        (fisher(), {"rank": 9}, "`rank` is 9, .* at most 8"),
        (fisher(5), {"rank": 6}, "`rank=6`.*Only 5 of 8"),
        (fisher(), {"rank": 6, "on_null": "raise"}, "2 null directions"),
        (fisher(), {"rtol": -1.0}, "`rtol`.*-1"),
        (fisher(), {"rtol": 1.0}, "`rtol`"),
        (fisher(), {"rtol": float("nan")}, "`rtol`"),
    ],
)
def test_construction_says_what_is_wrong(fmat, options, message):
    with pytest.raises(ValueError, match=message):
        vn.EigenProjector.from_fisher(fmat, telescope(), **options)


@pytest.mark.parametrize(
    ("fmat", "rank", "message"),
    [
        (fisher().at[1, 2].set(jnp.nan), 8, "finite"),
        (fisher().at[4, 4].set(-1), 8, "minimum.*gauss_newton"),
        (INDEFINITE, 2, "minimum.*gauss_newton"),
        (fisher(5), 6, "`rank=6`"),
    ],
)
def test_construction_under_jit_raises_when_it_runs(fmat, rank, message):
    make = lambda fmat: vn.EigenProjector.from_fisher(fmat, telescope(), rank=rank)
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(eqx.filter_jit(make)(fmat).matrix)


def test_covariances_have_their_own_words():
    with pytest.raises(ValueError, match=r"`cov`.*covariance.*gauss_newton"):
        vn.EigenProjector.from_covariance(INDEFINITE, telescope())


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": jnp.ones(2) * 1j}, TypeError, "'a'.*complex128.*two real"),
        ({"a": jnp.arange(2)}, TypeError, "'a'.*int"),
        ({"a": {"f": jax.nn.relu}}, TypeError, "'a.f'.*eqx.filter"),
        ({"a": None}, ValueError, "no parameter"),
    ],
)
def test_parameters_must_be_real_and_floating(params, error, message):
    with pytest.raises(error, match=message):
        vn.EigenProjector.from_fisher(jnp.eye(2), params)


def test_arguments_of_methods_are_checked():
    projector = vn.EigenProjector.from_fisher(fisher(5), telescope())
    with pytest.raises(ValueError, match=r"`latent`.*\(8,\).*\(5,\)"):
        projector.to_params(jnp.ones(8))
    with pytest.raises(ValueError, match=r"`params`.*structure"):
        projector.to_latent({"a": jnp.ones(8)})
    wrong = eqx.tree_at(lambda p: p.optics.wfe, telescope(), jnp.ones(6))
    with pytest.raises(ValueError, match=r"`grads`.*optics.wfe.*\(6,\).*\(2, 3\)"):
        projector.pull_back(wrong)
    with pytest.raises(ValueError, match="`grads`"):
        projector.precondition([jnp.ones(8)])


def test_python_floats_and_integer_matrices():
    projector = vn.EigenProjector.from_fisher(
        np.array([[4, 0], [0, 9]]), {"a": 1.0, "b": jnp.array([2.0])}
    )
    params = projector.to_params(projector.to_latent({"a": 3.0, "b": jnp.ones(1)}))
    np.testing.assert_allclose(params["a"], 3)
    np.testing.assert_allclose(params["b"], [1])
    assert not params["a"].weak_type


def test_single_precision_survives_the_units():
    params = {"a": jnp.ones((), jnp.float32), "b": jnp.ones((), jnp.float32)}
    fmat = jnp.array([[1e24, 0.5], [0.5, 1e-24]], jnp.float32)
    projector = vn.EigenProjector.from_fisher(fmat, params)
    errors = projector.standard_errors()
    np.testing.assert_allclose(errors["a"], 1e-12 / 0.75**0.5, rtol=1e-5)
    np.testing.assert_allclose(errors["b"], 1e12 / 0.75**0.5, rtol=1e-5)
    np.testing.assert_allclose(projector.log_abs_det, -0.5 * np.log(0.75), atol=1e-5)
    assert jnp.isfinite(projector.covariance()).all()


def test_two_precisions_meet_under_strict_promotion():
    fmat = jnp.diag(jnp.arange(1.0, 9.0))
    mixed = telescope(other=jnp.float32)
    expected = vn.EigenProjector.from_fisher(fmat, mixed).matrix
    with jax.numpy_dtype_promotion("strict"):
        projector = vn.EigenProjector.from_fisher(fmat, mixed)
        latent = projector.to_latent(mixed)
        assert projector.to_params(latent).flux.dtype == jnp.float32
    np.testing.assert_array_equal(projector.matrix, expected)


# --- matrices that are not symmetric ---

MAKERS = {
    "fmat": vn.EigenProjector.from_fisher,
    "cov": vn.EigenProjector.from_covariance,
    "blocks[('flux', 'optics', 'position')]": lambda matrix, params: (
        vn.EigenProjector.from_blocks({("flux", "optics", "position"): matrix}, params)
    ),
}
LOPSIDED = {
    "a Cholesky factor": np.linalg.cholesky,
    "an upper triangle": np.triu,
    "a lower triangle": np.tril,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", LOPSIDED)
def test_a_matrix_that_is_not_symmetric_is_refused(kind, name):
    matrix = LOPSIDED[kind](np.asarray(fisher()))
    told = rf"{re.escape(name)}` is not symmetric.*`L @ L\.T`.*of flux and optics\.wfe"
    with pytest.raises(ValueError, match=told):
        MAKERS[name](matrix, telescope())


def test_a_matrix_that_is_not_symmetric_is_refused_in_a_program():
    errors = lambda m: vn.EigenProjector.from_fisher(
        m, telescope(), rank=D
    ).standard_errors()
    compiled = eqx.filter_jit(errors)
    expected = jax.tree.leaves(errors(fisher()))
    for ours, theirs in zip(jax.tree.leaves(compiled(fisher())), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(RuntimeError, match="`fmat` is not symmetric"):
        compiled(jnp.triu(fisher()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [8, 100, 20_000])
def test_rounding_in_products_makes_no_matrix_lopsided(rows, dtype):
    """Those of weights and a Jacobian in bfloat16 are how a TPU multiplies."""
    rng = np.random.default_rng(rows)
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    for _ in range(10):
        jac = rng.normal(rng.choice([0, 3]), 1, (rows, D)) * 10.0 ** rng.uniform(
            -5, 5, D
        )
        weights = 10.0 ** rng.uniform(-2, 2, (rows, 1))
        fmat = rounded(jac * weights).T @ rounded(jac)
        assert np.any(fmat != fmat.T)
        vn.EigenProjector.from_fisher(fmat, telescope(), on_null="prior", rtol=0.5)
