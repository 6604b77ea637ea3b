"""A warning where each datum of a fit is masked, or too small to be squared."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._boundary import warn
from .abstract_trainer import AbstractTrainer
from .diagnosis import lacks_data, too_small

# Losses below it are worth a look, whatever their dtype and that of the residuals.
_TINY = float(jnp.finfo(jnp.float32).tiny)


def warn_of_no_data(
    where: str,
    losses: np.ndarray,
    ended: Callable[[Any], tuple[AbstractTrainer, Any]],
) -> None:
    """Warns if each loss, or each score, is zero though the model need not be right.

    Either no datum is left, or the squares of all residuals are too small for their
    dtype. `losses` have a row for each step, and a column for each of many trainers;
    the first of these is named. `ended` returns a trainer and its batch, by index.
    `where` is what the warning begins with.
    """
    # NaN follows the last step of one of many.
    is_small = (losses < _TINY).any(axis=0) & ~(losses >= _TINY).any(axis=0)
    for found in np.argwhere(is_small):
        index = int(found[0]) if is_small.ndim else ()
        which = f" of member {index}" if is_small.ndim else ""
        if lacks_data(*ended(index)):
            warn(
                f"`{where}`: no datum{which} is left, so that any model fits: "
                "`where` of the likelihood is false for all. It is true for each datum "
                "that is there, unlike the mask of a masked array."
            )
            return
        if small := too_small(*ended(index)):
            which = f", member {index}" if is_small.ndim else ""
            warn(
                f"`{where}`{which}: {small}, so that any model fits. Fit in larger "
                "units, or divide what is squared by its error."
            )
            return
