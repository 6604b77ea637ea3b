"""The processes of a fit: what one of them decides, all of them do."""

import contextlib
import hashlib
import itertools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from .._boundary import PyTree
from .._tree import checksum, to_arrays

T = TypeVar("T")

# How long one process waits for another: longer than any compilation should take.
_SECONDS = 600

# Each set of processes numbers its meetings, so that messages of two do not mix.
_COUNTS: dict[str, Iterator[int]] = {}

# The last message to each set of processes, which another one may not have read yet.
_LAST: dict[str, str] = {}


class PeerError(RuntimeError):
    """Another process of the fit met an error, or does not answer."""


class Wish(NamedTuple):
    """What a process wants after a chunk of steps."""

    steps: int
    """How many steps to take next."""
    end: str | None = None
    """Which reason it has to end the fit, by name."""
    keeps: bool = False
    """Whether a checkpoint is due."""


class Peers:
    """The processes that share the devices of a mesh; without a mesh, this one alone.

    They run the same program, and their devices wait for each other in each step. So
    whatever is decided on the host, where clocks and signals differ, they must decide
    together: they say what they have to say through the service by which JAX brought
    them together, which has a time limit.
    """

    def __init__(self, mesh: Mesh | None, entrance: str = "fit"):
        """**Arguments:**

        - `mesh`: the devices of the fit.
        - `entrance`: the name of the function that all of them must have called.
        """
        devices = () if mesh is None else mesh.devices.flat
        self.numbers = sorted({device.process_index for device in devices})
        self._own = jax.process_index() if len(self.numbers) > 1 else 0
        self._entrance, self._circle = entrance, "-".join(map(str, self.numbers))
        self._fit = None
        if len(self.numbers) > 1:
            self._fit = next(_COUNTS.setdefault(self._circle, itertools.count()))
        self._rounds = itertools.count()
        self._handler: Any = None
        self._presses = 0
        self.is_interrupted, self.is_heeded, self.are_lost = False, False, False

    @property
    def are_many(self) -> bool:
        """Whether there is more than one process."""
        return self._fit is not None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows what one alone should."""
        return not self.are_many or self._own == self.numbers[0]

    def __enter__(self) -> "Peers":
        # An exception in the middle of a step would leave the others waiting. Where
        # there are none, a handler of the user's own stays.
        is_main = threading.current_thread() is threading.main_thread()
        is_free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_main and (self.are_many or is_free):
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self.are_many and error is not None:
            # Where the others wait for this process, or will, they hear of it.
            with contextlib.suppress(Exception):
                self._tell(next(self._rounds), {"error": _named(error)})
        elif self.is_interrupted and not self.is_heeded:
            signal.raise_signal(signal.SIGINT)

    def _interrupt(self, *_: Any) -> None:
        """Asks the fit to end after the chunk; the second time, at once."""
        self._presses += 1
        if self.is_interrupted and not (self.is_heeded and self._presses == 2):
            self.are_lost = self.are_many
            raise KeyboardInterrupt
        self.is_interrupted = True

    @property
    def _client(self) -> Any:
        # JAX has no public name for it; what it has cannot stop waiting.
        from jax._src.distributed import global_state

        return global_state.client

    def _name(self, turn: int, number: int) -> str:
        return f"vernal/{self._circle}/{self._fit}/{turn}/{number}"

    def _tell(self, turn: int, message: dict[str, Any]) -> None:
        self._client.key_value_set(self._name(turn, self._own), json.dumps(message))

    def exchange(self, own: Any, about: str) -> list[Any]:
        """Tells all processes something, and hears what each of them tells.

        **Arguments:**

        - `own`: anything that JSON can express.
        - `about`: what it is about, so that no two talk of different things.

        **Returns:**

        What each of them told, in the order of their numbers.

        **Raises:**

        - `PeerError`: if one of them met an error, or does not answer.
        """
        return self._exchange({"about": about, "said": own}) if self.are_many else [own]

    def _exchange(self, message: dict[str, Any]) -> list[Any]:
        turn = next(self._rounds)
        self._tell(turn, message)
        last = _LAST.get(self._circle)
        _LAST[self._circle] = self._name(turn, self._own)
        heard = {number: self._hear(turn, number) for number in self.numbers}
        for number, told in heard.items():
            if "error" in told and number != self._own:
                raise PeerError(f"Process {number} met an error: {told['error']}")
            if "error" not in message and told["about"] != message["about"]:
                self.are_lost = True
                raise PeerError(
                    f"Process {number} is elsewhere in the program: at "
                    f"{told['about']}, and this one at {message['about']}. All "
                    "processes must make the same calls in the same order."
                )
        if last is not None:
            # All have read it, or they would not have sent another one since.
            self._client.key_value_delete(last)
        return [told.get("said") for told in heard.values()]

    def _hear(self, turn: int, number: int) -> dict[str, Any]:
        name, limit = self._name(turn, number), 1_000 * _SECONDS
        try:
            return json.loads(self._client.blocking_key_value_get(name, limit))
        except Exception as error:
            self.are_lost = True
            raise PeerError(
                f"Process {number} of this `{self._entrance}` has not answered within "
                f"{_SECONDS} seconds. It has ended, or runs another program: see what "
                "it printed. All processes must make the same calls in the same order."
            ) from error

    def together(
        self, fn: Callable[[], T], say: Callable[[T], Any], about: str
    ) -> tuple[T, list[Any]]:
        """Calls what may fail in one process and not in another: then all raise.

        **Arguments:**

        - `fn`: the function.
        - `say`: what to tell the others of its value.
        - `about`: what it is about.

        **Returns:**

        The value, and what each process told.
        """
        try:
            value = fn()
        except Exception as error:
            if self.are_many:
                self._exchange({"error": _named(error)})
            raise
        return value, self.exchange(say(value), about)

    def agree(self, wish: Wish) -> Wish:
        """Makes one wish of what all processes want.

        The first that wants to end has its way; else the first process of all has.
        """
        wishes = [Wish(*told) for told in self.exchange(wish, "the end of a chunk")]
        ends = [wish.end for wish in wishes if wish.end is not None]
        return wishes[0]._replace(end=ends[0] if ends else None)

    def require_same(self, described: Mapping[str, Any]) -> None:
        """Checks that all processes were given the same.

        **Arguments:**

        - `described`: by the name of each argument a number or a text; or, of a tree,
            a dictionary with one for each leaf.
        """
        first, *others = self.exchange(described, f"the start of `{self._entrance}`")
        for number, other in zip(self.numbers[1:], others, strict=True):
            odd = [name for name in first if first[name] != other.get(name)]
            if odd:
                raise ValueError(
                    f"The processes of this `{self._entrance}` disagree: "
                    f"{_told(odd[0], first, other)} on processes {self.numbers[0]} and "
                    f"{number}. All must be given the same, from the same program; of "
                    "a `vn.Stream` alone each has its own share."
                )


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _told(name: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    mine, theirs = first[name], other.get(name)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        odd = next(p for p in (*mine, *theirs) if mine.get(p) != theirs.get(p))
        return f"`{name}` differs at {odd!r}"
    short = all(len(str(value)) < 40 for value in (mine, theirs))
    return f"`{name}` is {mine} and {theirs}" if short else f"`{name}` differs"


def described(tree: PyTree, most_bytes: int | None = None) -> dict[str, str]:
    """Describes each array of a tree, for `Peers.require_same`.

    Of what a process has a part only, that is the shape alone.

    **Arguments:**

    - `most_bytes`: of larger arrays that lie on the devices of all already, the shape
        alone, too.
    """

    def is_seen(array: Any) -> bool:
        is_here = not isinstance(array, jax.Array) or array.is_fully_addressable
        return is_here or most_bytes is None or array.nbytes <= most_bytes

    return {
        path: f"{leaf.kind} {checksum(leaf.array) if is_seen(leaf.array) else None}"
        for path, leaf in to_arrays(tree).items()
    }


def fingerprint(text: Any) -> str:
    """Hashes a text, without the addresses of objects in it."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(text))
    return hashlib.sha256(text.encode()).hexdigest()
