"""`Trainer.learning_rates`: against what the next step does."""

import functools
import inspect
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import (
    GaussianFit,
    LineFit,
    Pull,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
)

# Schedules of Optax.
pytestmark = pytest.mark.loose_dtypes


def tree():
    return {
        "a": jnp.arange(1.0, 4.0),
        "b": {"c": jnp.full((2, 2), 2.0), "d": jnp.asarray(0.5)},
        "e": jnp.full(2, -1.0, jnp.float32),
    }


NAMES = ("a", "b.c", "b.d", "e")
GRADIENT = jax.tree.map(lambda leaf: np.asarray(2 * np.asarray(leaf)), tree())


@eqx.filter_jit
def updates_of_each(trainers):
    """The next update by a gradient that is known, and the trainers after it.

    It is one program for all of them.
    """

    def after(trainer):
        gradient = jax.tree.map(jnp.asarray, GRADIENT)
        updates, state = trainer.optimiser.update(
            gradient, trainer.opt_state, trainer.params
        )
        return updates, eqx.tree_at(lambda t: t.opt_state, trainer, state)

    return {name: after(trainer) for name, trainer in trainers.items()}


def walked(optimisers, steps):
    """Trainers with these optimisers after no update, after one, and so on.

    Beside each are the updates that come next, as multiples of the gradient.
    """
    trainers = {name: Pull(tree(), make()) for name, make in optimisers.items()}
    walk = []
    for _ in range(steps + 1):
        found = updates_of_each(trainers)
        multiples = {name: multiple(updates) for name, (updates, _) in found.items()}
        walk.append({name: (trainers[name], multiples[name]) for name in trainers})
        trainers = {name: trainer for name, (_, trainer) in found.items()}
    return walk


def multiple(updates):
    """How far an update goes against the gradient, as a multiple of it."""
    ratio = lambda update, gradient: -np.asarray(update) / gradient
    ratios = map(ratio, jax.tree.leaves(updates), jax.tree.leaves(GRADIENT))
    return dict(zip(NAMES, ratios, strict=True))


def after(optimiser, steps):
    trainer, _ = walked({"one": lambda: optimiser}, steps)[steps]["one"]
    return trainer


class Ramp:
    """A schedule of one's own, as an object."""

    def __call__(self, count):
        return 0.01 * jnp.asarray(count + 1, float)


def by_first_letter(params):
    """Labels for the whole tree, and for a dictionary by path."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "left" if "a" in str(keys[0]) else "right", params
    )


def mask(params):
    return jax.tree_util.tree_map_with_path(lambda keys, _: "a" in str(keys[0]), params)


SCHEDULES = {
    "cosine": lambda: optax.cosine_decay_schedule(0.1, 6),
    "warm-up cosine": lambda: optax.warmup_cosine_decay_schedule(0, 0.2, 2, 8, 0.01),
    "exponential": lambda: optax.exponential_decay(0.1, 3, 0.5, staircase=True),
    "piecewise": lambda: optax.piecewise_constant_schedule(0.1, {2: 0.5, 4: 0.2}),
    "joined": lambda: optax.join_schedules(
        [optax.linear_schedule(0.0, 0.1, 3), optax.constant_schedule(0.05)], [3]
    ),
    "delay": lambda: vn.delay(0.1, 2, 3),
    "a lambda": lambda: lambda count: 0.1 / (1 + count),
    "an object": lambda: Ramp(),
}
"""What takes a count and gives a rate."""

OPTIMISERS = {
    "sgd": lambda: optax.sgd(0.1),
    "an array": lambda: optax.sgd(jnp.asarray(0.1)),
    "ascent": lambda: optax.scale(1e-3),
    "window": lambda: vn.window(optax.sgd(SCHEDULES["cosine"]()), 2, 5),
    "window without end": lambda: vn.window(optax.sgd(Ramp()), 3),
    "clip": lambda: optax.chain(
        optax.clip_by_global_norm(1e6), optax.clip(1e6), optax.sgd(0.1)
    ),
    "chain in chain": lambda: optax.chain(
        optax.chain(optax.identity(), optax.scale(0.5)),
        optax.chain(optax.chain(optax.scale_by_schedule(Ramp())), optax.scale(-2.0)),
    ),
    "named chain": lambda: optax.named_chain(
        ("clip", optax.zero_nans()), ("sgd", optax.sgd(SCHEDULES["cosine"]()))
    ),
    "inject": lambda: optax.inject_hyperparams(optax.sgd)(0.1),
    "inject schedule": lambda: optax.inject_hyperparams(optax.sgd)(Ramp()),
    "inject of one's own": lambda: optax.inject_hyperparams(
        lambda rate, factor: optax.chain(optax.scale(factor), optax.sgd(rate))
    )(rate=SCHEDULES["cosine"](), factor=0.5),
    "inject chain": lambda: optax.chain(
        optax.clip(1e6), optax.inject_hyperparams(optax.sgd)(Ramp())
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale(0.5), mask),
        optax.masked(optax.scale_by_schedule(Ramp()), mask),
        optax.sgd(0.1),
    ),
    "masked tree": lambda: optax.chain(
        optax.masked(optax.scale(0.5), {"a": True, "b": False, "e": True}),
        optax.sgd(0.1),
    ),
    "freeze": lambda: optax.chain(
        optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask)
    ),
    "partition": lambda: optax.partition(
        {"left": optax.sgd(0.1), "right": optax.sgd(Ramp())}, by_first_letter
    ),
    "partition tree": lambda: optax.partition(
        {0: optax.sgd(0.1), 1: optax.set_to_zero()}, {"a": 0, "b": 1, "e": 0}
    ),
    "own partition": lambda: vn.partition(
        {"left": optax.sgd(0.1), "right": optax.sgd(Ramp())}, by_first_letter
    ),
    "map": lambda: vn.map_optimisers(
        tree(), {("a", "b"): optax.sgd(0.1), "e": optax.sgd(Ramp())}
    )[0],
    "map, some frozen": lambda: vn.map_optimisers(tree(), {"a": optax.sgd(0.1)})[0],
    "if finite": lambda: optax.apply_if_finite(optax.sgd(Ramp()), 3),
    "flatten": lambda: optax.flatten(optax.chain(optax.clip(1e6), optax.sgd(Ramp()))),
    "precondition": lambda: optax.chain(
        vn.precondition(jax.tree.map(jnp.ones_like, tree())), optax.sgd(0.1)
    ),
    "rules": lambda: vn.ParamOptimiser(
        {
            "a": optax.sgd(0.1),
            ("b.c", "b.d"): vn.window(optax.sgd(Ramp()), 1, 6),
            "e": optax.sgd(SCHEDULES["piecewise"]()),
        }
    ),
    "rules, default, first, scale": lambda: vn.ParamOptimiser(
        {"e": optax.sgd(Ramp()), "b.d": optax.sgd(0.01)},
        default=optax.sgd(SCHEDULES["cosine"]()),
        first=optax.chain(optax.clip(1e6), optax.scale(0.5)),
    ).with_scale({"b.d": 0.25}),
    "rules in chain": lambda: optax.chain(
        optax.clip(1e6),
        vn.ParamOptimiser({"a": optax.sgd(0.1), "b": None}, default=optax.sgd(Ramp())),
        optax.scale(0.5),
    ),
    "rules in window": lambda: vn.window(
        vn.ParamOptimiser({"**": optax.sgd(Ramp())}).with_scale({"**": 3}), 2
    ),
    "masked rule": lambda: vn.ParamOptimiser(
        {
            ("a", "e"): optax.chain(optax.masked(optax.scale(0.5), mask)),
            "b": optax.sgd(0.2),
        },
        first=optax.scale(-0.1),
    ),
} | {name: lambda make=make: optax.sgd(make()) for name, make in SCHEDULES.items()}
"""Without momentum: the update is the gradient times the rate."""


walk_of_optimisers = functools.cache(lambda: walked(OPTIMISERS, 6))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_next_update_is_the_gradient_times_the_rate(name):
    for steps in (0, 1, 3, 6):
        trainer, seen = walk_of_optimisers()[steps][name]
        told = trainer.learning_rates()
        assert tuple(told) == NAMES
        for path, rate in told.items():
            assert type(rate) is float
            np.testing.assert_allclose(seen[path], rate, rtol=1e-5, atol=1e-7)


def test_a_step_goes_as_far_as_the_rates_tell():
    trainer = Pull(tree(), OPTIMISERS["rules, default, first, scale"]())
    after, info = trainer.step(0.0)
    assert info.accepted
    told = trainer.learning_rates()
    move = lambda old, new: np.asarray(new) - np.asarray(old)
    for path, seen in multiple(jax.tree.map(move, tree(), after.model)).items():
        np.testing.assert_allclose(seen, told[path], rtol=1e-5)


def test_the_rate_of_one_that_was_fitted_is_that_of_its_count():
    schedule = optax.cosine_decay_schedule(0.1, 50)
    trainer = LineFit(line(), optax.adam(schedule))
    trainer = trainer.fit(line_batch(), 20).trainer
    told = trainer.learning_rates()
    np.testing.assert_allclose(list(told.values()), schedule(20), rtol=1e-12)
    assert tuple(told) == ("slope", "offset")


def test_a_hyperparameter_that_was_set_by_hand():
    trainer = after(optax.inject_hyperparams(optax.adam)(0.1), 2)
    assert trainer.learning_rates()["a"] == 0.1
    where = lambda t: t.opt_state.hyperparams["learning_rate"]
    trainer = eqx.tree_at(where, trainer, jnp.asarray(0.025))
    assert trainer.learning_rates() == dict.fromkeys(NAMES, 0.025)


def test_a_rate_that_was_replaced():
    trainer = after(optax.adam(0.1), 1).replace(optimiser=optax.adam(0.2))
    np.testing.assert_allclose(list(trainer.learning_rates().values()), 0.2)


ADAPTIVE = {
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, mask=mask),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "lion": optax.lion,
    "lars": optax.lars,
    "lamb": optax.lamb,
    "adafactor": optax.adafactor,
    "clipped": lambda rate: optax.chain(optax.clip(0.1), optax.adam(rate)),
}


@functools.cache
def walk_of_adaptive():
    schedule = SCHEDULES["warm-up cosine"]()
    makers = {
        name: functools.partial(make, schedule) for name, make in ADAPTIVE.items()
    }
    return schedule, walked(makers, 3)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_rule_has_the_rate_of_its_schedule(name):
    schedule, walk = walk_of_adaptive()
    for steps in (0, 3):
        expected = dict.fromkeys(NAMES, float(schedule(steps)))
        trainer, _ = walk[steps][name]
        assert trainer.learning_rates() == pytest.approx(expected, rel=1e-6)


def test_what_adam_divides_out_is_not_counted():
    """The updates are the same to rounding, and so are the rates."""
    scaled = lambda factor, **of: (
        lambda: vn.ParamOptimiser(
            {"**": optax.adam(0.1, **of)}, first=optax.scale(factor)
        )
    )
    plain = lambda: vn.ParamOptimiser({"**": optax.adam(0.1, eps=0.0)})
    makers = {"plain": plain, "scaled": scaled(0.5, eps=0.0), "uphill": scaled(-2.0)}
    walk = walked(makers, 2)
    for at in (walk[0], walk[2]):
        (plain, one), (scaled, other) = at["plain"], at["scaled"]
        assert plain.learning_rates() == scaled.learning_rates()
        for path, ratio in one.items():
            np.testing.assert_allclose(ratio, other[path], rtol=1e-5)
    uphill, seen = walk[0]["uphill"]
    assert uphill.learning_rates()["a"] == pytest.approx(-0.1)
    assert np.all(seen["a"] < 0)


def own():
    """Something of the user's own, which doubles what it is given."""
    double = lambda updates, params: jax.tree.map(lambda u: 2 * u, updates)
    return optax.stateless(double)


UNKNOWN = {
    "a line search": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(
        optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)
    ),
    "no rate": lambda: optax.scale_by_adam(),
    "nothing": lambda: optax.identity(),
    "the user's own": own,
    "the user's own in a chain": lambda: optax.chain(own(), optax.sgd(0.1)),
    "the user's own inside": lambda: vn.window(optax.chain(optax.sgd(0.1), own())),
    "Polyak's": lambda: optax.polyak_sgd(0.1),
    "on a plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau()
    ),
    "accumulated": lambda: optax.MultiSteps(
        optax.sgd(0.1), 3
    ).gradient_transformation(),
    "a rate per element": lambda: optax.scale_by_learning_rate(jnp.ones(3)),
}
"""What has no rate that could be told."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_there_is_none_where_none_can_be_told(name):
    told = Pull(tree(), UNKNOWN[name]()).learning_rates()
    assert told == dict.fromkeys(NAMES)
    rules = {"a": UNKNOWN[name](), "b": optax.sgd(0.1)}
    told = Pull(tree(), vn.ParamOptimiser(rules)).learning_rates()
    assert told == {"a": None, "b.c": pytest.approx(0.1), "b.d": pytest.approx(0.1)}


def test_what_a_name_alone_says_is_not_believed():
    """A function that looks like Optax's own, by its name and its module."""

    def update_fn(updates, state, params=None):
        return jax.tree.map(lambda u: -3.0 * u, updates), state

    real = optax.scale(-0.1)
    update_fn.__module__ = real.update.__module__
    update_fn.__qualname__ = real.update.__qualname__
    fake = optax.GradientTransformation(real.init, update_fn)
    assert Pull(tree(), fake).learning_rates() == dict.fromkeys(NAMES)


WHY_NOT = {
    "rprop": "the rate is that of the first step; each element has its own since",
    "lbfgs": "a line search comes after the rate",
    "cocob": "a wager comes after the rate",
    "dadapt_adamw": "the rate is multiplied by an estimate of the distance",
    "dog": "the rate is multiplied by an estimate of the distance",
    "dowg": "the rate is multiplied by an estimate of the distance",
    "dpsgd": "it has gradients of each example, which no trainer has",
    "galore": "the gradient is projected by what is not known here",
    "madgrad": "the rate is inside, under a square root",
    "momo": "the rate is the largest that it may take",
    "momo_adam": "the rate is the largest that it may take",
    "prodigy": "the rate is multiplied by an estimate of the distance",
    "schedule_free": "what is updated is an average of what has the rate",
    "schedule_free_adamw": "what is updated is an average of what has the rate",
    "schedule_free_sgd": "what is updated is an average of what has the rate",
    "sophia": "it asks for a function that no trainer gives",
}


def aliases():
    found = {}
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            is_public = inspect.isfunction(value) and not name.startswith("_")
            if is_public and "learning_rate" in inspect.signature(value).parameters:
                found[name] = value
    return found


NO_ALIASES = {"scale_by_learning_rate", "scale_by_madgrad", "scale_by_rprop"}
NEEDS = {
    "base_optimizer": optax.sgd(0.1),
    "key": 0,
    "l2_norm_clip": 1.0,
    "noise_multiplier": 1.0,
}


def build(name, rate):
    alias = aliases()[name]
    needed = inspect.signature(alias).parameters
    options = {key: value for key, value in NEEDS.items() if key in needed}
    if "key" not in needed and "seed" in needed:
        options["seed"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return alias(learning_rate=rate, **options)


@pytest.mark.parametrize("name", sorted(aliases().keys() - NO_ALIASES))
def test_an_alias_has_the_rate_it_was_made_with_or_none(name):
    trainer = Pull(tree(), build(name, 0.0123))
    told = trainer.learning_rates()
    if name in WHY_NOT:
        assert told == dict.fromkeys(NAMES)
        return
    rate = 0.0123
    if name == "fromage":  # Its updates are shortened to keep the norm.
        rate /= (1 + rate**2) ** 0.5
    assert told == pytest.approx(dict.fromkeys(NAMES, rate), rel=1e-6)


SEVERAL = ("adam", "adadelta", "novograd", "optimistic_adam", "yogi", "radam")


RATES = (0.0123, 0.0246)


@functools.cache
def first_of_several(rate):
    """What each does first; the program is one for all rates."""
    return walked({name: functools.partial(build, name, rate) for name in SEVERAL}, 0)


@pytest.mark.parametrize("name", SEVERAL)
def test_an_update_of_an_alias_is_proportional_to_what_is_told(name):
    seen = []
    for rate in RATES:
        trainer, ratios = first_of_several(rate)[0][name]
        told = trainer.learning_rates()
        seen.append({path: ratios[path] / told[path] for path in NAMES})
    for path in NAMES:
        np.testing.assert_allclose(seen[0][path], seen[1][path], rtol=1e-3)


def test_in_a_latent_space_the_rate_is_that_of_its_coordinates():
    batch = gaussian_batch()
    trainer = GaussianFit(gaussian()).whiten(batch, optimiser=optax.adam(Ramp()))
    trainer, _ = trainer.step(batch)
    told = trainer.learning_rates()
    assert told == dict.fromkeys(("mean", "std", "power"), pytest.approx(0.02))


def test_block_by_block_the_rate_is_that_of_the_rule():
    batch = gaussian_batch()
    rules = {("mean", "power"): optax.sgd(Ramp()), "std": optax.sgd(0.5)}
    trainer = GaussianFit(gaussian(), vn.ParamOptimiser(rules))
    trainer = trainer.whiten(batch, blocks=rules)
    trainer, _ = trainer.step(batch)
    told = trainer.learning_rates()
    assert tuple(told) == ("mean", "std", "power")
    assert list(told.values()) == pytest.approx([0.02, 0.5, 0.02])


def test_without_an_optimiser_there_are_none_to_tell():
    with pytest.raises(ValueError, match=r"`LineFit` has no optimiser"):
        LineFit(line()).learning_rates()


def test_it_changes_nothing_and_compiles_nothing_of_the_fit():
    trainer = LineFit(line(), optax.adam(optax.cosine_decay_schedule(0.1, 9)))
    first, info = trainer.step(line_batch())
    trainer.learning_rates()
    again, same = trainer.step(line_batch())
    assert info.loss == same.loss
    assert first.learning_rates() == again.learning_rates()
