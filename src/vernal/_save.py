"""`save` and `load`: a trainer, or any pytree, in one file."""

import os
from collections.abc import Sequence
from typing import TypeVar

from ._debugging import undebugged
from ._file import read_file, write_file
from ._leaves import MismatchError, from_arrays, to_arrays
from ._snapshot import begun, is_trainer, restore, snapshot
from ._typing import PyTree

T = TypeVar("T")


@undebugged
def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a trainer, or any pytree, to one file.

    Of a trainer it is all that a fit changes: parameters, moments, counts, the best,
    the projector. What is configuration (the frozen part of the model, rates, policies,
    the key) is not: it comes from the program that loads the file. Hyperparameters in
    the state, those of `optax.inject_hyperparams`, are in the file with the values that
    they began with: where the program has others, the program's are taken. Of any other
    pytree it is every array, PRNG key and Python number.

    ```python
    vn.save("fit.vernal", result.trainer)
    trainer = vn.load("fit.vernal", LineFit(model, optimiser))
    ```

    The file is a zip archive of NumPy's arrays, which `numpy.load` can read too, with
    a header that has the version of the format and the path, shape and dtype of each
    leaf. No code is run when it is read. A write that fails leaves the file that was
    there as it was.

    **Arguments:**

    - `path`: the file. One that is there is replaced. In a program of several processes
        all of them call this, and the first one writes.
    - `tree`: a [`vernal.Trainer`][] or any pytree.

    **Raises:**

    - `OSError`: if the file cannot be written.
    """
    is_one = is_trainer(tree)
    write_file(path, snapshot(tree) | begun(tree) if is_one else to_arrays(tree))


@undebugged
def load(
    path: str | os.PathLike[str], like: T, *, reset: str | Sequence[str] = ()
) -> T:
    """Reads what [`vernal.save`][] wrote.

    **Arguments:**

    - `path`: the file.
    - `like`: a trainer of the same model and optimiser, as the program makes it; its
        rates, its NaN policy and its key may be others. Or a pytree of the same
        structure, shapes and dtypes as the one that was saved.
    - `reset`: of a trainer, what is to start anew rather than to be restored:
        `"opt_state"` (the moments; the optimiser may then be another), `"best"`,
        `"nan_report"`, `"policy_state"`, `"state"`, `"step_count"`.

    **Returns:**

    A tree like `like`, with the values of the file.

    **Raises:**

    - `ForeignFileError`: if the file was not written by `save`.
    - `DamagedFileError`: if it is no longer whole.
    - `NewerFormatError`: if it was written by a later version of vernal.
    - `MismatchError`: if `like` is not alike; it names the leaves that differ. These
        four are a `LoadError`, and that a `ValueError`.
    - `FileNotFoundError`, `IsADirectoryError`: if there is no such file.
    """
    kept, source = read_file(path), f"`path`: {os.fspath(path)}"
    if is_trainer(like):
        try:
            return restore(kept, like, source, reset)
        except MismatchError as error:
            if "opt_state" not in reset:
                error.add_note(
                    "If the optimiser alone is another, on purpose, "
                    '`reset=("opt_state",)` starts its moments anew.'
                )
            raise
    if reset:
        raise ValueError(
            "`reset` is for trainers, and `like` is none. Replace its leaves after "
            "loading instead, with `equinox.tree_at`."
        )
    return from_arrays(kept, like, source)
