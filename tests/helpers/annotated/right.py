"""A user's package, of which every annotation holds: see `test_annotations.py`."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import vernal as vn


class Model(eqx.Module):
    slope: Float[Array, ""]
    bends: Float[Array, " bends"]
    nothing: None
    scale: float

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        powers = x[:, None] ** jnp.arange(2, 2 + self.bends.size)[None, :]
        return self.slope * x + powers @ self.bends


class Data(eqx.Module):
    x: Float[Array, " n"]
    y: Float[Array, " n"]
    name: str
    is_plain: bool
    order: int


class Batch(NamedTuple):
    data: Data
    is_plain: bool
    weight: Float[Array, ""]


def model() -> Model:
    return Model(jnp.asarray(0.5), jnp.asarray([0.1, 0.2]), None, 1.0)


def batch(size: int = 8) -> Batch:
    x = np.linspace(-1, 1, size)
    y = 2 * x + 0.3 * x**2
    data = Data(jnp.asarray(x), jnp.asarray(y), "a line", True, 2)
    return Batch(data, False, jnp.asarray(1.0))


def residuals_of(model: Model, batch: Batch) -> Float[Array, " n"]:
    check(batch.is_plain, batch.data.is_plain, batch.data.name, batch.data.order)
    return (model(batch.data.x) - batch.data.y) * batch.weight


def check(is_plain: bool, is_also: bool, name: str, order: int) -> None:
    assert (is_plain, is_also, name, order) == (False, True, "a line", 2)


class ByResiduals(vn.Trainer[Model, Batch]):
    width: Float[Array, ""]
    label: str = eqx.field(static=True)

    def __init__(self, model: Model, *args: Any, label: str = "", **options: Any):
        super().__init__(model, *args, **options)
        self.width = jnp.asarray(0.1)
        self.label = label

    def residuals(self, model: Model, batch: Batch) -> Float[Array, " n"]:
        return residuals_of(model, batch) / self.width

    def evaluate(self, model: Model, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(jnp.abs(residuals_of(model, batch)))


class Hooked(ByResiduals):
    def transform_grads(self, grads: Model, model: Model) -> Model:
        return jax.tree.map(lambda x: x * 1.0, grads)

    def constrain(self, model: Model) -> Model:
        return eqx.tree_at(lambda m: m.slope, model, jnp.clip(model.slope, -9, 9))


class ByLikelihood(vn.Trainer[Model, Batch]):
    def nll(self, model: Model, batch: Batch) -> Float[Array, ""]:
        return 50 * jnp.sum(residuals_of(model, batch) ** 2)


class ByLoss(vn.Trainer[Model, Batch]):
    """With a key, metrics and a state."""

    def loss(
        self, model: Model, batch: Batch, *, key: PRNGKeyArray, state: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Int[Array, ""]]:
        residuals = residuals_of(model, batch)
        noise = 0.01 * jax.random.normal(key)
        worst = jnp.max(jnp.abs(residuals))
        return jnp.mean(residuals**2) + noise, {"worst": worst}, state + 1


class Lenient(vn.NanPolicy):
    most: Int[Array, ""]

    def init(self, params: Model) -> Int[Array, ""]:
        return jnp.asarray(0)

    def apply(
        self, loss: Float[Array, ""], grads: Model, state: Int[Array, ""]
    ) -> tuple[Model, vn.Verdict, Int[Array, ""]]:
        is_bad = ~jnp.isfinite(loss)
        state = jnp.where(is_bad, state + 1, state)
        return grads, vn.Verdict(accept=~is_bad, stop=state > self.most), state


class Near(vn.StopCriterion):
    goal: float

    def init(self, params: Model) -> Float[Array, ""]:
        return jnp.asarray(jnp.inf)

    def apply(
        self, view: vn.StepView, state: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], Float[Array, ""]]:
        return view.loss < self.goal, jnp.minimum(state, view.loss).astype(state.dtype)


def rate(count: Int[Array, ""]) -> Float[Array, ""]:
    return 1e-3 / (1.0 + count)


def is_bend(path: str, leaf: Any) -> bool:
    return "bends" in path


def callback(trainer: vn.Trainer, history: vn.History) -> bool | None:
    return None


def plain_loss(model: Model, batch: Batch) -> Float[Array, ""]:
    return jnp.mean(residuals_of(model, batch) ** 2)


def total(params: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
