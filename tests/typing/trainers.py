# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What a trainer whose model and batch are named gives: no step loses its class."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from jax import Array

import vernal as vn


class Line(eqx.Module):
    slope: Array
    offset: Array

    def __call__(self, x: Array) -> Array:
        return self.slope * x + self.offset


Batch = tuple[Array, Array]


class Fit(vn.Trainer[Line, Batch]):
    def residuals(self, model: Line, batch: Batch) -> Array:
        x, y = batch
        return model(x) - y


def leaves(module: eqx.Module) -> int:
    return len(jax.tree.leaves(module))


x = jnp.linspace(0.0, 1.0, 8)
batch = x, 2 * x + 1
line = Line(jnp.array(0.5), jnp.array(0.0))
lm: optx.LevenbergMarquardt[Any, Any, Any] = optx.LevenbergMarquardt(
    rtol=1e-6, atol=1e-6
)

trainer = Fit(line, vn.ParamOptimiser({"slope": optax.adam(0.1), "offset": None}))
assert_type(trainer, Fit)
assert_type(trainer.model, Line)
assert_type(trainer.best.slope, Array)
assert_type(trainer.best_loss, Array)
assert_type(trainer.step_count, Array)
assert_type(trainer.nan_policy, vn.NanPolicy)
leaves(trainer)

known = Fit(
    line,
    bounds={"slope": (0, None)},
    ties={"offset": lambda model: 2 * model.slope},
    priors={"slope": vn.Normal(0.0, 1.0)},
)
assert_type(known, Fit)
assert_type(known.model, Line)
assert_type(vn.Normal(0, jnp.ones(2)).log_prob(1.0), Array)

stepped, info = trainer.step(batch)
assert_type(stepped, Fit)
assert_type(info, vn.StepInfo)
assert_type(info.loss, Array)
stepped, info = eqx.filter_jit(trainer.step)(batch)

result = trainer.fit(batch, 3, record=("slope", "grad_norm"), progress=False)
assert_type(result, vn.FitResult[Fit, Line])
assert_type(result.model, Line)
assert_type(result.best, Line)
assert_type(result.trainer, Fit)
assert_type(result.history, vn.History)
assert_type(result.history.loss, np.ndarray)
assert_type(result.history["slope"], np.ndarray)
assert_type(result.stop_reason, vn.StopReason)
assert_type(result.edm, np.ndarray)
assert_type(result.explain(), str)

whitened = trainer.whiten(batch, optimiser=optax.adam(0.1))
assert_type(whitened, Fit)
assert_type(whitened.projector.matrix, Array | Any)
assert_type(whitened.reproject(whitened.projector), Fit)
ended = whitened.solve(lm, batch)
assert_type(ended, vn.FitResult[Fit, Line])
assert_type(whitened.fisher(batch), Array)
assert_type(trainer.fisher(batch, blocks=("slope",)), dict[Any, Array])
assert_type(trainer.replace(model=line, optimiser=optax.sgd(0.1)), Fit)
assert_type(trainer.optimiser.with_scale({"slope": 2.0}), vn.ParamOptimiser | Any)
assert_type(trainer.nan_report(), dict[str, vn.NanCount])
assert_type(trainer.learning_rates(), dict[str, float | None])
assert_type(trainer.standard_errors(batch), Line)
assert_type(trainer.table(batch), str)
assert_type(trainer.report(batch, scale_errors=True), vn.Report)
assert_type(trainer.table(batch, scale_errors=True), str)
assert_type(trainer.standard_errors(batch, scale_errors=True), Line)
assert_type(trainer.report(batch)["slope"].error, float)
assert_type(trainer.report(batch).chi_squared, float | Any)
assert_type(trainer.draw(jax.random.key(0), 3, batch), Line)
propagated = trainer.propagate(lambda line: line.slope * line.offset, batch)
assert_type(propagated, vn.Propagated)
value, error = propagated
solved = ended.trainer
assert_type(solved, Fit)
assert_type(solved.intervals(lm, batch), dict[str, tuple[float, float]])
assert_type(solved.profile(lm, batch, "slope", scale_errors=True), vn.Profile[Line])
assert_type(solved.profile(lm, batch, "slope", [1.0]).models, Line)
assert_type(solved.profile(lm, batch, "slope").delta, np.ndarray)
assert_type(solved.profile(lm, batch), dict[str, vn.Profile[Line]])
assert_type(solved.profile(lm, batch, ["slope"]), dict[str, vn.Profile[Line]])
assert_type(result.report(batch), vn.Report)
assert_type(result.table(batch), str)
assert_type(result.standard_errors(batch), Line)
assert_type(result.best_loss, Array)
assert_type(vn.unroll(trainer, batch, 2), tuple[Fit, Array])

many = vn.fit_many([trainer, trainer.replace(model=line)], batch, 3, progress=False)
assert_type(many, vn.ManyResult[Fit])
assert_type(many.best, Line)
assert_type(many.trainer(0), Fit)
assert_type(many.trainers, Fit)
assert_type(many.losses, np.ndarray)
assert_type(many.failed, tuple[int, ...])
assert_type(many.table(batch), str)
assert_type(many.to_dict(batch), dict[str, Any])
assert_type(many.report(0, batch), vn.Report)
assert_type(many.stop_reasons, tuple[vn.StopReason, ...])
assert_type(vn.fit_many(many.trainers, batch, 3, solver=lm).best, Line)

with TemporaryDirectory() as folder:
    path = Path(folder) / "fit.vernal"
    vn.save(path, result.trainer)
    assert_type(vn.load(path, trainer), Fit)
    vn.save(path, {"slope": x})
    assert_type(vn.load(path, {"slope": x}), dict[str, Array])


def best_of(trainer: vn.Trainer[Line, Batch]) -> Line:
    return trainer.fit(batch, 0, progress=False).best


def kept(results: list[vn.FitResult[vn.Trainer[Line, Batch], Line]]) -> None:
    results.append(result)


best_of(trainer)
kept([])
