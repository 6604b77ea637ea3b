"""What a checker must not let pass. It is never run."""

import jax
import optax
import optimistix as optx

import vernal as vn

from .subclasses import Noisy
from .trainers import Fit, batch, line, lm, many, result, trainer, x

adam = optax.adam(1e-2)

Fit()  # caught
Fit(3.0, adam)  # caught
Fit(line, 3.0)  # caught
Fit(line, adam, "slope")  # caught
Fit(line, adam, tarin="slope")  # caught
Fit(line, adam, train=3)  # caught
Fit(line, adam, nan_policy="skip")  # caught
Fit(line, adam, nan_policy=vn.SkipStep)  # caught
Fit(line, adam, projector=batch)  # caught
Fit(line, adam, key=3)  # caught
Noisy(line, adam, key=jax.random.key(0))  # caught
Noisy(line, adam, 0.1, seed=jax.random.key(0))  # caught

trainer.step(3.0)  # caught
trainer.step((x,))  # caught
trainer.model = line  # caught
trainer.modle  # caught
trainer.model.slop  # caught
trainer.projector.matrxi  # caught
trainer.optimiser.with_scales({"slope": 2.0})  # caught
trainer.replace(model=3.0)  # caught
trainer.replace(optimizer=adam)  # caught
trainer.whiten(3.0)  # caught
trainer.fisher(batch, jac="forward")  # caught
trainer.solve(batch, lm)  # caught
trainer.solve(adam, batch)  # caught
trainer.solve(lm, batch, steps=3)  # caught

trainer.fit(batch)  # caught
trainer.fit(x, 10)  # caught
trainer.fit(batch, "10")  # caught
trainer.fit(batch, 10, reccord="slope")  # caught
trainer.fit(batch, 10, stop=vn.SkipStep())  # caught
trainer.fit(batch, 10, validation=batch)  # caught
trainer.fit(batch, 10, checkpoint="runs")  # caught
trainer.fit(batch, 10, callback=lambda trainer: None)  # caught
trainer.fit(batch, 10, callback=lambda trainer, history: "stop")  # caught
trainer.fit(batch, 10, callback=lambda trainer, history: history.los)  # caught
trainer.fit(batch, 10).modle  # caught
result.best.slop  # caught
result.history.los  # caught
result.stop_reason.CONVERGD  # caught

vn.fit(3, line, adam, batch, 10)  # caught
vn.fit(lambda model, batch: 0.0, line, 3.0, batch, 10)  # caught
vn.fit(lambda model, batch: 0.0, line, adam, batch, 10, reccord="slope")  # caught
vn.fit_many(3, batch, 10)  # caught
vn.fit_many([line], batch, 10)  # caught
vn.fit_many([trainer], batch, 10, reccord="slope")  # caught
vn.fit_many([trainer], batch, 10, solver=adam)  # caught
many.best.slop  # caught
many.trainer("first")  # caught

vn.SkipStep() | 3  # caught
vn.SkipStep() | vn.Patience(3)  # caught
vn.Patience(3) | vn.StopFit()  # caught
vn.StopAfter()  # caught
vn.Converged(1e-3)  # caught
vn.Minibatches(batch, 2)  # caught
vn.Stream(3)  # caught
vn.Checkpoints("runs", evry=3)  # caught
vn.ParamOptimiser({"slope": 3.0})  # caught
vn.ParamOptimiser({"slope": adam}, defualt=None)  # caught
vn.window(0.1)  # caught
vn.window(adam, start=0.5)  # caught
vn.load("fit.vernal", trainer, reset=3)  # caught
vn.EigenProjector.from_fisher(trainer.params)  # caught
optx.minimise(trainer.residuals, lm, line)  # caught
