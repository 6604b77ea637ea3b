"""Twins of what is in `right`, each with one annotation that does not hold."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import vernal as vn

from . import right
from .right import Batch, Model


class Residuals(right.ByResiduals):
    def residuals(self, model: Model, batch: Batch) -> Float[Array, "n n"]:
        return right.residuals_of(model, batch)


class Likelihood(right.ByLikelihood):
    def nll(self, model: Model, batch: dict) -> Float[Array, ""]:
        return 50 * jnp.sum(right.residuals_of(model, batch) ** 2)


class Loss(vn.Trainer[Model, Batch]):
    def loss(self, model: Model, batch: Batch) -> Int[Array, ""]:
        return jnp.mean(right.residuals_of(model, batch) ** 2)


class Evaluates(right.ByResiduals):
    def evaluate(self, model: Model, batch: Batch) -> Float[Array, " n"]:
        return jnp.sum(right.residuals_of(model, batch))


class Constrains(right.Hooked):
    def constrain(self, model: Batch) -> Model:
        return model


class Transforms(right.Hooked):
    def transform_grads(self, grads: Model, model: Model) -> dict[str, Any]:
        return grads


class Judges(right.Lenient):
    def apply(
        self, loss: Float[Array, "n"], grads: Model, state: Int[Array, ""]
    ) -> Any:
        return super().apply(loss, grads, state)


class Begins(right.Lenient):
    def init(self, params: Batch) -> Int[Array, ""]:
        return jnp.asarray(0)


class Stops(right.Near):
    def apply(
        self, view: vn.StepView, state: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return view.loss < self.goal, state


def rate(count: Int[Array, ""]) -> Bool[Array, ""]:
    return 1e-3 / (1.0 + count)


def is_bend(path: int, leaf: Any) -> bool:
    return "bends" in path


def callback(trainer: right.ByLoss, history: vn.History) -> None:
    return None


def plain_loss(model: Model, batch: Batch) -> Float[Array, "n n"]:
    return jnp.mean(right.residuals_of(model, batch) ** 2)


def total(params: Any) -> Float[Array, "two dims"]:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
