"""`Trainer.propagate` and `Trainer.draw`: errors of functions of the model."""

import functools
import re
import warnings
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import inside
import vernal as vn
from models import Line

X = jnp.linspace(0.0, 4.0, 9)


class LineFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y, sigma = batch
        return (model(x) - y) / sigma


class LineLikelihood(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(LineFit.residuals(self, model, batch) ** 2)


class Tangle(vn.Trainer):
    """Of `a` and `b` only the sum counts, and `dead` not at all."""

    def residuals(self, model, batch):
        total = model["a"] + model["b"]
        return jnp.concatenate([total - batch, 2.0 * (model["c"] - batch)])


def fitted(kind=LineFit, dtype=jnp.float64):
    return kind(Line(jnp.asarray(2.0, dtype), jnp.asarray(1.0, dtype)))


@functools.cache
def data(dtype=jnp.float64):
    noise = 0.2 * jax.random.normal(jax.random.key(0), X.shape)
    batch = X, 2.0 * X + 1.0 + noise, jnp.full(X.shape, 0.2)
    return jax.tree.map(lambda x: x.astype(dtype), batch)


def tangle():
    return Tangle({name: jnp.asarray(1.0) for name in ("a", "b", "c", "dead")})


@functools.cache
def covariance():
    design = np.stack([X, np.ones(9)], axis=1) / 0.2
    return np.linalg.inv(design.T @ design)


# Functions, and their gradients at slope 2, offset 1.
FUNCTIONS = {
    "scalar": (lambda m: m.offset / m.slope, lambda x: [[-0.25, 0.5]]),
    "vector": (lambda m: m(X), lambda x: np.stack([x, np.ones(9)], axis=1)),
    "square": (lambda m: m(X) ** 2, None),
    "matrix": (lambda m: jnp.outer(m(X[:3]), m(X[:2])), None),
    "pytree": (lambda m: {"root": (-m.offset / m.slope, m(X[1:])), "none": None}, None),
    "mixed": (lambda m: (m.slope, m.offset.astype(jnp.float32), m(X)), None),
    "constant": (lambda m: (3.0, m.slope), lambda x: [[0.0, 0.0], [1.0, 0.0]]),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((LineFit, name) for name in FUNCTIONS), (LineLikelihood, "vector")],
)
def test_the_error_is_that_of_the_linear_function(kind, name):
    fn, gradient = FUNCTIONS[name]
    trainer = fitted(kind)
    value, error = trainer.propagate(fn, data())
    expected = jax.tree.map(jnp.asarray, fn(trainer.model))
    assert jax.tree.structure(value) == jax.tree.structure(error)
    for ours, theirs, own in zip(
        *map(jax.tree.leaves, (value, expected, error)), strict=True
    ):
        assert ours.shape == theirs.shape == own.shape
        assert ours.dtype == theirs.dtype == own.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    if gradient is None:
        flat = lambda m: jnp.concatenate(
            [x.ravel().astype(float) for x in jax.tree.leaves(fn(m))]
        )
        rows = jax.jit(jax.jacfwd(flat))(trainer.model)
        rows = np.stack([rows.slope, rows.offset], axis=1)
    else:
        rows = np.asarray(gradient(X))
    exact = np.sqrt(np.diag(rows @ covariance() @ rows.T))
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(error)])
    near = 1e-6 if name == "mixed" else 1e-10
    np.testing.assert_allclose(found, exact, rtol=near, atol=1e-14)


def test_it_prints_as_lines():
    trainer, batch = fitted(), data()
    pair = trainer.propagate(lambda m: m.offset / m.slope, batch)
    assert isinstance(pair, tuple)
    assert pair == (pair.value, pair.error) == tuple(pair)
    # A line for each element, with the digits that its error leaves.
    value, error = np.array([12.3456, 0.0, 7.0]), np.array([0.0234, np.inf, np.nan])
    print_ = lambda *args: str(vn.Propagated(*args)).splitlines()
    assert print_(value[0], error[0]) == ["12.346 ± 0.023"]
    assert print_(value, error) == [
        "[0] = 12.346 ± 0.023",
        "[1] = 0 (unconstrained)",
        "[2] = 7 ± nan",
    ]
    tree = {"area": jnp.asarray(3.0), "of": (None, jnp.ones((1, 2)))}
    assert print_(tree, jax.tree.map(lambda x: 0.1 * x, tree)) == [
        "area      = 3.00 ± 0.30",
        "of.1[0,0] = 1.00 ± 0.10",
        "of.1[0,1] = 1.00 ± 0.10",
    ]
    assert print_(jnp.ones(1000), jnp.ones(1000))[7:] == [
        "[7]   = 1.0 ± 1.0",
        "991 more",
        "[999] = 1.0 ± 1.0",
    ]
    assert print_(jnp.ones(0), jnp.ones(0)) == []


def test_a_notebook_shows_the_lines():
    shown = []
    vn.Propagated(1.0, 0.1)._repr_pretty_(SimpleNamespace(text=shown.append), False)
    assert shown == ["1.00 ± 0.10"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_parameters_have_their_own_errors(dtype):
    trainer, batch = fitted(dtype=dtype), data(dtype)
    value, error = trainer.propagate(lambda m: m, batch)
    expected = trainer.standard_errors(batch)
    assert isinstance(value, Line)
    for ours, theirs in zip(
        jax.tree.leaves(error), jax.tree.leaves(expected), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_errors_of_100_000_draws():
    trainer = fitted()
    models = trainer.draw(jax.random.key(1), 100_000, data())
    assert models.slope.shape == (100_000,)
    fn = lambda m: {"ratio": m.offset / m.slope, "curve": m(X), "root": m.slope**0.5}
    drawn = eqx.filter_vmap(fn)(models)
    value, error = trainer.propagate(fn, data())
    # To a linear function within the errors, and to the scatter of the draws.
    for ours, theirs, own in zip(
        *map(jax.tree.leaves, (drawn, value, error)), strict=True
    ):
        np.testing.assert_allclose(jnp.std(ours, axis=0), own, rtol=0.02)
        np.testing.assert_allclose(jnp.mean(ours, axis=0), theirs, rtol=0.02)
    found = np.cov(np.stack([models.slope, models.offset]))
    np.testing.assert_allclose(found, covariance(), rtol=0.02)


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_what_the_data_do_not_constrain():
    fn = lambda m: {
        "sum": m["a"] + m["b"],
        "difference": m["a"] - m["b"],
        "c": m["c"] ** 2,
        "dead": jnp.stack([m["dead"], m["c"]]),
        "nothing": 0.0 * m["dead"],
    }
    _, error = tangle().propagate(fn, jnp.ones(4))
    np.testing.assert_allclose(error["sum"], 0.5)
    assert np.isinf(error["difference"])
    np.testing.assert_allclose(error["c"], 2 * 0.25)
    np.testing.assert_array_equal(np.isinf(error["dead"]), [True, False])
    assert error["nothing"] == 0
    with pytest.raises(ValueError, match=r"2 of 4 directions.*dead.*a.*b"):
        tangle().draw(jax.random.key(0), 3, jnp.ones(4))


class Held(vn.Trainer):
    """Whose minimum has `low` and the first of `pair` below their bounds."""

    def residuals(self, model, batch):
        values = jnp.stack([model["low"], *model["pair"], model["free"]])
        return jnp.concatenate([2.0 * (values - batch), jnp.zeros(2)])

    @staticmethod
    def made(kind, **ties):
        model = {"low": 0.0, "pair": np.array([1.0, 3.0]), "free": 4.0}
        bounds = {"low": (0, None), "pair": ([1.0, 0.0], None)}
        model = jax.tree.map(jnp.asarray, model | dict.fromkeys(ties, 0.0))
        return kind(model, bounds=bounds, ties=ties)


class HeldLikelihood(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(Held.residuals(self, model, batch) ** 2)


HELD_DATA = jnp.array([-1.0, 0.5, 3.0, 4.0])


@jax.custom_vjp
def only_backward(x):
    return x


only_backward.defvjp(lambda x: (x, None), lambda _, g: (g,))

# Functions, their errors, the held elements that make these too small, and the first
# output of held elements alone.
OF_HELD = {
    "alone, at zero slope, two": (
        lambda m: (m["low"], m["low"] * m["free"], m["low"] + m["pair"][0]),
        [np.nan] * 3,
        [],
        r"fn\(model\)\[0\]",
    ),
    "free alone, nothing, a number": (
        lambda m: (m["free"] + m["pair"][1], -0.0 * m["low"] + 1.0, 3.0),
        [0.5**0.5, 0.0, 0.0],
        [],
        "",
    ),
    "both": (lambda m: m["low"] - m["free"], 0.5, ["'low'"], ""),
    "all": (
        lambda m: m["low"] + jnp.sum(m["pair"]),
        0.5,
        ["'low'", r"'pair\[0\]'"],
        "",
    ),
    "each its own": (
        lambda m: jnp.stack([m["low"], 2 * m["free"], m["pair"][0] + m["free"]]),
        [np.nan, 1.0, 0.5],
        [r"'pair\[0\]'"],
        r"fn\(model\)`, first at \[0\] of shape \(3,\),",
    ),
    "many": (
        lambda m: jnp.arange(9.0) * m["low"],
        [0.0, *[np.nan] * 8],
        [],
        r"fn\(model\)`, first at \[1\] of shape \(9,\),",
    ),
    "backward": (
        lambda m: only_backward(jnp.stack([m["low"], m["low"] + m["free"]])),
        [np.nan, 0.5],
        ["'low'"],
        r"fn\(model\)`, first at \[0\] of shape \(2,\),",
    ),
}


# By residuals or not, all comes from one whitening.
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((Held, name) for name in OF_HELD), (HeldLikelihood, "each its own")],
)
def test_what_is_held_at_a_bound_has_no_error(kind, name):
    fn, expected, named, alone = OF_HELD[name]
    trainer = Held.made(kind, tied=lambda m: m["free"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, error = trainer.propagate(fn, HELD_DATA)
    said = [str(one.message) for one in caught]
    assert len(said) == bool(named) + bool(alone)
    if named:
        assert re.search(
            rf"`fn` depends on {', '.join(named)}, held .*intervals", said[0]
        )
    if alone:
        held = r"\(held here: 'low', 'pair\[0\]'\).*intervals"
        assert re.search(rf"`{alone}`? depends only on .*{held}", said[-1])
    np.testing.assert_allclose(error, expected, rtol=1e-12)
    assert not np.any(np.signbit(error))


# Functions that other parameters are tied to, their errors, and the cells of a table.
TIED = {
    "held": (lambda m: 2 * m["low"], np.nan, "0"),
    "both": (lambda m: m["low"] + m["free"], 0.5, "4.00 ± 0.50"),
    "nothing": (lambda m: jnp.ones(()), 0.0, "1 ± 0"),
}


@pytest.mark.parametrize("kind", [Held, HeldLikelihood])
def test_what_is_tied_to_what_is_held_has_no_error(kind):
    trainer = Held.made(kind, **{name: fn for name, (fn, _, _) in TIED.items()})
    report = trainer.report(HELD_DATA, data_count=4)
    for name, (_, expected, _) in TIED.items():
        np.testing.assert_allclose(report[name].error, expected, rtol=1e-12)
    # As `propagate` warns: of these, that of both alone is too small.
    told = "what is tied to others depends on 'low', held at its bound, and on what"
    assert told in report.note
    assert told in trainer.table(HELD_DATA)
    alone = Held.made(kind, tied=TIED["held"][0])
    assert told not in alone.table(HELD_DATA)
    if kind is HeldLikelihood:
        return
    many = vn.fit_many([trainer] * 2, HELD_DATA, 9, solver=optx.BFGS(1e-8, 1e-8))
    head, _, row, _ = many.table(HELD_DATA).splitlines()
    cells = dict(zip(*(re.split("  +", x) for x in (head, row)), strict=True))
    for name, (_, _, cell) in TIED.items():
        assert cells[f"{name} (tied to a function)"] == cell


# Functions, which of their outputs have no error, and why.
NOT_FINITE = {
    "log of a negative": (
        lambda m: jnp.log(-m.slope), True, r"`fn\(model\)` is NaN"
    ),
    "a root at zero": (
        lambda m: {"r": jnp.sqrt(m.slope - 2.0), "s": m.slope},
        {"r": True, "s": False},
        r"the derivative of `fn\(model\)\['r'\]` is not finite\.",
    ),
    "a pole": (
        lambda m: (m.slope, jnp.stack([m.offset, 1 / (m.slope - 2.0)])),
        (False, np.array([False, True])),
        r"`fn\(model\)\[1\]` is infinite, first at \[1\] of shape \(2,\)\.",
    ),
    "a norm at zero": (
        lambda m: jnp.linalg.norm(jnp.stack([m.slope - 2.0, m.offset - 1.0])),
        True,
        r"the derivative of `fn\(model\)` is not finite",
    ),
    "two, of many": (
        lambda m: [jnp.sqrt(X[:3] * (m.slope - 2.0)), 1 / (m.offset - 1.0)],
        [np.array([True, True, True]), True],
        r"`fn\(model\)\[0\]` is not finite, first at \[0\] of shape \(3,\); "
        r"`fn\(model\)\[1\]` is infinite\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_has_no_error(name):
    fn, lost, match = NOT_FINITE[name]
    with pytest.warns(UserWarning, match=match) as caught:
        _, error = fitted().propagate(fn, data())
    assert len(caught) == 1
    for own, is_lost in zip(*map(jax.tree.leaves, (error, lost)), strict=True):
        np.testing.assert_array_equal(np.isnan(own), is_lost)
        assert not np.isinf(own).any()


def test_a_root_at_zero_of_what_is_unconstrained_has_no_error():
    """An infinite error would say that the data do not constrain it."""
    fn = lambda m: jnp.sqrt(m["a"] + m["b"] - 2.0) + m["dead"]
    with pytest.warns(UserWarning, match="derivative"):
        _, error = tangle().propagate(fn, jnp.ones(4))
    assert np.isnan(error)


def test_where_the_derivative_vanishes_the_error_is_zero():
    fn = lambda m: jnp.stack([jnp.round(m.slope), (m.slope - 2.0) ** 2])
    np.testing.assert_array_equal(fitted().propagate(fn, data())[1], 0)


def test_errors_are_scaled_by_the_scatter():
    trainer = fitted()
    factor = np.sqrt(trainer.report(data()).reduced_chi_squared)
    _, plain = trainer.propagate(lambda m: m(X), data())
    _, scaled = trainer.propagate(lambda m: m(X), data(), scale_errors=True)
    np.testing.assert_allclose(scaled, factor * plain)
    near, far = (
        trainer.draw(jax.random.key(0), 9, data(), scale_errors=is_scaled).slope - 2.0
        for is_scaled in (False, True)
    )
    np.testing.assert_allclose(far, factor * near, rtol=1e-10)


def test_draws_are_stacked_with_all_that_is_frozen():
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return model["a"] * model["x"] - batch

    model = {"a": jnp.asarray(2.0), "x": X, "name": "line", "unit": 3.0}
    models = Fit(model, train="a").draw(jax.random.key(0), 5, 2.0 * X)
    assert models["a"].shape == (5,)
    assert models["x"].shape == (5, 9)
    assert (models["name"], models["unit"]) == ("line", 3.0)
    assert eqx.filter_vmap(lambda m: m["a"] * m["x"])(models).shape == (5, 9)
    again = Fit(model, train="a").draw(jax.random.key(0), 5, 2.0 * X)
    np.testing.assert_array_equal(models["a"], again["a"])


class Wide(vn.Trainer):
    def residuals(self, model, batch):
        return model - batch


SIZES = {"outputs": (20_000, 100), "parameters": (3, 400)}


@pytest.mark.as_compiled
@pytest.mark.parametrize("name", SIZES)
def test_memory_does_not_grow_with_outputs_times_parameters(name):
    outputs, size = SIZES[name]
    grid = jnp.linspace(0.0, 1.0, outputs)
    curve = lambda m: jnp.sin(grid) * jnp.sum(m)
    trainer, batch = Wide(jnp.ones(size)), jnp.ones(size)
    whitening = inside.around(trainer, batch, "").whitening
    args = inside.stripped(trainer), inside.Closure.encode(curve), whitening
    program = inside.run_propagate.lower(*args, jnp.asarray(1.0)).compile()
    # Of three norms and a gradient of each output; and of the map that whitens.
    most = 8 * (10 * outputs + 2 * size**2)
    assert program.memory_analysis().temp_size_in_bytes < most
    _, error = trainer.propagate(curve, batch)
    np.testing.assert_allclose(error, np.sin(grid) * np.sqrt(size), rtol=1e-10)


def test_values_in_a_closure_compile_nothing_again():
    traces = 0

    def curve(x):
        def fn(model):
            nonlocal traces
            traces += 1
            return model(x)

        return fn

    trainer = fitted()
    trainer.propagate(curve(X), data())
    once = traces
    value, _ = trainer.propagate(curve(X + 1.0), data())
    assert traces == once
    np.testing.assert_allclose(value, 2.0 * X + 3.0)


def test_functions_with_one_mode():
    def loop(model):
        body = lambda carry: (carry[0] + 1, carry[1] * model.slope)
        return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, model.offset))[1]

    @jax.custom_vjp
    def double(x):
        return 2.0 * x

    double.defvjp(lambda x: (2.0 * x, None), lambda _, g: (2.0 * g,))
    _, error = fitted().propagate(loop, data())
    gradient = np.array([12.0, 8.0])
    np.testing.assert_allclose(error, np.sqrt(gradient @ covariance() @ gradient))
    _, error = fitted().propagate(lambda m: double(m(X)), data())
    _, expected = fitted().propagate(lambda m: 2.0 * m(X), data())
    np.testing.assert_allclose(error, expected)


@pytest.mark.parametrize(
    ("fn", "error", "match"),
    [
        (3, TypeError, "`fn` is 3, but must be a function"),
        (lambda: 3.0, TypeError, "`fn`"),
        (lambda m: None, ValueError, "`fn` returned no array"),
        (lambda m: 3, TypeError, "`fn` returned int"),
        (lambda m: m(X) > 0, TypeError, "`fn` returned bool"),
        (lambda m: m(X) * 1j, TypeError, "imaginary part"),
        (lambda m: "text", TypeError, "`fn` returned str"),
    ],
)
@pytest.mark.own_words
@pytest.mark.loose_dtypes
def test_what_has_no_error(fn, error, match):
    with pytest.raises(error, match=match):
        fitted().propagate(fn, data())


OF_NUMPY = {
    "float": lambda m: float(m.slope),
    "a function of NumPy": lambda m: np.sin(np.asarray(m.slope)),
    "if": lambda m: m.slope if m.slope > 0 else m.offset,
    "an index": lambda m: [1.0, 2.0][m.slope.astype(int)],
}


@pytest.mark.parametrize("name", OF_NUMPY)
def test_a_function_that_is_not_of_jax_is_refused(name):
    with pytest.raises(TypeError, match=r"`fn` asks for .*use `jax\.numpy`") as caught:
        fitted().propagate(OF_NUMPY[name], data())
    assert "jax" in type(caught.value.__cause__).__module__


@pytest.mark.own_words
def test_a_batch_in_another_place_is_not_printed():
    batch = jnp.ones((3, 50)), jnp.ones(50)
    trainer = LineFit(Line(jnp.ones(()), jnp.ones(())))
    key, fn = jax.random.key(0), lambda model: model.slope
    for call in (
        lambda: trainer.draw(batch, key, 3),
        lambda: trainer.draw(key, batch, 3),
        lambda: trainer.propagate(batch, fn),
        lambda: trainer.draw(batch[1], key, 3),
    ):
        with pytest.raises(TypeError, match="is of type") as caught:
            call()
        assert len(str(caught.value)) < 150
