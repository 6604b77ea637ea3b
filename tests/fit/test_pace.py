"""How many steps a chunk of a fit has."""

import itertools
import time

import jax
import numpy as np
import optax
import pytest

import vernal as vn
from inside import Pace
from models import LineFit, line, line_batch

# Seconds of a step, of what a chunk begins with, and of the compilation.
MACHINES = {
    "quick steps": (1e-5, 1e-3, 0.5),
    "slow steps": (3.0, 0.0, 10.0),
    "nothing to compile": (1e-3, 0.01, 0.0),
    "a large model": (0.016, 0.2, 1.0),
    "mostly copies": (0.01, 0.3, 0.5),
}


def chunks(machine, noise=0.0, count=30):
    """The numbers of steps and the seconds of the chunks of a fit."""
    per_step, overhead, compilation = MACHINES[machine]
    draws = np.random.default_rng(0).uniform(1 - noise, 1 + noise, count)
    pace, size, found = Pace(), 1, []
    for index, draw in enumerate(draws):
        seconds = draw * (overhead + size * per_step)
        found.append((size, seconds))
        size = pace.next(size, seconds + (compilation if index == 0 else 0))
    return found


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("machine", MACHINES)
def test_chunks_are_neither_long_nor_mostly_overhead(machine, noise):
    per_step, overhead, _ = MACHINES[machine]
    found = chunks(machine, noise)
    longest = max(2.0, overhead + per_step)
    assert max(seconds for _, seconds in found) <= (1 + noise) / (1 - noise) * longest
    sizes = [size for size, _ in found[10:]]
    assert np.mean(sizes) * per_step >= overhead / 2


@pytest.mark.parametrize("machine", ["quick steps", "nothing to compile"])
def test_a_chunk_takes_half_a_second_where_it_begins_quickly(machine):
    *_, (_, seconds) = chunks(machine)
    assert seconds == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("machine", ["a large model", "mostly copies"])
def test_a_chunk_takes_two_seconds_where_it_begins_slowly(machine):
    *_, (_, seconds) = chunks(machine)
    assert seconds == pytest.approx(2.0, rel=1e-2)


def test_slow_steps_are_taken_one_by_one():
    *_, (size, _) = chunks("slow steps")
    assert size == 1


def test_a_clock_that_stands_still_is_no_reason_to_take_all_steps():
    assert Pace().next(1, 0.0) == 100


def test_a_fit_of_the_same_kind_begins_with_what_takes_a_quarter_of_a_second():
    pace = Pace("of the same kind")
    assert pace.first() == 1
    pace.next(1, 3.0)  # which compiled
    assert Pace("of the same kind").first() == 1
    pace.next(9, 9e-3)
    assert Pace("of the same kind").first() == 250
    assert Pace("of another kind").first() == Pace().first() == 1


def test_kinds_are_bounded_in_number():
    for kind in range(2_000):
        Pace(kind).next(100, 1e-3)
    assert sum(Pace(kind).first() > 1 for kind in range(2_000)) <= 512


@pytest.fixture
def clock(monkeypatch):
    """Each look at it is a millisecond later."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks) / 1e3)


@pytest.mark.loose_dtypes
@pytest.mark.usefixtures("clock")
def test_a_fit_again_takes_one_chunk_unless_it_is_of_another_kind():
    def ends(trainer, data, **options):
        seen = []
        note = lambda _, history: seen.append(len(history.loss))
        trainer.fit(data, 10, callback=note, **options)
        return seen

    trainer, data = LineFit(line(), optax.adam(0.1)), line_batch()
    assert ends(trainer, data) == [1, 10]
    assert ends(trainer, data) == [10]
    assert ends(trainer, jax.tree.map(lambda x: x + 1, data)) == [10]
    assert ends(trainer, data, chunk=4) == [4, 8, 10]
    assert ends(trainer, line_batch(20)) == [1, 10]
    assert ends(trainer.replace(optimiser=optax.sgd(1e-3)), data) == [1, 10]
    assert ends(trainer, data, record=("grad_norm",)) == [1, 10]
    assert ends(trainer, data, stop=vn.Converged(1e-9, 20)) == [1, 10]
    assert ends(trainer, vn.Minibatches(data, 4, key=jax.random.key(0))) == [1, 10]
    for _ in range(2):
        assert ends(trainer, vn.Stream([data] * 10))[0] == 1
