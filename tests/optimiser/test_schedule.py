import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zodiax.optimisation as seed

import vernal as vn


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("lr", [1e-3, 2, -0.5, 0.0, np.float32(0.1)])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 1), (5, 10), (50, 2)])
def test_delay_is_that_of_the_seed(lr, start, length):
    ours, theirs = vn.delay(lr, start, length), seed.delay(lr, start, length)
    # As many in each case, so that they share their programs.
    steps = np.arange(55)
    np.testing.assert_array_equal(jax.vmap(ours)(steps), jax.vmap(theirs)(steps))


def test_delay_is_zero_then_linear_then_constant():
    schedule = vn.delay(2.0, start=3, length=4)
    rates = [float(schedule(t)) for t in range(9)]
    assert rates == [0, 0, 0, 0, 0.5, 1, 1.5, 2, 2]


def test_delay_drives_an_optimiser():
    optim = optax.sgd(vn.delay(1.0, 2))
    params = jnp.array(0.0)
    state = optim.init(params)
    moves = []
    for _ in range(5):
        updates, state = optim.update(jnp.array(1.0), state, params)
        moves.append(float(updates))
    assert moves == [0, 0, 0, -1, -1]


def test_delay_accepts_whole_numbers_of_any_type():
    expected = vn.delay(1.0, 4, 2)(5)
    assert vn.delay(1.0, np.int64(4), np.int32(2))(5) == expected
    assert vn.delay(1.0, 4.0, 2.0)(5) == expected


def test_delay_of_a_traced_rate():
    slope = jax.jit(jax.grad(lambda lr: vn.delay(lr, 2, 4)(4)))(1.0)
    assert slope == 0.5


@pytest.mark.loose_dtypes
def test_delay_may_last_longer_than_any_fit():
    with jax.enable_x64(False):
        assert vn.delay(0.1, 2**40)(2**30) == 0
        rate = vn.delay(0.1, 0, 2**40)(2**30)
    np.testing.assert_allclose(rate, 0.1 / 2**10, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1.0, -1), "`start`"),
        ((1.0, 2.5), "`start`"),
        ((1.0, float("nan")), "`start`"),
        ((1.0, 2, 0), "`length`"),
        ((1.0, 2, -3), "`length`"),
        ((1.0, 2, 1.5), "`length`"),
        ((float("nan"), 2), "`lr`"),
        ((float("inf"), 2), "`lr`"),
        ((jnp.array(jnp.nan), 2), "`lr`"),
    ],
)
def test_delay_names_the_argument_that_is_wrong(arguments, name):
    with pytest.raises(ValueError, match=name):
        vn.delay(*arguments)
