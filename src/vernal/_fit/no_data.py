"""A warning where each datum of a fit is masked."""

from typing import Any

import numpy as np

from .._boundary import warn
from .._data import Minibatches, Whole
from .._step import lacks_data
from .subject import AbstractSubject


def warn_of_no_data(
    subject: AbstractSubject, result: Any, source: Whole[Any] | Minibatches | None
) -> None:
    """Warns if the loss is zero at each step because no datum is left.

    Of many trainers it names the first for which that is so.
    """
    losses = result.history.loss
    # NaN follows the last step of one of many.
    is_zero = (losses == 0).any(axis=0) & ~np.nan_to_num(losses).any(axis=0)
    if source is None:
        return
    for where in np.argwhere(is_zero):
        index = int(where[0]) if subject.shape else ()
        with subject.context():
            batch = subject.seen(source, index)
            is_empty = lacks_data(subject.picked(result, index), batch)
        if is_empty:
            which = f" of member {index}" if subject.shape else ""
            warn(f"`{subject.entrance}`: no datum{which} is left. {NO_DATA}")
            return


NO_DATA = (
    "`where` of the likelihood is false for all, so that any model fits. It is true "
    "for each datum that is there, unlike the mask of a masked array."
)
