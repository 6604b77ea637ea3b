"""Faults on purpose: hundreds of runs that draw theirs, and one in a million steps."""

import functools as ft
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inside
import vernal as vn
from models import at, poisoned, same

STEPS = 8
FAULTS = (np.nan, np.inf, -np.inf)

# A gradient of this size, itself finite, makes an update that is not: one for each.
MARKS = (2.0**33, 2.0**34, 2.0**35)
# One of this size makes moments that are not.
OVERFLOW = {"float32": 1e37, "float64": 1e307}

START = {
    "a": np.asarray([3.0, -1.0], "float32"),
    "b": np.asarray(0.5, "float64"),
    "c": {"d": np.asarray([[2.0, -3.0], [4.0, 0.0]], "float32")},
}
LEAVES = dict(zip(("a", "b", "c.d"), jax.tree.leaves(START), strict=True))
NAMES = ("loss", *LEAVES, "update")


def start():
    return jax.tree.map(jnp.asarray, START)


def distance(params):
    parts = (jnp.sum((leaf - 1.5) ** 2) for leaf in jax.tree.leaves(params))
    return sum(part.astype("float64") for part in parts)


def flat(state):
    """All numbers of an optimiser's state, exactly, in one vector."""
    leaves = [jnp.ravel(leaf).astype("float64") for leaf in jax.tree.leaves(state)]
    return jnp.concatenate(leaves)


FLAT = jax.jit(flat)


@jax.custom_vjp
def faulted(value, fault):
    """`value` itself, with `fault` for a gradient wherever that is not zero."""
    return value


faulted.defvjp(
    lambda value, fault: (value, fault),
    lambda fault, grad: (jnp.where(fault == 0, grad, fault), jnp.zeros_like(fault)),
)


@jax.jit  # a fit looks at the metrics of its loss, which is then not traced anew
def faulty(model, batch, step):
    loss, grads = at(batch, step)
    value = distance(jax.tree.map(faulted, model, grads))
    return value + jax.lax.stop_gradient(loss)


class FaultyFit(vn.Trainer):
    """Its batch says what goes wrong at which step."""

    def loss(self, model, batch):
        loss = faulty(model, batch, self.step_count)
        return loss, {"state": FLAT(self.opt_state)}


# What is fitted with, and what is done about faults.


def breaking(tx):
    """Makes the updates of `tx` not finite where a gradient is one of the marks."""

    def broken(update, grad):
        for fault, mark in zip(FAULTS, MARKS, strict=True):
            update = jnp.where(grad == mark, fault, update)
        return update

    def update(grads, state, params=None):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(broken, updates, grads), state

    return optax.GradientTransformation(tx.init, update)


def adam():
    return breaking(optax.adam(0.3))


def momentum():
    """Its momentum is of a hundred times the gradient, so that this overflows."""
    return breaking(optax.chain(optax.scale(100.0), optax.sgd(2e-3, momentum=0.9)))


def rmsprop():
    return breaking(optax.rmsprop(0.1, momentum=0.5))


OPEN = range(2, 6)


def window(tx):
    return vn.window(tx, OPEN.start, OPEN.stop)


def rules():
    return vn.ParamOptimiser({"a": window(adam()), "b": momentum(), "c.d": rmsprop()})


# With each optimiser, the leaves whose gradients it sees through a window only.
OPTIMISERS = {
    "adam": (adam, ()),
    "momentum": (momentum, ()),
    "rules": (rules, ("a",)),
    "window": (lambda: window(adam()), tuple(LEAVES)),
}

POLICIES = {
    "zero": vn.ZeroNans,
    "skip": vn.SkipStep,
    "stop": vn.StopFit,
    "raise": vn.RaiseOnNan,
    "after 1": lambda: vn.StopAfter(1),
    "after 2": lambda: vn.StopAfter(2),
    "after 3": lambda: vn.StopAfter(3),
}


def policy(text):
    return ft.reduce(operator.or_, (POLICIES[part]() for part in text.split(" | ")))


# Each policy alone, and with others.
COMBINATIONS = [
    (text, name)
    for name, texts in {
        "adam": ("after 1", "raise", "zero | skip"),
        "momentum": ("stop", "after 2", "zero | raise"),
        "rules": ("skip", "skip | after 2", "zero | skip | after 3"),
        "window": ("zero", "after 2 | zero", "skip | after 3"),
    }.items()
    for text in texts
]
RUNS = 240
CHUNKS = (STEPS, 5, STEPS, 3)  # a fault may be at any place of a chunk
EACH = RUNS // len(COMBINATIONS)


# What goes wrong, and what has to come of it, in plain Python.


class Fault(NamedTuple):
    """A `loss` or a `gradient` of this value; else what spoils the step behind it."""

    step: int
    place: str
    kind: str
    value: float
    entry: int | None = None

    @property
    def is_watched(self):
        return self.kind in ("loss", "gradient")


def draw(number):
    """The faults of one case: one to three, in half of the cases near each other."""
    rng = np.random.default_rng(number)
    first, length = (rng.integers(STEPS - 2), 3) if rng.random() < 0.5 else (0, STEPS)
    places = [
        (int(first) + i, name) for i in range(length) for name in ("loss", *LEAVES)
    ]
    chosen = rng.choice(len(places), rng.integers(1, 4), replace=False)
    return [_fault(rng, *places[i]) for i in sorted(chosen)]


def _fault(rng, step, place):
    which = rng.integers(3)
    if place == "loss":
        return Fault(step, place, "loss", FAULTS[which])
    leaf = LEAVES[place]
    kind = ("gradient", "gradient", "update", "overflow")[rng.integers(4)]
    value = {
        "gradient": FAULTS[which],
        "update": MARKS[which],
        "overflow": OVERFLOW[leaf.dtype.name] * (-1) ** which,
    }[kind]
    entry = int(rng.integers(leaf.size)) if rng.random() < 0.5 else None
    return Fault(step, place, kind, value, entry)


def as_batch(faults):
    loss = np.zeros(STEPS)
    grads = {name: np.zeros((STEPS, x.size), x.dtype) for name, x in LEAVES.items()}
    for fault in faults:
        if fault.place == "loss":
            loss[fault.step] = fault.value
        else:
            entry = slice(None) if fault.entry is None else fault.entry
            grads[fault.place][fault.step, entry] = fault.value
    shaped = [grads[name].reshape(STEPS, *x.shape) for name, x in LEAVES.items()]
    return loss, jax.tree.unflatten(jax.tree.structure(START), shaped)


class Foreseen(NamedTuple):
    """Whether each step is taken, up to the last; what is bad when; how it ends."""

    taken: list[bool]
    bad: dict[str, list[int]]
    stops: bool

    @property
    def report(self):
        return {
            name: vn.NanCount(len(steps), steps[0] if steps else None)
            for name, steps in self.bad.items()
        }


def foresee(faults, text, hidden):
    row, taken, bad, stop = 0, [], {name: [] for name in NAMES}, False
    while len(taken) < STEPS and not stop:
        step = len(taken)
        now = [fault for fault in faults if fault.step == step]
        for fault in now:
            if fault.is_watched:
                bad[fault.place].append(step)
        accept, stop, heeded, new_row = judge(now, text, row)
        sees = lambda name: name not in hidden or sum(taken) in OPEN
        held = accept and any(sees(f.place) for f in heeded if f.place != "loss")
        if held:
            bad["update"].append(step)
            shown = [Fault(step, "loss", "loss", np.nan)]
            _, stop, _, new_row = judge(shown, text, row)
        row = new_row
        taken.append(accept and not held)
    return Foreseen(taken, bad, stop)


def judge(faults, text, row):
    accept, stop = True, False
    for part in text.split(" | "):
        is_bad = any(fault.is_watched for fault in faults)
        match part.split():
            case ["zero"]:
                faults = [fault for fault in faults if fault.kind != "gradient"]
            case ["skip"]:
                accept = accept and not is_bad
            case ["stop" | "raise"]:
                accept, stop = accept and not is_bad, stop or is_bad
            case ["after", patience]:
                row = row + 1 if is_bad else 0
                stop = stop or row >= int(patience)
    return accept, stop, faults, row


@ft.cache
def by_hand(name):
    """Loops that are told which steps to take, and whether gradients are mended."""
    optimiser = OPTIMISERS[name][0]()

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, 0, None))
    def run(faults, taken, mends):
        def step(carry, now):
            params, state = carry
            faults, take = now
            mend = lambda fault: jnp.where(mends & ~jnp.isfinite(fault), 0, fault)
            grads = jax.tree.map(
                lambda g, f: jnp.where(f == 0, g, mend(f)),
                jax.grad(distance)(params),
                faults,
            )
            updates, new_state = optimiser.update(grads, state, params)
            new = optax.apply_updates(params, updates), new_state
            new = jax.tree.map(lambda n, o: jnp.where(take, n, o), new, carry)
            return new, (params, flat(state))

        carry = start(), optimiser.init(start())
        (params, state), rows = jax.lax.scan(step, carry, (faults, taken))
        join = lambda rows, last: jnp.concatenate([rows, last[None]])
        return jax.tree.map(join, rows, (params, flat(state)))

    return run


class Case(NamedTuple):
    """Faults, what has to come of them, and what is held by hand before each step."""

    number: int
    faults: list[Fault]
    foreseen: Foreseen
    rows: dict[str, np.ndarray]


def stacked(cases):
    return jax.tree.map(lambda *parts: np.stack(parts), *map(as_batch, cases))


def drawn(index):
    """The numbers, the faults and what is foreseen of the cases of a combination."""
    text, name = COMBINATIONS[index]
    for number in range(EACH * index, EACH * (index + 1)):
        faults = draw(number)
        yield number, faults, foresee(faults, text, OPTIMISERS[name][1])


def cases_of(index):
    text, name = COMBINATIONS[index]
    known = list(drawn(index))
    taken = np.zeros((EACH, STEPS), bool)
    for row, (_, _, foreseen) in zip(taken, known, strict=True):
        row[: len(foreseen.taken)] = foreseen.taken
    grads = stacked([faults for _, faults, _ in known])[1]
    params, state = by_hand(name)(grads, taken, "zero" in text)
    leaves = map(np.asarray, [*jax.tree.leaves(params), state])
    columns = dict(zip((*LEAVES, "state"), leaves, strict=True))
    for place, (number, faults, foreseen) in enumerate(known):
        end = len(foreseen.taken) + 1
        rows = {key: column[place, :end] for key, column in columns.items()}
        yield Case(number, faults, foreseen, rows)


# The laws.


def held(trainer):
    """Its parameters and the state of its optimiser, by the names of the rows."""
    leaves = *jax.tree.leaves(trainer.params), FLAT(trainer.opt_state)
    return dict(zip((*LEAVES, "state"), map(np.asarray, leaves), strict=True))


def obey_at_the_end(trainer, case):
    """What holds of a trainer after its fit, whatever the faults."""
    foreseen, rows = case.foreseen, case.rows
    assert int(trainer.step_count) == len(foreseen.taken)
    assert bool(trainer.stopped) == foreseen.stops
    assert trainer.nan_report() == foreseen.report
    for tree in trainer.params, trainer.opt_state, trainer.best:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    for key, end in held(trainer).items():
        np.testing.assert_allclose(end, rows[key][-1], rtol=1e-4, atol=1e-5)


def obey_on_the_way(result, case):
    """What holds of its history: each step, and the best of them."""
    trainer, history = result.trainer, result.history
    foreseen, rows = case.foreseen, case.rows
    np.testing.assert_array_equal(history.steps, range(len(foreseen.taken)))
    for key, end in held(trainer).items():
        found = np.concatenate([history[key], end[None]])
        np.testing.assert_allclose(found, rows[key], rtol=1e-4, atol=1e-5)
        for step, is_taken in enumerate(foreseen.taken):
            before, after = found[step : step + 2]
            assert is_taken or before.tobytes() == after.tobytes()

    losses = {fault.step: fault.value for fault in case.faults if fault.place == "loss"}
    for step, loss in enumerate(history.loss):
        np.testing.assert_equal(loss, losses.get(step, loss))
        assert np.isfinite(loss) == (step not in losses)
    finite = np.where(np.isfinite(history.loss), history.loss, np.inf)
    assert trainer.best_loss == finite.min()
    for name, leaf in zip(LEAVES, jax.tree.leaves(trainer.best), strict=True):
        assert np.asarray(leaf).tobytes() == history[name][finite.argmin()].tobytes()


def fitted(trainer, case):
    """The result, or that of the error, which must be one where a policy raises."""
    foreseen, chunk = case.foreseen, CHUNKS[case.number % len(CHUNKS)]
    options = {"record": (*LEAVES, "state"), "chunk": chunk}
    run = lambda: trainer.fit(as_batch(case.faults), STEPS, **options)
    if not (foreseen.stops and trainer.nan_policy.raises):
        return run()
    with pytest.raises(vn.NonFiniteError) as caught:
        run()
    error, last = caught.value, len(foreseen.taken) - 1
    assert error.step == last
    assert error.paths == tuple(k for k in NAMES if last in foreseen.bad[k])
    assert error.report == foreseen.report
    return error.result


@pytest.fixture
def recorded_alike(monkeypatch):
    """What the fits of a test record is the same: their loss is traced for it once."""
    kept, find = [], inside.run.Record

    def first(*args):
        kept[:] = kept or [find(*args)]
        return kept[0]

    monkeypatch.setattr(inside.run, "Record", first)


@pytest.mark.usefixtures("seldom_explained", "recorded_alike")
@pytest.mark.parametrize(
    "index", range(len(COMBINATIONS)), ids=[", ".join(c) for c in COMBINATIONS]
)
def test_whatever_goes_wrong_the_laws_hold(index):
    text, name = COMBINATIONS[index]
    trainer = FaultyFit(start(), OPTIMISERS[name][0](), nan_policy=policy(text))
    for case in cases_of(index):
        try:
            result = fitted(trainer, case)
            reason = "NON_FINITE" if case.foreseen.stops else "STEPS_TAKEN"
            assert result.stop_reason is vn.StopReason[reason]
            obey_at_the_end(result.trainer, case)
            obey_on_the_way(result, case)
        except BaseException as error:
            error.add_note(f"Case {case.number}: {case.faults}")
            raise


AT_ONCE = [("zero | skip", "adam"), ("skip | after 2", "rules"), ("zero", "window")]


@pytest.mark.parametrize("chosen", AT_ONCE, ids=", ".join)
def test_all_cases_of_a_combination_in_one_vmap(chosen):
    text, name = chosen
    trainer = FaultyFit(start(), OPTIMISERS[name][0](), nan_policy=policy(text))

    @jax.jit
    @jax.vmap
    def run(batch):
        step = lambda trainer, _: (trainer.step(batch)[0], None)
        return jax.lax.scan(step, trainer, length=STEPS)[0]

    cases = list(cases_of(COMBINATIONS.index(chosen)))
    many = run(stacked([case.faults for case in cases]))
    for index, case in enumerate(cases):
        try:
            obey_at_the_end(at(many, index), case)
        except BaseException as error:
            error.add_note(f"Case {case.number}: {case.faults}")
            raise


def test_what_is_drawn_is_of_every_kind():
    cases = [case for index in range(len(COMBINATIONS)) for case in drawn(index)]
    foreseen = [case for _, _, case in cases]
    faults = [fault for _, case, _ in cases for fault in case]
    texts = " | ".join(text for text, _ in COMBINATIONS)

    assert len(cases) == RUNS
    assert {text for text, _ in COMBINATIONS} >= set(POLICIES) - {"after 3"}
    assert set(texts.split(" | ")) == set(POLICIES)
    for place in ("loss", *LEAVES):
        for value in FAULTS:
            assert any(
                f.place == place and repr(f.value) == repr(value) for f in faults
            )
    for kind in "gradient", "update", "overflow":
        for place, leaf in LEAVES.items():
            found = {f.entry for f in faults if f.kind == kind and f.place == place}
            assert found == {None, *range(leaf.size)}
    assert {f.step for f in faults} == set(range(STEPS))
    assert {len(case) for _, case, _ in cases} == {1, 2, 3}
    assert {len(f.taken) for f in foreseen if f.stops} == set(range(1, STEPS + 1))
    assert all(any(f.bad[name] for f in foreseen) for name in NAMES)


# One gradient in a million steps.

MILLION, WHEN = 1_000_000, 613_337


class OnceFit(vn.Trainer):
    """The gradient of `offset` is NaN at one step, where the loss is finite."""

    def loss(self, model, batch):
        fault = jnp.where(self.step_count == WHEN, jnp.nan, 1.0)
        slope, offset = model["slope"], poisoned(model["offset"], fault)
        return (slope - batch) ** 2 + (slope + offset) ** 2


def once(**options):
    model = {"slope": jnp.asarray(0.5), "offset": jnp.asarray(1.0)}
    trainer = OnceFit(model, optax.adam(1e-3), **options)
    return trainer.fit(jnp.asarray(2.0), MILLION, every=100_000)


ONCE = {
    "loss": vn.NanCount(0, None),
    "offset": vn.NanCount(1, WHEN),
    "slope": vn.NanCount(0, None),
    "update": vn.NanCount(0, None),
}


def test_one_gradient_in_a_million_steps_is_named_and_skipped():
    result = once(nan_policy=vn.SkipStep())
    assert result.trainer.nan_report() == ONCE
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN
    assert int(result.trainer.step_count) == MILLION
    assert int(optax.tree.get(result.trainer.opt_state, "count")) == MILLION - 1
    assert len(result.history) == 10
    np.testing.assert_allclose(result.model["slope"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(result.model["offset"], -2.0, rtol=1e-6)


def test_one_gradient_in_a_million_steps_ends_the_fit_there():
    result = once()
    assert result.stop_reason is vn.StopReason.NON_FINITE
    assert int(result.trainer.step_count) == WHEN + 1
    assert result.trainer.nan_report() == ONCE
    assert np.isfinite(result.trainer.best_loss)

    with pytest.raises(vn.NonFiniteError) as caught:
        once(nan_policy=vn.RaiseOnNan())
    error = caught.value
    assert (error.step, error.paths) == (WHEN, ("offset",))
    assert f"not finite at step {WHEN}: offset." in str(error)
    assert error.report == ONCE
    assert same(error.result.model, result.model)
