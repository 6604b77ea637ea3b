"""Ties: what follows others is not free, and follows at every step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import Pull

X = np.linspace(-5, 5, 40)


class Peak(eqx.Module):
    height: jax.Array
    center: jax.Array
    width: jax.Array
    scale: float = 1.0

    def __call__(self, x):
        return self.height * jnp.exp(-0.5 * jnp.square((x - self.center) / self.width))


def peaks(*widths, dtype=jnp.float64):
    number = lambda x: jnp.asarray(x, dtype)
    places = {"a": -2.0, "b": 0.0, "c": 2.0}
    return {
        name: Peak(number(1.0), number(place), number(width))
        for (name, place), width in zip(places.items(), widths, strict=True)
    }


class PeakFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return (sum(peak(x) for peak in model.values()) - y) / 0.05


def batch(dtype=jnp.float64):
    noise = 0.05 * np.random.default_rng(1).normal(size=X.size)
    y = sum(peak(X) for peak in peaks(0.7, 0.7, 1.4).values()) + noise
    return jnp.asarray(X, dtype), jnp.asarray(y, dtype)


START = peaks(1.0, 0.4, 3.0)
TIES = {"b.width": "a.width", "c.width": lambda model: 2 * model["a"].width}
CHAIN = {"b.width": lambda model: model["c"].width / 2, "c.width": "a.width"}
LM = optx.LevenbergMarquardt(1e-10, 1e-10)


class Tied(eqx.Module):
    """The same model with the ties written into it, as one does by hand."""

    free: dict
    width: jax.Array

    def whole(self):
        factors = {"a": 1, "b": 1, "c": 2}
        return {
            name: Peak(*pair, factors[name] * self.width)
            for name, pair in self.free.items()
        }


class TiedFit(PeakFit):
    def residuals(self, model, batch):
        return PeakFit.residuals(self, model.whole(), batch)


def by_hand():
    free = {name: (peak.height, peak.center) for name, peak in START.items()}
    return Tied(free, START["a"].width)


def widths(model):
    return [float(peak.width) for peak in model.values()]


def test_a_fit_is_that_of_the_model_with_the_ties_in_it():
    tied = PeakFit(START, optax.adam(0.05), ties=TIES)
    known = TiedFit(by_hand(), optax.adam(0.05))
    assert "b.width" not in vn.paths(tied.params)
    assert widths(tied.model) == [1.0, 1.0, 2.0]
    fit, hand = (t.fit(batch(), 100, progress=False) for t in (tied, known))
    np.testing.assert_allclose(fit.history.loss, hand.history.loss, rtol=1e-10)
    np.testing.assert_allclose(
        widths(fit.model), widths(hand.model.whole()), rtol=1e-10
    )
    np.testing.assert_allclose(widths(fit.best), widths(hand.best.whole()), rtol=1e-10)
    a, b, c = widths(fit.best)
    assert (b, c) == (a, 2 * a)


def test_solve_errors_and_objective_are_too():
    tied, known = PeakFit(START, ties=TIES), TiedFit(by_hand())
    end, hand = (t.whiten(batch()).solve(LM, batch()) for t in (tied, known))
    np.testing.assert_allclose(widths(end.model), widths(hand.model.whole()), rtol=1e-6)
    errors, own = (e.trainer.standard_errors(batch()) for e in (end, hand))
    np.testing.assert_allclose(errors["a"].width, own.width, rtol=1e-5)
    assert errors["b"].width is None
    report = end.trainer.report(batch())
    row = report["c.width"]
    assert (row.status, row.is_free) == ("tied to a function", False)
    np.testing.assert_allclose(row.error, 2 * own.width, rtol=1e-5)
    assert report["b.width"].status == "tied to a.width"
    np.testing.assert_allclose(report["b.width"].error, own.width, rtol=1e-5)
    assert report.free_count == 7
    assert "tied to a.width" in end.trainer.table(batch())
    assert "tied to a.width" in str(end.trainer)
    potential, start = tied.objective(batch())
    other, at = known.objective(batch())
    np.testing.assert_allclose(potential(start), other(at), rtol=1e-12)


def test_a_chain_is_followed_in_its_order():
    model = PeakFit(START, ties=CHAIN).model
    assert widths(model) == [1.0, 0.5, 1.0]


def test_a_tie_by_several_and_of_arrays():
    model = {"a": jnp.arange(3.0), "b": jnp.ones(3), "c": jnp.zeros((2, 3))}

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum(jnp.square(model["c"] - batch))

    ties = {"c": lambda m: jnp.stack([m["a"] + m["b"], m["a"] - m["b"]])}
    trainer = Fit(model, optax.sgd(0.1), ties=ties)
    result = trainer.fit(jnp.full((2, 3), 2.0), 300, progress=False)
    np.testing.assert_allclose(result.model["c"], 2, atol=1e-6)
    np.testing.assert_allclose(result.model["a"], 2, atol=1e-6)


class Rotated(vn.Trainer):
    def residuals(self, model, batch):
        return (
            model["k"] * batch - 2 * batch + jnp.sum(jnp.abs(model["z"])) + model["w"]
        )


COMPLEX = {
    "a number": lambda model: jax.lax.complex(model["k"], 1.0),
    "an array": lambda model: jax.lax.complex(
        jnp.stack([model["k"], 1 - model["k"]]), jnp.array([1.0, 0.0])
    ),
}


@pytest.mark.parametrize(
    ("case", "has_real"), [("a number", True), ("an array", False)]
)
def test_what_is_complex_and_tied_has_a_row_without_an_error(case, has_real):
    follow = COMPLEX[case]
    model = {"k": jnp.array(0.3), "w": jnp.array(0.6)}
    ties = {"z": follow} | ({"w": lambda model: 2 * model["k"]} if has_real else {})
    trainer = Rotated({**model, "z": follow(model)}, ties=ties)
    x = jnp.linspace(0.0, 3.0, 9)
    fits = vn.fit_many([trainer] * 2, x, 30, solver=LM)
    end = fits.trainer(0)
    report, columns = end.report(x), fits.to_dict(x)
    value = np.asarray(end.model["z"])
    names = [name for name in columns if name.startswith("z")]
    assert len(names) == value.size
    for name, expected in zip(names, value.flat, strict=True):
        row = report[name]
        assert (row.value, row.status) == (expected, "tied to a function")
        assert np.isnan(row.error)
        line = next(x for x in end.table(x).splitlines() if x.startswith(name))
        assert line.split(maxsplit=2)[1:] == [f"{expected:.6g}", row.status]
        assert columns[name][0] == expected
        assert f"error[{name}]" not in columns
        assert f"{expected:.6g}" in fits.table(x)
    for name in ("k", "w"):
        np.testing.assert_allclose(columns[f"error[{name}]"][0], report[name].error)
    if has_real:
        np.testing.assert_allclose(report["w"].error, 2 * report["k"].error)


def test_a_tuple_ties_several_and_a_python_float_can_be_tied():
    ties = {("b.width", "c.width"): "a.width", "b.scale": "a.width"}
    trainer = PeakFit(START, ties=ties)
    assert widths(trainer.model) == [1.0, 1.0, 1.0]
    assert float(trainer.model["b"].scale) == 1.0


def test_other_numbers_in_a_tie_compile_nothing():
    traces = []

    class Counted(PeakFit):
        def residuals(self, model, batch):
            traces.append(1)
            return super().residuals(model, batch)

    def fit(factor):
        factor = jnp.asarray(factor)
        ties = {"c.width": lambda model: factor * model["a"].width}
        trainer = Counted(START, optax.adam(0.01), ties=ties)
        return widths(trainer.fit(batch(), 20, progress=False).model)

    a, _, c = fit(2.0)
    np.testing.assert_allclose(c, 2 * a)
    count = len(traces)
    a, _, c = fit(3.0)
    np.testing.assert_allclose(c, 3 * a)
    assert len(traces) == count


def test_files_and_many_at_once(tmp_path):
    make = lambda width: PeakFit(peaks(width, 0.4, 3.0), optax.adam(0.02), ties=TIES)
    trainer = make(1.0).fit(batch(), 50, progress=False).trainer
    vn.save(tmp_path / "tied.vernal", trainer)
    back = vn.load(tmp_path / "tied.vernal", make(1.0))
    assert widths(back.model) == widths(trainer.model)
    many = vn.fit_many([make(1.0), make(0.8)], batch(), 50, progress=False)
    assert widths(many.trainer(0).model) == pytest.approx(widths(trainer.model))
    a, b, c = widths(many.trainer(1).model)
    assert (b, c) == (a, 2 * a)


def test_a_key_may_look_like_an_expression():
    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.square(model["b"] - batch)

    for key in ("a-1", "a 1", "2*a", "(a)"):
        model = {key: jnp.array(3.0), "b": jnp.array(1.0)}
        assert float(Fit(model, ties={"b": key}).model["b"]) == 3.0


def test_a_chain_through_python_floats():
    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.square(model["c"] - batch)

    model = {"a": jnp.array(3.0), "b": 1.0, "c": 1.0}
    for names in (("b", "c"), ("c", "b")):
        ties = {"b": "a", "c": lambda m: 2 * m["b"]}
        found = Fit(model, ties={name: ties[name] for name in names}).model
        assert (float(found["b"]), float(found["c"])) == (3.0, 6.0)
        assert not found["c"].weak_type


def twice_in_a_scan(model):
    doubled = lambda model, _: ({**model, "b": model["c"]}, None)
    return 2 * jax.lax.scan(doubled, model, length=2)[0]["a"].width


def twice_of_what_is_printed(model):
    jax.debug.callback(lambda _: None, model)
    return 2 * model["a"].width


TWICE = {
    "jit": jax.jit(TIES["c.width"]),
    "a jitted method": eqx.filter_jit(TIES["c.width"]),
    "jit within jit": jax.jit(lambda model: jax.jit(TIES["c.width"])(model)),
    "checkpoint": jax.checkpoint(TIES["c.width"]),
    "cond": lambda m: jax.lax.cond(m["a"].width > 9, *[TIES["c.width"]] * 2, m),
    "scan": twice_in_a_scan,
    "print": twice_of_what_is_printed,
}


@pytest.mark.parametrize("name", TWICE)
def test_what_a_function_is_given_and_does_not_read_makes_no_circle(name):
    number = lambda x: jnp.asarray(x, jnp.float64)
    model = jax.tree.map(number, START)
    trainer = PeakFit(model, ties={"c.width": TWICE[name], "b.width": "c.width"})
    assert widths(trainer.model) == [1.0, 2.0, 2.0]


def test_what_cannot_be_recorded_or_followed_is_said():
    trainer = PeakFit(START, optax.adam(0.1), ties=TIES)
    with pytest.raises(ValueError, match=r"'b\.width' is tied to a\.width"):
        trainer.fit(batch(), 3, record="b.width", progress=False)
    model = {"a": jnp.array(1j), "b": jnp.array(1.0)}
    with pytest.raises(TypeError, match="'b' is real"):
        PeakFit(model, ties={"b": "a"})


RULES = {
    "for both": {("b", "a"): optax.sgd(0.1)},
    "for all": {"*": optax.sgd(0.1)},
    "that freezes": {"a": optax.sgd(0.1), "b": None},
    "by default": {"a": optax.sgd(0.1)},
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_may_be_for_what_is_tied_and_more(name):
    model = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
    optimiser = vn.ParamOptimiser(RULES[name], default=optax.sgd(1.0))
    trainer = Pull(model, optimiser, ties={"b": "a"}).replace(optimiser=optimiser)
    now, _ = trainer.step(0.0)
    assert float(now.model["a"]) == float(now.model["b"]) < 1


BAD = {
    "a circle": ({"a.width": "b.width", "b.width": "a.width"}, "circle.*'a.width'"),
    "of functions": (
        {"a.width": lambda m: m["b"].width, "b.width": lambda m: 2 * m["a"].width},
        "circle",
    ),
    "to itself": ({"a.width": lambda m: 2 * m["a"].width}, "circle"),
    "within jit": ({"a.width": jax.jit(lambda m: 2 * m["a"].width)}, "circle"),
    "an unknown name": ({"z.width": "a.width"}, "matches nothing"),
    "to an unknown name": ({"b.width": "a.with"}, "matches nothing"),
    "an expression": ({"b.width": "2*a.width"}, "give a function: `lambda"),
    "a sum": ({"b.width": "a.width + c.width"}, "give a function: `lambda"),
    "to several": ({"b.width": "a"}, "names 3 parameters"),
    "a number": ({"b.width": 2.0}, "must be tied to the path"),
    "another shape": ({"b.width": lambda m: jnp.ones(2)}, "has shape"),
    "no such attribute": ({"b.width": lambda m: m["a"].with_}, "cannot be evaluated"),
    "of two arguments": ({"b.width": lambda m, x: m}, "called as"),
    "a list": (["a.width"], "must be a dictionary"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", BAD)
def test_bad_ties_are_refused(name):
    ties, message = BAD[name]
    with pytest.raises((TypeError, ValueError, KeyError), match=f"ties.*{message}"):
        PeakFit(START, ties=ties)


def test_nothing_left_to_train_is_refused():
    ties = {"b.width": "a.width"}
    with pytest.raises(ValueError, match="no parameter to train"):
        PeakFit(START, train="b.width", ties=ties)
