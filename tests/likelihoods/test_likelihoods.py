"""Likelihoods that `residuals` may return: values, derivatives, masks."""

import functools
import math
from decimal import Decimal, localcontext

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from scipy.optimize import least_squares

import vernal as vn
from vernal.likelihoods import Gaussian, Poisson, Robust

LOSSES = "soft_l1", "huber", "cauchy", "arctan"
DTYPES = {"float32": jnp.float32, "float64": jnp.float64}


def deviance(rate, count):
    """Twice the negative log-likelihood of a Poisson distribution, to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        rate, count = Decimal(float(rate)), Decimal(float(count))
        log = count * (count / rate).ln() if count else Decimal(0)
        return float(2 * (rate - count + log))


COUNTS = 0, 1, 2, 7, 1000, 2**20
RATIOS = 1e-6, 0.5, 0.73, 0.74, 0.9, 1 - 1e-4, 1 - 1e-6, 1, 1 + 1e-6, 1.3, 1.36, 2, 1e3


@pytest.mark.parametrize("name", DTYPES)
def test_poisson_has_the_digits_of_its_dtype(name):
    dtype = DTYPES[name]
    pairs = [(ratio * max(n, 1), n) for n in COUNTS for ratio in RATIOS]
    rate, count = (np.asarray(column, dtype) for column in zip(*pairs, strict=True))
    residuals = jax.jit(lambda rate, count: Poisson(rate, count).residuals())
    found = np.asarray(residuals(rate, count), float)
    exact = np.array([deviance(*pair) for pair in zip(rate, count, strict=True)])
    sign = np.sign(rate.astype(float) - count.astype(float))
    rtol = 60 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, sign * np.sqrt(exact), rtol=rtol)


@pytest.mark.parametrize("name", DTYPES)
def test_the_derivative_of_poisson_is_exact_where_the_deviance_is_zero(name):
    dtype = DTYPES[name]
    count = np.asarray([0, 1, 1, 4, 4, 9, 1000], dtype)
    rate = np.asarray([0, 1, 1e-4, 4, 5, 30, 1000], dtype)
    slope = jax.jit(jax.grad(lambda rate: Poisson(rate, count).nll()))(rate)
    rtol = 60 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(slope, 1 - count / np.where(rate > 0, rate, 1), rtol)
    root = jax.grad(lambda r, n: Poisson(r[None], n[None]).residuals()[0])
    found = np.asarray(jax.jit(jax.vmap(root))(rate[1:], count[1:]))
    near = rate[1:] == count[1:]
    np.testing.assert_allclose(found[near], 1 / np.sqrt(count[1:][near]), rtol=rtol)


@functools.partial(jax.jit, static_argnums=1)
def robust_nll(left, loss, scale=1.0):
    return Robust(left, loss, scale).nll()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_robust_losses_are_those_of_scipy(loss, scale):
    left = np.array([0.0, 1e-6, -0.02, 0.3, -1.0, 4.0, -50.0, 1e4])
    known = least_squares(
        lambda _: left, [0.0], jac=lambda _: np.ones((8, 1)),
        loss=loss, f_scale=scale, max_nfev=1,
    )  # fmt: skip
    np.testing.assert_allclose(robust_nll(left, loss, scale), known.cost, rtol=1e-13)


# By name: the loss of a squared residual z, and its first derivative.
CLOSED = {
    "soft_l1": (lambda z: 2 * ((1 + z).sqrt() - 1), lambda z: 1 / (1 + z).sqrt()),
    "huber": (
        lambda z: z if z <= 1 else 2 * z.sqrt() - 1,
        lambda z: 1 / max(z, Decimal(1)).sqrt(),
    ),
    "cauchy": (lambda z: (1 + z).ln(), lambda z: 1 / (1 + z)),
    "arctan": (lambda z: Decimal(math.atan(z)), lambda z: 1 / (1 + z * z)),
}
SIZES = 0, 1e-9, -1e-3, 0.04, 0.5, -1, 1.001, 3, -50, 1e4, 1e10, 6e15, -1e20, 1e30
FARTHEST = {"float32": (1e34, 9.97e36), "float64": (1e150, -1e200, 1e300)}
SCALES = 0.01, 0.3, 1.0, 20.0


def closed_form(left, scale, loss):
    """The residual of a robust loss, and the gradient of the loss, to 50 digits."""
    with localcontext() as context:
        context.prec = 50
        left, scale = Decimal(float(left)), Decimal(float(scale))
        square = (left / scale) ** 2
        root = (CLOSED[loss][0](square)).sqrt().copy_sign(left)
        return float(scale * root), float(left * CLOSED[loss][1](square))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_robust_losses_have_their_closed_form_at_any_distance(loss, name):
    sizes = SIZES + FARTHEST[name]
    pairs = np.array([(x, c) for x in sizes for c in SCALES], DTYPES[name])
    left, scale = pairs.T

    @jax.jit
    def told(left, scale):
        term = lambda left: Robust(left, loss, scale)
        ones = jnp.ones_like(left)
        slope = jax.grad(lambda left: term(left).nll())(left)
        rows = lambda left: (term(left).residuals(), term(left).scoring_residuals())
        (row, score), slopes = jax.jvp(rows, (left,), (ones,))
        return row, slope, row * slopes[0], score * slopes[1]

    row, *slopes = map(np.asarray, told(left, scale))
    closed = np.array([closed_form(*pair, loss) for pair in pairs]).T
    info = np.finfo(DTYPES[name])
    # The smallest numbers are flushed to zero.
    near = {"rtol": 60 * float(info.eps), "atol": 1e4 * float(info.tiny)}
    np.testing.assert_allclose(row, closed[0], **near)
    for slope in slopes:
        np.testing.assert_allclose(slope, closed[1], **near)


# Of half the loss by the residual, with the scale one.
SECOND = {
    "soft_l1": lambda z: (1 + z) ** -1.5,
    "huber": lambda z: 1.0 * (z < 1),
    "cauchy": lambda z: (1 - z) / (1 + z) ** 2,
    "arctan": lambda z: (1 - 3 * z**2) / (1 + z**2) ** 2,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_robust_losses(loss):
    """At zero, and on either side of where they begin to differ."""
    left = np.array([0.0, 1e-9, -0.02, 0.3, -0.999, 1.001, 4.0, -50.0, 1e4, 1e9])
    slope = lambda x: jax.grad(lambda x: Robust(x[None], loss).nll())(x)
    found = jax.jit(jax.vmap(jax.grad(slope)))(left)
    np.testing.assert_allclose(found, SECOND[loss](left**2), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_residual_that_is_not_finite_is_seen(loss):
    for bad in (np.inf, -np.inf, np.nan):
        assert not np.isfinite(robust_nll(np.array([1.0, bad]), loss)), bad


VECTOR = np.linspace(0.5, 3.0, 6)
MATRIX = np.random.default_rng(1).uniform(0.2, 1.0, (6, 3))


def poisson(point, where=None, data=(0.0, 1, 3, 0, 2, 8)):
    return Poisson(MATRIX @ point, jnp.asarray(data), where=where)


def gaussian(point, where=None, data=VECTOR):
    std = jnp.where(jnp.isfinite(jnp.asarray(data)), 0.5, jnp.nan)
    return Gaussian(MATRIX @ point, jnp.asarray(data), std, where=where)


def complex_gaussian(point, where=None, data=VECTOR):
    return Gaussian(
        jnp.exp(lax.complex(0.0, MATRIX @ point)), jnp.asarray(data), where=where
    )


def robust(loss):
    def make(point, where=None, data=VECTOR):
        return Robust(MATRIX @ point - jnp.asarray(data), loss, 0.4, where=where)

    return make


KINDS = {"poisson": poisson, "gaussian": gaussian, "complex": complex_gaussian}
KINDS |= {loss: robust(loss) for loss in LOSSES}

INFORMATION = {
    "poisson": lambda mean, left: 1 / mean,
    "gaussian": lambda mean, left: 4.0 + 0 * mean,
    "soft_l1": lambda mean, left: 1 / np.sqrt(1 + left**2),
    "huber": lambda mean, left: np.minimum(1, 1 / abs(left)),
    "cauchy": lambda mean, left: 1 / (1 + left**2),
    "arctan": lambda mean, left: 1 / (1 + left**4),
}

POINT = np.array([0.7, 1.2, 2.0])


def as_reals(array):
    return jnp.concatenate([array.real, array.imag])


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_and_scores_have_the_gradient_of_the_nll(kind):
    make = KINDS[kind]
    nll = lambda point: make(point).nll()
    residuals = lambda point: as_reals(make(point).residuals())
    scoring = lambda point: as_reals(make(point).scoring_residuals())

    @jax.jit
    def told(point):
        rows = [(of(point), jax.jacobian(of)(point)) for of in (residuals, scoring)]
        return jax.value_and_grad(nll)(point), rows

    (value, gradient), rows = jax.tree.map(np.asarray, told(POINT))
    np.testing.assert_allclose(0.5 * np.sum(rows[0][0] ** 2), value)
    for left, jac in rows:
        np.testing.assert_allclose(jac.T @ left, gradient, rtol=1e-12)
    if kind in INFORMATION:
        known = INFORMATION[kind](MATRIX @ POINT, (MATRIX @ POINT - VECTOR) / 0.4)
        information = MATRIX.T @ (known[:, None] * MATRIX)
        np.testing.assert_allclose(jac.T @ jac, information, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_counts_for_nothing(kind):
    """It may be NaN, or whatever else, in both modes of differentiation."""
    make, where = KINDS[kind], np.array([True, False, True, True, False, True])
    data = np.array([0.0, 1, 3, 0, 2, 8])

    @jax.jit
    def told(data):
        term = make(POINT, where, data)
        nll = lambda point: make(point, where, data).nll()
        slopes = [mode(nll)(POINT) for mode in (jax.jacfwd, jax.jacrev)]
        return term.residuals(), term.count(), slopes

    known = np.asarray(told(data)[0])
    assert not known[~where].any()
    assert known[where].all()
    found = []
    for fill in (np.nan, np.inf, -5.0):
        rows, count, slopes = told(np.where(where, data, fill))
        assert np.array_equal(rows, known)
        assert count == 4 * (2 if kind == "complex" else 1)
        found += slopes
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (6, 3)), rtol=1e-12)


def test_a_mask_broadcasts():
    where = jnp.array([True, False])
    image = Gaussian(jnp.ones((3, 2)), jnp.zeros((3, 2)), where=where)
    assert image.count() == 3
    assert image.nll() == 1.5


@pytest.mark.parametrize("name", DTYPES)
def test_precision_is_that_of_the_prediction(name):
    dtype = DTYPES[name]
    rate, counts = jnp.ones(3, dtype), np.arange(3)

    def told(rate):
        for term in (
            Poisson(rate, counts),
            Gaussian(rate, counts, np.float64(0.1)),
            Robust(rate, "cauchy", np.float64(0.3)),
        ):
            yield term.residuals(), term.scoring_residuals(), term.nll()

    shapes = jax.eval_shape(lambda rate: list(told(rate)), rate)
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [dtype] * 9


HALVES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_of_a_prediction_rounds_no_data(name):
    """Nor error bars, counts or sums, whose digits are those of float32 then."""
    half = jnp.asarray(np.linspace(900.0, 1100.0, 400), HALVES[name])
    mean = np.asarray(half, float)
    data, std = (np.float32(mean + 0.3 + 0.01 * np.sin(mean)), np.float32(1e-2))
    counts = np.where(mean < 1000, 70_001, 1003)
    exact = {
        "Gaussian": (Gaussian(half, data, std), 0.5 * ((mean - data) / std) ** 2),
        "Poisson": (
            Poisson(half, counts), mean - counts + counts * np.log(counts / mean)
        ),
        "Robust": (Robust(half, "huber", 0.1), 0.1 * (mean - 0.05)),
    }  # fmt: skip
    for kind, (term, each) in exact.items():
        found = term.nll()
        assert found.dtype == jnp.float32, kind
        np.testing.assert_allclose(found, each.sum(), rtol=1e-5, err_msg=kind)


class OfHalf(vn.Trainer):
    dtype: np.dtype = eqx.field(static=True)

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)
        super().__init__({"a": jnp.array(500.0, jnp.float32)}, optax.sgd(1e-4))

    def residuals(self, model, batch):
        return (model["a"] - batch).astype(self.dtype)


@pytest.mark.parametrize("name", HALVES)
def test_squares_of_half_precision_are_summed_in_float32(name):
    batch = jnp.linspace(3.0, 5.0, 300, dtype=jnp.float32)
    trainer = OfHalf(HALVES[name])
    left = np.asarray((500 - batch).astype(HALVES[name]), float)
    found = trainer.evaluate(trainer.model, batch), trainer.step(batch)[1].loss
    np.testing.assert_allclose(found, 0.5 * np.sum(left**2), rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, -1.0])
@pytest.mark.parametrize("count", [0, 2])
def test_what_is_impossible_is_not_finite(rate, count):
    term = Poisson(jnp.array([1.0, rate]), jnp.array([1, count]))
    is_possible = rate == count == 0
    assert bool(jnp.isfinite(term.nll())) == is_possible
    assert bool(jnp.isfinite(term.residuals()).all()) == is_possible
    assert bool(term.impossible()) != is_possible
    if rate < 0:
        assert "1 of 2 rates are negative, the first at [1]" in term.impossible()


def test_negative_counts_are_nan():
    term = Poisson(jnp.ones(3), jnp.array([1.0, -1.0, 2.0]))
    assert jnp.isnan(term.nll())
    assert "1 of 3 `counts` are negative, the first at [1]" in term.impossible()


ONES = jnp.ones(3)
IMAGINARY = lax.complex(ONES, ONES)
FAULTS = {
    "shape": (lambda: Poisson(ONES, np.ones(4)), ValueError, r"`counts` has shape"),
    "column": (lambda: Gaussian(ONES[:, None], ONES), ValueError, "`data` has shape"),
    "std": (lambda: Gaussian(ONES, ONES, np.ones(2)), ValueError, "`std` has shape"),
    "mask shape": (
        lambda: Poisson(ONES, ONES, where=np.ones(2, bool)), ValueError, "`where`"
    ),
    "mask of numbers": (
        lambda: Gaussian(ONES, ONES, where=ONES), TypeError, "isfinite"
    ),
    "integers": (lambda: Poisson(jnp.arange(3), ONES), TypeError, "`rate` is of int"),
    "complex rate": (lambda: Poisson(IMAGINARY, ONES), TypeError, "a rate is real"),
    "complex data": (lambda: Gaussian(ONES, IMAGINARY), TypeError, "`data` is complex"),
    "complex left": (lambda: Robust(IMAGINARY), TypeError, "the real and the imag"),
    "loss": (lambda: Robust(ONES, "l1"), ValueError, "`loss` is 'l1', but must be"),
    "list": (lambda: Gaussian(None, ONES), TypeError, "`mean` is of NoneType"),
}  # fmt: skip


@pytest.mark.own_words
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    make, kind, words = FAULTS[fault]
    with pytest.raises(kind, match=words):
        make()


def test_a_nan_rate_is_seen():
    """Beside a count, too: it must not drop out."""
    term = Poisson(jnp.array([jnp.nan, 3.0]), jnp.array([5, 3]))
    assert jnp.isnan(term.nll())
    assert jnp.isnan(term.residuals()[0])
    assert jnp.isnan(term.scoring_residuals()[0])


@jax.jit
def curvature(rate, count):
    nll = lambda rate: Poisson(rate[None], count[None]).nll()
    return jax.grad(jax.grad(nll))(rate)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rate", [1e-30, 1e-10, 1e-3, 1.0])
def test_second_derivatives_are_finite(name, rate):
    rate = np.asarray(rate, DTYPES[name])
    for count in (0, 1):
        found = curvature(rate, np.asarray(count))
        with np.errstate(over="ignore"):
            exact = count / rate / rate
        if np.isfinite(exact):
            np.testing.assert_allclose(found, exact, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_residual_that_overflows_never_weighs_nothing(loss):
    far, near = (robust_nll(np.array([x], np.float32), loss) for x in (1e20, 1e15))
    assert not far < near


@functools.partial(jax.jit, static_argnums=0)
def of_scales(loss, scales, there):
    """The likelihood by two scales, by one of them alone, and by a scale of one."""
    one, two = jnp.ones(1), jnp.ones(2)
    masked = Robust(two, loss, scales, where=there)
    return [x.nll() for x in (Robust(two, loss, scales), masked, Robust(one, loss))]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_scale_that_is_not_positive_is_seen(loss, scale):
    scales, there = np.array([1.0, scale]), np.array([True, False])
    seen, masked, known = of_scales(loss, scales, there)
    assert np.isnan(seen)
    np.testing.assert_allclose(masked, known, rtol=1e-14)


@jax.jit
def of_error_bars(std, there):
    mean, data = jnp.array([2.0, 3.0]), jnp.array([1.0, 5.0])
    nll = lambda mean, where: Gaussian(mean, data, std, where=where).nll()
    return nll(mean, None), jax.value_and_grad(nll)(mean, there)


@pytest.mark.parametrize("std", [0.0, -1.0, -np.inf, np.nan])
def test_an_error_bar_that_is_not_positive_is_seen(std):
    """It would count as its absolute value; what is masked may have any."""
    bars = np.array([0.5, std])
    seen, masked = of_error_bars(bars, np.array([True, False]))
    assert np.isnan(seen)
    np.testing.assert_array_equal(masked[0], 2.0)
    np.testing.assert_array_equal(masked[1], [4.0, 0.0])
    told = Gaussian(ONES[:2], ONES[:2], bars).impossible()
    what = "zero" if std == 0 else "negative" if std < 0 else ""
    assert told == (
        f"1 of 2 error bars (`std`) are {what}, the first at [1]." if what else ""
    )


def test_an_infinite_error_bar_weighs_nothing():
    assert of_error_bars(np.array([0.5, np.inf]), np.array([True, True]))[0] == 2.0
