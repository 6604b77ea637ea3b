"""Whether the members of a fit that converged have arrived at their minima."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from vernal._many import arrival

REASON = vn.StopReason
X = jnp.linspace(0.0, 1.0, 20)
YS = jnp.stack([1 + 5 * X + s * jnp.sin(99 * X) for s in (0.1, 0.2, 0.3)])
# Of three members, the second creeps.
RATES, STOP, STEPS = (0.04, 1e-10, 0.03), vn.Converged(rtol=1e-6, patience=3), 800


class Squares(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model["a"] + model["b"] * x - y


class Likelihood(vn.Trainer):
    def nll(self, model, batch):
        x, y = batch
        return 0.5 * jnp.sum((model["a"] + model["b"] * x - y) ** 2)


class Loss(vn.Trainer):
    def loss(self, model, batch):
        x, y = batch
        return jnp.sum(jnp.cosh(0.3 * (model["a"] + model["b"] * x - y)))


def make(kind, rate, **options):
    model = {"a": jnp.asarray(0.5), "b": jnp.asarray(0.2)}
    return kind(model, optax.sgd(rate), **options)


def dropped(kind, rate):
    """A projector that leaves one direction alone, another for each member."""
    return make(kind, 10 * rate).whiten((X, rate * YS[0]), rank=1, on_null="drop")


class Positive(vn.Bijection):
    def forward(self, free):
        return jax.nn.softplus(free)

    def inverse(self, value):
        return jnp.log(jnp.expm1(value))


BOUNDS = {"a": (None, 0.8), "b": Positive()}
# How to make a member of a rate, whether it has its own data, and options.
CASES = {
    "residuals, one at a time": (lambda rate: make(Squares, rate), True, {"batch": 1}),
    "bounds": (lambda rate: make(Squares, rate, bounds=BOUNDS), False, {}),
    "a direction": (lambda rate: dropped(Likelihood, rate), True, {}),
    "loss, some of it": (lambda rate: make(Loss, 9 * rate), True, {"every": 7}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_member_is_checked_as_one_fit(case):
    of_rate, has_own, options = CASES[case]
    trainers = [of_rate(rate) for rate in RATES]
    batches = [(X, YS[i] if has_own else YS[0]) for i in range(3)]
    data, axis = ((X, YS), (None, 0)) if has_own else (batches[0], None)
    kept = {"stop": STOP, "progress": False}
    many = vn.fit_many(trainers, data, STEPS, data_axis=axis, **kept, **options)
    options.pop("batch", None)
    ones = [
        trainer.fit(batch, STEPS, **kept, **options)
        for trainer, batch in zip(trainers, batches, strict=True)
    ]
    assert many.stop_reasons == tuple(one.stop_reason for one in ones)
    edms = [one.edm for one in ones]
    np.testing.assert_allclose(many.edms, edms, rtol=1e-4, atol=1e-9)
    assert many.stop_reasons[1] is REASON.STALLED
    assert many.stop_reasons[::2] == (REASON.CONVERGED,) * 2
    assert many.failed == (1,)
    assert "1 of 3 failed: 1 (stalled)" in many.table()
    columns = many.to_dict()
    assert columns["stop_reason"][1] == "Stopped short of a minimum."
    np.testing.assert_array_equal(columns["edm"], many.edms)


class Counted(Squares):
    traces = 0

    def residuals(self, model, batch):
        Counted.traces += 1
        return super().residuals(model, batch)


def test_only_what_converged_is_checked():
    trainers = [make(Counted, rate) for rate in RATES]

    def traces(steps):
        before = Counted.traces
        result = vn.fit_many(trainers, (X, YS[0]), steps, stop=STOP, progress=False)
        return Counted.traces - before, result

    traces(2)
    count, result = traces(3)
    assert count == 0
    assert result.stop_reasons == (REASON.STEPS_TAKEN,) * 3
    # The second is over before the others.
    count, result = traces(10)
    assert count > 0
    taken = REASON.STEPS_TAKEN
    assert result.stop_reasons == (taken, REASON.STALLED, taken)
    assert np.isnan(result.edms[::2]).all()
    assert traces(11)[0] == 0


@pytest.mark.parametrize(
    ("data", "params", "batch", "devices", "together"),
    [
        (100, 3, 12, 1, 12),
        (100, 3, 6, 1, 6),
        (2**20, 10, 12, 1, 3),
        (2**25, 2, 12, 1, 1),
        (100, 3, 12, 4, 12),
        (2**20, 10, 12, 2, 2),
        (2**25, 2, 12, 4, 4),
    ],
)
def test_the_matrices_of_large_members_are_not_in_memory_together(
    data, params, batch, devices, together
):
    shape = jax.ShapeDtypeStruct
    trainers = SimpleNamespace(
        step_count=np.zeros(12), params=shape((12, params), float)
    )
    for rows, flag in (((), False), ((12,), True)):
        of = shape((*rows, data), float)
        found = arrival._group(trainers, of, (flag,), batch, devices)
        assert found == together


@pytest.mark.filterwarnings("ignore:.*`Converged` has ended it")
def test_minibatches_and_hooks_are_not_checked():
    class Hooked(Squares):
        def constrain(self, params):
            return params

    batches = vn.Minibatches((X, YS[0]), 10, key=jax.random.key(0))
    for kind, data in ((Hooked, (X, YS[0])), (Squares, batches)):
        trainers = [make(kind, rate) for rate in (1e-9, 2e-9)]
        stop = vn.Converged(rtol=0.9, patience=2)
        result = vn.fit_many(trainers, data, 20, stop=stop, progress=False)
        assert result.stop_reasons == (REASON.CONVERGED,) * 2
        assert np.isnan(result.edms).all()
