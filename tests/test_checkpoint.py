"""`Checkpoints`: a fit that is killed loses nothing."""

import datetime
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import long_fit
import vernal as vn
from models import GaussianFit, gaussian, gaussian_batch, same

BATCH = gaussian_batch()
PAUSE = 0.003


def trainer(rate=1e-3, optimiser=None, **options):
    rules = {("mean", "std"): optax.adam(rate), "power": optax.sgd(rate, momentum=0.9)}
    return GaussianFit(gaussian(), optimiser or vn.ParamOptimiser(rules), **options)


def fit(steps, directory=None, made=None, data=BATCH, **options):
    checkpoint = None if directory is None else vn.Checkpoints(directory, every=1)
    options = {"chunk": 7, "progress": False, **options}
    made = trainer() if made is None else made
    return made.fit(data, steps, checkpoint=checkpoint, **options)


def alike(result, expected):
    return same((result.trainer, result.history), (expected.trainer, expected.history))


class Process:
    """A long fit in a process of its own."""

    def __init__(self, folder, pause=PAUSE):
        script = Path(long_fit.__file__)
        arguments = [str(folder / "steps"), str(folder / "result"), str(pause)]
        self.run = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True
        )

    def until_it_steps(self):
        return bool(self.run.stdout.readline())

    def end(self, number):
        self.run.send_signal(number)
        self.run.stdout.read()
        code = self.run.wait(60)
        self.run.stdout.close()
        return code


def test_killed_twenty_times(tmp_path):
    """In the middle of anything: importing, restoring, stepping, writing."""
    rng, stepped = random.Random(0), 0
    for kill in range(20):
        process = Process(tmp_path)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.5, 2.0))
        elif process.until_it_steps():
            stepped += 1
            time.sleep(rng.uniform(0.0, 0.4))
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
    assert stepped == 16, "it was done too soon"
    last = Process(tmp_path, pause=0)
    assert last.run.wait(120) == 0
    last.run.stdout.close()
    expected = long_fit.fit()
    result = vn.load(tmp_path / "result", expected)
    assert same(result, expected)
    assert result.trainer.nan_report() == expected.trainer.nan_report()
    assert expected.trainer.nan_report()["offset"].total == 12


def test_told_to_end(tmp_path):
    """What a cluster does before it takes a machine away."""
    process = Process(tmp_path)
    process.until_it_steps()
    time.sleep(0.3)
    assert process.end(signal.SIGTERM) == -signal.SIGTERM
    assert not (tmp_path / "result").exists()
    again = Process(tmp_path)
    first = int(again.run.stdout.readline())
    assert again.end(signal.SIGTERM) == -signal.SIGTERM
    assert first > 5


def test_a_program_that_heeds_the_signal_itself(tmp_path):
    heard = []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("end"))
    try:
        end = lambda trainer, history: signal.raise_signal(signal.SIGTERM)
        result = fit(100, tmp_path, callback=end)
        assert heard == ["end"]
        assert result.stop_reason is vn.StopReason.TERMINATED
        assert alike(fit(100, tmp_path), fit(100))
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


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("every", [1, 25, datetime.timedelta(microseconds=1)])
def test_in_two_parts(name, every, tmp_path):
    make = WAYS[name]
    checkpoints = vn.Checkpoints(tmp_path, every, keep=1)
    options = {"chunk": 10, "progress": False, "record": ("grad_norm",), "every": 3}
    make().fit(BATCH, 50, checkpoint=checkpoints, **options)
    result = make().fit(BATCH, 80, checkpoint=checkpoints, **options)
    assert alike(result, make().fit(BATCH, 80, **options))
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


def test_a_trainer_that_has_steps_behind_it(tmp_path):
    older = fit(13).trainer
    fit(10, tmp_path, older)
    assert alike(fit(30, tmp_path, older), fit(30, made=older))


def test_fewer_steps_than_were_taken(tmp_path):
    done = fit(50, tmp_path)
    again = fit(20, tmp_path)
    assert again.stop_reason is vn.StopReason.TAKEN_BEFORE
    assert alike(again, done)


def test_other_rates_and_another_policy(tmp_path):
    fit(10, tmp_path)
    result = fit(20, tmp_path, trainer(0.5, nan_policy=vn.SkipStep() | vn.StopAfter(2)))
    assert result.trainer.step_count == 20


def test_a_stream_goes_on_at_its_step(tmp_path):
    x, y, sigma = BATCH
    batches = lambda step: ((x, y + 0.01 * k, sigma) for k in range(step, 100))
    fit(20, tmp_path, data=vn.Stream(batches))
    result = fit(50, tmp_path, data=vn.Stream(batches))
    assert alike(result, fit(50, data=vn.Stream(batches)))


def test_a_fit_that_was_stopped_stays_so(tmp_path):
    x, y, sigma = BATCH
    bad = x, y.at[0].set(jnp.nan), sigma
    first = fit(20, tmp_path, data=bad)
    assert first.stop_reason is vn.StopReason.NON_FINITE
    again = fit(20, tmp_path, data=bad)
    assert again.stop_reason is vn.StopReason.NON_FINITE
    assert same(again.trainer, first.trainer)


# Torn on purpose.


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


@pytest.mark.parametrize("tear", [tear_small, tear_empty, tear_meta, tear_history])
def test_the_newest_that_is_whole(tear, tmp_path):
    fit(30, tmp_path)
    fit(40, tmp_path)
    assert newest(tmp_path).name == "40"
    tear(tmp_path)
    with pytest.warns(UserWarning, match="step 40 .* is not whole"):
        result = fit(60, tmp_path)
    assert alike(result, fit(60))
    assert alike(fit(60, tmp_path), result)
    assert [path.name[:3] for path in (tmp_path / "torn").iterdir()] == ["40-"]


@pytest.mark.filterwarnings("ignore:The checkpoint of step")
def test_none_that_is_whole(tmp_path):
    seldom = vn.Checkpoints(tmp_path, every=1_000)
    trainer().fit(BATCH, 20, checkpoint=seldom, progress=False)
    log = (tmp_path / "history.bin").read_bytes()
    tear_small(tmp_path)
    with pytest.raises(vn.DamagedFileError, match=r"none of the 1 .*torn now"):
        fit(40, tmp_path)
    assert (tmp_path / "history.bin").read_bytes() == log


def test_as_many_as_are_to_be_kept(tmp_path):
    for steps in (10, 20, 30, 40):
        checkpoints = vn.Checkpoints(tmp_path, every=1_000, keep=2)
        trainer().fit(BATCH, steps, checkpoint=checkpoints, progress=False)
    kept = sorted(int(path.name) for path in (tmp_path / "steps").iterdir())
    assert kept == [30, 40]


# Errors.


def test_a_callback_that_raises(tmp_path):
    def fail(trainer, history):
        if trainer.step_count >= 21:
            raise RuntimeError("no more ink")

    with pytest.raises(RuntimeError, match="no more ink") as caught:
        fit(50, callback=fail)
    assert alike(caught.value.result, fit(21))
    assert caught.value.result.stop_reason is vn.StopReason.ERROR
    assert "`.result`" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="no more ink"):
        fit(50, tmp_path, callback=fail)
    assert alike(fit(50, tmp_path), fit(50))


def test_another_model_or_optimiser(tmp_path):
    fit(10, tmp_path)
    with pytest.raises(vn.MismatchError, match=r"opt_state.*Make the model"):
        fit(20, tmp_path, trainer(optimiser=optax.sgd(0.1)))
    with pytest.raises(vn.MismatchError, match=r"'params.mean' is float64\[\] there"):
        fit(20, tmp_path, _Wide({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.sgd(0.1)))
    with pytest.raises(vn.MismatchError, match="Give the same `record`"):
        fit(20, tmp_path, record=("mean",))
    assert alike(fit(20, tmp_path), fit(20))


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
    assert "cannot be written to" in caught.value.__notes__[0]


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


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    options, error, match = MISTAKES[name]
    with pytest.raises(error, match=match):
        vn.Checkpoints(tmp_path, **options)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(TypeError, match=r"must be `vn\.Checkpoints"):
        trainer().fit(BATCH, 3, checkpoint=str(tmp_path))
    with pytest.raises(TypeError, match="a function of the step"):
        fit(3, tmp_path, data=vn.Stream([BATCH] * 3))


def test_without_orbax(tmp_path):
    script = f"""
import sys
sys.modules["orbax"] = sys.modules["orbax.checkpoint"] = None
import vernal
vernal.Checkpoints({str(tmp_path)!r})
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ImportError: `Checkpoints` needs Orbax" in done.stderr
