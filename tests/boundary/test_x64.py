"""Float64 where JAX has it, float32 where it does not, and what is said of it."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from marked import marked
from models import Line, same

X = np.linspace(0.0, 1.0, 8)
BATCH = X, 2 * X + 1
SOLVER = optx.LevenbergMarquardt(rtol=1e-3, atol=1e-3)


class LineFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


def made(**options):
    """A trainer in the precision of here and now."""
    rules = {
        "slope": optax.adam(0.1),
        "offset": optax.inject_hyperparams(optax.sgd)(0.1),
    }
    model = Line(jnp.asarray(1.0), jnp.asarray(0.0))
    return LineFit(model, vn.ParamOptimiser(rules), **options)


USES = {
    "step": lambda t: t.step(BATCH)[0],
    "step in jit": lambda t: eqx.filter_jit(lambda t: t.step(BATCH)[0])(t),
    "fit": lambda t: (
        t.fit(
            BATCH,
            3,
            record=("grad_norm",),
            validation=(BATCH, 1),
            stop=vn.Converged(0.0, 2) | vn.Patience(2),
        ).trainer
    ),
    "minibatches": lambda t: (
        t.fit(vn.Minibatches(BATCH, 4, key=jax.random.key(0)), 3).trainer
    ),
    "stream": lambda t: t.fit(vn.Stream([BATCH] * 3), 3).trainer,
    "solve": lambda t: t.solve(SOLVER, BATCH).trainer,
    "minimise": lambda t: t.solve(optx.BFGS(rtol=1e-3, atol=1e-3), BATCH).trainer,
    "fit_many": lambda t: vn.fit_many([t, t], BATCH, 2).trainers,
    "solve many": lambda t: vn.fit_many([t, t], BATCH, 9, solver=SOLVER).trainers,
    "unroll": lambda t: vn.unroll(t, BATCH, 2)[0],
    "replace": lambda t: t.replace(model=t.model),
    "whiten": lambda t: t.whiten(BATCH),
    "whitened": lambda t: t.whiten(BATCH).solve(SOLVER, BATCH).trainer,
    "fisher": lambda t: t.fisher(BATCH),
    "curvature": lambda t: t.curvature(BATCH),
    "errors": lambda t: t.standard_errors(BATCH),
    "table": lambda t: t.table(BATCH),
    "objective": lambda t: t.objective(BATCH),
}


@pytest.mark.parametrize("name", USES)
def test_made_in_float64_and_used_in_float32(name):
    """It says so, rather than to round."""
    with jax.enable_x64(True):
        trainer = made()
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"made in float64.*`jax_enable_x64`"),
    ):
        USES[name](trainer)


def test_the_parameters_at_a_vector_in_float64():
    with jax.enable_x64(True):
        trainer, vector = made(), jnp.zeros(2)
    with jax.enable_x64(False), pytest.raises(ValueError, match="made in float64"):
        trainer.params_at(vector)


# Others end in what these call; what is whitened is then solved.
APART = ("fit", "solve", "minimise", "fit_many", "whiten")


@pytest.mark.filterwarnings("ignore:.*far from the minimum")
@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    "name",
    marked(pytest.mark.seams, [use for use in USES if use != "whitened"], *APART),
)
def test_made_in_float32_and_used_in_float64(name):
    """It works, and every dtype of the trainer stays."""
    with jax.enable_x64(False):
        trainer = made()
    with jax.enable_x64(True):
        result = USES[name](trainer)
    if isinstance(result, vn.Trainer) and result.optimiser is not None:
        before, after = (jax.tree.leaves(t._progress) for t in (trainer, result))
        assert [x.dtype for x in before] == [x.dtype for x in after]


def test_what_needs_no_computing_works_in_any(tmp_path):
    with jax.enable_x64(True):
        trainer = made().fit(BATCH, 3).trainer
        expected = trainer.learning_rates(), str(trainer), trainer.table()
    with jax.enable_x64(False):
        assert (trainer.learning_rates(), str(trainer), trainer.table()) == expected
        assert trainer.nan_report()["loss"].total == 0
        vn.save(tmp_path / "fit", trainer)
    with jax.enable_x64(True):
        loaded = vn.load(tmp_path / "fit", made())
        assert same(loaded._progress, trainer._progress)


def test_a_file_in_float64_is_not_rounded(tmp_path):
    with jax.enable_x64(True):
        trainer, tree = made(), {"a": jnp.asarray(0.1), "b": np.asarray(0.1)}
        vn.save(tmp_path / "trainer", trainer)
        vn.save(tmp_path / "tree", tree)
    with jax.enable_x64(False):
        for like in (trainer, made()):
            with pytest.raises(vn.MismatchError, match="jax_enable_x64"):
                vn.load(tmp_path / "trainer", like)
        with pytest.raises(vn.MismatchError, match=r"'a' as float64.*jax_enable_x64"):
            vn.load(tmp_path / "tree", tree)
        only = vn.load(tmp_path / "tree", {"a": np.zeros(()), "b": np.zeros(())})
        assert only["a"].dtype == np.float64
        assert only["a"] == 0.1


@pytest.mark.parametrize("name", ["step", "fit", "solve", "fit_many"])
def test_parts_in_float64_of_a_trainer_in_float32(name):
    """A model, rules, a projector, a state and data from a context that is left."""
    with jax.enable_x64(True):
        other = made()
        optimiser, batch = other.optimiser, jax.tree.map(jnp.asarray, BATCH)
        model = {"line": other.model, "frozen": jnp.arange(8.0), "host": X + 0}

    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            x, y = batch
            return model["line"](x) - y + 0 * model["frozen"] + 0 * model["host"]

    rules = {"line.slope": optax.adam(0.1), "line.offset": optimiser.transforms[1]}
    with jax.enable_x64(False):
        trainer = Fit(model, vn.ParamOptimiser(rules))
        use = {
            "step": lambda: trainer.step(batch),
            "fit": lambda: trainer.fit(batch, 3),
        }
        use["solve"] = lambda: trainer.solve(SOLVER, batch)
        use["fit_many"] = lambda: vn.fit_many([trainer] * 2, batch, 2)
        result = use[name]()
        floats = [x for x in jax.tree.leaves(result) if eqx.is_inexact_array(x)]
        assert {x.dtype.name for x in floats if isinstance(x, jax.Array)} == {"float32"}


def test_minibatches_in_float64_of_a_trainer_in_float32():
    times = BJD + np.linspace(0, 30, 8)
    with jax.enable_x64(True):
        data, precise = (
            vn.Minibatches((x, X), 4, key=jax.random.key(0)) for x in (X, times)
        )
    with jax.enable_x64(False):
        trainer = made()
        fitted = trainer.fit(data, 3).trainer
        assert fitted.params.slope.dtype == jnp.float32
        with pytest.warns(vn.PrecisionWarning, match=r"`data\.arrays\[0\]`"):
            trainer.fit(precise, 0)


# Data that float32 does not hold

BJD = 2459000.5
MATTERS = {
    "BJD": BJD + np.linspace(0, 30, 8),
    "BJD, a row of NaN": np.r_[np.nan, BJD + np.linspace(0, 30, 7)],
    "one night": BJD + np.linspace(0, 0.3, 8),
    "two dimensions": BJD + np.linspace(0, 30, 8).reshape(2, 4),
    "seconds since 1970": 1.7e9 + np.arange(8.0) / 10,
    "days of a year": BJD + np.linspace(0, 365, 30),
    "two series": np.tile(BJD + np.linspace(0, 300, 50), (2, 1)),
    "backwards": BJD - np.linspace(0, 365, 30),
    "wavelengths of one line": np.linspace(6562.8, 6562.9, 8),
    "a small effect on a large number": 1e6 + np.sin(np.arange(8)),
    "complex": (BJD + np.linspace(0, 30, 8)) * 1j,
    "too small": np.linspace(1e-50, 2e-50, 8),
    "too large": np.linspace(1e300, 2e300, 8),
    "integers": np.arange(8) + 2**40,
    "an integer": np.int64(1_700_000_000_000_000_000),
    "an unsigned integer": np.uint64(2**63),
}
FINE = {
    "years": np.linspace(2010, 2024, 8),
    "MJD of a year": 59000 + np.linspace(0, 365, 8),
    "nights of a year in MJD": 59000 + np.arange(365.0),
    "spectrum": np.linspace(3000, 9000, 8),
    "wavelengths about a line": np.linspace(5000, 5200, 2001),
    "temperatures": 300 + np.random.default_rng(0).normal(size=10_000),
    "temperatures in order": np.sort(
        300 + np.random.default_rng(0).normal(size=10_000)
    ),
    "a decay": 1000 + 50 * np.exp(-np.linspace(0, 9, 300)),
    "a cumulative sum": 100 + np.cumsum(np.random.default_rng(0).random(2_000)) / 1_000,
    "a fine grid": np.linspace(0, 1, 1_000_000),
    "SI": np.linspace(1e-6, 2e-6, 8),
    "about zero": np.linspace(-1e9, 1e9, 8),
    "constant": np.full(8, 0.1),
    "one number": np.asarray([BJD]),
    "scalar": np.float64(BJD),
    "nothing": np.zeros(0),
    "all NaN": np.full(8, np.nan),
    "float32": (BJD + np.linspace(0, 30, 8)).astype(np.float32),
    "small integers": np.arange(8),
    "text beside it": 3,
}


def test_what_is_no_number_has_no_precision():
    odd = {
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0), 3),
        "raw": jax.random.PRNGKey(0),
        "bfloat16": jnp.ones(2, jnp.bfloat16),
        "int4": jnp.ones(2, jnp.int4),
        "nothing": None,
    }
    with jax.enable_x64(False):
        trainer = Ignore({"a": jnp.asarray(1.0, jnp.float32), **odd}, optax.sgd(0.1))
        assert trainer.step(odd)[1].accepted


class Ignore(vn.Trainer):
    def loss(self, model, batch):
        return model["a"] ** 2


class Stateful(vn.Trainer):
    def loss(self, model, batch, *, state):
        return model["a"] ** 2, state


class Held(Ignore):
    held: dict

    def __init__(self, held):
        self.held = held
        super().__init__({"a": jnp.asarray(1.0)}, optax.sgd(0.1))


def stateful(state):
    return Stateful({"a": jnp.asarray(1.0)}, optax.sgd(0.1), state=state)


def heard(work, x64=False):
    with jax.enable_x64(x64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [w for w in caught if issubclass(w.category, vn.PrecisionWarning)]


def trainer():
    return Ignore({"a": jnp.asarray(1.0)}, optax.sgd(0.1))


@pytest.mark.parametrize("name", MATTERS)
def test_data_whose_rounding_matters_are_told(name):
    with np.errstate(over="ignore"):
        (told,) = heard(lambda: Held({"t": MATTERS[name]}))
    assert told.filename == __file__
    assert "'t'" in str(told.message)
    assert "jax_enable_x64" in str(told.message)
    remedy = "another unit" if name.startswith("too ") else "subtract a reference"
    assert remedy in str(told.message)
    assert ("infinite in float32" in str(told.message)) == (name == "too large")


def test_data_are_told_of_once():
    data = {"t": MATTERS["BJD"]}

    def work():
        stepped = trainer()
        for _ in range(3):
            stepped, _ = stepped.step(data)
        stepped.fit(data, 2)

    assert len(heard(work)) == 1
    assert not heard(lambda: trainer().step(data), x64=True)
    # In another context of warnings it is told again.
    assert len(heard(work)) == 1


def test_data_whose_rounding_is_of_no_matter_are_not_told():
    assert not heard(lambda: [Held({"t": data}) for data in FINE.values()])


ENTRANCES = {
    "fit": lambda t, x: t.fit(x, 1),
    "validation": lambda t, x: t.fit(0.0, 1, validation=(x, 1)),
    "minibatches": lambda t, x: vn.Minibatches(x, 4, key=jax.random.key(0)),
    "stream": lambda t, x: t.fit(vn.Stream([{"t": x["t"] + i} for i in range(4)]), 4),
    "curvature": lambda t, x: t.curvature(x),
    "solve": lambda t, x: t.solve(optx.BFGS(rtol=1e-3, atol=1e-3), x),
    "fit_many": lambda t, x: vn.fit_many([t], x, 1),
    "unroll": lambda t, x: vn.unroll(t, x, 1),
    "a frozen array of the model": lambda t, x: Ignore({"a": jnp.asarray(1.0), **x}),
    "another model": lambda t, x: Ignore(
        {"a": jnp.asarray(1.0), "t": jnp.zeros(8)}, train="t"
    ).replace(model={"a": jnp.asarray(1.0), **x}),
    "a number of the model": lambda t, x: Ignore(
        {"a": jnp.asarray(1.0), "t": MATTERS["an integer"]}
    ),
    "a field": lambda t, x: Held(x),
    "a number in a field": lambda t, x: Held({"t": MATTERS["an integer"]}),
    "a state": lambda t, x: stateful(x),
    "a number of a state": lambda t, x: stateful({"t": MATTERS["an integer"]}),
    "another state": lambda t, x: stateful({"t": jnp.zeros(8)}).replace(state=x),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_way_in(name):
    data = {"t": MATTERS["BJD"]}
    told = heard(lambda: ENTRANCES[name](trainer(), data))
    assert len(told) == 1
    assert told[0].filename == __file__


def test_it_can_be_made_an_error_or_silenced():
    data = {"t": MATTERS["BJD"]}
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error", vn.PrecisionWarning)
        for _ in range(2):
            with pytest.raises(vn.PrecisionWarning):
                trainer().step(data)
        warnings.simplefilter("ignore", vn.PrecisionWarning)
        trainer().step(data)


# Errors below the spacing of the dtype


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    ("dtype", "value", "told"),
    [
        (np.float32, BJD, "0.0050, below the spacing of float32 (0.25)"),
        (jnp.bfloat16, 300.0, "0.0050, below the spacing of bfloat16 (2)"),
        (np.float32, 1.0, "0.0050"),
        (np.float64, BJD, "0.0050"),
    ],
)
def test_a_table_marks_errors_below_the_spacing(dtype, value, told):
    class Fit(vn.Trainer):
        def residuals(self, model, batch):
            return (model["t"] - batch).astype(jnp.float64) / 0.01

    model = {"t": jnp.asarray([value], dtype), "n": jnp.asarray([1])}
    row = Fit(model).table(jnp.zeros(4)).splitlines()[3]
    assert row.startswith("t[0]")
    assert row.endswith(f"  {told}")
