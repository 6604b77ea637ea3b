import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from calls import calls_of

pytestmark = pytest.mark.seams

zodiax = pytest.importorskip("zodiax.optimisation")


def steps(make, params, optimisers, grads_of):
    optim, state = make(params, optimisers)
    params = jax.tree.map(lambda x: jnp.asarray(x, float), params)
    update = jax.jit(optim.update)
    for _ in range(5):
        updates, state = update(grads_of(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_agrees_with_the_seed():
    params = {"a": 1, "b": jnp.arange(3.0), "c": {"d": 2.0, "e": [jnp.ones(2)]}, "f": 5}
    optimisers = {("a", "b"): optax.adam(1e-2), "c": optax.sgd(0.1, momentum=0.5)}

    def grads_of(params):
        return jax.tree.map(jnp.cos, params)

    ours, theirs = (
        steps(make, params, optimisers, grads_of)
        for make in (vn.map_optimisers, zodiax.map_optimisers)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert ours["f"] == 5


def test_a_tuple_gives_each_its_own():
    params = {"a": 3.0, "b": 4.0}
    optim, state = vn.map_optimisers(
        params, {("a", "b"): optax.clip_by_global_norm(1.0)}
    )
    grads = jax.tree.map(jnp.asarray, params)
    updates, _ = optim.update(grads, state, grads)
    assert updates == {"a": 1.0, "b": 1.0}


def test_an_optimiser_for_an_unknown_key_is_ignored():
    params = {"a": 1}
    optim, state = vn.map_optimisers(params, {"a": optax.sgd(0.1), "z": optax.sgd(1.0)})
    updates, _ = optim.update({"a": jnp.asarray(1.0)}, state)
    np.testing.assert_allclose(updates["a"], -0.1)


def test_strict():
    optimisers = {"a": optax.sgd(0.1), "z": optax.sgd(1.0)}
    with pytest.raises(
        ValueError, match=r"without an optimiser: 'b'; .*parameter: 'z'"
    ):
        vn.map_optimisers({"a": 1.0, "b": 2.0}, optimisers, strict=True)
    vn.map_optimisers({"a": 1.0, "z": 2.0}, optimisers, strict=True)


def test_a_number_is_no_optimiser():
    with pytest.raises(TypeError, match=r"optimisers\['a'\].*optax.sgd\(0.01\)"):
        vn.map_optimisers({"a": 1.0}, {"a": 0.01})


def test_linear_in_the_number_of_keys():
    def calls(size):
        params = {f"p{i}": jnp.asarray(1.0) for i in range(size)}
        optim, state = vn.map_optimisers(
            params, {name: optax.sgd(0.1) for name in params}
        )
        return calls_of(lambda: jax.make_jaxpr(optim.update)(params, state, params))

    calls(10)
    assert calls(80) < 5 * calls(20)


def test_a_tuple_of_names_among_the_parameters():
    rules = {("a", "b"): optax.adam(0.1), "c": optax.sgd(0.1)}
    _, state = vn.map_optimisers({("a", "b"): 1.0, "c": 2.0}, rules)
    _, expected = vn.map_optimisers({"a": 1.0, "b": 1.0, "c": 2.0}, rules)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
