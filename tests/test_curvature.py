import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn

X = jnp.linspace(-1, 1, 9)


BATCHES = [
    *((batch_size, jnp.float64) for batch_size in (None, 1, 3, 100)),
    (3, jnp.float32),
]


def tree(dtype=jnp.float64):
    return {
        "amplitude": jnp.asarray(1.5, dtype),
        "coefficients": jnp.asarray([[0.3, -0.2], [0.1, 0.7]], dtype),
        "frozen": None,
        "width": jnp.asarray([0.8, 1.1], dtype),
    }


def residuals(params):
    a, c, w = params["amplitude"], params["coefficients"], params["width"]
    x = X.astype(a.dtype)
    return jnp.outer(w**2, jnp.sin(c[0, 0] * x + c[0, 1] * a) + c[1, 0] * c[1, 1] * x)


def loss(params):
    return 0.5 * jnp.sum(residuals(params) ** 2)


def flat(fn, params):
    start, unravel = ravel_pytree(params)
    return (lambda vector: fn(unravel(vector))), start


@pytest.mark.parametrize(("batch_size", "dtype"), BATCHES)
def test_hessian_is_that_of_jax(batch_size, dtype):
    params = tree(dtype)
    fn, start = flat(loss, params)
    found = vn.hessian(loss, params, batch_size=batch_size)
    assert found.shape == (7, 7)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, found.T)
    atol = 100 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(found, jax.jit(jax.hessian(fn))(start), atol=atol)


@pytest.mark.parametrize(("batch_size", "dtype"), BATCHES)
def test_gauss_newton_is_the_square_of_the_jacobian(batch_size, dtype):
    params = tree(dtype)
    fn, start = flat(residuals, params)
    jacobian = jax.jit(jax.jacobian(fn))(start).reshape(-1, 7)
    found = vn.gauss_newton(residuals, params, batch_size=batch_size)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, found.T)
    atol = 100 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(found, jacobian.T @ jacobian, atol=atol)


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)))
    point = jnp.ones(5)
    linear = lambda x: matrix @ x - 1
    expected = matrix.T @ matrix
    np.testing.assert_allclose(vn.gauss_newton(linear, point), expected, atol=1e-13)
    square = lambda x: 0.5 * jnp.sum(linear(x) ** 2)
    np.testing.assert_allclose(vn.hessian(square, point), expected, atol=1e-13)


def test_leaves_of_mixed_dtype_share_the_widest():
    params = {"a": jnp.array(2.0, jnp.float32), "b": jnp.array([3.0], jnp.float64)}

    def fn(params):
        assert params["a"].dtype == jnp.float32
        return params["a"].astype(float) ** 2 * params["b"][0]

    found = vn.hessian(fn, params)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, [[6, 4], [4, 0]], rtol=1e-6)


def test_a_module_with_frozen_leaves():
    model = eqx.nn.Linear(1, 3, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def misfit(params):
        return jax.vmap(eqx.combine(params, rest))(X[:, None]) ** 2

    found = vn.gauss_newton(misfit, params)
    fn, start = flat(misfit, params)
    jacobian = jax.jit(jax.jacobian(fn))(start).reshape(-1, 6)
    np.testing.assert_allclose(found, jacobian.T @ jacobian, atol=1e-12)


def test_same_under_jit_and_vmap():
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree())
    mapped = jax.jit(jax.vmap(lambda p: vn.hessian(loss, p, batch_size=3)))(stack)
    for k in range(2):
        params = jax.tree.map(lambda x, k=k: x[k], stack)
        plain = vn.hessian(loss, params)
        jitted = jax.jit(lambda p: vn.hessian(loss, p))(params)
        np.testing.assert_allclose(mapped[k], plain, atol=1e-13)
        np.testing.assert_allclose(jitted, plain, atol=1e-13)


def test_compiles_once_for_a_function_and_a_shape():
    traces = []

    def fn(x):
        traces.append(None)
        return jnp.sum(x**3)

    vn.hessian(fn, jnp.arange(3.0))
    first = len(traces)
    np.testing.assert_allclose(
        vn.hessian(fn, jnp.ones(3), batch_size=None), 6 * jnp.eye(3)
    )
    assert len(traces) == first


def test_memory_is_that_of_a_batch():
    matrix = jnp.ones((5_000, 200))

    def temporary(batch_size):
        compiled = (
            jax.jit(
                lambda x, matrix: vn.gauss_newton(
                    lambda x: jnp.sin(matrix @ x), x, batch_size=batch_size
                )
            )
            .lower(jnp.ones(200), matrix)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(None) / 5


@pytest.mark.parametrize("curvature", [vn.hessian, vn.gauss_newton])
def test_errors_common_to_both(curvature):
    fn = loss if curvature is vn.hessian else residuals
    for batch_size in (0, -2):
        with pytest.raises(ValueError, match=f"`batch_size`.*{batch_size}"):
            curvature(fn, tree(), batch_size=batch_size)
    with pytest.raises(ValueError, match="`params` holds no parameter"):
        curvature(fn, {"a": None})
    with pytest.raises(TypeError, match=r"'a.b'.*complex128"):
        curvature(fn, {"a": {"b": jnp.ones(2) * 1j}})
    with pytest.raises(TypeError, match=r"'n'.*int"):
        curvature(fn, {"n": jnp.arange(2), "x": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"return a real floating-point array.*list"):
        curvature(lambda p: [p], jnp.ones(2))
    with pytest.raises(TypeError, match=r"return a real floating-point array.*complex"):
        curvature(lambda p: p * 1j, jnp.ones(2))


def test_hessian_wants_a_scalar_and_gauss_newton_wants_none():
    with pytest.raises(ValueError, match=r"scalar.*\(2, 9\).*gauss_newton"):
        vn.hessian(residuals, tree())
    with pytest.raises(ValueError, match=r"scalar.*hessian"):
        vn.gauss_newton(loss, tree())
