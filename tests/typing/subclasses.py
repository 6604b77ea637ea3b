# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false
"""Classes of a user's own: trainers with hooks and fields, policies, criteria."""

from collections.abc import Iterator
from typing import Any, assert_type

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from beartype import beartype
from jaxtyping import Array, Float, PRNGKeyArray, jaxtyped

import vernal as vn


class Line(eqx.Module):
    slope: Float[Array, ""]
    offset: Float[Array, ""] | None = None

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.slope * x + (0.0 if self.offset is None else self.offset)


Batch = tuple[Float[Array, " n"], Float[Array, " n"]]


class Hooked(vn.Trainer[Line, Batch]):
    """Overrides all that there is."""

    def nll(self, model: Line, batch: Batch) -> Float[Array, ""]:
        x, y = batch
        return jnp.sum((model(x) - y) ** 2) / 2

    def evaluate(self, model: Line, batch: Batch) -> Float[Array, ""]:
        return self.nll(model, batch) / len(batch[0])

    def constrain(self, model: Line) -> Line:
        return Line(jnp.maximum(model.slope, 0.0), model.offset)

    def transform_grads(self, grads: Line, model: Line) -> Line:
        return Line(2 * grads.slope, grads.offset)


class Noisy(vn.Trainer[Line, Batch]):
    """Has a field of its own, and draws random numbers."""

    width: float

    def __init__(
        self,
        model: Line,
        optimiser: optax.GradientTransformation,
        width: float,
        *,
        key: PRNGKeyArray,
    ) -> None:
        super().__init__(model, optimiser, key=key)
        self.width = width

    @jaxtyped(typechecker=beartype)
    def loss(
        self, model: Line, batch: Batch, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        x, y = batch
        shift = self.width * jax.random.normal(key, x.shape)
        error = model(x) + shift - y
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}


class Noisier(Noisy):
    """Has the arguments of the class before it."""

    factor: float = 2.0


class Counting(vn.Trainer[Line, Batch]):
    """Carries a state."""

    def loss(
        self, model: Line, batch: Batch, *, state: Array
    ) -> tuple[Float[Array, ""], Array]:
        x, y = batch
        return jnp.mean((model(x) - y) ** 2), state + 1


class OfAnyBatch(vn.Trainer[Line]):
    def residuals(self, model: Line, batch: Any) -> Array:
        x, y = batch
        errors: Array = model(x) - y
        return errors


class OfAnything(vn.Trainer):
    def residuals(self, model: Line, batch: Batch) -> Array:
        return model(batch[0]) - batch[1]


class Halve(vn.NanPolicy):
    factor: float = 0.5

    def init(self, params: Any) -> Float[Array, ""]:
        return jnp.array(1.0)

    def apply(
        self, loss: Array, grads: Any, state: Float[Array, ""]
    ) -> tuple[Any, vn.Verdict, Float[Array, ""]]:
        is_finite = jnp.isfinite(loss)
        state = jnp.where(is_finite, state, self.factor * state)
        return grads, vn.Verdict(accept=is_finite, stop=state < 1e-3), state


class Always(vn.NanPolicy):
    def init(self, params: Any) -> None:
        return None

    def apply(
        self, loss: Array, grads: Any, state: None
    ) -> tuple[Any, vn.Verdict, None]:
        return grads, vn.Verdict(True, False), state


class Positive(vn.Bijection):
    def forward(self, free: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.exp(free)

    def inverse(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.log(value)


class Never(vn.StopCriterion):
    def init(self, params: Any) -> None:
        return None

    def apply(self, view: vn.StepView, state: None) -> tuple[bool, None]:
        return False, state


class Flat(vn.StopCriterion):
    norm: float

    def init(self, params: Any) -> None:
        return None

    def apply(self, view: vn.StepView, state: None) -> tuple[Array, None]:
        return jnp.asarray(optax.tree.norm(view.grads)) < self.norm, state


def watch(trainer: Hooked, history: vn.History) -> bool:
    return bool(history.loss[-1] < 1e-6)


def watch_any(trainer: vn.Trainer, history: vn.History) -> None:
    assert_type(trainer.model, Any)


def batches(step: int) -> Iterator[Batch]:
    while True:
        yield data


x = jnp.linspace(0.0, 1.0, 8)
data = x, 2 * x
line = Line(jnp.array(0.5))
adam, key = optax.adam(0.1), jax.random.key(0)
policy = vn.SkipStep() | vn.StopAfter(3) | Halve()
assert_type(policy, vn.NanPolicy)
criterion = Flat(1e-8) | vn.Converged(1e-8, patience=20)
assert_type(criterion, vn.StopCriterion)

hooked = Hooked(line, adam, train=("slope",), nan_policy=policy)
fitted = hooked.fit(
    data, 3, stop=criterion, callback=watch, validation=(data, 2), progress=False
)
assert_type(fitted, vn.FitResult[Hooked, Line])
hooked.fit(vn.Stream(batches), 2, callback=watch_any, progress=False)
hooked.fit(vn.Stream([data]), 0, callback=lambda trainer, _: trainer, chunk=1)
hooked.fit(
    vn.Minibatches(data, 4, key=key), 2, callback=lambda _, history: len(history) > 1
)

noisy = Noisier(line, adam, 0.1, key=key)
assert_type(noisy.model, Line)
assert_type(noisy.width, float)
assert_type(noisy.step(data)[1].metrics, dict[str, Any])
counting = Counting(line, adam, state=jnp.zeros((), int))
assert_type(counting.fit(data, 0, progress=False).best, Line)
assert_type(OfAnyBatch(line).whiten(data).model, Line)
assert_type(OfAnything(line, train=lambda path, leaf: path == "slope").model, Any)


class Exponential(vn.likelihoods.AbstractLikelihood):
    """A likelihood of a user's own: waiting times."""

    mean: Float[Array, " n"]
    times: Float[Array, " n"]

    def count(self) -> int:
        return self.times.size

    def nll(self) -> Float[Array, ""]:
        return 0.5 * jnp.sum(self.residuals() ** 2)

    def residuals(self) -> Float[Array, " n"]:
        ratio = self.times / self.mean
        return jnp.sign(1 - ratio) * jnp.sqrt(2 * (ratio - 1 - jnp.log(ratio)))

    def scoring_residuals(self) -> Float[Array, " n"]:
        return (self.mean - self.times) / jax.lax.stop_gradient(self.mean)


class Waiting(vn.Trainer[Line, Batch]):
    def residuals(self, model: Line, batch: Batch) -> Any:
        x, y = batch
        return {
            "times": Exponential(model(x), y),
            "counts": vn.likelihoods.Poisson(model(x), y, where=y >= 0),
            "robust": vn.likelihoods.Robust(model(x) - y, "huber", 1.3),
        }


def errors(trainer: Waiting, batch: Batch) -> None:
    assert_type(trainer.standard_errors(batch, kind="sandwich"), Line)
    assert_type(trainer.fisher(batch, kind="observed"), Float[Array, "D D"])
    clean, omitted = vn.omit(batch)
    assert_type(clean, Batch)
    assert_type(omitted.count, int)
