"""`replace(optimiser=...)`: which leaves of the model are trained stays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import vernal as vn
from models import LineFit, line, line_batch, same

ADAM = optax.adam(0.1)
BOTH, ONE = ("slope", "offset"), ("slope",)


def rules(*names, **options):
    return vn.ParamOptimiser(dict.fromkeys(names, ADAM), **options)


# The arguments of a trainer that trains the slope, other rules, and what is said.
REFUSED = {
    "thawed": (rules(*ONE), {}, rules(*BOTH), "'offset', which is not trained"),
    "in a nested tuple": (
        rules(*ONE),
        {},
        vn.ParamOptimiser({("slope", ("offset",)): ADAM}),
        "'offset', which is not trained",
    ),
    "another one": (rules(*ONE), {}, rules("offset"), "no rule for 'slope'"),
    "frozen": (
        ADAM,
        {"train": ONE},
        vn.ParamOptimiser({"slope": None}),
        "no rule for 'slope'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_leaves_are_refused(case):
    optimiser, options, other, match = REFUSED[case]
    trainer = LineFit(line(), optimiser, **options)
    with pytest.raises(ValueError, match=match) as caught:
        trainer.replace(optimiser=other)
    assert "make a new trainer, `LineFit(trainer.model, ...)`" in str(caught.value)


ALLOWED = {
    "the same": (rules(*ONE), {}, rules(*ONE)),
    "all, of which `train` leaves some out": (
        rules(*BOTH),
        {"train": ONE},
        rules(*BOTH),
    ),
    "a default, as before": (
        rules(*ONE, default=ADAM),
        {"train": ONE},
        rules(default=ADAM),
    ),
    "rules for a plain one": (ADAM, {"train": ONE}, rules("**")),
    "a plain one": (rules(*ONE), {}, ADAM),
    # As where a trainer is made: these are for the leaves that are there.
    "a default": (rules(*ONE), {"train": ONE}, rules(*ONE, default=ADAM)),
    "all": (rules(*ONE), {}, rules("**")),
    "what is tied": (rules(*ONE), {"ties": {"offset": "slope"}}, rules("**")),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_the_same_leaves_may_have_other_rules(case):
    optimiser, options, other = ALLOWED[case]
    trainer = LineFit(line(), optimiser, **options).replace(optimiser=other)
    fitted, _ = trainer.step(line_batch())
    assert not same(fitted.model.slope, trainer.model.slope)
    if "ties" not in options:
        assert same(fitted.model.offset, trainer.model.offset)


DECAYING = optax.adam(optax.exponential_decay(0.1, 10, 0.5))
MOMENTUM = optax.sgd(0.1, momentum=0.9)
# Other rules, and the parameters whose states begin afresh.
CHANGED = {
    "another transformation": ({"slope": DECAYING, "offset": MOMENTUM}, ["offset"]),
    "one that waits": ({"slope": DECAYING, "offset": vn.window(ADAM, 3)}, ["offset"]),
    "another rate": ({"slope": DECAYING, "offset": optax.adam(0.3)}, []),
    "another order": ({"offset": ADAM, "slope": DECAYING}, []),
    "both": ({"offset": MOMENTUM, "slope": MOMENTUM}, ["slope", "offset"]),
    "one rule": ({BOTH: DECAYING}, ["slope", "offset"]),
}


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("case", CHANGED)
def test_each_rule_keeps_its_own_state(case, is_stacked):
    optimiser = vn.ParamOptimiser({"slope": DECAYING, "offset": ADAM})
    other, is_fresh = CHANGED[case]
    made = [LineFit(line(x), optimiser).fit(line_batch(), 5).trainer for x in (0.1, 1)]
    news = [trainer.replace(optimiser=vn.ParamOptimiser(other)) for trainer in made]
    if is_stacked:
        many = vn.fit_many(made, line_batch(), 0).trainers
        many = many.replace(optimiser=vn.ParamOptimiser(other))
        given = jax.tree.map(
            lambda *rows: jnp.stack(rows), *(n.opt_state for n in news)
        )
        assert same(many.opt_state, given)
        return
    for trainer, new in zip(made, news, strict=True):
        owners = dict(zip(new.opt_state.paths, new.opt_state.owners, strict=True))
        for index, path in enumerate(BOTH):
            own, old = (
                new.opt_state.groups[owners[path]],
                trainer.opt_state.groups[index],
            )
            assert same(own, old) == (path not in is_fresh)
        if not is_fresh and case != "another rate":
            on, as_before = (t.fit(line_batch(), 5).trainer for t in (new, trainer))
            assert same(on.params, as_before.params)


def test_so_does_what_comes_first():
    first = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
    optimiser = vn.ParamOptimiser({"slope": ADAM, "offset": ADAM}, first=first)
    trainer = LineFit(line(), optimiser).fit(line_batch(), 5).trainer
    other = vn.ParamOptimiser({"slope": ADAM, "offset": MOMENTUM}, first=first)
    new = trainer.replace(optimiser=other)
    assert same(new.opt_state.first, trainer.opt_state.first)
    new = trainer.replace(optimiser=vn.ParamOptimiser({"slope": ADAM, "offset": ADAM}))
    assert new.opt_state.first is None
    assert same(new.opt_state.groups, trainer.opt_state.groups)


class Vector(vn.Trainer):
    def residuals(self, model, batch):
        return model["v"] - batch


RATES = jnp.asarray([0.1, 0.2, 0.3])
BY_ELEMENT = optax.chain(vn.precondition({"v": RATES / 2}), optax.sgd(1.0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (optax.sgd(RATES), optax.sgd(RATES / 2)),
        (optax.chain(vn.precondition({"v": RATES}), optax.sgd(1.0)), BY_ELEMENT),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_an_array_of_all_members_may_be_as_long_as_they_are_many(size, before, after):
    made = [Vector({"v": jnp.ones(3) * k}, before) for k in range(size)]
    alone = [t.fit(0.0, 2).trainer.replace(optimiser=after) for t in made]
    many = vn.fit_many(made, 0.0, 2).trainers.replace(optimiser=after)
    right = jnp.stack([t.fit(0.0, 2).trainer.params["v"] for t in alone])
    found = vn.fit_many(many, 0.0, 2).trainers.params["v"]
    assert jnp.allclose(found, right, rtol=1e-12)


def test_an_array_of_which_it_is_not_known_is_refused():
    made = [Vector({"v": jnp.ones(3)}, optax.adam(0.1)) for _ in range(3)]
    many = vn.fit_many(made, jnp.arange(3.0), 0, data_axis=0).trainers
    with pytest.raises(ValueError, match=r"`optimiser`.*shape \(3,\).*3 members"):
        many.replace(optimiser=optax.sgd(RATES))
    # As those that are there: a row for each member.
    made = [t.replace(optimiser=optax.sgd(1.0)) for t in made]
    many = vn.fit_many(made, 0.0, 0).trainers.replace(optimiser=optax.sgd(RATES))
    found = vn.fit_many(many, 0.0, 1).trainers.params["v"]
    right = jnp.broadcast_to(1 - RATES[:, None], (3, 3))
    assert jnp.allclose(found, right, rtol=1e-12)


def test_of_many_too():
    many = vn.fit_many([LineFit(line(x), rules(*ONE)) for x in (0.1, 0.2)], 0.0, 0)
    with pytest.raises(ValueError, match="'offset', which is not trained"):
        many.trainers.replace(optimiser=rules(*BOTH))
    assert jnp.shape(many.trainers.replace(optimiser=rules(*ONE)).step_count) == (2,)


SGD = {rate: optax.sgd(rate) for rate in (0.1, 0.001)}


def with_optimiser(trainer, optimiser):
    return eqx.tree_at(lambda t: t.optimiser, trainer, optimiser)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    "other",
    [
        {"offset": SGD[0.001], "slope": SGD[0.1]},
        {BOTH: SGD[0.1]},
        {"slope": SGD[0.1], "offset": SGD[0.001], "**": SGD[0.1]},
    ],
    ids=["in another order", "of another number", "with one more"],
)
def test_rules_that_are_put_in_by_hand_are_refused(other):
    optimiser = vn.ParamOptimiser({"slope": SGD[0.1], "offset": SGD[0.001]})
    trainer, other = LineFit(line(), optimiser), vn.ParamOptimiser(other)
    changed = with_optimiser(trainer, other)
    for use in (
        lambda: changed.fit(line_batch(), 1),
        lambda: changed.step(line_batch()),
        changed.learning_rates,
        lambda: other.update(line(), trainer.opt_state, line()),
    ):
        with pytest.raises(ValueError, match="for `slope`; `offset`") as caught:
            use()
        assert "`trainer.replace(optimiser=...)`" in str(caught.value)
    fitted, expected = (
        t.replace(optimiser=other).fit(line_batch(), 3).trainer.params
        for t in (changed, trainer)
    )
    assert same(fitted, expected)


def test_rules_of_the_same_parameters_may_be_put_in_by_hand():
    """Other rates, rules that are written otherwise, or a rule that is frozen."""
    adam, other = optax.adam(0.1), optax.adam(0.2)
    trainer = LineFit(line(), vn.ParamOptimiser({"slope": adam, "offset": adam}))
    for rules, still in (
        ({"slope": other, "offset": other}, []),
        ({("slope",): other, "o*": other}, []),
        ({"slope": None, "offset": other}, ["slope"]),
    ):
        changed = with_optimiser(trainer, vn.ParamOptimiser(rules))
        fitted = changed.fit(line_batch(), 2).model
        for name in BOTH:
            same_as_before = same(getattr(fitted, name), getattr(line(), name))
            assert same_as_before == (name in still)
