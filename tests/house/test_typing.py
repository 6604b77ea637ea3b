"""What type checkers are told holds when a program runs."""

import inspect
import runpy
from pathlib import Path
from typing import get_args, get_type_hints

import equinox as eqx
import jax.numpy as jnp
import optax
import pytest

import models
import vernal as vn

PROGRAMS = Path(__file__).parents[1] / "typing"


class Fit(vn.Trainer[models.Line]):
    def loss(self, model, batch):
        return jnp.sum((model(batch) - 1) ** 2)


@pytest.mark.parametrize("name", ["functions", "subclasses", "trainers"])
def test_programs_that_checkers_accept_run(name):
    runpy.run_path(str(PROGRAMS / f"{name}.py"))


def test_a_trainer_is_a_module_like_any():
    trainer = Fit(models.line(), optax.sgd(0.1))
    assert type(Fit) is type(eqx.Module)
    assert isinstance(trainer, eqx.Module)
    (stepped, _), batch = trainer.step(jnp.ones(3)), jnp.ones(3)
    assert eqx.tree_equal(eqx.filter_jit(trainer.step)(batch)[0], stepped)


def test_a_subclass_has_the_arguments_that_it_inherits():
    class WithDefault(Fit):
        factor: float = 2.0

    class WithoutDefault(Fit):
        factor: float

    assert WithDefault(models.line()).factor == 2.0
    with pytest.raises(TypeError, match="factor"):
        WithDefault(models.line(), factor=3.0)
    with pytest.raises(TypeError, match="'factor' was not initialized"):
        WithoutDefault(models.line())


def test_what_a_fit_is_told_is_the_same_everywhere():
    (options,) = get_args(inspect.signature(vn.fit).parameters["options"].annotation)
    options = set(get_type_hints(options))
    method = inspect.signature(vn.Trainer.fit).parameters
    named = {n for n, p in method.items() if p.kind is p.KEYWORD_ONLY}
    assert named == options | {"mesh", "sharding"}
    function = set(inspect.signature(vn.fit).parameters)
    assert {"mesh", "sharding"} <= function
    assert not options & function


@pytest.mark.parametrize("of", [vn.Trainer, vn.FitResult, vn.ManyResult])
def test_what_is_left_open_is_anything(of):
    one, *_ = of.__parameters__
    assert of[vn.Trainer].__args__[0] is vn.Trainer
    assert one.has_default()
