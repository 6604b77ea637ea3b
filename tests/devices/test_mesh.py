"""Several devices give the answer of one, to rounding."""

import functools
import re
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import vernal as vn
from inside import cache_size, placement, run_chunk, run_step
from marked import marked
from meshes import ADAM, BATCH, FITS, RULES, Drawn, Settled, mesh_of, starts
from models import (
    Gaussian,
    GaussianFit,
    LineFit,
    close,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
)

WIDTHS = (1, 8)


MESH = mesh_of(8)


def close_on_one(ours, theirs, rtol=None):
    """The same up to rounding, of the same types, and where one device has it."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None)
        assert len(a.sharding.device_set) == 1
    close(ours, theirs, rtol)


def same_histories(ours, theirs):
    assert ours.to_dict().keys() == theirs.to_dict().keys()
    for name, column in theirs.to_dict().items():
        np.testing.assert_allclose(ours[name], column, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", marked(pytest.mark.seams, FITS, "minibatches"))
def test_a_fit_on_eight_devices(name):
    trainer, data, options = FITS[name]()
    one = trainer.fit(data, 30, **options)
    many = trainer.fit(data, 30, mesh=MESH, **options)
    close_on_one(many.trainer, one.trainer)
    same_histories(many.history, one.history)
    assert many.stop_reason is one.stop_reason
    assert many.trainer.nan_report() == one.trainer.nan_report()


@pytest.mark.seams
def test_a_mesh_of_which_the_compiler_asks_for_types():
    """As `jax.make_mesh` makes it in later releases."""
    mesh = jax.make_mesh((4,), ("rows",))
    one = GaussianFit(gaussian(), ADAM).fit(BATCH, 9)
    many = GaussianFit(gaussian(), ADAM).fit(BATCH, 9, mesh=mesh)
    close_on_one(many.trainer, one.trainer)


ON_EXPLICIT = {
    "fit": lambda t, data: t.fit(data, 9).trainer.params,
    "Minibatches": lambda t, data: (
        t.fit(vn.Minibatches(data, 8, key=jax.random.key(0)), 9).trainer.params
    ),
    "step": lambda t, data: t.step(data)[0].params,
    "solve": lambda t, data: t.solve(LM, data).trainer.params,
    "fisher": lambda t, data: t.fisher(data),
    "fit_many": lambda t, data: vn.fit_many([t, t], data, 9).trainers.params,
}
LM = optx.LevenbergMarquardt(1e-8, 1e-8)
CONVERGED = {"stop": vn.Converged(1e-9, 5)}


def go_on(result, data):
    trainer = result.trainer
    return trainer.fit(data, 3).trainer.params, trainer.draw(jax.random.key(0), 3, data)


WITHIN_EXPLICIT = {
    "solve, and go on": lambda t, data: go_on(t.whiten(data).solve(LM, data), data),
    "a fit that converges": lambda t, data: t.fit(data, 900, **CONVERGED).edm[None],
    "many that converge": lambda t, data: vn.fit_many([t], data, 900, **CONVERGED).edms,
    "objective": lambda t, data: t.objective(data)[1],
}


class Seen(BaseException):
    """Ends a computation where the model is evaluated."""


class Looking(vn.Trainer):
    def residuals(self, model, batch):
        raise Seen(jax.sharding.get_abstract_mesh())


LOOKS = {
    "fisher": lambda t: t.fisher(BATCH),
    "curvature": lambda t: t.curvature(BATCH),
    "whiten": lambda t: t.whiten(BATCH),
    "standard_errors": lambda t: t.standard_errors(BATCH),
    "table": lambda t: t.table(BATCH),
    "report": lambda t: t.report(BATCH),
    "solve": lambda t: t.solve(LM, BATCH),
    "propagate": lambda t: t.propagate(lambda model: model.power, BATCH),
    "draw": lambda t: t.draw(jax.random.key(0), 3, BATCH),
    "profile": lambda t: t.profile(LM, BATCH, "mean"),
    "intervals": lambda t: t.intervals(LM, BATCH),
    "fit_many": lambda t: vn.fit_many([t], BATCH, 9, solver=LM),
    "errors": lambda t: vn.fit_many([t], BATCH, 0).errors(BATCH),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_is_computed_as_if_no_mesh_with_types_were_set(name):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(Seen) as caught:
        LOOKS[name](Looking(gaussian(), ADAM))
    assert caught.value.args[0].empty


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("name", WITHIN_EXPLICIT)
def test_what_is_computed_within_a_mesh_with_types(name, is_there):
    """Whether the parameters and the data lie there or not."""
    data = jax.tree.map(lambda leaf: leaf[:16], BATCH)
    compute = WITHIN_EXPLICIT[name]
    known = compute(GaussianFit(gaussian(), ADAM), data)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        model, place = gaussian(), NamedSharding(mesh, P())
        if is_there:
            model, data = jax.device_put((model, data), place)
        found = compute(GaussianFit(model, ADAM), data)
        # JAX goes on with it there.
        doubled = jax.tree.map(lambda x: 2 * x, found)
    close(jax.device_get(doubled), jax.tree.map(lambda x: 2 * x, known), 1e-5)


@pytest.mark.parametrize("name", ON_EXPLICIT)
def test_what_lies_on_a_mesh_with_types_is_computed_with_as_it_is(name):
    """Without `mesh=`: where the user has put it, split or not."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    data = jax.tree.map(lambda leaf: leaf[:16], BATCH)
    trainer = GaussianFit(place(gaussian(), P()), ADAM)
    found = ON_EXPLICIT[name](trainer, place(data, P("rows")))
    known = ON_EXPLICIT[name](GaussianFit(gaussian(), ADAM), data)
    close(jax.device_get(found), jax.device_get(known), 1e-6)
    if name in ("Minibatches", "solve"):  # which take it as `fit` and `fisher` do
        return
    whole = place(GaussianFit(gaussian(), ADAM), P())
    found = ON_EXPLICIT[name](whole, place(data, P("rows")))
    close(jax.device_get(found), jax.device_get(known), 1e-6)


def test_many_leaves_of_which_some_are_split_explicitly():
    class Sum(vn.Trainer):
        def loss(self, model, batch):
            return sum(jnp.sum(jnp.square(leaf - batch)) for leaf in model)

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    places = [NamedSharding(mesh, spec) for spec in (P(), P("rows"))]
    leaves = [np.arange(4.0) + i for i in range(20)]
    split = [jax.device_put(leaf, places[i % 2]) for i, leaf in enumerate(leaves)]
    step = jax.jit(lambda trainer, batch: trainer.step(batch))
    one, _ = step(Sum(leaves, optax.sgd(0.1)), 1.0)
    with jax.set_mesh(mesh):
        many, _ = step(Sum(split, optax.sgd(0.1)), 1.0)
    np.testing.assert_allclose(many.model, one.model)


class Roots(vn.Trainer):
    def loss(self, model, batch):
        return sum(jnp.sum(jnp.sqrt(leaf)) for leaf in model)


def roots(place=None):
    # Its last element goes from 0.25 to 0.05, and then below zero.
    falls = np.ones((4, 4))
    falls[3, 3] = 0.25
    split = [jax.device_put(leaf, place) for leaf in (falls, np.ones((4, 4)))]
    return Roots([*split, jnp.ones(3)], optax.sgd(0.2)).fit(None, 5, chunk=5)


roots_on_one = functools.cache(roots)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Auto, P("rows")), (AxisType.Explicit, P(None, "rows"))],
)
def test_nan_is_found_in_arrays_that_are_split(kind, spec):
    one = roots_on_one()
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        many = roots(NamedSharding(mesh, spec))
    assert "steps=3" in repr(one)
    assert repr(many) == repr(one)


def test_a_mesh_that_is_set_around_it():
    trainer = GaussianFit(gaussian(), ADAM)
    one = trainer.fit(BATCH, 9)
    mesh = jax.make_mesh((4,), ("rows",))
    with jax.set_mesh(mesh):
        many = trainer.fit(BATCH, 9, mesh=mesh)
        trainer.step(BATCH, mesh=mesh)
        trainer.solve(SOLVERS["LM"], BATCH, mesh=mesh)
        vn.fit_many([trainer] * 4, BATCH, 9, mesh=mesh)
    close_on_one(many.trainer, one.trainer)


@pytest.mark.parametrize("jit", [False, True])
def test_steps_on_devices(jit):
    trainer = alone = GaussianFit(gaussian(), vn.ParamOptimiser(RULES))
    take = lambda trainer: trainer.step(BATCH, mesh=MESH)
    take = eqx.filter_jit(take) if jit else take
    for _ in range(3):
        trainer, info = take(trainer)
        alone, own = alone.step(BATCH)
        np.testing.assert_allclose(info.loss, own.loss, rtol=1e-12)
        np.testing.assert_allclose(info.grad_norm, own.grad_norm, rtol=1e-9)
    assert len(trainer.params.mean.sharding.device_set) == 8
    np.testing.assert_allclose(trainer.params.mean, alone.params.mean, rtol=1e-12)


SOLVERS = {
    "LM": optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8),
    "BFGS": optx.BFGS(rtol=1e-8, atol=1e-8),
}


@pytest.mark.parametrize(("solver", "whitened"), [("LM", True), ("BFGS", False)])
def test_solvers_on_devices(solver, whitened):
    trainer = GaussianFit(gaussian())
    trainer = trainer.whiten(BATCH) if whitened else trainer
    one = trainer.solve(SOLVERS[solver], BATCH)
    many = trainer.solve(SOLVERS[solver], BATCH, mesh=MESH)
    # Near the end a step is a matter of rounding.
    close_on_one(many.trainer.params, one.trainer.params, rtol=1e-6)
    close_on_one(many.best, one.best, rtol=1e-6)
    assert many.stop_reason is one.stop_reason
    np.testing.assert_allclose(many.history.loss[:4], one.history.loss[:4], rtol=1e-8)


# What goes over the wires.


class Chain(vn.Trainer):
    def loss(self, model, batch):
        x, y = batch
        for layer in model:
            x = jnp.tanh(x @ layer["weight"] + layer["bias"][None])
        return jnp.mean(jnp.square(x - y))


def chain(depth, width=8):
    draws = np.random.default_rng(0).normal(size=(depth, width, width))
    weights = map(jnp.asarray, draws / np.sqrt(width))
    return [{"weight": weight, "bias": jnp.zeros(width)} for weight in weights]


CHAIN = jnp.asarray(np.linspace(-1, 1, 32 * 8).reshape(32, 8)), jnp.zeros((32, 8))

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(-start)?\("
)


def collectives(trainer, batch, mesh):
    """The collectives of a compiled step, by kind."""
    place = placement(trainer, mesh)
    args = place.put(trainer), place.batch(batch, "batch"), place
    text = run_step.lower(*args).compile().as_text()
    return [match[1] for match in COLLECTIVE.finditer(text)]


@pytest.mark.as_compiled
@pytest.mark.parametrize("rules", ["one", "each"])
def test_the_number_of_collectives_does_not_grow_with_the_parameters(rules):
    def found(depth):
        model = chain(depth)
        each = dict.fromkeys(vn.paths(model), ADAM)
        optimiser = ADAM if rules == "one" else vn.ParamOptimiser(each)
        return collectives(Chain(model, optimiser), CHAIN, MESH)

    few, many = found(1), found(12)
    assert few == many
    assert 1 <= len(few) <= 2
    assert set(few) == {"all-reduce"}


@pytest.mark.seams
@pytest.mark.as_compiled
def test_one_device_needs_no_collectives():
    assert collectives(Chain(chain(2), ADAM), CHAIN, mesh_of(1)) == []


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one", "eight"])
def test_nothing_goes_to_the_host_within_a_chunk(mesh):
    trainer, stop = GaussianFit(gaussian(), ADAM), vn.Converged(0.0, 99)
    batch = jax.device_put(BATCH)
    options = {"mesh": mesh, "stop": stop, "validation": (batch, 5)}
    trainer.fit(BATCH, 5, **options)
    with jax.transfer_guard("disallow"):
        trainer.fit(BATCH, 50, **options)
    text = str(jax.make_jaxpr(lambda t, b: t.step(b, mesh=mesh))(trainer, BATCH))
    assert "callback" not in text
    assert "f64" in text


def test_nothing_is_computed_in_double_precision_unless_asked():
    with jax.enable_x64(False):
        model = Gaussian(*(jnp.asarray(v) for v in (0.3, 1.2, 0.8)))
        batch = tuple(jnp.asarray(np.asarray(x), "f4") for x in BATCH)
        trainer = GaussianFit(model, vn.ParamOptimiser(RULES))
        text = str(jax.make_jaxpr(lambda t, b: t.step(b))(trainer, batch))
    assert "f64" not in text
    assert "i64" not in text


# Large leaves.


@pytest.mark.parametrize("frozen", marked(pytest.mark.seams, [False, True], False))
def test_large_leaves_are_split(frozen):
    mesh = mesh_of(4, 2)
    sharding = {"*.weight": P(None, "model"), "0.bias": P("model")}
    train = "*.bias" if frozen else None
    trainer = Chain(chain(3), optax.adam(1e-2), train=train)
    one = trainer.fit(CHAIN, 20)
    callback = lambda trainer, history: None
    many = trainer.fit(
        CHAIN,
        20,
        mesh=mesh,
        sharding=sharding,
        chunk=5,
        callback=callback,
    )
    np.testing.assert_allclose(many.history.loss, one.history.loss, rtol=1e-9)
    shape = lambda leaf: leaf.addressable_shards[0].data.shape
    for model in many.model, many.best:
        assert [shape(layer["weight"]) for layer in model] == [(8, 4)] * 3
        assert [shape(layer["bias"]) for layer in model] == [(4,), (8,), (8,)]
    moments = [x for x in jax.tree.leaves(many.trainer.opt_state) if x.ndim == 2]
    assert len(moments) == (0 if frozen else 6)
    assert {shape(moment) for moment in moments} <= {(8, 4)}
    again = many.trainer.fit(CHAIN, 5, mesh=mesh, sharding=sharding)
    whole = one.trainer.fit(CHAIN, 5)
    np.testing.assert_allclose(again.history.loss, whole.history.loss, rtol=1e-9)


class Sum(vn.Trainer):
    def loss(self, model, batch):
        return sum(jnp.sum(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(model))


def split_leaves(trainer, sharding):
    """The paths of all that is split, as it lies after a step."""
    after, _ = trainer.step(1.0, mesh=mesh_of(4, 2), sharding=sharding)
    flat, _ = jax.tree_util.tree_flatten_with_path(after)
    return {
        jax.tree_util.keystr(keys, simple=True, separator=".").removeprefix(
            "_progress."
        )
        for keys, leaf in flat
        if hasattr(leaf, "sharding") and not leaf.sharding.is_fully_replicated
    }


def of_adam(path):
    moments = [f"opt_state.0.{moment}" for moment in ("mu", "nu")]
    return {f"{node}.{path}".rstrip(".") for node in ("params", "best", *moments)}


def test_a_leaf_is_known_by_its_place():
    adam, spec, ones = optax.adam(0.1), P("model"), jnp.ones(8)
    assert split_leaves(Sum(ones, adam), {lambda *_: True: spec}) == of_adam("")
    twice = Sum({"w": ones, "a": {"w": ones}}, adam)
    assert split_leaves(twice, {"w": spec}) == of_adam("w")
    assert split_leaves(twice, {"a": spec}) == of_adam("a.w")
    frozen = Sum([ones, ones], adam, train="0")
    assert split_leaves(frozen, {"0": spec}) == of_adam("0")
    assert split_leaves(frozen, {"1": spec}) == {"_template.frozen.0"}


def test_what_lies_on_the_mesh_already_stays_there():
    class Shared(vn.Trainer):
        def residuals(self, model, batch):
            wavelengths, x, y = batch
            return jnp.sum(jnp.sin(wavelengths), 0) * model(x) - y

    x, y = line_batch(16)
    wavelengths = jnp.linspace(0, 1, 5)
    there = jax.device_put(wavelengths, NamedSharding(MESH, P()))
    trainer = Shared(line(), ADAM)
    one = trainer.fit((wavelengths, x, y), 9)
    many = trainer.fit((there, x, y), 9, mesh=MESH)
    close_on_one(many.trainer, one.trainer)


# Many trainers.


@functools.cache
def curves(count=8, lost=()):
    x, y, sigma = BATCH
    rows = np.asarray(y) * (1 + 0.1 * np.arange(count))[:, None]
    rows[list(lost)] = np.nan
    return x, jnp.asarray(rows), sigma


MANY = {
    "keys and minibatches, in parts": lambda: (
        [
            Drawn(gaussian(), ADAM, key=jax.random.key(i), state=jnp.zeros(()))
            for i in range(16)
        ],
        vn.Minibatches(BATCH, 5, key=jax.random.key(1)),
        {"batch": 8, "record": "mean"},
    ),
    # Each has a curve of its own, and ends at another step.
    "a stream of curves that stop": lambda: (
        starts(optax.adam(0.1)),
        vn.Stream(lambda step: (curves() for _ in range(step, 99))),
        {
            "data_axis": (None, 0, None),
            "validation": (curves(), 1),
            "stop": vn.Patience(2),
            "record": ("mean", "grad_norm"),
            "chunk": 7,
        },
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_many_on_devices(name):
    trainers, data, options = MANY[name]()
    one = vn.fit_many(trainers, data, 40, **options)
    _, data, _ = MANY[name]()
    many = vn.fit_many(trainers, data, 40, mesh=mesh_of(4), **options)
    close_on_one(many.trainers, one.trainers)
    same_histories(many.history, one.history)
    assert many.stop_reasons == one.stop_reasons
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-9)
    if name == "a stream of curves that stop":
        assert len(set(np.asarray(one.trainers.step_count).tolist())) > 3
        assert vn.StopReason.NO_PATIENCE in one.stop_reasons


def test_many_that_converged_on_devices_are_checked():
    trainers, options = starts(count=4), {"stop": vn.Converged(0.9, 2)}
    edms = [trainer.fit(BATCH, 9, **options).edm for trainer in trainers]
    many = vn.fit_many(trainers, BATCH, 9, mesh=mesh_of(2), batch=2, **options)
    assert many.stop_reasons == (vn.StopReason.STALLED,) * 4
    np.testing.assert_allclose(many.edms, edms, rtol=1e-9)
    with_mesh = trainers[0].fit(BATCH, 9, mesh=mesh_of(4), **options)
    assert with_mesh.stop_reason is vn.StopReason.STALLED
    np.testing.assert_allclose(with_mesh.edm, edms[0], rtol=1e-9)


def test_split_parameters_that_converged_are_not():
    trainer = Sum({"x": jnp.arange(8.0)}, optax.adam(1e-3))
    options = {"stop": vn.Converged(0.9, 2), "mesh": mesh_of(4, 2)}
    with pytest.warns(UserWarning, match="was not checked, since devices"):
        result = trainer.fit(1.0, 9, sharding={"x": P("model")}, **options)
    assert result.stop_reason is vn.StopReason.CONVERGED
    assert np.isnan(result.edm)


def solved(**options):
    trainers = [GaussianFit(t.model) for t in starts(count=16)]
    options |= {"data_axis": (None, 0, None), "solver": SOLVERS["LM"]}
    return vn.fit_many(trainers, curves(16, (3,)), 30, **options)


def test_many_solved_on_devices():
    """In parts; two processes solve all at once."""
    one, many = solved(), solved(mesh=MESH, batch=8)
    close_on_one(many.trainers.params, one.trainers.params, rtol=1e-6)
    assert many.stop_reasons == one.stop_reasons
    assert many.nan_report(3) == one.nan_report(3)
    assert many.stop_reasons[3] is vn.StopReason.NON_FINITE


# Checkpoints.


@pytest.mark.parametrize("widths", [(8, 8), (8, 2), (8, None), (None, 8)])
def test_a_fit_goes_on_with_other_devices(tmp_path, widths):
    trainer, data, options = FITS["minibatches"]()
    meshes = [None if width is None else mesh_of(width) for width in widths]
    checkpoints = vn.Checkpoints(tmp_path, every=5)
    options |= {"every": 1}
    keep = lambda mesh: {**options, "checkpoint": checkpoints, "mesh": mesh}
    trainer.fit(data, 11, **keep(meshes[0]))
    parts = trainer.fit(data, 30, **keep(meshes[1]))
    last = tmp_path / "steps" / "30"
    written = last.stat().st_mtime_ns
    again = trainer.fit(data, 30, **keep(meshes[1]))
    assert again.stop_reason is vn.StopReason.TAKEN_BEFORE
    assert last.stat().st_mtime_ns == written
    close_on_one(again.trainer, parts.trainer)
    whole = trainer.fit(data, 30, **options)
    close_on_one(parts.trainer, whole.trainer)
    same_histories(parts.history, whole.history)
    assert len(parts.history) == 30


def test_a_large_criterion_goes_on_with_other_devices(tmp_path):
    keep = {"checkpoint": vn.Checkpoints(tmp_path)}
    trainer, stop = GaussianFit(gaussian(), ADAM), Settled()
    trainer.fit(BATCH, 5, stop=stop, mesh=MESH, **keep)
    parts = trainer.fit(BATCH, 9, stop=stop, **keep)
    close_on_one(parts.trainer, trainer.fit(BATCH, 9).trainer)


# Programs.


@functools.cache
def alone():
    return GaussianFit(gaussian(), vn.ParamOptimiser(RULES)).fit(BATCH, 12).trainer


@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_on_devices_compile_once(width):
    traces = []

    class Counted(GaussianFit):
        def residuals(self, model, batch):
            traces.append(1)
            return super().residuals(model, batch)

    mesh = mesh_of(width)
    trainer = Counted(gaussian(), vn.ParamOptimiser(RULES))
    callback = lambda trainer, history: trainer
    options = {"mesh": mesh, "chunk": 3, "callback": callback}
    stop = vn.Converged(0.0, 99)
    vn.forget()
    before = cache_size(run_chunk)
    parts = trainer.fit(BATCH, 12, stop=stop, **options)
    parts.trainer.fit(BATCH, 5, stop=stop, **options)
    assert len(traces) == 1
    assert cache_size(run_chunk) == before + 1
    close_on_one(parts.trainer.params, alone().params)


def test_chunks_of_split_leaves_compile_once():
    trainer = Chain(chain(3), optax.adam(1e-2))
    specs = P("model", None), P(None, None), P(("data", "model"))
    sharding = {f"{index}.weight": spec for index, spec in enumerate(specs)}
    vn.forget()
    before = cache_size(run_chunk)
    options = {"mesh": mesh_of(4, 2), "sharding": sharding, "chunk": 2}
    trainer.fit(CHAIN, 6, callback=lambda t, h: None, **options)
    assert cache_size(run_chunk) == before + 1


# What cannot be.


MISTAKES: Mapping = {
    "no mesh": (lambda fit: fit(mesh=8), TypeError, "`mesh` is 8.*jax.make_mesh"),
    "tail": (
        lambda fit: fit(gaussian_batch(26), mesh=MESH),
        ValueError,
        r"`mesh`: `data\[0\]` has the shape \(26,\), and the 8 devices "
        r"along the axis 'data' cannot share its 26 rows evenly. Leave out 2",
    ),
    "minibatches": (
        lambda fit: fit(vn.Minibatches(BATCH, 6, key=jax.random.key(0)), mesh=MESH),
        ValueError,
        "Minibatches of size 6 cannot be shared.*multiple of 8",
    ),
    "stream": (
        lambda fit: fit(vn.Stream([gaussian_batch(9)]), mesh=MESH),
        ValueError,
        r"`data\[0\]`.*9 rows",
    ),
    "validation": (
        lambda fit: fit(validation=(gaussian_batch(9), 2), mesh=MESH),
        ValueError,
        r"`validation\[0\]`.*9 rows",
    ),
    "alone": (
        lambda fit: fit(sharding={"mean": P("data")}),
        ValueError,
        "`sharding` is for a mesh",
    ),
    "list": (
        lambda fit: fit(mesh=MESH, sharding=[P("data")]),
        TypeError,
        "must be a dictionary of selectors",
    ),
    "spec": (
        lambda fit: fit(mesh=MESH, sharding={"mean": "data"}),
        TypeError,
        "that of 'mean' is 'data', but must be a `jax.sharding.PartitionSpec`",
    ),
    "path": (
        lambda fit: fit(mesh=MESH, sharding={"maen": P()}),
        vn.UnknownPathError,
        "`sharding`.*'maen'.*'mean'",
    ),
    "axes": (
        lambda fit: fit(mesh=MESH, sharding={"mean": P("data")}),
        ValueError,
        r"'mean', of shape \(\), cannot be split by.*more entries",
    ),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, error, match = MISTAKES[name]
    trainer = GaussianFit(gaussian(), ADAM)

    def fit(data=BATCH, **options):
        return trainer.fit(data, 3, **options)

    with pytest.raises(error, match=f"(?s){match}"):
        make(fit)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (P("modle"), "the axes of the mesh are 'data', 'model'"),
        (P("model"), "2 devices cannot share an axis of 9 evenly"),
        (P(("data", "model")), "4 devices cannot share"),
        (P(("model", "model")), "which names an axis of the mesh twice"),
    ],
)
def test_leaves_that_cannot_be_split(spec, match):
    trainer = LineFit(line(jnp.zeros(9), 0.0), ADAM)
    with pytest.raises(ValueError, match=f"'slope', of shape \\(9,\\).*{match}"):
        trainer.step(line_batch(), mesh=mesh_of(2, 2), sharding={"slope": spec})


@pytest.mark.parametrize("options", [{}, {"solver": SOLVERS["LM"]}])
def test_trainers_that_cannot_be_spread(options):
    trainers = starts(count=6)
    with pytest.raises(ValueError, match="`mesh`: 6 trainers cannot be spread evenly"):
        vn.fit_many(trainers, BATCH, 3, mesh=MESH, **options)
    with pytest.raises(ValueError, match="`batch`, 3 trainers, cannot be spread"):
        vn.fit_many(trainers, BATCH, 3, mesh=mesh_of(2), batch=3, **options)
