"""One step: its order, its hooks, what a trainer is to JAX."""

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
    Pull,
    at,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    zoo,
)

BATCH = line_batch()


@pytest.mark.seams
@pytest.mark.as_compiled
def test_a_step_is_that_of_optax_by_hand():
    optimiser = optax.adam(0.1)
    trainer = LineFit(line(), optimiser)
    params, state = line(), optimiser.init(line())

    @jax.jit
    def by_hand(params, state):
        loss = lambda m: jnp.mean((m(BATCH[0]) - BATCH[1]) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    for i in range(5):
        start = params
        params, state, value, grads = by_hand(params, state)
        trainer, info = trainer.step(BATCH)
        assert isinstance(trainer, LineFit)
        assert int(trainer.step_count) == i + 1
        np.testing.assert_allclose(info.loss, value, rtol=1e-15)
        np.testing.assert_allclose(info.grad_norm, optax.tree.norm(grads), rtol=1e-14)
        assert info.accepted
        assert not info.stopped
        assert info.metrics == {}
        np.testing.assert_allclose(trainer.model.slope, params.slope, rtol=1e-15)
        # The loss was still falling, so that the best is where this step began.
        np.testing.assert_allclose(trainer.best.slope, start.slope, rtol=1e-15)
        assert trainer.best_loss == info.loss


def test_the_best_is_the_lowest_that_was_scored():
    losses, slopes = [], []
    trainer = LineFit(line(), optax.sgd(1.2))
    for _ in range(6):
        slopes.append(float(trainer.model.slope))
        trainer, info = trainer.step(BATCH)
        losses.append(float(info.loss))
    lowest = int(np.argmin(losses))
    assert 0 < lowest < 5 or losses[0] == min(losses)
    assert trainer.best_loss == losses[lowest]
    assert trainer.best.slope == slopes[lowest]
    assert not same(trainer.best, trainer.model)


def test_before_the_first_step():
    trainer = LineFit(line(), optax.sgd(0.1))
    assert trainer.best_loss == jnp.inf
    assert int(trainer.step_count) == 0
    assert same(trainer.best, line())
    assert same(trainer.model, line())
    assert type(trainer.model) is Line


# What is fitted.


def test_residuals_are_half_a_chi_squared():
    batch = gaussian_batch()
    _, info = GaussianFit(gaussian(), optax.sgd(0.0)).step(batch)
    x, y, sigma = batch
    expected = 0.5 * jnp.sum(((gaussian()(x) - y) / sigma) ** 2)
    np.testing.assert_allclose(info.loss, expected, rtol=1e-14)


@pytest.mark.seams
def test_complex_residuals():
    class Wave(vn.Trainer):
        def residuals(self, model, batch):
            return model - batch

    target = jnp.asarray([1 + 2j, -1j])
    result = vn.fit(
        lambda m, b: jnp.sum(jnp.abs(m - b) ** 2),
        jnp.zeros(2, complex),
        optax.sgd(0.1),
        target,
        100,
    )
    np.testing.assert_allclose(result.model, target, atol=1e-6)
    trainer = Wave(jnp.zeros(2, complex), optax.sgd(0.2))
    result = trainer.fit(target, 100)
    np.testing.assert_allclose(result.history.loss[0], 3.0)
    np.testing.assert_allclose(result.model, target, atol=1e-6)


METHODS = {
    "loss": lambda self, model, batch: 3.0 * model,
    "nll": lambda self, model, batch: 2.0 * model,
    "residuals": lambda self, model, batch: jnp.stack([model, model]),
}


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
@pytest.mark.parametrize(
    ("names", "loss"),
    [
        (("nll", "residuals"), 8.0),
        (("loss", "residuals"), 12.0),
        (("loss", "nll", "residuals"), 12.0),
    ],
)
def test_residuals_are_a_likelihood_and_a_likelihood_is_a_loss(names, loss):
    cls = type("Chosen", (vn.Trainer,), {name: METHODS[name] for name in names})
    assert cls(jnp.asarray(4.0), optax.sgd(0.1)).step(None)[1].loss == loss


@pytest.mark.seams
def test_metrics_come_along():
    class Told(LineFit):
        def loss(self, model, batch):
            return super().loss(model, batch), {
                "slope": model.slope,
                "many": batch[0][:2],
                "count": self.step_count,
                "is_low": model.slope < 1,
            }

    trainer = Told(line(), optax.sgd(0.1))
    trainer, info = trainer.step(BATCH)
    assert info.metrics["slope"] == 0.5
    assert info.metrics["count"] == 0
    trainer, info = trainer.step(BATCH)
    assert info.metrics["count"] == 1
    np.testing.assert_array_equal(info.metrics["many"], BATCH[0][:2])
    stopped, told = trainer.step((BATCH[0], BATCH[1] * jnp.nan))
    _, blank = stopped.step(BATCH)
    for metrics in (told.metrics, blank.metrics):
        kinds = {name: (x.shape, x.dtype) for name, x in metrics.items()}
        assert kinds == {name: (x.shape, x.dtype) for name, x in info.metrics.items()}
    assert np.isnan(blank.metrics["slope"])
    assert not blank.metrics["is_low"]


class Live(LineFit):
    def loss(self, model, batch):
        told = {"step": self.step_count, "own": self.model.slope, "given": model.slope}
        return super().loss(self.model, batch), told


@pytest.mark.seams
def test_within_the_loss_the_trainer_is_live():
    result = Live(line(), optax.sgd(0.1)).fit(BATCH, 4, record=("step", "own", "given"))
    history = result.history
    np.testing.assert_array_equal(history["step"], range(4))
    np.testing.assert_array_equal(history["own"], history["given"])
    assert np.all(np.diff(history["own"]) > 0)
    reference = LineFit(line(), optax.sgd(0.1)).fit(BATCH, 4)
    assert same(result.model, reference.model)


@pytest.mark.seams
def test_each_step_has_its_own_key():
    class Noisy(vn.Trainer):
        def residuals(self, model, batch, key):
            return (model + jax.random.normal(key))[None]

    key = jax.random.key(7)
    trainer = Noisy(jnp.asarray(0.0), optax.sgd(0.0), key=key)
    for i in range(3):
        trainer, info = trainer.step(None)
        noise = jax.random.normal(jax.random.fold_in(key, i))
        np.testing.assert_allclose(info.loss, 0.5 * noise**2, rtol=1e-14)


# Which parameters.


@pytest.mark.seams
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, ("slope", "offset")),
        ({"train": "slope"}, ("slope",)),
        ({"train": lambda path, leaf: path == "offset"}, ("offset",)),
        ({"optimiser": vn.ParamOptimiser({"offset": optax.sgd(0.1)})}, ("offset",)),
        (
            {"optimiser": vn.ParamOptimiser({"**": optax.sgd(0.1), "slope": None})},
            ("offset",),
        ),
        (
            {
                "optimiser": vn.ParamOptimiser({"**": optax.sgd(0.1)}),
                "train": ("slope",),
            },
            ("slope",),
        ),
    ],
)
def test_what_is_trained(options, trained):
    trainer = LineFit(line(), **{"optimiser": optax.sgd(0.1), **options})
    assert vn.paths(trainer.params) == trained
    assert list(trainer.nan_report()) == ["loss", *trained, "update"]


@pytest.mark.seams
def test_only_what_is_trained_moves():
    rules = vn.ParamOptimiser({"**": optax.sgd(0.1), "slope": None})
    new, _ = LineFit(line(), rules).step(BATCH)
    assert new.model.slope == line().slope
    assert new.model.offset != line().offset


@pytest.mark.seams
def test_a_float_is_trained_where_it_is_named():
    trainer = Pull(zoo(), optax.sgd(0.1), train=("number", "scalar"))
    new, _ = trainer.step(jnp.asarray(0.0))
    np.testing.assert_allclose(new.model.number, 0.25 * 0.8)
    assert vn.paths(trainer.params) == ("scalar", "number")
    assert type(Pull(zoo(), optax.sgd(0.1)).model.number) is float


def test_the_rest_of_a_model_is_as_it_was():
    model = zoo()
    new, _ = Pull(model, optax.sgd(0.1), train="scalar").step(jnp.asarray(0.0))
    changed = eqx.tree_at(lambda m: m.scalar, new.model, model.scalar)
    assert eqx.tree_equal(
        changed, eqx.tree_at(lambda m: m.host, model, jnp.arange(3.0))
    )
    assert new.model.activation is jax.nn.relu
    assert new.model.name == "zoo"
    assert new.model.integer == 7


# Hooks.


def test_gradients_are_transformed_before_the_optimiser():
    class Signed(LineFit):
        def transform_grads(self, grads, model):
            assert grads.offset is None
            assert isinstance(model, Line)
            return jax.tree.map(lambda g: jnp.sign(g) * model.offset, grads)

    new, info = Signed(line(), optax.sgd(0.1), train="slope").step(BATCH)
    np.testing.assert_allclose(new.model.slope, 0.5 - 0.1)
    assert info.grad_norm > 0.5


def test_a_constraint_holds_after_each_update():
    class Bounded(LineFit):
        def constrain(self, model):
            return eqx.tree_at(
                lambda m: m.slope, model, jnp.clip(model.slope, 0.0, 0.75)
            )

    result = Bounded(line(), optax.sgd(0.3)).fit(BATCH, 20, record="slope")
    assert result.history["slope"].max() == 0.75 == result.model.slope
    np.testing.assert_allclose(result.model.offset, 1.0, atol=1e-4)


def test_a_constraint_leaves_what_is_frozen():
    class Meddling(LineFit):
        def constrain(self, model):
            return eqx.tree_at(lambda m: m.offset, model, jnp.asarray(9.0))

    new, _ = Meddling(line(), optax.sgd(0.1), train="slope").step(BATCH)
    assert new.model.offset == -1


# Projectors.


@functools.cache
def projector_of_gaussian():
    bare = GaussianFit(gaussian())
    residuals = lambda m: bare.residuals(m, gaussian_batch())
    fisher = vn.gauss_newton(residuals, bare.params)
    return vn.EigenProjector.from_fisher(fisher, bare.params)


def whitened(trainer_type, optimiser, **options):
    trainer = trainer_type(
        gaussian(), optimiser, projector=projector_of_gaussian(), **options
    )
    return trainer, gaussian_batch()


@pytest.mark.seams
def test_a_fit_in_the_latent_space_is_one_by_hand():
    trainer, batch = whitened(GaussianFit, optax.adam(0.05))
    projector, optimiser = trainer.projector, optax.adam(0.05)

    def loss(latent):
        residuals = trainer.residuals(projector.to_params(latent), batch)
        return 0.5 * jnp.sum(residuals**2)

    @jax.jit
    def by_hand(latent, state):
        value, grads = jax.value_and_grad(loss)(latent)
        updates, state = optimiser.update(grads, state, latent)
        return optax.apply_updates(latent, updates), state, value

    latent = projector.to_latent(trainer.params)
    state, values = optimiser.init(latent), []
    for _ in range(50):
        latent, state, value = by_hand(latent, state)
        values.append(value)
    result = trainer.fit(batch, 50)
    np.testing.assert_allclose(result.history.loss, values, rtol=1e-8)
    np.testing.assert_allclose(result.trainer.latent, latent, rtol=1e-7, atol=1e-9)
    for found, expected in zip(
        jax.tree.leaves(result.model),
        jax.tree.leaves(projector.to_params(latent)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_policy_and_norm_are_in_the_parameters_before_projection():
    trainer, batch = whitened(GaussianFit, optax.sgd(0.1), nan_policy=vn.SkipStep())
    _, info = GaussianFit(gaussian(), optax.sgd(0.1)).step(batch)
    assert trainer.step(batch)[1].grad_norm == pytest.approx(float(info.grad_norm))
    bad = (batch[0].at[3].set(jnp.nan), *batch[1:])
    held, info = trainer.step(bad)
    assert not info.accepted
    assert same(held.latent, trainer.latent)
    assert held.nan_report()["mean"].total == 1


@pytest.mark.seams
def test_a_constraint_with_a_projector_is_encoded_again():
    class Positive(GaussianFit):
        def constrain(self, model):
            return eqx.tree_at(lambda m: m.power, model, jnp.minimum(model.power, 0.9))

    trainer, batch = whitened(Positive, optax.adam(0.1))
    result = trainer.fit(batch, 50, record="power")
    assert result.history["power"].max() <= 0.9 + 1e-12
    back = trainer.projector.to_params(result.trainer.latent)
    np.testing.assert_allclose(back.power, result.model.power, rtol=1e-12)


# Dtypes.


def mixed():
    return {
        "f32": jnp.ones(2, jnp.float32),
        "bf16": jnp.ones(2, jnp.bfloat16),
        "f64": jnp.ones(2, jnp.float64),
        "weak": jnp.asarray(1.0),
        "c": jnp.asarray(1 + 1j),
    }


@pytest.mark.loose_dtypes
def test_dtypes_and_weak_types_stay():
    rate = optax.linear_schedule(0.1, 0.01, 9)
    trainer = Pull(mixed(), optax.chain(optax.trace(0.9), optax.adam(rate)))
    after, _ = trainer.step(0.0)
    then, _ = after.step(0.0)
    last = then.fit(0.0, 3).trainer
    kind = lambda t: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(t)]
    assert kind(trainer) == kind(after) == kind(then) == kind(last)
    assert jax.tree.structure(trainer) == jax.tree.structure(last)
    assert {k: v.dtype for k, v in last.model.items()} == {
        k: v.dtype for k, v in mixed().items()
    }
    assert all(np.all(np.abs(last.model[k]) < np.abs(v)) for k, v in mixed().items())


# A trainer is a pytree.


@pytest.mark.seams
def test_steps_in_the_transformations_of_jax():
    trainer = LineFit(line(), optax.adam(0.1))
    steps = 4
    one = trainer
    for _ in range(steps):
        one, _ = one.step(BATCH)

    jitted = trainer
    step = jax.jit(lambda t, b: t.step(b))
    for _ in range(steps):
        jitted, _ = step(jitted, BATCH)

    scan = jax.jit(lambda t: jax.lax.scan(lambda t, _: t.step(BATCH), t, length=steps))
    scanned, infos = scan(trainer)

    starts = jnp.asarray([0.5, 3.0])
    many = jax.vmap(lambda s: LineFit(line(s), optax.adam(0.1)))(starts)
    together = jax.vmap(lambda t: t.step(BATCH))
    for _ in range(steps):
        many, _ = together(many)

    for other in jitted, scanned:
        np.testing.assert_allclose(other.model.slope, one.model.slope, rtol=1e-14)
        assert int(other.step_count) == steps
        np.testing.assert_allclose(other.best_loss, one.best_loss, rtol=1e-14)
    assert infos.loss.shape == (steps,)
    np.testing.assert_allclose(many.model.slope[0], one.model.slope, rtol=1e-12)
    assert np.all(many.step_count == steps)


@pytest.mark.seams
def test_gradients_through_steps():
    def after(shift, offset):
        batch = (BATCH[0], BATCH[1] + shift)
        new, _ = LineFit(Line(line().slope, offset), optax.sgd(0.1)).step(batch)
        new, _ = new.step(batch)
        return new.model.offset

    of_data, of_start = jax.grad(after, (0, 1))(0.0, line().offset)
    # Twice 0.2 of the way to a minimum that lies `shift` higher.
    np.testing.assert_allclose(of_data, 0.2 + 0.8 * 0.2, rtol=1e-12)
    np.testing.assert_allclose(of_start, 0.8 * 0.8, rtol=1e-12)


@pytest.mark.seams
def test_derivatives_of_a_step_that_is_not_taken():
    """A normalised gradient has no derivative at zero, in which it is taken there.

    The first bad step is refused, and the second one finds the fit stopped.
    """
    bad = (BATCH[0], BATCH[1] * jnp.nan)

    class Normalised(LineFit):
        def transform_grads(self, grads, model):
            scale = model.offset / optax.tree.norm(grads)
            return jax.tree.map(lambda g: g * scale, grads)

    def after(offset, factor):
        model = eqx.tree_at(lambda m: m.offset, line(), offset)
        trainer = Normalised(model, optax.adam(0.1))
        trainer, _ = trainer.step(bad)
        trainer, _ = trainer.step(bad)
        return factor * trainer.model.offset

    def gradient(*at):
        grad = jax.grad(after, argnums=(0, 1))(*at)
        return grad, grad

    @jax.jit
    def derivatives(*at):
        hessian, backward = jax.jacfwd(gradient, (0, 1), has_aux=True)(*at)
        return backward, jax.jacfwd(after, (0, 1))(*at), hessian

    backward, forward, hessian = derivatives(0.5, 2.0)
    np.testing.assert_allclose(backward, (2.0, 0.5), rtol=1e-12)
    np.testing.assert_allclose(forward, (2.0, 0.5), rtol=1e-12)
    np.testing.assert_allclose(hessian, [[0.0, 1.0], [1.0, 0.0]], atol=1e-12)


def test_a_step_that_is_not_taken_moves_by_zeros():
    seen = []

    class Watched(LineFit):
        def transform_grads(self, grads, model):
            jax.debug.callback(seen.append, grads.slope)
            return grads

    trainer = Watched(line(), optax.adam(0.1), nan_policy=vn.SkipStep())
    new, info = trainer.step((BATCH[0], BATCH[1] * jnp.nan))
    jax.effects_barrier()
    assert not info.accepted
    assert [float(x) for x in seen] == [0.0]
    assert same(new.params, trainer.params)
    assert same(new.opt_state, trainer.opt_state)


@pytest.mark.seams
def test_a_line_search_ends_at_once_where_the_step_is_not_taken():
    seen = []

    class Counted(LineFit):
        def loss(self, model, batch):
            jax.debug.callback(lambda: seen.append(1))
            return super().loss(model, batch)

    def evaluations(trainer, batch):
        seen.clear()
        with jax.numpy_dtype_promotion("standard"):
            new, info = trainer.step(batch)
        jax.effects_barrier()
        return new, bool(info.accepted), len(seen)

    trainer = Counted(line(), optax.lbfgs(), nan_policy=vn.StopFit())
    trainer, accepted, good = evaluations(trainer, BATCH)
    assert accepted
    trainer, accepted, bad = evaluations(trainer, (BATCH[0], BATCH[1] * jnp.nan))
    assert not accepted
    assert bad <= good + 1
    again, accepted, over = evaluations(trainer, BATCH)
    assert same(again, trainer)
    assert over <= good + 1


def test_a_stopped_trainer_keeps_the_best_of_its_validation():
    trainer = LineFit(line(), optax.adam(0.1))
    trainer = trainer.fit(BATCH, 5, validation=(BATCH, 1)).trainer
    bad = (BATCH[0], BATCH[1] * jnp.nan)
    stopped = trainer.fit(bad, 1, validation=(BATCH, 1)).trainer
    assert stopped.stopped
    again, info = stopped.step(BATCH)
    assert same(again, stopped)
    assert np.isnan(info.grad_norm)


def test_a_stopped_trainer_stays():
    policy = vn.SkipStep() | vn.StopAfter(1)
    trainer = LineFit(line(), optax.adam(0.1), nan_policy=policy)
    bad = (BATCH[0], BATCH[1] * jnp.nan)
    stopped, info = trainer.step(bad)
    assert info.stopped
    again, info = stopped.step(BATCH)
    assert same(again, stopped)
    assert not info.accepted
    assert info.stopped
    assert np.isnan(info.loss)
    result = stopped.fit(BATCH, 10)
    assert same(result.trainer, stopped)
    assert len(result.history) == 0
    assert result.stop_reason is vn.StopReason.NON_FINITE
    going = stopped.replace(nan_policy=vn.SkipStep())
    assert not going.stopped
    assert int(going.fit(BATCH, 3).trainer.step_count) == 4


# Replacing.


@pytest.mark.seams
def test_replace_keeps_what_fits():
    trainer = LineFit(line(), optax.adam(0.1)).fit(BATCH, 5).trainer
    slower = trainer.replace(optimiser=optax.adam(0.01))
    assert same(slower.opt_state, trainer.opt_state)
    assert int(slower.step_count) == 5
    assert slower.best_loss == trainer.best_loss
    step = lambda t: t.step(BATCH)[0].model.slope - trainer.model.slope
    np.testing.assert_allclose(step(slower), step(trainer) / 10, rtol=1e-9)

    other = trainer.replace(optimiser=optax.sgd(0.1, momentum=0.9))
    assert not jax.tree.leaves(other.opt_state)[-1].any()
    assert same(other.model, trainer.model)

    moved = trainer.replace(model=line(7.0, 8.0))
    assert moved.model.slope == 7
    assert same(moved.opt_state, trainer.opt_state)
    assert same(trainer.replace(), trainer)

    patient = trainer.replace(nan_policy=vn.SkipStep() | vn.StopAfter(3))
    assert isinstance(patient.step(BATCH)[0], LineFit)


def test_replace_keeps_the_state_of_a_policy_of_the_same_kind():
    bad = (BATCH[0], BATCH[1] * jnp.nan)
    make = lambda patience: vn.SkipStep() | vn.StopAfter(patience)
    trainer = LineFit(line(), optax.sgd(0.1), nan_policy=make(5))
    trainer = trainer.step(bad)[0].step(bad)[0]
    # Two bad steps in a row are behind it: the third is one too many.
    assert trainer.replace(nan_policy=make(3)).step(bad)[0].stopped
    assert not trainer.replace(nan_policy=make(4)).step(bad)[0].stopped
    # The count of another policy has nothing to do with it.
    alone = trainer.replace(nan_policy=vn.StopAfter(3))
    assert not alone.step(bad)[0].stopped


class CountSteps(vn.NanPolicy):
    """Counts steps in a state that looks like that of `StopAfter`."""

    def init(self, params):
        return jnp.array(0, jnp.int32)

    def apply(self, loss, grads, state):
        return grads, vn.Verdict(True, False), state + 1


AROUND = {"alone": lambda own: own, "composed": lambda own: vn.SkipStep() | own}


@pytest.mark.parametrize("name", AROUND)
def test_replace_tells_policies_with_states_that_look_alike(name):
    around = AROUND[name]
    trainer = LineFit(line(), optax.sgd(0.1), nan_policy=around(CountSteps()))
    trainer = trainer.step(BATCH)[0].step(BATCH)[0].step(BATCH)[0]
    other = trainer.replace(nan_policy=around(vn.StopAfter(3)))
    assert not other.step((BATCH[0], BATCH[1] * jnp.nan))[0].stopped


def test_replace_changes_what_is_frozen_too():
    trainer = LineFit(line(), optax.sgd(0.1), train="slope")
    assert trainer.replace(model=line(1.0, 5.0)).model.offset == 5


@pytest.mark.parametrize("train", [None, "slope"])
@pytest.mark.parametrize("name", ["model", "best"])
def test_equinox_finds_the_leaves_of_a_model(name, train):
    trainer = LineFit(line(), optax.sgd(0.1), train=train)
    where = lambda trainer: getattr(trainer, name).slope
    new = eqx.tree_at(where, trainer, jnp.asarray(3.0))
    assert (where(new), where(trainer)) == (3, line().slope)


@pytest.mark.parametrize("tie", ["slope", lambda model: 2 * model.slope])
def test_equinox_finds_the_leaves_of_a_model_with_ties(tie):
    trainer = LineFit(line(), optax.sgd(0.1), ties={"offset": tie})
    moved = eqx.tree_at(lambda t: t.model.slope, trainer, jnp.asarray(3.0))
    times = 1 if tie == "slope" else 2
    assert (moved.model.slope, moved.model.offset) == (3, 3 * times)
    with pytest.raises(TypeError, match="a tied parameter is not a leaf"):
        eqx.tree_at(lambda t: t.model.offset, trainer, jnp.asarray(3.0))


def test_replace_with_a_projector():
    trainer, _ = whitened(GaussianFit, optax.adam(0.1))
    target = eqx.tree_at(lambda m: m.mean, gaussian(), jnp.asarray(0.7))
    moved = trainer.replace(model=target)
    np.testing.assert_allclose(moved.model.mean, 0.7, rtol=1e-12)
    back = trainer.projector.to_params(moved.latent)
    np.testing.assert_allclose(back.mean, 0.7, rtol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Line(jnp.ones(16), jnp.asarray(0.0)),
        lambda: {"slope": jnp.asarray(0.0), "offset": jnp.asarray(0.0)},
    ],
    ids=["shape", "structure"],
)
def test_replace_by_a_model_of_another_kind(model):
    trainer = LineFit(line(), optax.adam(0.1))
    with pytest.raises((ValueError, TypeError), match=r"`model`"):
        trainer.replace(model=model())


def test_replace_by_a_model_for_all_members():
    trainers = [LineFit(line(slope), optax.adam(0.1)) for slope in (1.0, 2.0, 3.0)]
    stacked = vn.fit_many(trainers, BATCH, 3, progress=False).trainers
    moved = stacked.replace(model=line(7.0, 8.0))
    assert moved.model.slope.tolist() == [7] * 3
    rows = Line(jnp.arange(3.0), jnp.ones(3))
    assert stacked.replace(model=rows).model.slope.tolist() == [0, 1, 2]
    for odd in (Line(jnp.arange(3.0), jnp.asarray(0.0)), line(jnp.ones(2))):
        with pytest.raises(ValueError, match=r"`model` has an array of shape .*row"):
            stacked.replace(model=odd)


@pytest.mark.loose_dtypes
def test_replace_by_a_model_of_another_precision():
    trainer = LineFit(line(), optax.adam(0.1), train="slope")
    new = trainer.replace(model=line(0.25, 0.75, dtype=jnp.float32))
    after, _ = new.step(BATCH)
    for found in new.model, after.model:
        assert found.slope.dtype == jnp.float64
        assert found.offset == 0.75


# A subclass of one's own.


class Weighted(vn.Trainer):
    weight: jax.Array
    power: int = eqx.field(static=True)

    def __init__(self, *args, weight, power=2, **options):
        self.weight = jnp.asarray(weight)
        self.power = power
        super().__init__(*args, **options)

    def loss(self, model, batch):
        x, y = batch
        return self.weight * jnp.mean(jnp.abs(model(x) - y) ** self.power)


@pytest.mark.seams
def test_fields_of_ones_own():
    trainer = Weighted(line(), optax.sgd(0.1), weight=0.5)
    new = trainer.fit(BATCH, 3).trainer
    assert isinstance(new, Weighted)
    assert new.weight == 0.5
    assert new.power == 2
    plain = LineFit(line(), optax.sgd(0.05)).fit(BATCH, 3)
    np.testing.assert_allclose(new.model.slope, plain.model.slope, rtol=1e-12)
    grad = jax.grad(
        lambda w: Weighted(line(), optax.sgd(0.1), weight=w).step(BATCH)[1].loss
    )
    np.testing.assert_allclose(grad(0.5), 4.85, rtol=1e-6)


@pytest.mark.seams
def test_generic_arguments():
    class Typed(vn.Trainer[Line, tuple]):
        def loss(self, model, batch):
            return jnp.mean(model(batch[0]) ** 2)

    assert Typed(line(), optax.sgd(0.1)).step(BATCH)[1].loss > 0


@pytest.mark.seams
def test_a_bare_array_is_a_model():
    trainer = vn.fit(
        lambda m, b: jnp.sum((m - b) ** 2),
        jnp.zeros(3),
        optax.sgd(0.5),
        jnp.arange(3.0),
        2,
    ).trainer
    np.testing.assert_array_equal(trainer.model, jnp.arange(3.0))


def test_steps_on_rows_of_data_need_no_copy_of_the_trainer():
    """One trainer for each row: the same bits as each alone, to rounding."""
    rows = jnp.stack([BATCH[1], 2 * BATCH[1]])
    trainer = LineFit(line(), optax.adam(0.1))
    many, infos = jax.vmap(lambda y: trainer.step((BATCH[0], y)))(rows)
    for i in range(2):
        alone, info = trainer.step((BATCH[0], rows[i]))
        np.testing.assert_allclose(at(infos, i).loss, info.loss, rtol=1e-14)
        np.testing.assert_allclose(many.model.slope[i], alone.model.slope, rtol=1e-14)


def test_a_parameter_that_is_trained_has_a_rule():
    model = {"a": jnp.asarray(1.0), "b": jnp.asarray(2.0)}

    class Sum(vn.Trainer):
        def loss(self, model, batch):
            return model["a"] ** 2 + model["b"] ** 2

    with pytest.raises(ValueError, match=r"no rule for 'a'"):
        Sum(model, vn.ParamOptimiser({"b": optax.sgd(0.1)}), train="a")
    trainer = Sum(model, vn.ParamOptimiser({"a": optax.sgd(0.1)}))
    with pytest.raises(ValueError, match=r"no rule for 'a'"):
        trainer.replace(optimiser=vn.ParamOptimiser({"b": optax.sgd(0.1)}))


def test_a_constraint_sees_its_model_in_self():
    class Sum(vn.Trainer):
        def loss(self, model, batch):
            return model**2

        def constrain(self, model):
            return jnp.where(self.model == model, model, jnp.nan)

    trainer, info = Sum(jnp.asarray(2.0), optax.sgd(0.1)).step(None)
    assert info.accepted
    np.testing.assert_allclose(trainer.model, 1.6)


def test_a_transformation_of_the_users_own_may_look_at_its_rate():
    def mine(learning_rate):
        def update(updates, state, params=None):
            factor = -learning_rate if learning_rate > 0 else 0.0
            return jax.tree.map(lambda g: factor * g, updates), state

        return optax.GradientTransformation(lambda params: {"n": 0}, update)

    result = vn.fit(lambda m, b: m**2, jnp.asarray(1.0), mine(0.25), None, 2)
    np.testing.assert_allclose(result.model, 0.25)


class Wrapped(eqx.Module):
    """Looks for its attributes in a dictionary, where a wrong name is a KeyError."""

    inner: dict

    def __getattr__(self, name):
        return self.inner[name]

    def __call__(self, x):
        return self.slope * x


def test_a_model_that_finds_its_attributes_itself():
    model = Wrapped({"slope": jnp.asarray(1.0)})
    trainer, _ = LineFit(model, optax.sgd(0.1)).step(BATCH)
    assert trainer.replace(model=model).model.slope == 1.0
