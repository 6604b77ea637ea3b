"""Profiles of parameters with a bijection: those of their free coordinates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from numpyro.distributions import biject_to, constraints

import vernal as vn
from inside import plane

LM = optx.LevenbergMarquardt(1e-10, 1e-10)
X = jnp.linspace(0.0, 3.0, 12)
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=12))
BATCH = X, 3 * jnp.exp(-1.5 * X) + 0.4 * X - 1.5 + 0.1 * NOISE


class Negative(vn.Bijection):
    """A falling map."""

    def forward(self, free):
        return -jnp.exp(free)

    def inverse(self, value):
        return jnp.log(-value)


class Decay(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        decay = model["power"][0] * jnp.exp(-model["rate"] * x)
        return (decay + model["power"][1] * x + model["sky"] - y) / 0.1


class ByHand(Decay):
    def residuals(self, model, batch):
        power, sky = jnp.exp(model["power"]), -jnp.exp(model["sky"])
        return Decay.residuals(self, {**model, "power": power, "sky": sky}, batch)


@functools.cache
def both():
    """A trainer with bijections at its minimum, and that of the coordinates."""
    model = {"power": jnp.ones(2), "rate": jnp.array(1.0), "sky": jnp.array(-1.0)}
    bounds = {"power": biject_to(constraints.positive), "sky": Negative()}
    by_hand = ByHand({**model, "power": jnp.zeros(2), "sky": jnp.array(0.0)})
    own = Decay(model, bounds=bounds)
    return tuple(trainer.solve(LM, BATCH).trainer for trainer in (own, by_hand))


def to_free(name, values):
    if name == "rate":
        return values
    return np.log(-values if name == "sky" else values)


def test_a_profile_is_that_of_the_coordinate_by_hand():
    trainer, by_hand = both()
    found = trainer.profile(LM, BATCH, values={"sky": [-2.0, -1.2, -1.5]})
    assert list(found) == ["power[0]", "power[1]", "rate", "sky"]
    assert all(each.converged.all() for each in found.values())
    given = {name: to_free(name, each.values) for name, each in found.items()}
    hand = by_hand.profile(LM, BATCH, values=given)
    errors = trainer.standard_errors(BATCH)
    for name, each in found.items():
        delta = hand[name].delta
        np.testing.assert_allclose(each.delta, delta, rtol=1e-6, atol=1e-8)
    rate, sky = found["rate"], found["sky"]
    np.testing.assert_allclose(sky.models["sky"], sky.values, rtol=1e-12)
    np.testing.assert_allclose(sky.value, trainer.model["sky"], rtol=1e-7)
    for each, error in ((sky, errors["sky"]), (rate, errors["rate"])):
        np.testing.assert_allclose(each.error, error, rtol=1e-6)
    # As far as three standard errors of the coordinate, in even steps of the value.
    ends = to_free("power[1]", found["power[1]"].values[[0, -1]])
    reach = np.subtract(ends, hand["power[1]"].value) / hand["power[1]"].error
    np.testing.assert_allclose(reach, [-3, 3], rtol=1e-6)
    np.testing.assert_allclose(np.diff(found["power[1]"].values, 2), 0, atol=1e-12)


def test_an_interval_goes_from_the_lower_to_the_higher_value():
    trainer, by_hand = both()
    hand = by_hand.intervals(LM, BATCH)
    for name, ends in trainer.intervals(LM, BATCH).items():
        expected = sorted(to_free(name, np.array(ends)))
        np.testing.assert_allclose(expected, hand[name], rtol=1e-5)
        assert ends[0] < ends[1]


def test_a_contour_is_over_the_values():
    trainer, by_hand = both()
    found, hand = (plane(t, LM, BATCH, ("sky", "rate"), 2.3) for t in both())
    np.testing.assert_allclose(to_free("sky", found.x), hand.x, rtol=1e-6)
    np.testing.assert_allclose(found.y, hand.y, rtol=1e-6)
    np.testing.assert_allclose(found.delta, hand.delta, rtol=1e-5, atol=1e-7)
    best = trainer.model["sky"], by_hand.model["rate"]
    np.testing.assert_allclose(found.best, best, rtol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("sky", 0.1), ("power[0]", -0.1)])
def test_a_value_that_the_bijection_does_not_return_is_refused(name, value):
    trainer, _ = both()
    with pytest.raises(ValueError, match="does not return"):
        trainer.profile(LM, BATCH, name, [value])


class Sum(vn.Bijection):
    """Each element by all coordinates, though it has as many."""

    def forward(self, free):
        return jnp.cumsum(free)

    def inverse(self, value):
        return jnp.diff(value, prepend=jnp.zeros(1, value.dtype))


class Largest(vn.Bijection):
    """Couples elements only through the largest."""

    def forward(self, free):
        return free + jax.nn.relu(jnp.max(free) - free) / 2

    def inverse(self, value):
        return 2 * value - jnp.max(value)


@pytest.mark.parametrize("bijection", [Sum(), Largest()])
def test_coupled_elements_have_no_profile(bijection):
    model = {"power": jnp.ones(2), "rate": jnp.array(1.0), "sky": jnp.array(-1.0)}
    trainer = Decay(model, bounds={"power": bijection})
    with pytest.raises(ValueError, match="couples its elements"):
        trainer.profile(LM, BATCH, "power[0]")


class Affine(vn.Bijection):
    """Its inverse of zero rounds to a number that it does not map to zero."""

    def forward(self, free):
        return 3 * free + 0.1

    def inverse(self, value):
        return (value - 0.1) / 3


class Softsign(vn.Bijection):
    """Falls from 1 to -1, and is NaN at infinity."""

    def forward(self, free):
        return -free / (1 + jnp.abs(free))

    def inverse(self, value):
        return -value / (1 - jnp.abs(value))


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return (model["slope"] * x - y) / 2


class FromZero(Line):
    """Its residuals are NaN where the slope is below zero."""

    def residuals(self, model, batch):
        return Line.residuals(self, {"slope": jnp.sqrt(model["slope"])}, batch)


def line(kind, bijection, slope):
    trainer = kind({"slope": jnp.array(slope)}, bounds={"slope": bijection})
    return trainer, (X, jnp.sqrt(slope) * X if kind is FromZero else slope * X)


def test_zero_is_a_value_as_any_other():
    trainer, batch = line(Line, Affine(), 0.2)
    found = trainer.profile(LM, batch, "slope", [0.0, 0.2])
    expected = jnp.sum((0.2 * X) ** 2) / 4
    np.testing.assert_allclose(
        found.delta, jnp.array([expected, 0]), rtol=1e-6, atol=1e-12
    )


def test_where_a_map_is_nan_at_infinity_an_interval_ends_at_its_limit():
    trainer, batch = line(Line, Softsign(), 0.8)
    low, high = trainer.intervals(LM, batch)["slope"]
    width = 2 / jnp.sqrt(jnp.sum(X**2))
    np.testing.assert_allclose([low, high], jnp.array([0.8 - width, 1]), rtol=1e-3)


def test_an_end_that_is_not_found_stays_the_lower_one():
    trainer, batch = line(FromZero, Softsign(), 0.05)
    with pytest.warns(UserWarning, match="no crossing .* at the lower end of 'slope'"):
        low, high = trainer.intervals(LM, batch)["slope"]
    assert np.isnan(low)
    assert 0.05 < high < 1


def test_where_all_elements_are_coupled_none_has_a_profile():
    class Two(vn.Trainer):
        def residuals(self, model, batch):
            return model["w"] - batch

    trainer = Two({"w": jnp.ones(2)}, bounds={"w": Sum()})
    for method in (trainer.profile, trainer.intervals):
        with pytest.raises(ValueError, match="couples its elements"):
            method(LM, jnp.ones(2))


class Softplus(vn.Bijection):
    def forward(self, free):
        return jax.nn.softplus(free)

    def inverse(self, value):
        return value + jnp.log(-jnp.expm1(-value))


class Edge(vn.Trainer):
    """The best power of each is 0 where its x is high."""

    def residuals(self, model, batch):
        errors = jnp.array([0.05, 0.01, 0.04], batch.dtype)
        rows = lambda x, power: (jnp.stack([x, x + power, power]) - batch) / errors
        return {name: rows(own["x"], own["power"]) for name, own in model.items()}


class EdgeLikelihood(vn.Trainer):
    def nll(self, model, batch):
        return half_of_squares(Edge.residuals(self, model, batch))


def half_of_squares(rows):
    return 0.5 * jnp.sum(jnp.stack(jax.tree.leaves(rows)) ** 2)


EDGE = np.array([1.3, 1.35, 1.5, 2.0])
MAPS = {
    "exp": biject_to(constraints.positive),
    "softplus": Softplus(),
    "bound": (0, None),
}


def chi_squared_at_the_edge(x):
    """The lowest for a power that is not negative, and that power."""
    data, weights = np.array([1.3, 0.2]), np.array([0.01, 0.04]) ** -2.0
    goals = np.stack([data[0] - x, np.full_like(x, data[1])])
    power = np.maximum(weights @ goals / weights.sum(), 0)
    return ((x - 1) / 0.05) ** 2 + weights @ (goals - power) ** 2, power


def profiles_of(kind, x, power, names, solver, batch, values):
    """The profiles of `x` from the best, by the names of the maps of the powers."""
    model = {name: {"x": x, "power": power} for name in names}
    trainer = kind(model, bounds={f"{name}.power": MAPS[name] for name in names})
    given = {f"{name}.x": values for name in names}
    found = trainer.profile(solver, batch, list(given), given)
    return {name: found[f"{name}.x"] for name in names}


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Edge, jnp.float64), (EdgeLikelihood, jnp.float32)]
)
def test_at_the_edge_of_a_map_a_profile_is_that_of_a_bound(kind, dtype):
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-5
    rule = optx.LevenbergMarquardt if kind is Edge else optx.BFGS
    solver, batch = rule(tolerance, tolerance), jnp.array([1, 1.3, 0.2], dtype)
    # The best of all has a power of its own, and is not at the edge.
    rows, errors = np.array([[1, 0], [1, 1], [0, 1]]), np.array([0.05, 0.01, 0.04])
    best = np.linalg.lstsq(rows / errors[:, None], [20, 130, 5], rcond=None)[0]
    least = chi_squared_at_the_edge(best[:1])[0]
    # That of `softplus` is below.
    start = (jnp.asarray(value, dtype) for value in best)
    profiles = profiles_of(kind, *start, ("exp", "bound"), solver, batch, EDGE)
    chi, powers = chi_squared_at_the_edge(EDGE)
    for name, found in profiles.items():
        assert found.converged.all()
        np.testing.assert_allclose(found.delta, chi - least, rtol=tolerance, atol=1e-4)
        # The models are those of the losses.
        np.testing.assert_allclose(found.models[name]["power"], powers, atol=1e-5)


class Returning(vn.Trainer):
    """The best power of each is 0 where its x is near 1, and is high on both sides."""

    def residuals(self, model, batch):
        def rows(x, power):
            goal = (x - 1) ** 2 - 0.1
            return jnp.stack([(x - batch) / 0.5, (power - goal) / 0.1])

        return {name: rows(own["x"], own["power"]) for name, own in model.items()}


class ReturningLikelihood(vn.Trainer):
    def nll(self, model, batch):
        return half_of_squares(Returning.residuals(self, model, batch))


@pytest.mark.parametrize("kind", [Returning, ReturningLikelihood])
def test_a_profile_leaves_the_edge_of_a_map_again(kind):
    rule = optx.LevenbergMarquardt if kind is Returning else optx.BFGS
    solver, start = rule(1e-8, 1e-8), (jnp.array(1.6), jnp.array(0.26))
    values = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])
    names, batch = ("exp", "softplus"), jnp.array(1.6)
    profiles = profiles_of(kind, *start, names, solver, batch, values)
    goal = (values - 1) ** 2 - 0.1
    chi = ((values - 1.6) / 0.5) ** 2 + (np.minimum(goal, 0) / 0.1) ** 2
    for name, found in profiles.items():
        assert found.converged.all()
        np.testing.assert_allclose(found.delta, chi, rtol=1e-6, atol=1e-6)
        powers = found.models[name]["power"]
        np.testing.assert_allclose(powers, np.maximum(goal, 0), atol=1e-4)
