"""A warning where each datum of a fit is masked."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .._boundary import warn
from .abstract_trainer import AbstractTrainer
from .diagnosis import lacks_data


def warn_of_no_data(
    where: str,
    losses: np.ndarray,
    ended: Callable[[Any], tuple[AbstractTrainer, Any]],
) -> None:
    """Warns if each loss, or each score, is zero because no datum is left.

    `losses` have a row for each step, and a column for each of many trainers; the first
    without data is named. `ended` returns a trainer and its batch, by index. `where` is
    what the warning begins with.
    """
    # NaN follows the last step of one of many.
    is_zero = (losses == 0).any(axis=0) & ~np.nan_to_num(losses).any(axis=0)
    for found in np.argwhere(is_zero):
        index = int(found[0]) if is_zero.ndim else ()
        if lacks_data(*ended(index)):
            which = f" of member {index}" if is_zero.ndim else ""
            warn(
                f"`{where}`: no datum{which} is left, so that any model fits: "
                "`where` of the likelihood is false for all. It is true for each datum "
                "that is there, unlike the mask of a masked array."
            )
            return
