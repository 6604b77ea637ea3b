"""Loops that are compiled as one function return what they return otherwise."""

import jax
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from inside import one_function

as_one_function = one_function.as_one_function

# Ordinary numbers, and those at which code for a CPU takes shortcuts.
RNG = np.random.default_rng(0)
NUMBERS = np.concatenate([RNG.normal(size=30) * 3, RNG.uniform(size=10)])
ODD = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e-30, 1.0, -1.0])

FUNCTIONS = {
    "abs": jnp.abs,
    "acos": lax.acos,
    "acosh": lax.acosh,
    "add": lambda x: x + x[::-1],
    "and": lambda x: (x > 0) & (x < 1),
    "argmax": jnp.argmax,
    "argmin": jnp.argmin,
    "asin": lax.asin,
    "asinh": lax.asinh,
    "atan": lax.atan,
    "atan2": lambda x: jnp.arctan2(x, x[::-1]),
    "atanh": lax.atanh,
    "bits": lambda x: lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}"),
    "ceil": jnp.ceil,
    "clamp": lambda x: lax.clamp(x.dtype.type(-1), x, x.dtype.type(1)),
    "complex": lambda x: jnp.abs(lax.complex(x, x[::-1])),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x]),
    "cond": lambda x: lax.cond(x[0] > 0, lambda: x, lambda: 2 * x),
    "conj": lambda x: jnp.imag(jnp.conj(lax.complex(x, x))),
    "copy": jnp.copy,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x[:8]),
    "cummax": lambda x: lax.cummax(x[:8]),
    "cummin": lambda x: lax.cummin(x[:8]),
    "cumprod": lambda x: jnp.cumprod(x[:8]),
    "cumsum": lambda x: jnp.cumsum(x[:8]),
    "custom derivative": jax.grad(lambda x: jnp.sum(jax.nn.relu(x) * x)),
    "digamma": lax.digamma,
    "div": lambda x: x / x[::-1],
    "dot with a vector": lambda x: jnp.outer(x[:5], x[5:10]) @ x[:5],
    "dot of two": lambda x: x @ x[::-1],
    "dot of tiny ones": lambda x: x[:9].reshape(3, 3) @ x[9:18].reshape(3, 3),
    "dynamic slice": lambda x: lax.dynamic_slice(x, [jnp.int32(3)], [4]),
    "dynamic update": lambda x: lax.dynamic_update_slice(x, x[:3], [jnp.int32(3)]),
    "erf": lax.erf,
    "erf_inv": lax.erf_inv,
    "erfc": lax.erfc,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "gather": lambda x: x[jnp.array([3, 1, 1])],
    "integer power": lambda x: x**3,
    "iota": lambda x: x * jnp.arange(x.size, dtype=x.dtype),
    "is_finite": jnp.isfinite,
    "jit": lambda x: jax.jit(jnp.tanh)(x),
    "lgamma": lax.lgamma,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "logistic": jax.nn.sigmoid,
    "max": lambda x: jnp.maximum(x, x[::-1]),
    "min": lambda x: jnp.minimum(x, x[::-1]),
    "mul": lambda x: x * x[::-1],
    "neg": lambda x: -x,
    "nextafter": lambda x: jnp.nextafter(x, jnp.zeros_like(x)),
    "not": lambda x: ~(x >= 0) | (x == 1) | (x != 2) | (x <= 3),
    "or": lambda x: (x > 0) | (x < -1),
    "pad": lambda x: jnp.pad(x, 2),
    "pmin": jax.vmap(lambda x: lax.pmin(x, "all"), out_axes=None, axis_name="all"),
    "pow": lambda x: jnp.abs(x) ** 1.7,
    "random": lambda x: jr.normal(jr.split(jr.fold_in(jr.key(0), 3))[0], x.shape),
    "random keys": lambda x: jr.key_data(jr.wrap_key_data(jnp.uint32([1, 2]))),
    "real": lambda x: jnp.real(jnp.exp(lax.complex(jnp.zeros_like(x), x))),
    "reduce_and": lambda x: jnp.all(x > -100),
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_or": lambda x: jnp.any(x > 100),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "reduce_prod": lambda x: jnp.prod(x[:6]),
    "reduce_sum": lambda x: jnp.sum(x[:6]),
    "reduce_xor": lambda x: lax.reduce_xor(jnp.arange(6), (0,)),
    "rem": lambda x: lax.rem(x, x.dtype.type(0.7)),
    "reshape": lambda x: x.reshape(2, -1).T,
    "round": jnp.round,
    "rsqrt": lax.rsqrt,
    "select": lambda x: jnp.where(x > 0, x, x * x),
    "shifts": lambda x: (jnp.arange(9) << 2) + (jnp.arange(9) >> 1),
    "shift of unsigned": lambda x: jnp.arange(9, dtype=jnp.uint32) >> 1,
    "sign": jnp.sign,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "split": lambda x: jnp.split(x, 2)[1],
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "squeeze": lambda x: x[None].squeeze(0),
    "stack": lambda x: jnp.stack([x, 2 * x]),
    "stop_gradient": lambda x: lax.stop_gradient(x) + 1,
    "sub": lambda x: x - x[::-1],
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "unstack": lambda x: sum(jnp.unstack(x[:3])),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 9, lambda c: c * 2, x[:1] + 1),
    "xor": lambda x: jnp.arange(9) ^ 5,
}


def looped(functions):
    """Returns a loop that calls each of some functions of an array three times."""

    def loop(x):
        call = lambda x: {name: fn(x) for name, fn in functions.items()}
        like = jax.eval_shape(call, x)
        first = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), like)
        body = lambda i, _: call(jnp.where(i < 5, x, -x))
        return lax.fori_loop(0, 3, body, first)

    return loop


def as_one(fn):
    """Compiles a loop as one function, and checks that it was one."""

    def call(*args):
        found = as_one_function(fn, *args)
        assert found is not None
        return found

    return jax.jit(call)


PARTS = 5
# The error of a function is larger where its value is close to zero.
CLOSE = {np.float32: (1e-5, 1e-6), np.float64: (1e-13, 1e-14)}


@pytest.mark.as_compiled
@pytest.mark.loose_dtypes
@pytest.mark.loose_ranks
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "float64"])
@pytest.mark.parametrize("part", range(PARTS))
def test_operations(part, dtype):
    """Some of them in one loop."""
    some = dict([*FUNCTIONS.items()][part::PARTS])
    fn = looped(some)
    rtol, atol = CLOSE[dtype]
    one, other = as_one(fn), jax.jit(fn)
    for numbers in (NUMBERS, np.concatenate([ODD, NUMBERS[10:]])):
        x = jnp.asarray(numbers, dtype)
        found, expected = one(x), other(x)
        for name in some:
            np.testing.assert_allclose(
                found[name], expected[name], rtol, atol, err_msg=name
            )


def test_every_operation_that_is_allowed_is_compared():
    traced = jax.make_jaxpr(looped(FUNCTIONS))(jnp.asarray(NUMBERS))
    seen = {e.primitive.name for e in one_function.equations(traced.jaxpr)}
    # The names of one operation in different versions of JAX.
    others = {"closed_call", "copy_p", "custom_vjp_call", "pjit", "stack"}
    others |= {"threefry2x32", "unstack"}
    assert one_function.ALLOWED - seen <= others


ELSEWHERE = {
    "sort": jnp.sort,
    "scatter": lambda x: x.at[jnp.array([0, 0])].add(1.0),
    "Cholesky": lambda x: jnp.linalg.cholesky(jnp.eye(3) * x[0] ** 2),
    "FFT": lambda x: jnp.abs(jnp.fft.fft(x)),
    "callback": lambda x: jax.pure_callback(np.sin, x, x),
    "print": lambda x: (jax.debug.print("{}", x[0]), x)[1],
    "product of matrices": lambda x: x.reshape(5, 8) @ x.reshape(8, 5),
    "large sum": lambda x: jnp.sum(jnp.tile(x, 200).reshape(2, -1), 1),
    "large arrays": lambda x: jnp.tile(x, 300)[:40],
}


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_all_else_is_left_to_the_other_way(name):
    fn = looped({name: ELSEWHERE[name]})
    assert as_one_function(fn, jnp.asarray(NUMBERS)) is None


# Left and right sides, and whether XLA can do their product from one function: it has
# a library for matrices of eight rows, and terms, and columns.
PRODUCTS = {
    "vectors": ((30,), (30,), True),
    "matrix and vector": ((8, 12), (12,), True),
    "vector and matrix": ((12,), (12, 8), True),
    "column and row": ((9, 1), (1, 9), True),
    "tiny": ((7, 4), (4, 2), True),
    "many tiny": ((9, 3, 3), (9, 3, 3), True),
    "many with vectors": ((5, 8, 3), (5, 3, 1), True),
    "eight rows": ((8, 2), (2, 2), False),
    "eight terms": ((2, 8), (8, 2), False),
    "eight columns": ((2, 2), (2, 8), False),
    "many of eight rows": ((3, 8, 2), (3, 2, 2), False),
}


@pytest.mark.as_compiled
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_products(name):
    *sides, is_possible = PRODUCTS[name]
    left, right = (jnp.asarray(RNG.normal(size=side)) for side in sides)

    def loop(x):
        body = lambda _, c: 0.5 * c + 1e-3 * jnp.sum((left * c) @ jnp.sin(right) + c)
        return lax.fori_loop(0, 3, body, x)

    one = jnp.array(1.0)
    assert (as_one_function(loop, one) is not None) == is_possible
    if is_possible:
        np.testing.assert_allclose(as_one(loop)(one), jax.jit(loop)(one), rtol=1e-5)


@pytest.mark.seams
def test_arguments_that_are_not_used():
    """XLA ends the process at one: large, empty, boolean, a key, or closed over."""
    large, few = jnp.ones(200_000), jnp.arange(100_000.0)
    unused = jnp.ones(7), large, jnp.zeros((0, 3)), jnp.array(True), jr.key(0)

    def loop(x, unused, other):
        body = lambda i, c: c + x * few[i] + large[i] + 0 * other.shape[0]
        return lax.fori_loop(0, 3, body, jnp.zeros_like(x)), unused[0]

    x = jnp.arange(4.0)
    found, same = as_one(loop)(x, unused, jnp.ones(3, bool))
    np.testing.assert_array_equal(found, 3 * x + 3)
    np.testing.assert_array_equal(same, 1)


@pytest.mark.as_compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "size", [20, 1_000, pytest.param(5_000, marks=pytest.mark.seams), 100_000]
)
@pytest.mark.parametrize("index", ["fixed", "of the loop"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_constants(kind, index, size, dtype):
    """XLA ends the process where it puts one into the function."""
    constant = kind(RNG.normal(size=size).astype(dtype))

    def loop(x):
        pick = lambda i: 7 if index == "fixed" else i
        body = lambda i, c: c + x * jnp.asarray(constant)[pick(i)]
        return lax.fori_loop(0, 3, body, jnp.zeros_like(x))

    x = jnp.arange(4, dtype=dtype)
    total = 3 * constant[7] if index == "fixed" else constant[:3].sum()
    np.testing.assert_allclose(as_one(loop)(x), x * total, rtol=1e-5)


@pytest.mark.as_compiled
def test_no_large_array_is_copied():
    large = jnp.ones(1_000_000)

    def loop(x, large):
        return lax.fori_loop(0, 3, lambda i, c: c + large[i], x)

    call = jax.jit(lambda *args: as_one_function(loop, *args))
    memory = call.lower(jnp.array(0.0), large).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e5
