"""`unroll`: the steps are those of a trainer, and derivatives flow through them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import (
    GaussianFit,
    Line,
    LineFit,
    TwoFit,
    close,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    script,
    two,
)

BATCH = gaussian_batch()


def by_step(trainer, batch, steps):
    losses = []
    for _ in range(steps):
        trainer, info = trainer.step(batch)
        losses.append(info.loss)
    return trainer, jnp.stack(losses)


def rules():
    return vn.ParamOptimiser(
        {
            "mean": optax.adam(0.01),
            "std": optax.sgd(1e-4, momentum=0.9),
            "power": optax.sgd(1e-4),
        }
    )


# A line, each of whose parameters has a rule, and data that tell of both together.
RULES = {"slope": optax.adam(0.01), "offset": optax.sgd(1e-4, momentum=0.9)}
SCALES, APART = jnp.asarray([1.2, 0.8]), (BATCH[0] + 1, *BATCH[1:])


def after_scales(scales, steps=10, segment=3):
    """The last loss. By default of three segments and a step more."""
    named = dict(zip(RULES, scales, strict=True))
    optimiser = vn.ParamOptimiser(RULES).with_scale(named)
    trainer = GaussianFit(line(), optimiser)
    return vn.unroll(trainer, APART, steps, segment=segment)[1][-1]


value_and_gradient = jax.jit(jax.value_and_grad(after_scales))


def slope(value, at, step):
    """The derivative of a function by finite differences."""
    return (value(at + step) - value(at - step)) / (2 * step)


def require_slope(fn, at, step, rtol):
    """Requires that the derivative of a function is that of finite differences."""
    both = jax.jit(jax.value_and_grad(fn))
    expected = slope(lambda x: both(x)[0], at, step)
    np.testing.assert_allclose(both(at)[1], expected, rtol=rtol)


# The steps are those of a trainer.


# Segments of every kind: none, whole ones, one that is longer, and some with a rest.
LENGTHS = [(12, 0), pytest.param(12, 3, marks=pytest.mark.as_compiled)]
LENGTHS += [(12, None), (1, None), (2, 3), (7, 3)]


@pytest.mark.parametrize(("steps", "segment"), LENGTHS)
def test_it_takes_the_steps_of_a_trainer(steps, segment):
    trainer = GaussianFit(gaussian(), rules())
    expected, losses = by_step(trainer, BATCH, steps)
    after, found = vn.unroll(trainer, BATCH, steps, segment=segment)
    assert isinstance(after, GaussianFit)
    assert found.shape == (steps,)
    np.testing.assert_allclose(found, losses, rtol=1e-12)
    # The batch of a single step may be any.
    mark = expected._progress.scored_on
    same = eqx.tree_at(lambda t: t._progress.scored_on, after, mark)
    close(same._progress, expected._progress, rtol=1e-12)


@pytest.mark.seams
def test_it_ends_where_a_fit_ends_and_a_fit_goes_on_from_there():
    trainer = GaussianFit(gaussian(), rules())
    result = trainer.fit(BATCH, 30)
    after, losses = vn.unroll(trainer, BATCH, 20)
    np.testing.assert_allclose(losses, result.history.loss[:20], rtol=1e-12)
    after, losses = vn.unroll(after, BATCH, 10)
    np.testing.assert_allclose(losses, result.history.loss[20:], rtol=1e-12)
    close(after._progress, result.trainer._progress, rtol=1e-12)
    assert int(after.step_count) == 30
    last = after.fit(BATCH, 3)
    assert jax.tree.structure(last.trainer) == jax.tree.structure(trainer)


def test_no_steps_change_nothing():
    trainer = GaussianFit(gaussian(), rules())
    after, losses = vn.unroll(trainer, BATCH, 0)
    assert losses.shape == (0,)
    assert losses.dtype == jnp.float64
    assert same(after, trainer)


def test_minibatches_are_those_of_a_fit():
    x, y = line_batch()
    data = vn.Minibatches((x, y + 0.3 * x**2), 3, key=jax.random.key(4))
    trainer = LineFit(line(), optax.adam(0.1)).fit(data, 4).trainer
    result = trainer.fit(data, 13)
    after, losses = vn.unroll(trainer, data, 13)
    np.testing.assert_allclose(losses, result.history.loss, rtol=1e-12)
    close(after.model, result.model, rtol=1e-12)


class Averaged(LineFit):
    """Keeps a running mean of its losses, and is drawn to it; is noisy, too."""

    def loss(self, model, batch, *, key, state):
        x, y = batch
        loss = super().loss(model, (x, y + jax.random.normal(key, y.shape)))
        mean = 0.9 * state["mean"] + 0.1 * loss
        return loss + 0.1 * mean**2, {"mean": mean, "count": state["count"] + 1}


def averaged():
    state = {"mean": jnp.asarray(1.0), "count": jnp.asarray(0)}
    return Averaged(line(), optax.sgd(0.1), state=state, key=jax.random.key(2))


def test_a_state_goes_from_step_to_step_and_each_has_its_key():
    expected, losses = by_step(averaged(), line_batch(), 7)
    after, found = vn.unroll(averaged(), line_batch(), 7)
    np.testing.assert_allclose(found, losses, rtol=1e-12)
    close(after.state, expected.state, rtol=1e-12)
    assert after.state["count"] == 7


def test_a_best_of_a_validation_is_forgotten_as_a_step_does():
    trainer = LineFit(line(), optax.sgd(0.1))
    options = {"validation": (line_batch(), 1)}
    trainer = trainer.fit(line_batch(), 3, **options).trainer
    expected, _ = by_step(trainer, line_batch(), 2)
    after, _ = vn.unroll(trainer, line_batch(), 2)
    close(after.best_loss, expected.best_loss, rtol=1e-12)
    close(after.best, expected.best, rtol=1e-12)


# First derivatives.


def every_kind(rate):
    """Adam, momentum and plain descent are part of these, and each by itself a rule of
    `test_gradients_through_one_rule_for_each_leaf`.
    """
    return optax.chain(
        optax.clip_by_global_norm(9),
        optax.trace(0.9, nesterov=True),
        optax.scale_by_rms(),
        optax.adamw(optax.cosine_decay_schedule(100 * rate, 20)),
    )


def by_hand(tx, start, batch, steps):
    """An unrolled loop, with Optax alone."""
    x, y, sigma = batch

    def loss(model):
        return 0.5 * jnp.sum(((model(x) - y) / sigma) ** 2)

    def step(carry, _):
        model, state = carry
        value, grads = jax.value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), value

    (model, _), losses = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return model, losses


def ends(run):
    """A function of a rate, data and a start, all of which are differentiated."""

    def scalar(rate, y, start):
        model, losses = run(rate, (BATCH[0], y, BATCH[2]), start)
        return jnp.sum(losses) + model.mean * model.power - model.std

    return scalar


@pytest.mark.loose_dtypes
def test_gradients_are_those_of_a_loop_by_hand():
    steps = 11

    def ours(rate, batch, start):
        rules = vn.ParamOptimiser({"**": every_kind(rate)})
        trainer, losses = vn.unroll(GaussianFit(start, rules), batch, steps)
        return trainer.model, losses

    hand = lambda rate, batch, start: by_hand(every_kind(rate), start, batch, steps)
    at = jnp.asarray(3e-4), BATCH[1], gaussian()
    grad = lambda run: jax.grad(ends(run), argnums=(0, 1, 2))
    close(*jax.jit(lambda *at: (grad(ours)(*at), grad(hand)(*at)))(*at), rtol=1e-9)


def test_gradients_through_one_rule_for_each_leaf():
    def hand(scales):
        """One transformation for each leaf, with Optax alone."""
        pairs = zip(RULES.items(), scales, strict=True)
        each = {name: optax.chain(tx, optax.scale(by)) for (name, tx), by in pairs}
        optimiser = optax.partition(each, lambda _: Line(*RULES))
        return by_hand(optimiser, line(), APART, 10)[1][-1]

    expected = jax.jit(jax.grad(hand))(SCALES)
    assert np.all(np.abs(expected) > 1e-3)
    np.testing.assert_allclose(value_and_gradient(SCALES)[1], expected, rtol=1e-9)


def test_a_gradient_through_minibatches():
    x, y = line_batch()

    def offset(shift):
        data = vn.Minibatches((x, y + shift * x**2), 5, key=jax.random.key(1))
        return vn.unroll(LineFit(line(), optax.sgd(0.1)), data, 5)[0].model.offset

    require_slope(offset, 0.1, 1e-5, rtol=1e-6)


def test_a_gradient_through_a_state():
    def unrolled(shift):
        x, y = line_batch()
        after, losses = vn.unroll(averaged(), (x, y + shift), 7)
        return losses[-1] + after.state["mean"]

    found = slope(unrolled, 0.0, 1e-5)
    np.testing.assert_allclose(jax.grad(unrolled)(0.0), found, rtol=1e-7)


def test_a_gradient_of_the_best_is_that_of_the_step_that_found_it():
    def after(rate, steps):
        return vn.unroll(LineFit(line(), optax.sgd(rate)), line_batch(), steps)[0]

    require_slope(lambda rate: after(rate, 5).best_loss, 1.2, 1e-6, rtol=1e-6)
    best = jax.grad(lambda rate: after(rate, 5).best.slope)
    last = jax.grad(lambda rate: after(rate, 4).model.slope)
    np.testing.assert_allclose(*jax.jit(lambda r: (best(r), last(r)))(0.3), rtol=1e-10)


def test_a_gradient_with_respect_to_a_field_of_ones_own():
    class Ridge(LineFit):
        weight: jax.Array

        def __init__(self, *args, weight):
            self.weight = weight
            super().__init__(*args)

        def loss(self, model, batch):
            return super().loss(model, batch) + self.weight * model.slope**2

    @jax.jit
    @jax.value_and_grad
    def slope(weight):
        trainer = Ridge(line(), optax.sgd(0.2), weight=weight)
        return vn.unroll(trainer, line_batch(), 293)[0].model.slope

    # At the minimum: slope = c / (m + weight), with the mean m of x**2.
    m = np.mean(np.square(line_batch()[0]))
    found, derivative = slope(0.1)
    np.testing.assert_allclose(found, 2 * m / (m + 0.1), rtol=1e-9)
    np.testing.assert_allclose(derivative, -2 * m / (m + 0.1) ** 2, rtol=1e-7)


def test_a_gradient_through_hooks():
    class Hooked(LineFit):
        def transform_grads(self, grads, model):
            return jax.tree.map(lambda g: jnp.tanh(g) * (1 + model.slope**2), grads)

        def constrain(self, model):
            return eqx.tree_at(lambda m: m.slope, model, jnp.tanh(model.slope))

    def unrolled(rate):
        trainer = Hooked(line(), optax.sgd(rate))
        return vn.unroll(trainer, line_batch(), 7)[1][-1]

    require_slope(unrolled, 0.1, 1e-6, rtol=1e-7)


def test_a_gradient_in_the_latent_space_of_a_projector():
    whitened = GaussianFit(gaussian()).whiten(BATCH, optimiser=optax.adam(0.1))

    @jax.jit
    @jax.value_and_grad
    def unrolled(given):
        rate, shift = given
        trainer = whitened.replace(optimiser=optax.adam(rate))
        batch = (BATCH[0], BATCH[1] + shift * BATCH[0], BATCH[2])
        after, losses = vn.unroll(trainer, batch, 7)
        return losses[-1] + after.model.mean

    at, value = np.array([0.1, 0.0]), lambda given: unrolled(given)[0]
    expected, losses = by_step(whitened, BATCH, 7)
    np.testing.assert_allclose(value(at), losses[-1] + expected.model.mean, rtol=1e-10)
    for i, unit in enumerate(np.eye(2)):
        found = slope(lambda h, unit=unit: value(at + h * unit), 0.0, 1e-6)
        np.testing.assert_allclose(unrolled(at)[1][i], found, rtol=1e-6)


def test_through_a_line_search_there_is_no_gradient():
    def unrolled(shift):
        search = optax.scale_by_zoom_linesearch(max_linesearch_steps=5)
        descent = optax.chain(optax.sgd(1.0), search)
        trainer = LineFit(line(), vn.ParamOptimiser({"**": descent}))
        x, y = line_batch()
        return vn.unroll(trainer, (x, y + shift), 7)[1][-1]

    assert unrolled(0.0) < 1
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(unrolled)(0.0)


# Derivatives of higher order, and the other transformations.


def test_second_derivatives_are_those_of_first_ones():
    after = functools.partial(after_scales, steps=5, segment=None)
    # Along a direction that each entry of the second derivatives is part of. Reverse
    # over forward is in the next test, and forward over reverse in
    # `test_nothing_flows_into_a_step_that_is_not_taken`.
    at, along = np.array([1.0, 0.7]), np.array([0.6, -1.1])
    both = jax.jit(jax.value_and_grad(lambda x: jnp.vdot(jax.grad(after)(x), along)))
    expected = [
        slope(lambda h, unit=unit: both(at + h * unit)[0], 0.0, 1e-5)
        for unit in np.eye(2)
    ]
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(both(at)[1], expected, rtol=1e-6)


def test_a_third_derivative():
    def after(rate):
        trainer = LineFit(line(), optax.sgd(rate))
        return vn.unroll(trainer, line_batch(), 5)[0].model.offset

    # Each step leaves 1 - 2 * rate of the way from -1 to 1.
    second = lambda rate: jax.jvp(jax.grad(after), (rate,), (1.0,))[1]
    third = jax.jit(jax.grad(second))
    np.testing.assert_allclose(third(0.1), 2 * 60 * 8 * 0.8**2, rtol=1e-10)


@pytest.mark.seams
def test_many_scales_at_once():
    many = np.outer([1.0, 0.5, 1.5], SCALES)
    both = jax.jit(jax.vmap(value_and_gradient))(many)
    for i, scales in enumerate(many):
        value, grad = value_and_gradient(scales)
        np.testing.assert_allclose(both[0][i], value, rtol=1e-10)
        np.testing.assert_allclose(both[1][i], grad, rtol=1e-8)


def test_other_values_compile_nothing_anew():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def last(trainer, batch):
        return vn.unroll(trainer, batch, 5)[1][-1]

    def made(rate, mean):
        model = eqx.tree_at(lambda m: m.mean, gaussian(), jnp.asarray(mean))
        rates = {"mean": optax.adam(rate), ("std", "power"): optax.sgd(rate / 100)}
        return GaussianFit(model, vn.ParamOptimiser(rates))

    losses = [last(made(0.01, 0.3), BATCH), last(made(0.02, 0.2), BATCH)]
    stepped = last(vn.unroll(made(0.03, 0.1), BATCH, 5)[0], BATCH)
    assert len({float(x) for x in (*losses, stepped)}) == 3


def test_called_from_python_it_compiles_once():
    class Counted(LineFit):
        traces = []  # noqa: RUF012

        def loss(self, model, batch):
            self.traces.append(1)
            return super().loss(model, batch)

    for rate in (0.1, 0.2, 0.3):
        vn.unroll(Counted(line(), optax.adam(rate)), line_batch(), 6)
        if rate == 0.1:
            first = len(Counted.traces)
    assert len(Counted.traces) == first


# Memory.


class Network(vn.Trainer):
    """Two layers of the same weights."""

    def loss(self, model, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ model) @ model - y) ** 2)


def test_what_is_computed_again_is_not_kept():
    normal = lambda *shape: np.random.default_rng(0).normal(size=shape).astype("f4")
    x, weights = normal(50, 40), jnp.asarray(normal(40, 40) / 40**0.5)

    def last(rate, segment):
        trainer = Network(weights, optax.sgd(rate))
        return vn.unroll(trainer, (x, np.sin(x)), 400, segment=segment)[1][-1]

    grads, bytes_needed = {}, {}
    for segment in (0, 1, None):
        grad = jax.jit(jax.grad(lambda s, n=segment: last(s, n)))
        compiled = grad.lower(jnp.asarray(0.1, "f4")).compile()
        bytes_needed[segment] = compiled.memory_analysis().temp_size_in_bytes
        grads[segment] = float(compiled(jnp.asarray(0.1, "f4")))
    assert grads[1] == pytest.approx(grads[0], rel=1e-3)
    assert grads[None] == pytest.approx(grads[0], rel=1e-3)
    assert bytes_needed[1] < bytes_needed[0] / 2
    assert bytes_needed[None] < bytes_needed[0] / 15


def test_data_that_outweigh_the_model_are_not_kept_for_each_step():
    x = np.linspace(-4, 4, 20_000)
    batch = x, np.exp(-(x**2)), np.full(x.shape, 0.1)

    def last(rate):
        trainer = GaussianFit(gaussian(), optax.sgd(rate))
        return vn.unroll(trainer, batch, 100)[1][-1]

    compiled = jax.jit(jax.grad(last)).lower(jnp.asarray(1e-7)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 25 * x.nbytes


# Steps that are not taken.


class Rooted(vn.Trainer):
    """Beyond `a = batch[0]` the loss is NaN, and so is every derivative of it."""

    def loss(self, model, batch):
        a, b = model["a"], model["b"]
        return jnp.sqrt(batch[0] - a) + (a - 3) ** 2 + (a * b) ** 2


def rooted(rate, start, policy):
    optimiser = vn.ParamOptimiser(
        {"a": optax.sgd(rate, momentum=0.5), "b": optax.sgd(0.02)}
    )
    model = {"a": start, "b": jnp.asarray(0.5)}
    return Rooted(model, optimiser, nan_policy=policy)


# Some of the batches have their wall where the parameters are already.
WALLS = vn.Minibatches(
    jnp.asarray([0.0, 10.0, 0.5, 10.0, 10.0]), 1, key=jax.random.key(9)
)


def through_walls(policy):
    def scalar(rate, start):
        after, losses = vn.unroll(rooted(rate, start, policy), WALLS, 11)
        model = after.model
        value = jnp.nansum(losses) + model["a"] * model["b"] + after.best_loss
        return value, losses

    return jax.value_and_grad(scalar, (0, 1), has_aux=True)


@pytest.mark.parametrize(
    ("policy", "expected", "mapped"),
    [
        (vn.StopFit(), "++---------", True),
        (vn.SkipStep() | vn.StopAfter(2), "++-+-++----", False),
    ],
)
def test_nothing_flows_into_a_step_that_is_not_taken(policy, expected, mapped):
    def both(*at):
        (value, losses), grad = through_walls(policy)(*at)
        return (value, grad), losses

    @jax.jit
    def run(*points):
        derived = lambda args: jax.jvp(both, *args, has_aux=True)
        return jax.vmap(derived)(points) if mapped else jax.lax.map(derived, points)

    # Along each direction, and on both sides in each.
    units, none = np.eye(2), np.zeros((2, 2))
    points = (0.1, 1.0) + 1e-6 * np.concatenate([none, units, -units])
    along = np.concatenate([units, units, units])
    (values, grads), (forward, hessian), losses = jax.tree.map(
        np.asarray, run(tuple(points.T), tuple(along.T))
    )
    for told in losses:
        taken = "".join("+" if is_finite else "-" for is_finite in np.isfinite(told))
        assert taken == expected
    found = (values[2:4] - values[4:]) / 2e-6
    np.testing.assert_allclose([grad[0] for grad in grads], found, rtol=1e-6)
    np.testing.assert_allclose(forward[:2], found, rtol=1e-6)
    for grad, curved in zip(grads, hessian, strict=True):
        found = (grad[2:4] - grad[4:]) / 2e-6
        np.testing.assert_allclose(curved[:2], found, rtol=1e-5)


@pytest.mark.loose_dtypes
def test_a_step_that_only_the_guard_holds_is_not_differentiated():
    """A gradient of 1e20 turns the second moment of Adam, in float32, to infinity."""
    bad = jax.tree.map(lambda leaf: np.asarray(leaf)[0], script("u"))
    good = jax.tree.map(np.ones_like, bad)

    def unrolled(scale, first):
        model = jax.tree.map(lambda leaf: leaf * scale, two())
        optimiser = vn.ParamOptimiser({"**": optax.adam(0.1)})
        trainer = TwoFit(model, optimiser, nan_policy=vn.SkipStep())
        held, _ = vn.unroll(trainer, bad, first)
        after, more = vn.unroll(held, good, 2)
        return jnp.sum(more) + jnp.sum(after.model["a"]), held

    of = eqx.filter_jit(eqx.filter_grad(unrolled, has_aux=True))
    (grad, held), (without, _) = (of(jnp.float32(1.0), first) for first in (2, 0))
    assert held.nan_report()["update"].total == 2
    assert same(held.model, two())
    np.testing.assert_allclose(grad, without, rtol=1e-5)


def test_a_stopped_trainer_goes_no_further():
    trainer = LineFit(line(), optax.adam(0.1))
    x, y = line_batch()
    stopped, _ = trainer.step((x, y * jnp.nan))

    def unrolled(shift):
        return vn.unroll(stopped, (x, y + shift), 3)

    after, losses = unrolled(0.0)
    assert same(after, stopped)
    assert np.isnan(losses).all()

    def both(shift):
        after, losses = unrolled(shift)
        return jnp.nansum(losses) + 0.7 * after.model.slope

    derivatives = lambda at: (jax.grad(both)(at), jax.jvp(both, (at,), (1.0,))[1])
    np.testing.assert_array_equal(jax.jit(derivatives)(0.0), 0)


def test_a_policy_that_raises():
    trainer = LineFit(line(), optax.sgd(0.1), nan_policy=vn.RaiseOnNan())
    x, y = line_batch()
    assert np.isfinite(vn.unroll(trainer, (x, y), 3)[1]).all()
    with pytest.raises(vn.NonFiniteError) as caught:
        vn.unroll(trainer, (x, y * jnp.nan), 3)
    assert caught.value.step == 0
    last = jax.jit(lambda factor: vn.unroll(trainer, (x, y * factor), 3)[0].model.slope)
    found = slope(last, 1.0, 1e-6)
    np.testing.assert_allclose(jax.grad(last)(1.0), found, rtol=1e-6)
    with pytest.raises(Exception, match="RaiseOnNan"):
        jax.block_until_ready(last(jnp.nan))


# What cannot be.


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((line(), None, 3), {}, TypeError, r"must be a `vernal\.Trainer`"),
        ((LineFit(line()), line_batch(), 3), {}, ValueError, "has no optimiser"),
        ((None, line_batch(), -1), {}, ValueError, "`steps` is -1"),
        ((None, line_batch(), 2.0), {}, TypeError, "`steps` is 2.0"),
        ((None, line_batch(), True), {}, TypeError, "`steps` is True"),
        ((None, line_batch(), 3), {"segment": -1}, ValueError, "`segment` is -1"),
        ((None, line_batch(), 3), {"segment": True}, TypeError, "`segment`"),
        ((None, vn.Stream([]), 3), {}, TypeError, r"`Stream`.*vn\.Minibatches"),
        ((None, iter([]), 3), {}, TypeError, r"`trainer\.step`.*in a loop"),
    ],
)
def test_what_it_refuses(arguments, options, error, match):
    trainer, batch, steps = arguments
    if trainer is None:
        trainer = LineFit(line(), optax.sgd(0.1))
    with pytest.raises(error, match=match.replace(".*", r"[\s\S]*")):
        vn.unroll(trainer, batch, steps, **options)


@pytest.mark.own_words
def test_a_number_of_steps_is_no_tracer():
    trainer = LineFit(line(), optax.sgd(0.1))
    run = jax.jit(lambda steps: vn.unroll(trainer, line_batch(), steps)[1])
    with pytest.raises(TypeError, match="`steps`"):
        run(3)
