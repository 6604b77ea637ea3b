"""Which of `loss`, `nll` and `residuals` a method uses, and that it is said."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn


def residuals(self, model, batch):
    return model["a"] - batch


def with_prior(self, model, batch):
    """Pulls to zero as strongly as the data to themselves: the answer is half."""
    return 0.5 * jnp.sum((model["a"] - batch) ** 2) + 0.5 * jnp.sum(model["a"] ** 2)


METHODS = {"residuals": residuals, "loss": with_prior, "nll": with_prior}
TOLD = [
    ("residuals", "loss"),
    ("residuals", "nll"),
    ("residuals", "loss", "nll"),
]
QUIET = [("residuals",), ("loss",), ("nll",), ("loss", "nll")]


def make(names, bases=(vn.Trainer,)):
    return type("Fit", bases, {name: METHODS[name] for name in names})


def heard(*kinds, filters="always"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filters)
        for kind in kinds:
            kind({"a": jnp.asarray(0.0)}, optax.sgd(0.1))
    return caught


@pytest.mark.parametrize("names", TOLD, ids="+".join)
def test_residuals_beside_another_are_told_once(names):
    kind = make(names)
    (told,) = heard(kind, kind)
    assert told.category is vn.ObjectiveWarning
    assert told.filename == __file__
    for name in names:
        assert f"`{name}`" in str(told.message)
    assert "`nll`, without `residuals`" in str(told.message)
    minimised, _, sampled = str(told.message).split("use")[1:4]
    assert f"`{'loss' if 'loss' in names else 'nll'}`" in minimised
    assert f"`{'nll' if 'nll' in names else 'residuals'}`" in sampled
    # Neither later nor for another instance; but for another class.
    assert not heard(kind)
    assert len(heard(make(names))) == 1


@pytest.mark.parametrize("names", QUIET, ids="+".join)
def test_the_others_are_quiet(names):
    assert not heard(make(names))


def test_what_is_inherited_counts():
    parent = make(["residuals"])
    assert not heard(parent)
    child = make(["loss"], (parent,))
    assert len(heard(child, child)) == 1
    assert len(heard(make([], (child,)))) == 1


def test_an_init_of_ones_own_and_many_at_once():
    class Fit(make(["residuals", "loss"])):
        def __init__(self, start):
            super().__init__({"a": start})

    with pytest.warns(vn.ObjectiveWarning) as told:
        jax.vmap(Fit)(jnp.arange(3.0))
    assert len(told) == 1
    assert told[0].filename == __file__


def test_it_can_be_silenced():
    assert not heard(make(["residuals", "loss"]), filters="ignore")


@pytest.mark.filterwarnings("ignore::vernal.ObjectiveWarning")
def test_what_is_said_is_so():
    """Of all three at once."""
    trainer = make(TOLD[2])({"a": jnp.asarray(0.0)}, optax.sgd(0.25))
    batch, found = jnp.asarray([2.0]), {"step": trainer}
    for _ in range(40):
        found["step"], _ = found["step"].step(batch)
    found["minimise"] = trainer.solve(optx.BFGS(1e-9, 1e-9), batch).trainer
    found["squares"] = trainer.solve(optx.LevenbergMarquardt(1e-9, 1e-9), batch).trainer
    answers = {name: float(t.model["a"]) for name, t in found.items()}
    assert answers == pytest.approx({"step": 1.0, "minimise": 1.0, "squares": 2.0})
    # A prior would halve the variance.
    np.testing.assert_allclose(trainer.standard_errors(batch)["a"], 1.0)
    fn, start = trainer.objective(batch)
    np.testing.assert_allclose(fn(start + 2.0), 2.0)


def test_a_normal_prior_as_one_more_residual_holds_for_all():
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.append(model["a"] - batch, model["a"])

    (trainer,) = [Fit({"a": jnp.asarray(0.0)})]
    batch = jnp.asarray([2.0])
    for solver in (optx.BFGS(1e-9, 1e-9), optx.LevenbergMarquardt(1e-9, 1e-9)):
        model = trainer.solve(solver, batch).model
        np.testing.assert_allclose(model["a"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(trainer.standard_errors(batch)["a"], 0.5**0.5)
