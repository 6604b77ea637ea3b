import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn
from marked import marked

X = jnp.linspace(-1, 1, 9)


BATCHES = [
    (None, jnp.float64),
    pytest.param(3, jnp.float64, marks=pytest.mark.seams),
    (100, jnp.float32),
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


def by_jax(derivative, fn, params):
    """A derivative of a function of the ravelled parameters."""
    start, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(derivative(lambda vector: fn(unravel(vector))))(start))


@functools.cache
def expected_hessian(dtype):
    return by_jax(jax.hessian, loss, tree(dtype))


@functools.cache
def expected_jacobian(dtype):
    return by_jax(jax.jacobian, residuals, tree(dtype)).reshape(-1, 7)


@pytest.mark.parametrize(("batch_size", "dtype"), BATCHES)
def test_hessian_is_that_of_jax(batch_size, dtype):
    found = vn.hessian(loss, tree(dtype), batch_size=batch_size)
    assert found.shape == (7, 7)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, found.T)
    atol = 100 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(found, expected_hessian(dtype), atol=atol)


@pytest.mark.parametrize(("batch_size", "dtype"), BATCHES)
def test_gauss_newton_is_the_square_of_the_jacobian(batch_size, dtype):
    jacobian = expected_jacobian(dtype)
    found = vn.gauss_newton(residuals, tree(dtype), batch_size=batch_size)
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
    jacobian = by_jax(jax.jacobian, misfit, params).reshape(-1, 6)
    np.testing.assert_allclose(found, jacobian.T @ jacobian, atol=1e-12)


def test_same_under_jit_and_vmap():
    both = [tree(), jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x)), tree())]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *both)
    mapped = jax.jit(jax.vmap(lambda p: vn.hessian(loss, p, batch_size=3)))(stack)
    run = jax.jit(lambda p: vn.hessian(loss, p))
    for k, params in enumerate(both):
        plain, jitted = vn.hessian(loss, params), run(params)
        np.testing.assert_allclose(np.asarray(mapped)[k], plain, atol=1e-13)
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


@pytest.mark.as_compiled
@pytest.mark.parametrize("curvature", [vn.hessian, vn.gauss_newton])
def test_memory_is_that_of_a_batch(curvature):
    matrix = jnp.ones((5_000, 200))

    def temporary(batch_size):
        def compute(x, matrix):
            residuals = lambda x: jnp.sin(matrix @ x)
            fn = lambda x: jnp.sum(residuals(x) ** 2)
            fn = fn if curvature is vn.hessian else residuals
            return curvature(fn, x, batch_size=batch_size)

        compiled = jax.jit(compute).lower(jnp.ones(200), matrix).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(None) / 5
    assert temporary(200) <= temporary(None) * 1.1


@pytest.mark.parametrize("curvature", [vn.hessian, vn.gauss_newton])
def test_errors_common_to_both(curvature):
    fn = loss if curvature is vn.hessian else residuals
    for batch_size in (0, -2):
        with pytest.raises(ValueError, match=f"`batch_size`.*{batch_size}"):
            curvature(fn, tree(), batch_size=batch_size)
    with pytest.raises(ValueError, match="`params` holds no parameter"):
        curvature(fn, {"a": None})
    with pytest.raises(TypeError, match=r"'a.b'.*complex128"):
        curvature(fn, {"a": {"b": jnp.ones(2, complex)}})
    with pytest.raises(TypeError, match=r"'n'.*int"):
        curvature(fn, {"n": jnp.arange(2), "x": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"return a real floating-point array.*list"):
        curvature(lambda p: [p], jnp.ones(2))
    with pytest.raises(TypeError, match=r"return a real floating-point array.*complex"):
        curvature(lambda p: p.astype(complex), jnp.ones(2))


def test_hessian_wants_a_scalar_and_gauss_newton_wants_none():
    with pytest.raises(ValueError, match=r"scalar.*\(2, 9\).*gauss_newton"):
        vn.hessian(residuals, tree())
    with pytest.raises(ValueError, match=r"scalar.*hessian"):
        vn.gauss_newton(loss, tree())


# --- products ---


def tangent(params):
    """Normal numbers for the leaves of a tree."""
    normal = np.random.default_rng(0).normal
    drawn = lambda leaf: jnp.asarray(normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(drawn, params)


def ravelled(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def odd(dtype=jnp.float64):
    """Leaves of two dtypes, in a list, and one of them a scalar."""
    other = jnp.float32
    return [jnp.asarray(0.5, other), None, jnp.asarray([[1.0, 2.0]], dtype)]


def odd_residuals(params):
    a, _, b = params
    return jnp.sin(a.astype(b.dtype) * b.ravel()) + b[0, 0] ** 2


# The matrix, the product with it, the function, and the point.
PRODUCTS = {
    "hessian": (vn.hessian, vn.hessian_matvec, loss, tree),
    "gauss_newton": (vn.gauss_newton, vn.gauss_newton_matvec, residuals, tree),
    "hessian of mixed dtypes": (
        vn.hessian,
        vn.hessian_matvec,
        lambda params: jnp.sum(odd_residuals(params) ** 2),
        odd,
    ),
    "gauss_newton of mixed dtypes": (
        vn.gauss_newton,
        vn.gauss_newton_matvec,
        odd_residuals,
        odd,
    ),
}
MIXED = [name for name in PRODUCTS if "mixed" in name]
MATVECS = {
    "hessian": (vn.hessian_matvec, loss),
    "gauss_newton": (vn.gauss_newton_matvec, residuals),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", marked(pytest.mark.seams, PRODUCTS, *MIXED))
def test_a_product_is_that_with_the_matrix(name, dtype):
    matrix, matvec, fn, point = PRODUCTS[name]
    params = point(dtype)
    vector = tangent(params)
    product = matvec(fn, params)
    found = product(vector)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    kind = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kind(found) == kind(params)
    coarsest = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(params))
    expected = np.dot(matrix(fn, params), ravelled(vector))
    np.testing.assert_allclose(ravelled(found), expected, atol=200 * coarsest)
    # As an argument of a compiled function it is a pytree like any other.
    jitted = jax.jit(lambda product, v: product(v))(product, vector)
    np.testing.assert_allclose(ravelled(jitted), ravelled(found), atol=200 * coarsest)


@pytest.mark.parametrize("matvec", [vn.hessian_matvec, vn.gauss_newton_matvec])
def test_a_product_compiles_once_for_a_function_and_a_shape(matvec):
    traces = []

    def fn(x):
        traces.append(None)
        return jnp.sum(x**3) if matvec is vn.hessian_matvec else x**3

    matvec(fn, jnp.arange(3.0))(jnp.ones(3))
    first = len(traces)
    assert first
    for point in (jnp.ones(3), 2 * jnp.ones(3)):
        found = matvec(fn, point)(jnp.ones(3))
        expected = 6 * point if matvec is vn.hessian_matvec else 9 * point**4
        np.testing.assert_allclose(found, expected)
    assert len(traces) == first


@pytest.mark.parametrize("name", MATVECS)
def test_a_loop_of_products_does_not_evaluate_the_model_again(name):
    """What does not depend on the vector is computed before the loop, not in it."""
    matvec, _ = MATVECS[name]

    def fn(x):
        value = jnp.tan(x) * x
        return jnp.sum(value) if name == "hessian" else value

    def loop(x):
        product = matvec(fn, x).flat()
        return jax.lax.fori_loop(0, 5, lambda _, v: product(v), jnp.ones(3))

    closed = jax.make_jaxpr(loop)(jnp.ones(3))
    bodies = [
        eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name in ("while", "scan")
    ]
    assert len(bodies) == 1
    inside = str(bodies[0].params)
    assert "tan" in str(closed)
    assert "tan" not in inside


@pytest.mark.parametrize("name", MATVECS)
def test_a_tangent_is_checked(name):
    matvec, fn = MATVECS[name]
    product = matvec(fn, tree())
    with pytest.raises(ValueError, match="`tangent` must have the structure"):
        product({"amplitude": jnp.ones(())})
    with pytest.raises(ValueError, match=r"`tangent`.*'width'.*\(3,\).*\(2,\)"):
        product(tangent(tree()) | {"width": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"`tangent`.*'width'.*int"):
        product(tangent(tree()) | {"width": jnp.ones(2, int)})
    with pytest.raises(ValueError, match="`params` holds no parameter"):
        matvec(fn, {"a": None})
    with pytest.raises(TypeError, match=r"'a'.*complex128"):
        matvec(fn, {"a": jnp.ones(2, complex)})


def test_a_product_with_the_wrong_kind_of_function():
    with pytest.raises(ValueError, match=r"scalar.*\(2, 9\).*gauss_newton"):
        vn.hessian_matvec(residuals, tree())(tangent(tree()))
    with pytest.raises(ValueError, match=r"scalar.*hessian"):
        vn.gauss_newton_matvec(loss, tree())(tangent(tree()))
