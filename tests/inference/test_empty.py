"""Parameters without elements: no obstacle beside others, and refused alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn

BFGS, LM = optx.BFGS(1e-8, 1e-8), optx.LevenbergMarquardt(1e-8, 1e-8)
STOP = vn.Converged(rtol=1e-3, patience=2)
PARTS = {"a": jnp.asarray(0.0), "c": jnp.ones(2)}
MODEL = {**PARTS, "e": jnp.zeros((0, 3))}


def distances(model, x):
    return jnp.stack([model["a"] * x - 1, *(3 * model["c"] - x), model["a"] - 2 * x])


class Squares(vn.Trainer):
    def residuals(self, model, batch):
        return distances(model, batch)


class Likelihood(vn.Trainer):
    def nll(self, model, batch):
        return 0.5 * jnp.sum(distances(model, batch) ** 2)


class Loss(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(distances(model, batch) ** 2)


KINDS, X = (Squares, Likelihood, Loss), jnp.asarray(0.7)
RULES = vn.ParamOptimiser({name: optax.sgd(0.1) for name in MODEL})
# The blocks with an empty one, and those without.
BLOCKS = {
    "alone": (("a", "e", "c"), ("a", "c")),
    "with another": (("a", ("c", "e")), ("a", "c")),
    "of a predicate": (("a", lambda path, leaf: leaf.size == 0), ("a",)),
}


# Each kind and each choice of blocks is whitened in either way, and squares are fitted.
CHOSEN = [
    (Squares, "alone", None),
    (Squares, "with another", 1),
    (Likelihood, "with another", None),
    (Likelihood, "of a predicate", 1),
    (Loss, "of a predicate", None),
    (Loss, "alone", 1),
]


@pytest.mark.parametrize(("kind", "blocks", "batch_size"), CHOSEN)
def test_a_block_without_elements_is_no_obstacle(kind, blocks, batch_size):
    given, known = BLOCKS[blocks]
    options = {"batch_size": batch_size}
    optimiser = optax.sgd(0.1) if blocks == "with another" else RULES
    found = kind(MODEL, optimiser).whiten(X, blocks=given, **options)
    # By the slopes of `a`; a loss is not halved.
    error = (1 + X**2) ** -0.5 / (2**0.5 if kind is Loss else 1)
    np.testing.assert_allclose(found.projector.standard_errors()["a"], error)
    if kind is not Squares:
        return
    without = kind(PARTS, optax.sgd(0.1)).whiten(X, blocks=known, **options)
    run = (lambda t: t.solve(BFGS, X)) if batch_size else (lambda t: t.fit(X, 20))
    ends = [run(trainer).model for trainer in (found, without)]
    for name in PARTS:
        np.testing.assert_allclose(*(end[name] for end in ends), rtol=1e-8)


CALLS = {
    "A projector": lambda trainer: trainer.whiten(X),
    "A projector, by blocks": lambda trainer: trainer.whiten(X, blocks=("e",)),
    "A standard error": lambda trainer: trainer.standard_errors(X),
    "A standard error, in a table": lambda trainer: trainer.table(X),
    "A report": lambda trainer: trainer.report(X),
    "A propagated error": lambda trainer: trainer.propagate(lambda m: m["a"], X),
    "A draw": lambda trainer: trainer.draw(jax.random.key(0), 2, X),
    "A standard error, of many": lambda trainer: vn.fit_many(
        [trainer] * 2, X, 1, solver=BFGS
    ).errors(X),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_without_any_elements_the_argument_is_named(kind, call):
    what = call.split(",")[0]
    with pytest.raises(ValueError, match=rf"{what}.*`train` chooses have none: 'e'"):
        CALLS[call](kind(MODEL, train="e"))
    assert kind(MODEL, train="e").fisher(X).shape == (0, 0)


def test_blocks_that_are_all_empty_are_refused():
    with pytest.raises(ValueError, match="`blocks`: none of 'e' has elements"):
        Squares(MODEL).whiten(X, blocks=("e",))


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_elements_is_at_its_minimum(kind):
    trainer = kind(MODEL, optax.sgd(0.1), train="e")
    solver = LM if kind is Squares else BFGS
    options = {"stop": STOP, "progress": False}
    for end in (trainer.solve(solver, X), trainer.fit(X, 9, **options)):
        assert (end.stop_reason, float(end.edm)) == (vn.StopReason.CONVERGED, 0)
    if kind is Loss:
        return
    many = vn.fit_many([trainer] * 2, X, 9, **options)
    assert many.stop_reasons == (vn.StopReason.CONVERGED,) * 2
    np.testing.assert_array_equal(many.edms, 0)
