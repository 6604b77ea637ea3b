"""Several fits at once, in threads of one process."""

import logging
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import optax
import pytest

import vernal as vn
from models import same_results

X = jnp.linspace(-1.0, 1.0, 20)
STEPS = 30


class Line(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return (model["slope"] * x + model["offset"] - y) * jnp.mean(model["many"])


def trainer(number):
    # Every third one has an array that is large enough to be written by itself.
    many = jnp.ones(3 if number % 3 else 10_000)
    model = {"slope": jnp.asarray(number / 8), "offset": jnp.asarray(0.0), "many": many}
    rules = {"slope": optax.adam(0.01 * (number + 1)), "offset": optax.sgd(0.01)}
    return Line(model, vn.ParamOptimiser(rules), nan_policy=vn.SkipStep())


def batch(number):
    return X, 2 * X + number


def whole(number):
    return {"data": batch(number), "record": ("slope",)}


def minibatches(number):
    data = vn.Minibatches(batch(number), 7, key=jax.random.key(number))
    return {"data": data, "validation": (batch(number), 5), "stop": vn.Patience(10)}


def stream(number):
    def batches(step):
        return ((X, (2 + 0.1 * k) * X + number) for k in range(step, 99))

    return {"data": vn.Stream(batches)}


KINDS = (whole, minibatches, stream)


def fit(number, directory=None, steps=STEPS, every=5, **options):
    """Fits the trainer of a number to the data of this number."""
    if directory is not None:
        options["checkpoint"] = vn.Checkpoints(directory / str(number), every=every)
    options = {"chunk": 5, **KINDS[number % 3](number), **options}
    data = options.pop("data")
    return trainer(number).fit(data, steps, **options)


def at_once(count, fn):
    """Calls `fn(number)` for each number in a thread of its own."""
    answers = [None] * count

    def call(number):
        try:
            answers[number] = fn(number)
        except BaseException as error:
            answers[number] = error

    # Daemons, so that a deadlock fails the test, and does not hold up the run.
    threads = [
        threading.Thread(target=call, args=(number,), daemon=True)
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return answers


@pytest.fixture(scope="module")
def expected():
    """The same fits, one after the other."""
    return [fit(number) for number in range(8)]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "orbax")]
    state = lambda: (
        [(logger.level, logger.disabled, [*logger.filters]) for logger in loggers],
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    )
    before, threads = state(), threading.enumerate()
    yield
    assert state() == before
    # One of the test before may end only now, and one of this test a moment later.
    new = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in new:
        thread.join(10)
    assert not [thread for thread in new if thread.is_alive()]


# Four at once are below.
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("kept", [False, True])
def test_fits_at_once(count, kept, expected, tmp_path):
    results = at_once(count, lambda n: fit(n, tmp_path if kept else None))
    for result, alone in zip(results, expected[:count], strict=True):
        assert same_results(result, alone)


def test_fits_that_go_on_at_once(expected, tmp_path):
    at_once(4, lambda n: fit(n, tmp_path, steps=15))
    results = at_once(4, lambda n: fit(n, tmp_path))
    for result, alone in zip(results, expected[:4], strict=True):
        assert same_results(result, alone)


def test_what_is_compiled_at_once():
    """The first of its class, and so nothing of it is there yet."""

    class New(Line):
        pass

    run = lambda _: New({k: jnp.ones(()) for k in ("slope", "offset", "many")}).replace(
        optimiser=optax.adam(0.1)
    )
    results = at_once(4, lambda n: run(n).fit(batch(0), 10))
    assert all(same_results(result, results[0]) for result in results)
    assert float(results[0].model["slope"]) != 1.0


def test_none_waits_for_another(tmp_path):
    """Each is in the same chunk as the others: no lock is held from one to the next."""
    meeting = threading.Barrier(3, timeout=60)

    def meet(trainer, history):
        meeting.wait()

    results = at_once(3, lambda n: fit(n, tmp_path, 10, every=1, callback=meet))
    assert [int(result.trainer.step_count) for result in results] == [10] * 3


def test_one_that_fails_harms_no_other(expected, tmp_path):
    def fail(trainer, history):
        if trainer.step_count == 15:
            raise RuntimeError("no more ink")

    run = lambda n: fit(n, tmp_path, callback=fail if n == 1 else None)
    results = at_once(4, run)
    assert isinstance(results[1], RuntimeError)
    assert all(same_results(results[n], expected[n]) for n in (0, 2, 3))
    assert same_results(fit(1, tmp_path), expected[1])


def test_one_directory_is_for_one_of_them(tmp_path):
    begun, over = threading.Event(), threading.Event()

    def first(trainer, history):
        begun.set()
        assert over.wait(60)

    def run(number):
        if number == 0:
            return fit(0, tmp_path, callback=first)
        assert begun.wait(60)
        try:
            return fit(0, tmp_path)
        finally:
            over.set()

    done, refused = at_once(2, run)
    assert int(done.trainer.step_count) == STEPS
    assert isinstance(refused, ValueError)
    assert "another fit is writing" in str(refused)


def test_logs_of_others_are_heard(tmp_path, caplog):
    """While fits overlap, and after the one that began first has ended."""
    logger = logging.getLogger("absl")
    ended = threading.Event()

    def speak(trainer, history):
        logger.warning("of the user's own")

    def last(trainer, history):
        assert ended.wait(60)
        speak(trainer, history)

    def run(number):
        try:
            return fit(number, tmp_path, 5, callback=last if number else speak)
        finally:
            if not number:
                ended.set()

    assert [int(result.trainer.step_count) for result in at_once(2, run)] == [5, 5]
    assert [record.message for record in caplog.records] == ["of the user's own"] * 2


def test_bars_of_several_threads(expected, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    # It would start a thread, which watches all bars and stays.
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    results = at_once(4, lambda n: fit(n, progress=True))
    assert all(same_results(results[n], expected[n]) for n in range(4))
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


# Signals reach the main thread alone.


def test_a_fit_within_a_fit(tmp_path, expected):
    """Both end at a SIGTERM that comes in the inner one, and then the program hears."""
    heard, inner = [], []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("end"))
    end = lambda trainer, history: signal.raise_signal(signal.SIGTERM)

    def within(trainer, history):
        inner.append(fit(1, tmp_path, callback=end))

    try:
        outer = fit(0, tmp_path, callback=within)
        assert heard == ["end"]
    finally:
        signal.signal(signal.SIGTERM, old)
    reasons = [inner[0].stop_reason, outer.stop_reason]
    assert reasons == [vn.StopReason.TERMINATED] * 2
    assert [int(r.trainer.step_count) for r in (inner[0], outer)] == [5, 5]
    assert all(same_results(fit(n, tmp_path), expected[n]) for n in range(2))


def test_a_fit_beside_the_main_thread(tmp_path, expected):
    """What is sent to the program is none of its business."""
    begun, go_on, heard, results = threading.Event(), threading.Event(), [], []

    def wait(trainer, history):
        begun.set()
        assert go_on.wait(60)

    run = lambda: results.append(fit(0, tmp_path, callback=wait))
    thread = threading.Thread(target=run, daemon=True)
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("end"))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
        go_on.set()
        thread.join(60)
    assert heard == ["end"]
    assert same_results(results[0], expected[0])
