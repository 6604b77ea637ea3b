"""How a fit ended."""

import dataclasses
from typing import TYPE_CHECKING, Any, Generic, final

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float
from typing_extensions import TypeVar

from .._boundary import PyTree
from .._curvature import Mode
from .._minimum import Distance
from .._pickling import Portable
from .._policy import StopReason
from .._report import Report
from .._storage import History
from .ending import Ending

TrainerT = TypeVar("TrainerT", covariant=True, default=Any)
Model = TypeVar("Model", covariant=True, default=Any)


@final
class FitResult(Portable, eqx.Module, Generic[TrainerT, Model]):
    r"""What a fit returns.

    **Attributes:**

    - `trainer`: the trainer after the last step, which can continue.
    - `history`: what was recorded; of a solve the losses of all its rounds, of which
        the last need not be the lowest.
    - `stop_reason`: why the fit ended; it prints as a sentence.
    """

    trainer: TrainerT
    history: History
    stop_reason: StopReason = eqx.field(static=True)
    _distance: Distance | None = None
    _has_best: bool = eqx.field(static=True, default=True)

    @property
    def edm(self) -> Float[np.ndarray, ""]:
        r"""The estimated distance to the minimum: how far the loss could still fall.

        $$\mathrm{edm} = \frac12 g^\top F^{-1} g$$

        with the gradient $g$ and the curvature $F$ where the fit ended: $J^\top J$ of
        `residuals`, else the Hessian. An error of $k$ error bars is an `edm` of
        $k^2/2$. It is NaN where it is not known: if `stop` did not end the fit, for
        minibatches and streams, with a `key`, with `constrain` or `transform_grads`,
        on a mesh. After `solve` it is known, unless what `solve` minimises has no
        second derivatives.

        The name is that of Minuit, see James and Roos, *Minuit: a system for function
        minimization and analysis of the parameter errors and correlations*, Computer
        Physics Communications 10 (1975).
        """
        known = self._distance
        return np.asarray(np.nan if known is None else known.edm)

    if not TYPE_CHECKING:  # for checkers every name would be one

        def __getattr__(self, name: str) -> Any:
            # For what is not found. Pickling asks before there is a trainer.
            kind = type(self.__dict__.get("trainer"))
            told = f"`FitResult` has no attribute {name!r}."
            if not name.startswith("_") and hasattr(kind, name):
                told += f" Its trainer has: `result.trainer.{name}`."
            raise AttributeError(told, name=name, obj=self)

    @property
    def model(self) -> Model:
        """The model after the last step."""
        return self._trainer.model

    @property
    def best(self) -> Model:
        """The model with the lowest loss that was scored on these data.

        Fits and solves of equal data, one after the other, have one best. It begins
        anew where its loss no longer compares: with other data, another `validation`,
        other code, and other values that the loss depends on (your own fields, leaves
        that are not trained, bounds, normal priors). Batches that are not known
        beforehand are taken for parts of the same data: those of a [`vernal.Stream`][],
        of [`vernal.Trainer.step`][], and of [`vernal.unroll`][] in a program of yours.
        The latter two see none of these changes. So a fit after a `step` begins its
        best anew, and so does a `step` after a fit.

        **Raises:**

        - `ValueError`: after `fit(best=False)`.
        """
        if not self._has_best:
            raise ValueError(
                "`best`: this fit kept none, by `best=False`. `model` is the model "
                "after the last step; for the best one, fit without `best=False`."
            )
        return self._trainer.best

    @property
    def best_loss(self) -> Float[Array, ""]:
        """The loss of `best`, or its validation score."""
        return self._trainer.best_loss

    @property
    def params(self) -> PyTree:
        """The trained parameters after the last step, `None` elsewhere."""
        return self._trainer.params

    def report(
        self,
        batch: Any,
        *,
        scale_errors: bool = False,
        data_count: int | None = None,
        jac: Mode | None = None,
        kind: Any = None,
    ) -> Report:
        """Reports how good the fit is, as [`vernal.Trainer.report`][], and its end."""
        options = {"scale_errors": scale_errors, "data_count": data_count}
        how = {"jac": jac, "kind": kind}
        report: Report = self._trainer.report(batch, **options, **how)
        return dataclasses.replace(report, stop_reason=self.stop_reason)

    def table(
        self,
        batch: Any = None,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: Any = None,
    ) -> str:
        """Tabulates the parameters, as [`vernal.Trainer.table`][]."""
        options = {"scale_errors": scale_errors, "jac": jac, "kind": kind}
        return self._trainer.table(batch, **options)

    def standard_errors(
        self,
        batch: Any,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: Any = None,
    ) -> Model:
        """Returns the standard errors, as [`vernal.Trainer.standard_errors`][]."""
        options = {"scale_errors": scale_errors, "jac": jac, "kind": kind}
        return self._trainer.standard_errors(batch, **options)

    def explain(self) -> str:
        """Says why the fit ended, and what could still fall.

        ```text
        Stopped short of a minimum. The loss could still fall by about 512 (edm), along
        power (+0.98), mean (-0.2).
        ```

        The numbers are the direction of the minimum, as far as it can be seen from
        here, with each parameter in units of its own scale. Where the loss curves
        downwards, they are the direction in which it does.
        """
        at_end = self._trainer, self.stop_reason, self._distance
        return Ending(*at_end, self.history.loss).explain()

    @property
    def _trainer(self) -> Any:
        # Its class imports this one, and cannot be named here.
        return self.trainer

    def __repr__(self) -> str:
        bad = max(count.total for count in self._trainer.nan_report().values())
        non_finite = f"non_finite={bad}, " if bad else ""
        edm = f"edm={float(self.edm):.3g}, " if np.isfinite(self.edm) else ""
        return (
            f"FitResult(steps={int(self._trainer.step_count)}, "
            f"best_loss={float(self._trainer.best_loss):.6g}, {non_finite}"
            f"{edm}stop_reason={str(self.stop_reason)!r}, history={self.history!r})"
        )
