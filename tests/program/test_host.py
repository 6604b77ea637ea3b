"""What a call of a program costs the host, and the errors that reach it from there."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import vernal as vn
from vernal._program import is_of_host, program, words_of
from vernal._program.host import calls_host

BATCH = np.arange(3.0)


class Slope(vn.Trainer):
    def residuals(self, model, batch):
        return model["w"] * batch - 6 * batch


class Fragile(vn.Trainer):
    def residuals(self, model, batch):
        batch = eqx.error_if(batch, self.step_count == 2, "the lamp has gone")
        return model["w"] * batch


def made(kind):
    return kind({"w": jnp.ones(())}, optax.adam(0.1))


RUNS = {
    "step": lambda trainer, batch: trainer.step(batch),
    "fit": lambda trainer, batch: trainer.fit(batch, 10, chunk=5),
    "stream": lambda trainer, batch: trainer.fit(vn.Stream([batch] * 10), 10),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_warm_call_traces_nothing_and_moves_few_numbers(run, monkeypatch):
    trainer, batch, counts = made(Slope), jnp.asarray(BATCH), {}
    RUNS[run](trainer, batch)

    def counted(name):
        fn = getattr(jax, name)

        def count(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return fn(*args, **kwargs)

        monkeypatch.setattr(jax, name, count)

    for name in ("eval_shape", "device_put", "make_jaxpr", "jit"):
        counted(name)
    RUNS[run](trainer, batch)
    # A fit puts two numbers onto the device, `every` and the mark of its data, and for
    # each chunk where it ends.
    chunks = {"step": 0, "fit": 2, "stream": 10}[run]
    assert counts == ({"device_put": 2 + chunks} if chunks else {})


def test_a_warm_step_flattens_the_trainer_once(monkeypatch):
    trainer, batch = made(Slope), jnp.asarray(BATCH)
    trainer, _ = trainer.step(batch)
    flattened, flatten = [], jax.tree.flatten

    def count(tree, *args, **kwargs):
        flattened.append(len(jax.tree.leaves(tree)))
        return flatten(tree, *args, **kwargs)

    monkeypatch.setattr(jax.tree, "flatten", count)
    trainer.step(batch)
    # The batch, and then all.
    assert flattened == [1, len(jax.tree.leaves((trainer, batch)))]


def called(x):
    return jax.pure_callback(lambda x: x, x, x)


PROGRAMS = {
    "arithmetic": (lambda x: x + 1, False),
    "a condition": (lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x), False),
    "a callback": (called, True),
    "one within jit": (lambda x: jax.jit(called)(x), True),
    "one within a condition": (
        lambda x: jax.lax.cond(x > 0, called, lambda x: x, x),
        True,
    ),
    "one within a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, x: called(x), x),
        True,
    ),
    "an error": (lambda x: eqx.error_if(x, x > 0, "positive"), True),
    "a message": (lambda x: (jax.debug.print("{}", x), x)[1], True),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_which_programs_call_the_host(kind):
    fn, expected = PROGRAMS[kind]
    assert calls_host(jax.make_jaxpr(fn)(jnp.ones(()))) is expected


def test_an_error_on_the_device_is_that_of_equinox_in_each_call(caplog):
    trainer = made(Fragile)
    for _ in range(2):
        at_two = trainer.step(BATCH)[0].step(BATCH)[0]
        with (
            caplog.at_level(logging.DEBUG, "jax._src.callback"),
            pytest.raises(RuntimeError, match="the lamp has gone") as caught,
        ):
            at_two.step(BATCH)
        assert type(caught.value).__name__ == "EquinoxRuntimeError"
    assert not [r for r in caplog.records if r.name == "jax._src.callback"]


def looked_up(x):
    if np.any(x > 1):
        raise OSError("the table ends at 1\n  in both columns")
    return np.asarray(x)


def of_two_callbacks(x):
    return jax.pure_callback(looked_up, x, jax.pure_callback(lambda x: x, x, x))


RAISES = {
    "pure_callback": lambda x: jax.pure_callback(looked_up, x, x),
    "io_callback": lambda x: io_callback(looked_up, x, x),
    "an ordered io_callback": lambda x: io_callback(looked_up, x, x, ordered=True),
    "one after another": of_two_callbacks,
    "error_if": lambda x: eqx.error_if(x, x > 1, "the table ends at 1\n  or so"),
}


@pytest.mark.parametrize("kind", RAISES)
def test_what_the_host_raises_is_a_runtime_error_in_each_call(kind, caplog):
    run = program(RAISES[kind])
    for value in (5.0, 0.5, 5.0):
        if value < 1:
            assert run(jnp.asarray(value)) == value
            continue
        with (
            caplog.at_level(logging.DEBUG, "jax._src.callback"),
            pytest.raises(RuntimeError, match="the table ends at 1") as caught,
        ):
            run(jnp.asarray(value))
        own = "" if kind == "error_if" else "OSError: "
        assert words_of(caught.value) == f"{own}the table ends at 1"
        assert is_of_host(caught.value)
    assert not [r for r in caplog.records if r.name == "jax._src.callback"]


def test_an_error_in_the_making_of_a_program_is_as_it_was_raised():
    def fail(x):
        raise ValueError("INTERNAL affairs: no.")

    with pytest.raises(ValueError, match="INTERNAL affairs"):
        program(fail)(jnp.ones(()))
    assert words_of(KeyError("name")) == "'name'"
    assert not is_of_host(jax.errors.JaxRuntimeError("INTERNAL: connection lost"))


def test_what_is_not_an_array_comes_back_too():
    describe = program(lambda x: {"name": "x", "twice": 2 * x, "none": None})
    for value in (1.0, 2.0):
        found = describe(jnp.asarray(value))
        assert found == {"name": "x", "twice": 2 * value, "none": None}
