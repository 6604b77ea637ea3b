"""`fit_many`: many starts, a sweep of rates, or many data sets, in one program."""

from collections.abc import Sequence
from typing import Any, TypeVar, Unpack

import jax
from jax.sharding import Mesh

from .._boundary import (
    UNROLL,
    boolean,
    entrance,
    refuse_program,
    refuse_unknown,
    whole_number,
)
from .._curvature import Mode
from .._devices import AbstractPlacement, placement
from .._fit import OPTIONS, FitKeywords, fit
from .._solve import Solver
from .._trainer import Trainer
from .many_trainers import ManyTrainers
from .result import ManyResult
from .solve_many import ManySolve, solve_many
from .stack import at_one_step, require_some_difference, stacked

TrainerT = TypeVar("TrainerT", bound=Trainer[Any, Any])


@entrance
def fit_many(
    trainers: Sequence[TrainerT] | TrainerT,
    data: Any,
    steps: int,
    *,
    data_axis: Any = None,
    solver: Solver | None = None,
    jac: Mode | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    **options: Unpack[FitKeywords],
) -> ManyResult[TrainerT]:
    """Fits many trainers at once, in one compiled program.

    They may differ in the values of all their arrays: starts, rates, keys, projectors.
    Each has its own NaN policy, stop and best: one that ends, or turns non-finite, does
    not affect the others.

    ```python
    starts = [ModelFit(perturbed(key), optimiser) for key in jax.random.split(key, 64)]
    result = vn.fit_many(starts, data, steps=2_000)
    result.best, result.best_losses

    rates = [ModelFit(model, optax.adam(rate)) for rate in (1e-3, 1e-2, 1e-1)]
    vn.fit_many(rates, data, steps=2_000)

    # 1,000 light curves at the same times, solved for.
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    vn.fit_many(trainers, (times, fluxes), 99, data_axis=(None, 0), solver=solver)
    ```

    **Arguments:**

    - `trainers`: a sequence of trainers; or a stacked one, whose arrays have a row for
        each, as `eqx.filter_vmap(make)(keys)` returns it. Those that stand at different
        steps, as where `Converged` has ended them, go on from the step of the last, as
        if the others had waited. One that a NaN has stopped stays where it is.
    - `data`: as for [`vernal.Trainer.fit`][]. All see the same batch at a step.
    - `steps`: the number of steps to take; with a solver, the largest number.
    - `data_axis`: the axis of the arrays in `data` along which each trainer finds its
        own, or a tree of such axes that is a prefix of `data`, `None` for what is
        shared: as `in_axes` of `jax.vmap`. It holds for the batch of a `validation`
        too. Stack a list of data sets for it: `np.stack(ys)`.
    - `solver`: a solver that replaces the fit, as in [`vernal.Trainer.solve`][] with
        `rewhiten=False`. `data` is then one batch, and `jac` and `progress` are the
        only other options. On a CPU members of many parameters and data are solved for
        one by one: together all take as many steps as the slowest. Members within
        bounds decide as `solve` does: one that ends badly in a whitened space begins
        again in the parameters themselves, and goes on from the lower end. A member
        that meets an error ends as `FAILED`, where it was, with a warning; the others
        are then solved for one by one too. Ctrl-C ends those that go on after the first
        round, with what they have.
    - `jac`: as for [`vernal.Trainer.solve`][], with a solver only.
    - `batch`: the number of trainers to compute at a time, to bound memory. It must
        divide their number. By default all.
    - `mesh`: devices to spread the trainers over, along the first axis of the mesh,
        whose length must divide `batch`. Each device has a copy of the data that they
        share. In several processes each gives all trainers and all data.
    - `**options`: as for [`vernal.Trainer.fit`][]. A callback is given the stacked
        trainer. The progress bar of a solver counts the members that are done.

    **Returns:**

    A [`vernal.ManyResult`][]. A warning names members that ended at non-finite values,
    and of the first that ended the source, in its data, parameters or model. Members
    of a fit that only diverged are `result.failed`, without a warning.

    **Raises:**

    - `ValueError`: if there are no trainers, or they differ in more than the values of
        arrays; if the length of an axis is not the number of trainers, or `batch` does
        not divide that number; if all trainers are equal, and the data seem to have a
        row for each, without a `data_axis`.
    - `NonFiniteError`: under the policy [`vernal.RaiseOnNan`][], once all are over.
    """
    given = trainers, data, options.get("validation")
    refuse_program("fit_many", *given, remedy=UNROLL)
    refuse_unknown(options, [name for name in OPTIONS if name != "best"], "fit_many")
    together, flags, size = stacked(trainers)
    group = size if batch is None else whole_number(batch, "batch", least=1)
    if size % group:
        divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
        raise ValueError(
            f"`batch` is {group}, which does not divide the {size} trainers evenly. "
            f"Give one of {', '.join(divisors)}."
        )
    if data_axis is None and size > 1:
        require_some_difference(together, flags, data, size)
    place = placement(together, mesh)
    _check_spread(place, size, group)
    many = ManyTrainers(place, size, group, flags, data_axis)
    shows = boolean(options.get("progress", True), "progress")
    of_fit = [name for name in options if name != "progress"]
    if solver is not None and of_fit:
        raise TypeError(
            f"`{of_fit[0]}` is for a fit, and with `solver` there is none. Leave it "
            "out."
        )
    if solver is None and jac is not None:
        raise TypeError("`jac` is for a `solver`, and there is none. Leave it out.")
    try:
        if solver is not None:
            asked = ManySolve(solver, steps, jac, shows)
            return solve_many(many, together, data, asked)
        return fit(many, at_one_step(together), data, steps, options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # Once a step was taken, it is an error of something else, as of a callback.
        is_first = not len(getattr(getattr(error, "result", None), "history", ()))
        if is_first and data_axis is None and _is_one_each(data, size):
            error.add_note(
                f"`data` is a list of {size}, as many as there are trainers, and each "
                "trainer is given all of it. If each should have one of them, stack "
                "them: `data = (x, np.stack(ys))`, with `data_axis=(None, 0)`."
            )
        raise


def _is_one_each(data: Any, size: int) -> bool:
    """Whether data are a list that seems to have a data set for each trainer."""
    if not isinstance(data, list) or len(data) != size:
        return False
    return all(jax.tree.structure(x) == jax.tree.structure(data[0]) for x in data)


def _check_spread(place: AbstractPlacement, size: int, group: int) -> None:
    """Checks that all devices have equally many members of a group."""
    if place.mesh is not None and group % place.size:
        what = f"{size} trainers" if group == size else f"`batch`, {group} trainers,"
        raise ValueError(
            f"`mesh`: {what} cannot be spread evenly over the {place.size} devices "
            f"along the axis {place.mesh.axis_names[0]!r}. Make their number a "
            f"multiple of {place.size}, or give a smaller mesh."
        )
