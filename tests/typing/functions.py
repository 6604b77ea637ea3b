# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What the functions give, and where their results can go."""

from collections.abc import Callable
from typing import assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

import vernal as vn


class Line(eqx.Module):
    slope: Array
    offset: Array

    def __call__(self, x: Array) -> Array:
        return self.slope * x + self.offset


Batch = tuple[Array, Array]


def loss(model: Line, batch: Batch) -> Array:
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def noisy(model: Line, batch: Batch, *, key: PRNGKeyArray) -> Array:
    x, y = batch
    return loss(model, (x, y + jax.random.normal(key, y.shape)))


def counting(model: Line, batch: Batch, *, state: Array) -> tuple[Array, Array]:
    return loss(model, batch), state + 1


x = jnp.linspace(0.0, 1.0, 8)
batch = x, 2 * x + 1
line = Line(jnp.array(0.5), jnp.array(0.0))
key = jax.random.key(0)

# Optimisers, alone and where Optax takes one.
schedule = vn.delay(1e-2, 2)
late = vn.window(optax.adam(schedule), 2)
optimiser = vn.ParamOptimiser({"slope": late, ("offset",): optax.sgd(0.1)})
assert_type(optimiser.with_scale({"slope": 2.0}), vn.ParamOptimiser)
assert_type(optimiser.summary(line), str)
assert_type(optimiser.split(line), tuple[Line, Line])
chained: optax.GradientTransformation = optax.chain(optax.clip(1.0), optimiser)
anywhere: list[optax.GradientTransformation] = [
    optimiser,
    late,
    vn.partition({"a": optimiser, "b": optax.sgd(0.1)}, "a"),
    vn.map_optimisers({"a": x}, {"a": optax.sgd(0.1)})[0],
    vn.precondition({"slope": x}),
]

# A fit in one call.
fitted = vn.fit(loss, line, optimiser, batch, 3, progress=False)
assert_type(fitted.model, Line)
assert_type(fitted.best, Line)
assert_type(fitted.history.loss, np.ndarray)
assert_type(fitted.trainer.model, Line)
assert_type(vn.fit(noisy, line, optimiser, batch, 0, key=key).best, Line)
assert_type(vn.fit(counting, line, optimiser, batch, 0, state=x[0]).best, Line)
vn.fit(lambda model, _: model.slope**2, line, optimiser, batch, 0, train="slope")
vn.fit(loss, line, chained, batch, 0, record=("slope",), stop=vn.Converged(0.1, 9))

# Trees of the user's own keep their class.
assert_type(vn.split(line, "slope"), tuple[Line, Line])
assert_type(vn.split(line, lambda path, leaf: path == "slope"), tuple[Line, Line])
assert_type(vn.paths(line), tuple[str, ...])
assert_type(vn.zero_nan_check(line), Line)

# Curvature and projection.
square: Callable[[Line], Array] = lambda model: loss(model, batch)
residuals: Callable[[Line], Array] = lambda model: model(x) - batch[1]
fisher = vn.gauss_newton(residuals, line)
assert_type(fisher, Array)
assert_type(vn.hessian(square, line), Array)
assert_type(vn.jacobian(residuals, line), Array)
assert_type(vn.decompose(fisher), tuple[Array, Array])
assert_type(vn.eigen_projection(fmat=np.asarray(fisher)), Array)
projector = vn.EigenProjector.from_fisher(fisher, line)
assert_type(projector, vn.EigenProjector)
assert_type(projector.eigenvalues, Array)
rank: int = projector.rank
assert_type(projector.null_space(), tuple[dict[str, float], ...])

# Data and history.
minibatches = vn.Minibatches({"x": np.zeros(8), "y": x}, 4, key=key)
assert_type(minibatches.steps_per_epoch, int)
assert_type(fitted.history + fitted.history, vn.History)
assert_type(fitted.history.to_dict(), dict[str, np.ndarray])
