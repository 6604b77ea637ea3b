"""`vernal.fit`: a fit of a loss that is a plain function, in one call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Unpack

import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from .._boundary import entrance, refuse_unknown, takes
from .._closure import Closure
from .._devices import Sharding
from .._fit import OPTIONS, FitKeywords, FitResult
from .._policy import NanPolicy, StopFit
from .._projection import EigenProjector
from .._tree import Selector
from .trainer import Trainer

Model = TypeVar("Model")
Batch = TypeVar("Batch")


class _FunctionTrainer(Trainer[Model, Batch]):
    function: Closure

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any):
        self.function = Closure.encode(function)
        super().__init__(*args, **options)

    def loss(self, model: Model, batch: Batch, **options: Any) -> Any:
        return self.function.decode()(model, batch, **options)


@entrance
def fit(
    loss: Callable[[Model, Any], Any] | Callable[..., Any],
    model: Model,
    optimiser: optax.GradientTransformation,
    data: Any,
    steps: int,
    *,
    train: Selector | None = None,
    nan_policy: NanPolicy = StopFit(),  # noqa: B008
    projector: EigenProjector | None = None,
    bounds: Mapping[Any, Any] | None = None,
    ties: Mapping[Any, str | Callable[[Model], Any]] | None = None,
    key: PRNGKeyArray | None = None,
    state: Any = None,
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
    **options: Unpack[FitKeywords],
) -> FitResult[Trainer[Model, Any], Model]:
    """Fits a model in one call, without a subclass of [`vernal.Trainer`][].

    ```python
    def loss(model, batch):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)

    result = vn.fit(loss, model, optax.adam(1e-2), (x, y), steps=500)
    ```

    **Arguments:**

    - `loss`: a function `(model, batch) -> scalar`, or `-> (scalar, dict of metrics)`.
        With `key=` or `state=` it is called with these keyword arguments too, and
        returns the new state last.
    - `model`, `optimiser`, `train`, `nan_policy`, `projector`, `bounds`, `ties`,
        `key`, `state`: as for [`vernal.Trainer`][].
    - `data`, `steps`, `mesh`, `sharding`, `**options`: as for [`vernal.Trainer.fit`][].

    **Returns:**

    A [`vernal.FitResult`][].
    """
    if not callable(loss):
        raise TypeError(
            f"`loss` is {loss!r}, but must be a function `(model, batch) -> scalar`."
        )
    keywords = [n for n, x in (("key", key), ("state", state)) if x is not None]
    form = ", ".join(["model, batch", *(f"{name}={name}" for name in keywords)])
    takes(loss, 2, "loss", f"loss({form})", keywords)
    refuse_unknown(options, (*OPTIONS, "mesh", "sharding"), "fit")
    trainer = _FunctionTrainer(
        loss,
        model,
        optimiser,
        train=train,
        nan_policy=nan_policy,
        projector=projector,
        bounds=bounds,
        ties=ties,
        key=key,
        state=state,
    )
    return trainer.fit(data, steps, mesh=mesh, sharding=sharding, **options)
