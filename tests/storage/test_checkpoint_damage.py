"""A directory of checkpoints of which any file is lost or damaged."""

import functools
import gc
import random
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inside
import vernal as vn
from models import same

# Orbax's own: it closes a loop of events that something waits in.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True, scope="module")
def collect():
    """Makes what is left of these loops be seen here, and not in another file."""
    yield
    gc.collect()


STEPS = 40


class Broad(vn.Trainer):
    """Some parameters are written by themselves, and others together."""

    def loss(self, model, batch):
        return sum(jnp.sum((leaf - batch) ** 2) for leaf in model.values())


@functools.cache
def trainer():
    model = {"broad": jnp.linspace(0.0, 1.0, 10_000), "small": jnp.ones(3)}
    return Broad(model, optax.adam(0.01))


def fit(steps, directory=None, keep=2):
    kept = directory and vn.Checkpoints(directory, every=1_000, keep=keep)
    return trainer().fit(
        jnp.asarray(0.5),
        steps,
        record="small",
        validation=(jnp.asarray(0.3), 5),
        stop=vn.Patience(50),
        chunk=10,
        checkpoint=kept,
    )


@pytest.fixture(scope="module")
def expected():
    return fit(STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with checkpoints at the steps 20 and 30."""
    directory = tmp_path_factory.mktemp("whole") / "fit"
    fit(20, directory)
    fit(30, directory)
    return directory


RNG = random.Random(0)


def flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[RNG.randrange(len(content))] ^= 1 << RNG.randrange(8)
    path.write_bytes(content)


def into_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "lost": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "garbage": lambda path: path.write_bytes(RNG.randbytes(path.stat().st_size + 8)),
    "folder": into_folder,
}


def files(directory):
    """Those of the checkpoint of step 30, and those of all."""
    found = [path.relative_to(directory) for path in sorted(directory.rglob("*"))]
    newest = [path for path in found if (directory / path).is_file()]
    return [path for path in newest if path.parts[:2] != ("steps", "20")]


def require_part(history, expected):
    """What is left of a history must be as it was."""
    for steps, names in (
        ("steps", ("loss", "small")),
        ("validation_steps", ("validation",)),
    ):
        rows = np.isin(expected[steps], history[steps])
        assert len(set(history[steps])) == len(history[steps]) == rows.sum()
        for name in names:
            np.testing.assert_array_equal(history[name], expected[name][rows])


@pytest.mark.parametrize("name", DAMAGES)
def test_any_file(name, whole, expected, tmp_path):
    """The fit goes on to the same bits, or says what is in its way.

    Orbax sees that one of its files is damaged: each meets one damage, and that which
    it may not see.
    """
    own = [file for file in files(whole) if file.parts[0] != "steps"]
    others = [file for file in files(whole) if file.parts[0] == "steps"]
    if name != "flipped":
        seen = [damage for damage in DAMAGES if damage != "flipped"]
        others = others[seen.index(name) :: len(seen)]
    for number, file in enumerate(own + others):
        copy = shutil.copytree(whole, tmp_path / str(number))
        DAMAGES[name](copy / file)
        if name == "folder" and file.name in ("vernal.json", "lock"):
            with pytest.raises(IsADirectoryError, match=r"`checkpoint`: .*remove what"):
                fit(STEPS, copy)
        else:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = fit(STEPS, copy)
            assert same(result.trainer, expected.trainer), file
            require_part(result.history, expected.history)
            is_whole = same(result.history, expected.history)
            assert is_whole == (not any("are lost" in str(one) for one in told)), file


def damage_rows(directory, first, last):
    """Damages rows of a history of which 30 were written."""
    path = directory / "history.bin"
    content = bytearray(path.read_bytes())
    size = len(content) // 30
    content[first * size : last * size] = bytes((last - first) * size)
    path.write_bytes(content)


def test_rows_that_are_lost(whole, expected, tmp_path):
    """Those that no checkpoint can make again; all others are there."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    damage_rows(copy, 0, 2)
    damage_rows(copy, 7, 8)
    told = r"3 of 30 rows \(before step 2; after step 6 and before step 8\) are lost"
    with pytest.warns(UserWarning, match=rf"{told}.*state of step 30 is whole"):
        history = fit(STEPS, copy).history
    left = [step for step in range(STEPS) if step not in (0, 1, 7)]
    np.testing.assert_array_equal(history.steps, left)
    require_part(history, expected.history)
    with pytest.warns(UserWarning, match="3 of 40 rows"):
        again = fit(STEPS, copy)
    assert same(again.history, history)


def test_rows_that_are_made_again(whole, expected, tmp_path):
    """Those after the checkpoint before."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    damage_rows(copy, 22, 30)
    told = r"step 30 .*its history lacks 8 of 30 rows \(after step 21\)"
    with pytest.warns(UserWarning, match=told):
        result = fit(STEPS, copy)
    assert same((result.trainer, result.history), (expected.trainer, expected.history))


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "flipped"])
def test_the_only_checkpoint(name, tmp_path):
    fit(10, tmp_path)
    state = tmp_path / "steps" / "10" / "state"
    for file in ("_METADATA", "manifest.ocdbt"):
        DAMAGES[name](state / file)
    with pytest.raises(vn.DamagedFileError, match=r"none of the 1 .*another directory"):
        fit(20, tmp_path)


@pytest.mark.parametrize("marker", [b"[]", b"3", b"null", b"[" * 10_000, b"\xff\xfe"])
def test_a_marker_of_anything(marker, whole, expected, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "vernal.json").write_bytes(marker)
    assert same(fit(STEPS, copy).trainer, expected.trainer)
    # It is as it should be now.
    assert (copy / "vernal.json").read_bytes() == (whole / "vernal.json").read_bytes()


@pytest.mark.parametrize("names", [["steps"], ["history.bin", "thesis.tex"], ["torn"]])
def test_one_sign_alone(names, tmp_path):
    """A folder of somebody else's may have one such name in it."""
    for name in names:
        (tmp_path / name).write_text("all of it")
    with pytest.raises(ValueError, match="holds something else"):
        fit(10, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize("count", range(4))
def test_killed_at_its_beginning(count, tmp_path):
    """The first run of all, which has made some of the names."""
    for name in ("lock", "steps", "vernal.new")[:count]:
        (tmp_path / name).mkdir() if name == "steps" else (tmp_path / name).touch()
    assert int(fit(10, tmp_path).trainer.step_count) == 10
    assert {path.name for path in tmp_path.iterdir()} == {
        *("lock", "steps", "vernal.json", "history.bin", "validation.bin")
    }


def test_a_later_version(whole, tmp_path, monkeypatch):
    """It is known by its checkpoints too."""
    copy = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(inside.CHECKPOINT_FORMAT, 99)
        fit(10, copy)
    with pytest.raises(vn.NewerFormatError, match="Upgrade"):
        fit(20, copy)
