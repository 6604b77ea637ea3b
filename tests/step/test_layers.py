"""Layers that score a validation as they are in training."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

X = np.linspace(-1, 1, 6)
KEY = jax.random.key(0)


def network(*layers):
    make = lambda: eqx.nn.Sequential(
        [eqx.nn.Linear("scalar", "scalar", key=KEY), *layers]
    )
    return eqx.filter_jit(make)()


class Noisy(vn.Trainer):
    def loss(self, model, batch, *, key):
        x, y = batch
        told = jax.vmap(lambda x, key: model["net"](x, key=key))
        return jnp.mean((told(x, jax.random.split(key, len(x))) - y) ** 2)


class Quiet(Noisy):
    def evaluate(self, model, batch):
        x, y = batch
        return jnp.mean((jax.vmap(eqx.nn.inference_mode(model["net"]))(x) - y) ** 2)


class Default(Quiet):
    evaluate = vn.Trainer.evaluate


DROPOUT = network(eqx.nn.Dropout(0.1))
CASES = {
    "dropout": (Noisy, DROPOUT, True),
    "the default": (Default, DROPOUT, True),
    "its own score": (Quiet, DROPOUT, False),
    "no dropout": (Noisy, network(), False),
    "dropout of nothing": (Noisy, network(eqx.nn.Dropout(0.0)), False),
    "for inference": (Noisy, eqx.nn.inference_mode(DROPOUT), False),
}


def heard(kind, net, many=False, **options):
    kind = type("Fit", (kind,), {"__module__": __name__})
    trainer = kind({"net": net}, optax.sgd(0.1), key=KEY)
    fit = vn.fit_many if many else vn.Trainer.fit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            who = [trainer, trainer] if many else trainer
            fit(who, (X, X), 0, progress=False, **options)
    return [x for x in caught if "as in training" in str(x.message)]


@pytest.mark.parametrize(
    ("name", "many"), [*((name, False) for name in CASES), ("the default", True)]
)
def test_a_score_with_dropout_is_warned_of(name, many):
    kind, net, is_warned = CASES[name]
    said = heard(kind, net, many, validation=((X, X), 1))
    assert len(said) == is_warned
    for one in said:
        assert "Dropout `model['net'].layers[1]` is as in training" in str(one.message)
        assert one.filename == __file__


def test_without_a_validation_nothing_is_said():
    assert not heard(Noisy, DROPOUT)


def test_a_parameter_of_the_name_of_a_share_is_no_layer():
    class Line(eqx.Module):
        p: jax.Array

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum((model.p[0] + model.p[1] * batch) ** 2)

    trainer = Fit(Line(jnp.ones(2)), optax.sgd(1e-3))
    trainer.fit(X, 1, validation=(X, 1), progress=False)
