"""Data that were in float32, or in integers, before vernal saw them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

pytestmark = pytest.mark.loose_dtypes

N = 64
DAYS = np.linspace(0.0, 3.0, N)
JD = 2_459_000.5 + DAYS
SECONDS = 1_700_000_000 + 60 * np.arange(N)
IDS = 1_700_000_000 + np.arange(N)
BEFORE = np.int32(1_700_000_000)


class Wave(vn.Trainer):
    def residuals(self, model, batch):
        t, y = batch["t"], batch["y"]
        return model["a"] * jnp.sin(t / 0.5) - y


class FromFirst(vn.Trainer):
    def residuals(self, model, batch):
        t = batch["t"] - BEFORE
        return model["a"] * jnp.sin(t / 600.0) - batch["y"]


class Labelled(vn.Trainer):
    """Identifiers look a row up, and are compared."""

    def residuals(self, model, batch):
        rows = jnp.where(batch["t"] > BEFORE + 10, batch["t"] - BEFORE, 0)
        return model["a"] * jnp.ones(N)[rows] - batch["y"]


class Held(vn.Trainer):
    """Has its data in a field."""

    t: jax.Array

    def __init__(self, t):
        self.t = t
        super().__init__({"a": jnp.asarray(1.0)})

    def residuals(self, model, batch):
        return model["a"] * self.t - batch


class Deep(vn.Trainer):
    """Integers that go through functions before they become floats."""

    def loss(self, model, batch):
        def one(carry, t):
            late = jax.lax.cond(t[0] > 0, lambda u: u * model["a"], lambda u: 0.0, t[0])
            return carry + jnp.sin(late), None

        columns = jnp.stack([batch["t"], batch["t"][::-1]], axis=1)
        return jax.lax.scan(jax.jit(one), 0.0, columns)[0] ** 2


def told(kind, t, work, x64=False):
    """Returns what is said of rounding by `work(trainer, data)`."""
    with jax.enable_x64(x64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = {"a": jnp.asarray(1.0)}
        made = jnp.asarray(t() if callable(t) else t)
        work(kind(model, optax.sgd(1e-3)), {"t": made, "y": jnp.zeros(N)})
    found = [w for w in caught if issubclass(w.category, vn.PrecisionWarning)]
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def fit(trainer, data):
    """Fits twice, and solves: the same data are `data`, and then `batch`."""
    trainer = trainer.fit(data, 2).trainer.fit(data, 2).trainer
    trainer.solve(optx.BFGS(1e-2, 1e-2), data)


def look(trainer, data):
    """Before its first step a fit has looked."""
    trainer.fit(data, 0)


ROUTES = {
    "fit": fit,
    "minibatches": lambda trainer, data: trainer.fit(
        vn.Minibatches(data, N // 2, key=jax.random.key(0)), 0
    ),
    "solve": lambda trainer, data: trainer.solve(optx.BFGS(1e-2, 1e-2), data),
    "fit_many": lambda trainer, data: vn.fit_many([trainer, trainer], data, 0),
    "fit_many, own data": lambda trainer, data: vn.fit_many(
        [trainer, trainer],
        jax.tree.map(lambda x: jnp.stack([x, x]), data),
        0,
        data_axis=0,
    ),
    "fit_many, solver": lambda trainer, data: vn.fit_many(
        [trainer, trainer], data, 9, solver=optx.BFGS(1e-2, 1e-2)
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("kind", "t", "says"),
    [
        (Wave, lambda: jnp.asarray(JD, jnp.float32), "spacing there is 0.25"),
        (Wave, SECONDS, "turns into float32, whose spacing there is 128"),
    ],
    ids=["Julian dates in float32", "seconds in integers"],
)
def test_lost_digits_are_told_once(route, kind, t, says):
    (message,) = told(kind, t, ROUTES[route])
    assert "['t']" in message
    assert says in message
    assert "ubtract a reference" in message
    assert "jax_enable_x64" in message


FINE = {
    "dates from the first": (Wave, DAYS.astype(np.float32)),
    "integers from the first": (FromFirst, SECONDS),
    "identifiers": (Labelled, IDS),
    "small integers": (Wave, np.arange(N)),
    "large counts": (Wave, np.random.default_rng(0).poisson(1e9, N)),
    "no order": (Wave, np.random.default_rng(0).permutation(JD).astype(np.float32)),
    "many pixels": (Wave, np.linspace(0, 1, N, dtype=np.float32)),
    "one number": (Wave, np.float32(JD[0])),
}


@pytest.mark.parametrize("name", FINE)
def test_what_loses_nothing_is_not_told(name):
    assert not told(*FINE[name], look)


def test_integers_are_followed_into_functions():
    assert len(told(Deep, SECONDS, look)) == 1


@pytest.mark.parametrize("t", [JD, SECONDS], ids=["dates", "seconds"])
def test_not_in_float64(t):
    assert not told(Wave, t, look, x64=True)


def test_a_field_of_a_trainer():
    work = lambda _, data: [Held(data["t"]) for _ in range(2)]
    (message,) = told(Wave, JD.astype(np.float32), work)
    assert "Held.t" in message


def test_it_can_be_an_error_before_any_step():
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error", vn.PrecisionWarning)
        data = {"t": jnp.asarray(SECONDS), "y": jnp.zeros(N)}
        with pytest.raises(vn.PrecisionWarning, match="integers up to 1700003780"):
            Wave({"a": jnp.asarray(1.0)}, optax.sgd(1e-3)).fit(data, 10**6)


TURNED = {
    "negative": lambda t: (-t) * 1e-9,
    "sorted": lambda t: jnp.sort(t) * 1e-9,
    "clipped": lambda t: jnp.clip(t, 0) * 1e-9,
    "largest": lambda t: jnp.max(t) * 1e-9 * jnp.ones(N),
    "product of matrices": lambda t: (t[:, None] @ jnp.ones((1, 1)))[:, 0] * 1e-9,
}


@pytest.mark.parametrize("name", TURNED)
def test_integers_are_followed_through_what_moves_them(name):
    class Turned(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * TURNED[name](batch["t"]) - batch["y"]

    (said,) = told(Turned, SECONDS, look)
    assert "float32" in said


KEPT = {
    "order": lambda t: jnp.argsort(t).astype(float),
    "at most ten": lambda t: jnp.clip(t, 0, 10).astype(float),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_such_integers_is_not_told(name):
    class Kept(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * KEPT[name](batch["t"]) - batch["y"]

    assert told(Kept, SECONDS, look) == []


AMPLITUDE = 1.0


class Globally(vn.Trainer):
    def residuals(self, model, batch):
        return model["a"] * AMPLITUDE * jnp.sin(batch["t"] / 0.5) - batch["y"]


@pytest.mark.filterwarnings("ignore:.*PrecisionWarning", "ignore:.*integers up to")
def test_a_look_at_integers_takes_no_change_of_code_for_its_own(monkeypatch):
    with jax.enable_x64(False):
        data = {"t": jnp.asarray(SECONDS), "y": jnp.zeros(N)}
        trainer, losses = Globally({"a": jnp.asarray(1.0)}, optax.sgd(0.0)), []
        for amplitude in (1.0, 2.0, 4.0):
            monkeypatch.setitem(globals(), "AMPLITUDE", amplitude)
            losses += [*trainer.fit(data, 1, progress=False).history.loss]
    np.testing.assert_allclose(np.divide(losses, losses[0]), [1, 4, 16], rtol=1e-5)
