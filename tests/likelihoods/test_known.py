"""Error bars, and counts, that depend on the parameters are refused."""

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
import pytest

import vernal as vn
from vernal.likelihoods import Gaussian, Poisson, Robust

X = jnp.linspace(1.0, 2.0, 20)
DATA = X, 2 * X + 0.1 * jnp.sin(9 * X), jnp.full(20, 0.1)

# Of a model's own jitter, as a user's function may compute it beside the prediction.
FITTED = {
    "a fraction of the mean": lambda m, x, std: (m["slope"] * x, 0.1 * m["slope"] * x),
    "jitter": lambda m, x, std: (m["slope"] * x, jnp.hypot(std, m["jitter"])),
    "in a program": lambda m, x, std: jax.jit(
        lambda a, s: (a * x, jnp.sqrt(std**2 + s**2))
    )(m["slope"], m["jitter"]),
}


def scanned(m, x, std):
    step = lambda carry, row: (carry, (m["slope"] * row[0], 2 * row[1]))
    return jax.lax.scan(step, 0.0, (x, std))[1]


KNOWN = {
    "data": lambda m, x, std: (m["slope"] * x, std),
    "held": lambda m, x, std: (
        m["slope"] * x,
        jax.lax.stop_gradient(jnp.hypot(std, m["jitter"])),
    ),
    "in one program": lambda m, x, std: jax.jit(lambda a: (a * x, 2 * std))(m["slope"]),
    "in one loop": scanned,
    "in one branch": lambda m, x, std: jax.lax.cond(
        m["slope"] > 0, lambda: (m["slope"] * x, std), lambda: (m["slope"] * x, 2 * std)
    ),
}

LIKELIHOODS = {
    "Gaussian": lambda mean, y, std: Gaussian(mean, y, std),
    "Gaussian, masked": lambda mean, y, std: Gaussian(mean, y, std, where=y > 2.2),
    "Robust": lambda mean, y, std: Robust(mean - y, "huber", std),
    "Poisson": lambda mean, y, std: Poisson(mean, 30 * std),
    "Poisson, masked": lambda mean, y, std: Poisson(mean, 30 * std, where=y > 2.2),
    "two": lambda mean, y, std: [mean - y, Gaussian(mean, y, std)],
}


class Fit(vn.Trainer):
    told: tuple[str, ...]
    likelihoods: tuple[str, ...]

    def __init__(self, *told, likelihoods=("Gaussian",), **options):
        self.told, self.likelihoods = told, likelihoods
        model = {"slope": jnp.array(1.0), "jitter": jnp.array(0.3)}
        super().__init__(model, optax.adam(0.01), **options)

    def residuals(self, model, batch):
        x, y, std = batch
        # Of pairs the second must be known: error bars, or counts.
        ways = {**FITTED, **KNOWN}
        pairs = [ways[name](model, x, std) for name in self.told]
        makes = [LIKELIHOODS[name] for name in self.likelihoods]
        return [make(mean, y, std) for mean, std in pairs for make in makes]


LM, BFGS = optx.LevenbergMarquardt(1e-6, 1e-6), optx.BFGS(1e-6, 1e-6)


def of_history(trainer):
    """A derivative with respect to the error bars of the data."""
    x, y, std = DATA
    run = lambda std: vn.unroll(trainer, (x, y, std), 3)[1][-1]
    return jax.grad(run)(std)


ENTRANCES = {
    "fit": lambda it: it.fit(DATA, 3),
    "step": lambda it: it.step(DATA),
    "solve by residuals": lambda it: it.solve(LM, DATA),
    "solve": lambda it: it.solve(BFGS, DATA),
    "whiten": lambda it: it.whiten(DATA, rtol=1e-8),
    "errors": lambda it: it.standard_errors(DATA),
    "fisher": lambda it: it.fisher(DATA, kind="observed"),
    "fit_many": lambda it: vn.fit_many([it, it], DATA, 3),
    "fit_many by a solver": lambda it: vn.fit_many([it, it], DATA, 9, solver=LM),
    "unroll": of_history,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_each_entrance_refuses_them(entrance):
    with pytest.raises(ValueError, match=r"`std` depends on .*define `nll`"):
        ENTRANCES[entrance](Fit("jitter"))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("told", FITTED)
def test_each_likelihood_refuses_them(told, likelihood):
    with pytest.raises(ValueError, match=r"depends on the parameters.*stop_gradient"):
        Fit(told, likelihoods=(likelihood,)).fit(DATA, 3)
    bounds = {"slope": (0.0, 5.0)}
    with pytest.raises(ValueError, match="depends on the parameters"):
        Fit(told, likelihoods=(likelihood,), bounds=bounds).fit(DATA, 3)


# Also where one function of the user returns them beside the prediction.
# One of each way to differentiate.
WAYS = "fit", "solve by residuals", "whiten", "errors", "fisher", "fit_many", "unroll"


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("entrance", WAYS)
def test_each_entrance_takes_known_ones(entrance):
    ENTRANCES[entrance](Fit("held", "in one loop"))


def test_each_likelihood_takes_known_ones():
    Fit(*KNOWN, likelihoods=tuple(LIKELIHOODS)).fit(DATA, 3)


class OfCounts(vn.Trainer):
    """Counts around three, as a user's function gives them to the likelihood."""

    way: str

    def __init__(self, way, **options):
        self.way = way
        model = {"deep": {"rate": jnp.array(2.0)}, "other": None}
        super().__init__(model, optax.adam(0.01), **options)

    def residuals(self, model, batch):
        rate = model["deep"]["rate"] + 0 * batch[0]
        return (COUNTS | HONEST)[self.way](rate, batch[1].round(), batch[2])


COUNTS = {
    "swapped": lambda rate, n, std: Poisson(n, rate),
    "less a background": lambda rate, n, std: Poisson(10 * std, n - rate),
    "of a swapped one beside another": lambda rate, n, std: {
        "a": Poisson(rate, n), "b": Poisson(n, rate),
    },
    "both": lambda rate, n, std: Poisson(rate, rate * n),
}  # fmt: skip
HONEST = {
    "floats": lambda rate, n, std: Poisson(rate, n),
    "integers": lambda rate, n, std: Poisson(rate, n.astype(int)),
    "half precision": lambda rate, n, std: Poisson(rate.astype("bfloat16"), n),
    "masked": lambda rate, n, std: Poisson(rate, n, where=n > 2),
    "scaled exposure": lambda rate, n, std: Poisson(10 * rate * std, n),
    "held": lambda rate, n, std: Poisson(rate, jax.lax.stop_gradient(rate) + 0 * n),
    "rounded": lambda rate, n, std: Poisson(rate, jnp.round(rate)),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("way", COUNTS)
def test_counts_that_depend_on_the_parameters_are_refused(way, entrance):
    with pytest.raises(ValueError, match=r"its `counts` depends? on the parameters"):
        ENTRANCES[entrance](OfCounts(way))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("way", HONEST)
def test_counts_that_are_data_are_taken(way):
    OfCounts(way).fit(DATA, 3)


def test_a_score_after_a_fit_has_a_derivative_by_the_data():
    def scored(n, own):
        batch = DATA[0], n, DATA[2]
        after, _ = vn.unroll(OfCounts("floats"), batch, 3)
        if own:
            return after.residuals(after.model, batch).nll()
        return after.evaluate(after.model, batch)

    n = 3 + DATA[1]
    by_hand, found = (jax.grad(scored)(n, own) for own in (True, False))
    assert jnp.allclose(found, by_hand, rtol=1e-6)


def test_a_scatter_by_its_likelihood():
    """As the documentation says: its maximum is that of the formula."""

    class Scatter(vn.Trainer):
        def nll(self, model, batch):
            x, y, _ = batch
            std = jnp.exp(model["log_std"])
            left = (model["slope"] * x - y) / std
            return jnp.sum(0.5 * left**2 + jnp.log(std))

    start = {"slope": jnp.array(1.0), "log_std": jnp.array(0.0)}
    found = Scatter(start).solve(optx.BFGS(1e-10, 1e-10), DATA).trainer
    x, y, _ = DATA
    slope = (x @ y) / (x @ x)
    scatter = jnp.sqrt(jnp.mean((slope * x - y) ** 2))
    assert jnp.allclose(found.params["slope"], slope, rtol=1e-6)
    assert jnp.allclose(jnp.exp(found.params["log_std"]), scatter, rtol=1e-6)
    errors = found.standard_errors(DATA)
    expected = {"slope": scatter / jnp.sqrt(x @ x), "log_std": 1 / jnp.sqrt(40)}
    for name, error in expected.items():
        assert jnp.allclose(errors[name], error, rtol=1e-5)
