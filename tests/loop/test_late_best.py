"""A large best is copied late while the loss falls, and is what it would be anyway."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from inside import blocks, small
from models import close, same

STEPS = 90
DATA = jnp.linspace(0.0, 1.0, 7)
ALWAYS, LATE = 2**40, 0  # from what size of the best on it is copied late


@pytest.fixture(autouse=True, scope="module")
def each():
    """The fits that copy each best. All others of this file copy it late.

    The loops of these models would be compiled as one function, without blocks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "MOST_READ", -1)
        patch.setattr(blocks, "_SIZE_OF_LARGE", 7)
        vn.forget()
        patch.setattr(blocks, "_LARGE_BEST", ALWAYS)
        fits = {case: run(case) for case in CASES}
        vn.forget()
        patch.setattr(blocks, "_LARGE_BEST", LATE)
        yield fits
    vn.forget()


class Fit(vn.Trainer):
    """A sum of squares with a term that rises and falls, and NaN at some steps."""

    swing: jax.Array
    bad: jax.Array

    def __init__(self, swing, bad, *args, **options):
        # Arrays of one shape, for which a program is compiled but once.
        self.swing = jnp.asarray(swing)
        self.bad = jnp.full(6, -1).at[: len(bad)].set(jnp.asarray(bad, int))
        super().__init__(*args, **options)

    def loss(self, model, batch):
        count = self.step_count
        value = jnp.square(model["w"] - batch.mean()).sum()
        is_bad = (count == self.bad.astype(count.dtype)).any()
        noise = self.swing * jnp.sin(2.0 * count.astype(value.dtype))
        return jnp.where(is_bad, jnp.nan, value + noise)


def fit_of(swing=0.0, bad=(), rate=0.02):
    model = {"w": jnp.linspace(-1.0, 2.0, 11)}
    options = {"nan_policy": vn.SkipStep()}
    return Fit(swing, bad, model, optax.sgd(rate, momentum=0.5), **options)


RECORDED = {"record": ("grad_norm",), "every": 4}
# A loss that always falls, that swings, that turns bad: at the end of a block, too.
CASES = {
    "falls": (fit_of, {}),
    "swings": (lambda: fit_of(swing=0.5), {}),
    "diverges": (lambda: fit_of(rate=1.2), {}),
    "is bad": (lambda: fit_of(bad=(0, 6, 7, 13, 14, 40)), {}),
    "swings and is bad": (lambda: fit_of(0.5, (3, 20, 21, 62)), {}),
    "converges": (fit_of, RECORDED | {"stop": vn.Converged(rtol=1e-3, patience=3)}),
    "in chunks": (lambda: fit_of(0.1), {"chunk": 10}),
    "minibatches": (lambda: fit_of(0.1), {}),
}


def run(case, steps=STEPS, trainer=None):
    make, options = CASES[case]
    data = DATA
    if case == "minibatches":
        data = vn.Minibatches(DATA, 3, key=jax.random.key(2))
    start = make() if trainer is None else trainer
    return start.fit(data, steps, progress=False, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_best_is_that_of_a_fit_that_copies_each(case, each):
    each, late = each[case], run(case)
    assert late.stop_reason == each.stop_reason
    assert late.trainer.nan_report() == each.trainer.nan_report()
    np.testing.assert_array_equal(late.history.steps, each.history.steps)
    np.testing.assert_allclose(late.history.loss, each.history.loss, rtol=1e-9)
    for name in ("params", "opt_state", "best", "best_loss", "step_count"):
        close(getattr(late.trainer, name), getattr(each.trainer, name), rtol=1e-9)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"converges"}))
def test_a_fit_in_parts_is_one_fit(case):
    whole = run(case)
    for cut in (1, 7, 30):
        parts = run(case, STEPS - cut, run(case, cut).trainer)
        assert same(whole.trainer, parts.trainer), cut
