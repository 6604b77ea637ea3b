"""`unroll`: the steps are those of a trainer, and derivatives flow through them."""

import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import (
    Gaussian,
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


def scaled(trainer, scales):
    named = dict(zip(("mean", "std", "power"), scales, strict=True))
    return trainer.replace(optimiser=trainer.optimiser.with_scale(named))


SCALES = jnp.asarray([1.2, 0.8, 1.1])


def after_scales(scales, steps=10, **options):
    """The last loss of a fit with one rule for each leaf."""
    trainer = scaled(GaussianFit(gaussian(), rules()), scales)
    return vn.unroll(trainer, BATCH, steps, **options)[1][-1]


@functools.cache
def gradient():
    return jax.grad(after_scales)(SCALES)


# The steps are those of a trainer.


# Segments of every kind for one number of steps; for others, as they are and such
# as leave a rest.
LENGTHS = [(12, segment) for segment in (None, 0, 1, 3, 100)]
LENGTHS += [(steps, segment) for steps in (1, 2, 7) for segment in (None, 3)]


@pytest.mark.as_compiled
@pytest.mark.parametrize(("steps", "segment"), LENGTHS)
def test_it_takes_the_steps_of_a_trainer(steps, segment):
    trainer = GaussianFit(gaussian(), rules())
    expected, losses = by_step(trainer, BATCH, steps)
    after, found = vn.unroll(trainer, BATCH, steps, segment=segment)
    assert isinstance(after, GaussianFit)
    assert found.shape == (steps,)
    np.testing.assert_allclose(found, losses, rtol=1e-12)
    close(after._progress, expected._progress, rtol=1e-12)


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


def test_each_step_has_its_key():
    class Noisy(GaussianFit):
        def residuals(self, model, batch, key):
            noise = jax.random.normal(key, batch[0].shape)
            return super().residuals(model, batch) + noise

    trainer = Noisy(gaussian(), rules(), key=jax.random.key(2))
    expected, losses = by_step(trainer, BATCH, 5)
    after, found = vn.unroll(trainer, BATCH, 5)
    np.testing.assert_allclose(found, losses, rtol=1e-12)
    close(after.model, expected.model, rtol=1e-12)


class Averaged(LineFit):
    """Keeps a running mean of its losses, and is drawn to it."""

    def loss(self, model, batch, *, state):
        loss = super().loss(model, batch)
        mean = 0.9 * state["mean"] + 0.1 * loss
        return loss + 0.1 * mean**2, {"mean": mean, "count": state["count"] + 1}


def averaged():
    state = {"mean": jnp.asarray(1.0), "count": jnp.asarray(0)}
    return Averaged(line(), optax.sgd(0.1), state=state)


def test_a_state_goes_from_step_to_step():
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
    close(
        vn.unroll(trainer, line_batch(), 2)[0]._progress,
        expected._progress,
        rtol=1e-12,
    )


# First derivatives.


# Adam, momentum and plain descent are part of these, and each by itself a rule of
# `test_gradients_through_one_rule_for_each_leaf`.
OPTIMISERS = {
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adamw": lambda rate: optax.adamw(100 * rate),
    "rmsprop": lambda rate: optax.rmsprop(30 * rate),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(9), optax.sgd(rate)),
    "schedule": lambda rate: optax.adam(optax.cosine_decay_schedule(100 * rate, 20)),
}


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
@pytest.mark.parametrize("name", OPTIMISERS)
def test_gradients_are_those_of_a_loop_by_hand(name):
    make = OPTIMISERS[name]
    steps = 12

    def ours(rate, batch, start):
        trainer, losses = vn.unroll(GaussianFit(start, make(rate)), batch, steps)
        return trainer.model, losses

    hand = lambda rate, batch, start: by_hand(make(rate), start, batch, steps)
    at = jnp.asarray(3e-4), BATCH[1], gaussian()
    grad = lambda run: jax.jit(jax.grad(ends(run), argnums=(0, 1, 2)))
    close(grad(ours)(*at), grad(hand)(*at), rtol=1e-9)


def partitioned(txs, scales, kind=Gaussian):
    """One transformation for each leaf of a model, with Optax alone."""
    names = [field.name for field in dataclasses.fields(kind)]
    chains = [
        optax.chain(tx, optax.scale(scale))
        for tx, scale in zip(txs, scales, strict=True)
    ]
    return optax.partition(
        dict(zip(names, chains, strict=True)), lambda _: kind(*names)
    )


@pytest.mark.seams
def test_gradients_through_one_rule_for_each_leaf():
    txs = optax.adam(0.01), optax.sgd(1e-4, momentum=0.9), optax.sgd(1e-4)

    def hand(scales):
        return by_hand(partitioned(txs, scales), gaussian(), BATCH, 10)[1][-1]

    expected = jax.grad(hand)(SCALES)
    assert np.all(np.abs(expected) > 1e-3)
    np.testing.assert_allclose(jax.grad(after_scales)(SCALES), expected, rtol=1e-9)


def test_gradients_are_those_of_finite_differences():
    for i in range(3):
        h = jnp.zeros(3).at[i].set(1e-5)
        slope = (after_scales(SCALES + h) - after_scales(SCALES - h)) / 2e-5
        np.testing.assert_allclose(gradient()[i], slope, rtol=1e-6)


def test_a_rate_within_a_rule_may_be_what_is_differentiated():
    def direct(rate):
        rates = {"mean": optax.adam(rate), ("std", "power"): optax.sgd(1e-4)}
        trainer = GaussianFit(gaussian(), vn.ParamOptimiser(rates))
        return vn.unroll(trainer, BATCH, 8)[1][-1]

    def scale(factor):
        rates = {"mean": optax.adam(0.02), ("std", "power"): optax.sgd(1e-4)}
        optimiser = vn.ParamOptimiser(rates).with_scale({"mean": factor})
        return vn.unroll(GaussianFit(gaussian(), optimiser), BATCH, 8)[1][-1]

    expected = jax.grad(scale)(1.0) / 0.02
    np.testing.assert_allclose(jax.grad(direct)(0.02), expected, rtol=1e-9)


@pytest.mark.parametrize("segment", [0, 1, 3, 5, 10])
def test_gradients_do_not_depend_on_what_is_kept(segment):
    found = jax.grad(after_scales)(SCALES, segment=segment)
    np.testing.assert_allclose(found, gradient(), rtol=1e-12)


def test_forward_and_in_reverse_derivatives_are_the_same():
    tangent = jnp.asarray([0.3, -1.0, 0.5])
    _, slope = jax.jvp(after_scales, (SCALES,), (tangent,))
    np.testing.assert_allclose(slope, gradient() @ tangent, rtol=1e-10)


def test_a_gradient_through_minibatches_is_one_through_steps():
    x, y = line_batch()

    def moved(run):
        def offset(shift):
            data = vn.Minibatches((x, y + shift * x**2), 5, key=jax.random.key(1))
            return run(LineFit(line(), optax.adam(0.1)), data)

        return offset

    def unrolled(trainer, data):
        return vn.unroll(trainer, data, 5)[0].model.offset

    def stepped(trainer, data):
        cursor = data.start(jnp.asarray(0))
        for i in range(5):
            batch, cursor = data.next(cursor, jnp.asarray(i))
            trainer, _ = trainer.step(batch)
        return trainer.model.offset

    expected = jax.grad(moved(stepped))(0.1)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(jax.grad(moved(unrolled))(0.1), expected, rtol=1e-10)


def test_a_gradient_through_a_state():
    def unrolled(shift):
        x, y = line_batch()
        after, losses = vn.unroll(averaged(), (x, y + shift), 6)
        return losses[-1] + after.state["mean"]

    slope = (unrolled(1e-5) - unrolled(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(unrolled)(0.0), slope, rtol=1e-7)


def test_a_gradient_of_the_best_is_that_of_the_step_that_found_it():
    def best(rate):
        return vn.unroll(LineFit(line(), optax.sgd(rate)), line_batch(), 5)[0]

    loss = lambda rate: best(rate).best_loss
    slope = (loss(1.2 + 1e-6) - loss(1.2 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(loss)(1.2), slope, rtol=1e-6)
    model = jax.jacrev(lambda rate: best(rate).best.slope)(0.3)
    last = lambda rate: vn.unroll(LineFit(line(), optax.sgd(rate)), line_batch(), 4)
    np.testing.assert_allclose(
        model, jax.grad(lambda rate: last(rate)[0].model.slope)(0.3), rtol=1e-10
    )


def test_a_gradient_with_respect_to_a_field_of_ones_own():
    class Ridge(LineFit):
        weight: jax.Array

        def __init__(self, *args, weight):
            self.weight = weight
            super().__init__(*args)

        def loss(self, model, batch):
            return super().loss(model, batch) + self.weight * model.slope**2

    def slope(weight):
        trainer = Ridge(line(), optax.sgd(0.2), weight=weight)
        return vn.unroll(trainer, line_batch(), 300)[0].model.slope

    # At the minimum: slope = c / (m + weight), with the mean m of x**2.
    m = jnp.mean(line_batch()[0] ** 2)
    np.testing.assert_allclose(slope(0.1), 2 * m / (m + 0.1), rtol=1e-9)
    expected = -2 * m / (m + 0.1) ** 2
    np.testing.assert_allclose(jax.grad(slope)(0.1), expected, rtol=1e-7)


def test_a_gradient_through_hooks():
    class Hooked(LineFit):
        def transform_grads(self, grads, model):
            return jax.tree.map(lambda g: jnp.tanh(g) * (1 + model.slope**2), grads)

        def constrain(self, model):
            return eqx.tree_at(lambda m: m.slope, model, jnp.tanh(model.slope))

    def unrolled(rate):
        trainer = Hooked(line(), optax.sgd(rate))
        return vn.unroll(trainer, line_batch(), 6)[1][-1]

    slope = (unrolled(0.1 + 1e-6) - unrolled(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(unrolled)(0.1), slope, rtol=1e-7)


def test_a_gradient_in_the_latent_space_of_a_projector():
    whitened = GaussianFit(gaussian()).whiten(BATCH, optimiser=optax.adam(0.1))

    def unrolled(rate, shift):
        trainer = whitened.replace(optimiser=optax.adam(rate))
        batch = (BATCH[0], BATCH[1] + shift * BATCH[0], BATCH[2])
        after, losses = vn.unroll(trainer, batch, 9)
        return losses[-1] + after.model.mean

    expected, losses = by_step(whitened, BATCH, 9)
    np.testing.assert_allclose(
        unrolled(0.1, 0.0), losses[-1] + expected.model.mean, rtol=1e-10
    )
    for i, grad in enumerate(jax.grad(unrolled, argnums=(0, 1))(0.1, 0.0)):
        h = np.eye(2)[i] * 1e-6
        slope = (unrolled(0.1 + h[0], h[1]) - unrolled(0.1 - h[0], -h[1])) / 2e-6
        np.testing.assert_allclose(grad, slope, rtol=1e-6)


def test_through_a_line_search_there_is_no_gradient():
    def unrolled(shift):
        search = optax.scale_by_zoom_linesearch(max_linesearch_steps=5)
        descent = optax.chain(optax.sgd(1.0), search)
        trainer = LineFit(line(), vn.ParamOptimiser({"**": descent}))
        x, y = line_batch()
        return vn.unroll(trainer, (x, y + shift), 9)[1][-1]

    assert unrolled(0.0) < 1
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(unrolled)(0.0)


# Derivatives of higher order, and the other transformations.


def test_second_derivatives_are_those_of_a_loop_by_hand():
    adam, batch = optax.adam(0.01), (BATCH[0] + 1, *BATCH[1:])

    def hand(scales):
        tx = partitioned((adam, adam), scales, Line)
        return by_hand(tx, line(), batch, 6)[1][-1]

    def ours(scales):
        rates = {"slope": adam, "offset": adam}
        optimiser = vn.ParamOptimiser(rates).with_scale(
            {"slope": scales[0], "offset": scales[1]}
        )
        return vn.unroll(GaussianFit(line(), optimiser), batch, 6)[1][-1]

    at = jnp.asarray([1.0, 0.7])
    expected = jax.jit(jax.hessian(hand))(at)
    assert np.abs(expected).min() > 1e-3
    orders = {
        "forward over reverse": jax.hessian,
        "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
        "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    }
    for name, of in orders.items():
        found = jax.jit(of(ours))(at)
        np.testing.assert_allclose(found, expected, rtol=1e-8, err_msg=name)


def test_a_third_derivative():
    def after(rate):
        trainer = LineFit(line(), optax.sgd(rate))
        return vn.unroll(trainer, line_batch(), 4)[0].model.offset

    # Each step leaves 1 - 2 * rate of the way from -1 to 1.
    third = jax.grad(jax.grad(jax.grad(after)))
    np.testing.assert_allclose(third(0.1), 2 * 24 * 8 * 0.8, rtol=1e-10)


@pytest.mark.seams
def test_many_scales_at_once():
    many = jnp.stack([SCALES, 0.5 * SCALES, 1.5 * SCALES])
    both = jax.vmap(jax.value_and_grad(after_scales))(many)
    for i, scales in enumerate(many):
        value, grad = jax.value_and_grad(after_scales)(scales)
        np.testing.assert_allclose(both[0][i], value, rtol=1e-10)
        np.testing.assert_allclose(both[1][i], grad, rtol=1e-8)


def test_other_values_compile_nothing_anew():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def slope(trainer, batch):
        def after(scale):
            optimiser = trainer.optimiser.with_scale({"mean": scale})
            return vn.unroll(trainer.replace(optimiser=optimiser), batch, 6)[1][-1]

        return jax.grad(after)(jnp.asarray(1.0))

    def made(rate, mean):
        model = eqx.tree_at(lambda m: m.mean, gaussian(), jnp.asarray(mean))
        rates = {"mean": optax.adam(rate), ("std", "power"): optax.sgd(rate / 100)}
        return GaussianFit(model, vn.ParamOptimiser(rates))

    slopes = [slope(made(0.01, 0.3), BATCH), slope(made(0.02, 0.2), BATCH)]
    stepped = slope(vn.unroll(made(0.03, 0.1), BATCH, 6)[0], BATCH)
    assert len({float(s) for s in (*slopes, stepped)}) == 3


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
    """Ten thousand parameters, in three layers."""

    def loss(self, model, batch):
        x, y = batch
        for weight in model[:-1]:
            x = jnp.tanh(x @ weight)
        return jnp.mean((x @ model[-1] - y) ** 2)


def test_what_is_computed_again_is_not_kept():
    sizes = (10, 40, 40, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [
        jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    x = jax.random.normal(jax.random.key(1), (50, 10), jnp.float32)
    trainer = Network(weights, vn.ParamOptimiser({"**": optax.adam(1e-3)}))

    def last(scale, segment):
        optimiser = trainer.optimiser.with_scale({"**": scale})
        scaled = trainer.replace(optimiser=optimiser)
        return vn.unroll(scaled, (x, jnp.sin(x)), 400, segment=segment)[1][-1]

    grads, bytes_needed = {}, {}
    for segment in (0, 1, None):
        grad = jax.jit(jax.grad(lambda s, n=segment: last(s, n)))
        compiled = grad.lower(jnp.asarray(1.0)).compile()
        bytes_needed[segment] = compiled.memory_analysis().temp_size_in_bytes
        grads[segment] = float(compiled(jnp.asarray(1.0)))
    assert grads[1] == pytest.approx(grads[0], rel=1e-3)
    assert grads[None] == pytest.approx(grads[0], rel=1e-3)
    assert bytes_needed[1] < bytes_needed[0] / 2
    assert bytes_needed[None] < bytes_needed[0] / 15


def test_data_that_outweigh_the_model_are_not_kept_for_each_step():
    x = jnp.linspace(-4, 4, 20_000)
    batch = x, gaussian()(x) + 0.1, jnp.full(x.shape, 0.1)

    def last(scale):
        trainer = scaled(GaussianFit(gaussian(), rules()), (scale, scale, scale))
        return vn.unroll(trainer, batch, 100)[1][-1]

    compiled = jax.jit(jax.grad(last)).lower(jnp.asarray(1e-3)).compile()
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
        return jnp.nansum(losses) + model["a"] * model["b"] + after.best_loss

    return scalar


POLICIES = {
    "skipped": (vn.SkipStep(), "++-+-++--++"),
    "stopped": (vn.StopFit(), "++---------"),
    "stopped later": (vn.SkipStep() | vn.StopAfter(2), "++-+-++----"),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("mapped", [False, True], ids=["alone", "vmap"])
def test_nothing_flows_into_a_step_that_is_not_taken(name, mapped):
    policy, expected = POLICIES[name]
    at = jnp.asarray(0.1), jnp.asarray(1.0)
    _, losses = vn.unroll(rooted(*at, policy), WALLS, 11)
    taken = "".join("+" if is_finite else "-" for is_finite in np.isfinite(losses))
    assert taken == expected

    scalar, argnums = through_walls(policy), (0, 1)

    def gradient(*at):
        value, grad = jax.value_and_grad(scalar, argnums)(*at)
        return grad, (value, grad)

    def derived(*at):
        hessian, backward = jax.jacfwd(gradient, argnums, has_aux=True)(*at)
        return backward, jax.jacfwd(scalar, argnums)(*at), hessian

    steps = 1e-6 * jnp.asarray([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    points = [at[i] + steps[:, i] for i in range(2)]
    if mapped:
        found = jax.jit(jax.vmap(derived))(*points)
    else:
        found = jax.lax.map(lambda at: derived(*at), points)
    (values, backward), forward, hessian = found
    for i in range(2):
        up, down = 2 * i + 1, 2 * i + 2
        slope = (values[up] - values[down]) / 2e-6
        np.testing.assert_allclose(backward[i][0], slope, rtol=1e-6)
        np.testing.assert_allclose(forward[i][0], slope, rtol=1e-6)
        for j in range(2):
            curved = (backward[j][up] - backward[j][down]) / 2e-6
            np.testing.assert_allclose(hessian[j][i][0], curved, rtol=1e-5)


@pytest.mark.loose_dtypes
def test_a_step_that_only_the_guard_holds_is_not_differentiated():
    """A gradient of 1e20 turns the second moment of Adam, in float32, to infinity."""
    bad = script("u")

    def unrolled(scale, policy):
        optimiser = vn.ParamOptimiser({"**": optax.adam(0.1)})
        model = jax.tree.map(lambda leaf: leaf * scale, two())
        first = TwoFit(model, optimiser, nan_policy=policy)
        batch = jax.tree.map(lambda leaf: leaf[0], bad)
        held, _ = vn.unroll(first, batch, 2)
        good = jax.tree.map(jnp.ones_like, batch)
        after, more = vn.unroll(held, good, 2)
        return jnp.sum(more) + jnp.sum(after.model["a"]), held

    grad, held = jax.grad(unrolled, has_aux=True)(1.0, vn.SkipStep())
    assert held.nan_report()["update"].total == 2
    assert same(held.model, two())

    def without(scale):
        optimiser = vn.ParamOptimiser({"**": optax.adam(0.1)})
        model = jax.tree.map(lambda leaf: leaf * scale, two())
        good = jax.tree.map(lambda leaf: jnp.ones_like(leaf[0]), bad)
        after, more = vn.unroll(TwoFit(model, optimiser), good, 2)
        return jnp.sum(more) + jnp.sum(after.model["a"])

    np.testing.assert_allclose(grad, jax.grad(without)(1.0), rtol=1e-5)


def test_a_stopped_trainer_goes_no_further():
    trainer = LineFit(line(), optax.adam(0.1))
    x, y = line_batch()
    stopped, _ = trainer.step((x, y * jnp.nan))

    def unrolled(shift):
        return vn.unroll(stopped, (x, y + shift), 4)

    after, losses = unrolled(0.0)
    assert same(after, stopped)
    assert np.isnan(losses).all()

    def both(shift):
        after, losses = unrolled(shift)
        return jnp.stack([jnp.nansum(losses), after.model.slope])

    for of in (jax.jacrev, jax.jacfwd):
        np.testing.assert_array_equal(of(both)(0.0), 0)
    going = stopped.replace(nan_policy=vn.SkipStep())
    assert np.isfinite(vn.unroll(going, (x, y), 4)[1]).all()


def test_a_policy_that_raises():
    trainer = LineFit(line(), optax.sgd(0.1), nan_policy=vn.RaiseOnNan())
    x, y = line_batch()
    assert np.isfinite(vn.unroll(trainer, (x, y), 3)[1]).all()
    with pytest.raises(vn.NonFiniteError) as caught:
        vn.unroll(trainer, (x, y * jnp.nan), 3)
    assert caught.value.step == 0
    last = jax.jit(lambda factor: vn.unroll(trainer, (x, y * factor), 3)[0].model.slope)
    slope = (last(1.0 + 1e-6) - last(1.0 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(last)(1.0), slope, rtol=1e-6)
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
