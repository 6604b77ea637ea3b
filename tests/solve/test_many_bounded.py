"""A spectrum of many bins, none of which is negative."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
import scipy.optimize

import vernal as vn
from inside import rounds, rounds_of_many, solve_many

SIZE = 24
LM = optx.LevenbergMarquardt(1e-10, 1e-10)
BFGS = optx.BFGS(1e-10, 1e-10)

_RANDOM = np.random.default_rng(0)
_AT = np.linspace(0, 1, 2 * SIZE)
# Each bin is seen in some channels, beside others.
RESPONSE = np.exp(
    -0.5 * np.square((_AT[:, None] - np.linspace(0, 1, SIZE)) * 1.4 * SIZE)
)
_TRUTH = np.where(_RANDOM.random(SIZE) < 0.5, 0, _RANDOM.uniform(1, 9, SIZE))
NOISE = _RANDOM.normal(size=(3, len(_AT)))
CHANNELS = RESPONSE @ _TRUTH + NOISE
COUNTS = _RANDOM.poisson(RESPONSE @ _TRUTH + 0.5).astype(float)


class Spectrum(vn.Trainer):
    def residuals(self, model, batch):
        return RESPONSE @ jnp.stack(model["bins"]) - batch


class Counted(vn.Trainer):
    def residuals(self, model, batch):
        rate = RESPONSE @ jnp.stack(model["bins"]) + 0.5
        return vn.likelihoods.Poisson(rate, batch)


def spectrum(kind=Spectrum, has_leaves=False, first=1.0):
    bins = np.append(first, np.full(SIZE - 1, 2.0))
    if has_leaves:
        return kind({"bins": [*map(jnp.asarray, bins)]}, bounds={"bins.*": (0, None)})
    return kind({"bins": jnp.asarray(bins)}, bounds={"bins": (0, None)})


def bins_of(trainer):
    return np.stack(jax.tree.leaves(trainer.params["bins"])).ravel()


@pytest.mark.parametrize("solver", [LM, BFGS], ids=["LM", "BFGS"])
@pytest.mark.parametrize("has_leaves", [False, True], ids=["array", "leaves"])
def test_a_spectrum_is_that_of_scipy(has_leaves, solver):
    result = spectrum(has_leaves=has_leaves).solve(solver, CHANNELS[0], max_steps=999)
    assert result.stop_reason is vn.StopReason.CONVERGED
    best, _ = scipy.optimize.nnls(RESPONSE, CHANNELS[0])
    assert 3 < np.count_nonzero(best == 0) < SIZE - 3
    np.testing.assert_array_equal(bins_of(result.trainer) == 0, best == 0)
    np.testing.assert_allclose(bins_of(result.trainer), best, rtol=1e-4, atol=1e-4)


def test_counts_have_the_spectrum_of_scipy():
    result = spectrum(Counted).solve(LM, COUNTS, max_steps=999)
    assert result.stop_reason is vn.StopReason.CONVERGED

    def loss(bins):
        rate = RESPONSE @ bins + 0.5
        return np.sum(rate - COUNTS * np.log(rate)), RESPONSE.T @ (1 - COUNTS / rate)

    options = {"ftol": 1e-15, "gtol": 1e-8, "maxiter": 9_999, "maxfun": 99_999}
    best = scipy.optimize.minimize(
        loss, np.full(SIZE, 2.0), jac=True, bounds=[(0, None)] * SIZE, options=options
    ).x
    np.testing.assert_array_equal(bins_of(result.trainer) == 0, best == 0)
    np.testing.assert_allclose(bins_of(result.trainer), best, rtol=1e-3, atol=1e-3)


def counted(monkeypatch, module, *names):
    """Counts the calls of functions of a module."""
    counts = dict.fromkeys(names, 0)

    def counting(name, fn):
        def call(*args):
            counts[name] += 1
            return fn(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counts


def test_how_far_the_minimum_is_is_asked_of_the_last_round_alone(monkeypatch):
    counts = counted(monkeypatch, rounds, "run", "second_look")
    spectrum().solve(LM, CHANNELS[0])
    assert counts["run"] > 1
    assert counts["second_look"] == 1


class Bar(solve_many.ProgressBar):
    """Keeps how many members were done at each update."""

    seen = None

    def update(self, steps, shown):
        type(self).seen = [*(self.seen or ()), steps]
        super().update(steps, shown)


def all_of_them(monkeypatch, most_together, **options):
    monkeypatch.setattr(rounds_of_many, "_MOST_TOGETHER", most_together)
    monkeypatch.setattr(solve_many, "ProgressBar", Bar)
    Bar.seen = None
    # The first begins beside its minimum, and is done before the others.
    trainers = [spectrum(first=1.0 + i) for i in range(3)]
    options = {"data_axis": 0, "solver": LM} | options
    return vn.fit_many(trainers, CHANNELS, 999, **options)


def test_large_members_are_solved_for_one_by_one(monkeypatch):
    counts = counted(monkeypatch, rounds_of_many, "_run")
    alone = counted(monkeypatch, rounds, "run")
    apart = all_of_them(monkeypatch, 0)
    assert alone["run"] > 3
    assert counts["_run"] == 0
    # After each round as many as are done: none, or the one that has taken it.
    assert len(Bar.seen) == alone["run"]
    assert set(Bar.seen) == {0, 1}
    assert sum(Bar.seen) == 3
    together = all_of_them(monkeypatch, np.inf)
    assert counts["_run"] > 1
    assert sum(Bar.seen) == 3
    converged = (vn.StopReason.CONVERGED,) * 3
    assert apart.stop_reasons == together.stop_reasons == converged
    for index, channels in enumerate(CHANNELS):
        best, _ = scipy.optimize.nnls(RESPONSE, channels)
        for result in apart, together:
            bins = bins_of(result.trainer(index))
            np.testing.assert_array_equal(bins == 0, best == 0)
            np.testing.assert_allclose(bins, best, rtol=1e-4, atol=1e-4)
    # No member has a loss after its end.
    lengths = np.isfinite(apart.history.loss).sum(axis=0)
    np.testing.assert_array_equal(lengths, apart.trainers.step_count)


def test_ctrl_c_between_rounds_leaves_what_they_have(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds_of_many._Together, "answers", interrupted)
    result = all_of_them(monkeypatch, np.inf)
    assert set(result.stop_reasons) == {vn.StopReason.INTERRUPTED}
    lasts = np.array([x[np.isfinite(x)][-1] for x in result.history.loss.T])
    np.testing.assert_array_less(lasts, result.history.loss[0])
    losses = np.asarray(result.best_losses)
    for index, channels in enumerate(CHANNELS):
        rows = RESPONSE @ bins_of(result.trainer(index)) - channels
        assert rows @ rows / 2 == pytest.approx(losses[index], rel=1e-6)


def test_a_bar_has_the_members_that_are_done(monkeypatch, capfd):
    monkeypatch.setattr("vernal._fit.progress_bar.is_interactive", lambda: True)
    all_of_them(monkeypatch, 0)
    first, *_, last = capfd.readouterr().err.strip().split("\r")
    assert first.startswith("compiling")
    assert "3/3" in last
    assert "members/s" in last or "s/ members" in last
    all_of_them(monkeypatch, 0, progress=False)
    assert capfd.readouterr().err == ""
