"""Parameters and the coordinates that the optimiser moves are one point, or refused."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from models import LineFit, Positive, line

LM = optx.LevenbergMarquardt(1e-8, 1e-8)
X = jnp.linspace(-1.0, 1.0, 20)
BATCH = X, 2 * X + 0.3
MESSAGE = r"`trainer.params` and `trainer.latent`.* differ in 'slope'\. .*replace"


class Fit(vn.Trainer):
    weight: jax.Array

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = jnp.array(10.0)

    def residuals(self, model, batch):
        x, y = batch
        return self.weight * (model(x) - y)


def made(bounds=None, blocks=None, is_whitened=True):
    trainer = Fit(line(), optax.adam(0.1), bounds=bounds)
    return trainer.whiten(BATCH, blocks=blocks) if is_whitened else trainer


# What looks is one function, whoever calls it: not each caller need try each kind.
TRAINERS = {
    "whitened": functools.cache(made),
    "in blocks": functools.cache(lambda: made(blocks=["slope"])),
    "with a bijection": functools.cache(
        lambda: made({"slope": Positive()}, is_whitened=False)
    ),
    "whitened, with a bijection": functools.cache(lambda: made({"slope": Positive()})),
}
# The same in all fits, which share their programs.
RUN = {"every": 2, "chunk": 2, "progress": False}


def at(trainer, value):
    return eqx.tree_at(lambda t: t.params.slope, trainer, jnp.asarray(value))


USES = {
    "fit": lambda t: t.fit(BATCH, 3, **RUN),
    "solve": lambda t: t.solve(LM, BATCH),
    "step": lambda t: t.step(BATCH),
    "unroll": lambda t: vn.unroll(t, BATCH, 3),
    "fit_many": lambda t: vn.fit_many([t, t], BATCH, 3, **RUN),
    "solve_many": lambda t: vn.fit_many([t, t], BATCH, 50, solver=LM),
    "whiten": lambda t: t.whiten(BATCH),
    "reproject": lambda t: t.reproject(None),
    "replace": lambda t: t.replace(optimiser=optax.sgd(0.1)),
    "objective": lambda t: t.objective(BATCH),
    "standard_errors": lambda t: t.standard_errors(BATCH),
    "report": lambda t: t.report(BATCH),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_parameter_that_was_changed_alone_is_refused(kind):
    moved = at(TRAINERS[kind](), 0.7)
    with pytest.raises(ValueError, match=MESSAGE):
        USES["replace"](moved)


@pytest.mark.parametrize("use", USES)
def test_it_is_refused_by_all(use):
    with pytest.raises(ValueError, match=MESSAGE):
        USES[use](at(TRAINERS["in blocks"](), 0.7))


@pytest.mark.parametrize("kind", TRAINERS)
def test_so_are_coordinates(kind):
    trainer = TRAINERS[kind]()
    latent = jax.tree.map(lambda x: x + 1, trainer.latent)
    with pytest.raises(ValueError, match="are two points"):
        USES["fit"](eqx.tree_at(lambda t: t.latent, trainer, latent))


def test_so_is_the_answer_of_a_callback():
    trainer = TRAINERS["in blocks"]()
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.fit(BATCH, 6, callback=lambda t, _: at(t, 0.7), **RUN)
    moved = lambda t, _: at(t, [0.7, 0.8])
    with pytest.raises(ValueError, match=MESSAGE):
        vn.fit_many([trainer, trainer], BATCH, 6, callback=moved, **RUN)


def test_stacked_trainers_are_looked_at_too():
    trainer = TRAINERS["whitened, with a bijection"]()
    stacked = USES["fit_many"](trainer).trainers
    again = vn.fit_many(stacked, BATCH, 3, **RUN).trainers
    moved = at(again, [0.7, again.params.slope[1]])
    for use in vn.fit_many, lambda t, *_, **__: t.replace(nan_policy=vn.SkipStep()):
        with pytest.raises(ValueError, match=MESSAGE):
            use(moved, BATCH, 3, **RUN)


@pytest.mark.parametrize("kind", ["in blocks", "whitened, with a bijection"])
def test_what_changes_both_goes_on(kind):
    trainer = TRAINERS[kind]()
    model = eqx.tree_at(lambda m: m.slope, trainer.model, jnp.array(0.7))
    for _ in range(3):
        trainer, _ = trainer.step(BATCH)
    changed = {
        "model": trainer.replace(model=model),
        "field": eqx.tree_at(lambda t: t.weight, trainer, jnp.array(5.0)),
        "copy": jax.tree.map(lambda x: x, trainer),
        "compiled": eqx.filter_jit(lambda t: t.step(BATCH)[0])(trainer),
        "rate": trainer.replace(optimiser=optax.adam(0.2)),
    }
    for other in changed.values():
        for name in ("fit", "step"):
            USES[name](other)


def test_what_a_program_closes_over_is_not_taken_for_seen():
    moved = at(TRAINERS["in blocks"](), 0.7)
    jax.jit(lambda batch: moved.step(batch)[0].params)(BATCH)
    with pytest.raises(ValueError, match=MESSAGE):
        moved.fit(BATCH, 3, **RUN)


def test_what_is_not_finite_is_not_taken_for_changed():
    trainer = TRAINERS["with a bijection"]()
    nowhere = lambda t: (t.params.slope, t.latent.slope)
    eqx.tree_at(nowhere, trainer, (jnp.asarray(jnp.nan),) * 2).step(BATCH)


def look_at(trainer):
    """Has vernal look at a copy, which it has not made."""
    jax.tree.map(lambda x: x, trainer).replace()


def test_rounding_of_coordinates_is_no_change_of_what_they_map_to():
    """Far from the origin of the projector, an exponential multiplies it."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(40, 24)), "float32")
    start = {"a": jnp.ones(12, "float32"), "w": jnp.ones(12, "float32")}

    class Mixed(vn.Trainer):
        def residuals(self, model, batch):
            both = jnp.concatenate([model["a"], model["w"]])
            return batch @ both - jnp.sum(batch, axis=1)

    trainer = Mixed(start, optax.adam(0.1), bounds={"w": Positive()})
    trainer = trainer.whiten(matrix)
    far = trainer.replace(model={**start, "a": start["a"] * 1e4})
    for used in far, vn.fit_many([far] * 3, matrix, 3, progress=False).trainer(1):
        look_at(used)
    off = eqx.tree_at(lambda t: t.params["w"], far, start["w"] * 1.5)
    with pytest.raises(ValueError, match="differ in 'w'"):
        look_at(off)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64", "complex128"])
def test_a_parameter_of_any_kind_beside_a_bijection_is_looked_at(dtype):
    class Both(vn.Trainer):
        def loss(self, model, batch):
            size = jnp.abs(model["z"] - 1).astype(float)
            return jnp.square(size) + jnp.square(model["w"] - batch)

    start = {"z": jnp.asarray(2, dtype), "w": jnp.asarray(1.0)}
    trainer = Both(start, optax.sgd(0.1), bounds={"w": Positive()})
    look_at(trainer)
    for name in "z", "w":
        moved = eqx.tree_at(lambda t, n=name: t.params[n], trainer, 3 * start[name])
        with pytest.raises(ValueError, match=f"differ in '{name}'"):
            look_at(moved)


class Linear(vn.Trainer):
    def residuals(self, model, batch):
        matrix, y = batch
        return matrix @ model - y


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_no_change(dtype, is_bounded):
    rng, size = np.random.default_rng(0), 8
    left = np.linalg.qr(rng.normal(size=(2 * size, size)))[0]
    right = np.linalg.qr(rng.normal(size=(size, size)))[0]
    units = np.geomspace(1e-8, 1e8, size)
    bounds = {"": (-0.5 * units, 0.5 * units)} if is_bounded else None
    y = jnp.asarray(10 * np.sum(left, axis=1), dtype)
    start = Linear(jnp.zeros(size, dtype), optax.adam(1.0), bounds=bounds)
    for condition in (1.0, 1e20):
        singular = np.geomspace(1, condition**-0.5, size)
        batch = jnp.asarray((left * singular) @ right.T / units, dtype), y
        trainer = start.whiten(batch, on_null="prior")
        for rate in (0.01, 30.0):
            trainer = trainer.replace(optimiser=optax.adam(rate))
            trainer = trainer.fit(batch, 100, progress=False).trainer
            look_at(trainer)


# Bounds

BOUNDS = {"slope": (0.0, 2.0)}
OUTSIDE = r"'slope' starts at -1, outside of its bounds \(0, 2\)"


@pytest.mark.parametrize("use", ["fit", "fit_many", "report", "replace", "step"])
def test_a_parameter_that_was_put_out_of_its_bounds_is_refused(use):
    trainer = made(BOUNDS, is_whitened=False)
    with pytest.raises(ValueError, match=OUTSIDE):
        USES[use](at(trainer, -1.0))
    USES[use](at(trainer, 2.0))


def test_so_is_what_a_callback_or_a_member_has_there():
    trainer = made(BOUNDS, is_whitened=False)
    with pytest.raises(ValueError, match=OUTSIDE):
        trainer.fit(BATCH, 6, callback=lambda t, _: at(t, -1.0), **RUN)
    stacked = USES["fit_many"](trainer).trainers
    with pytest.raises(ValueError, match=OUTSIDE):
        vn.fit_many(at(stacked, [0.7, -1.0]), BATCH, 3, **RUN)


def test_what_is_nowhere_is_within_its_bounds():
    USES["step"](at(made(BOUNDS, is_whitened=False), jnp.nan))


# Parts

TOGETHER = r"`trainer\.{}` .*`trainer\.replace\(model=.*not by `eqx\.tree_at`"
SKIP = vn.SkipStep() | vn.StopAfter(5)
RULES = {"slope": optax.adam(0.1), "offset": optax.adam(0.1)}


def put(where, value):
    is_none = lambda x: x is None
    return lambda t: eqx.tree_at(where, t, value, is_leaf=is_none)


def each(fn):
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return lambda t: jax.tree.map(lambda x: fn(x) if is_float(x) else x, t)


CHANGES = {
    "another policy": ("policy_state", put(lambda t: t.nan_policy, SKIP)),
    "another optimiser": (
        "opt_state",
        put(lambda t: t.optimiser, vn.ParamOptimiser(RULES)),
    ),
    "another shape": ("(opt_state|best)", lambda t: at(t, [0.7, 0.8])),
    "an integer": ("params", lambda t: at(t, 1)),
    "a number": ("params", put(lambda t: t.params.slope, 1.0)),
    "text": ("params", put(lambda t: t.params.slope, "steep")),
    "nothing": ("params", put(lambda t: t.params.slope, None)),
    "numbers": ("params", each(lambda x: x.item() if x.ndim == 0 else x)),
    "half precision": ("opt_state", each(lambda x: x.astype("float16"))),
    "one more": ("is_validated", lambda t: jax.tree.map(lambda x: x + 1, t)),
}


@pytest.mark.loose_dtypes
@pytest.mark.own_words
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_do_not_fit_are_refused(change):
    optimiser = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    part, changed = CHANGES[change]
    other = changed(Fit(line(), optimiser))
    for use in "fit", "solve", "step", "fit_many", "report":
        with pytest.raises(ValueError, match=TOGETHER.format(part)):
            USES[use](other)


@pytest.mark.own_words
def test_a_replacement_mends_what_was_changed_apart():
    trainer = made(is_whitened=False)
    other = put(lambda t: t.nan_policy, SKIP)(trainer)
    with pytest.raises(ValueError, match=TOGETHER.format("policy_state")):
        other.replace(model=line())
    USES["step"](other.replace(nan_policy=SKIP))


@pytest.mark.own_words
def test_the_replace_of_dataclasses_is_refused():
    # With annotations, Python itself finds first that an argument is missing.
    with pytest.raises(TypeError, match=r"use the method `replace`|'model'"):
        dataclasses.replace(LineFit(line()))


@pytest.mark.own_words
@pytest.mark.loose_dtypes
def test_what_fits_goes_on():
    trainer = made(is_whitened=False)
    count = lambda t: optax.tree.get(t.opt_state, "count")
    for change in (
        put(count, 3),
        put(lambda t: t.optimiser, optax.adam(0.2)),
        lambda t: jax.tree.map(np.asarray, t),
        jax.device_get,
        each(lambda x: x.astype("float32")),
    ):
        USES["step"](change(trainer))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("x64", [False, True])
def test_a_copy_of_another_precision_fits(x64):
    with jax.enable_x64(False):
        optimiser = optax.inject_hyperparams(optax.adam)(0.1)
        trainer = Fit(line(dtype="float32"), optimiser)
    with jax.enable_x64(x64):
        USES["step"](jax.tree.map(lambda x: x, trainer))
