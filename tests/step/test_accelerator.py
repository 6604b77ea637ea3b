"""Steps as they are compiled for an accelerator, where branches wait for the host."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inside
import vernal as vn

POLICIES = {
    "skip": vn.SkipStep() | vn.StopAfter(2),
    "zero": vn.ZeroNans(),
}


class Slope(eqx.Module):
    slope: jax.Array
    more: dict[str, Any]
    device: str = eqx.field(static=True)
    """Each has programs of its own."""


class Fit(vn.Trainer):
    def loss(self, model, batch):
        x, y = batch
        # Some steps have no finite gradient, at last two in a row.
        is_bad = (self.step_count == 3) | (self.step_count >= 8)
        spoiled = jnp.where(is_bad, jnp.nan, 1.0)
        curve = model.slope * x + model.more["offset"]
        return spoiled * jnp.mean((curve - y) ** 2)


def trainer(device, policy="skip"):
    more = {"offset": jnp.zeros(6), "none": None}
    model = Slope(jnp.asarray(1.0), more, device)
    return Fit(model, optax.adam(0.1), nan_policy=POLICIES[policy])


x = np.linspace(0, 1, 6)
BATCH = x, 2 * x + 0.5


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def fitted(device, policy):
    result = trainer(device, policy).fit(BATCH, 12, stop=vn.Converged(1e-9, 4))
    assert bool(result.trainer.stopped) == (policy == "skip")
    arrays = eqx.filter((result.trainer, result.history.loss), eqx.is_array_like)
    assert "loss" in str(result.trainer.nan_report())
    return jax.tree.leaves(arrays)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:`fit`")
def test_a_fit_without_branches_is_the_same(policy, monkeypatch):
    on_cpu = fitted("cpu", policy)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = fitted("gpu", policy)
    for own, other in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_has_no_branch_where_it_would_wait(policy, device):
    arrays, static = eqx.partition(trainer(device, policy), eqx.is_array)
    traced = jax.make_jaxpr(lambda arrays: stepped(eqx.combine(arrays, static)))(arrays)
    count = sum(e.primitive.name == "cond" for e in inside.equations(traced.jaxpr))
    assert (count == 0) is (device == "gpu")


def stepped(trainer):
    return eqx.filter(trainer.step(BATCH), eqx.is_array)
