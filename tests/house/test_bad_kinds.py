"""Kinds of bad input, each at every door that it may come through."""

import array
import dataclasses
import functools
from collections import UserDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.experimental import io_callback
from jax.sharding import PartitionSpec

import vernal as vn
from models import Line, LineFit, Pull, line, line_batch

pytestmark = pytest.mark.own_words

BATCH = X, Y = line_batch(4)
SGD, KEY = optax.sgd(0.1), jax.random.key(0)
SOLVER = optx.LevenbergMarquardt(1e-8, 1e-8)


class Residuals(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


class Stateful(vn.Trainer):
    def loss(self, model, batch, *, state):
        return model.slope**2, state


def made(slope=0.5):
    return Residuals(Line(jnp.asarray(slope), jnp.asarray(slope)), SGD)


@dataclasses.dataclass
class Night:
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: np.ndarray
    y: np.ndarray


# Arrays that mean more than their numbers.


class Quantity(np.ndarray):
    unit = "m"


def quantity(array):
    return np.asarray(array).view(Quantity)


def masked(array):
    return np.ma.masked_array(array, np.zeros(np.shape(array)) == 0)


NAMED = {"a": np.ones(2)}
# What is given there, and how an error calls it.
DOORS = {
    "model": (lambda odd: Pull({"a": odd(np.ones(2))}, SGD), "model['a']"),
    "frozen": (
        lambda odd: Pull({"a": odd(np.ones(2)), "b": jnp.ones(2)}, SGD, train="b"),
        "model['a']",
    ),
    "state": (lambda odd: Stateful(line(), SGD, state=[odd(np.ones(2))]), "state[0]"),
    "replaced model": (
        lambda odd: Pull(NAMED, SGD).replace(model={"a": odd(np.ones(2))}),
        "model['a']",
    ),
    "step": (lambda odd: made().step((odd(X), Y)), "batch[0]"),
    "fit": (lambda odd: made().fit((X, odd(Y)), 1, progress=False), "data[1]"),
    "stream": (
        lambda odd: made().fit(vn.Stream([(odd(X), Y)]), 1, progress=False),
        "data[0]",
    ),
    "validation": (
        lambda odd: made().fit(BATCH, 1, validation=((odd(X), Y), 1), progress=False),
        "validation[0]",
    ),
    "fisher": (lambda odd: made().fisher((odd(X), Y)), "batch[0]"),
    "solve": (lambda odd: made().solve(SOLVER, (odd(X), Y)), "batch[0]"),
    "many": (lambda odd: vn.fit_many([made()], (odd(X), Y), 1), "data[0]"),
    "unroll": (lambda odd: vn.unroll(made(), (odd(X), Y), 1), "batch[0]"),
    "minibatches": (lambda odd: vn.Minibatches([odd(X)], 2, key=KEY), "arrays[0]"),
    "matrix": (lambda odd: vn.decompose(odd(np.eye(2))), "matrix"),
    "fmat": (
        lambda odd: vn.EigenProjector.from_fisher(odd(np.eye(2)), line()),
        "fmat",
    ),
    "jac": (
        lambda odd: vn.EigenProjector.from_jacobian(odd(np.eye(2)), line()),
        "jac",
    ),
    "params": (
        lambda odd: vn.EigenProjector.from_fisher(np.eye(2), {"a": odd(np.ones(2))}),
        "params['a']",
    ),
    "scale": (
        lambda odd: vn.ParamOptimiser({"a": SGD}).with_scale({"a": odd(1.0)}),
        "scales['a']",
    ),
    "precondition": (lambda odd: vn.precondition([odd(np.ones(2))]), "projector[0]"),
}
ODD = {"masked": masked, "quantity": quantity}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("door", DOORS)
def test_what_means_more_than_its_numbers_is_refused(door, odd):
    enter, name = DOORS[door]
    with pytest.raises(TypeError) as caught:
        enter(ODD[odd])
    what = {"masked": "a masked array", "quantity": "a Quantity"}[odd]
    assert str(caught.value).startswith(f"`{name}` is {what}")


class Table:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array)


def test_arrays_of_other_libraries_become_arrays():
    trainer = Pull({"a": Table(np.ones(2)), "b": jnp.ones(2)}, SGD)
    assert vn.paths(trainer.params) == ("a", "b")
    there, info = made().step((Table(np.asarray(X)), Y))
    assert info.loss == made().step(BATCH)[1].loss
    assert int(there.step_count) == 1


def test_sparse_matrices_are_refused():
    matrix = pytest.importorskip("scipy.sparse").eye(4).tocsr()
    for give in (
        lambda: made().step((matrix, Y)),
        lambda: Pull({"a": matrix, "b": X}, SGD),
    ):
        with pytest.raises(TypeError, match=r"a sparse matrix.*`x\.toarray\(\)`"):
            give()


def gone(array):
    array = array + 0
    array.delete()
    return array


def test_arrays_that_are_gone_are_named():
    told = "has been deleted.*donate"
    with pytest.raises(ValueError, match=rf"`batch\[1\]` is an array that {told}"):
        made().step((X, gone(Y)))
    with pytest.raises(ValueError, match=rf"`model\['a'\]` is an array that {told}"):
        Pull({"a": gone(X)}, SGD)
    trainer = made()
    trainer.params.slope.delete()
    for use in (lambda: trainer.step(BATCH), lambda: trainer.fit(BATCH, 1)):
        with pytest.raises(ValueError, match=rf"`trainer\.params\.slope`.*{told}"):
            use()


class Levels(vn.Trainer):
    def residuals(self, model, batch):
        return model[batch["of"]] - batch["y"]


@pytest.mark.parametrize("of", [[0.0, 1.0, 1.0], [0.5, 1.0, np.nan]])
def test_floats_as_an_index_are_named_if_they_are_whole(of):
    batch = {"of": np.array(of), "y": np.array([0.5, 1.0, np.inf])}
    trainer, told = Levels(jnp.zeros(2), SGD), []
    for use in (trainer.step, trainer.report, lambda data: trainer.fit(data, 1)):
        with pytest.raises(TypeError, match="Indexer must have integer") as caught:
            use(batch)
        told += [note for note in caught.value.__notes__ if "floats" in note]
    names = ("batch", "batch", "data") if of[0] == 0 else ()
    words = "Whole numbers, but floats: `{}['of']`. Use `.astype(int)`."
    assert told == [words.format(name) for name in names]


def test_floats_that_are_taken_by_are_named():
    class Taken(vn.Trainer):
        def residuals(self, model, batch):
            return jnp.take(model, batch[0]) - batch[1]

    with pytest.raises(ValueError, match="integer type") as caught:
        Taken(jnp.zeros(2)).solve(SOLVER, (np.array([0.0, 1.0]), np.full(2, 0.5)))
    assert any("`batch[0]`. Use `.astype(int)`" in x for x in caught.value.__notes__)


# Nothing to fit to.

EMPTY = jnp.zeros(0), jnp.zeros(0)
USES = {
    "step": lambda t, b: t.step(b),
    "fit": lambda t, b: t.fit(b, 2, progress=False),
    "solve": lambda t, b: t.solve(SOLVER, b),
    "fisher": lambda t, b: t.fisher(b),
    "whiten": lambda t, b: t.whiten(b),
    "errors": lambda t, b: t.standard_errors(b),
    "table": lambda t, b: t.table(b),
    "unroll": lambda t, b: vn.unroll(t, b, 2),
    "fit_many": lambda t, b: vn.fit_many([t, t], b, 2, progress=False),
    "solve many": lambda t, b: vn.fit_many([t, t], b, 2, solver=SOLVER),
}


@pytest.mark.parametrize("use", USES)
def test_no_data_fit_nothing(use):
    told = r"`Residuals\.residuals` returned an array of shape \(0,\).*empty"
    with pytest.raises(ValueError, match=told):
        USES[use](made(), EMPTY)


def test_a_mean_over_nothing_is_explained():
    with pytest.warns(UserWarning, match=r"`batch\[0\]` is empty.*`loss` is NaN"):
        LineFit(line(), SGD).fit(EMPTY, 2, progress=False)


# Within a program.

ON_THE_HOST = {
    "fit": (USES["fit"], r"vn\.unroll"),
    "solve": (USES["solve"], "objective"),
    "fit_many": (USES["fit_many"], r"vn\.unroll"),
    "table": (USES["table"], "Return the trainer"),
    "learning_rates": (lambda t, b: t.learning_rates(), "Return the trainer"),
    "nan_report": (lambda t, b: t.step(b)[0].nan_report(), "Return the trainer"),
    "save": (lambda t, b: vn.save("nowhere", t), "Return the trainer"),
}
PROGRAMS = {
    "jit": lambda fn: jax.jit(fn)(1.0),
    "vmap": lambda fn: jax.vmap(fn)(jnp.ones(2)),
    "grad": lambda fn: jax.grad(fn)(1.0),
    "scan": lambda fn: jax.lax.scan(lambda c, _: (fn(c), None), 1.0, length=2),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ON_THE_HOST)
def test_what_runs_on_the_host_says_so_in_a_program(name, program):
    use, remedy = ON_THE_HOST[name]

    def within(slope):
        use(made(slope), BATCH)
        return slope

    if (name, program) in (("nan_report", "scan"), ("nan_report", "grad")):
        return  # There its counts are known.
    with pytest.raises(TypeError, match=f"`{name}` runs on the host.*{remedy}"):
        PROGRAMS[program](within)


@pytest.mark.parametrize("name", ["fit", "solve", "fit_many", "table"])
def test_what_runs_on_the_host_does_not_run_in_a_loss(name):
    inner = made()

    class Outer(vn.Trainer):
        def loss(self, model, batch):
            ON_THE_HOST[name][0](inner, BATCH)
            return model.slope**2

    with pytest.raises(TypeError, match=f"`{name}` runs on the host.*Call it before"):
        Outer(line(), SGD).step(BATCH)


# Functions and methods that cannot be called as they are.


def having(base, **methods):
    return type("Own", (base,), methods)


def policy(**methods):
    return having(vn.NanPolicy, **{"init": lambda self, params: None} | methods)()


def criterion(**methods):
    return having(vn.StopCriterion, **{"init": lambda self, params: None} | methods)()


class Loop(vn.Trainer):
    def loss(self, model, batch):
        body = lambda carry: (carry[0] + 1, carry[1] * model.slope)
        return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, model.offset))[1] ** 2


class Logs(vn.Trainer):
    def loss(self, model, batch):
        io_callback(lambda slope: None, None, model.slope)
        return model.slope**2


class Named(vn.Trainer):
    def loss(self, model, batch):
        return model.slope**2, {"slope": jnp.asarray(0.0), "grad_norm": model.offset}


def fit(trainer=None, data=BATCH, **options):
    return (trainer or made()).fit(data, 2, **{"progress": False} | options)


MESH = lambda: jax.make_mesh((2, 2), ("a", "b"))
TABLE = {
    "loss": (
        lambda: having(vn.Trainer, loss=lambda s, m: 0.0)(line(), SGD),
        "Own.loss",
    ),
    "a loss without a key": (
        lambda: having(vn.Trainer, loss=lambda s, m, b: 0.0)(line(), SGD, key=KEY),
        r"Own.loss\(model, batch, key=\)",
    ),
    "a loss without a state": (
        lambda: having(vn.Trainer, loss=lambda s, m, b: 0.0)(line(), SGD, state=X),
        r"Own.loss\(model, batch, state=\)",
    ),
    "constrain": (
        lambda: having(LineFit, constrain=lambda s: 0.0)(line(), SGD),
        "Own.constrain",
    ),
    "transform_grads": (
        lambda: having(LineFit, transform_grads=lambda s, g: g)(line(), SGD),
        "Own.transform_grads",
    ),
    "evaluate": (
        lambda: having(LineFit, evaluate=lambda s, m: 0.0)(line(), SGD),
        "Own.evaluate",
    ),
    "policy": (
        lambda: LineFit(line(), SGD, nan_policy=policy(apply=lambda s, loss: 0)),
        "`nan_policy`.*Own.apply",
    ),
    "stop": (
        lambda: fit(stop=criterion(apply=lambda s, view: 0)),
        "`stop`.*Own.apply",
    ),
    "vn.fit": (
        lambda: vn.fit(lambda m, b: 0.0, line(), SGD, BATCH, 2, key=KEY),
        "`loss`.*key",
    ),
    "a callback's class": (
        lambda: fit(callback=Line),
        "`callback` is the class `Line`",
    ),
    "a stream's function": (lambda: vn.Stream(lambda: [BATCH]), "`source`.*step"),
    "a stream's dictionary": (lambda: vn.Stream({"x": X}), "`source` is a dict"),
    "a stream's text": (lambda: vn.Stream("text"), "`source` is a str"),
    "a stream's batch": (lambda: vn.Stream(BATCH), "`source` is a tuple of arrays"),
    "matvec": (
        lambda: vn.EigenProjector.from_matvec(lambda: 0, line(), 1, key=KEY),
        "`matvec`",
    ),
    "fn": (lambda: vn.hessian(lambda: 0, line()), "`fn`.*params"),
    "residuals": (lambda: vn.jacobian(lambda a, b: 0, line()), "`residuals`.*'b'"),
    "schedule": (
        lambda: LineFit(line(), optax.adam(lambda: 0.1)),
        r"`optimiser`.*schedule\(count\)",
    ),
    "a schedule of a rule": (
        lambda: vn.ParamOptimiser({"a": optax.chain(optax.adam(lambda a, b: 0.1))}),
        r"`rules\['a'\]`.*schedule\(count\)",
    ),
    "a rate of text": (
        lambda: LineFit(line(), optax.adam("fast")),
        "`optimiser`.*rate",
    ),
    **{
        f"a rate of type {type(rate).__name__}": (
            lambda rate=rate: LineFit(line(), optax.adam(rate)),
            f"`optimiser` has a rate of type `{type(rate).__name__}`",
        )
        for rate in (dict, "0.1", (0.1,), [0.1], 1j, Fraction(1, 10), Decimal("0.1"))
    },
    "an injected rate": (
        lambda: LineFit(line(), optax.inject_hyperparams(optax.adam)("0.1")),
        "`optimiser` has a rate of type `str`",
    ),
    "a rate in a partition": (
        lambda: LineFit(line(), optax.partition({0: optax.sgd("1")}, lambda p: 0)),
        "`optimiser` has a rate of type `str`",
    ),
    "a model without values": (
        lambda: LineFit(jax.eval_shape(line), SGD),
        "`model.slope` has no values",
    ),
    "residuals that are integers": (
        lambda: having(Residuals, residuals=lambda s, m, b: m(X) > Y)(line(), SGD).step(
            BATCH
        ),
        "residuals` returned an array of dtype bool",
    ),
    "rates for one parameter": (
        lambda: LineFit(line(), optax.adam(jnp.ones(2))).step(BATCH),
        r"`optimiser`.*'slope' has shape \(2,\).*rate must be one number",
    ),
    "a model's trainer": (lambda: LineFit(made(), SGD), "Give `trainer.model`"),
    "a model's result": (lambda: LineFit(fit(), SGD), "Give `result.model`"),
    "a model's class": (lambda: LineFit(Line, SGD), "`model`.*the class `Line`"),
    "a loop of unknown length": (
        lambda: Loop(line(), optax.adam(0.1)).step(BATCH),
        r'The loss of `Loop`.*lax\.scan.*jac="fwd"',
    ),
    "a loss that calls Python": (
        lambda: Logs(line(), optax.adam(0.1)).step(BATCH),
        r"The loss of `Logs`.*IO callbacks.*`jax\.debug\.callback`",
    ),
    "a metric called like a parameter": (
        lambda: fit(Named(line(), SGD), record="slope"),
        "`record`: 'slope' is the name of a metric",
    ),
    "a metric called like a norm": (
        lambda: fit(Named(line(), SGD), record="grad_norm"),
        "`record`: 'grad_norm' is the name of a metric",
    ),
    "a parameter called like a norm": (
        lambda: fit(Pull({"grad_norm": jnp.ones(2)}, SGD), X[:2], record="grad_norm"),
        "`record`: 'grad_norm' is the name of a parameter",
    ),
    "an option of many": (
        lambda: vn.fit_many([made()], BATCH, 2, reccord="slope"),
        "`fit_many` has no argument `reccord`. Did you mean 'record'",
    ),
    "an option of a fit": (
        lambda: vn.fit(lambda m, b: 0.0, line(), SGD, BATCH, 2, cunk=1),
        "`fit` has no argument `cunk`. Did you mean 'chunk'",
    ),
    "axes of another tuple": (
        lambda: vn.fit_many([made()], BATCH, 2, data_axis=(0, None, 0)),
        r"`data_axis` is \(0, None, 0\).*such as \(0, 0\)",
    ),
    "an axis by name": (
        lambda: vn.fit_many([made()], BATCH, 2, data_axis="x"),
        "`data_axis` is 'x'",
    ),
    "an axis of a mesh twice": (
        lambda: fit(
            Pull({"w": jnp.ones((4, 4))}, SGD),
            X,
            mesh=MESH(),
            sharding={"w": PartitionSpec("a", "a")},
        ),
        "`sharding`: 'w'.*names an axis of the mesh twice",
    ),
    "a history by number": (
        lambda: fit().history[0],
        "takes the name of a column, and 0 is none",
    ),
    "a history of rows that differ": (
        lambda: vn.History(np.arange(3), np.ones(2)),
        "`loss` has 2 rows, but `steps` has 3",
    ),
    "a record of rows that differ": (
        lambda: vn.History(np.arange(3), np.ones(3), {"a": np.ones(2)}),
        r"`records\['a'\]` has 2 rows, but `steps` has 3",
    ),
    "a record that is a list": (
        lambda: vn.History(np.arange(2), np.ones(2), {"a": [1, 2]}),
        r"`records\['a'\]` is \[1, 2\], but must be an array",
    ),
    **{
        f"{door} {path!r}": (
            lambda do=do, path=path: do(path),
            "which no file can be called",
        )
        for path in ("a\0b", "\ud800")
        for door, do in (
            ("save to", lambda path: vn.save(path, line())),
            ("load", lambda path: vn.load(path, line())),
            ("history of", vn.History.load),
            ("checkpoints in", vn.Checkpoints),
        )
    },
    "a directory of None": (lambda: vn.Checkpoints(None), "`directory` is None"),
    "a long list": (
        lambda: fit(data=([0.5] * 80, Y)),
        r"`data\[0\]` is a list of 80 numbers.*`jnp.asarray",
    ),
    "a list of NumPy's numbers": (
        lambda: made().step({"x": list(np.arange(9.0)), "y": Y}),
        r"`batch\['x'\]` is a list of 9 numbers",
    ),
    "nothing but a list": (
        lambda: made().solve(SOLVER, list(range(9))),
        "`batch` is a list of 9 numbers",
    ),
    "a long tuple": (
        lambda: fit(data=((0.5,) * 23 + (1,), Y)),
        r"`data\[0\]` is a tuple of 24 numbers.*`jnp.asarray",
    ),
    "a mapping": (
        lambda: fit(data={"a": UserDict(x=X, y=Y)}),
        r"`data\['a'\]` is a UserDict.*`dict\(data\['a'\]\)`",
    ),
    "a view of a dictionary": (
        lambda: made().step(MappingProxyType({"x": X, "y": Y})),
        r"`batch` is a mappingproxy.*`dict\(batch\)`",
    ),
    "a dataclass": (
        lambda: fit(data=Night(X, Y)),
        "`data` is a Night.*dictionary or an `eqx.Module`.*register_dataclass",
    ),
    "a frozen dataclass": (
        lambda: fit(data=Frozen(X, Y)),
        "`data` is a Frozen.*register_dataclass",
    ),
    "a range": (
        lambda: fit(data=(range(80), Y)),
        r"`data\[0\]` is a range of 80 numbers",
    ),
    "a view of memory": (
        lambda: fit(data=(memoryview(bytes(9)), Y)),
        r"`data\[0\]` is of type `memoryview`.*`np\.asarray",
    ),
    "Python's own array": (
        lambda: made().solve(SOLVER, {"x": array.array("d", [1.0] * 9), "y": Y}),
        r"`batch\['x'\]` is of type `array`.*`np\.asarray",
    ),
    "a list of examples": (
        lambda: vn.Minibatches(([1.0] * 9, X), 2, key=KEY),
        r"`arrays\[0\]` is a list of 9 numbers",
    ),
    "swapped": (lambda: LineFit(SGD, line()), "`model` is an Optax.*swapped"),
    "swapped rules": (
        lambda: LineFit(vn.ParamOptimiser({"slope": SGD}), line()),
        "`model` is an Optax.*swapped",
    ),
    "a model for an optimiser": (
        lambda: LineFit(line(), line()),
        "`optimiser` is of type `Line`, not an Optax transformation",
    ),
    "an option of whiten": (
        lambda: made().whiten(BATCH, on_nul="prior"),
        "`whiten` has no argument `on_nul`. Did you mean 'on_null'",
    ),
    "a time in words": (
        lambda: vn.Checkpoints("nowhere", every="1 minute"),
        r"`every` is '1 minute'.*datetime.timedelta\(minutes=1\)",
    ),
    "complex gradients": (
        lambda: having(
            LineFit,
            transform_grads=lambda s, g, m: jax.tree.map(
                lambda x: x.astype(complex), g
            ),
        )(line(), SGD).step(BATCH),
        "`transform_grads` returns is complex.*at 'slope'.*cannot hold",
    ),
    "a complex model": (
        lambda: made().replace(model=jax.tree.map(lambda x: x.astype(complex), line())),
        "`model` is complex.*at 'slope'.*make a new trainer",
    ),
    "too many steps": (
        lambda: vn.unroll(made(), BATCH, 10**30),
        "`steps` is 1000.*at most",
    ),
}


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_names_what_is_wrong(mistake):
    do, told = TABLE[mistake]
    with pytest.raises((TypeError, ValueError), match=f"(?s){told}"):
        do()


@pytest.mark.parametrize(
    "rate",
    [
        0.1,
        np.float64(0.1),
        np.array(0.1),
        jnp.array(0.1),
        lambda *counts: 0.1,
        functools.partial(lambda rate, count: rate, 0.1),
        jax.jit(lambda count: 0.1),
        eqx.filter_jit(lambda count: 0.1),
    ],
)
def test_rates_of_many_kinds_are_alike(rate):
    moved, _ = Residuals(line(0.5), optax.sgd(rate)).step(BATCH)
    expected, _ = made().step(BATCH)
    np.testing.assert_allclose(moved.model.slope, expected.model.slope, rtol=1e-6)


def test_labels_called_like_a_rate_are_none():
    labels = {"learning_rate": "a", "step_size": "a"}
    optimiser = optax.partition({"a": SGD}, labels)
    trainer = Pull({name: jnp.ones(2) for name in labels}, optimiser)
    assert trainer.step(X[:2])[0].step_count == 1


class Chosen(vn.Trainer):
    def loss(self, model, batch):
        assert batch["kind"] == "line"
        return jnp.sum((model(X) - Y) ** 2)


def test_text_of_numpy_is_text():
    batch = {"kind": np.array(["line"])[0]}
    assert Chosen(line(), SGD).step(batch)[1].loss > 0


# So do classes that are written in C, such as `pandas.Timestamp`.
Moduleless = type("Moduleless", (), {"__module__": property(lambda self: "")})


def test_a_class_need_not_name_its_module():
    batch = {"kind": "line", "when": Moduleless()}
    assert Chosen(line(), SGD).step(batch)[1].loss > 0


@pytest.mark.parametrize("many", [False, True])
def test_a_validation_without_a_finite_score_is_told_of(many):
    fit = vn.fit_many if many else Residuals.fit
    trainer = [made(), made()] if many else made()
    validation = (X, Y * np.nan), 1
    of_member, count = " of member 0" if many else "", len(Y)
    said = (
        rf"`validation`: no score{of_member} was .*`validation\[1\]` has {count} NaNs"
    )
    with pytest.warns(UserWarning, match=said):
        fit(trainer, BATCH, 2, validation=validation, progress=False)


def test_the_member_whose_validation_has_no_finite_score_is_named():
    rows = np.stack([Y, np.where(np.arange(len(Y)) == 2, np.nan, Y)])
    validation = (X, rows), 1
    said = r"no score of member 1 was finite.*`validation\[1\]` has 1 NaN, at \[2\]"
    with pytest.warns(UserWarning, match=said):
        vn.fit_many(
            [made(), made()],
            (X, np.stack([Y, Y])),
            2,
            data_axis=(None, 0),
            validation=validation,
        )


@pytest.mark.parametrize("numbers", [(0.5,) * 8, tuple(range(24))])
def test_short_tuples_and_those_of_integers_are_taken(numbers):
    class Taken(vn.Trainer):
        def loss(self, model, batch):
            return model * batch[len(batch) - 1]

    assert Taken(jnp.asarray(1.0), SGD).fit(numbers, 1).history


def test_a_batch_may_have_gaps():
    data = {"x": jnp.ones((2, 4)), "mask": None}

    class Mean(vn.Trainer):
        def loss(self, model, batch):
            return jnp.mean((model.slope - batch["x"]) ** 2)

    pair = [Mean(line(), SGD), Mean(line(1.0), SGD)]
    for axis in None, 0, {"x": 0, "mask": None}:
        assert len(vn.fit_many(pair, data, 1, data_axis=axis, progress=False)) == 2


def test_a_hook_that_makes_nan_is_named():
    nan = lambda self, m: eqx.tree_at(lambda m: m.slope, m, m.slope * jnp.nan)
    trainer = having(LineFit, constrain=nan)(line(), SGD)
    with pytest.warns(UserWarning, match=r"What `constrain` returns.*'slope'"):
        trainer.fit(BATCH, 2, progress=False)


def test_the_first_bad_member_is_named():
    pair = [made(), made(jnp.nan)]
    with pytest.warns(UserWarning, match=r"1 of 2 trainers \(1\).*Of member 1.*slope"):
        result = vn.fit_many(pair, BATCH, 2, progress=False)
    assert result.stop_reasons[1].name == "NON_FINITE"
    with pytest.warns(UserWarning, match="all 2 trainers.*Of member 0"):
        vn.fit_many(pair[1:] * 2, BATCH, 2, progress=False)


def test_a_large_complex_number_is_finite():
    trainer = Pull({"z": jnp.asarray(1.5e308 + 1.5e308j)}, optax.sgd(0.0))
    model = vn.SkipStep().apply(jnp.asarray(1.0), trainer.params, None)
    assert bool(model[1].accept)
