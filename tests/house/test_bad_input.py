"""Every mistake gets an error that names the argument or the path, and the remedy."""

import dataclasses
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest

import vernal as vn
from marked import marked
from models import Line, LineFit, gaussian, line, line_batch, zoo

pytestmark = pytest.mark.own_words

BATCH = line_batch()
SGD = optax.sgd(0.1)
KEY = jax.random.key(0)
RULES = vn.ParamOptimiser({"slope": SGD, "offset": SGD})


def trainer(cls=LineFit, optimiser=SGD, **options):
    return cls(line(), optimiser, **options)


def fit(data=BATCH, steps=3, cls=LineFit, **options):
    return trainer(cls).fit(data, steps, **{"progress": False, **options})


def loss_of(returned, **options):
    return vn.fit(
        lambda m, b: returned, line(), SGD, None, 2, progress=False, **options
    )


def with_method(name, method):
    return type("Wrong", (LineFit,), {name: method})


def rules(*args, **options):
    return vn.ParamOptimiser(*args, **options)


def updated(grads, state=None, **extra):
    optimiser = rules({"slope": optax.adam(0.1)}, default=SGD)
    state = optimiser.init(line()) if state is None else state
    return optimiser.update(grads, state, **extra)


def residuals_of(method):
    return type("Wrong", (vn.Trainer,), {"residuals": method})


def _one_datum(self, model, batch):
    return vn.likelihoods.Gaussian(model.slope, 1.0)


class Keyed(vn.Trainer):
    def loss(self, model, batch, *, key): ...


class Wrong(vn.NanPolicy):
    returned: str = eqx.field(static=True)

    def init(self, params):
        return None

    def apply(self, loss, grads, state):
        yes, no = jnp.asarray(True), jnp.asarray(False)
        return {
            "tuple": (grads, (yes, no), state),
            "state": (grads, vn.Verdict(yes, no), jnp.ones(3)),
            "one": grads,
            "grads": (None, vn.Verdict(yes, no), state),
            "vector": (grads, vn.Verdict(jnp.ones(2, bool), no), state),
        }[self.returned]


def scales(value):
    return rules({"slope": SGD}).with_scale(value)


projector = functools.cache(
    lambda: vn.EigenProjector.from_fisher(
        jnp.eye(3), jax.tree.map(jnp.asarray, gaussian())
    )
)

# What is done, the exception, what its message has.
TABLE = {
    # Rules and selectors.
    "a typo": (
        lambda: trainer(optimiser=rules({"slpoe": SGD})),
        KeyError,
        r"`rules`: 'slpoe' matches nothing.*'slope'",
    ),
    "a typo in train": (
        lambda: trainer(train="offst"),
        KeyError,
        r"`train`: 'offst'.*'offset'",
    ),
    "a glob without a match": (
        lambda: trainer(optimiser=rules({"layers.*.bias": SGD})),
        KeyError,
        r"`rules`: 'layers\.\*\.bias' matches nothing",
    ),
    "an integer": (
        lambda: rules({"count": SGD}).init(zoo()),
        TypeError,
        r"`rules`: 'count' names 'count', an array of dtype int.*leave it out",
    ),
    "a boolean": (lambda: rules({"flag": SGD}).init(zoo()), TypeError, "dtype bool"),
    "a static field": (
        lambda: rules({"name": SGD}).init(zoo()),
        TypeError,
        r"'name' is a static field.*static=True",
    ),
    "equal rules": (
        lambda: trainer(optimiser=rules({"*lope": SGD, "slop*": SGD})),
        ValueError,
        r"'\*lope' and 'slop\*' are equally specific on 'slope'.*exact path",
    ),
    "colliding paths": (
        lambda: rules({"a": SGD}).init({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}),
        ValueError,
        r"same path 'a\.b'.*Rename",
    ),
    "a number for a transformation": (
        lambda: rules({"slope": 0.1}),
        TypeError,
        r"`rules\['slope'\]` is the number 0\.1.*`optax\.sgd\(0\.1\)`",
    ),
    "a function for one": (
        lambda: rules({"slope": optax.sgd}),
        TypeError,
        r"`rules\['slope'\]`.*sgd\(1e-3\)",
    ),
    "a number for the default": (
        lambda: rules({}, default=0.1),
        TypeError,
        "`default` is the number",
    ),
    "a number for the first": (lambda: rules({}, first=1), TypeError, "`first`"),
    "a number for the optimiser": (
        lambda: trainer(optimiser=0.1),
        TypeError,
        r"`optimiser` is the number 0\.1",
    ),
    "a dictionary for the optimiser": (
        lambda: trainer(optimiser={"slope": SGD}),
        TypeError,
        "`optimiser` is of type `dict`",
    ),
    "a list of rules": (
        lambda: rules([("slope", SGD)]),
        TypeError,
        r"`rules` is of type `list`",
    ),
    "a transformation for the rules": (
        lambda: rules(SGD),
        TypeError,
        "`rules`.*default",
    ),
    "a number as a selector": (
        lambda: rules({3: SGD}).init(line()),
        TypeError,
        r"`rules`.*selector 3\. A",
    ),
    "a number within one": (
        lambda: rules({("slope", 1): SGD}).init(line()),
        TypeError,
        r"`rules`.*selector 1",
    ),
    "nothing that is trained": (
        lambda: trainer(optimiser=rules({"**": None})),
        ValueError,
        "`model` has no parameter to train.*frozen",
    ),
    "an empty selector": (
        lambda: trainer(train=()),
        ValueError,
        "no parameter to train",
    ),
    "strict": (
        lambda: trainer(optimiser=rules({"slope": SGD}, strict=True)),
        ValueError,
        r"'offset' has no rule, and `strict=True`.*`None` to freeze",
    ),
    # Updates.
    "gradients of another structure": (
        lambda: updated({"slope": jnp.ones(())}),
        ValueError,
        "`updates` has no leaf at 'offset'",
    ),
    "no gradients": (lambda: updated(None), ValueError, "`updates` has no leaf at"),
    "gradients of another shape": (
        lambda: updated(Line(jnp.ones(3), jnp.ones(())), params=line()),
        ValueError,
        r"`updates`: the leaf 'slope' has shape \(3,\)",
    ),
    "parameters of another structure": (
        lambda: updated(line(), params={"slope": jnp.ones(())}),
        ValueError,
        "`params` has no leaf at 'offset'",
    ),
    "the state of another optimiser": (
        lambda: updated(line(), state=optax.adam(0.1).init(line())),
        (TypeError, ValueError),
        "`state`.*init",
    ),
    "a value function without parameters": (
        lambda: updated(line(), value_fn=lambda p: 0.0),
        ValueError,
        "`value_fn` without `params`",
    ),
    # Factors.
    "a factor without a rule": (
        lambda: scales({"slop": 2.0}),
        KeyError,
        "`scales`: there is no rule 'slop'.*'slope'",
    ),
    "a factor that is no scalar": (
        lambda: scales({"slope": jnp.ones(2)}),
        ValueError,
        r"`scales\['slope'\]` is .*one number",
    ),
    "a factor that is text": (
        lambda: scales({"slope": "a"}),
        (TypeError, ValueError),
        r"`scales\['slope'\]`",
    ),
    "a factor of None": (
        lambda: scales({"slope": None}),
        (TypeError, ValueError),
        r"`scales\['slope'\]`",
    ),
    "a complex factor": (
        lambda: scales({"slope": 1j}),
        (TypeError, ValueError),
        r"`scales\['slope'\]`",
    ),
    "factors in a list": (lambda: scales([("slope", 1)]), TypeError, "`scales`"),
    "a factor on its own": (lambda: scales(0.5), TypeError, "`scales`"),
    # A trainer.
    "none of the three": (
        lambda: vn.Trainer(line(), SGD),
        TypeError,
        "`Trainer` defines none of `loss`, `residuals`, `nll`.*Subclass",
    ),
    "a loss that is None": (
        lambda: trainer(type("Empty", (vn.Trainer,), {"loss": None})),
        TypeError,
        "`Empty`.*`loss`",
    ),
    "a loss that is a property": (
        lambda: trainer(type("Odd", (LineFit,), {"loss": property(lambda self: 3)})),
        TypeError,
        r"`Odd\.loss` is not a method.*`def loss\(self, model, batch\): ",
    ),
    "an nll that is a field": (
        lambda: trainer(
            type("Odd", (LineFit,), {"__annotations__": {"nll": Any}, "nll": 1.0})
        ),
        TypeError,
        r"`Odd\.nll` is not a method.*another name",
    ),
    "a rule for what is tied": (
        lambda: LineFit(line(), RULES, ties={"offset": "slope"}),
        ValueError,
        "`optimiser` has a rule for 'offset' that moves nothing: it is tied to slope",
    ),
    "a rule in `replace` for what is tied": (
        lambda: LineFit(line(), SGD, ties={"offset": "slope"}).replace(optimiser=RULES),
        ValueError,
        "`optimiser` has a rule for 'offset' that moves nothing: it is tied to slope",
    ),
    "no optimiser to fit": (
        lambda: trainer(optimiser=None).fit(BATCH, 3),
        ValueError,
        "`LineFit` has no optimiser.*replace",
    ),
    "no optimiser to step": (
        lambda: trainer(optimiser=None).step(BATCH),
        ValueError,
        "`LineFit` has no optimiser",
    ),
    "a policy by name": (
        lambda: trainer(nan_policy="skip"),
        TypeError,
        r"`nan_policy` is 'skip'.*`vn\.SkipStep\(\)`",
    ),
    "a policy's class": (
        lambda: trainer(nan_policy=vn.SkipStep),
        TypeError,
        r"`nan_policy`.*`SkipStep\(\)`",
    ),
    "no policy": (lambda: trainer(nan_policy=None), TypeError, "`nan_policy` is None"),
    "a number as a key": (
        lambda: trainer(key=0),
        TypeError,
        r"`key` is 0.*jax\.random\.key\(0\)",
    ),
    "floats as a key": (
        lambda: trainer(key=jnp.ones(2)),
        (TypeError, ValueError),
        r"`key`.*jax\.random\.key\(0\)",
    ),
    "several keys": (
        lambda: trainer(key=jax.random.split(KEY, 3)),
        (TypeError, ValueError),
        "`key`",
    ),
    "a matrix as a projector": (
        lambda: trainer(projector=jnp.eye(2)),
        TypeError,
        "`projector`.*from_fisher",
    ),
    "a projector of other parameters": (
        lambda: trainer(projector=projector()),
        (KeyError, ValueError),
        "`projector`",
    ),
    "a projector and rules": (
        lambda: LineFit(gaussian(), rules({"**": SGD}), projector=projector()),
        ValueError,
        "`optimiser` is a ParamOptimiser, and `projector`.*precondition",
    ),
    "a model without floats": (
        lambda: LineFit({"name": "nothing"}, SGD),
        ValueError,
        "`model` has no parameter to train: there is no array of floats",
    ),
    "a dataclass alone": (
        lambda: LineFit(dataclasses.make_dataclass("Plain", ["x"])(jnp.ones(2)), SGD),
        ValueError,
        "no parameter.*look into the dataclass `Plain`: make it an `eqx.Module`",
    ),
    "a model of integers": (
        lambda: LineFit({"n": jnp.arange(3)}, SGD),
        ValueError,
        "`model` has no parameter to train: 'n' is of int.*make it an array of floats",
    ),
    "a key that is not given": (
        lambda: Keyed(gaussian(), SGD),
        TypeError,
        "missing a required (keyword-only )?argument: 'key'. "
        "Give `key=` to the trainer",
    ),
    "a table with names": (
        lambda: LineFit(gaussian(), SGD).fit(pandas.DataFrame({"x": [1.0]}), 1),
        TypeError,
        "`data` is a DataFrame.*to_numpy",
    ),
    "a model of Python floats": (
        lambda: LineFit({"x": 1.0}, SGD),
        ValueError,
        "`model` has no parameter to train.*'x'.*`train`",
    ),
    "a replacement of another structure": (
        lambda: trainer().replace(model={"slope": jnp.ones(())}),
        ValueError,
        "`model` has another structure",
    ),
    "a replacement by a number": (
        lambda: trainer().replace(optimiser=0.1),
        TypeError,
        "`optimiser` is the number",
    ),
    "a replacement by a name": (
        lambda: trainer().replace(nan_policy="skip"),
        TypeError,
        "`nan_policy` is 'skip'",
    ),
    # What a loss returns.
    "a vector for a loss": (
        lambda: loss_of(jnp.ones(3)),
        ValueError,
        r"returned an array of shape \(3,\).*`residuals`",
    ),
    "nothing for a loss": (lambda: loss_of(None), TypeError, "returned a NoneType"),
    "text for a loss": (lambda: loss_of("low"), TypeError, "returned a str"),
    "an integer loss": (lambda: loss_of(jnp.asarray(3)), TypeError, "dtype int"),
    "a complex loss": (lambda: loss_of(jnp.asarray(1j)), TypeError, "dtype complex"),
    "three things": (lambda: loss_of((1.0, {}, 2)), TypeError, "tuple of 3.*dict"),
    "metrics in no dictionary": (
        lambda: loss_of((jnp.asarray(1.0), jnp.ones(2))),
        TypeError,
        r"`\(scalar, dict of metrics\)`",
    ),
    "a metric of None": (
        lambda: loss_of((jnp.asarray(1.0), {"chi": None})),
        TypeError,
        "metric.*'chi'|'chi'.*metric",
    ),
    "a metric of text": (
        lambda: loss_of((jnp.asarray(1.0), {"chi": "low"})),
        TypeError,
        "metric.*'chi'|'chi'.*metric",
    ),
    "residuals in a list": (
        lambda: fit(cls=type("R", (vn.Trainer,), {"residuals": lambda s, m, b: [1.0]})),
        TypeError,
        r"`R\.residuals` returned a list.*or a pytree of these",
    ),
    "a scalar for residuals": (
        lambda: fit(cls=residuals_of(lambda self, m, b: m.slope)),
        ValueError,
        r"`Wrong\.residuals` returned a scalar.*define `nll`",
    ),
    "one datum in a likelihood": (
        lambda: trainer(residuals_of(_one_datum)).step(BATCH),
        ValueError,
        r"`Wrong\.residuals` returned a scalar.*define `nll`",
    ),
    "a loss that is no function": (
        lambda: vn.fit(3.0, line(), SGD, None, 2),
        TypeError,
        r"`loss` is 3\.0",
    ),
    # Hooks.
    "a constraint that returns nothing": (
        lambda: fit(cls=with_method("constrain", lambda self, m: None)),
        ValueError,
        "`constrain` returns must have the structure",
    ),
    "a constraint that changes a shape": (
        lambda: fit(
            cls=with_method("constrain", lambda self, m: Line(jnp.ones(3), m.offset))
        ),
        (TypeError, ValueError),
        r"`constrain`.*'slope'.*shape",
    ),
    "gradients that come to nothing": (
        lambda: fit(cls=with_method("transform_grads", lambda self, g, m: None)),
        (TypeError, ValueError),
        "`transform_grads`",
    ),
    "gradients of a changed shape": (
        lambda: fit(
            cls=with_method(
                "transform_grads",
                lambda self, g, m: Line(jnp.ones(3), g.offset),
            )
        ),
        (TypeError, ValueError),
        "`transform_grads`",
    ),
    # A policy of one's own.
    "a plain tuple for a verdict": (
        lambda: trainer(nan_policy=Wrong("tuple")).step(BATCH),
        TypeError,
        "Verdict",
    ),
    "a state of another shape": (
        lambda: trainer(nan_policy=Wrong("state")).step(BATCH),
        (TypeError, ValueError),
        r"state that `Wrong\.apply` returned",
    ),
    "one thing instead of three": (
        lambda: trainer(nan_policy=Wrong("one")).step(BATCH),
        (TypeError, ValueError),
        "`Wrong",
    ),
    "gradients that a policy loses": (
        lambda: trainer(nan_policy=Wrong("grads")).step(BATCH),
        (TypeError, ValueError),
        r"gradients that `Wrong\.apply` returned",
    ),
    "a verdict for each entry": (
        lambda: trainer(nan_policy=Wrong("vector")).step(BATCH),
        (TypeError, ValueError),
        "`Wrong.*scalar",
    ),
    "a patience of nothing": (lambda: vn.StopAfter(0), ValueError, "`patience` is 0"),
    # The numbers of a fit.
    "negative steps": (lambda: fit(steps=-1), ValueError, "`steps` is -1.*at least 0"),
    "fractional steps": (lambda: fit(steps=2.5), TypeError, "`steps` is 2.5.*whole"),
    "boolean steps": (lambda: fit(steps=True), TypeError, "`steps` is True"),
    "no steps at all": (lambda: fit(steps=None), TypeError, "`steps` is None"),
    "every=0": (lambda: fit(every=0), ValueError, "`every` is 0.*at least 1"),
    "every=1.5": (lambda: fit(every=1.5), TypeError, "`every` is 1.5"),
    "chunk=0": (lambda: fit(chunk=0), ValueError, "`chunk` is 0.*at least 1"),
    "chunk=2.0": (lambda: fit(chunk=2.0), TypeError, r"`chunk` is 2\.0"),
    # What is recorded.
    "an unknown record": (
        lambda: fit(record="slop"),
        KeyError,
        "`record`: 'slop' is neither a parameter nor a metric.*'slope'",
    ),
    "an unknown record of many": (
        lambda: fit(record=("slope", "gradnorm")),
        KeyError,
        "`record`: 'gradnorm'.*'grad_norm'",
    ),
    "a number as a record": (lambda: fit(record=5), TypeError, "`record`"),
    "a number among records": (lambda: fit(record=(5,)), TypeError, "`record`.* 5"),
    "no record": (lambda: fit(record=None), TypeError, "`record`"),
    "a frozen record": (
        lambda: trainer(train="slope").fit(BATCH, 2, record="offset"),
        ValueError,
        "`record`: 'offset' selects frozen",
    ),
    # The callback.
    "a callback that is none": (
        lambda: fit(callback="stop"),
        TypeError,
        "`callback` is 'stop', but must be a function",
    ),
    "a callback's number": (
        lambda: fit(callback=lambda t, h: 3),
        TypeError,
        "`callback` returned an object of type `int`",
    ),
    "a callback's model": (
        lambda: fit(callback=lambda t, h: t.model),
        TypeError,
        "`callback` returned an object of type `Line`",
    ),
    "a callback's other optimiser": (
        lambda: fit(callback=lambda t, h: t.replace(optimiser=optax.adam(0.1))),
        ValueError,
        "another `optimiser`.*return `True`",
    ),
    "a callback's other policy": (
        lambda: fit(callback=lambda t, h: t.replace(nan_policy=vn.StopAfter(3))),
        ValueError,
        "another `nan_policy`.*return `True`",
    ),
    # Data.
    "a generator without a stream": (
        lambda: fit(data=(BATCH for _ in range(3))),
        TypeError,
        r"`data` is.*generator.*vn\.Stream\(data\)",
    ),
    "a loader in the data": (
        lambda: fit(data={"x": {1.0}}),
        TypeError,
        r"`data\['x'\]` is a set.*vn\.Stream",
    ),
    "objects for data": (
        lambda: fit(data=np.array([None, 1], object)),
        TypeError,
        "`data`",
    ),
    "a stream for one step": (
        lambda: trainer().step(vn.Stream([BATCH])),
        TypeError,
        "`batch` must be one batch, not a .*Give it to `fit`",
    ),
    "minibatches for one step": (
        lambda: trainer().step(vn.Minibatches(BATCH, 2, key=KEY)),
        TypeError,
        "`batch` must be one batch, not a .*Give it to `fit`",
    ),
    "a generator for one step": (
        lambda: trainer().step(iter([BATCH])),
        TypeError,
        "`batch` must be one batch",
    ),
    "ragged minibatches": (
        lambda: vn.Minibatches((jnp.ones(3), jnp.ones(4)), 2, key=KEY),
        ValueError,
        r"`arrays` is ragged: `arrays\[0\]` has 3 examples and `arrays\[1\]` has 4",
    ),
    "oversized minibatches": (
        lambda: vn.Minibatches(BATCH, 17, key=KEY),
        ValueError,
        "`size` is 17, but there are only 16 examples.*pass the arrays",
    ),
    "minibatches of nothing": (
        lambda: vn.Minibatches(BATCH, 0, key=KEY),
        ValueError,
        "`size` is 0.*at least 1",
    ),
    "fractional minibatches": (
        lambda: vn.Minibatches(BATCH, 2.5, key=KEY),
        TypeError,
        "`size` is 2.5",
    ),
    "minibatches of a scalar": (
        lambda: vn.Minibatches({"x": jnp.ones(4), "s": 1.0}, 2, key=KEY),
        ValueError,
        r"`arrays\['s'\]` is a scalar",
    ),
    "minibatches of no arrays": (
        lambda: vn.Minibatches(None, 2, key=KEY),
        ValueError,
        "`arrays` has no array",
    ),
    "minibatches of text": (
        lambda: vn.Minibatches("abc", 2, key=KEY),
        (TypeError, ValueError),
        "`arrays`",
    ),
    "minibatches of no examples": (
        lambda: vn.Minibatches(jnp.ones((0, 2)), 1, key=KEY),
        ValueError,
        "only 0 examples",
    ),
    "a seed for a key": (
        lambda: vn.Minibatches(BATCH, 2, key=3),
        TypeError,
        r"`key` is 3.*jax\.random\.key",
    ),
    "an array for a key": (
        lambda: vn.Minibatches(BATCH, 2, key=jnp.ones(3)),
        (TypeError, ValueError),
        r"`key`.*jax\.random\.key",
    ),
    "a stream of a number": (
        lambda: vn.Stream(3),
        TypeError,
        "`source` is 3.*cannot be iterated",
    ),
    "a stream's function without a stream": (
        lambda: fit(data=vn.Stream(lambda step: 3)),
        TypeError,
        "`source`.*iterable",
    ),
    "a stream that runs dry": (
        lambda: fit(data=vn.Stream([BATCH, BATCH])),
        vn.StreamExhaustedError,
        r"`data`: the stream ran dry after 2 of 3 steps.*\.result",
    ),
    # Windows.
    "a window backwards": (lambda: vn.window(SGD, 5, 3), ValueError, "backwards"),
    "a window from before": (lambda: vn.window(SGD, -1), ValueError, "`start` is -1"),
    "a window on a number": (lambda: vn.window(0.1), TypeError, "`tx` is the number"),
    # Histories.
    "what was not recorded": (
        lambda: fit(record="slope").history["slop"],
        KeyError,
        r"no 'slop'.*'slope'.*`record=",
    ),
}


# Of these JAX or Optax would say something in words of its own.
SAID_BEFORE = (
    "gradients of another structure",
    "the state of another optimiser",
    "a number for a transformation",
    "a factor that is text",
    "floats as a key",
    "several keys",
    "a vector for a loss",
    "text for a loss",
    "a constraint that changes a shape",
    "gradients of a changed shape",
    "a verdict for each entry",
    "a callback's other optimiser",
    "objects for data",
    "a stream that runs dry",
)


@pytest.mark.parametrize("mistake", marked(pytest.mark.seams, TABLE, *SAID_BEFORE))
def test_a_mistake(mistake):
    do, error, match = TABLE[mistake]
    with pytest.raises(error, match=re.compile(match, re.DOTALL)) as caught:
        do()
    assert not isinstance(caught.value, AttributeError | AssertionError)


@pytest.mark.parametrize("mistake", ["a typo", "a typo in train", "an unknown record"])
def test_an_unknown_name_has_a_class_of_its_own(mistake):
    with pytest.raises(vn.UnknownPathError):
        TABLE[mistake][0]()


def test_nothing_is_lost_when_a_stream_runs_dry():
    with pytest.raises(vn.StreamExhaustedError) as caught:
        TABLE["a stream that runs dry"][0]()
    assert int(caught.value.result.trainer.step_count) == 2


def test_a_callbacks_trainer_of_another_shape():
    def callback(trainer, history):
        wide = lambda leaf: jnp.ones(16) if leaf.dtype == jnp.float64 else leaf
        return jax.tree.map(wide, trainer)

    with pytest.raises(ValueError, match="`callback` returned must have the shapes"):
        fit(steps=4, chunk=2, callback=callback)
