"""Hundreds of fits at random: whatever goes wrong, no trainer holds what is not finite.

Optimisers, policies, precisions, projectors and ways to be fed are drawn, and so is
what is bad in the data and when: NaN, infinities, numbers whose squares overflow, rates
that are far too large. Of each combination one program serves all cases.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

STEPS, ROWS = 6, 8
BAD = (np.nan, np.inf, -np.inf, 1e30, -1e200)

OPTIMISERS = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "rules": lambda rate: vn.ParamOptimiser(
        {"a": optax.adagrad(rate), "b": vn.window(optax.adamw(rate), 1, 4)}
    ),
    "lion": optax.lion,
    # Its own rate is a constant of its program; a factor is data.
    "adafactor": lambda rate: vn.ParamOptimiser(
        {"**": optax.adafactor(1.0)}
    ).with_scale({"**": rate}),
    "clipped": lambda rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(rate)
    ),
}
POLICIES = {
    "zero": vn.ZeroNans(),
    "skip": vn.SkipStep(),
    "stop": vn.StopFit(),
    "raise": vn.RaiseOnNan(),
    "after": vn.SkipStep() | vn.StopAfter(2),
    "zero, after": vn.ZeroNans() | vn.StopAfter(3),
}
WAYS = ("whole", "minibatches", "stream", "projected")
DTYPES = ("float32", "float64")
# Each optimiser meets two policies, both dtypes, and two ways; each way both dtypes.
COMBINATIONS = [
    (name, policy, WAYS[index % 4], DTYPES[(index + index // 4) % 2])
    for index, (name, policy) in enumerate(
        pair
        for shift, name in enumerate(OPTIMISERS)
        for pair in itertools.product(
            [name], [*POLICIES, *POLICIES][shift % 6 : shift % 6 + 2]
        )
    )
]
FITS = 168
EACH = -(-FITS // len(COMBINATIONS))


class Wild(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return jnp.exp(model["a"][0] * x) * model["b"] + model["a"][1] - y


def start(dtype):
    return {"a": jnp.asarray([0.3, -0.2], dtype), "b": jnp.asarray(1.5, dtype)}


def drawn(number, dtype):
    """A rate, and data with up to three bad numbers."""
    rng = np.random.default_rng(number)
    data = rng.normal(size=(2, STEPS, ROWS))
    for _ in range(rng.integers(4)):
        place = tuple(rng.integers(n) for n in data.shape)
        data[place] = BAD[rng.integers(len(BAD))]
    rate = 10.0 ** rng.choice([-3.0, -1.0, 1.0, 8.0, 35.0], p=[0.3, 0.4, 0.1, 0.1, 0.1])
    with np.errstate(over="ignore"):
        return rate, data.astype(dtype)


def source(way, data):
    x, y = data
    if way == "minibatches":
        arrays = x.ravel(), y.ravel()
        return vn.Minibatches(arrays, ROWS, key=jax.random.key(0))
    if way == "stream":
        return vn.Stream(list(zip(x, y, strict=True)))
    return x[0], y[0]


def all_finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


def fitted(trainer, data):
    options = {"record": ("grad_norm", "a"), "chunk": STEPS}
    try:
        return trainer.fit(data, STEPS, **options), False
    except vn.NonFiniteError as error:
        return error.result, True


@pytest.mark.loose_dtypes
@pytest.mark.usefixtures("seldom_explained")
@pytest.mark.filterwarnings("ignore:.*PrecisionWarning", "ignore:.*rounded to float32")
@pytest.mark.parametrize("index", range(len(COMBINATIONS)), ids=map(str, COMBINATIONS))
def test_no_trainer_ever_holds_what_is_not_finite(index):
    name, policy, way, dtype = COMBINATIONS[index]
    projector = None
    if way == "projected":
        fmat = np.diag([4.0, 1.0, 9.0]) + 0.5
        projector = vn.EigenProjector.from_fisher(fmat.astype(dtype), start(dtype))
    options = {"nan_policy": POLICIES[policy], "projector": projector}
    of_rate = functools.cache(
        lambda rate: Wild(start(dtype), OPTIMISERS[name](rate), **options)
    )
    for number in range(EACH * index, EACH * (index + 1)):
        rate, data = drawn(number, dtype)
        trainer = of_rate(rate)
        try:
            result, is_raised = fitted(trainer, source(way, data))
            obey(result, trainer, is_raised, policy)
        except BaseException as error:
            error.add_note(f"Case {number}: a rate of {rate}, {data!r}")
            raise


def obey(result, before, is_raised, policy):
    trainer, history = result.trainer, result.history
    held = trainer.params, trainer.best, trainer.latent
    assert all_finite(held)
    assert jax.tree.map(jnp.result_type, held[:2]) == jax.tree.map(
        jnp.result_type, (before.params, before.best)
    )
    report, taken = trainer.nan_report(), int(trainer.step_count)
    assert list(report) == ["loss", "a", "b", "update"]
    # What the history shows is what was counted.
    assert report["loss"].total == np.count_nonzero(~np.isfinite(history.loss))
    assert len(history) == taken
    assert all_finite(history["a"])
    for total, first in report.values():
        assert (first is None) == (total == 0)
        assert total <= taken
        assert first is None or 0 <= first < taken
    worst = max(count.total for count in report.values())
    if policy in ("stop", "raise"):
        assert worst <= 1
        assert bool(trainer.stopped) == (worst == 1)
    else:
        assert bool(trainer.stopped) or taken == STEPS
    assert is_raised == (policy == "raise" and worst > 0)
    finite = history.loss[np.isfinite(history.loss)]
    lowest = finite.min() if finite.size else np.inf
    assert float(trainer.best_loss) == lowest


def test_what_is_drawn_is_of_every_kind():
    cases = [drawn(number, "float64") for number in range(FITS)]
    assert EACH * len(COMBINATIONS) >= FITS
    for bad in BAD:
        assert any((np.isnan(d) if bad != bad else d == bad).any() for _, d in cases)
    assert {rate for rate, _ in cases} == {1e-3, 1e-1, 1e1, 1e8, 1e35}
    for kinds, column in (OPTIMISERS, 0), (POLICIES, 1), (WAYS, 2):
        assert {combination[column] for combination in COMBINATIONS} == set(kinds)
    for kinds, column in (OPTIMISERS, 0), (WAYS, 2):
        met = {(combination[column], combination[3]) for combination in COMBINATIONS}
        assert met == set(itertools.product(kinds, DTYPES))
