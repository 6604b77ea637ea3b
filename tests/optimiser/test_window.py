import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from inside import Transform

pytestmark = pytest.mark.seams

PARAMS = {"a": jnp.arange(3.0), "b": jnp.ones((), jnp.float32), "c": None}


def run(tx, steps, scale=1.0):
    state, out = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: scale * (p + i), PARAMS)
        updates, state = update(grads, state, PARAMS)
        out.append(updates)
    return out, state


@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, None), (0, 3), (1, 4)])
def test_sees_nothing_outside(start, stop):
    inner = optax.adam(optax.linear_schedule(0.1, 0.2, 5))
    out, state = run(vn.window(inner, start, stop), 6)
    ref = inner.init(PARAMS)
    for i, updates in enumerate(out):
        grads = jax.tree.map(lambda p, i=i: p + i, PARAMS)
        expected = jax.tree.map(jnp.zeros_like, PARAMS)
        if start <= i < (stop or 6):
            expected, ref = jax.jit(inner.update)(grads, ref, PARAMS)
        for a, b in zip(
            jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert state.count == 6
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.inner_state, ref))


@pytest.mark.parametrize(
    ("start", "stop", "acts"), [(0, 2**40, True), (2**40, None, False)]
)
def test_a_window_may_reach_beyond_any_fit(start, stop, acts):
    with jax.enable_x64(False):
        tx = vn.window(optax.sgd(1.0), start, stop)
        updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    assert bool(jnp.any(updates != 0)) == acts
    assert vn.window(optax.sgd(1.0), 2**40, 2**41)


def test_a_bad_gradient_outside_leaves_no_trace():
    tx = vn.window(optax.adam(0.1), start=1)
    state = tx.init(PARAMS)
    updates, held = tx.update(jax.tree.map(lambda p: p * jnp.nan, PARAMS), state)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.all(x == 0), updates))
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, held.inner_state, state.inner_state)
    )


@pytest.mark.loose_dtypes
def test_dtypes_are_those_of_the_transformation():
    tx = vn.window(optax.sgd(np.float64(0.1)), start=1)
    out, _ = run(tx, 2)
    assert out[0]["b"].dtype == out[1]["b"].dtype == jnp.float64


def test_scan_vmap_and_extra_arguments():
    tx = vn.window(optax.chain(optax.polyak_sgd(), vn.window(optax.adam(1.0), 1)), 1, 3)

    def fit(x):
        def body(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(jnp.square)(x)
            updates, state = tx.update(grad, state, x, value=value)
            return (x + updates, state), x

        return jax.lax.scan(body, (x, tx.init(x)), length=5)[1]

    xs = jax.vmap(fit)(jnp.asarray([1.0, 2.0]))
    moved = jnp.diff(xs) != 0
    assert jnp.array_equal(moved, jnp.asarray([[False, False, True, False]] * 2))


def test_count_saturates():
    tx = vn.window(optax.sgd(0.1), 1)
    top = jnp.iinfo(jnp.int32).max
    state = tx.init(PARAMS)._replace(count=jnp.asarray(top, jnp.int32))
    updates, state = tx.update(PARAMS, state)
    assert state.count == top
    assert updates["a"][1] != 0


def test_rates_inside_are_leaves():
    a, b = (Transform.of(vn.window(optax.adam(r), 2), "tx") for r in (0.1, 0.2))
    assert len(a.closure.leaves) == 1
    assert a.closure.skeleton is b.closure.skeleton
    other = Transform.of(vn.window(optax.adam(0.1), 3), "tx")
    assert other.closure.skeleton != a.closure.skeleton


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("start", "stop"), [(-1, None), (1.5, None), (0, -1), (0, 2.5), ("1", None)]
)
def test_bad_steps(start, stop):
    with pytest.raises(ValueError, match="must be an integer that is not negative"):
        vn.window(optax.sgd(0.1), start, stop)


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (5, 3), (0, 0)])
def test_backwards(start, stop):
    with pytest.raises(ValueError, match="backwards"):
        vn.window(optax.sgd(0.1), start, stop)


@pytest.mark.own_words
def test_not_a_transformation():
    with pytest.raises(TypeError, match=r"optax.sgd\(0.1\)"):
        vn.window(0.1)
