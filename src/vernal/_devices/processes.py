"""The processes of a fit: they decide together, and notice when they differ."""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

T = TypeVar("T")

# How long one process waits for another: longer than any compilation should take.
_TIMEOUT_SECONDS = 600

# Each set of processes numbers its sessions, so that messages of two do not mix.
_SESSIONS: dict[str, Iterator[int]] = {}

# The key of the last message to each set, which another process may not have read yet.
_LAST_KEYS: dict[str, str] = {}


class PeerError(RuntimeError):
    """Another process of the fit met an error, or does not answer."""


class Decision(NamedTuple):
    """What to do after a chunk of steps."""

    steps: int
    """The number of steps to take next."""
    end: str | None = None
    """The name of the reason to end the fit; `None` to go on."""
    writes_checkpoint: bool = False


class Peers:
    """The processes that share the devices of a mesh; without a mesh, only this one.

    They run the same program, and their devices wait for each other in each step. So
    they must decide together what depends on the clocks and signals of a host: they
    exchange messages through the service of `jax.distributed`, with a time limit.
    """

    def __init__(self, mesh: Mesh | None, entrance: str = "fit"):
        """`entrance` is the name of the function that all of them must have called."""
        devices = () if mesh is None else mesh.devices.flat
        self.numbers = sorted({device.process_index for device in devices})
        self._own = jax.process_index() if len(self.numbers) > 1 else 0
        self._entrance, self._set = entrance, "-".join(map(str, self.numbers))
        self._session = None
        if len(self.numbers) > 1:
            self._session = next(_SESSIONS.setdefault(self._set, itertools.count()))
        self._turns = itertools.count()
        self._handler: Any = None
        self._presses = 0
        self.is_interrupted = self.handles_interrupt = self.is_disconnected = False

    @property
    def are_many(self) -> bool:
        return self._session is not None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows the progress bar."""
        return not self.are_many or self._own == self.numbers[0]

    def __enter__(self) -> "Peers":
        # An exception in the middle of a step would leave other processes waiting. With
        # one process, a handler that the user has set stays.
        is_main = threading.current_thread() is threading.main_thread()
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_main and (self.are_many or is_default):
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self.are_many and error is not None:
            # The others read it where they wait for this process.
            with contextlib.suppress(Exception):
                self._send(next(self._turns), {"error": _summary(error)})
        elif self.is_interrupted and not self.handles_interrupt:
            signal.raise_signal(signal.SIGINT)

    def _interrupt(self, *_: Any) -> None:
        """Asks the fit to end after the chunk; the second time, at once."""
        self._presses += 1
        if self.is_interrupted and not (self.handles_interrupt and self._presses == 2):
            self.is_disconnected = self.are_many
            raise KeyboardInterrupt
        self.is_interrupted = True

    @property
    def _client(self) -> Any:
        # JAX has no public name for it; its public functions cannot stop waiting.
        from jax._src.distributed import global_state

        return global_state.client

    def _key(self, turn: int, number: int) -> str:
        return f"vernal/{self._set}/{self._session}/{turn}/{number}"

    def _send(self, turn: int, message: dict[str, Any]) -> None:
        self._client.key_value_set(self._key(turn, self._own), json.dumps(message))

    def all_gather(self, own: Any, topic: str) -> list[Any]:
        """Sends a value, for JSON, and returns those of all processes, in order.

        Raises a `PeerError` if a process met an error, does not answer, or is at
        another topic.
        """
        if not self.are_many:
            return [own]
        return self._exchange({"topic": topic, "value": own})

    def _exchange(self, message: dict[str, Any]) -> list[Any]:
        turn = next(self._turns)
        self._send(turn, message)
        last = _LAST_KEYS.get(self._set)
        _LAST_KEYS[self._set] = self._key(turn, self._own)
        received = {number: self._receive(turn, number) for number in self.numbers}
        for number, other in received.items():
            if "error" in other and number != self._own:
                raise PeerError(f"Process {number} met an error: {other['error']}")
            if "error" not in message and other["topic"] != message["topic"]:
                self.is_disconnected = True
                raise PeerError(
                    f"Process {number} is elsewhere in the program: at "
                    f"{other['topic']}, and this one at {message['topic']}. All "
                    "processes must make the same calls in the same order."
                )
        if last is not None:
            # All have read it, or they would not have sent another one since.
            self._client.key_value_delete(last)
        return [other.get("value") for other in received.values()]

    def _receive(self, turn: int, number: int) -> dict[str, Any]:
        key, limit = self._key(turn, number), 1_000 * _TIMEOUT_SECONDS
        try:
            return json.loads(self._client.blocking_key_value_get(key, limit))
        except Exception as error:
            self.is_disconnected = True
            raise PeerError(
                f"Process {number} of this `{self._entrance}` has not answered within "
                f"{_TIMEOUT_SECONDS} seconds. It has ended, or runs another program: "
                "see what it printed. All processes must make the same calls in the "
                "same order."
            ) from error

    def run(self, fn: Callable[[], T], topic: str) -> T:
        """Calls a function that may fail in one process only: then all raise."""
        return self.run_and_gather(fn, lambda _: None, topic)[0]

    def run_and_gather(
        self, fn: Callable[[], T], summary: Callable[[T], Any], topic: str
    ) -> tuple[T, list[Any]]:
        """Does the same, and returns the value with its summaries on all processes."""
        try:
            value = fn()
        except Exception as error:
            if self.are_many:
                self._exchange({"error": _summary(error)})
            raise
        return value, self.all_gather(summary(value), topic)

    def decide(self, own: Decision) -> Decision:
        """Returns one decision for all: to end if any of them does, else the first."""
        gathered = self.all_gather(own, "the end of a chunk")
        decisions = [Decision(*fields) for fields in gathered]
        ends = [decision.end for decision in decisions if decision.end is not None]
        return decisions[0]._replace(end=ends[0] if ends else None)

    def require_same(self, given: Mapping[str, Any]) -> None:
        """Checks that all processes were given the same.

        `given` has a number or a text for each argument; for a tree, one for each leaf.
        """
        first, *others = self.all_gather(given, f"the start of `{self._entrance}`")
        for number, other in zip(self.numbers[1:], others, strict=True):
            odd = [name for name in first if first[name] != other.get(name)]
            if odd:
                raise ValueError(
                    f"The processes of this `{self._entrance}` disagree: "
                    f"{_difference(odd[0], first[odd[0]], other.get(odd[0]))} on "
                    f"processes {self.numbers[0]} and {number}. All must be given the "
                    "same, from the same program; only of a `vn.Stream` each has its "
                    "own share."
                )


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _difference(name: str, one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        odd = next(p for p in (*one, *other) if one.get(p) != other.get(p))
        return f"`{name}` differs at {odd.removeprefix('_progress.')!r}"
    is_short = all(len(str(value)) < 40 for value in (one, other))
    return f"`{name}` is {one} and {other}" if is_short else f"`{name}` differs"
