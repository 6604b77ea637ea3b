"""BFGS, plain, reaches the answers that NIST certifies, from both starts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import vernal as vn
from nist import CURVES, DATA

BFGS = optx.BFGS(1e-10, 1e-10)


class Curve(eqx.Module):
    b: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return CURVES[self.name](self.b, x)


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


def case(name):
    given = DATA[name]
    batch = jnp.asarray(given["x"]), jnp.asarray(given["y"])
    fits = [Fit(Curve(jnp.asarray(start), name)) for start in given["starts"]]
    return fits, batch, np.asarray(given["certified"])


# The others are easy: `profile/test_intervals.py` has them, too.
HARD = "MGH10", "Thurber", "Hahn1", "ENSO", "BoxBOD", "Gauss1"


@pytest.mark.parametrize("name", HARD)
def test_bfgs_reaches_six_digits_from_both_starts(name):
    fits, batch, certified = case(name)
    for fit in fits:
        result = fit.whiten(batch).solve(BFGS, batch, max_steps=1024)
        assert result.stop_reason is vn.StopReason.CONVERGED
        np.testing.assert_allclose(result.model.b, certified, rtol=1e-6)


def test_many_rounds_are_one_program_and_end_in_a_space_of_their_own():
    """From the far start of MGH10 the first round ends where the curve is flat."""
    (far, _), batch, _ = case("MGH10")
    traces = 0

    class Counted(Fit):
        def residuals(self, model, batch):
            nonlocal traces
            traces += 1
            return super().residuals(model, batch)

    trainer = Counted(far.model).whiten(batch)
    flat = trainer.solve(BFGS, batch, max_steps=1024, rewhiten=False)
    assert flat.stop_reason is vn.StopReason.STALLED
    once = traces
    result = trainer.solve(BFGS, batch, max_steps=1024)
    assert traces == once
    # One history, and the lowest loss of all.
    count = len(flat.history)
    np.testing.assert_array_equal(result.history.loss[:count], flat.history.loss)
    assert len(result.history) == int(result.trainer.step_count)
    np.testing.assert_allclose(result.best_loss, np.nanmin(result.history.loss))
    np.testing.assert_array_equal(result.best.b, result.model.b)
    # Wherever the steps run out, the space is whitened, and not damped.
    for steps in (60, 300):
        trainer = Counted(far.model).whiten(batch)
        short = trainer.solve(BFGS, batch, max_steps=steps).trainer
        origin = short.projector.origin
        made = Counted(Curve(origin.b, "MGH10")).whiten(batch).projector
        np.testing.assert_allclose(short.projector.eigenvalues, made.eigenvalues)
        np.testing.assert_allclose(short.projector.covariance(), made.covariance())
        point = short.projector.to_params(short.latent)
        np.testing.assert_allclose(point.b, short.model.b)


def test_a_solve_of_one_round_is_the_same_without_the_others():
    (_, near), batch, _ = case("BoxBOD")
    trainer = near.whiten(batch)
    one = trainer.solve(BFGS, batch, rewhiten=False)
    assert one.stop_reason is vn.StopReason.CONVERGED
    result = trainer.solve(BFGS, batch)
    np.testing.assert_array_equal(result.history.loss, one.history.loss)
    np.testing.assert_array_equal(result.model.b, one.model.b)
    np.testing.assert_array_equal(
        result.trainer.projector.matrix, trainer.projector.matrix
    )
