"""`best=False`: the same fit, which keeps no best."""

import jax
import jax.numpy as jnp
import optax
import pytest

import vernal as vn
from inside import one_trainer, run_chunk
from models import (
    GaussianFit,
    LineFit,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
)

BATCH = line_batch()
ADAM = optax.adam(0.1)


class Broken(LineFit):
    """Two of its steps are not finite."""

    def transform_grads(self, grads, model):
        is_bad = (self.step_count == 3) | (self.step_count == 7)
        factor = jnp.where(is_bad, jnp.nan, 1.0)
        return grads.__class__(grads.slope * factor, grads.offset * factor)


class Counted(LineFit):
    """Its loss carries a state."""

    def loss(self, model, batch, *, state):
        return jnp.mean(jnp.square(model(batch[0]) - batch[1])), state + 1


def plain(**options):
    return LineFit(line(), ADAM, **options)


CHUNKS, STOP = {"chunk": 3, "callback": lambda *_: None}, vn.Converged(0.5, 3)

# A trainer, its data, and options of the fit.
FITS = {
    "stream": lambda: (plain(), vn.Stream([BATCH] * 20), {}),
    "chunks that stop": lambda: (plain(), BATCH, CHUNKS | {"stop": STOP}),
    "bad steps": lambda: (Broken(line(), ADAM, nan_policy=vn.SkipStep()), BATCH, {}),
    "state and minibatches": lambda: (
        Counted(line(), ADAM, state=jnp.array(0)),
        vn.Minibatches(BATCH, 4, key=jax.random.key(0)),
        {},
    ),
    "projector": lambda: (
        GaussianFit(gaussian(), ADAM).whiten(gaussian_batch()),
        gaussian_batch(),
        {},
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_all_but_the_best_is_the_same(name):
    trainer, data, options = FITS[name]()
    data_again = FITS[name]()[1]
    kept = trainer.fit(data, 12, progress=False, **options)
    result = trainer.fit(data_again, 12, progress=False, best=False, **options)
    ours, theirs = result.trainer, kept.trainer
    for of in ("params", "opt_state", "state", "latent", "step_count"):
        assert same(getattr(ours, of), getattr(theirs, of))
    assert same(ours.nan_report(), theirs.nan_report())
    assert same(result.history.loss, kept.history.loss)
    assert result.stop_reason is kept.stop_reason
    # Like a trainer that has not scored anything.
    assert same(ours.best, ours.model)
    assert same(ours.best_state, ours.state)
    assert ours.best_loss == jnp.inf


def test_a_best_of_before_is_not_kept():
    later = plain().fit(BATCH, 5, progress=False).trainer
    for steps in (0, 5):
        result = later.fit(BATCH, steps, progress=False, best=False)
        assert result.trainer.best_loss == jnp.inf
        assert same(result.trainer.best, result.model)


@pytest.mark.parametrize("go_on", ["fit", "step"])
def test_what_follows_keeps_its_best(go_on):
    trainer = plain().fit(BATCH, 5, progress=False, best=False).trainer
    if go_on == "step":
        after, info = trainer.step(BATCH)
        assert after.best_loss == info.loss
        assert same(after.best, trainer.model)
    else:
        result = trainer.fit(BATCH, 5, progress=False)
        assert result.trainer.best_loss == result.history.loss.min()


def test_a_fit_resumes(tmp_path):
    options = {"chunk": 5, "progress": False, "best": False}
    whole = plain().fit(BATCH, 20, **options)
    for steps in (10, 20):
        checkpoint = vn.Checkpoints(tmp_path, every=1)
        result = plain().fit(BATCH, steps, checkpoint=checkpoint, **options)
    assert same(result.trainer, whole.trainer)
    assert same(result.history.loss, whole.history.loss)


def test_the_best_of_the_result_is_an_error():
    result = plain().fit(BATCH, 5, progress=False, best=False)
    with pytest.raises(ValueError, match="kept none, by `best=False`"):
        _ = result.best
    assert "best_loss=inf" in repr(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": (BATCH, 2)}, "`validation` is what `best` is chosen by"),
        ({"best": None}, "best"),
    ],
)
def test_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plain().fit(BATCH, 5, **{"progress": False, "best": False, **options})


def test_fit_many_keeps_every_best():
    with pytest.raises(TypeError, match="has no argument `best`"):
        vn.fit_many([plain(), plain()], BATCH, 5, best=False)


class Pull(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(jnp.square(model - batch))


@pytest.mark.as_compiled
def test_it_takes_less_memory(monkeypatch):
    """A copy of the parameters in each of what is given, worked on and returned."""
    size, found = 100_000, []

    def spy(*args):
        found.append(run_chunk.lower(*args).compile().memory_analysis())
        return run_chunk(*args)

    monkeypatch.setattr(one_trainer, "run_chunk", spy)
    trainer = Pull(jnp.zeros(size), ADAM)
    for best in (True, False):
        trainer.fit(jnp.ones(size), 1, progress=False, best=best)
    kept, none = found
    for of in ("argument", "output", "temp"):
        name = f"{of}_size_in_bytes"
        saved = getattr(kept, name) - getattr(none, name)
        assert saved >= trainer.params.nbytes
