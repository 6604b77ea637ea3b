"""At a saddle: along what the loss curves downwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

BFGS = optx.BFGS(1e-9, 1e-9)
# Takes steps that move nothing.
IDLE = optx.GradientDescent(1e-14, 1e-30, 1e-30)
X = jnp.linspace(0.0, 1.0, 40)
NOISE = 0.5 * jax.random.normal(jax.random.key(0), X.shape)


def jitter(m, batch):
    """Its derivative by the jitter is zero where there is none."""
    variance = 0.01 + m["jit"] ** 2
    squares = (batch - m["a"] * X - m["c"]) ** 2
    return 0.5 * jnp.sum(squares / variance + jnp.log(variance))


def mixed(m, _):
    """It curves downwards along a diagonal."""
    return 50 * m["x"] ** 2 + 2 * m["y"] * m["z"] + m["y"] ** 4 + m["z"] ** 4


def many(m, _):
    """Of too many parameters for a Hessian."""
    rest = jnp.sum(m["wide"] ** 2)
    return rest - (m["y"] - 0.1) ** 2 + m["y"] ** 4


# What is fitted, the start, and the words and the direction of the saddle.
SADDLES = {
    "jitter": (
        jitter,
        {"a": 1.0, "c": 0.0, "jit": 0.0},
        "curves downwards along jit (+1): start from elsewhere",
    ),
    "mixed": (
        mixed,
        {"x": 1.0, "y": 0.0, "z": 0.0},
        "curves downwards along y (+0.71), z (-0.71): start from elsewhere",
    ),
    "many": (
        many,
        {"wide": np.zeros(600), "y": 0.0},
        "curves downwards along y (-1): start from elsewhere",
    ),
}


class Fit(vn.Trainer):
    name: str

    def __init__(self, name, **options):
        start = jax.tree.map(jnp.asarray, SADDLES[name][1])
        super().__init__(start, optax.adam(0.05), **options)
        self.name = name

    def nll(self, model, batch):
        return SADDLES[self.name][0](model, batch)


@pytest.mark.parametrize("name", SADDLES)
def test_the_direction_of_downward_curvature_is_named(name):
    words, batch = SADDLES[name][2], 2 * X + 1 + NOISE
    result = Fit(name).solve(IDLE if name == "many" else BFGS, batch)
    assert result.explain() == f"{result.stop_reason} The loss {words}."
    with pytest.raises(ValueError, match=r"Fit first; or, if .* elsewhere"):
        result.report(batch)
