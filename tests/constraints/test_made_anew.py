"""Maps and distributions that are made anew, for each trainer its own."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import numpyro.distributions.transforms as transforms
import optax
import pytest
from flowjax import bijections as flow
from numpyro.distributions import biject_to, constraints

import vernal as vn

BIJECTIONS = {
    "numpyro exp": transforms.ExpTransform,
    "numpyro power": lambda: transforms.PowerTransform(2.0),
    "numpyro softplus": transforms.SoftplusTransform,
    "numpyro interval": lambda: biject_to(constraints.interval(0.0, 2.0)),
    "numpyro simplex": lambda: biject_to(constraints.simplex),
    "numpyro order": lambda: biject_to(constraints.ordered_vector),
    "numpyro within": lambda: transforms.ComposeTransform(
        [transforms.SigmoidTransform(), transforms.AffineTransform(0.0, 2.0)]
    ),
    "flowjax chain": lambda: flow.Chain([flow.Affine(0.0, 2.0), flow.SoftPlus()]),
}
STARTS = {"numpyro simplex": [0.2, 0.8], "numpyro order": [0.5, 1.0]}
PRIORS = {
    "normal": lambda: dist.Normal(0.5, 1.0),
    "truncated": lambda: dist.TruncatedNormal(0.5, 1.0, low=-5.0),
    "uniform": lambda: dist.Uniform(-9.0, 9.0),
    "log-normal": lambda: dist.LogNormal(0.0, 1.0),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [transforms.AffineTransform(0.0, 2.0)]
    ),
    "of vernal": lambda: vn.Normal(0.5, 1.0),
}


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        return model["rate"] * 1.5 - batch


def bounded(name, start=None):
    start = jnp.asarray(STARTS.get(name, 0.5) if start is None else start)
    bounds = {"rate": BIJECTIONS[name]()}
    return Fit({"rate": start}, optax.adam(0.1), bounds=bounds)


def informed(name):
    priors = {"rate": PRIORS[name]()}
    return Fit({"rate": jnp.asarray(0.5)}, optax.adam(0.1), priors=priors)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_with_its_own_bijection_a_trainer_compiles_nothing_again(name):
    assert "Nothing differs" in vn.explain_retrace(bounded(name), bounded(name))


@pytest.mark.parametrize("name", PRIORS)
def test_with_its_own_prior_a_trainer_compiles_nothing_again(name):
    assert "Nothing differs" in vn.explain_retrace(informed(name), informed(name))


def test_other_maps_and_priors_are_others():
    exp, within = bounded("numpyro exp"), bounded("numpyro within")
    assert "bijections" in vn.explain_retrace(exp, within)
    uniform, truncated = informed("uniform"), informed("truncated")
    assert "priors" in vn.explain_retrace(uniform, truncated)


def test_many_with_a_bijection_each():
    starts, data = (0.3, 0.6), np.asarray([0.9])
    each = [bounded("numpyro within", start) for start in starts]
    many = vn.fit_many(each, data, 5)
    for index, trainer in enumerate(each):
        alone = trainer.fit(data, 5).trainer
        found = many.trainers.params["rate"][index]
        np.testing.assert_allclose(found, alone.params["rate"], rtol=1e-14)
