"""Where arrays lie: the interface, and the placement that leaves them there."""

import abc
import contextlib
from collections.abc import Sequence
from typing import Any, final

import equinox as eqx
import jax
from jax.sharding import Mesh

from .._boundary import PyTree
from .._data import Source
from .._pickling import PlainMethods
from .._step import AbstractTrainer


class AbstractPlacement(PlainMethods, eqx.Module):
    """Where the arrays of a fit lie, and how they get there and back."""

    @property
    @abc.abstractmethod
    def mesh(self) -> Mesh | None:
        """The mesh, if there is one."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of parts of a batch, or of the members of many fits."""

    @property
    @abc.abstractmethod
    def splits(self) -> bool:
        """Whether anything but batches is split."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for programs, in which no other mesh is set."""
        mesh = self.mesh
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    @abc.abstractmethod
    def put(self, trainer: AbstractTrainer, /) -> Any:
        """Puts a trainer onto the devices."""

    @abc.abstractmethod
    def put_state(self, state: PyTree, /) -> Any:
        """Puts what steps change onto the devices."""

    @abc.abstractmethod
    def put_whole(self, tree: PyTree, /) -> Any:
        """Puts a copy of a tree onto each of the devices."""

    @abc.abstractmethod
    def put_rows(self, tree: PyTree, flags: Sequence[bool], /) -> Any:
        """Spreads the rows of the flagged leaves of a tree over the devices."""

    @abc.abstractmethod
    def source(self, source: Source, /) -> Source:
        """Puts the data of a fit onto the devices, unless they are a stream."""

    @abc.abstractmethod
    def batch(self, batch: PyTree, argument: str, /) -> Any:
        """Splits a batch that every process has whole."""

    @abc.abstractmethod
    def share(self, batch: PyTree, /) -> Any:
        """Splits a batch of which every process has its own share."""

    @abc.abstractmethod
    def pin(self, state: PyTree, /) -> Any:
        """Does what `put_state` does, within a compiled program."""

    @abc.abstractmethod
    def pin_rows(self, tree: PyTree, axis: int = 0, /) -> Any:
        """Spreads the rows of all leaves along an axis, within a compiled program."""

    @abc.abstractmethod
    def pin_batch(self, batch: PyTree, /) -> Any:
        """Splits a batch that is made within a compiled program."""

    @abc.abstractmethod
    def home(self, state: PyTree, /) -> Any:
        """Brings a state back to one device, unless some of it is split."""

    @abc.abstractmethod
    def whole(self, leaf: Any, /) -> Any:
        """Gives every process the whole of an array."""


@final
class Anywhere(AbstractPlacement):
    """All arrays stay where they are."""

    @property
    def mesh(self) -> None:
        return None

    @property
    def size(self) -> int:
        return 1

    @property
    def splits(self) -> bool:
        return False

    # Static, since each method of a module is made again when it is looked up.
    @staticmethod
    def _stay(arrays: Any, *_: Any, **__: Any) -> Any:
        return arrays

    put = put_state = put_whole = put_rows = home = whole = _stay
    source = batch = share = pin = pin_rows = pin_batch = _stay


ANYWHERE = Anywhere()
