"""Residuals that are broadcast to more than there are data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.loose_ranks]

N = 5
ONES = np.ones(N)
COLUMN, ROW = ONES[:, None], ONES[None, :]
SIMPLE = lambda model, batch: model["a"] * batch["x"] - batch["y"]
WIDE = lambda model, batch: model["a"] * batch["x"].sum(-1) - batch["y"]

OFF = lambda model, batch: [model["a"] * batch["x"] - batch[y] for y in "yz"]
THREE = {"x": ONES, "y": COLUMN, "z": COLUMN}
ALL = (f"`Fit.residuals` has all {N} x {N} pairs",)

# The residuals, the batch, and what is named.
OUTER = {
    "column beside a vector": (SIMPLE, {"x": ONES, "y": COLUMN}, ("'y'", "'x'")),
    "vector beside a column": (SIMPLE, {"x": COLUMN, "y": ONES}, ("'x'", "'y'")),
    "row beside a column": (SIMPLE, {"x": ROW, "y": COLUMN}, ("'x'", "'y'")),
    "in three axes": (SIMPLE, {"x": ONES, "y": COLUMN[None]}, ("'y'", "'x'")),
    "column of uncertainties": (
        lambda model, batch: (model["a"] * batch["x"] - batch["y"]) / batch["s"],
        {"x": ONES, "y": ONES, "s": COLUMN},
        ("'s'", "'x'"),
    ),
    "features beside a column": (
        WIDE,
        {"x": np.ones((N, 3)), "y": COLUMN},
        ("'y'", "'x'"),
    ),
    "many features": (WIDE, {"x": np.ones((N, 99)), "y": COLUMN}, ("'y'", "'x'")),
    "column of a network": (
        lambda model, batch: model["a"] * batch["x"][:, :1] - batch["y"],
        {"x": np.ones((N, 3)), "y": ONES},
        ("'y'", "'x'"),
    ),
    "x in the model": (
        lambda model, batch: model["a"] * ONES - batch["y"],
        {"y": COLUMN},
        ("'y'",),
    ),
    "complex": (SIMPLE, {"x": ONES, "y": COLUMN * 1j}, ("'y'", "'x'")),
    "tuples": (
        lambda model, batch: model["a"] * batch[0] - batch[1],
        (ONES, COLUMN),
        ("`batch[1]`", "`batch[0]`"),
    ),
    "joined": (lambda m, b: jnp.concatenate(OFF(m, b)), THREE, ALL),
    "side by side": (lambda m, b: jnp.hstack(OFF(m, b)), THREE, ALL),
    "flat": (lambda m, b: SIMPLE(m, b).ravel() / 0.1, {"x": ONES, "y": COLUMN}, ALL),
    "flat, of a network": (
        lambda m, b: jnp.ravel(m["a"] * b["x"][:, :1] - b["y"]),
        {"x": np.ones((N, 2)), "y": ONES},
        ALL,
    ),
    "flat, beside others": (
        lambda m, b: jnp.concatenate([SIMPLE(m, b).ravel(), m["a"] * ONES]),
        {"x": ONES, "y": COLUMN},
        ALL,
    ),
    "flat, in a dictionary": (
        lambda m, b: {"y": SIMPLE(m, b).ravel(), "x": m["a"] * b["x"]},
        {"x": ONES, "y": COLUMN},
        ALL,
    ),
    "flat, of a robust loss": (
        lambda m, b: vn.likelihoods.Robust(SIMPLE(m, b).ravel(), "huber"),
        {"x": ONES, "y": COLUMN},
        ALL,
    ),
    "each for itself": (OFF, THREE, ("returned an array", "'y'", "'x'")),
}
INNER = {
    "vectors": (SIMPLE, {"x": ONES, "y": ONES}),
    "columns": (SIMPLE, {"x": COLUMN, "y": COLUMN}),
    "one datum": (SIMPLE, {"x": ONES[:1], "y": COLUMN[:1]}),
    "a grid": (
        lambda model, batch: model["a"] * batch["x"] * batch["y"] - batch["z"],
        {"x": ONES, "y": COLUMN, "z": np.ones((N, N))},
    ),
    "a flat image": (
        lambda model, batch: SIMPLE(model, batch) - batch["z"].reshape(N, N),
        {"x": ONES, "y": COLUMN, "z": np.ones(N * N)},
    ),
    "a square image": (SIMPLE, {"x": np.ones((N, N)), "y": np.ones((1, N, N))}),
    "an image for each": (SIMPLE, {"x": np.ones((3, N, N)), "y": np.ones(N)}),
    "a grid that is not square": (SIMPLE, {"x": ONES, "y": COLUMN[:3]}),
    "image of the trainer": (
        lambda model, batch: model["a"] * batch - np.ones((N, N)),
        ONES,
    ),
    "on purpose": (
        lambda m, b: (m["a"] * b["x"] - b["y"][:, 0][:, None]).ravel(),
        {"x": ONES, "y": COLUMN},
    ),
    "flat pixels": (
        lambda m, b: (m["a"] * b["x"] * b["y"]).ravel() - b["z"],
        {"x": ONES, "y": COLUMN, "z": np.ones(N * N)},
    ),
    "pixels of the trainer": (
        lambda m, b: (m["a"] * b["x"] * b["y"] - np.ones((N, N))).ravel(),
        {"x": ONES, "y": COLUMN},
    ),
    "two images of the trainer": (
        lambda m, b: (
            jnp.concatenate([m["a"] * b["x"] * b["y"]] * 2) - np.ones((2 * N, N))
        ),
        {"x": ONES, "y": COLUMN},
    ),
    "joined vectors": (
        lambda m, b: jnp.concatenate(OFF(m, b)),
        {"x": ONES, "y": ONES, "z": ONES},
    ),
    "joined columns": (
        lambda m, b: jnp.concatenate(OFF(m, b)),
        {"x": COLUMN, "y": COLUMN, "z": COLUMN},
    ),
    "blurred pixels": (
        lambda m, b: jnp.ravel(ONES[None] @ (m["a"] * b["x"] * b["y"]) - b["x"]),
        {"x": ONES, "y": COLUMN},
    ),
    "a covariance": (
        lambda m, b: jnp.linalg.solve(np.eye(N), m["a"] * b["x"] - b["x"]),
        {"x": ONES},
    ),
    "numbers and words": (
        lambda model, batch: SIMPLE(model, batch),
        {"x": ONES, "y": 1.0, "n": 3, "name": "text", "none": None},
    ),
}


def trainer_of(residuals):
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return residuals(model, batch)

    return Fit({"a": jnp.asarray(2.0), "none": None}, optax.sgd(1e-3))


@pytest.mark.parametrize("name", OUTER)
def test_outer_residuals_are_warned_of_once(name):
    residuals, batch, named = OUTER[name]
    trainer = trainer_of(residuals)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            # It is seen as the step is traced.
            jax.eval_shape(lambda: trainer.step(batch))
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert all(part in text for part in ("`Fit.residuals`", "`y[:, 0]`", *named))
    assert f"{N}, {N})" in text or f"{N} x {N}" in text


@pytest.mark.parametrize("name", INNER)
def test_other_residuals_are_not(name):
    residuals, batch = INNER[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lambda: trainer_of(residuals).step(batch))


ENTRANCES = {
    "standard errors": lambda trainer, batch: trainer.standard_errors(batch),
    "many": lambda trainer, batch: vn.fit_many([trainer, trainer], batch, 1),
}


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.parametrize("name", ENTRANCES)
def test_each_entrance_warns(name):
    with pytest.warns(UserWarning, match=r"`Fit\.residuals` returned an array of"):
        ENTRANCES[name](trainer_of(SIMPLE), {"x": ONES, "y": COLUMN})
