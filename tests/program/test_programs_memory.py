"""Which programs are kept: those in use, and of those for new classes the last ones."""

import gc
import random
import sys
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import alike
import vernal as vn
from inside import cache_size
from vernal._loop.chunk import run_chunk
from vernal._program import programs as _programs, shelves as _shelves
from vernal._program.programs import program, version_of
from vernal._program.shelves import MOST_KINDS, MOST_MISSED, Shelves

X = jnp.arange(3.0)
MOST, RECORDS = 3, 32


@pytest.fixture(autouse=True)
def few_of_a_kind(monkeypatch):
    """It takes long to compile as many as are kept otherwise."""
    monkeypatch.setattr(_shelves, "MOST_OF_A_KIND", MOST)


class Model(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return self.weight * x


def own_model(factor=1.0):
    class Own(Model):
        def __call__(self, x):
            return factor * super().__call__(x)

    return Own(jnp.ones(()))


def own_function(factor):
    return vn.fit(lambda model, x: factor * jnp.sum(model(x)), *PLAIN).trainer


PLAIN = Model(jnp.ones(())), optax.sgd(0.1), X, 0


def own_program():
    traces = []

    def call(model, x):
        traces.append(1)
        return model(x)

    return program(call), traces


def executables():
    alike.forget()
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


MADE = {
    "classes": own_model,
    "a cell": lambda factor: run_cell(factor),
    "functions": lambda factor: jax.tree_util.Partial(lambda x: factor * x),
    "closures": own_function,
}


def run_cell(factor):
    cell = "class Own(Model):\n    def __call__(self, x): return FACTOR * x"
    names = {"Model": Model, "FACTOR": factor, "__name__": "__main__"}
    exec(cell, names)
    return names["Own"](jnp.ones(()))


def called(made, x):
    return made.model(x) if isinstance(made, vn.Trainer) else made(x)


def test_programs_of_what_is_gone_go():
    runs = {kind: program(called) for kind in MADE}

    def use(factors):
        for kind, run in runs.items():
            for factor in factors:
                run(MADE[kind](float(factor)), X)

    use(range(MOST))
    before = executables()
    use(range(100, 100 + MOST))
    assert {kind: cache_size(run) for kind, run in runs.items()} == dict.fromkeys(
        MADE, MOST
    )
    assert executables() <= before + 2


def test_fits_of_what_is_gone_go():
    vn.forget()
    counts = []
    for factor in range(MOST + 1):
        loss = lambda model, x, factor=float(factor): factor * jnp.sum(model(x))
        vn.fit(loss, *PLAIN[:3], 1)
        counts.append(cache_size(run_chunk))
    assert max(counts) == MOST


def test_what_is_used_in_turns_is_compiled_once():
    run, traces = own_program()
    models = [own_model() for _ in range(MOST)]
    for _ in range(2):
        for model in models:
            run(model, X)
    assert len(traces) == len(models)


def test_what_is_used_in_turns_with_very_many_is_kept_in_the_end():
    run, traces = own_program()
    models = [own_model() for _ in range(MOST + 4)]
    for _ in range(4):
        for model in models:
            run(model, X)
    assert len(traces) <= 2 * len(models)


def test_a_program_in_use_outlives_those_that_are_not():
    run, traces = own_program()
    mine = own_model()
    for _ in range(MOST + 2):
        run(mine, X)
        run(own_model(), X)
    assert len(traces) == 1 + MOST + 2


def test_what_was_missed_once_is_kept():
    run, traces = own_program()
    mine = own_model()
    for _ in range(3):
        run(mine, X)
        for _ in range(MOST):
            run(own_model(), X)
    assert len(traces) == 2 + 3 * MOST


def test_other_names_are_another_kind():
    run, traces = own_program()
    run(Model(jnp.ones(())), X)
    for _ in range(MOST):
        run(own_model(), X)
    run(Model(jnp.ones(())), X)
    assert len(traces) == 1 + MOST


def test_what_code_read_is_let_go_with_its_program():
    class Settings:
        scale = 2.0

    def own(settings):
        return jax.tree_util.Partial(lambda x: settings.scale * x)

    run, first = program(called), Settings()
    run(own(first), X)
    dead = weakref.ref(first)
    del first
    for _ in range(MOST):
        run(own(Settings()), X)
    gc.collect()
    assert dead() is None


def test_shelves_hold_no_more_than_they_may():
    gone = []
    shelves = Shelves(lambda key, value: gone.append(key))
    count = 2 * MOST_MISSED
    for _ in range(3):
        for key in range(count):
            assert shelves.get(key) in (None, f"value {key}")
            assert shelves.put(key, f"value {key}", "kind") == f"value {key}"
    assert len(shelves.items()) <= MOST_MISSED + MOST
    assert len(gone) + len(shelves.items()) >= count
    shelves.clear()
    assert not shelves.items()
    assert shelves.get(0) is None


def test_names_that_are_new_each_time():
    gone = []
    shelves = Shelves(lambda key, value: gone.append(key))
    shelves.put("mine", "mine", "my kind")
    for number in range(2 * MOST_KINDS):
        shelves.put(number, number, f"kind {number}")
        assert shelves.get("mine") == "mine"
    assert len(shelves.items()) == MOST_KINDS
    assert gone == [*range(MOST_KINDS + 1)]
    # Those that are used in turns are kept in the end.
    for _ in range(3):
        for number in range(2 * MOST_KINDS):
            shelves.get(number) or shelves.put(number, number, f"kind {number}")
    assert {*range(2 * MOST_KINDS)} <= dict(shelves.items()).keys()


def shelved():
    shelves = Shelves(lambda key, value: None)
    keys = range(6 * MOST)

    def use(number):
        key = keys[number % len(keys)]
        assert shelves.get(key) in (None, -key)
        shelves.put(key, -key, key % 3)
        if number % 500 == 0:
            shelves.clear()

    return use


def recorded():
    own = [own_function_of(factor) for factor in range(2 * RECORDS)]
    return lambda number: version_of(own[number % len(own)])


def own_function_of(factor):
    return lambda x: factor * x


@pytest.mark.parametrize("shared", [shelved, recorded])
def test_threads_that_use_all_at_once(shared, monkeypatch):
    monkeypatch.setattr(_programs, "_MOST_RECORDS", RECORDS)
    use, errors = shared(), []

    def work(seed):
        numbers = random.Random(seed)
        try:
            for _ in range(2_000):
                use(numbers.randrange(10_000))
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors
