"""How works are measured: each in a process of its own, all its sides in turns."""

import gc
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .page import Row

# What is forked has the libraries imported, and has not begun JAX.
FORK = multiprocessing.get_context("fork")
BOTH = ("float32", "float64")
# Shorter rounds measure the clock, and what else the machine does.
SHORTEST_ROUND = 0.05
FAILED = "failed"
FIRST_ROUNDS = 2

Program = Callable[[], Any]
# By hand, or by another library, and by vernal. Each prepares a program: the first call
# is timed with it, later ones without.
Sides = tuple[Callable[[], Program], Callable[[], Program]]


@dataclass(frozen=True)
class Work:
    """One computation by two programs.

    `goals` are the largest ratios of the second to the first, of what is measured:
    `warm` calls, and the `first` one, which compiles. `most_seconds` is a goal of the
    first call in its stead. Where the two are `alike`, they return equal losses. Both
    are compiled with `flags`, those of XLA.
    """

    name: str
    told: str
    sides: Callable[[], Sides]
    goals: Mapping[str, float | None]
    steps: int = 1
    precisions: tuple[str, ...] = BOTH
    rounds: int = 7
    alike: bool = False
    most_seconds: float | None = None
    steps_of_second: int | None = None
    flags: str = ""

    def rows(self, rounds: int | None) -> Iterator[Row]:
        for kind, goal in self.goals.items():
            for precision in self.precisions:
                yield self._row(kind, goal, precision, rounds)

    def _row(
        self, kind: str, goal: float | None, precision: str, rounds: int | None
    ) -> Row:
        told = self.told
        if kind == "first" and "warm" in self.goals:
            told += ", first call"
        try:
            if kind == "warm":
                turns = self._apart(precision, in_turns, rounds or self.rounds)
            else:
                turns = [
                    [self._apart(precision, first_call, side) for side in (0, 1)]
                    for _ in range(rounds or min(self.rounds, FIRST_ROUNDS))
                ]
        except Missing as why:
            return Row(told, precision, str(why), None, goal=goal)
        base, own = np.median(turns, axis=0).tolist()
        against = duration(base) + " a step" * (kind == "warm" and self.steps > 1)
        if self.most_seconds is not None:
            return Row(told, precision, against, own, "s", self.most_seconds)
        # In each round both had the same machine.
        ratio = float(np.median([second / first for first, second in turns]))
        return Row(told, precision, against, ratio, "", goal)

    def _apart(self, precision: str, function: Callable[..., Any], *args: Any) -> Any:
        return apart(precision, function, self, *args, flags=self.flags)


@dataclass(frozen=True)
class Figure:
    """One number; `measure` returns it, or it and what it is held against."""

    name: str
    told: str
    measure: Callable[[], float | tuple[float, str]]
    unit: str
    goal: float | None = None
    precisions: tuple[str, ...] = ("float64",)

    def rows(self, rounds: int | None) -> Iterator[Row]:
        for precision in self.precisions:
            try:
                found = apart(precision, self.measure)
            except Missing as why:
                found = None, str(why)
            value, against = found if isinstance(found, tuple) else (found, "")
            yield Row(self.told, precision, against, value, self.unit, self.goal)


class Missing(Exception):
    """Why a figure could not be had."""


def apart(
    precision: str, function: Callable[..., Any], *args: Any, flags: str = ""
) -> Any:
    """Runs it in a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        if flags:  # which XLA reads when it begins
            os.environ["XLA_FLAGS"] = flags
        jax.config.update("jax_enable_x64", precision == "float64")
        try:
            sender.send(function(*args))
        except ImportError as error:
            sender.send(Missing(f"not installed: {error.name}"))
        except Exception:
            traceback.print_exc()

    process = FORK.Process(target=run)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        raise Missing(FAILED) from None
    finally:
        process.join()
    if isinstance(answer, Missing):
        raise answer
    return answer


def device() -> str:
    """What JAX computes on, if that is no CPU."""
    [first, *_] = jax.devices()
    return "" if first.platform == "cpu" else f", {first.device_kind}"


def seconds(program: Program, times: int = 1) -> float:
    """Runs it to the end of what it computes; returns the mean of so many times."""
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(program())
    return (time.perf_counter() - start) / times


def in_turns(work: Work, rounds: int) -> list[list[float]]:
    """Returns the seconds of a step of both, compiled, round after round.

    What else the machine does falls on both alike.
    """
    programs = [prepare() for prepare in work.sides()]
    first, second = [program() for program in programs]
    if work.alike:  # later steps may differ by the rounding of the first
        steps = 10 if device() else 100  # an accelerator rounds products more
        np.testing.assert_allclose(second[:steps], first[:steps], rtol=1e-3)
    times = [math.ceil(SHORTEST_ROUND / seconds(program)) for program in programs]
    # As `timeit` does: the collector's work grows with all that lives here.
    gc.collect()
    gc.disable()
    steps = work.steps, work.steps_of_second or work.steps
    pairs = list(zip(programs, times, steps, strict=True))
    return [
        [seconds(program, count) / taken for program, count, taken in pairs]
        for _ in range(rounds)
    ]


def first_call(work: Work, side: int) -> float:
    """Prepares and runs one side, with the machinery of JAX itself warm."""
    prepare = work.sides()[side]
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3)))
    return seconds(lambda: prepare()())


def least(program: Program, rounds: int = 15) -> float:
    """Returns the least time of a warm program."""
    program()
    return min(seconds(program) for _ in range(rounds))


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def duration(seconds: float) -> str:
    """A time as one would say it."""
    units = ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)
    unit, size = next((pair for pair in units if seconds >= pair[1]), units[-1])
    return f"{seconds / size:.3g} {unit}"
