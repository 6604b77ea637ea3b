"""Which directions are null, and what becomes of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .._boundary import one_of, whole_number

OnNull = Literal["drop", "raise", "prior"]


@dataclasses.dataclass(frozen=True)
class NullPolicy:
    """The options `rtol`, `rank` and `on_null` of the constructors of a projector.

    With blocks, `rank` is a mapping from their selectors.
    """

    rtol: float | int | None = None
    rank: Any = None
    on_null: OnNull = "drop"

    def or_rtol(self, default: float) -> "NullPolicy":
        """Returns the policy with a threshold, `default` if none was given."""
        return dataclasses.replace(self, rtol=default) if self.rtol is None else self

    def of_block(self, selector: Any) -> "NullPolicy":
        return dataclasses.replace(self, rank=(self.rank or {}).get(selector))

    def check_rank_kind(self, blocks: Any) -> None:
        """Checks that there is a rank for each block, or one where there are none."""
        is_mapping = isinstance(self.rank, Mapping)
        if self.rank is not None and is_mapping != (blocks is not None):
            raise TypeError(
                "`rank` must be a mapping from the selectors in `blocks` to whole "
                "numbers, or one number where there are no blocks, but it is "
                f"{self.rank!r}."
            )

    def check(self, size: int | None = None) -> None:
        """Checks the options; `rank` only where the number of directions is known."""
        one_of(self.on_null, get_args(OnNull), "on_null")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(
                f"`rtol` must be at least 0 and less than 1, not {self.rtol}: it is a "
                "fraction of the largest eigenvalue."
            )
        if self.rank is None or size is None:
            return
        whole_number(self.rank, "rank", least=1, most=size)
        if self.rank < size and self.on_null == "raise":
            raise ValueError(
                f"`rank={self.rank}` leaves {size - self.rank} null directions, but "
                '`on_null="raise"` allows none. Use `"drop"` or `"prior"`, or leave '
                "`rank` out."
            )
