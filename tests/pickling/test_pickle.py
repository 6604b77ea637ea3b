"""Copies by pickle, cloudpickle and `copy`: the same, to the bit, and as immutable."""

import copy
import dataclasses
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from equinox._module._module import _currently_initialising

import vernal as vn
from inside import digest_of
from marked import marked
from models import line, line_batch, zoo

HELPERS = Path(__file__).parents[1] / "helpers"


class Count:
    """Counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self):
        self.traces += 1


COUNT = Count()


class Fit(vn.Trainer):
    offset: float = 0.0

    def residuals(self, model, batch):
        COUNT()
        x, y = batch
        return model(x) - y


class Drawn(vn.Trainer):
    def loss(self, model, batch, key, state):
        x, y = batch
        noise = jax.random.normal(key, y.shape)
        return jnp.mean((model(x) - y - 0.1 * noise) ** 2), state + 1


class OnlyScalar(vn.Trainer):
    def loss(self, model, batch):
        return (model(1.0) - 2.0) ** 2


class Halve(vn.NanPolicy):
    factor: float = 0.5

    def init(self, params):
        return None

    def apply(self, loss, grads, state):
        yes = jnp.asarray(True)
        halved = jax.tree.map(lambda g: g * self.factor, grads)
        return halved, vn.Verdict(yes, ~yes), state


class Shifted(eqx.Module):
    """Functions in static fields and leaves, transformed by JAX and not."""

    slope: jax.Array
    nothing: None
    after: object = eqx.field(static=True)
    before: object

    def __call__(self, x):
        return self.after(self.slope * self.before(x))


def everything(params):
    return jax.tree.map(lambda _: True, params)


def is_slope(path, leaf):
    return path == "slope"


@eqx.filter_jit
def halved(x):
    return x / 2


BY = {
    "pickle": lambda obj: pickle.loads(pickle.dumps(obj)),
    "older": lambda obj: pickle.loads(pickle.dumps(obj, protocol=2)),
    "cloudpickle": lambda obj: pickle.loads(cloudpickle.dumps(obj)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}

OPTIMISERS = {
    "none": lambda: None,
    "adam": lambda: optax.adam(1e-2),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "delay": lambda: optax.sgd(vn.delay(0.1, 2, 3)),
    "window": lambda: vn.window(optax.adam(0.1), 1, 5),
    "partition": lambda: vn.partition({"x": optax.adam(0.1)}, "x"),
    "masked": lambda: optax.adamw(0.1, mask=everything),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "inject_schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        optax.linear_schedule(0.1, 0.2, 3)
    ),
    "multi_steps": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
    "rules": lambda: vn.ParamOptimiser(
        {is_slope: vn.window(optax.adam(1e-2), 1), "off*": None},
        first=optax.clip(1.0),
        default=optax.sgd(0.1),
    ).with_scale({is_slope: 0.5}),
    "groups": lambda: vn.ParamOptimiser(
        {("slope", "offset"): optax.lbfgs()}, strict=True
    ),
    "rules_in_chain": lambda: optax.chain(
        optax.clip(1.0), vn.ParamOptimiser({"slope": optax.adam(0.1)})
    ),
}
# One of each way in which Optax keeps what it is given.
OF_OPTAX = ("chain", "schedule", "masked", "inject_schedule", "multi_steps")
# Copies that are the same, functions included, take the same steps: some do.
STEPPED = (*OF_OPTAX, "rules")


def scalars():
    return {"slope": jnp.asarray(1.0), "offset": jnp.asarray(2.0)}


def projector(name):
    matrix = jnp.asarray([[4.0, 1.0], [1.0, 3.0]])
    match name:
        case "fisher":
            return vn.EigenProjector.from_fisher(matrix, scalars())
        case "covariance":
            return vn.EigenProjector.from_covariance(matrix, scalars())
        case "jacobian":
            return vn.EigenProjector.from_jacobian(matrix, scalars())
        case "blocks":
            blocks = {"slope": jnp.asarray([[4.0]])}
            return vn.EigenProjector.from_blocks(blocks, scalars())
    product = lambda tree: jax.tree.map(lambda x: 3 * x, tree)
    key = jax.random.key(0)
    return vn.EigenProjector.from_matvec(product, scalars(), 1, key=key)


PROJECTORS = ("fisher", "covariance", "jacobian", "blocks", "matvec")

POLICIES = {
    "ZeroNans": vn.ZeroNans(),
    "SkipStep": vn.SkipStep(),
    "StopFit": vn.StopFit(),
    "StopAfter": vn.StopAfter(3),
    "RaiseOnNan": vn.RaiseOnNan(),
    "BreakOnNan": vn.BreakOnNan(),
    "both": vn.SkipStep() | vn.StopAfter(3) | Halve(0.25),
}

CRITERIA = {
    "Converged": vn.Converged(1e-8, 20),
    "Patience": vn.Patience(5),
    "either": vn.Converged(1e-8, 20) | vn.Patience(5),
}


def same(one, other):
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for a, b in pairs:
        assert type(a) is type(b)
        if hasattr(a, "dtype"):
            assert a.dtype == b.dtype
            assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None)
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            assert a is b or a == b


def all_ways(obj):
    """Copies by each way, each checked to be the same."""
    for by, duplicate in BY.items():
        there = len(_currently_initialising._dict)
        twin = duplicate(obj)
        same(obj, twin)
        # What Equinox still takes for unfinished would be changed and kept for ever.
        assert len(_currently_initialising._dict) == there, by
        yield by, twin


def stepped(trainer):
    """A trainer after two more steps."""
    for _ in range(2):
        trainer, _ = trainer.step(line_batch())
    return trainer


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", marked(pytest.mark.seams, OPTIMISERS, *OF_OPTAX))
def test_optimisers_and_their_trainers(name):
    trainer = Fit(line(), OPTIMISERS[name]())
    if name not in STEPPED:
        assert [*all_ways(trainer), *all_ways(trainer.optimiser)]
        return
    going = stepped(trainer)
    [*all_ways(trainer), *all_ways(trainer.optimiser)]
    twins = dict(all_ways(going))
    whole = stepped(going)
    traces = COUNT.traces
    for twin in twins.values():
        same(stepped(twin)._progress, whole._progress)
        with pytest.raises(dataclasses.FrozenInstanceError):
            twin.key = None
        with pytest.raises(dataclasses.FrozenInstanceError):
            twin.optimiser.strict = None
    # What is compiled for one is compiled for its copies.
    assert COUNT.traces == traces


def test_a_copy_in_a_callback_goes_on_as_the_fit_does():
    copies = []
    trainer = Fit(line(), optax.adam(1e-2))
    keep = lambda trainer, *rest: copies.append(pickle.dumps(trainer))
    result = trainer.fit(line_batch(), 4, chunk=2, callback=keep)
    twin = pickle.loads(copies[0])
    left = 4 - int(twin.step_count)
    assert 0 < left < 4
    same(twin.fit(line_batch(), left).trainer, result.trainer)


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors(name):
    made = projector(name)
    for _, twin in all_ways(made):
        np.testing.assert_array_equal(twin.matrix, made.matrix)


def test_a_whitened_trainer_goes_on():
    trainer = Fit(line(), optax.adam(1e-2)).whiten(line_batch())
    going = stepped(trainer)
    whole = stepped(going)
    for _, twin in all_ways(going):
        same(stepped(twin), whole)


@pytest.mark.parametrize("table", ["POLICIES", "CRITERIA"])
def test_policies_and_criteria(table):
    for made in globals()[table].values():
        for by, twin in all_ways(made):
            assert twin == made, by
            assert repr(twin) == repr(made)


@pytest.mark.parametrize("kind", ["typed", "raw"])
def test_keys_and_state(kind):
    key = jax.random.key(3) if kind == "typed" else jax.random.PRNGKey(3)
    policy = POLICIES["both"]
    zero = jnp.asarray(0)
    trainer = Drawn(line(), optax.adam(0.1), key=key, state=zero, nan_policy=policy)
    going = stepped(trainer)
    [*all_ways(trainer)]
    whole, twins = stepped(going), dict(all_ways(going))
    for by in ("pickle", "cloudpickle"):
        same(stepped(twins[by]), whole)


MODELS = {
    "every kind of leaf": zoo,
    "functions of JAX": lambda: Shifted(jnp.asarray(2.0), None, jnp.tanh, jax.nn.relu),
    "functions of Equinox": lambda: Shifted(jnp.asarray(2.0), None, halved, jnp.tanh),
    "functions of a library": lambda: Shifted(
        jnp.asarray(2.0), None, vn.delay(0.1, 2), optax.linear_schedule(0.0, 1.0, 3)
    ),
    "a network": lambda: eqx.nn.MLP("scalar", "scalar", 2, 1, key=jax.random.key(0)),
    "tables": lambda: _Table(),
}


class _Table(eqx.Module):
    table: dict = dataclasses.field(
        default_factory=lambda: {"a": [jnp.zeros(()), None], "b": (jnp.ones(2),)}
    )

    def __call__(self, x):
        return self.table["a"][0] * x + jnp.sum(self.table["b"][0])


@pytest.mark.seams
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]()
    trainer = OnlyScalar(model, optax.sgd(0.1))
    is_compared = name != "functions of a library"
    ways = all_ways(trainer) if is_compared else ((by, BY[by](trainer)) for by in BY)
    for by, twin in ways:
        assert type(twin.model) is type(model)
        if name != "every kind of leaf":
            np.testing.assert_array_equal(twin.model(0.5), model(0.5), err_msg=by)


def test_results_and_what_else_is_public(tmp_path):
    result = Fit(line(), optax.adam(1e-2)).fit(line_batch(), 2, record=("slope",))
    _, info = result.trainer.step(line_batch())
    report = result.trainer.nan_report()
    data = vn.Minibatches(line_batch(), 4, key=jax.random.key(0))
    for obj in (result, result.history, info, report, data):
        for by, twin in all_ways(obj):
            assert repr(twin) == repr(obj), by
    whole, traces = result.trainer.fit(line_batch(), 2).trainer, COUNT.traces
    for by in ("pickle", "deepcopy"):
        same(BY[by](result.trainer).fit(line_batch(), 2).trainer, whole)
    assert COUNT.traces == traces
    for by in BY:
        twin = BY[by](vn.Checkpoints(tmp_path, every=3, keep=2))
        assert repr(twin) == repr(vn.Checkpoints(tmp_path, every=3, keep=2))
        assert BY[by](vn.StopReason.CONVERGED) is vn.StopReason.CONVERGED


def test_a_fit_of_a_plain_function():
    result = vn.fit(plain, line(), optax.sgd(0.1), line_batch(), 2)
    for _, twin in all_ways(result):
        same(
            twin.trainer.fit(line_batch(), 2).trainer,
            result.trainer.fit(line_batch(), 2).trainer,
        )


def plain(model, batch, *, scale=2.0):
    x, y = batch
    return scale * jnp.mean((model(x) - y) ** 2)


def test_many():
    starts = [Fit(line(start), optax.adam(1e-2)) for start in (0.5, 0.7)]
    result = vn.fit_many(starts, line_batch(), 2)
    for by, twin in all_ways(result):
        assert twin.stop_reasons == result.stop_reasons
        if by == "pickle":
            again = vn.fit_many(twin.trainers, line_batch(), 2)
            whole = vn.fit_many(result.trainers, line_batch(), 2)
            same(again.trainers, whole.trainers)


def test_errors_with_their_results():
    batch = (jnp.zeros(3), jnp.full(3, jnp.nan))
    trainer = Fit(line(), optax.adam(1e-2), nan_policy=vn.RaiseOnNan())
    with pytest.raises(vn.NonFiniteError) as told:
        trainer.fit(batch, 2)
    stream = vn.Stream([line_batch()] * 2)
    with pytest.raises(vn.StreamExhaustedError) as dry:
        Fit(line(), optax.adam(1e-2)).fit(stream, 3)
    for error in (told.value, dry.value):
        error.add_note("a note")
        for by in ("pickle", "cloudpickle"):
            twin = BY[by](error)
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            assert twin.__notes__ == error.__notes__
            same(twin.result, error.result)


def test_other_errors():
    names = [name for name, kind in vars(vn).items() if isinstance(kind, type)]
    kinds = [getattr(vn, name) for name in names]
    kinds = [kind for kind in kinds if issubclass(kind, Exception)]
    own = (vn.NonFiniteError, vn.StreamExhaustedError)
    assert len(kinds) > 8
    for kind in (kind for kind in kinds if kind not in own):
        error = kind("what is wrong")
        error.add_note("a note")
        for by in BY:
            twin = BY[by](error)
            assert type(twin) is kind
            assert str(twin) == "what is wrong"
            assert twin.__notes__ == ["a note"]


def test_what_cannot_be_pickled_is_named():
    unnamed = lambda path, leaf: path == "slope"
    trainer = Fit(line(), vn.ParamOptimiser({unnamed: optax.adam(0.1)}))
    told = r"<lambda> \(.*test_pickle.py:\d+\).*use `cloudpickle`"
    with pytest.raises((pickle.PicklingError, AttributeError), match=told):
        pickle.dumps(trainer)
    for step in (lambda count: 0.1, optax.sgd(lambda count: 0.1).update):
        trainer = OnlyScalar(Shifted(jnp.ones(()), None, step, None), optax.sgd(0.1))
        with pytest.raises((pickle.PicklingError, AttributeError), match="cloudpickle"):
            pickle.dumps(trainer)
        assert BY["cloudpickle"](trainer).model.after is not None
    with pytest.raises(TypeError, match=r"generator cannot be pickled.*step ->"):
        pickle.dumps(vn.Stream(batch for batch in [line_batch()]))


def test_by_value():
    rate = 0.1

    class Local(Fit):
        def residuals(self, model, batch):
            return 2 * super().residuals(model, batch)

    rules = {lambda path, leaf: path == "slope": optax.adam(lambda count: rate)}
    trainer = Local(line(), vn.ParamOptimiser(rules, default=optax.sgd(rate)))
    going = stepped(trainer)
    twin = BY["cloudpickle"](going)
    same(stepped(twin)._progress, stepped(going)._progress)


def test_streams_over_lists_go_on():
    stream = vn.Stream([1, 2, 3])
    assert next(stream.open(0)) == 1
    for by in ("pickle", "cloudpickle", "deepcopy"):
        twin = BY[by](stream)
        assert [*twin.open(1)] == [2, 3]


def test_other_versions_are_told():
    pickled = pickle.dumps(Fit(line(), optax.adam(0.1)))
    name = b"scale_by_adam.<locals>.update_fn"
    assert name in pickled
    # As if that function had been renamed since.
    other = pickled.replace(name, name.replace(b"adam.", b"mada."))
    with pytest.raises(pickle.UnpicklingError, match=r"mada.*is not there.*version"):
        pickle.loads(other)
    # As if its code had been changed.
    digest = digest_of(optax.scale_by_adam().update.__code__)
    assert digest in pickled
    other = pickled.replace(digest, bytes(len(digest)))
    with pytest.raises(pickle.UnpicklingError, match=r"adam.*has other code.*version"):
        pickle.loads(other)


HOOKED = """
import optax

def slow(rate: float):
    update = lambda grads, state, params=None: (rate * grads, state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
"""


def test_code_that_a_hook_has_changed_is_not_kept_as_plain(tmp_path, monkeypatch):
    (tmp_path / "hooked_by_test.py").write_text(HOOKED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with jaxtyping.install_import_hook("hooked_by_test", "beartype.beartype"):
        module = importlib.import_module("hooked_by_test")
    trainer = Fit(line(), module.slow(0.5))
    again = pickle.loads(pickle.dumps(trainer))
    assert again.optimiser.update(3.0, optax.EmptyState())[0] == 1.5
    # Jaxtyping keeps it in a file of another name.
    kept = importlib.util.cache_from_source(module.__file__)
    assert any(Path(kept).parent.iterdir())
    assert not Path(kept).exists()


def test_a_class_that_cloudpickle_has_made_makes_trainers():
    class Own(vn.Trainer):
        offset: float = 0.0

        def residuals(self, model, batch):
            return model(batch[0]) - batch[1] - self.offset

    again = BY["cloudpickle"](Own(line(), optax.adam(0.1)))
    for kind in (Own, type(again)):
        new = kind(line(), optax.adam(0.1))
        assert new.fit(line_batch(), 5).stop_reason is vn.StopReason.STEPS_TAKEN


def test_float64_is_not_rounded_without_a_word():
    pickled = pickle.dumps(Fit(line(), optax.adam(0.1)))
    with jax.enable_x64(False), pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        pickle.loads(pickled)


def test_other_processes():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "pool.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all the same\n")
