"""How many fits ended."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, final

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float
from typing_extensions import TypeVar

from .._boundary import PyTree, boolean, unmeshed_entrance, whole_number
from .._curvature import Mode
from .._data import as_batch
from .._fit import Ending
from .._inference import ErrorKind, ErrorOptions, KnownErrors
from .._minimum import Distance
from .._pickling import Portable
from .._policy import NanCount, StopReason
from .._report import Report, pandas
from .._step import bounds_of, noted_as_member, tied_words
from .._storage import History
from .._trainer import Trainer
from .._tree import by_path
from .columns import (
    ByElement,
    Met,
    as_columns,
    as_table,
    bounds_met,
    by_element,
    held,
)
from .data_axis import members_first
from .errors import (
    errors_of_each,
    warn_if_any_is_far,
    warn_if_any_is_lost,
    warn_if_any_is_of_few,
    warn_if_any_lacks_slopes,
)
from .mapped_chunk import Flags, member

TrainerT = TypeVar(
    "TrainerT", bound=Trainer[Any, Any], covariant=True, default=Trainer[Any, Any]
)
Model = TypeVar("Model")


@final
class ManyResult(Portable, eqx.Module, Generic[TrainerT]):
    """What [`vernal.fit_many`][] returns. `len(result)` is the number of members.

    **Attributes:**

    - `trainers`: all trainers after the last step, stacked: a trainer whose arrays have
        a row for each member. It can be given to `fit_many` again.
    - `history`: what was recorded, with a column for each member:
        `history.loss[row, i]`. After a member has ended, its column is NaN.
    - `stop_reasons`: why the fit of each ended.
    - `edms`: how far the loss of each could still fall, as `edm` of a
        [`vernal.FitResult`][]: after a solve, and of each member whose fit
        [`vernal.Converged`][] ended. NaN where it is not known.
    """

    trainers: TrainerT
    history: History
    stop_reasons: tuple[StopReason, ...] = eqx.field(static=True)
    edms: Float[np.ndarray, " members"]
    _data_axis: Any = None
    _group: int = eqx.field(static=True, default=0)
    # With a row for each member.
    _distances: Distance | None = None
    _without_data: tuple[int, ...] = eqx.field(static=True, default=())

    if not TYPE_CHECKING:  # for checkers every name would be one

        def __getattr__(self, name: str) -> Any:
            # For what is not found. Pickling asks before there are trainers.
            told = f"`ManyResult` has no attribute {name!r}."
            kind, known = type(self.__dict__.get("trainers")), dir(self)
            if name == "member":
                told += " The trainer of one is `result.trainer(i)`."
            plural = [x for x in (f"{name}s", f"{name}es") if x in known]
            single = [x for x in (name, name.removesuffix("s")) if hasattr(kind, x)]
            if plural:
                told += f" It has one for each member: `result.{plural[0]}`."
            elif single and not name.startswith("_"):
                told += (
                    f" The trainer of a member has: `result.trainer(i).{single[0]}`. "
                    "All of them are stacked in `result.trainers`."
                )
            raise AttributeError(told, name=name, obj=self)

    def __len__(self) -> int:
        return len(self.stop_reasons)

    def trainer(self, index: int) -> TrainerT:
        """The trainer of one member."""
        index = whole_number(index, "index")
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` is {index}, and there are {len(self)} members.")
        is_array = lambda leaf: isinstance(leaf, jax.Array)
        one = jax.tree.map(lambda x: x[index] if is_array(x) else x, self.trainers)
        return noted_as_member(one, self.trainers, index)

    @property
    def losses(self) -> Float[np.ndarray, " members"]:
        """The last recorded loss of each member that is not NaN, if there is one."""
        if not len(self.history):
            return np.full(len(self), np.nan)
        backwards = self.history.loss[::-1]
        last = np.argmin(np.isnan(backwards), axis=0)
        return np.take_along_axis(backwards, last[None], axis=0)[0]

    @property
    def best_losses(self) -> Float[Array, " members"]:
        """The loss of each member's best model, or its validation score."""
        return self.trainers.best_loss

    @property
    def best_index(self) -> int:
        """The member with the lowest of all `best_losses`.

        One of whose data no datum is left, of which a warning tells, is not it: any
        model fits those.
        """
        losses = np.array(self.best_losses)
        losses[list(self._without_data)] = np.inf
        return int(np.argmin(losses))

    @property
    def best(self: "ManyResult[Trainer[Model, Any]]") -> Model:
        """The best model of all members."""
        return self.trainer(self.best_index).best

    @property
    def params(self) -> PyTree:
        """The trained parameters of all members, which are the first axis."""
        return self.trainers.params

    @property
    def failed(self) -> tuple[int, ...]:
        """The members whose parameters are not an answer.

        Their fits broke off, or stopped short of a minimum, or there is none:
        `stop_reasons` says why.
        """
        reasons = enumerate(self.stop_reasons)
        return tuple(index for index, reason in reasons if reason.is_failure)

    @unmeshed_entrance
    def errors(
        self,
        data: Any,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> PyTree:
        """Returns the standard errors of all members, in one compiled program.

        **Arguments:**

        - `data`: all of the data, one batch, as for [`vernal.fit_many`][]: each member
            has its own part along the `data_axis` of the fit.
        - `scale_errors`: as for [`vernal.Trainer.report`][]: those of each member by
            its own reduced chi-squared.
        - `jac`: as for [`vernal.Trainer.fisher`][].
        - `kind`: as for [`vernal.Trainer.standard_errors`][].

        **Returns:**

        A tree like `params`; errors of tied parameters are in `table` and `to_dict`.
        The errors of a member are NaN if its residuals or their derivatives are not
        finite, or its model raises an error, or the Hessian of its `nll` has a negative
        eigenvalue, or with `scale_errors` or the sandwich it has no more data than free
        parameters, or with the latter data without scatter; this harms no other member.
        There is a warning if one of them is far from its minimum, as of
        [`vernal.Trainer.standard_errors`][], or ended where there is none.

        **Raises:**

        - `TypeError`: if the class defines only `loss`.
        - `ValueError`: if an axis of `data` is not as long as there are members; if
            `scale_errors` or the sandwich finds no scatter in any member, or the former
            a scale that is known, as of [`vernal.Trainer.report`][].
        """
        is_scaled = boolean(scale_errors, "scale_errors")
        found = self._errors(data, ErrorOptions(is_scaled, jac, kind)).own
        # A table, and the columns, say how each ended.
        warn_if_any_is_lost(self._distances, self.explain)
        return found

    @unmeshed_entrance
    def report(
        self,
        index: int,
        data: Any,
        *,
        scale_errors: bool = False,
        data_count: int | None = None,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Report:
        """Reports how good the fit of one member is, as [`vernal.Trainer.report`][].

        **Arguments:**

        - `index`: the member.
        - `data`, `jac`, `kind`: as for `errors`.
        - `scale_errors`, `data_count`: as for [`vernal.Trainer.report`][].
        """
        trainer = self.trainer(index)
        batch, flags = self._rows_of(data)
        own = member(batch, flags, range(len(self))[index])
        scaled = {"scale_errors": scale_errors, "data_count": data_count}
        report = trainer.report(own, **scaled, jac=jac, kind=kind)
        return dataclasses.replace(report, stop_reason=self.stop_reasons[index])

    @unmeshed_entrance
    def table(
        self,
        data: Any = None,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> str:
        """Tabulates the parameters of all members: a row for each.

        A line at the end counts those that failed, and lists them by their reasons.

        **Arguments:**

        - `data`, `scale_errors`, `jac`, `kind`: as for `errors`; without data there are
            no errors.

        **Returns:**

        A table with the values of at most 12 elements, their standard errors, the best
        loss, and why each ended. A column of what is tied says so, and so does a cell
        of what is held at its bound.
        """
        losses = np.asarray(self.best_losses)
        found = self._by_element(data, ErrorOptions(scale_errors, jac, kind))
        return as_table(found, losses, self.stop_reasons)

    @unmeshed_entrance
    def to_dict(
        self,
        data: Any = None,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> dict[str, Any]:
        """Returns a column for each element of the parameters, by its name.

        **Arguments:**

        - `data`, `scale_errors`, `jac`, `kind`: as for `errors`; without data there are
            no errors.

        **Returns:**

        A dictionary of arrays with a number for each member, also of tied parameters:
        `"peak.flux"`, and with `data` its error, `"error[peak.flux]"`, and where it has
        bounds `"at_bound[peak.flux]"`, whether it is held at one; `"best_loss"`,
        `"edm"`, and `"stop_reason"`, a list of sentences. With `data`, for `residuals`
        that are not robust, and without priors, also `"chi_squared"`, `"data_count"`
        and `"degrees_of_freedom"`, as in a [`vernal.Report`][]; if they are arrays or
        `Gaussian`, also `"p_value"`, NaN without degrees of freedom. (If a parameter
        has one of these names, the other key is `"<edm>"`.)
        """
        options = ErrorOptions(scale_errors, jac, kind)
        found = self._by_element(data, options)
        return as_columns(
            found.values,
            found.errors,
            held(found.errors, found.met),
            best_loss=np.asarray(self.best_losses),
            edm=self.edms,
            stop_reason=[str(reason) for reason in self.stop_reasons],
            **found.goodness,
        )

    @unmeshed_entrance
    def to_dataframe(
        self,
        data: Any = None,
        *,
        scale_errors: bool = False,
        jac: Mode | None = None,
        kind: ErrorKind | None = None,
    ) -> Any:
        """Returns the columns of `to_dict` as a `pandas.DataFrame`, indexed by member.

        **Arguments:**

        - `data`, `scale_errors`, `jac`, `kind`: as for `errors`; without data there are
            no errors.

        **Raises:**

        - `ImportError`: if pandas is not installed.
        """
        options = {"scale_errors": scale_errors, "jac": jac, "kind": kind}
        frame = pandas().DataFrame(self.to_dict(data, **options))
        return frame.rename_axis("member")

    def _rows_of(self, data: Any) -> tuple[Any, Flags]:
        batch = as_batch(data, "data")
        return members_first(batch, self._data_axis, len(self), "data")

    def _errors(self, data: Any, options: ErrorOptions) -> KnownErrors:
        batch, flags = self._rows_of(data)
        found = errors_of_each(self.trainers, batch, flags, self._group, options)
        if options.scale_errors:
            found = found.scaled(self.trainers, options.kind)
        member_of = lambda index: (self.trainer(index), member(batch, flags, index))
        warn_if_any_is_far(found, member_of, options)
        warn_if_any_is_of_few(found, member_of)
        about = found, member_of, options.kind
        warn_if_any_lacks_slopes(self._distances, *about)
        return found

    def _by_element(self, data: Any, options: ErrorOptions) -> ByElement:
        """Returns a column for each element; without data there are no errors."""
        is_scaled = boolean(options.scale_errors, "scale_errors")
        values, errors, words = by_element(self.params), {}, {}
        met, goodness = Met({}, {}), {}
        if tied := tied_words(self.trainers):
            models = eqx.filter_vmap(lambda trainer: trainer.model)(self.trainers)
            leaves = by_path(models).by_name()
            for path, text in tied.items():
                columns = by_element({path: leaves[path]})
                values |= columns
                words |= dict.fromkeys(columns, text)
        if data is not None:
            found = self._errors(data, options._replace(scale_errors=is_scaled))
            errors = by_element(found.own) | by_element(found.tied)
            goodness = found.goodness(self.trainers)
        if bounds_of(self.trainers) is not None:
            flags = eqx.filter_vmap(bounds_met)(self.trainers)
            met = Met(*map(by_element, flags))
        return ByElement(values, errors, met, words, goodness)

    def explain(self, index: int) -> str:
        """Says why the fit of one member ended, and what could still fall.

        As [`vernal.FitResult.explain`][] does, where `edms` is known.
        """
        trainer, known = self.trainer(index), self._distances
        distance = jax.tree.map(lambda x: x[index], known)
        losses = self.history.loss
        losses = losses[~np.isnan(losses[:, index]), index] if len(losses) else losses
        name = f"result.trainer({index})"
        more = "`steps` of `fit_many` allows more"
        ending = trainer, self.stop_reasons[index], distance, losses, name, more
        return Ending(*ending).explain()

    def nan_report(self, index: int) -> dict[str, NanCount]:
        """What was not finite in one member, as [`vernal.Trainer.nan_report`][]."""
        return self.trainer(index).nan_report()

    def __repr__(self) -> str:
        best = self.best_index
        return (
            f"ManyResult({len(self)} members, "
            f"best_loss={float(self.best_losses[best]):.6g} of member {best})"
        )


def measured(result: ManyResult[Any], distances: Sequence[Distance]) -> ManyResult[Any]:
    """Returns a result with the distance of each member to its minimum."""
    size = max(distance.direction.size for distance in distances)

    def filled(distance: Distance) -> Distance:
        # That of what is not finite has no direction.
        direction = np.zeros(size, distance.direction.dtype)
        direction[: distance.direction.size] = distance.direction
        return distance._replace(direction=direction)

    rows = jax.tree.map(lambda *x: np.stack(x), *map(filled, distances))
    return dataclasses.replace(result, edms=rows.edm, _distances=rows)
