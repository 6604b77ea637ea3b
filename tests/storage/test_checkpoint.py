"""`Checkpoints`: a fit that is killed loses nothing."""

import contextlib
import datetime
import errno
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inside
import long_fit
import scripts
import vernal as vn
from models import GaussianFit, gaussian, gaussian_batch, same, same_results

BATCH = gaussian_batch()
PAUSE = 0.003


def trainer(rate=1e-3, optimiser=None, **options):
    rules = {("mean", "std"): optax.adam(rate), "power": optax.sgd(rate, momentum=0.9)}
    return GaussianFit(gaussian(), optimiser or vn.ParamOptimiser(rules), **options)


def fit(steps, directory=None, made=None, data=BATCH, **options):
    checkpoint = None if directory is None else vn.Checkpoints(directory, every=1)
    options = {"chunk": 7, **options}
    made = plain() if made is None else made
    return made.fit(data, steps, checkpoint=checkpoint, **options)


@functools.cache
def plain():
    return trainer()


@functools.cache
def uninterrupted(steps):
    return fit(steps)


class Process:
    """A long fit in a process of its own."""

    def __init__(self, folder):
        arguments = [str(folder / "steps"), str(folder / "result"), str(PAUSE)]
        self.run = subprocess.Popen(
            [sys.executable, long_fit.__file__, *arguments], stdout=subprocess.DEVNULL
        )

    def end(self):
        self.run.kill()
        return self.run.wait(120)


class Fork:
    """The same, with vernal imported before it begins."""

    def __init__(self, folder, pause=PAUSE):
        arguments = [str(folder / "steps"), str(folder / "result"), str(pause)]
        self.log = folder / "log"
        self.run = scripts.started(long_fit.__file__, *arguments, log=self.log)

    def steps(self):
        """Those that it has told of, one at least."""
        whole = lambda: self.log.read_text().split("\n")[:-1]
        while not (told := [*filter(str.isdecimal, whole())]):
            assert self.run.is_alive(), self.log.read_text()
            time.sleep(0.01)
        return [*map(int, told)]

    def end(self, number=signal.SIGKILL):
        os.kill(self.run.pid, number)
        self.run.join(120)
        return self.run.exitcode


@pytest.mark.loose_dtypes
def test_killed_many_times(tmp_path):
    """In the middle of anything: importing, restoring, stepping, writing."""
    rng, stepped, begun = random.Random(0), 0, 0
    for kill in range(3):
        if kill == 1:
            process = Process(tmp_path)
            time.sleep(rng.uniform(0.5, 2.5))
            code = process.end()
        else:
            process = Fork(tmp_path)
            before, begun = begun, process.steps()[0]
            assert begun >= before
            stepped += 1
            time.sleep(rng.uniform(0.0, 1.0))
            code = process.end()
        assert code == -signal.SIGKILL
    assert stepped == 2, "it was done too soon"
    assert begun > 5, "it began anew each time"
    assert Fork(tmp_path, pause=0).end(0) == 0
    expected = long_fit.fit()
    result = vn.load(tmp_path / "result", expected)
    assert same(result, expected)
    assert result.trainer.nan_report() == expected.trainer.nan_report()
    assert expected.trainer.nan_report()["offset"].total == 12


@pytest.mark.seams
def test_told_to_end(tmp_path):
    """What a cluster does before it takes a machine away."""
    process = Fork(tmp_path)
    process.steps()
    time.sleep(0.3)
    assert process.end(signal.SIGTERM) == -signal.SIGTERM
    assert not (tmp_path / "result").exists()
    assert int(newest(tmp_path / "steps").name) >= process.steps()[-1] > 5


def test_a_program_that_heeds_the_signal_itself(tmp_path):
    heard = []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("end"))
    try:
        end = lambda trainer, history: signal.raise_signal(signal.SIGTERM)
        result = fit(100, tmp_path, callback=end)
        assert heard == ["end"]
        assert result.stop_reason is vn.StopReason.TERMINATED
        assert same_results(fit(100, tmp_path), uninterrupted(100))
    finally:
        signal.signal(signal.SIGTERM, old)


WAYS = {
    "rules": lambda: trainer(),
    "policy": lambda: trainer(nan_policy=vn.SkipStep() | vn.StopAfter(3)),
    "whitened": lambda: GaussianFit(gaussian()).whiten(
        BATCH, optimiser=optax.adam(0.1)
    ),
    "large": lambda: _Wide({"a": jnp.ones(20_000), "b": jnp.ones(2)}, optax.adam(0.1)),
}


class _Wide(vn.Trainer):
    def loss(self, model, batch):
        return jnp.sum(jnp.square(model["a"])) + jnp.sum(jnp.square(model["b"]))


def one_way(name, steps, **options):
    options |= {"chunk": 10, "record": ("grad_norm",), "every": 3}
    return WAYS[name]().fit(BATCH, steps, **options)


@functools.cache
def in_one_part(name):
    return one_way(name, 50)


OFTEN = 1, datetime.timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("name", "every"),
    [
        pytest.param("rules", 25, marks=pytest.mark.seams),
        ("policy", 25),
        ("whitened", 25),
        pytest.param("large", 25, marks=pytest.mark.seams),
        *(("rules", every) for every in OFTEN),
        *(("large", every) for every in OFTEN),
    ],
)
def test_in_two_parts(name, every, tmp_path):
    checkpoints = vn.Checkpoints(tmp_path, every, keep=1)
    one_way(name, 30, checkpoint=checkpoints)
    result = one_way(name, 50, checkpoint=checkpoints)
    assert same_results(result, in_one_part(name))
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


def test_a_trainer_that_has_steps_behind_it(tmp_path):
    older = fit(13).trainer
    fit(10, tmp_path, older)
    assert same_results(fit(30, tmp_path, older), fit(30, made=older))


def test_fewer_steps_than_were_taken(tmp_path):
    done = fit(50, tmp_path)
    said = "there are 50 steps of this fit, and it asks for 20: the result is that of"
    with pytest.warns(UserWarning, match=said):
        again = fit(20, tmp_path)
    assert again.stop_reason is vn.StopReason.TAKEN_BEFORE
    assert same_results(again, done)


def test_another_thinning(tmp_path):
    """The steps say which rows there are; the state is the same."""
    fit(20, tmp_path, every=3)
    result, whole = fit(40, tmp_path, every=5), uninterrupted(40)
    assert same(result.trainer, whole.trainer)
    steps = [*range(0, 20, 3), *range(20, 40, 5)]
    np.testing.assert_array_equal(result.history.steps, steps)
    np.testing.assert_array_equal(result.history.loss, whole.history.loss[steps])


def test_other_rates_and_another_policy(tmp_path):
    fit(10, tmp_path)
    result = fit(20, tmp_path, trainer(0.5, nan_policy=vn.SkipStep() | vn.StopAfter(2)))
    assert result.trainer.step_count == 20


def test_a_stream_goes_on_at_its_step(tmp_path):
    x, y, sigma = BATCH
    batches = lambda step: ((x, y + 0.01 * k, sigma) for k in range(step, 100))
    fit(20, tmp_path, data=vn.Stream(batches))
    result = fit(50, tmp_path, data=vn.Stream(batches))
    assert same_results(result, fit(50, data=vn.Stream(batches)))


def test_a_fit_that_was_stopped_stays_so(tmp_path):
    x, y, sigma = BATCH
    bad = x, y.at[0].set(jnp.nan), sigma
    first = fit(20, tmp_path, data=bad)
    assert first.stop_reason is vn.StopReason.NON_FINITE
    again = fit(20, tmp_path, data=bad)
    assert again.stop_reason is vn.StopReason.NON_FINITE
    assert same(again.trainer, first.trainer)


# Torn on purpose.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "fit"
    fit(30, directory)
    fit(40, directory)
    return directory


def newest(directory):
    return max((directory / "steps").iterdir(), key=lambda path: int(path.name))


def tear_small(directory):
    for path in newest(directory).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tear_empty(directory):
    for path in newest(directory).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def tear_meta(directory):
    for path in (newest(directory) / "meta").rglob("*"):
        path.unlink()


def tear_history(directory):
    log = directory / "history.bin"
    log.write_bytes(log.read_bytes()[:-1])


@pytest.mark.seams
@pytest.mark.parametrize("tear", [tear_small, tear_empty, tear_meta, tear_history])
def test_the_newest_that_is_whole(tear, whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert newest(copy).name == "40"
    tear(copy)
    with pytest.warns(UserWarning, match="step 40 .* is not whole"):
        result = fit(50, copy)
    assert same_results(result, uninterrupted(50))
    assert same_results(fit(50, copy), result)
    assert [path.name[:3] for path in (copy / "torn").iterdir()] == ["40-"]


@pytest.mark.filterwarnings("ignore:The checkpoint of step")
def test_none_that_is_whole(tmp_path):
    seldom = vn.Checkpoints(tmp_path, every=1_000)
    plain().fit(BATCH, 20, checkpoint=seldom)
    log = (tmp_path / "history.bin").read_bytes()
    tear_small(tmp_path)
    with pytest.raises(vn.DamagedFileError, match=r"none of the 1 .*step 20"):
        fit(40, tmp_path)
    assert (tmp_path / "history.bin").read_bytes() == log


def test_as_many_as_are_to_be_kept(tmp_path):
    for steps in (10, 20, 30, 40):
        checkpoints = vn.Checkpoints(tmp_path, every=1_000, keep=2)
        plain().fit(BATCH, steps, checkpoint=checkpoints)
    kept = sorted(int(path.name) for path in (tmp_path / "steps").iterdir())
    assert kept == [30, 40]


class Broad(vn.Trainer):
    """Enough parameters to be written as an array of their own."""

    def loss(self, model, batch):
        return jnp.sum((model - batch) ** 2)


@functools.cache
def broad_trainer():
    return Broad(jnp.linspace(0.0, 1.0, 20_000), optax.adam(0.01))


def broad(**options):
    return broad_trainer().fit(jnp.asarray(0.5), chunk=5, **options)


@pytest.fixture(scope="module")
def whole_of_broad(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "fit"
    for steps in (10, 20):
        broad(steps=steps, checkpoint=vn.Checkpoints(directory, every=1_000))
    return directory


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.seams), 1, 2, 3])
def test_flipped_bits_in_large_arrays(seed, whole_of_broad, tmp_path):
    copy = shutil.copytree(whole_of_broad, tmp_path / "copy")
    data = max(newest(copy).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    rng = np.random.default_rng(seed)
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    data.write_bytes(content)
    with pytest.warns(UserWarning, match="step 20 .* is not whole"):
        result = broad(steps=20, checkpoint=vn.Checkpoints(copy))
    assert same(result.trainer, broad(steps=20).trainer)


@contextlib.contextmanager
def files_no_larger_than(size):
    """As on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Orbax's own: it closes a loop of events that something waits in.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [200, 20_000])
def test_a_disk_that_is_full(size, tmp_path, capfd):
    """The history does not find room, or it does and the parameters do not."""
    checkpoints = vn.Checkpoints(tmp_path, every=1_000)
    broad(steps=10, checkpoint=checkpoints)
    with (
        files_no_larger_than(size),
        pytest.raises(OSError, match=r"(?s)`checkpoint`: .*Make room") as caught,
    ):
        broad(steps=40, checkpoint=checkpoints)
    assert same(caught.value.result.trainer, broad(steps=40).trainer)
    assert "Traceback" not in capfd.readouterr().err
    result = broad(steps=40, checkpoint=checkpoints)
    assert same(result.trainer, broad(steps=40).trainer)
    np.testing.assert_array_equal(result.history.steps, range(40))


def test_a_history_that_was_written_in_part(tmp_path):
    """The next rows are written over what a failed write has left behind."""

    def callback(trainer, history):
        if trainer.step_count == 15:
            with (tmp_path / "history.bin").open("ab") as file:
                file.write(b"half a row")

    checkpoints = vn.Checkpoints(tmp_path, every=5)
    broad(steps=20, checkpoint=checkpoints, callback=callback)
    history = broad(steps=30, checkpoint=checkpoints).history
    np.testing.assert_array_equal(history.steps, range(30))
    np.testing.assert_array_equal(history.loss, broad(steps=30).history.loss)


def test_errors_that_say_nothing_of_the_file(tmp_path, monkeypatch):
    fit(20, tmp_path)

    def read(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(inside.READ_ARRAYS, read)
        with pytest.raises(OSError, match="Too many"):
            fit(30, tmp_path)
    assert not (tmp_path / "torn").exists()
    assert same_results(fit(30, tmp_path), uninterrupted(30))


def test_a_callback_that_goes_back(tmp_path):
    """What was written of the way that was given up is not gone on from."""
    kept = []

    def callback(trainer, history):
        kept.append(trainer)
        return kept[0] if trainer.step_count == 20 and len(kept) == 4 else None

    run = lambda steps: broad(
        steps=steps, checkpoint=vn.Checkpoints(tmp_path, every=5), callback=callback
    )
    first = run(20)
    assert int(first.trainer.step_count) == 5
    again = broad(steps=5, checkpoint=vn.Checkpoints(tmp_path))
    assert same(again.trainer, first.trainer)


def test_a_criterion_is_known_by_its_values(tmp_path):
    class Countdown(vn.StopCriterion):
        start: jax.Array

        def init(self, params):
            return self.start

        def apply(self, view, state):
            return state <= 1, state - 1

    run = lambda steps, start: broad(
        steps=steps,
        stop=Countdown(jnp.asarray(start)),
        checkpoint=vn.Checkpoints(tmp_path),
    )
    run(10, 12)
    assert int(run(30, 12).trainer.step_count) == 12
    # Another one counts from its own beginning.
    assert int(run(30, 7).trainer.step_count) == 19


def test_small_dtypes_are_recorded(tmp_path):
    class Small(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum((model - batch) ** 2).astype(float)

    def run(steps, **options):
        trainer = Small(jnp.asarray([1.0, 2.0], jnp.bfloat16), optax.sgd(0.01))
        options |= {"record": lambda path, leaf: True}
        return trainer.fit(jnp.asarray(0.5), steps, **options)

    run(5, checkpoint=vn.Checkpoints(tmp_path))
    kept = run(9, checkpoint=vn.Checkpoints(tmp_path)).history
    whole = run(9).history
    (name,) = whole.records
    assert kept[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept[name], whole[name])


# Errors.


def test_a_callback_that_raises(tmp_path):
    def fail(trainer, history):
        if trainer.step_count >= 21:
            raise RuntimeError("no more ink")

    with pytest.raises(RuntimeError, match="no more ink") as caught:
        fit(50, callback=fail)
    assert same_results(caught.value.result, uninterrupted(21))
    assert caught.value.result.stop_reason is vn.StopReason.ERROR
    assert "`.result`" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="no more ink"):
        fit(50, tmp_path, callback=fail)
    assert same_results(fit(50, tmp_path), uninterrupted(50))


def test_another_model_or_optimiser(tmp_path):
    fit(10, tmp_path)
    with pytest.raises(vn.MismatchError, match=r"opt_state.*Make the model"):
        fit(20, tmp_path, trainer(optimiser=optax.sgd(0.1)))
    with pytest.raises(vn.MismatchError, match=r"'params.mean' is float64\[\] there"):
        fit(20, tmp_path, _Wide({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.sgd(0.1)))
    with pytest.raises(vn.MismatchError, match="Give the same `record`"):
        fit(20, tmp_path, record=("mean",))
    assert same_results(fit(20, tmp_path), uninterrupted(20))


def test_a_directory_that_another_fit_writes_to(tmp_path):
    def meanwhile(trainer, history):
        with pytest.raises(ValueError, match="another fit is writing"):
            fit(5, tmp_path)

    assert fit(10, tmp_path, callback=meanwhile).trainer.step_count == 10


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="holds something else"):
        fit(10, tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(10, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Root may write anywhere: the refusal has to be made.
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(PermissionError) as caught:
        fit(10, tmp_path / "new")
    assert "cannot be written to" in str(caught.value)


def test_a_fit_at_an_earlier_step(tmp_path):
    fit(10, tmp_path)
    with pytest.raises(ValueError, match="at step 10, and the trainer is at step 20"):
        fit(30, tmp_path, fit(20).trainer)


MISTAKES = {
    "every 0": ({"every": 0}, ValueError, "`every` is 0"),
    "no time": ({"every": datetime.timedelta(0)}, ValueError, "`every` is 0:00:00"),
    "half a step": ({"every": 0.5}, TypeError, "`every`"),
    "keep 0": ({"keep": 0}, ValueError, "`keep` is 0"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    options, error, match = MISTAKES[name]
    with pytest.raises(error, match=match):
        vn.Checkpoints(tmp_path, **options)


NOWHERE = {
    "an address": ("gs://bucket/run", ValueError, "Mount the store"),
    "of another store": ("s3+http://host/run", ValueError, "Mount the store"),
    "as a path": (Path("gs://bucket/run"), ValueError, "Mount the store"),
    "empty": ("", ValueError, "must name a directory"),
    "blank": (" ", ValueError, "must name a directory"),
    "a null byte": ("a\0b", ValueError, "no file can be called"),
    "nobody's home": ("~nobody-at-all/run", ValueError, "no such home"),
    "none": (None, TypeError, "a string or a `pathlib.Path`"),
    "bytes": (b"runs", TypeError, "a string or a `pathlib.Path`"),
    "a number": (3, TypeError, "a string or a `pathlib.Path`"),
}


@pytest.mark.own_words
@pytest.mark.parametrize("name", NOWHERE)
def test_what_names_no_directory(name):
    directory, error, match = NOWHERE[name]
    with pytest.raises(error, match=f"`directory` is .*{match}"):
        vn.Checkpoints(directory)


def test_names_of_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/runs", "runs", Path("runs"), tmp_path / "runs", "./runs"):
        assert vn.Checkpoints(name).directory == tmp_path / "runs"
    # One letter may be a drive.
    assert vn.Checkpoints("c:/runs").directory.name == "runs"


@pytest.mark.own_words
def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match=r"must be `vn\.Checkpoints"):
        trainer().fit(BATCH, 3, checkpoint=str(tmp_path))
    with pytest.raises(TypeError, match="a function of the step"):
        fit(3, tmp_path, data=vn.Stream([BATCH] * 3))
