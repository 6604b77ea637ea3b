"""`save` and `load`: a trainer, or any pytree, in one file."""

import os
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import jax

from .._boundary import PyTree, entrance, file_path, first_names, refuse_traced, warn
from .._step import AbstractTrainer, TrainerT
from .._tree import (
    MismatchError,
    NamedArray,
    by_path,
    from_arrays,
    require_keepable,
    to_arrays,
)
from .file import open_file, reported_damage, require_values, write_file
from .origin import as_untrained, others, untrained
from .positions import (
    BEGUN,
    OPT_STATE,
    Meaning,
    as_meaning,
    groups_in,
    in_place,
    meaning_of,
    require_order,
    require_same_groups,
)
from .snapshot import (
    initial_hyperparams,
    require_each_within,
    restore,
    snapshot,
    without,
)

T = TypeVar("T")

# Names that the file of each trainer has.
_OF_TRAINERS = frozenset({"best_loss", "nan_counts", "step_count"})


@entrance
def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a trainer, or any pytree, to one file.

    Of a trainer, the file has all that a fit changes: parameters, moments, counts, the
    best, the projector. It has no configuration (the frozen part of the model, rates,
    policies, the key): that comes from the program that loads the file. Checksums of
    what of the model is not trained are in its header, so that `load` warns of others.
    Hyperparameters
    in the state, as `optax.inject_hyperparams` keeps them, are in the file with their
    initial values: where the program has others, the program's are taken. The names of
    the functions that made the optimiser, such as `scale_by_adam`, are in its header,
    so that `load` refuses moments of another one that look alike, and so are the
    parameters of each rule of a `ParamOptimiser`, whose state follows them. Of any
    other pytree, the file has every array (of numbers, dates or text), PRNG key and
    Python number, members of an `IntEnum` included. Strings, functions and other
    objects are left out: they come from the program too.

    ```python
    vn.save("fit.vernal", result.trainer)
    trainer = vn.load("fit.vernal", LineFit(model, optimiser))
    ```

    The file is a zip archive of NumPy's arrays, which `numpy.load` can read too, with
    a header that has the version of the format and the path, shape and dtype of each
    leaf. No code is run when it is read. A write that fails leaves the previous file as
    it was, also if the process is killed; the next write of that file removes what the
    failed one left.

    **Arguments:**

    - `path`: the file. An existing one is replaced by one of the same mode; of a
        symbolic link, the target. Other hard links keep the old content. In a program
        of several processes all of them call this, and the first one writes.
    - `tree`: a [`vernal.Trainer`][] or any pytree.

    **Raises:**

    - `OSError`: if the file cannot be written, is read-only, or is a pipe or a device.
    - `TypeError`: if a leaf has data that would be lost: a masked array, a quantity
        with a unit, a structured array, one of objects or of long doubles, a
        `Fraction`.
    - `ValueError`: if an integer has more than 64 bits, a leaf has no values, or a name
        is not valid Unicode.
    """
    file_path(path, "path")
    refuse_traced("save", tree)
    if isinstance(tree, AbstractTrainer):
        arrays = snapshot(tree) | initial_hyperparams(tree)
        require_values(arrays)
        more = meaning_of(tree)._asdict() | {"untrained": untrained(tree)}
        write_file(path, arrays, **more)
    else:
        require_keepable(tree)
        groups = groups_in(tree)
        more = {"groups": groups} if groups else {}
        write_file(path, to_arrays(tree), **more)


@entrance
def load(
    path: str | os.PathLike[str], like: T, *, reset: str | Sequence[str] = ()
) -> T:
    """Reads a file that [`vernal.save`][] wrote.

    **Arguments:**

    - `path`: the file.
    - `like`: a trainer of the same model and optimiser, as the program makes it; its
        rates, its NaN policy and its key may differ. What of its model is not trained
        stays as it is here; a warning names what differs from the fit, static fields
        with a plain value among it. For `result.trainers` of
        [`vernal.fit_many`][] stack one: `eqx.filter_vmap(lambda: trainer,
        axis_size=50)()`. Or a pytree of the same structure,
        shapes and dtypes as the one that was saved; its arrays may be
        `jax.ShapeDtypeStruct`, as `equinox.filter_eval_shape` makes them.
    - `reset`: for a trainer, what to start afresh instead of restoring: `"opt_state"`
        (the moments; the optimiser may then be another), `"best"`, `"nan_report"`,
        `"policy_state"`, `"state"`, `"step_count"`. Reset the best where functions
        that the loss calls are others than before, or a prior that is not normal.
        Where the data or the methods are, the best begins anew by itself, and so it
        does under another version of Python.

    **Returns:**

    A tree like `like`, with the values of the file. Each array is read into its own
    memory, after its shape and dtype were compared with those of `like`.

    **Raises:**

    - `ForeignFileError`: if the file was not written by `save`, or is a pipe or a
        device.
    - `DamagedFileError`: if it is no longer whole, or its content is not what its
        header says. Reading takes no more memory than the file has.
    - `NewerFormatError`: if it was written by a later version of vernal.
    - `MismatchError`: if `like` is another tree; it names the leaves that differ. Or if
        its optimiser has a state that looks like the saved one and is of another
        transformation; it names both. Or if a rule's state is for other parameters, or
        a projector has them in another order. Or if `like` is one trainer, and the file
        has many. These four are subclasses of `LoadError`, a subclass of `ValueError`.
    - `FileNotFoundError`, `IsADirectoryError`: if there is no such file.
    """
    target = file_path(path, "path")
    names = (reset,) if isinstance(reset, str) else reset
    is_sequence = isinstance(names, Sequence)
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'`reset` is {reset!r}, but must be names such as `("opt_state",)`.'
        )
    source = f"`path`: {os.fspath(path)}"
    with open_file(path) as (arrays, header):
        with reported_damage(target):
            meaning, known = as_meaning(header), as_untrained(header)
        _require_same_kind(arrays, like, source)
        if isinstance(like, AbstractTrainer):
            trainer = _restored(arrays, like, source, names, meaning)
            _warn_of_others(others(known, untrained(like)), source)
            return trainer
        if reset:
            raise ValueError(
                "`reset` is for trainers, and `like` is not one. Replace its leaves "
                "after loading instead, with `equinox.tree_at`."
            )
        require_order(arrays, like, source)
        require_same_groups(arrays, meaning.groups, groups_in(like), source)
        return from_arrays(arrays, like, source)


def _require_same_kind(names: Collection[str], like: Any, source: str) -> None:
    """Refuses the file of a trainer, or of a result, for another kind of tree."""
    is_trainer = isinstance(like, AbstractTrainer)
    found, own = _OF_TRAINERS.intersection(names), by_path(like).names
    for field in "trainer", "trainers":
        is_within = lambda name, field=field: name.startswith(f"{field}._progress.")
        if any(map(is_within, names)) and not any(map(is_within, own)):
            raise MismatchError(
                f"{source} holds a tree with a `{field}`, such as a result. Load it "
                f"into one, or save `result.{field}` alone."
            )
    if is_trainer and not found:
        raise MismatchError(
            f"{source} holds no trainer. Load it into what was saved, such as a model, "
            "and give that to the trainer: "
            "`trainer.replace(model=vn.load(path, trainer.model))`."
        )
    if not is_trainer and found == _OF_TRAINERS:
        raise MismatchError(
            f"{source} holds a trainer. Load it into one of the same model and "
            "optimiser. Its model is then `vn.load(path, trainer).model`."
        )


def _warn_of_others(paths: Sequence[str], source: str) -> None:
    if paths:
        warn(
            f"{source} was written by a fit with other values of {first_names(paths)} "
            "in the model than `like` has. What is not trained comes from `like`, not "
            "from the file, so that the model may predict otherwise than it did. Make "
            "`like` with the values of the fit. Its arrays can also be in the file of "
            "a model: `vn.save(path, trainer.model)`, `vn.load(path, like.model)`."
        )


def _restored(
    arrays: dict[str, NamedArray],
    like: TrainerT,
    source: str,
    reset: Sequence[str],
    meaning: Meaning,
) -> TrainerT:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(like)):
        raise ValueError(
            "`like` is a trainer without values, and its rates, its key and the "
            "frozen part of its model would stay so. Make it outside of `eval_shape`."
        )
    shape = arrays["step_count"].kind.shape if "step_count" in arrays else ()
    is_trainer = any(path.split(".")[0] == "params" for path in arrays)
    if is_trainer and len(shape) == 1 and not like.step_count.ndim:
        (size,) = shape
        raise MismatchError(
            f"{source} holds a trainer of {size} members, and `like` is one trainer. "
            f"Stack it: `eqx.filter_vmap(lambda: like, axis_size={size})()`. Or, if "
            "members differ in rates, bounds or frozen values, make all as they were: "
            "`vn.fit_many(trainers, data, 0, ...).trainers`."
        )
    try:
        if OPT_STATE in reset:
            arrays = without(arrays, OPT_STATE, BEGUN)
        arrays = in_place(arrays, like, meaning, source)
        trainer = restore(arrays, like, source, reset, meaning)
    except MismatchError as error:
        if "opt_state" not in reset:
            error.add_note(
                "If only the optimiser is another, on purpose, "
                '`reset=("opt_state",)` starts its moments again.'
            )
        raise
    if trainer.step_count.ndim:
        require_each_within(trainer, source)
    return trainer
