"""Rates and other numbers that live in an optimiser's state: what the user sets wins.

The oracle is stochastic gradient descent with momentum, in three lines of NumPy.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import inside
import vernal as vn
from models import same

START = np.asarray([3.0, -1.0])
FAR = 1e9


class Bowl(vn.Trainer):
    """Half the squares of every parameter: the gradient is the parameter."""

    def loss(self, model, batch):
        leaves = jax.tree.leaves(model)
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in leaves) + 0 * batch


def sgd(rate=0.1, momentum=0.5):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)


def tree(dtype=np.float64):
    return {"a": jnp.asarray(START[0], dtype), "b": {"c": jnp.asarray(START[1], dtype)}}


def nested(**of):
    """One in another: what acts is the inner one."""
    make = optax.inject_hyperparams(lambda rate, momentum: sgd(rate, momentum))
    return make(of.get("rate", 0.1), of.get("momentum", 0.5))


def every(model):
    return jax.tree.map(lambda _: True, model)


NESTS = {
    "plain": sgd,
    "named chain": lambda **of: optax.named_chain(
        ("clip", optax.clip(FAR)), ("x", sgd(**of))
    ),
    "masked": lambda **of: optax.masked(sgd(**of), every),
    "finite": lambda **of: optax.apply_if_finite(sgd(**of), 3),
    "inject in inject": nested,
    "optax.partition": lambda **of: optax.partition(
        {"x": sgd(**of)}, lambda p: jax.tree.map(lambda _: "x", p)
    ),
    "vn.partition": lambda **of: vn.partition(
        {"x": sgd(**of)}, lambda p: jax.tree.map(lambda _: "x", p)
    ),
    "window": lambda **of: vn.window(sgd(**of)),
    "rules": lambda **of: vn.ParamOptimiser({"a": sgd(**of), "b": sgd(**of)}),
    "tuple rule": lambda **of: vn.ParamOptimiser({("a", "b.c"): sgd(**of)}),
    "default": lambda **of: vn.ParamOptimiser({}, default=sgd(**of)),
    "first": lambda **of: vn.ParamOptimiser(
        {}, first=sgd(**of), default=optax.identity()
    ),
    "window in a rule": lambda **of: vn.ParamOptimiser(
        {"**": optax.chain(vn.window(sgd(**of)), optax.clip(FAR))}
    ),
    "rule in a chain": lambda **of: optax.chain(
        vn.ParamOptimiser({"a": sgd(**of)}, default=sgd(**of)), optax.clip(FAR)
    ),
}


def by_hand(*phases):
    """Goes some steps with each pair of a rate and a momentum, moments kept."""
    point, trace = START.copy(), np.zeros(2)
    for steps, rate, momentum in phases:
        for _ in range(steps):
            trace = momentum * trace + point
            point = point - rate * trace
    return point


def fit(trainer, steps, **options):
    return trainer.fit(0.0, steps, **options).trainer


def walk(trainer, steps):
    """The same by single steps, which are smaller programs."""
    for _ in range(steps):
        trainer, _ = trainer.step(0.0)
    return trainer


def values(trainer):
    return np.asarray(jax.tree.leaves(trainer.model))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fit.vernal"


def replaced(trainer, file):
    """Gives the trainer another optimiser."""
    return lambda new: trainer.replace(optimiser=new)


def loaded(trainer, file):
    """Saves the trainer, and loads it into one that has another optimiser."""
    vn.save(file, trainer)
    return lambda new: vn.load(file, Bowl(tree(), new))


# Each kind of nest that Optax has, and one of vernal.
OF_OPTAX = ("plain", "named chain", "masked", "finite", "inject in inject")
OF_OPTAX += ("optax.partition", "rules")
# In a file a state is the same tree: some of each kind.
LOADED = ("plain", "named chain", "masked", "inject in inject", "vn.partition")
LOADED += ("window", "rules", "default", "rule in a chain")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(
            name, replaced, marks=pytest.mark.seams if name in OF_OPTAX else ()
        )
        for name in NESTS
    ]
    + [(name, loaded) for name in LOADED],
)
def test_the_script_has_its_rates(name, change, file):
    make = NESTS[name]
    trainer = walk(Bowl(tree(), make()), 3)
    np.testing.assert_allclose(values(trainer), by_hand((3, 0.1, 0.5)))
    changed = change(trainer, file)
    for rate, momentum in ((0.2, 0.5), (0.05, 0.25)):
        new = changed(make(rate=rate, momentum=momentum))
        # Nothing is compiled anew for it, and the moments go on.
        assert vn.explain_retrace(trainer, new).startswith("Nothing differs")
        if name not in ("inject in inject", "first"):
            told = new.learning_rates().values()
            np.testing.assert_allclose(list(told), rate)
        expected = by_hand((3, 0.1, 0.5), (2, rate, momentum))
        np.testing.assert_allclose(values(walk(new, 2)), expected)
    assert same(changed(make())._progress, trainer._progress)
    back = change(new, file)(make())
    np.testing.assert_allclose(values(walk(back, 2)), by_hand((5, 0.1, 0.5)))


def test_a_resumed_fit_has_the_rates_of_the_script(tmp_path):
    make, checkpoints = NESTS["window in a rule"], vn.Checkpoints(tmp_path / "run")
    fit(Bowl(tree(), make()), 3, checkpoint=checkpoints)
    for steps, rate in ((5, 0.2), (6, 0.2), (7, 0.1)):
        trainer = fit(Bowl(tree(), make(rate=rate)), steps, checkpoint=checkpoints)
    phases = (3, 0.1, 0.5), (3, 0.2, 0.5), (1, 0.1, 0.5)
    np.testing.assert_allclose(values(trainer), by_hand(*phases))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_both_precisions(dtype, file):
    rate, trainer = np.asarray(0.3, dtype), Bowl(tree(dtype), sgd())
    for change in (replaced, loaded):
        start = fit(trainer, 2)
        if change is loaded:
            vn.save(file, start)
            new = vn.load(file, Bowl(tree(dtype), sgd(rate=0.3)))
        else:
            new = start.replace(optimiser=sgd(rate=0.3))
        found = new.opt_state.hyperparams["learning_rate"]
        assert found == rate
        assert found.dtype == dtype
        assert vn.explain_retrace(start, new).startswith("Nothing differs")


# Every hyperparameter, and what of others' states a user sets.

CHANGES = {
    **{
        f"adamw {name}": (
            optax.inject_hyperparams(optax.adamw),
            {"learning_rate": 0.1},
            {"learning_rate": 0.1, name: 0.0625},
        )
        for name in ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay")
    },
    "clip": (
        optax.inject_hyperparams(lambda norm: optax.clip_by_global_norm(norm)),
        {"norm": 1.0},
        {"norm": 0.5},
    ),
    "integer": (
        optax.inject_hyperparams(optax.sgd),
        {"learning_rate": 1},
        {"learning_rate": 2},
    ),
    "integer, then float": (
        optax.inject_hyperparams(optax.sgd),
        {"learning_rate": 1, "momentum": 0.5},
        {"learning_rate": 0.5, "momentum": 0.5},
    ),
    "array": (
        optax.inject_hyperparams(optax.sgd),
        {"learning_rate": jnp.asarray(0.1)},
        {"learning_rate": jnp.asarray(0.2)},
    ),
    "dtype of its own": (
        optax.inject_hyperparams(optax.sgd, hyperparam_dtype=jnp.float32),
        {"learning_rate": 0.1},
        {"learning_rate": 0.2},
    ),
    "beside a schedule": (
        optax.inject_hyperparams(optax.sgd),
        {"learning_rate": optax.linear_schedule(0.1, 0.0, 9), "momentum": 0.5},
        {"learning_rate": optax.linear_schedule(0.2, 0.0, 9), "momentum": 0.25},
    ),
    "seed": (
        lambda seed: optax.chain(optax.add_noise(0.1, 0.5, seed), optax.sgd(0.1)),
        {"seed": 1},
        {"seed": 2},
    ),
    "key": (
        lambda key: optax.chain(optax.add_noise(0.1, 0.5, key), optax.sgd(0.1)),
        {"key": jax.random.key(1)},
        {"key": jax.random.key(2)},
    ),
    "schedule-free": (
        lambda b1: optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1),
        {"b1": 0.9},
        {"b1": 0.8},
    ),
    "prodigy": (optax.contrib.prodigy, {"estim_lr0": 1e-6}, {"estim_lr0": 1e-3}),
}
# The others of Optax's states in which a user sets a number.
MORE = {
    "dadapt": (
        optax.contrib.dadapt_adamw,
        {"estim_lr0": 1e-6},
        {"estim_lr0": 1e-3},
    ),
    "momo": (
        lambda bound: optax.contrib.momo(0.1, lower_bound=bound),
        {"bound": 0.0},
        {"bound": -1.0},
    ),
    "momo adam": (
        lambda bound: optax.contrib.momo_adam(0.1, lower_bound=bound),
        {"bound": 0.0},
        {"bound": -1.0},
    ),
    # It takes the gradient of each datum, which a fit does not have.
    "private": (
        lambda seed: optax.contrib.differentially_private_aggregate(1.0, 0.1, seed),
        {"seed": 1},
        {"seed": 2},
    ),
}


def by_key(trainer):
    leaves = jax.tree_util.tree_leaves_with_path(trainer.opt_state)
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", CHANGES)
def test_every_number_that_a_user_sets(name):
    """What differs between two first states at one point is what the user set."""
    make, old, new = CHANGES[name]
    trainer = walk(Bowl(tree(), make(**old)), 2)
    kept, found = by_key(trainer), by_key(trainer.replace(optimiser=make(**new)))
    before, now = (by_key(Bowl(trainer.model, make(**of))) for of in (old, new))
    changed = [key for key in now if not same(before[key], now[key])]
    # A hyperparameter with a schedule is set by each step.
    scheduled = [f"['{key}']" for key, value in new.items() if callable(value)]
    changed = [key for key in changed if not key.endswith(tuple(scheduled))]
    assert changed
    for key in kept:
        assert same(found[key], (now if key in changed else kept)[key]), key
    _, info = trainer.replace(optimiser=make(**new)).step(0.0)
    assert info.accepted


@pytest.mark.loose_dtypes
def test_a_schedule_goes_on_at_its_count():
    schedule = lambda top: optax.linear_schedule(top, 0.0, 10)
    trainer = walk(Bowl(tree(), sgd(schedule(0.1))), 5)
    new = trainer.replace(optimiser=sgd(schedule(0.2)))
    np.testing.assert_allclose([*new.learning_rates().values()], 0.1)
    np.testing.assert_allclose([*trainer.learning_rates().values()], 0.05)


# What changed on the way stays, where the script did not change it.


def set_rate(trainer, value):
    where = lambda t: t.opt_state.hyperparams["learning_rate"]
    old = where(trainer)
    return eqx.tree_at(where, trainer, jnp.full_like(old, value))


@pytest.mark.parametrize("change", [replaced, loaded])
def test_a_rate_that_was_set_by_hand_stays(change, file):
    trainer = set_rate(fit(Bowl(tree(), sgd()), 2), 0.025)
    changed = change(trainer, file)
    assert same(changed(sgd())._progress, trainer._progress)
    new = changed(sgd(momentum=0.25))
    assert new.opt_state.hyperparams == {"learning_rate": 0.025, "momentum": 0.25}
    new = changed(sgd(rate=0.2))
    assert new.opt_state.hyperparams == {"learning_rate": 0.2, "momentum": 0.5}


@pytest.mark.parametrize("go_on", [fit, walk])
def test_a_number_may_take_the_place_of_a_rate(go_on):
    """As in Optax's own examples: `state.hyperparams["learning_rate"] = 0.025`."""
    trainer = go_on(Bowl(tree(), sgd()), 4)
    trainer.opt_state.hyperparams["learning_rate"] = 0.025
    trainer = go_on(trainer, 3)
    np.testing.assert_allclose(values(trainer), by_hand((4, 0.1, 0.5), (3, 0.025, 0.5)))


def lowered(trainer, history):
    """Halves the rate at step 4 by hand, and at step 8 by another optimiser."""
    if int(trainer.step_count) == 4:
        return set_rate(trainer, 0.05)
    if int(trainer.step_count) == 8:
        return trainer.replace(optimiser=sgd(rate=0.025))
    return None


LOWERED = {"callback": lowered, "chunk": 2}
whole_lowered = functools.cache(lambda: fit(Bowl(tree(), sgd()), 12, **LOWERED))


# Before either change, between the two, and after both.
@pytest.mark.parametrize("ends", [3, 5, 9])
def test_a_callback_that_lowers_a_rate_is_heeded_after_a_resumption(ends, tmp_path):
    whole = whole_lowered()
    checkpoints = vn.Checkpoints(tmp_path / "run", 1)
    fit(Bowl(tree(), sgd()), ends - ends % 2, checkpoint=checkpoints, **LOWERED)
    parts = fit(Bowl(tree(), sgd()), 12, checkpoint=checkpoints, **LOWERED)
    assert same(parts._progress, whole._progress)
    np.testing.assert_allclose(
        values(whole), by_hand((4, 0.1, 0.5), (4, 0.05, 0.5), (4, 0.025, 0.5))
    )


def test_a_file_without_what_the_optimiser_began_with(file, monkeypatch):
    trainer = fit(Bowl(tree(), sgd()), 2)
    with monkeypatch.context() as patch:
        # A name of it would lead to the function.
        patch.setattr(inside.save, "initial_hyperparams", lambda trainer: {})
        vn.save(file, trainer)
    assert same(vn.load(file, Bowl(tree(), sgd()))._progress, trainer._progress)
    # There is no telling what it began with: the rate of the file stays.
    other = vn.load(file, Bowl(tree(), sgd(rate=0.2)))
    assert other.opt_state.hyperparams["learning_rate"] == 0.1


def test_moments_that_start_anew_have_the_rates_of_the_script(file):
    trainer = fit(Bowl(tree(), sgd()), 2)
    vn.save(file, trainer)
    like = Bowl(tree(), sgd(rate=0.2))
    new = vn.load(file, like, reset="opt_state")
    assert same(new.opt_state, like.opt_state)


# Many


def stacked(**of):
    make = lambda start: Bowl({"a": start, "b": {"c": -start}}, sgd(**of))
    return eqx.filter_vmap(make)(np.arange(1.0, 4.0))


def test_a_stacked_trainer_has_the_rates_of_the_script():
    trainers = vn.fit_many(stacked(), np.zeros(()), 3).trainers
    new = trainers.replace(optimiser=sgd(rate=0.2))
    result = vn.fit_many(new, np.zeros(()), 2)
    expected = by_hand((3, 0.1, 0.5), (2, 0.2, 0.5))[0] / START[0]
    scale = np.arange(1.0, 4.0)
    np.testing.assert_allclose(result.trainers.params["a"], expected * scale)
    # The same, member by member; another rate for each.
    replace = lambda t, rate: t.replace(optimiser=sgd(rate=rate))
    new = eqx.filter_vmap(replace)(trainers, jnp.asarray([0.1, 0.2, 0.3]))
    assert new.opt_state.hyperparams["learning_rate"].tolist() == [0.1, 0.2, 0.3]
    assert new.opt_state.hyperparams["momentum"].tolist() == [0.5] * 3
    # Another policy, too.
    patient = trainers.replace(nan_policy=vn.StopAfter(3))
    assert isinstance(patient.nan_policy, vn.StopAfter)


def test_a_sweep_of_any_hyperparameter():
    sweep = [Bowl(tree(), sgd(momentum=m)) for m in (0.0, 0.25, 0.5)]
    result = vn.fit_many(sweep, np.zeros(()), 4)
    for index, momentum in enumerate((0.0, 0.25, 0.5)):
        expected = by_hand((4, 0.1, momentum))
        np.testing.assert_allclose(values(result.trainer(index)), expected)


def test_many_that_are_resumed(tmp_path):
    checkpoints = vn.Checkpoints(tmp_path / "run", 1)
    options = {"checkpoint": checkpoints}
    for steps, rate in ((3, 0.1), (5, 0.2)):
        make = lambda start, r=rate: Bowl({"a": start, "b": {"c": -start}}, sgd(r))
        trainers = [make(jnp.asarray(start)) for start in (1.0, 2.0)]
        result = vn.fit_many(trainers, np.zeros(()), steps, **options)
    expected = by_hand((3, 0.1, 0.5), (2, 0.2, 0.5))[0] / START[0]
    found = result.trainers.params["a"]
    np.testing.assert_allclose(found, expected * np.asarray([1.0, 2.0]))


RULES = {
    "no rule": lambda tx: tx,
    "a rule": lambda tx: vn.ParamOptimiser({"a": tx}, default=optax.sgd(0.1)),
    # To which an array of all members would look like another one.
    "by shape": lambda tx: vn.ParamOptimiser(
        {lambda path, leaf: jnp.ndim(leaf) == 0: tx}, default=optax.adam(0.1)
    ),
}


def members(rule, make, of):
    start = lambda a: Bowl({"a": a, "b": {"c": a}}, RULES[rule](make(**of)))
    return eqx.filter_vmap(start)(np.arange(1.0, 4.0))


initial_hyperparams = inside.save.initial_hyperparams


def shared(trainer):
    """What its optimiser began with, as earlier files have it: shared numbers once."""
    begun = initial_hyperparams(trainer)
    for path, leaf in begun.items():
        kind = leaf.kind._replace(shape=leaf.kind.shape[1:])
        begun[path] = leaf._replace(kind=kind, array=leaf.array[0])
    return begun


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "a rule") for name in (*CHANGES, *MORE) if "adamw" not in name]
    + [("adamw b1", rule) for rule in RULES],
)
def test_members_have_the_numbers_of_the_script(name, rule, file, monkeypatch):
    make, old, new = (CHANGES | MORE)[name]
    was, like = members(rule, make, old), members(rule, make, new)
    # A hyperparameter with a schedule is set by each step.
    scheduled = [f"['{key}']" for key, value in new.items() if callable(value)]
    for is_old in (False, True):
        if is_old:
            monkeypatch.setattr(inside.save, "initial_hyperparams", shared)
        vn.save(file, was)
        assert same(vn.load(file, was)._progress, was._progress)
        found, expected = by_key(vn.load(file, like)), by_key(like)
        for key in expected:
            if not key.endswith(tuple(scheduled)):
                assert same(found[key], expected[key]), key


@pytest.mark.loose_dtypes
def test_many_with_every_such_state_are_resumed(tmp_path):
    # One of each kind of state.
    kinds = ("adamw b1", "beside a schedule", "seed", "key", "schedule-free", "prodigy")
    changes = {k: (CHANGES | MORE)[k] for k in (*kinds, "dadapt", "momo", "momo adam")}
    rules = {name: make(**old) for name, (make, old, _) in changes.items()}
    make = lambda start: Bowl(
        dict.fromkeys(rules, jnp.asarray(start)), vn.ParamOptimiser(rules)
    )
    trainers = [make(1.0), make(2.0)]
    whole = vn.fit_many(trainers, np.zeros(()), 4).trainers
    for steps in (2, 4):
        checkpoints = vn.Checkpoints(tmp_path / "run", 1)
        result = vn.fit_many(trainers, np.zeros(()), steps, checkpoint=checkpoints)
    assert same(result.trainers._progress, whole._progress)
    # They are all those that the library knows of, but for two.
    is_known = lambda node: type(node) in inside.opt_state._USER_SET
    nodes = jax.tree.leaves(whole.opt_state, is_leaf=is_known)
    left = {*inside.opt_state._USER_SET} - {*map(type, nodes)}
    private = optax.contrib.DifferentiallyPrivateAggregateState
    assert left <= {private, optax.InjectHyperparamsState}
