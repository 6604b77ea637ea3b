"""Bounds: a fit stays within them, and ends at the lowest loss that they allow."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
import scipy.optimize
import scipy.stats

import vernal as vn
from models import LineFit, line, line_batch

INF = np.inf
MATRIX = np.random.default_rng(0).normal(size=(12, 4))
TARGET = MATRIX @ np.array([1.0, -2.0, 0.5, 3.0]) + 0.1


class Linear(vn.Trainer):
    """A linear model in leaves of several kinds, for which SciPy has the answer."""

    def residuals(self, model, batch):
        matrix, target = batch
        x = jnp.concatenate(
            [model["a"]["x"], model["b"][0][None], model["b"][1].ravel()]
        )
        return matrix @ x - target


BATCH = jnp.asarray(MATRIX), jnp.asarray(TARGET)


def tree(*x, dtype=jnp.float64):
    x = jnp.asarray(x, dtype)
    return {"a": {"x": x[:2], "none": None}, "b": [x[2], x[3:].reshape(1, 1)]}


def flat(model):
    return np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(model)], dtype=float
    )


# The bounds, and the same for SciPy.
BOUNDS = {
    "inactive": ({"**": (-10, 10)}, (-10,) * 4, (10,) * 4),
    "of a number": ({"b.0": (None, 0.2)}, (-INF,) * 4, (INF, INF, 0.2, INF)),
    "of a node": ({"a": (-1, None)}, (-1, -1, -INF, -INF), (INF,) * 4),
    "arrays": (
        {"a.x": (np.array([-1, -1.5]), [0.5, 2])},
        (-1, -1.5, -INF, -INF),
        (0.5, 2, INF, INF),
    ),
    "of all": ({"**": (0, 1.5)}, (0,) * 4, (1.5,) * 4),
    "by a glob": (
        {"**.x": (-0.5, 1), "b.1": (None, 2)},
        (-0.5, -0.5, -INF, -INF),
        (1, 1, INF, 2),
    ),
}
START = tree(0.5, 0.5, 0.1, 0.5)


class Several(vn.Trainer):
    """A linear model for each of the bounds."""

    def residuals(self, model, batch):
        return {name: Linear.residuals(self, model[name], batch) for name in BOUNDS}


def fit_of(kind, start, bounds, is_whitened=False, steps=1500):
    trainer = kind(start, optax.adam(0.05), bounds=bounds)
    if is_whitened:
        trainer = trainer.whiten(BATCH, optimiser=optax.adam(0.05))
    return trainer.fit(BATCH, steps, record="**", progress=False)


def of_all(low, high):
    """Bounds of all elements, so that fits within some or others share a program."""
    sides = (jax.tree.leaves(tree(*np.clip(x, -100, 100))) for x in (low, high))
    return dict(zip(vn.paths(START), zip(*sides, strict=True), strict=True))


@functools.cache
def fitted():
    pairs = {name: own.items() for name, (own, *_) in BOUNDS.items()}
    bounds = {f"{n}.{path}": pair for n, own in pairs.items() for path, pair in own}
    return fit_of(Several, dict.fromkeys(BOUNDS, START), bounds)


@pytest.mark.parametrize("is_whitened", [False, True])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_fit_ends_where_scipy_does(name, is_whitened):
    _, low, high = BOUNDS[name]
    known = scipy.optimize.lsq_linear(MATRIX, TARGET, (low, high), tol=1e-14)
    if is_whitened:
        result = fit_of(Linear, START, of_all(low, high), True)
        end = result.model
        columns = [result.history[path] for path in vn.paths(START)]
    else:
        end = fitted().model[name]
        columns = [fitted().history[f"{name}.{path}"] for path in vn.paths(START)]
    np.testing.assert_allclose(flat(end), known.x, atol=1e-4)
    # SciPy's are close to the bounds, these are on them.
    expected = np.where(known.active_mask < 0, low, high)[known.active_mask != 0]
    np.testing.assert_array_equal(flat(end)[known.active_mask != 0], expected)
    # Not only at the end.
    values = np.concatenate([x.reshape(1500, -1) for x in columns], axis=1)
    assert np.all((values >= low) & (values <= high))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["of a number", "of a node"])
def test_errors_are_those_with_the_parameter_frozen(name, dtype):
    bounds, low, high = BOUNDS[name]
    known = scipy.optimize.lsq_linear(MATRIX, TARGET, (low, high), tol=1e-14)
    batch = jax.tree.map(lambda x: x.astype(dtype), BATCH)
    ends = {-1: low, 0: known.x, 1: high}
    start = [ends[mask][i] for i, mask in enumerate(known.active_mask)]
    trainer = Linear(tree(*start, dtype=dtype), bounds=bounds)
    errors = flat(trainer.standard_errors(batch))
    is_free = known.active_mask == 0
    free = MATRIX[:, is_free]
    expected = np.sqrt(np.diag(np.linalg.inv(free.T @ free)))
    np.testing.assert_allclose(errors[is_free], expected, rtol=1e-4)
    assert np.isnan(errors[~is_free]).all()
    report = trainer.report(batch)
    held = [row.status for row in report.parameters if np.isnan(row.error)]
    bound = np.array(start)[~is_free][0]
    assert held == [f"at its bound ({bound:.6g})"] * (~is_free).sum()
    assert held[0] in trainer.table(batch)
    assert report.free_count == is_free.sum()
    # At the minimum within the bounds, though the gradient is not zero.
    assert report.edm < 1e-3
    assert report.note is None


def test_a_fit_that_meets_no_bound_has_the_bits_of_one_without():
    batch = line_batch()
    bounds = {"slope": (-100, 100), "offset": (-INF, 50)}
    fits = [
        LineFit(line(), optax.adam(0.05), bounds=own).fit(batch, 200, progress=False)
        for own in (bounds, None)
    ]
    both = [(fit.model, fit.trainer.opt_state, fit.history.loss) for fit in fits]
    for leaf, other in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_n_and_m_steps_are_n_plus_m(tmp_path):
    """Also if the trainer was in a file in between."""
    batch, bounds = line_batch(), {"slope": (0, 1.2), "offset": (-1, 0)}
    trainer = LineFit(line(), optax.adam(0.05), bounds=bounds)
    whole = trainer.fit(batch, 150, progress=False).trainer
    vn.save(tmp_path / "fit.vernal", trainer.fit(batch, 90, progress=False).trainer)
    parts = vn.load(tmp_path / "fit.vernal", trainer)
    parts = parts.fit(batch, 60, progress=False).trainer
    for leaf, other in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert float(whole.model.slope) == 1.2
    with pytest.raises(ValueError, match=r"'slope' starts at 3, outside"):
        trainer.replace(model=line(slope=3.0))
    replaced = trainer.replace(model=line(slope=1.2)).fit(batch, 150, progress=False)
    assert float(replaced.model.slope) == 1.2


def test_other_bounds_compile_nothing():
    traces = []

    class Counted(vn.Trainer):
        def loss(self, model, batch):
            traces.append(1)
            return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    fit = lambda low, high: Counted(
        line(), optax.adam(0.05), bounds={"slope": (low, high)}
    ).fit(line_batch(), 300, progress=False)
    assert float(fit(-1, 1.5).model.slope) == 1.5
    count = len(traces)
    assert float(fit(-2.0, 1.25).model.slope) == 1.25
    assert len(traces) == count


def test_many_at_once_have_bounds_of_their_own():
    batch = line_batch()
    highs = (0.75, 1.5, 5.0)
    make = lambda high: LineFit(
        line(), optax.adam(0.05), bounds={"slope": (None, high)}
    )
    result = vn.fit_many([make(h) for h in highs], batch, 800, progress=False)
    np.testing.assert_allclose(result.trainers.model.slope, (0.75, 1.5, 2), atol=1e-4)
    stacked = eqx.filter_vmap(make)(jnp.asarray(highs))
    again = vn.fit_many(stacked, batch, 800, progress=False)
    np.testing.assert_allclose(again.trainers.model.slope, (0.75, 1.5, 2), atol=1e-4)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("linesearch", [True, False])
def test_lbfgs_is_refused(linesearch):
    """It would not end at the best point within the bounds."""
    options = {} if linesearch else {"linesearch": None}
    rule = optax.lbfgs(0.3, **options)
    trainer = LineFit(line(), rule, bounds={"slope": (0, None)})
    with pytest.raises(ValueError, match=r"L-BFGS.*trainer\.solve"):
        trainer.fit(line_batch(), 3, progress=False)


SEARCHES = {
    "L-BFGS": optax.lbfgs(),
    "L-BFGS without one": optax.lbfgs(0.1, linesearch=None),
    "by a rule": vn.ParamOptimiser({}, default=optax.lbfgs()),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)
    ),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", SEARCHES)
def test_a_line_search_does_not_know_of_a_constraint(name):
    class Clipped(LineFit):
        def constrain(self, model):
            return eqx.tree_at(lambda m: m.slope, model, jnp.minimum(model.slope, 1.0))

    # A warning is an error here: the fit ends before it compiles its search.
    trainer = Clipped(line(), SEARCHES[name])
    with pytest.raises(UserWarning, match=r"`constrain`.*line search.*`bounds`"):
        trainer.fit(line_batch(), 3, progress=False)


def test_a_whitened_fit_that_meets_no_bound_is_one_without():
    fits = [
        fit_of(Linear, START, bounds, True, steps=60).trainer.params
        for bounds in (of_all((-INF,) * 4, (INF,) * 4), None)
    ]
    for leaf, other in zip(*map(jax.tree.leaves, fits), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-14)


class Flux(vn.Trainer):
    """An upper limit: the best flux is negative, and is held at zero."""

    def residuals(self, model, batch):
        return model["flux"] - batch


class FluxNll(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(jnp.square(Flux.residuals(self, model, batch)))


SOLVERS = {
    Flux: optx.LevenbergMarquardt(1e-8, 1e-8),
    FluxNll: optx.BFGS(1e-8, 1e-8),
}


@pytest.mark.parametrize("kind", SOLVERS, ids=["residuals", "nll"])
def test_an_upper_limit_converges(kind):
    data = jnp.array([-1.0, 0.2, -0.5, -0.3])
    trainer = kind({"flux": jnp.array(1.0)}, bounds={"flux": (0, None)})
    result = trainer.solve(SOLVERS[kind], data)
    assert result.stop_reason is vn.StopReason.CONVERGED
    report = result.report(data)
    assert (float(result.model["flux"]), report.free_count) == (0.0, 0)
    assert report["flux"].status == "at its bound (0)"
    assert not report["flux"].is_free
    assert report.correlation_matrix.shape == (0, 0)
    if kind is FluxNll:
        return
    many = vn.fit_many([trainer, trainer], data, 50, solver=SOLVERS[kind])
    assert set(many.stop_reasons) == {vn.StopReason.CONVERGED}


def test_draws_are_a_truncated_normal():
    data = jnp.full(4, 0.1)
    trainer = Flux({"flux": jnp.array(0.1)}, bounds={"flux": (0, None)})
    drawn = np.asarray(trainer.draw(jax.random.key(0), 4_000, data)["flux"])
    known = scipy.stats.truncnorm(-0.1 / 0.5, np.inf, 0.1, 0.5)
    assert drawn.min() > 0
    assert scipy.stats.kstest(drawn, known.cdf).pvalue > 0.01
    held = Flux({"flux": jnp.array(0.0)}, bounds={"flux": (0, None)})
    assert not np.any(held.draw(jax.random.key(0), 5, data - 1)["flux"])


class Correlated(vn.Trainer):
    def residuals(self, model, batch):
        return batch @ model["a"]


def rejected(factor, low, high, count):
    """Draws by rejection, of whole vectors."""
    rng, kept = np.random.default_rng(1), np.zeros((0, len(low)))
    while len(kept) < count:
        drawn = rng.normal(size=(200_000, len(low))) @ factor.T
        kept = np.r_[kept, drawn[np.all((low <= drawn) & (drawn <= high), axis=1)]]
    return kept[:count]


@pytest.mark.parametrize(("size", "unit"), [(2, 1.0), (3, 1e-20)])
def test_draws_within_bounds_that_are_small_beside_the_errors(size, unit):
    """With others, and those that rejection finds there are one distribution."""
    factor = np.tril(np.random.default_rng(size).normal(size=(size, size)))
    factor[1] = factor[0] + 0.02 * factor[1]  # the first two are much alike
    low, high = -0.02 * np.arange(size), 0.03 * np.arange(1, size + 1)
    trainer = Correlated(
        {"a": jnp.zeros(size)}, bounds={"a": (low * unit, high * unit)}
    )
    batch = jnp.asarray(np.linalg.inv(factor) / unit)
    drawn = np.asarray(trainer.draw(jax.random.key(0), 2_000, batch)["a"]) / unit
    assert np.all((low <= drawn) & (drawn <= high))
    known = rejected(factor, low, high, 2_000)
    mixed = np.random.default_rng(2).normal(size=(size, 3))
    for one, other in zip((drawn @ mixed).T, (known @ mixed).T, strict=True):
        assert scipy.stats.ks_2samp(one, other).pvalue > 1e-3
    for one, other in zip(drawn.T, known.T, strict=True):
        assert scipy.stats.ks_2samp(one, other).pvalue > 1e-3


def test_independent_draws_within_a_small_box_are_those_of_scipy():
    low, high = np.array([0.0, -2.0, -0.03, -1e-4]), np.array([0.02, 0.01, 0.03, 4.0])
    trainer = Correlated({"a": jnp.zeros(4)}, bounds={"a": (low, high)})
    drawn = trainer.draw(jax.random.key(0), 2_000, jnp.eye(4))["a"]
    for one, least, most in zip(np.asarray(drawn).T, low, high, strict=True):
        known = scipy.stats.truncnorm(least, most)
        assert scipy.stats.kstest(one, known.cdf).pvalue > 1e-3


def test_on_a_bound_and_not_seen_by_the_data_is_not_held():
    model = {"flux": jnp.array(0.0), "unseen": jnp.array(0.2)}
    bounds = {"flux": (0, None), "unseen": (0.2, None)}
    report = Flux(model, bounds=bounds).report(jnp.array([-1.0, -0.5]))
    assert report["flux"].status == "at its bound (0)"
    assert (report["unseen"].status, report.free_count) == ("unconstrained", 1)


def test_what_follows_a_held_parameter_has_no_error():
    model = {"flux": jnp.array(0.0), "twice": jnp.array(0.0)}
    ties = {"twice": lambda m: 2 * m["flux"]}
    trainer = Flux(model, bounds={"flux": (0, None)}, ties=ties)
    row = trainer.report(jnp.array([-1.0, -0.5]))["twice"]
    assert np.isnan(row.error)
    assert row.status == "tied to a function"


def test_what_is_loaded_or_traced_is_within_the_bounds(tmp_path):
    wide = LineFit(line(slope=-3.0), optax.adam(0.05))
    vn.save(tmp_path / "wide.vernal", wide)
    narrow = LineFit(line(), optax.adam(0.05), bounds={"slope": (0, None)})
    with pytest.raises(ValueError, match=r"'slope' starts at -3, outside"):
        vn.load(tmp_path / "wide.vernal", narrow)

    @eqx.filter_jit
    def make(slope):
        return LineFit(line(slope), optax.adam(0.05), bounds={"slope": (0, None)})

    assert float(make(jnp.array(0.5)).model.slope) == 0.5
    with pytest.raises(RuntimeError, match="outside of its `bounds`"):
        jax.block_until_ready(make(jnp.array(-3.0)).params)


@pytest.mark.parametrize("slope", [-3.0, 1.0])
def test_each_member_that_is_loaded_is_within_the_bounds(slope, tmp_path):
    slopes, bounds = jnp.asarray([0.5, slope, 2.0]), {"slope": (0, None)}
    make = lambda start, **rest: LineFit(line(start), optax.adam(0.05), **rest)
    narrow = eqx.filter_vmap(lambda x: make(x, bounds=bounds))(abs(slopes))
    vn.save(tmp_path / "wide.vernal", eqx.filter_vmap(make)(slopes))
    load = functools.partial(vn.load, tmp_path / "wide.vernal", narrow)
    if slope > 0:
        np.testing.assert_array_equal(load().model.slope, slopes)
        return
    match = r"member 1, has .* does not allow(?s:.)*'slope' starts at -3, outside"
    with pytest.raises(vn.MismatchError, match=match):
        load()


@pytest.mark.parametrize("members", [3, 4])
def test_members_that_share_bounds_go_on_from_a_checkpoint(members, tmp_path):
    """Also where there are as many members as elements."""

    class Pull(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum((model["a"] - batch) ** 2)

    low, model = jnp.asarray([0.0, 1.0, 2.0]), {"a": jnp.asarray([0.5, 1.5, 2.5])}
    make = lambda rate: Pull(model, optax.sgd(rate), bounds={"a": (low, low + 1)})
    trainers = [make(rate) for rate in np.linspace(0.1, 0.2, members)]
    options = {"checkpoint": vn.Checkpoints(tmp_path), "progress": False}
    vn.fit_many(trainers, jnp.asarray(9.0), 3, **options)
    result = vn.fit_many(trainers, jnp.asarray(9.0), 60, **options)
    expected = np.tile(np.asarray(low) + 1, (members, 1))
    np.testing.assert_array_equal(result.trainers.model["a"], expected)


def test_a_latent_objective_is_finite_on_the_bounds():
    batch = MATRIX.astype(np.float32), TARGET.astype(np.float32)
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    trainer = Linear(start, bounds={"**": (0, 1.5)})
    trainer = trainer.whiten(batch, optimiser=optax.adam(0.1))
    end = trainer.fit(batch, 300, progress=False).trainer
    potential, latent = end.objective(batch)
    assert np.isfinite(jax.jit(potential)(latent))
    again = end.replace(model=end.model)
    np.testing.assert_array_equal(flat(again.model), flat(end.model))


def test_a_sampler_finds_nothing_beyond_the_bounds():
    potential, start = Linear(START, bounds={"b.0": (0, 1)}).objective(BATCH)
    potential = jax.jit(potential)
    assert np.isfinite(potential(start))
    for beyond in (-0.1, 1.1):
        assert np.isposinf(potential(np.where(np.arange(4) == 2, beyond, start)))


def test_constrain_comes_before_the_bounds():
    class Rounded(LineFit):
        def constrain(self, model):
            return eqx.tree_at(lambda m: m.slope, model, jnp.minimum(model.slope, 1.5))

    trainer = Rounded(line(), optax.adam(0.05), bounds={"offset": (None, 0.5)})
    model = trainer.fit(line_batch(), 500, progress=False).model
    assert (float(model.slope), float(model.offset)) == (1.5, 0.5)


BAD = {
    "the wrong way round": ({"slope": (1, 0)}, "`low < high`"),
    "one value": ({"slope": (0.5, 0.5)}, "`low < high`.*`train`"),
    "a start outside": ({"slope": (1, 2)}, "'slope' starts at 0.5, outside.*(1, 2)"),
    "of a shape": ({"slope": (np.full(3, -1.0), 1)}, "does not broadcast"),
    "NaN": ({"slope": (0, np.nan)}, "nan.*`low < high`"),
    "no pair": ({"slope": 3}, "must be a pair"),
    "a triple": ({"slope": (0, 1, 2)}, "must be a pair"),
    "words": ({"slope": ("a", 2)}, "is no number"),
    "a boolean": ({"slope": (True, 2)}, "is no number"),
    "an unknown name": ({"slop": (0, 1)}, "matches nothing. Did you mean 'slope'"),
    "two rules": ({"s*": (0, 1), "sl*": (0, 2)}, "equally specific"),
    "a list": ([("slope", 0, 1)], "must be a dictionary"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", BAD)
def test_bad_bounds_are_refused(name):
    bounds, message = BAD[name]
    with pytest.raises((TypeError, ValueError, KeyError), match=f"`bounds`.*{message}"):
        LineFit(line(), bounds=bounds)


def test_a_bound_that_float32_does_not_reach_is_none():
    with jax.enable_x64(False):
        free = LineFit(line(dtype="float32"), bounds={"slope": (-1e300, 1e300)})
        assert free._bounds is None
        with pytest.raises(ValueError, match=r"'slope' are \(inf, inf\)"):
            LineFit(line(dtype="float32"), bounds={"slope": (1e300, None)})
        with pytest.raises(ValueError, match="`std` is inf, but must be finite"):
            vn.Normal(0.0, 1e300)


def test_bounds_of_what_is_not_fitted_are_refused():
    with pytest.raises(ValueError, match="`bounds`: 'b' is a Python float, which is"):
        Linear({"a": jnp.ones(()), "b": 1.0}, bounds={"b": (0, 1)})
    with pytest.raises(ValueError, match=r"tied to slope.*what it follows"):
        LineFit(line(), ties={"offset": "slope"}, bounds={"offset": (-2, 0)})
    with pytest.raises(TypeError, match="`bounds`: '' is complex"):
        Linear(jnp.array([1 + 1j]), bounds={"": (0, 1)})
    # A selector that finds a free one too is meant for that.
    assert LineFit(line(), train="slope", bounds={"**": (-2, 2)}).params.slope == 0.5


@pytest.mark.loose_dtypes  # of L-BFGS
def test_bounds_of_a_frozen_parameter_wait_until_it_is_fitted():
    shared = {"offset": (5, 9), "slope": (-2, 0.4)}
    start = LineFit(line(), train="slope", bounds={"offset": shared["offset"]})
    # It is as if there were none, also for what bounds refuse.
    assert start.replace(optimiser=optax.lbfgs()).step(line_batch())
    assert "within" not in str(start)
    model = eqx.tree_at(lambda m: m.slope, line(), jnp.asarray(0.1))
    one = LineFit(model, train="slope", bounds=shared)
    alone = LineFit(model, train="slope", bounds={"slope": shared["slope"]})
    solver = optx.BFGS(1e-8, 1e-8)
    ends = [x.solve(solver, line_batch()).model.slope for x in (one, alone)]
    assert ends[0] == ends[1] == 0.4
    with pytest.raises(ValueError, match=r"'offset' starts at .* outside"):
        LineFit(model, bounds=shared)
    inside = eqx.tree_at(lambda m: m.offset, model, jnp.asarray(6.0))
    both = LineFit(inside, bounds=shared).solve(solver, line_batch())
    assert both.model.offset == 5


def test_a_preconditioner_that_couples_a_bounded_parameter_is_refused():
    projector = vn.EigenProjector.from_fisher(
        jnp.array([[2.0, 1.0], [1.0, 2.0]]), line()
    )
    optimiser = vn.ParamOptimiser(
        {"**": optax.sgd(0.1)}, first=vn.precondition(projector)
    )
    trainer = LineFit(line(), optimiser, bounds={"slope": (None, 1)})
    with pytest.raises(ValueError, match=r"`bounds` changes 'slope'.*`precondition`"):
        trainer.step(line_batch())


class Matrices(vn.Trainer):
    def residuals(self, model, batch):
        return jnp.concatenate([model["w"].ravel(), model["b"]]) - batch


MATRICES = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}


@pytest.mark.parametrize("make", [optax.contrib.muon, optax.contrib.galore])
def test_what_mixes_the_elements_of_a_bounded_matrix_is_refused(make):
    batch, other = jnp.ones(8), optax.adam(0.1)
    rules = vn.ParamOptimiser({"w": make(0.1), "b": other})
    for optimiser in (make(0.1), rules):
        trainer = Matrices(MATRICES, optimiser, bounds={"w": (None, 0.5)})
        with pytest.raises(ValueError, match="which knows of no `bounds`"):
            trainer.step(batch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trainer = Matrices(MATRICES, rules, bounds={"b": (None, 0.5)})
        assert np.all(trainer.fit(batch, 30, progress=False).model["b"] == 0.5)


@functools.partial(jax.jit, static_argnums=0)
def moved_by_others(transforms):
    """How far elements without a gradient are moved because others have one."""
    random = np.random.default_rng(0)
    params = {"w": np.zeros((4, 3)), "b": np.zeros(3)}
    is_pushed = {"w": random.random((4, 3)) < 0.5, "b": np.array([True, False, True])}
    pushed = {k: np.where(f, 1.5, 0.0) for k, f in is_pushed.items()}
    pushed["w"] *= random.uniform(0.5, 2, (4, 3))

    both = {name: np.stack([x, np.zeros_like(x)]) for name, x in pushed.items()}

    def moved(transform):
        def updated(grads):
            state, value = transform.init(params), jnp.ones(())
            for _ in range(2):
                update, state = transform.update(grads, state, params, value=value)
            return update

        update = jax.vmap(updated)(both)
        apart = [jnp.diff(update[k], axis=0)[0][~f] for k, f in is_pushed.items()]
        return jnp.max(jnp.abs(jnp.concatenate(apart)))

    return [moved(transform) for transform in transforms]


NAMES = "adabelief adadelta adafactor adagrad adam adamax adamw adan amsgrad fromage"
NAMES += " lamb lars lion nadam novograd optimistic_gradient_descent radam"
NAMES += " rmsprop rprop sgd sign_sgd sm3 yogi centralize"
CONTRIB = "acprop ademamix cocob dog dowg momo"
CONTRIB += " muon galore"


def test_which_of_optax_mix_elements():
    extra = optax.with_extra_args_support
    every = {name: getattr(optax, name) for name in NAMES.split()}
    every |= {name: getattr(optax.contrib, name) for name in CONTRIB.split()}
    no_rate = {"centralize", "cocob", "momo"}
    transforms = tuple(
        extra(make() if name in no_rate else make(0.1)) for name, make in every.items()
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        moved = moved_by_others(transforms)
    mixing = {name for name, far in zip(every, moved, strict=True) if far}
    assert mixing == {"muon", "galore", "centralize"}


class InUnits(vn.Trainer):
    def residuals(self, model, batch):
        x, y, unit = batch
        return (model["a"] / unit + model["b"] * x - y) / 0.1


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e21, 2e30])
def test_a_whitened_fit_on_a_bound_in_any_units(unit):
    """The other parameter ends where it is best beside the bound."""
    x = np.linspace(0, 1, 30, dtype=np.float32)
    noise = np.random.default_rng(0).normal(scale=0.1, size=30)
    y = (1 + 2 * x + noise).astype(np.float32)
    model = {"a": jnp.asarray(unit, jnp.float32), "b": jnp.float32(1.0)}
    data = x, y, np.float32(unit)
    trainer = InUnits(model, bounds={"b": (0, 1.9)})
    result = trainer.whiten(data, optimiser=optax.adam(0.05)).fit(data, 2_000)
    assert result.model["b"] == np.float32(1.9)
    np.testing.assert_allclose(
        result.model["a"] / unit, np.mean(y - 1.9 * x), rtol=1e-4
    )


class Released(vn.Trainer):
    """A line of three elements in some unit, of which one is let go of by a bound."""

    unit: jax.Array
    method: str

    def __init__(self, start, unit, method, **options):
        start = {"p": start[:2] * unit, "q": start[2] * unit}
        super().__init__(start, **options)
        self.unit, self.method = jnp.asarray(unit), method

    def squares(self, model, batch):
        matrix, y = batch
        flat = jnp.append(model["p"], model["q"]) / self.unit
        return (matrix @ flat - y) / (1 if self.method == "residuals" else jnp.sqrt(2))


def _released(method):
    def of(self, model, batch):
        left = self.squares(model, batch)
        return left if method == "residuals" else jnp.sum(left**2)

    return type(f"By{method}", (Released,), {method: of})


RULES = {"p": optax.sgd(0.1), "q": optax.sgd(0.1)}
BY = {name: _released(name) for name in ("residuals", "nll", "loss")}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", BY)
def test_a_whitened_fit_leaves_the_bound_that_it_begins_on(method, unit, blocks):
    """The space knows the unit of what is pushed against its bound at the start."""
    rng, released = np.random.default_rng(5), 0
    for _ in range(4):
        matrix, truth = rng.normal(size=(12, 3)), rng.normal(size=3)
        y = matrix @ truth + 0.1 * rng.normal(size=12)
        low = truth + 0.2 - 0.3 * abs(rng.normal(size=3))
        low[0] = -INF
        start = np.where(np.isfinite(low), low, truth + 0.5)
        known = scipy.optimize.lsq_linear(matrix, y, (low, [INF] * 3), tol=1e-14)
        pushed = matrix.T @ (matrix @ start - y) > 0
        released += np.any(pushed[1:] & (known.active_mask[1:] == 0))
        low, batch = low * unit, (jnp.asarray(matrix), jnp.asarray(y))
        bounds = {"p": (low[:2], None), "q": (low[2], None)}
        trainer = BY[method](jnp.asarray(start), unit, method, bounds=bounds)
        trainer = trainer.replace(optimiser=vn.ParamOptimiser(RULES))
        own = {"blocks": RULES} if blocks else {"optimiser": RULES["p"]}
        result = trainer.whiten(batch, **own).fit(batch, 1000, progress=False)
        found = np.append(result.model["p"], result.model["q"]) / unit
        np.testing.assert_allclose(found, known.x, atol=1e-5)
    assert released
