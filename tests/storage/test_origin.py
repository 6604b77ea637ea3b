"""Checkpoints that are taken up with other data, or with another loss."""

import json
import types
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import inside
import vernal as vn
from models import Pull

X = jnp.linspace(0.0, 1.0, 8)
SGD = optax.sgd(1e-3)
DATA = {"x": X, "more": [2 * X, None, 3.0]}


def squares(self, model, batch):
    """Sums up squares."""
    return jnp.sum((model["a"] * X - jax.tree.leaves(batch)[0]) ** 2)


def cubes(self, model, batch):
    """Sums up cubes."""
    return jnp.sum(jnp.abs(model["a"] * X - jax.tree.leaves(batch)[0]) ** 3)


def told_anew(self, model, batch):
    """Sums up squares, as `squares` does."""
    return jnp.sum((model["a"] * X - jax.tree.leaves(batch)[0]) ** 2)


def made(name="Fit", **methods):
    methods = methods or {"loss": squares}
    kind = type(name, (vn.Trainer,), methods | {"__module__": __name__})
    return kind({"a": jnp.asarray(2.0), "none": None}, optax.sgd(1e-3))


def fit(folder, steps, data, trainer=None):
    checkpoint = vn.Checkpoints(folder, every=5)
    trainer = made() if trainer is None else trainer
    return trainer.fit(data, steps, checkpoint=checkpoint)


def batches(data):
    return vn.Minibatches(data, 4, key=jax.random.key(0))


def stream(step):
    while True:
        yield X


# The data before and now, and what is said; `None` for nothing.
OTHERS = {
    "values": (X, X + 1, "(`data` differs)"),
    "one value": (DATA, DATA | {"x": X.at[3].add(1e-6)}, "at 'x')"),
    "a word": ({"x": X, "word": "a"}, {"x": X, "word": "b"}, "at 'word')"),
    "deep within": (DATA, DATA | {"more": [X, None, 3.0]}, "at 'more.0')"),
    "a number": (DATA, DATA | {"more": [2 * X, None, 4.0]}, "at 'more.2')"),
    "more": (X, jnp.ones(1), "(`data` differs)"),
    "dtype": (X, X.astype(np.float16), "(`data` differs)"),
    "structure": ((X, X), [X, X, X], "at '2')"),
    "less": ((X, X), (X,), "at '1')"),
    "minibatches": (batches(X), batches(X + 1), "(`data` differs)"),
    "keys": (
        {"x": X, "k": jax.random.key(0)},
        {"x": X, "k": jax.random.key(1)},
        "at 'k')",
    ),
}
ORDERS = {
    "key": (vn.Minibatches(X, 4, key=jax.random.key(1)), "key"),
    "size": (vn.Minibatches(X, 2, key=jax.random.key(0)), "size"),
}
THE_SAME = {
    "itself": (DATA, DATA),
    "of NumPy": (DATA, jax.tree.map(np.asarray, DATA)),
    "minibatches": (batches(X), batches(X + 0)),
    "minibatches, then all": (batches(X), X),
    "minibatches after all": (X, batches(X)),
    "a stream": (vn.Stream(stream), vn.Stream(lambda step: iter([X + 1] * 99))),
    "a stream, then data": (vn.Stream(stream), X),
    "nothing but words": ({"x": X, "word": "a"}, {"x": X, "word": "a"}),
}


def told(old, new, trainer=None, other=None):
    source = lambda data: inside.as_source(data)
    before = json.loads(
        json.dumps(inside.origin.origin(trainer or made(), source(old)))
    )
    return list(
        inside.origin.differences(
            before, inside.origin.origin(other or made(), source(new))
        )
    )


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_are_told(name):
    old, new, said = OTHERS[name]
    (text,) = told(old, new)
    assert text.startswith("of other data")
    assert text.endswith(said)


@pytest.mark.parametrize("name", ORDERS)
def test_another_order_is_told(name):
    other, said = ORDERS[name]
    assert told(batches(X), other) == [f"with another `{said}` of `Minibatches`"]


@pytest.mark.parametrize("name", THE_SAME)
def test_the_same_data_are_not(name):
    assert told(*THE_SAME[name]) == []


def test_large_arrays_are_summed_up_on_their_device():
    """One number of three columns, so that a sample could miss it."""
    large = jnp.zeros((2**22 // 3 + 1, 3))
    assert told(large, large + 0) == []
    assert len(told(large, large.at[7, 1].set(1))) == 1


METHODS = {
    "another loss": (made(), made(loss=cubes), ["with another `loss`"]),
    "another method": (
        made(),
        made(nll=squares),
        ["with another `loss`", "with another `nll`"],
    ),
    "another class": (made(), made("Other"), ["of the class `Fit`"]),
    "in other words": (made(), made(loss=told_anew), []),
    "made anew": (made(), made(), []),
    "a wrapper": (made(), made(loss=jax.jit(squares)), []),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_are_told(name):
    one, other, said = METHODS[name]
    assert told(X, X, one, other) == said


class Named(eqx.Module):
    name: str = eqx.field(static=True)


class Scaled(vn.Trainer):
    loss = squares
    sigma: jax.Array
    part: Named

    def __init__(self, wave=X, order=2, sigma=1.0, tied=2.0, law="a", part="b"):
        self.sigma, self.part = jnp.asarray(sigma), Named(part)
        model = {"a": jnp.asarray(2.0), "b": jnp.asarray(tied), "wave": wave}
        model |= {"order": order, "kind": "sine", "law": Named(law)}
        super().__init__(model, optax.sgd(1e-3), train=["a", "b"], ties={"b": "a"})


PARTS = {
    "the same": ({}, []),
    "what follows a parameter": ({"tied": 3.0}, []),
    "a frozen array": (
        {"wave": X + 1},
        ["with another value of 'wave', which is not trained"],
    ),
    "a number": (
        {"order": 3},
        ["with another value of 'order', which is not trained"],
    ),
    "a static field": (
        {"law": "c"},
        ["with another value of 'law.name', which is not trained"],
    ),
    "a static field of a field": (
        {"part": "c"},
        ["with another field `part.name` of the trainer"],
    ),
    "a field": ({"sigma": 2.0}, ["with another field `sigma` of the trainer"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_other_parts_are_told(name):
    changes, said = PARTS[name]
    assert told(X, X, Scaled(), Scaled(**changes)) == said


WEIGHTS = np.random.default_rng(0).normal(size=1000)
STARTS = {
    "the same": (WEIGHTS, WEIGHTS, ""),
    "rounded otherwise": (WEIGHTS, WEIGHTS * (1 + 1e-7 * np.sign(WEIGHTS)), ""),
    "in half precision": (
        WEIGHTS.astype("f2"),
        np.nextafter(WEIGHTS.astype("f2"), 9),
        "",
    ),
    "of another seed": (WEIGHTS, np.random.default_rng(1).normal(size=1000), "'a'"),
    "of another seed, large and in half precision": (
        np.random.default_rng(0).normal(size=2**17).astype("f2"),
        np.random.default_rng(1).normal(size=2**17).astype("f2"),
        "'a'",
    ),
    "in another order": (WEIGHTS, WEIGHTS[::-1], "'a'"),
    "a number": (2.0, 2.01, "'a'"),
    "from zero": (0.0, 1e-9, "'a'"),
    "from zero again": (np.zeros(3), np.zeros(3), ""),
    "a NaN": (np.nan, np.nan, ""),
    "nothing": (np.zeros(0), np.zeros(0), ""),
    "complex": (1 + 2j, 1 - 2j, "'a'"),
}


class Keyed(vn.Trainer):
    def loss(self, model, batch, *, key):
        return jnp.sum(model["a"] ** 2) + jax.random.normal(key)


def begun(start, trainer=Pull, **options):
    model = {"a": jnp.asarray(start), "b": jnp.asarray(1.0), "none": None}
    return trainer(model, SGD, **options)


@pytest.mark.parametrize("name", STARTS)
def test_another_start_is_told(name):
    old, new, path = STARTS[name]
    said = [f"from another start ({path} of the model differs)"] if path else []
    assert told(X, X, begun(old), begun(new)) == said


def test_a_start_at_another_step_is_none():
    """One that goes on with the trainer of a result, in the same directory."""
    further, _ = made().step(X)
    assert told(X, X, made(), further) == []


def test_another_key_is_told():
    one, other = (begun(1.0, Keyed, key=jax.random.key(seed)) for seed in (0, 1))
    assert told(X, X, one, one) == []
    assert told(X, X, one, other) == ["with another `key`"]


SCORED = {
    "values": (
        DATA,
        DATA | {"x": X + 1},
        ["scored on other data (`validation` differs at 'x')"],
    ),
    "an array": (X, X + 1, ["scored on other data (`validation` differs)"]),
    "the same": (X, np.asarray(X), []),
    "none before": (None, X, []),
    "none now": (X, None, []),
}


@pytest.mark.parametrize("name", SCORED)
def test_another_validation_is_told(name):
    old, new, said = SCORED[name]
    source = inside.as_source(X)
    one, other = (inside.origin.origin(made(), source, batch) for batch in (old, new))
    assert list(inside.origin.differences(one, other)) == said


def test_checkpoints_of_earlier_versions_do_not_tell_of_the_start():
    source = inside.as_source(X)
    before, now = (inside.origin.origin(begun(x), source) for x in (1.0, 2.0))
    for name in ("validation", "key", "step", "start"):
        del before[name]
    assert list(inside.origin.differences(before, now)) == []


def test_a_checkpoint_of_another_start(tmp_path):
    result = fit(tmp_path, 5, X, begun(1.0))
    with pytest.warns(UserWarning, match=r"written by a fit from another start \('a' "):
        again = fit(tmp_path, 9, X, begun(2.0))
    assert int(again.trainer.step_count) == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, 3, X, again.trainer)  # goes on, in the same directory
    assert result.history.loss[0] == again.history.loss[0]


def likely(self, model, batch):
    """Half the sum of squares."""
    return 0.5 * squares(self, model, batch)


class Likely(vn.Trainer):
    nll = likely


def believed(prior):
    priors = None if prior is None else {"a": prior}
    return Likely({"a": jnp.asarray(2.0)}, SGD, priors=priors)


PRIORS = {
    "the same": (vn.Normal(1.0, 2.0), vn.Normal(1.0, 2.0), []),
    "none": (None, None, []),
    "the same, of NumPyro": (dist.Gamma(2.0, 1.0), dist.Gamma(2.0, 1.0), []),
    "another mean": (vn.Normal(1.0, 2.0), vn.Normal(3.0, 2.0), ["with other `priors`"]),
    "added": (None, vn.Normal(3.0, 2.0), ["with other `priors`"]),
    "dropped": (vn.Normal(3.0, 2.0), None, ["with other `priors`"]),
    "another rate": (
        dist.Gamma(2.0, 1.0),
        dist.Gamma(2.0, 3.0),
        ["with other `priors`"],
    ),
    "another kind": (
        dist.Gamma(2.0, 1.0),
        dist.InverseGamma(2.0, 1.0),
        ["with other `priors`"],
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_other_priors_are_told(name):
    """The lowest loss so far is that of the priors before."""
    one, other, said = PRIORS[name]
    assert told(X, X, believed(one), believed(other)) == said


@pytest.mark.parametrize("name", ["the same, of NumPyro", "another mean"])
def test_a_checkpoint_of_other_priors(name, tmp_path):
    one, other, said = PRIORS[name]
    fit(tmp_path, 5, X, believed(one))
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        fit(tmp_path, 9, X, believed(other))
    assert len(got) == len(said)
    assert all(text in str(one.message) for text, one in zip(said, got, strict=True))


def test_checkpoints_of_earlier_versions_do_not_tell_of_priors():
    before = inside.origin.origin(believed(None), inside.as_source(X))
    del before["priors"]
    now = inside.origin.origin(believed(vn.Normal(1.0, 2.0)), inside.as_source(X))
    assert list(inside.origin.differences(before, now)) == []


def test_checkpoints_of_earlier_versions_do_not_tell_of_the_order():
    before = inside.origin.origin(made(), batches(X))
    del before["order"]
    now = inside.origin.origin(made(), ORDERS["key"][0])
    assert list(inside.origin.differences(before, now)) == []


def test_another_python_is_no_other_loss(monkeypatch):
    before = inside.origin.origin(made(), inside.as_source(X))
    # That of `origin` alone: other modules ask for the version, too.
    newer = types.SimpleNamespace(version_info=(3, 99))
    monkeypatch.setattr(inside.origin, "sys", newer)
    now = inside.origin.origin(made(loss=cubes), inside.as_source(X))
    assert list(inside.origin.differences(before, now)) == []


def test_a_directory_that_is_used_again(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, 10, X)
        fit(tmp_path, 12, X)
    for steps in (12, 20):
        with pytest.warns(UserWarning, match=r"other data \(`data` differs\)") as got:
            result = fit(tmp_path, steps, X + 1)
        (warning,) = got
        assert warning.filename == __file__
        assert result.trainer.step_count == steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Those that were written since are of the new data.
        fit(tmp_path, 25, X + 1)
    text = r"of other data .* its own directory"
    with pytest.warns(UserWarning, match=text) as got:
        fit(tmp_path, 25, X, made(loss=cubes))
    assert "with another `loss` and of other data" in str(got[0].message)


def test_a_best_of_other_data_is_dropped(tmp_path):
    """The model fits the first data exactly, and the second ones not so well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(tmp_path, 10, 2 * X).best_loss == 0
    with pytest.warns(UserWarning, match="of other data"):
        result = fit(tmp_path, 20, 3 * X + 1)
    assert result.best_loss == result.history.loss[10:].min() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(tmp_path, 30, 3 * X + 1).best_loss <= result.best_loss


def test_many_trainers(tmp_path):
    one = made()
    run = lambda data: vn.fit_many(
        [one, one],
        data,
        5,
        data_axis=0,
        checkpoint=vn.Checkpoints(tmp_path),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(jnp.stack([X, X]))
        run(jnp.stack([X, X]))
    with pytest.warns(UserWarning, match="of other data"):
        run(jnp.stack([X, X + 1]))
