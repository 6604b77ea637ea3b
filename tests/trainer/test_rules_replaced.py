"""`replace(optimiser=...)`: which leaves of the model are trained stays."""

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
    fitted = trainer.fit(line_batch(), 3).trainer
    assert not same(fitted.model.slope, trainer.model.slope)
    if "ties" not in options:
        assert same(fitted.model.offset, trainer.model.offset)


def test_of_many_too():
    many = vn.fit_many([LineFit(line(x), rules(*ONE)) for x in (0.1, 0.2)], 0.0, 0)
    with pytest.raises(ValueError, match="'offset', which is not trained"):
        many.trainers.replace(optimiser=rules(*BOTH))
    assert jnp.shape(many.trainers.replace(optimiser=rules(*ONE)).step_count) == (2,)
