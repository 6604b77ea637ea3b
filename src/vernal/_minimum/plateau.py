"""Lower points across a plateau: where a parameter at its bound leaves others idle.

The phase of an oscillation does nothing where its amplitude is zero, and yet decides
whether the loss would fall with the amplitude.
"""

import numpy as np
from jaxtyping import Float, Int

from .idle import STEPS, Around, idle_directions
from .local import Curved, Triangle


def across(
    around: Around, local: Triangle | Curved, inward: Int[np.ndarray, " D"]
) -> Float[np.ndarray, " D"] | None:
    """Finds a lower point from which a parameter would not be pushed to its bound.

    It looks along directions in which the loss is flat, and from there away from the
    bound: `inward` is the sign of the way in for each element at a bound.
    """
    for direction in idle_directions(local, inward == 0):
        # A unit is the size of the parameter that moves most, at least 1.
        direction /= np.max(abs(direction) / np.maximum(abs(around.point), 1))
        if (seen := around.look_along(direction)) is None:
            return None
        pushes = inward * seen.slopes
        is_held = (inward != 0) & (pushes[0] > 0)
        if not is_held.any():
            return None
        is_as_low = (seen.losses <= seen.losses[0] + around.noise)[:, None]
        is_as_low = is_as_low & np.isfinite(pushes)
        for index in np.flatnonzero(is_held):
            push = np.where(is_as_low[:, index], pushes[:, index], np.inf)
            if not push.min() < 0:
                continue
            # The nearest of those from which the loss falls well.
            near = seen.points[np.flatnonzero(push <= push.min() / 2)[0]]
            away = np.where(np.arange(inward.size) == index, inward, 0)
            if (found := around.look(near, np.repeat(STEPS, 2), away)) is None:
                return None
            losses = np.where(np.isfinite(found.losses), found.losses, np.inf)
            if losses.min() < seen.losses[0] - around.noise:
                return found.points[np.argmin(losses)]
    return None
