"""`ParamOptimiser`: an Optax optimiser for each parameter, by path."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
import optax
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn
from models import (
    GaussianFit,
    Line,
    LineFit,
    Pull,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    zoo,
)


def gradients(params, seed=0):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: 3 * rng.standard_normal(leaf.shape).astype(leaf.dtype)
    return structure.unflatten(map(draw, leaves))


def walk(optimiser, params, steps=3):
    """Several updates by hand: params, state."""
    state = optimiser.init(params)

    # The addition apart: compiled with the rest it may be fused, to other last bits.
    update = jax.jit(optimiser.update)
    for seed in range(steps):
        updates, state = update(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def tree():
    return {
        "a": jnp.arange(3.0),
        "b": {"c": jnp.ones((2, 2)), "d": jnp.asarray(0.5)},
        "e": jnp.full(2, -1.0, jnp.float32),
    }


def strong(tree):
    """The same without weak types: the second step is the program of the first."""
    return jax.tree.map(np.asarray, tree)


# A line search that compiles in a second, not in ten.
LBFGS = optax.lbfgs(memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(5))
CLIP = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))


@pytest.mark.as_compiled
def test_a_group_is_one_transformation_of_its_members_together():
    ours, _ = walk(
        vn.ParamOptimiser({("a", "b.d"): CLIP, "b.c": optax.sgd(0.1)}), tree()
    )
    pair, _ = walk_of(lambda t: {"a": t["a"], "d": t["b"]["d"]}, CLIP)
    alone, _ = walk_of(lambda t: {"c": t["b"]["c"]}, optax.sgd(0.1))
    assert same(ours["a"], pair["a"])
    assert same(ours["b"]["d"], pair["d"])
    assert same(ours["b"]["c"], alone["c"])
    assert same(ours["e"], tree()["e"])


def walk_of(part, optimiser, steps=3):
    """The walk of a part of the tree alone, with the gradients it has in the whole."""
    params = part(tree())
    state = optimiser.init(params)
    step = jax.jit(optimiser.update)
    for seed in range(steps):
        updates, state = step(part(gradients(tree(), seed)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.as_compiled
def test_members_apart_are_clipped_apart():
    sgd = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    one, _ = walk(vn.ParamOptimiser({("a", "b.d"): sgd}), tree(), 1)
    two, _ = walk(vn.ParamOptimiser({"a": sgd, "b.d": sgd}), tree(), 1)
    norm = lambda t: optax.tree.norm(
        jax.tree.map(
            jnp.subtract, (t["a"], t["b"]["d"]), (tree()["a"], tree()["b"]["d"])
        )
    )
    np.testing.assert_allclose(norm(one), 0.1)
    np.testing.assert_allclose(norm(two), 0.1 * 2**0.5)


@pytest.mark.seams
@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: optax.adam(1e-2), "default"),
        pytest.param(
            lambda: optax.adamw(1e-2, weight_decay=0.1),
            "all",
            marks=pytest.mark.as_compiled,
        ),
        (
            lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 3), momentum=0.9),
            "default",
        ),
        pytest.param(lambda: optax.lamb(1e-2), "glob", marks=pytest.mark.as_compiled),
        (
            lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(1e-2)),
            "glob",
        ),
        (lambda: optax.adafactor(1e-2), "all"),
    ],
)
def test_one_rule_for_all_is_the_optimiser_itself(make, form):
    optimiser = {
        "default": lambda tx: vn.ParamOptimiser({}, default=tx),
        "all": lambda tx: vn.ParamOptimiser({("a", "b", "e"): tx}),
        "glob": lambda tx: vn.ParamOptimiser({"**": tx}),
    }[form](make())
    assert same(walk(optimiser, tree())[0], walk(make(), tree())[0])


def test_frozen_default_and_first():
    rules = {"a": None, "b": optax.sgd(0.1), "b.d": None}
    ours, _ = walk(vn.ParamOptimiser(rules, default=optax.sgd(1.0)), tree(), 1)
    grads = gradients(tree())
    assert same(ours["a"], tree()["a"])
    assert same(ours["b"]["d"], tree()["b"]["d"])
    np.testing.assert_array_equal(ours["b"]["c"], 1 - 0.1 * grads["b"]["c"])
    np.testing.assert_array_equal(ours["e"], tree()["e"] - grads["e"])


@pytest.mark.seams
@pytest.mark.as_compiled
def test_first_sees_all_that_is_trained_and_nothing_else():
    first = optax.clip_by_global_norm(1.0)
    optimiser = vn.ParamOptimiser(
        {"a": optax.sgd(1.0), "b.c": optax.sgd(10.0)}, first=first
    )
    ours, _ = walk(optimiser, tree(), 1)
    grads = gradients(tree())
    norm = optax.tree.norm((grads["a"], grads["b"]["c"]))
    np.testing.assert_allclose(ours["a"], tree()["a"] - grads["a"] / norm, rtol=1e-14)
    np.testing.assert_allclose(ours["b"]["c"], 1 - 10 * grads["b"]["c"] / norm)


def test_strict_wants_a_rule_for_each():
    rules = {"a": optax.sgd(0.1), "b.c": None}
    with pytest.raises(ValueError, match=r"'b\.d' has no rule, and `strict=True`"):
        vn.ParamOptimiser(rules, strict=True).init(tree())
    vn.ParamOptimiser({**rules, "b.d": None, "e": None}, strict=True).init(tree())


@pytest.mark.loose_dtypes
def test_a_line_search_is_closed_over_what_the_rule_does_not_move():
    """L-BFGS on two of three parameters, against L-BFGS on just these two."""
    batch = gaussian_batch()
    start = gaussian()

    def loss(model):
        x, y, sigma = batch
        return 0.5 * jnp.sum(((model(x) - y) / sigma) ** 2)

    rules = {("mean", "std"): LBFGS, "power": None}
    result = GaussianFit(start, vn.ParamOptimiser(rules)).fit(batch, 8)

    def partial(pair):
        return loss(eqx.tree_at(lambda m: (m.mean, m.std), start, tuple(pair.values())))

    solver = LBFGS
    params = {"mean": start.mean, "std": start.std}
    state = solver.init(params)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(partial)(params)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=partial
        )
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(8):
        params, state, value = step(*strong((params, state)))
        values.append(value)
    np.testing.assert_allclose(result.history.loss, values, rtol=1e-9)
    np.testing.assert_allclose(result.model.mean, params["mean"], rtol=1e-9)
    np.testing.assert_allclose(result.model.std, params["std"], rtol=1e-9)
    assert values[-1] < 0.95 * values[0]
    assert same(result.model.power, start.power)


def walked(trainer, steps):
    """Goes step by step, which compiles less than a fit. Tells the end losses."""
    losses = []
    for _ in range(steps):
        trainer, info = trainer.step(line_batch())
        losses.append(float(info.loss))
    return trainer, losses[0], losses[-1]


@pytest.mark.seams
@pytest.mark.loose_dtypes
def test_a_line_search_beside_other_rules_in_a_chain():
    rules = {"slope": LBFGS, "offset": optax.sgd(0.1)}
    optimiser = optax.chain(vn.ParamOptimiser(rules), optax.identity())
    _, first, last = walked(LineFit(line(), optimiser), 40)
    assert last < 1e-3 < first


@pytest.mark.seams
def test_value_reaches_a_transformation_that_asks_for_it():
    both = {"slope": optax.polyak_sgd(), "offset": optax.sgd(0.1)}
    for optimiser in (
        optax.polyak_sgd(),
        optax.chain(vn.ParamOptimiser({"**": optax.polyak_sgd()}), optax.identity()),
        vn.ParamOptimiser({}, default=optax.polyak_sgd()),
        vn.ParamOptimiser(both),
    ):
        *_, last = walked(LineFit(line(), optimiser), 60)
        assert last < 1e-6


@pytest.mark.loose_dtypes
def test_arguments_of_the_value_function_are_passed_on():
    """A line search gives `value_fn` what was given of its arguments."""

    def value(params, scale):
        return scale * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    def run(solver):
        @jax.jit
        def step(params, state):
            fn, grad = jax.value_and_grad(value)(params, 2.0)
            updates, state = solver.update(
                grad, state, params, value=fn, grad=grad, value_fn=value, scale=2.0
            )
            return optax.apply_updates(params, updates), state

        params = {"a": jnp.arange(3.0), "b": jnp.asarray(2.0)}
        state = solver.init(params)
        for _ in range(3):
            params, state = step(*strong((params, state)))
        return params

    ours = run(vn.ParamOptimiser({("a", "b"): LBFGS}))
    theirs = run(LBFGS)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, theirs
    )


@pytest.mark.seams
@pytest.mark.parametrize("form", ["whole", "filtered", "dict", "zoo"])
def test_models_of_every_form(form):
    model = {
        "whole": line(),
        "filtered": vn.split(line(), "slope")[0],
        "dict": {"slope": jnp.asarray(0.5), "offset": None},
        "zoo": zoo(),
    }[form]
    name = "scalar" if form == "zoo" else "slope"
    optimiser = vn.ParamOptimiser({name: optax.adam(0.1)})
    state = optimiser.init(model)
    grads = jax.tree.map(lambda x: x, model)
    updates, state = eqx.filter_jit(optimiser.update)(grads, state, model)
    assert jax.tree.structure(updates) == jax.tree.structure(model)
    flat = dict(
        zip(
            vn.paths(model),
            jax.tree.leaves(eqx.filter(updates, eqx.is_inexact_array_like)),
            strict=True,
        )
    )
    np.testing.assert_allclose(flat.pop(name), -0.1, rtol=1e-6)
    frozen = {path: leaf for path, leaf in flat.items() if path != "number"}
    assert all(not np.any(leaf) for leaf in frozen.values())


def test_an_optimiser_of_the_whole_serves_a_part():
    """A rule whose leaves were all filtered out is no mistake; a typo still is."""
    optimiser = vn.ParamOptimiser({"slope": optax.sgd(0.1), "offset": optax.sgd(1.0)})
    part = vn.split(line(), "slope")[0]
    updates, _ = optimiser.update(part, optimiser.init(part), part)
    assert updates.offset is None
    with pytest.raises(vn.UnknownPathError, match="offset"):
        optimiser.init({"slope": jnp.ones(1)})


def test_a_predicate_that_freezes_finds_nothing_in_what_it_froze():
    weights = lambda path, leaf: leaf.ndim == 2
    rules = {"scalar": optax.sgd(0.1), weights: None}
    trainer = Pull(zoo(), vn.ParamOptimiser(rules))
    assert vn.paths(trainer.params) == ("scalar",)
    assert trainer.step(0.0)[1].accepted


def test_split():
    optimiser = vn.ParamOptimiser({"scalar": optax.sgd(0.1), "number": optax.sgd(0.1)})
    trainable, frozen = optimiser.split(zoo())
    assert vn.paths(trainable) == ("scalar", "number")
    assert eqx.tree_equal(eqx.combine(trainable, frozen), zoo())


# To other libraries it is an Optax optimiser.


def rules():
    return vn.ParamOptimiser({"slope": optax.adam(0.1), "offset": optax.sgd(0.1)})


@pytest.mark.seams
def test_to_optax_it_is_one_of_its_own():
    optimiser = rules()
    assert isinstance(optimiser, optax.GradientTransformationExtraArgs)
    init, update = optimiser
    assert (init, update) == (optimiser.init, optimiser.update)
    assert jax.tree.leaves(optimiser)
    chained, _ = walk(optax.chain(optimiser, optax.scale(0.5)), line())
    halved, _ = walk(optimiser.with_scale({"slope": 0.5, "offset": 0.5}), line())
    assert same(chained, halved)


@pytest.mark.seams
def test_in_optimistix():
    x, y = line_batch()
    fn = lambda model, args: jnp.mean((model(x) - y) ** 2)
    solver = optx.OptaxMinimiser(rules(), rtol=1e-8, atol=1e-8)
    found = optx.minimise(fn, solver, line(), max_steps=2000).value
    np.testing.assert_allclose([found.slope, found.offset], [2, 1], atol=1e-4)


def test_in_numpyro():
    optim = numpyro.optim.optax_to_numpyro(rules())
    state = optim.init({"slope": jnp.asarray(0.5), "offset": jnp.asarray(-1.0)})
    grads = {"slope": jnp.asarray(1.0), "offset": jnp.asarray(2.0)}
    for _ in range(3):
        state = optim.update(grads, state, value=1.0)
    found = optim.get_params(state)
    np.testing.assert_allclose(found["offset"], -1 - 3 * 0.2)
    np.testing.assert_allclose(found["slope"], 0.5 - 0.3, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_in_the_fit_loop_of_flowjax():
    from flowjax.train import fit_to_data

    class Location(eqx.Module):
        mean: jax.Array
        std: jax.Array

    def loss(params, static, x, condition=None, key=None):
        model = eqx.combine(params, static)
        return jnp.mean((x - model.mean) ** 2 + 0 * model.std)

    fitted, _ = fit_to_data(
        jax.random.key(0),
        Location(jnp.asarray(0.0), jnp.asarray(1.0)),
        jnp.full((40, 1), 3.0),
        loss_fn=loss,
        optimizer=vn.ParamOptimiser({"mean": optax.sgd(0.25)}),
        max_epochs=8,
        max_patience=8,
        batch_size=20,
        show_progress=False,
        return_best=False,
    )
    np.testing.assert_allclose(fitted.mean, 3, atol=0.2)
    assert fitted.std == 1


# Factors and rates are leaves.


def test_a_scale_multiplies_the_updates_of_its_rule():
    batch = line_batch()
    optimiser = vn.ParamOptimiser(
        {("slope",): optax.sgd(0.1), "offset": optax.sgd(0.1)}
    )

    def moved(optimiser):
        new = LineFit(line(), optimiser).step(batch)[0].model
        return new.slope - 0.5, new.offset + 1

    plain = moved(optimiser)
    scaled = moved(optimiser.with_scale({"slope": 0.25}))
    np.testing.assert_allclose(scaled[0], plain[0] / 4, rtol=1e-14)
    assert scaled[1] == plain[1]
    again = moved(optimiser.with_scale({"slope": 0.25}).with_scale({"offset": 0}))
    np.testing.assert_allclose(again, (plain[0] / 4, 0), rtol=1e-14)


@pytest.mark.parametrize("name", ["a", "b.d", ("a", "b.d")])
def test_a_tuple_rule_is_named_by_any_member(name):
    optimiser = vn.ParamOptimiser({("a", "b.d"): optax.sgd(1.0)})
    ours, _ = walk(optimiser.with_scale({name: 0.0}), tree())
    assert same(ours, tree())


@pytest.mark.seams
def test_a_scale_can_be_mapped_and_differentiated():
    batch = line_batch()
    trainer = LineFit(line(), vn.ParamOptimiser({"slope": optax.sgd(0.1)}))

    @jax.jit
    def after(scale):
        optimiser = trainer.optimiser.with_scale({"slope": scale})
        new = eqx.tree_at(lambda t: t.optimiser.scales, trainer, optimiser.scales)
        new, _ = new.step(batch)
        return new.loss(new.model, batch)

    scales = jnp.asarray([0.0, 1.0, 2.0])
    losses = np.asarray(jax.vmap(after)(scales))
    assert losses[0] > losses[1] > losses[2]
    slope = jax.grad(after)(1.0)
    h = 1e-5
    np.testing.assert_allclose(
        slope, (after(1 + h) - after(1 - h)) / (2 * h), rtol=1e-6
    )


@pytest.mark.seams
def test_a_low_precision_update_stays_so():
    optimiser = vn.ParamOptimiser({"w": optax.sgd(0.1)}).with_scale({"w": 2.0})
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


@pytest.mark.seams
def test_other_rates_and_scales_trace_nothing():
    traces = []

    @jax.jit
    def step(optimiser, params, state):
        traces.append(1)
        return optimiser.update(params, state, params)

    for rate in (0.1, 0.2):
        optimiser = vn.ParamOptimiser(
            {
                "slope": optax.adam(rate),
                "off*": optax.sgd(optax.linear_schedule(rate, 0.0, 10)),
            },
            first=optax.clip_by_global_norm(1.0),
        )
        for scale in (1.0, 0.5):
            scaled = optimiser.with_scale({"slope": scale})
            step(scaled, line(), scaled.init(line()))
    assert len(traces) == 1
    other = vn.ParamOptimiser(
        {"slope": optax.adam(0.1, b1=0.5), "off*": optax.sgd(0.1)}
    )
    step(other, line(), other.init(line()))
    assert len(traces) == 2


@pytest.mark.seams
def test_a_window_in_a_rule():
    rules = {
        "slope": vn.window(optax.sgd(0.1), start=2, stop=4),
        "offset": optax.sgd(0.1),
    }
    result = LineFit(line(), vn.ParamOptimiser(rules)).fit(
        line_batch(), 6, record=("slope", "offset")
    )
    moved = np.diff(result.history["slope"]) != 0
    np.testing.assert_array_equal(moved, [False, False, True, True, False])
    assert np.all(np.diff(result.history["offset"]) != 0)


def test_natural_gradient_comes_first():
    batch = gaussian_batch()
    trainer = GaussianFit(gaussian(), optax.sgd(1.0))
    fisher = vn.gauss_newton(lambda m: trainer.residuals(m, batch), trainer.params)
    projector = vn.EigenProjector.from_fisher(fisher, trainer.params)
    optimiser = vn.ParamOptimiser(
        {"mean": optax.sgd(1.0), ("std", "power"): optax.sgd(1.0)},
        first=vn.precondition(projector),
    )
    new, _ = GaussianFit(gaussian(), optimiser).step(batch)
    flat, unravel = ravel_pytree(gaussian())
    nll = lambda v: 0.5 * jnp.sum(trainer.residuals(unravel(v), batch) ** 2)
    newton = flat - np.linalg.solve(fisher, jax.jit(jax.grad(nll))(flat))
    found, _ = ravel_pytree(new.model)
    np.testing.assert_allclose(found, newton, rtol=1e-9)


def test_summary():
    optimiser = vn.ParamOptimiser(
        {
            ("mean", "std"): optax.adam(1e-2),
            "pow*": None,
            lambda path, leaf: leaf.ndim == 2: optax.sgd(0.1),
        },
    )
    model = {
        **{n: jnp.asarray(1.0) for n in ("mean", "std", "power")},
        "w": jnp.ones((2, 3)),
    }
    table = optimiser.summary(model).splitlines()
    rows = {row.split()[0]: row for row in table[2:]}
    assert table[0].split() == ["parameter", "shape", "dtype", "rule", "transformation"]
    assert set(rows) == {"mean", "std", "power", "w"}
    assert "('mean', 'std')" in rows["mean"]
    assert "adam" in rows["mean"]
    assert "frozen" in rows["power"]
    assert "2×3" in rows["w"]
    assert "<lambda>" in rows["w"]
    assert "scale" in rows["w"]
    assert "float64" in rows["std"]


def test_summary_of_a_partial_predicate():
    rule = functools.partial(lambda rank, path, leaf: leaf.ndim == rank, 0)
    optimiser = vn.ParamOptimiser({rule: optax.sgd(0.1)})
    assert "slope" in optimiser.summary(line())


@pytest.mark.seams
def test_printing():
    assert repr(rules()).startswith("ParamOptimiser(")
    assert "<function" not in repr(rules())


@pytest.mark.seams
def test_the_state_keeps_its_kind():
    """One thousand rules or one: dtypes, weak types and structure never change."""
    params = {
        "f": jnp.ones(2, jnp.float32),
        "b": jnp.ones(2, jnp.bfloat16),
        "d": jnp.ones(2),
    }
    optimiser = vn.ParamOptimiser({k: optax.adam(0.1) for k in params})
    state = optimiser.init(params)
    _, new = jax.jit(optimiser.update)(params, state, params)
    kind = lambda t: [(x.shape, x.dtype) for x in jax.tree.leaves(t)]
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert kind(state) == kind(new)


def test_two_modules_of_one_class_are_told_apart():
    model = {"first": line(), "second": Line(jnp.asarray(1.0), jnp.asarray(1.0))}
    new, _ = walk(vn.ParamOptimiser({"second": optax.sgd(0.1)}), model, 1)
    assert same(new["first"], model["first"])
    assert not same(new["second"], model["second"])
