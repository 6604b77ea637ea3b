"""`solve` of what can be differentiated in one mode alone, and of what raises."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn

T = np.linspace(0.1, 2.0, 12)
TRUTH = {"rate": 0.7, "size": 1.5}
STARTS = np.linspace(0.5, 1.5, 3)
Y = TRUTH["size"] * np.exp(-TRUTH["rate"] * T)
LM = optx.LevenbergMarquardt(1e-10, 1e-10)
BFGS = optx.BFGS(1e-10, 1e-10)


def start(rate=0.3, size=1.0):
    return {"rate": jnp.asarray(rate), "size": jnp.asarray(size)}


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        return self.curve(model) - batch

    def curve(self, model):
        return model["size"] * jnp.exp(-model["rate"] * T)


class ForwardOnly(Fit):
    """A loop of unknown length."""

    def curve(self, model):
        def body(state):
            count, value = state
            return count + 1, value - 0.05 * model["rate"] * value

        count = jnp.asarray(20)
        _, last = jax.lax.while_loop(
            lambda s: s[0] < count, body, (0, jnp.ones_like(T))
        )
        return model["size"] * (last + jnp.exp(-model["rate"] * T)) / 2


@jax.custom_vjp
def decay(rate):
    return jnp.exp(-rate * T)


decay.defvjp(
    lambda rate: (decay(rate), rate),
    lambda rate, g: (jnp.sum(-T * jnp.exp(-rate * T) * g),),
)


class ReverseOnly(Fit):
    def curve(self, model):
        return model["size"] * decay(model["rate"])


class Integrated(Fit):
    """Decay by diffrax, in few and rough steps, to its end."""

    adjoint: diffrax.AbstractAdjoint

    def __init__(self, model, adjoint, **options):
        super().__init__(model, **options)
        self.adjoint = adjoint

    @eqx.filter_jit  # traced once, however often it is differentiated
    def curve(self, model):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.Euler(),
            0.0,
            2.0,
            0.2,
            model["size"] * STARTS,
            args=model["rate"] / STARTS,
            adjoint=self.adjoint,
            max_steps=16,
        )
        return solution.ys[0]


def data(cls):
    return cls(start(**TRUTH)).curve(start(**TRUTH))


@pytest.mark.parametrize("solver", [LM, BFGS], ids=["LM", "BFGS"])
@pytest.mark.parametrize(
    "cls", [ForwardOnly, pytest.param(ReverseOnly, marks=pytest.mark.seams)]
)
@pytest.mark.filterwarnings("ignore:.*cannot be differentiated")
def test_one_mode_is_enough(cls, solver):
    batch = data(cls)
    result = cls(start()).solve(solver, batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    np.testing.assert_allclose(result.model["rate"], TRUTH["rate"], rtol=1e-6)
    # What is wrong is found in the mode that works, too.
    short = cls(start()).solve(solver, batch, max_steps=1)
    assert short.stop_reason is vn.StopReason.MAX_STEPS
    assert short.edm > 1e-3
    bad = cls(start()).solve(solver, batch.at[3].set(jnp.nan))
    assert bad.stop_reason is vn.StopReason.NON_FINITE
    report = bad.trainer.nan_report()
    assert {name for name, count in report.items() if count.total} >= {"loss"}


@pytest.mark.filterwarnings("ignore:.*cannot be differentiated")
def test_one_bad_member_of_many_harms_no_other():
    batch = jnp.stack([data(ForwardOnly)] * 3).at[1, 0].set(jnp.nan)
    trainers = [ForwardOnly(start(rate)) for rate in (0.2, 0.3, 0.4)]
    result = vn.fit_many(trainers, batch, 50, data_axis=0, solver=LM)
    good = vn.StopReason.CONVERGED
    assert result.stop_reasons == (good, vn.StopReason.NON_FINITE, good)
    np.testing.assert_allclose(result.trainer(2).model["rate"], 0.7, rtol=1e-6)


# With `DirectAdjoint` both modes are possible, as of any model; `BacksolveAdjoint` is a
# `custom_vjp`, as that of `ReverseOnly`.
ADJOINTS = {
    "RecursiveCheckpoint": diffrax.RecursiveCheckpointAdjoint(),
    "Forward": diffrax.ForwardMode(),
}


@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.filterwarnings("ignore:.*cannot be differentiated")
def test_diffrax_with_adjoints_of_one_mode(name):
    # Its ten steps. Without scatter, where a rough slope is zero is no minimum.
    truth = TRUTH["size"] * STARTS * (1 - 0.2 * TRUTH["rate"] / STARTS) ** 10
    truth *= 1 + 1e-6 * (-1.0) ** np.arange(truth.size)
    result = Integrated(start(), ADJOINTS[name]).solve(LM, truth)
    assert result.stop_reason is vn.StopReason.CONVERGED
    np.testing.assert_allclose(result.model["rate"], TRUTH["rate"], rtol=1e-4)
    np.testing.assert_allclose(result.model["size"], TRUTH["size"], rtol=1e-4)


@pytest.mark.own_words
def test_the_mode_can_be_asked_for():
    result = Fit(start()).solve(LM, Y, jac="bwd")
    np.testing.assert_allclose(result.model["rate"], TRUTH["rate"], rtol=1e-8)
    with pytest.raises(ValueError, match="`jac` is 'up'"):
        Fit(start()).solve(LM, Y, jac="up")
    with pytest.raises(Exception, match="cannot be differentiated"):
        ReverseOnly(start()).solve(LM, Y, jac="fwd")


def test_dogleg_of_many():
    rates = jnp.linspace(0.05, 2.0, 8)
    trainers = [Fit(start(rate)).whiten(Y) for rate in rates]
    solver = optx.Dogleg(1e-10, 1e-10)
    result = vn.fit_many(trainers, Y, 60, solver=solver)
    assert set(result.stop_reasons) == {vn.StopReason.CONVERGED}
    np.testing.assert_allclose(result.trainers.params["rate"], 0.7, rtol=1e-6)


class Guarded(Fit):
    """Raises within a compiled program."""

    def residuals(self, model, batch):
        vector = super().residuals(model, batch)
        return eqx.error_if(vector, model["rate"] < 0, "the rate is negative")


def not_negative(rate):
    if np.any(rate < 0):
        raise ValueError("the rate is negative")
    return rate


@jax.custom_jvp
def checked(rate):
    return jax.pure_callback(not_negative, rate, rate, vmap_method="expand_dims")


checked.defjvp(lambda at, along: (checked(*at), along[0]))


class Called(Fit):
    """Raises on the host."""

    def residuals(self, model, batch):
        return super().residuals(model | {"rate": checked(model["rate"])}, batch)


@pytest.mark.parametrize(("kind", "raised"), [(Guarded, ""), (Called, "ValueError: ")])
def test_an_error_of_one_member_is_its_own(kind, raised):
    trainers = [kind(start(rate)) for rate in (0.3, -1.0, 0.5)]
    said = f"1 of 3 .* member 1: {raised}the rate is negative"
    with pytest.warns(UserWarning, match=said):
        result = vn.fit_many(trainers, Y, 60, solver=LM)
    good = vn.StopReason.CONVERGED
    assert result.stop_reasons == (good, vn.StopReason.FAILED, good)
    assert np.isnan(result.edms[1])
    assert np.isnan(result.losses[1])
    assert result.trainer(1).model["rate"] == -1.0
    np.testing.assert_allclose(result.trainers.params["rate"][::2], 0.7, rtol=1e-6)
    with pytest.raises(RuntimeError, match="the rate is negative") as error:
        trainers[1].solve(LM, Y)
    assert error.value.result.stop_reason is vn.StopReason.ERROR
    assert error.value.result.model["rate"] == -1.0


def test_an_error_of_one_member_beside_nan_of_another():
    rates, bounds = (0.3, -1.0, np.nan, 0.5), {"rate": (-9, 9)}
    trainers = [Guarded(start(rate), bounds=bounds) for rate in rates]
    with (
        pytest.warns(UserWarning, match="member 1: .*the rate is negative"),
        pytest.warns(UserWarning, match=r"1 of 4 trainers \(2\) ended at values"),
    ):
        result = vn.fit_many(trainers, Y, 60, solver=LM)
    good, reasons = vn.StopReason.CONVERGED, vn.StopReason
    assert result.stop_reasons == (good, reasons.FAILED, reasons.NON_FINITE, good)
    assert result.nan_report(2)["rate"].total == 1
    assert result.nan_report(1)["rate"].total == 0
    error = trainers[0].replace(model=result.trainer(0).model).standard_errors(Y)
    goal = np.where([True, False, False, True], error["rate"], np.nan)
    np.testing.assert_allclose(result.errors(Y)["rate"], goal, rtol=1e-4)
    with pytest.warns(UserWarning, match="1 of 1 members"):
        broken = vn.fit_many(trainers[1:2], Y, 60, solver=LM)
    with pytest.raises(RuntimeError, match="the rate is negative"):
        broken.errors(Y)
