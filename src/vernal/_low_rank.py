"""A map that whitens the leading directions of a matrix that is never formed."""

from typing import Any


def whiten_matvec(*args: Any, **options: Any) -> Any:
    raise NotImplementedError
