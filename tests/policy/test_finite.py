"""The search for numbers that are not finite."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inside import any_non_finite

NAN, INF = np.nan, np.inf
KINDS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64)
SIZES = (1, 5, 40, 5_000)


def spoiled(size, kind, value, at):
    numbers = np.linspace(-2, 3, size).astype(kind)
    numbers[at] = value
    return numbers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_number_is_found_wherever_it_is(kind, size):
    found = jax.jit(lambda *leaves: any_non_finite(leaves))
    good, one = spoiled(size, kind, -0.0, 0), np.float32(1)
    assert not found(good)
    assert not found(one, good, good)
    for at, value in itertools.product({0, size // 2, size - 1}, (NAN, INF, -INF)):
        bad = spoiled(size, kind, value, at)
        assert found(bad)
        assert found(one, good, bad)
        assert found(one, bad, good)


# Before, after, and whether the number has turned bad in between.
TURNS = {
    "finite stays": (1.0, 2.0, False),
    "overflows": (1.0, INF, True),
    "finite to NaN": (1.0, NAN, True),
    "infinite stays": (INF, INF, False),
    "the other infinity": (INF, -INF, False),
    "infinite to NaN": (-INF, NAN, True),
    "NaN stays": (NAN, NAN, False),
    "NaN to infinite": (NAN, INF, False),
    "infinite to finite": (INF, 1.0, False),
    "NaN to finite": (NAN, 0.0, False),
}


# Each kind in two of the sizes, and each size of several kinds.
@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, SIZES[(i + j) % 4]) for i, kind in enumerate(KINDS) for j in (0, 2)],
)
def test_what_has_turned_bad_since_before(kind, size):
    found = jax.jit(lambda new, old: any_non_finite(new, old))
    good, at = spoiled(size, kind, 0.5, 0), size // 2
    # A NaN is found by what it is, not by its bits.
    other_nan = spoiled(size, kind, -NAN, at)
    assert not found([other_nan], [spoiled(size, kind, NAN, at)])
    for name, (before, after, has_turned) in TURNS.items():
        old, new = (spoiled(size, kind, value, at) for value in (before, after))
        assert found([new], [old]) == has_turned, name
        assert found([good, new], [good, old]) == has_turned, name
        # What was bad elsewhere hides nothing.
        assert found([other_nan, new], [other_nan, old]) == has_turned, name
