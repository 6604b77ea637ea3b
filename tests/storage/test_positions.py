"""What is saved at a position is not taken for that of another parameter.

The oracle is the fit that was saved, which goes on.
"""

import functools
import json
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import same

START = {name: jnp.asarray(1.0) for name in "abc"}
STEPS = 12
SGD = optax.sgd(0.1)


class Bowl(vn.Trainer):
    def loss(self, model, batch):
        return sum((leaf - batch) ** 2 for leaf in model.values())


def waiting(start):
    """Its state is two counts, which look alike in all rules."""
    return vn.window(optax.sgd(optax.linear_schedule(0.1, 0.0, 20)), start=start)


def patient(patience):
    plateau = optax.contrib.reduce_on_plateau(patience=patience, factor=0.1, rtol=0.5)
    return optax.chain(optax.sgd(0.05), plateau)


def noisy(scale):
    return optax.chain(
        optax.add_noise(scale, 0.5, key=jax.random.key(1)), optax.sgd(0.1)
    )


def by_rules(rules, **options):
    return lambda: vn.ParamOptimiser(rules(), **options)


A, B = ("a", "b"), ("b", "c")
# The rules before and now.
MOVED = {
    "counts": (
        by_rules(lambda: {"a": waiting(2), "b": waiting(5), "c": waiting(9)}),
        by_rules(lambda: {"c": waiting(9), "a": waiting(2), "b": waiting(5)}),
    ),
    "groups": (
        by_rules(lambda: {A: waiting(2), "c": waiting(9)}),
        by_rules(lambda: {"c": waiting(9), ("b", "a"): waiting(2)}),
    ),
    "a plateau": (
        by_rules(lambda: {"a": patient(1), B: patient(90)}),
        by_rules(lambda: {B: patient(90), "a": patient(1)}),
    ),
    "hyperparameters": (
        by_rules(
            lambda: {
                name: optax.inject_hyperparams(optax.sgd)(rate)
                for name, rate in zip("abc", (0.1, 0.01, 0.001), strict=True)
            }
        ),
        by_rules(
            lambda: {
                name: optax.inject_hyperparams(optax.sgd)(rate)
                for name, rate in zip("cab", (0.001, 0.1, 0.01), strict=True)
            }
        ),
    ),
    "a wrapper": (
        by_rules(
            lambda: {
                "a": optax.apply_if_finite(waiting(2), 3),
                B: optax.apply_if_finite(waiting(5), 3),
            }
        ),
        by_rules(
            lambda: {
                B: optax.apply_if_finite(waiting(5), 3),
                "a": optax.apply_if_finite(waiting(2), 3),
            }
        ),
    ),
    "keys": (
        by_rules(lambda: {"a": noisy(0.1), B: noisy(0.2)}),
        by_rules(lambda: {B: noisy(0.2), "a": noisy(0.1)}),
    ),
    "other kinds": (
        by_rules(lambda: {A: optax.adam(0.1), "c": optax.adamax(0.1)}),
        by_rules(lambda: {"c": optax.adamax(0.1), "*": optax.adam(0.1)}),
    ),
    "the default": (
        by_rules(lambda: {"a": waiting(2)}, default=waiting(9)),
        by_rules(lambda: {B: waiting(9)}, default=waiting(2)),
    ),
    "a frozen one before": (
        by_rules(lambda: {A: waiting(2)}),
        by_rules(lambda: {"c": None, A: waiting(2)}),
    ),
    "rules within a rule": (
        by_rules(lambda: {A: by_rules(lambda: {"*": waiting(2)})(), "c": waiting(9)}),
        by_rules(lambda: {"c": waiting(9), A: by_rules(lambda: {"*": waiting(2)})()}),
    ),
}


def in_chain(rules):
    return lambda: optax.chain(optax.clip(1e9), rules())


def within(first, second):
    inner = lambda: {first: waiting(2), second: waiting(5)}
    return by_rules(lambda: {A: by_rules(inner)(), "c": waiting(9)})


REGROUPED = {
    "another group": (
        by_rules(lambda: {A: waiting(2), "c": waiting(9)}),
        by_rules(lambda: {"a": waiting(2), B: waiting(9)}),
        "'opt_state.groups.0', the numbers of a rule for just 'a', 'b'.*: 'a'; 'b', ",
    ),
    "exchanged": (
        by_rules(lambda: {A: waiting(2), "c": waiting(9)}),
        by_rules(lambda: {B: waiting(2), "a": waiting(9)}),
        "the numbers of a rule for just 'a', 'b'. Here the rules are for: 'b', 'c'",
    ),
    "within a chain": (
        in_chain(MOVED["counts"][0]),
        in_chain(MOVED["counts"][1]),
        "'opt_state.1.groups.0', the numbers of a rule for just 'a'.* the order",
    ),
    "within a rule": (
        within("a", "b"),
        within("b", "a"),
        "'opt_state.groups.0.groups.0', the numbers of a rule for just 'a'",
    ),
    "other kinds": (
        by_rules(lambda: {A: optax.adam(0.1), "c": optax.adamax(0.1)}),
        by_rules(lambda: {"c": optax.adam(0.1), A: optax.adamax(0.1)}),
        "of the rule .*: of `scale_by_adam`, not of `scale_by_adamax`",
    ),
}


def moved(optimiser, folder=None, steps=STEPS):
    checkpoint = folder and vn.Checkpoints(folder)
    return Bowl(START, optimiser()).fit(2.0, steps, checkpoint=checkpoint).trainer


def aged(optimiser):
    """As after some steps, and each number of its state is another one."""
    trainer = Bowl(START, optimiser())
    leaves, tree = jax.tree.flatten(trainer.opt_state)
    for place, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, np.number):
            older = np.asarray(leaf) + np.asarray(place + 1, leaf.dtype)
            leaves[place] = jnp.asarray(older)
    state = jax.tree.unflatten(tree, leaves)
    return eqx.tree_at(lambda t: t.opt_state, trainer, state)


def many(optimiser, steps=STEPS):
    return vn.fit_many(
        [Bowl(START, optimiser())] * 2, jnp.asarray([2.0, 3.0]), steps, data_axis=0
    ).trainers


def two(trainer):
    """Two members that are alike, stacked."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trainer)


def reloaded(file, saved, like):
    vn.save(file, saved)
    return vn.load(file, like)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("case", MOVED)
def test_a_file_has_the_state_of_a_rule_where_replace_has_it(case, tmp_path):
    before, now = MOVED[case]
    trainer, file = aged(before), tmp_path / "file"
    found = reloaded(file, trainer, Bowl(START, now()))
    assert same(found.opt_state, trainer.replace(optimiser=now()).opt_state)
    # And back again, from a file that has the new order.
    again = reloaded(file, found, Bowl(START, before()))
    assert same(again.opt_state, trainer.opt_state)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("case", ["counts", "hyperparameters", "rules within a rule"])
def test_the_state_of_a_rule_follows_it(case, tmp_path):
    before, now = MOVED[case]
    trainer = moved(before, tmp_path / "steps")
    expected = trainer.fit(2.0, STEPS).trainer
    file, like = tmp_path / "file", Bowl(START, now())
    for found in (
        reloaded(file, trainer, like).fit(2.0, STEPS).trainer,
        trainer.replace(optimiser=now()).fit(2.0, STEPS).trainer,
        moved(now, tmp_path / "steps", 2 * STEPS),
    ):
        assert same(found.params, expected.params)
        assert found.learning_rates() == expected.learning_rates()


@pytest.mark.loose_dtypes
def test_so_does_that_of_many(tmp_path):
    before, now = MOVED["counts"]
    old, data = many(before), jnp.asarray([2.0, 3.0])
    found = reloaded(tmp_path / "file", old, many(now, 0))
    new, expected = (
        vn.fit_many(t, data, STEPS, data_axis=0).trainers for t in (found, old)
    )
    assert same(new.params, expected.params)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("case", REGROUPED)
def test_a_rule_of_others_is_refused(case, tmp_path):
    before, now, said = REGROUPED[case]
    trainer, like = moved(before, tmp_path / "steps"), Bowl(START, now())
    with pytest.raises(vn.MismatchError, match=said) as caught:
        reloaded(tmp_path / "file", trainer, like)
    assert '`reset="opt_state"`' in str(caught.value)
    with pytest.raises(vn.MismatchError, match=said):
        moved(now, tmp_path / "steps", 2 * STEPS)
    loaded = vn.load(tmp_path / "file", like, reset="opt_state")
    assert same(loaded.params, trainer.params)
    assert same(loaded.opt_state, like.opt_state)
    kept = trainer.replace(optimiser=now())
    assert kept.step_count == STEPS


@pytest.mark.loose_dtypes
def test_a_rate_that_a_callback_changed_goes_to_no_other_rule(tmp_path):
    def fitted(rules, steps, rate=None):
        def slow(trainer, history):
            return trainer.replace(optimiser=vn.ParamOptimiser({**rules, "a": rate}))

        checkpoint = vn.Checkpoints(tmp_path, every=5)
        trainer = Bowl(START, vn.ParamOptimiser(rules))
        callback = slow if rate else None
        return trainer.fit(2.0, steps, checkpoint=checkpoint, callback=callback).trainer

    rules = {"a": SGD, "b": SGD, "c": SGD}
    fitted(rules, 10, optax.sgd(0.05))
    moved = dict(reversed(rules.items()))
    with pytest.raises(vn.MismatchError, match=r"'optimiser.*the order that they had"):
        fitted(moved, 20)
    rates = fitted(rules, 20).learning_rates()
    assert {name: round(rate, 6) for name, rate in rates.items()} == {
        "a": 0.05,
        "b": 0.1,
        "c": 0.1,
    }


class Ab(eqx.Module):
    a: jax.Array
    b: jax.Array


class Ba(eqx.Module):
    b: jax.Array
    a: jax.Array


class Pair(vn.Trainer):
    def residuals(self, model, batch):
        # Its slope is not finite, which only that of `a` shows.
        edge = jnp.where(model.a > 1.05, jnp.sqrt(0 * model.a), 0.0)
        return jnp.stack([model.a - batch + edge, model.b - batch])


class Smooth(vn.Trainer):
    def residuals(self, model, batch):
        return jnp.stack([model.a - batch, model.a * model.b - 2 * batch])


MATRIX = {("a", "a"): 4.0, ("a", "b"): 1.0, ("b", "a"): 1.0, ("b", "b"): 2.0}


def pair(kind):
    return kind(a=jnp.asarray(1.0), b=jnp.asarray(1.0))


def fisher(params):
    names = vn.paths(params)
    return jnp.asarray([[MATRIX[row, column] for column in names] for row in names])


def times_fisher(params):
    apply = lambda tree: jnp.stack(jax.tree.leaves(tree)) @ fisher(params)
    return lambda tree: jax.tree.unflatten(jax.tree.structure(tree), [*apply(tree)])


PROJECTORS = {
    "one": lambda params: vn.EigenProjector.from_fisher(fisher(params), params),
    "blocks": lambda params: vn.EigenProjector.from_blocks(
        {"a": jnp.asarray([[4.0]]), "b": jnp.asarray([[2.0]])}, params
    ),
    "a joint block": lambda params: vn.EigenProjector.from_blocks(
        {("a", "b"): fisher(params)}, params
    ),
    "products": lambda params: vn.EigenProjector.from_matvec(
        times_fisher(params), params, rank=1, key=jax.random.key(0)
    ),
}


def projected(kind, name):
    trainer = Smooth(pair(kind), vn.ParamOptimiser({}, default=optax.adam(0.1)))
    projector = PROJECTORS[name](trainer.params)
    return trainer.reproject(
        projector, None if projector.has_names else optax.adam(0.1)
    )


SWAPPED = "'a' is there where 'b' is here, and a projector .* fields in the order"


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", PROJECTORS)
def test_a_projector_of_fields_in_another_order_is_refused(name, tmp_path):
    make = functools.cache(lambda kind: projected(kind, name))
    checkpoint = vn.Checkpoints(tmp_path / "steps")
    fitted = make(Ab).fit(2.0, 3, checkpoint=checkpoint).trainer
    saved = {
        "trainer": (fitted, make),
        "projector": (fitted.projector, lambda kind: make(kind).projector),
        "in a tree": ({"x": [fitted]}, lambda kind: {"x": [make(kind)]}),
        "many": (two(fitted), lambda kind: two(make(kind))),
    }
    for surface, (tree, like) in saved.items():
        vn.save(tmp_path / surface, tree)
        assert same(vn.load(tmp_path / surface, like(Ab)), tree)
        with pytest.raises(vn.MismatchError, match=SWAPPED):
            vn.load(tmp_path / surface, like(Ba))
    with pytest.raises(vn.MismatchError, match=SWAPPED):
        make(Ba).fit(2.0, 6, checkpoint=checkpoint)


@pytest.mark.loose_dtypes
def test_whitened_for_a_solver(tmp_path):
    whitened = lambda kind: Smooth(pair(kind)).whiten(2.0)
    vn.save(tmp_path / "file", whitened(Ab))
    with pytest.raises(vn.MismatchError, match=SWAPPED):
        vn.load(tmp_path / "file", whitened(Ba))


ELEMENTWISE = {
    "plain": lambda: optax.adam(0.1),
    "rules": by_rules(lambda: {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}),
    "a group": by_rules(lambda: {("a", "b"): optax.adam(0.1)}),
}


def counted(kind, optimiser):
    return Pair(pair(kind), optimiser(), nan_policy=vn.ZeroNans())


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_fields_in_another_order(name, tmp_path):
    """By name, all is as it was; so are the columns of what was not finite."""
    make = lambda kind: counted(kind, ELEMENTWISE[name])
    checkpoint = vn.Checkpoints(tmp_path / "steps")
    fitted = make(Ab).fit(2.0, 6, checkpoint=checkpoint).trainer
    report = fitted.nan_report()
    assert report["a"].total > report["b"].total == 0
    new = reloaded(tmp_path / "file", fitted, make(Ba))
    resumed = make(Ba).fit(2.0, 6, checkpoint=checkpoint).trainer
    for found in (new, resumed):
        assert found.nan_report() == report
        assert [found.params.a, found.params.b] == [fitted.params.a, fitted.params.b]
    stacked = reloaded(tmp_path / "file", two(fitted), two(make(Ba)))
    assert jax.tree.map(lambda x: x[1], stacked).nan_report() == report
    with pytest.raises(vn.MismatchError, match="the report of NaN has them by that"):
        reloaded(tmp_path / "file", [fitted], [make(Ba)])


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("is_ruled", [False, True])
def test_moments_in_one_vector_are_in_the_order_of_the_fields(is_ruled, tmp_path):
    flat = lambda: optax.flatten(optax.adam(0.1))
    optimiser = by_rules(lambda: {("a", "b"): flat()}) if is_ruled else flat
    make = lambda kind: Smooth(pair(kind), optimiser())
    checkpoint = vn.Checkpoints(tmp_path / "steps")
    fitted = make(Ab).fit(2.0, 3, checkpoint=checkpoint).trainer
    assert same(reloaded(tmp_path / "file", fitted, make(Ab)), fitted)
    said = "'a' is there where 'b' is here, and `optax.flatten` has"
    with pytest.raises(vn.MismatchError, match=said):
        vn.load(tmp_path / "file", make(Ba))
    with pytest.raises(vn.MismatchError, match=said):
        make(Ba).fit(2.0, 6, checkpoint=checkpoint)
    loaded = vn.load(tmp_path / "file", make(Ba), reset="opt_state")
    assert same(loaded.opt_state, make(Ba).opt_state)


def without_groups(file):
    """Rewrites a file as earlier versions wrote it."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["vernal.json"])
    del header["groups"]
    members["vernal.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.loose_dtypes
def test_files_of_before(tmp_path):
    """The order of the parameters is that of the leaves; groups are known by place."""
    before, _ = MOVED["counts"]
    file, trainer = tmp_path / "file", moved(before)
    vn.save(file, trainer)
    without_groups(file)
    assert same(vn.load(file, Bowl(START, before())), trainer)
    vn.save(file, projected(Ab, "one"))
    without_groups(file)
    with pytest.raises(vn.MismatchError, match=SWAPPED):
        vn.load(file, projected(Ba, "one"))


@pytest.mark.loose_dtypes
def test_rates_by_themselves(tmp_path):
    """Of another tree than a trainer, rates are in the file, too."""
    before, now = (
        vn.ParamOptimiser({name: optax.sgd(rate) for name, rate in rules.items()})
        for rules in ({"a": 0.1, "b": 0.01}, {"b": 0.01, "a": 0.1})
    )
    start = {"a": START["a"], "b": START["b"]}
    for wrapped in (lambda x: x, lambda x: [Bowl(start, x)]):
        old, new = map(wrapped, (before, now))
        assert same(reloaded(tmp_path / "file", old, old), old)
        with pytest.raises(
            vn.MismatchError, match=r"scales\.0', the numbers of a rule"
        ):
            reloaded(tmp_path / "file", old, new)
    written_otherwise = vn.ParamOptimiser({("a",): SGD, "b*": SGD})
    vn.save(tmp_path / "file", before)
    assert vn.load(tmp_path / "file", written_otherwise).name_of(1) == "b*"


@pytest.mark.parametrize("is_ruled", [True, False])
def test_without_a_state_any_optimiser_takes_over(is_ruled, tmp_path):
    optimisers = [vn.ParamOptimiser({"a": SGD, ("b", "c"): SGD}), SGD]
    old, new = optimisers if is_ruled else optimisers[::-1]
    trainer = moved(lambda: old)
    loaded = reloaded(tmp_path / "file", trainer, Bowl(START, new))
    assert same(loaded.params, trainer.params)


@pytest.mark.loose_dtypes
def test_a_state_by_itself(tmp_path):
    before, now = (make() for make in MOVED["counts"])
    state = before.init(START)
    vn.save(tmp_path / "file", (START, state))
    assert same(vn.load(tmp_path / "file", (START, state)), (START, state))
    with pytest.raises(
        vn.MismatchError, match=r"'1\.groups\.0', the numbers of a rule for just 'a'"
    ):
        vn.load(tmp_path / "file", (START, now.init(START)))
