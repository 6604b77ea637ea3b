"""Errors of a user's method, with the shapes of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

KEY = jax.random.key(0)
X, Y = np.ones((6, 3)), np.ones(6)
SAID = "The shapes of the batch: `batch[0]` (6,), `batch[1]` (6, 3)."


def off(self, model, batch):
    x, y = batch
    return x @ model["a"] - y


def by_name(self, model, batch):
    return jnp.sum(batch["z"])


def made(**methods):
    kind = type("Fit", (vn.Trainer,), methods)
    return kind({"a": jnp.ones(3)}, optax.sgd(0.1))


LOSS = made(loss=lambda self, model, batch: jnp.sum(off(self, model, batch) ** 2))
MANY = [np.ones(i) for i in range(1, 12)]
EIGHT = [f"`batch[{i}]` ({i + 1},)" for i in range(8)]

# What is called, the type of the error, and its notes.
CASES = {
    "step": (lambda: LOSS.step((Y, X)), [SAID]),
    "fit": (lambda: LOSS.fit((Y, X), 1, progress=False), [SAID]),
    "minibatches": (
        lambda: LOSS.fit(vn.Minibatches((Y, X), 2, key=KEY), 1),
        [SAID.replace("6", "2")],
    ),
    "solve": (
        lambda: made(residuals=off).solve(optx.BFGS(1e-3, 1e-3), (Y, X)),
        [SAID],
    ),
    "standard errors": (lambda: made(residuals=off).standard_errors((Y, X)), [SAID]),
    "validation": (
        lambda: LOSS.fit((X, Y), 1, validation=((Y, X), 1), progress=False),
        [SAID],
    ),
    "many": (lambda: vn.fit_many([LOSS, LOSS], (Y, X), 1, progress=False), [SAID]),
    "a name": (
        lambda: made(loss=by_name).step({"x": X, "y": Y, "word": "a"}),
        ["The shapes of the batch: `batch['x']` (6, 3), `batch['y']` (6,)."],
    ),
    "the first of many": (
        lambda: made(loss=by_name).step(MANY),
        [f"The shapes of the batch: {', '.join(EIGHT)}."],
    ),
    "words": (lambda: made(loss=by_name).step({"word": "a"}), []),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_has_the_shapes_of_the_batch_once(name):
    call, said = CASES[name]
    with pytest.raises((TypeError, ValueError, LookupError)) as caught:
        call()
    notes = getattr(caught.value, "__notes__", [])
    assert [note for note in notes if "shapes" in note] == said


def test_the_traceback_ends_in_the_code_of_the_user():
    with pytest.raises(TypeError) as caught:
        LOSS.step((Y, X))
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "off"
