"""How many steps a chunk of a fit has."""

import pytest

from inside import Pace

# Seconds of a step, of what a chunk begins with, and of the compilation.
MACHINES = {
    "quick steps": (1e-5, 1e-3, 0.5),
    "a large model": (0.016, 0.2, 1.0),
    "a huge model": (1.0, 5.0, 20.0),
    "slow steps": (3.0, 0.0, 10.0),
    "nothing to compile": (1e-3, 0.01, 0.0),
}


def chunks(per_step, overhead, compilation, count=12):
    """The numbers of steps and the seconds of the chunks of a fit."""
    pace, size, found = Pace(), 1, []
    for index in range(count):
        seconds = overhead + size * per_step + (compilation if index == 0 else 0)
        found.append((size, seconds))
        size = pace.next(size, seconds)
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_a_chunk_takes_half_a_second_or_up_to_two_where_it_begins_slowly(machine):
    per_step, overhead, _ = MACHINES[machine]
    *_, (size, seconds) = chunks(*MACHINES[machine])
    goal = min(max(0.5, 20 * overhead), 2.0)
    if overhead + per_step > goal:
        assert size == 1
    else:
        assert goal - per_step - 1e-6 <= seconds <= goal + 1e-6


@pytest.mark.parametrize("machine", MACHINES)
def test_no_chunk_after_the_first_is_longer(machine):
    per_step, overhead, compilation = MACHINES[machine]
    _, *found = chunks(per_step, overhead, compilation)
    assert max(seconds for _, seconds in found) <= max(2.0, overhead + per_step) + 1e-6


def test_a_clock_that_stands_still_is_no_reason_to_take_all_steps():
    assert Pace().next(1, 0.0) == 100
