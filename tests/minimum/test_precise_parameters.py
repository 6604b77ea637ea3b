"""Parameters known to many digits: an error bar may be their hundred millionth part."""

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

EPOCH = np.array([0, 1, 3, 4, 8, 15, 16, 40, 41, 77, 100, 101, 150.0])
SCATTER = np.random.default_rng(8).normal(size=EPOCH.size)
PERIOD = 3.52474859


class Ephemeris(vn.Trainer):
    """Times of transits in days, with their error."""

    def residuals(self, model, batch):
        epoch, time, sigma = batch
        return (model["T0"] + model["P"] * epoch - time) / sigma


class EphemerisNll(vn.Trainer):
    def nll(self, model, batch):
        epoch, time, sigma = batch
        left = (model["T0"] + model["P"] * epoch - time) / sigma
        return 0.5 * jnp.sum(jnp.square(left))


# The first time and its error, by the dtype that suits them: in all three cases the
# parameters have at least eight spacings within the error of a datum.
TIMES = {
    "Julian dates": (2454833.1234, 1e-4, np.float64),
    "pulses of ten years": (3.2e8, 1e-6, np.float64),
    "days of a mission": (1325.5034, 1e-3, np.float32),
}


def ephemeris(name, off=0.0, cls=Ephemeris):
    """Returns a trainer that is so many errors of a datum off, and its data."""
    first, sigma, dtype = TIMES[name]
    time = first + PERIOD * EPOCH + sigma * SCATTER
    slope, offset = np.polyfit(EPOCH, sigma * SCATTER, 1)
    values = {"T0": first + offset + off * sigma, "P": PERIOD + slope}
    model = {key: jnp.asarray(value, dtype) for key, value in values.items()}
    return cls(model), (*(x.astype(dtype) for x in (EPOCH, time)), dtype(sigma))


@pytest.mark.parametrize("cls", [Ephemeris, EphemerisNll])
@pytest.mark.parametrize("off", [5.0, 50.0, 1000.0])
@pytest.mark.parametrize("name", TIMES)
@pytest.mark.filterwarnings("ignore:.*float32:vernal.PrecisionWarning")
def test_far_from_the_minimum_is_told(name, off, cls):
    trainer, batch = ephemeris(name, off, cls)
    assert "not at a minimum" in trainer.table(batch)
    edm = 0.5 * EPOCH.size * off**2
    np.testing.assert_allclose(trainer.report(batch).edm, edm, rtol=0.1)
    # As far as one step of a rate of nothing leads.
    still = trainer.replace(optimiser=optax.sgd(0.0))
    ended = still.fit(batch, 20, stop=vn.Converged(1e-3, 3))
    assert ended.stop_reason is vn.StopReason.STALLED


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.filterwarnings("ignore:.*float32:vernal.PrecisionWarning")
def test_the_minimum_is_none_the_less_reached(name):
    trainer, batch = ephemeris(name, 50.0)
    solver = optx.LevenbergMarquardt(1e-6, 1e-6)
    result = trainer.whiten(batch).solve(solver, batch)
    assert result.stop_reason is vn.StopReason.CONVERGED
    at_best, _ = ephemeris(name)
    error = result.trainer.standard_errors(batch)["T0"]
    assert abs(result.model["T0"] - at_best.params["T0"]) < 0.3 * error
    assert "not at a minimum" not in result.trainer.table(batch)


class Parabola(vn.Trainer):
    """Its parameters nearly cancel: they are 1e10 times what the data are."""

    def residuals(self, model, batch):
        t, y = batch
        return (model["a"] + model["b"] * t + model["c"] * t**2 - y) / 0.1


@pytest.mark.parametrize("off", [1.0, 10.0, 50.0])
def test_a_parabola_of_dates(off):
    t = np.linspace(2459000.0, 2459100.0, 100)
    y = 1e-3 * (t - 2459050.0) ** 2 + 0.1 * np.random.default_rng(0).normal(size=100)
    found = {"a": 1e-3 * 2459050.0**2 + off, "b": -2e-3 * 2459050.0, "c": 1e-3}
    trainer = Parabola({name: jnp.asarray(value) for name, value in found.items()})
    assert "not at a minimum" in trainer.table((t, y))


class Position(vn.Trainer):
    def residuals(self, model, batch):
        satellites, ranges = batch
        reach = jnp.linalg.norm(satellites - model["r"][None, :], axis=1)
        return (reach + model["clock"] - ranges) / 3e-3


@pytest.mark.parametrize("off", [0.1, 0.3])
def test_ranges_from_the_centre_of_the_earth(off):
    """To three millimetres: 36 error bars are 1e-8 of a coordinate."""
    rng = np.random.default_rng(1)
    receiver = np.array([4075539.6, 931735.3, 4801629.5])
    aim = rng.normal(size=(12, 3)) + receiver / 3.2e6
    satellites = receiver + 2.2e7 * aim / np.linalg.norm(aim, axis=1, keepdims=True)
    ranges = np.linalg.norm(satellites - receiver, axis=1) + 30.0
    ranges += 3e-3 * rng.normal(size=12)
    start = {"r": jnp.asarray(receiver + off), "clock": jnp.asarray(30.0)}
    assert "not at a minimum" in Position(start).table((satellites, ranges))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_without_scatter_the_digits_of_the_solver_are_enough(bend, dtype):
    """Data that a model has made: whatever is left is rounding."""

    class Curve(vn.Trainer):
        def residuals(self, model, batch):
            x, y = batch
            return model["a"] * jnp.exp(model["b"] * x) + bend * model["a"] ** 2 - y

    x = np.linspace(0, 2, 30).astype(dtype)
    y = (70 * np.exp(0.7 * x) + bend * 70**2).astype(dtype)
    start = {"a": jnp.asarray(60.0, dtype), "b": jnp.asarray(0.6, dtype)}
    for solver in (optx.LevenbergMarquardt(1e-6, 1e-6), optx.BFGS(1e-8, 1e-8)):
        result = Curve(start).whiten((x, y)).solve(solver, (x, y))
        assert result.stop_reason is vn.StopReason.CONVERGED, result.edm
        np.testing.assert_allclose(result.model["a"], 70, rtol=1e-5)


class Dip(vn.Trainer):
    def residuals(self, model, batch):
        day, flux = batch
        dip = model["depth"] * jnp.exp(-0.5 * ((day - model["day"]) / 0.03) ** 2)
        return (model["level"] - dip - flux) / 4e-4


class DipNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Dip.residuals(self, model, batch)))


@pytest.mark.parametrize("cls", [Dip, DipNll])
@pytest.mark.parametrize("bounds", [None, {"level": (1.0, None)}])
@pytest.mark.parametrize("off", [{"level": 1.001}, {"depth": 0.009}])
def test_a_date_hides_no_distance_of_others(off, bounds, cls):
    """Its hundred millionth part is a hundred error bars, of data without scatter."""
    day = 2459000.0 + np.linspace(-0.14, 0.14, 360)
    flux = 1 - 0.01 * np.exp(-0.5 * ((day - 2459000.0) / 0.03) ** 2)
    model = {"level": 1.0, "depth": 0.01, "day": 2459000.0} | off
    model = {name: jnp.asarray(value) for name, value in model.items()}
    table = cls(model, bounds=bounds).table((day, flux))
    [name] = off
    assert "not at a minimum: edm" in table
    assert f"along {name}" in table
