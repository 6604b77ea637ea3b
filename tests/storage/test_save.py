"""`save` and `load`: a file that is whole, or an error that says what it is."""

import builtins
import functools
import json
import pathlib
import pickle
import resource
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import vernal as vn
from marked import marked
from models import (
    GaussianFit,
    LineFit,
    gaussian,
    gaussian_batch,
    line,
    line_batch,
    same,
    zoo,
)

BATCH = gaussian_batch()


def rules(rate=1e-2):
    return vn.ParamOptimiser(
        {
            ("mean", "std"): optax.adam(rate),
            "power": vn.window(optax.sgd(rate, momentum=0.9), start=3),
        }
    )


def rules_of_line():
    return vn.ParamOptimiser({"slope": optax.adam(0.05), "offset": optax.sgd(1e-3)})


def trainer(optimiser=None, **options):
    return GaussianFit(gaussian(), optimiser or rules(), **options)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fit.vernal"


VARIANTS = {
    "rules": lambda: trainer(),
    "policy with a state": lambda: trainer(nan_policy=vn.SkipStep() | vn.StopAfter(2)),
    "projector": lambda: GaussianFit(gaussian()).whiten(
        BATCH, optimiser=optax.adam(0.1)
    ),
    "blocks": lambda: trainer().whiten(BATCH, blocks=(("mean", "std"), "power")),
    "line search": lambda: trainer(optax.lbfgs()),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    "name", marked(pytest.mark.seams, VARIANTS, "rules", "line search")
)
def test_steps_save_load_steps(name, file):
    made = VARIANTS[name]()
    half = made.fit(BATCH, 5).trainer
    vn.save(file, half)
    loaded = vn.load(file, made)
    assert same(loaded, half)
    assert same(loaded.fit(BATCH, 7).trainer, half.fit(BATCH, 7).trainer)


@pytest.mark.seams
def test_rates_and_policy_come_from_the_program(file):
    vn.save(file, trainer().fit(BATCH, 5).trainer)
    like = trainer(rules(0.5), nan_policy=vn.ZeroNans() | vn.StopAfter(3))
    loaded = vn.load(file, like)
    assert loaded.nan_policy == like.nan_policy
    assert same(loaded.optimiser, like.optimiser)
    assert loaded.step_count == 5
    assert loaded.fit(BATCH, 3).trainer.step_count == 8


@pytest.mark.seams
def test_moments_can_start_anew(file):
    old = trainer().fit(BATCH, 5).trainer
    vn.save(file, old)
    loaded = vn.load(file, trainer(), reset=("opt_state",))
    assert same(loaded.params, old.params)
    assert same(loaded.opt_state, trainer().opt_state)
    other = vn.load(file, trainer(optax.sgd(1e-3)), reset="opt_state")
    assert same(other.best, old.best)
    fresh = vn.load(file, trainer(), reset=("best", "nan_report", "step_count"))
    assert fresh.step_count == 0
    assert np.isinf(fresh.best_loss)
    assert same(fresh.opt_state, old.opt_state)


PARTS = ("opt_state", "best", "nan_report", "policy_state", "step_count")


@functools.cache
def two():
    """Two trainers that are stacked, and each of them."""
    policy = vn.SkipStep() | vn.StopAfter(2)
    stacked = vn.fit_many(
        [LineFit(line(x), rules_of_line(), nan_policy=policy) for x in (0.0, 1.0)],
        line_batch(),
        5,
    ).trainers
    pick = lambda index: jax.tree.map(lambda x: x[index] if x.ndim else x, stacked)
    return stacked, [pick(0), pick(1)]


@pytest.mark.parametrize("part", marked(pytest.mark.seams, [*PARTS, PARTS], PARTS))
def test_each_of_many_can_start_anew(part, file):
    """To the same as if it were loaded alone."""
    stacked, ones = two()
    vn.save(file, stacked)
    loaded = vn.load(file, stacked, reset=part)
    for index, one in enumerate(ones):
        vn.save(file, one)
        alone = vn.load(file, one, reset=part)
        for name in ("params", "best", "best_loss", "opt_state", "step_count"):
            each = jax.tree.map(lambda x, i=index: x[i], getattr(loaded, name))
            assert same(each, getattr(alone, name)), name
    assert vn.fit_many(loaded, line_batch(), 3).trainers.step_count.shape == (2,)


class Tied(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model["slope"] * x + model["offset"] - y


def tied(optimiser, high=9.0):
    model = {"slope": jnp.array(0.5), "offset": jnp.array(1.0)}
    ties = {"offset": lambda m: 2 * m["slope"]}
    return Tied(model, optimiser, ties=ties, bounds={"slope": (-9.0, high)})


LM = optx.LevenbergMarquardt(1e-8, 1e-8)


def test_only_one_of_two_is_whitened(file):
    """It is said how to make the other."""
    plain, white = trainer(), trainer().whiten(BATCH)
    vn.save(file, white)
    with pytest.raises(vn.MismatchError, match=r"give `like\.whiten\(batch\)`"):
        vn.load(file, plain)
    vn.load(file, plain.whiten(BATCH))
    vn.save(file, plain)
    with pytest.raises(vn.MismatchError, match="before `whiten`"):
        vn.load(file, white)


@pytest.mark.parametrize("solver", [None, LM], ids=["fit", "solve"])
@pytest.mark.parametrize("is_alike", [True, False])
def test_many_are_loaded_into_one_that_is_stacked(solver, is_alike, file):
    optimiser = optax.adam(0.1) if solver is None else None
    options = {"data_axis": (None, 0)} | ({} if solver is None else {"solver": solver})
    highs = (9.0,) * 3 if is_alike else (9.0, 8.0, 7.0)
    trainers = [tied(optimiser, high) for high in highs]
    x = np.linspace(0.0, 1.0, 9)
    data = x, np.stack([2 * x + i for i in range(3)])
    fitted = vn.fit_many(trainers, data, 20, **options).trainers
    vn.save(file, fitted)
    one = tied(optimiser)
    with pytest.raises(vn.MismatchError, match=r"3 members.*`eqx\.filter_vmap\("):
        vn.load(file, one)
    if is_alike:
        like = eqx.filter_vmap(lambda: one, axis_size=3)()
    else:
        like = vn.fit_many(trainers, data, 0 if solver is None else 1, **options)
        like = like.trainers
    loaded = vn.load(file, like)
    assert same(loaded, fitted)
    again, on = (vn.fit_many(x, data, 5, **options) for x in (loaded, fitted))
    assert same(again.trainers, on.trainers)


@pytest.mark.seams
def test_counts_of_what_was_not_finite_are_kept(file):
    x, y, sigma = BATCH
    bad = trainer(nan_policy=vn.SkipStep()).fit((x, y.at[0].set(jnp.nan), sigma), 4)
    vn.save(file, bad.trainer)
    loaded = vn.load(file, trainer(nan_policy=vn.SkipStep()))
    assert loaded.nan_report() == bad.trainer.nan_report()


TREES = {
    "every kind of leaf": zoo,
    "one array": lambda: jnp.arange(3.0),
    "nothing": lambda: {"a": None},
    "empty arrays": lambda: {"a": jnp.zeros((0, 3)), "b": np.zeros(0, np.int8)},
    "small dtypes": lambda: {
        "bf": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "scalar": jnp.asarray(0.5, jnp.bfloat16),
        "f8": jnp.asarray([0.5, 4.0], jnp.float8_e4m3fn),
        "i4": jnp.asarray([-3, 7], jnp.int4),
        "f16": np.asarray([1, 2], np.float16),
    },
    "keys": lambda: [jax.random.key(3), jax.random.split(jax.random.key(4), 2)],
    "keys of another kind": lambda: [jax.random.key(3, impl="rbg")],
    "numbers": lambda: {"a": 1, "b": 2.5, "c": True, "d": 1 + 2j, "e": "text"},
    "special values": lambda: jnp.asarray([jnp.nan, jnp.inf, -0.0, 5e-324]),
    "one path twice": lambda: {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}},
    "odd names": lambda: {"../x": jnp.ones(1), "a/b": jnp.ones(2), "": jnp.ones(3)},
    "unordered memory": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


@pytest.mark.seams
@pytest.mark.parametrize("name", TREES)
def test_any_tree(name, file):
    tree = TREES[name]()
    vn.save(file, tree)
    loaded = vn.load(file, jax.tree.map(lambda x: x, tree))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert same(loaded, tree)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True):
        assert type(old) is type(new)
        if not hasattr(old, "dtype"):
            assert old == new


def test_the_file_says_what_is_in_it(file):
    vn.save(file, trainer().fit(BATCH, 2).trainer)
    header = json.loads(zipfile.ZipFile(file).read("vernal.json"))
    assert header["format"] == 1
    assert header["written_by"].startswith("vernal ")
    leaves = {leaf["path"]: leaf for leaf in header["leaves"]}
    assert leaves["params.mean"] == {
        "path": "params.mean",
        "shape": [],
        "dtype": "float64",
    }
    assert int(np.load(file, allow_pickle=False)["step_count"]) == 2


# What is wrong with a file.


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"some text", pickle.dumps({"a": 1}), bytes(1000)],
    ids=["empty", "two letters", "text", "pickle", "zeros"],
)
def test_a_foreign_file(content, file):
    file.write_bytes(content)
    with pytest.raises(vn.ForeignFileError, match="not a file that"):
        vn.load(file, trainer())


def test_an_archive_of_someone_else(file):
    np.savez(file.with_suffix(".npz"), a=np.ones(3))
    with pytest.raises(vn.ForeignFileError, match="not a file that"):
        vn.load(file.with_suffix(".npz"), trainer())


def test_a_file_of_a_later_version(tmp_path, file):
    vn.save(file, trainer())
    old = zipfile.ZipFile(file)
    header = json.loads(old.read("vernal.json")) | {
        "format": 7,
        "written_by": "vernal 9.9",
    }
    newer = tmp_path / "newer"
    with zipfile.ZipFile(newer, "w") as archive:
        archive.writestr("vernal.json", json.dumps(header))
    with pytest.raises(vn.NewerFormatError, match=r"vernal 9\.9.*Upgrade"):
        vn.load(newer, trainer())


def test_no_code_is_run(file):
    array = np.asarray([print], dtype=object)
    with zipfile.ZipFile(file, "w") as archive:
        leaf = {"path": "a", "shape": [1], "dtype": "float64"}
        header = {"format": 1, "written_by": "x", "leaves": [leaf]}
        archive.writestr("vernal.json", json.dumps(header))
        with archive.open("a.npy", "w") as member:
            np.lib.format.write_array(member, array, allow_pickle=True)
    with pytest.raises(vn.DamagedFileError):
        vn.load(file, {"a": jnp.ones(1)})


MISMATCHES = {
    "another model": (lambda: LineFit(line(), optax.sgd(0.1)), "params.mean"),
    "another optimiser": (lambda: trainer(optax.sgd(0.1)), "opt_state"),
    "fewer parameters": (
        lambda: trainer(optax.adam(0.1), train="mean"),
        "'params.std' is float64.. there and absent here",
    ),
    "another dtype": (
        lambda: GaussianFit(
            jax.tree.map(lambda x: x.astype("float32"), gaussian()), rules()
        ),
        "'params.mean' is float64.. there and float32.. here",
    ),
    "a projector": (VARIANTS["blocks"], "projector"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_tree(name, file):
    make, match = MISMATCHES[name]
    vn.save(file, trainer())
    with pytest.raises(vn.MismatchError, match=match):
        vn.load(file, make())


WRONG_KINDS = {
    "of a trainer, into a model": (
        trainer,
        gaussian,
        r"holds a trainer.*`vn\.load\(path, trainer\)\.model`",
    ),
    "of many, into a model": (
        lambda: eqx.filter_vmap(trainer, axis_size=2)(),
        gaussian,
        "holds a trainer",
    ),
    "of a model, into a trainer": (
        gaussian,
        trainer,
        r"holds no trainer.*`trainer\.replace\(model=vn\.load\(path, trainer\.model",
    ),
    "of nothing, into a trainer": (dict, trainer, "holds no trainer"),
    "of a result, into a trainer": (
        lambda: trainer().fit(BATCH, 1),
        trainer,
        r"holds a tree with a `trainer`, such as a result.*`result\.trainer` alone",
    ),
    "of a result, into a model": (
        lambda: trainer().fit(BATCH, 1),
        gaussian,
        "holds a tree with a `trainer`, such as a result",
    ),
    "of many results, into a trainer": (
        lambda: vn.fit_many([trainer()], BATCH, 1),
        trainer,
        "holds a tree with a `trainers`",
    ),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_a_file_of_another_kind(name, file):
    saved, like, said = WRONG_KINDS[name]
    vn.save(file, saved())
    with pytest.raises(vn.MismatchError, match=said):
        vn.load(file, like())


def test_names_of_a_trainer_in_a_tree(file):
    result = trainer().fit(BATCH, 1)
    for tree in ({"step_count": 3, "best_loss": 1.0}, {"trainer": trainer()}, result):
        vn.save(file, tree)
        assert same(vn.load(file, tree), tree)


def test_another_shape(file):
    vn.save(file, {"a": jnp.ones(3), "b": 1})
    with pytest.raises(vn.MismatchError, match=r"'a' is float64\[3\] there.*\[4\]"):
        vn.load(file, {"a": jnp.ones(4), "b": 1})
    with pytest.raises(vn.MismatchError, match=r"'b' is a Python int .* Python float"):
        vn.load(file, {"a": jnp.ones(3), "b": 1.0})


def test_reset_of_what_there_is_not(file):
    vn.save(file, trainer())
    with pytest.raises(ValueError, match=r"'optstate'.*Did you mean 'opt_state'"):
        vn.load(file, trainer(), reset=("optstate",))
    vn.save(file, {"a": jnp.ones(1)})
    with pytest.raises(ValueError, match="`reset` is for trainers"):
        vn.load(file, {"a": jnp.ones(1)}, reset=("a",))


def test_where_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path`: there is no file"):
        vn.load(tmp_path / "none", trainer())
    with pytest.raises(IsADirectoryError, match=r"`path`: .* is a folder"):
        vn.load(tmp_path, trainer())
    with pytest.raises(FileNotFoundError, match="Make it first"):
        vn.save(tmp_path / "none" / "fit", trainer())
    with pytest.raises(IsADirectoryError, match="folder"):
        vn.save(tmp_path, trainer())


@pytest.mark.parametrize("size", [0, 100, 2000, 6000])
def test_a_failed_write_leaves_the_old_file_whole(size, tmp_path, file):
    vn.save(file, trainer())
    before, newer = file.read_bytes(), trainer().fit(BATCH, 3).trainer
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            vn.save(file, newer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "as it was" in caught.value.__notes__[0]
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_no_permission(tmp_path, file, monkeypatch):
    vn.save(file, trainer())
    before = file.read_bytes()

    open_file = pathlib.Path.open

    def refuse(path, *args, **kwargs):
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *args, **kwargs)

    # Root may write anywhere: the refusal has to be made.
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError) as caught:
        vn.save(file, trainer().fit(BATCH, 3).trainer)
    monkeypatch.undo()
    assert caught.value.__notes__[0].startswith(f"`path`: {file} could not be written")
    with builtins.open(file, "rb") as same_file:
        assert same_file.read() == before


def test_a_link_stays_one(tmp_path, file):
    target = tmp_path / "target"
    vn.save(target, trainer())
    file.symlink_to(target)
    newer = trainer().fit(BATCH, 3).trainer
    vn.save(file, newer)
    assert file.is_symlink()
    assert same(vn.load(target, trainer()), newer)
