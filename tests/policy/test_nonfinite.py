"""Non-finite values: the policies, walked step by step, the last guard, the report."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vernal as vn
from models import LineFit, TwoFit, at, close, line, line_batch, same, script, two


class Walk(TwoFit):
    def loss(self, model, batch):
        return super().loss(model, at(batch, self.step_count))


def schedule(count):
    return 0.1 / (1.0 + jnp.asarray(count, float))


def optimiser():
    """Moments and a schedule: both count the steps that are taken."""
    return optax.adam(schedule)


def by_step(trainer, steps):
    infos = []
    for _ in steps:
        trainer, info = trainer.step(script(steps))
        infos.append(info)
    return trainer, infos


def by_fit(trainer, steps):
    result = trainer.fit(script(steps), len(steps))
    return result.trainer, result


@functools.partial(jax.jit, static_argnums=2)
def scanned(trainer, batches, length):
    step = lambda trainer, _: trainer.step(batches)
    return jax.lax.scan(step, trainer, length=length)


def by_scan(trainer, steps):
    return scanned(trainer, script(steps), len(steps))


step_of_two = jax.jit(jax.vmap(lambda trainer, batch: trainer.step(batch)))


def by_vmap(trainer, steps):
    """Two trainers at once, the other of which has only good steps."""
    batches = jax.tree.map(lambda *x: np.stack(x), script(steps), script(""))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), trainer)
    for _ in steps:
        twice, _ = step_of_two(twice, batches)
    first, second = (
        jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), twice)
        for i in range(2)
    )
    undisturbed, _ = by_step(trainer, "." * len(steps))
    close(second, undisturbed, rtol=2e-6)
    return first, None


WALKS = {"step": by_step, "fit": by_fit, "scan": by_scan, "vmap": by_vmap}

# A policy, a script, which steps are taken (`+`), skipped (`-`) and, after a stop, not
# come to at all (` `), and the steps to leave out for a run that comes to the same.
CASES = [
    (vn.SkipStep, "..a.l.b.", "++-+-+-+", False),
    (vn.SkipStep, "iLa..", "---++", False),
    (vn.StopFit, "..a...", "++-   ", True),
    (vn.StopFit, "......", "++++++", False),
    (vn.StopFit, "l.", "- ", True),
    (vn.StopFit, ".L.", "+- ", True),
    (vn.BreakOnNan, "..a...", "++-   ", True),
    (lambda: vn.SkipStep() | vn.StopAfter(2), ".a.ab..", "+-+--  ", True),
    (lambda: vn.SkipStep() | vn.StopAfter(2), ".a.b.l", "+-+-+-", False),
]

# The same, told by the verdicts alone: each would be a program of its own.
COMPOSED = [
    (lambda: vn.StopAfter(2) | vn.SkipStep(), "ai...", "--   ", True),
    (lambda: vn.SkipStep() | vn.StopFit(), ".a..", "+-  ", True),
    (lambda: vn.SkipStep() | vn.SkipStep() | vn.StopAfter(1), "..i.", "++- ", True),
    (lambda: vn.ZeroNans() | vn.SkipStep(), ".l..", "+-++", False),
]


HITS = []


def note(pred):
    if pred:
        HITS.append(True)


def noted(pred, **_):
    return jax.debug.callback(note, pred)


@pytest.fixture
def no_breakpoint(monkeypatch):
    """Instead of opening a debugger, a breakpoint is noted."""
    # One list for all, since a compiled step that is found again notes where it did.
    HITS.clear()
    monkeypatch.setattr(eqx.debug, "breakpoint_if", noted)
    return HITS


# Compiling is slow: the transformations of JAX on one of the cases alone.
WALKED = [(case, "step") for case in CASES]
WALKED += [(case, "fit") for case in CASES if case[0] is not vn.BreakOnNan]
WALKED += [(CASES[7], walk) for walk in ("scan", "vmap")]


@pytest.mark.parametrize(
    ("case", "walk"), WALKED, ids=[f"{case[1]}-{walk}" for case, walk in WALKED]
)
def test_a_policy_step_by_step(case, walk, no_breakpoint):
    make, steps, taken, stops = case
    trainer = Walk(two(), optimiser(), nan_policy=make())
    after, told = WALKS[walk](trainer, steps)
    reached = len(taken.rstrip())

    assert int(after.step_count) == reached
    assert bool(after.stopped) == stops

    # The run without the bad steps ends in the same place: moments and schedule too.
    good = "." * taken.count("+")
    reference = Walk(two(), optimiser(), nan_policy=make())
    if taken.count("+"):
        reference, _ = by_step(reference, good)
    if walk == "step":
        assert same(after.model, reference.model)
        assert same(after.opt_state, reference.opt_state)
    else:
        close(after.model, reference.model, rtol=2e-6)
        close(after.opt_state, reference.opt_state, rtol=2e-6)

    if walk == "step":
        accepted = ["+" if info.accepted else "-" for info in told]
        assert "".join(accepted).rstrip("-") == taken.rstrip().rstrip("-")
        assert [bool(i.stopped) for i in told] == [
            stops and j >= reached - 1 for j in range(len(steps))
        ]
        assert all(np.isnan(i.loss) for i in told[reached:])
    if walk == "fit":
        expected = "NON_FINITE" if stops else "STEPS_TAKEN"
        assert told.stop_reason is vn.StopReason[expected]
        assert len(told.history) == reached

    report = after.nan_report()
    for name, letters in {"loss": "lL", "a": "ai", "b": "b"}.items():
        bad = [i for i, c in enumerate(steps[:reached]) if c in letters]
        assert report[name] == vn.NanCount(len(bad), bad[0] if bad else None)
    assert report["update"] == vn.NanCount(0, None)


@pytest.mark.parametrize("case", COMPOSED, ids=[case[1] for case in COMPOSED])
def test_a_composition_by_its_verdicts(case):
    make, steps, taken, stops = case
    policy, told = make(), ""
    state = policy.init(two())
    for letter in steps[: len(taken.rstrip())]:
        loss = jnp.asarray({"l": np.nan, "L": np.inf}.get(letter, 1.0))
        bad = {"a": np.nan, "i": np.inf}.get(letter, 1.0)
        grads = {"a": jnp.asarray([1.0, bad]), "b": jnp.asarray(1.0)}
        _, verdict, state = policy.apply(loss, grads, state)
        told += "+" if verdict.accept else "-"
        assert bool(verdict.stop) == (stops and len(told) == len(taken.rstrip()))
    assert told == taken.rstrip()


def test_a_verdict_of_numbers_is_one_of_booleans():
    class Numbers(vn.NanPolicy):
        def init(self, params):
            return ()

        def apply(self, loss, grads, state):
            is_bad = ~jnp.isfinite(loss)
            return (
                grads,
                vn.Verdict(jnp.where(is_bad, 0, 2), jnp.where(is_bad, 1.0, 0.0)),
                state,
            )

    trainer = Walk(two(), optimiser(), nan_policy=Numbers())
    after, _ = by_fit(trainer, "..l.")
    assert int(after.step_count) == 3
    assert after.stopped
    assert after.nan_report()["loss"] == vn.NanCount(1, 2)
    assert after.nan_report()["update"] == vn.NanCount(0, None)


def test_an_observer_on_its_own_takes_every_step_that_the_guard_lets_through():
    """`StopAfter` alone accepts: it is the last guard that holds the parameters."""
    trainer = Walk(two(), optimiser(), nan_policy=vn.StopAfter(2))
    after, _ = by_fit(trainer, ".a.ai.")
    assert int(after.step_count) == 5
    reference, _ = by_fit(trainer, "..")
    close(after.model, reference.model, rtol=2e-6)
    report = after.nan_report()
    assert report["a"] == vn.NanCount(3, 1)
    assert report["update"] == vn.NanCount(3, 1)


def test_zeroed_entries_and_a_step_that_is_taken():
    trainer = Walk(two(), optax.sgd(0.1), nan_policy=vn.ZeroNans())
    after, _ = by_fit(trainer, "abil")
    close(
        after.model,
        led_by([(0, 1), (1, 0), (0, 1), (1, 1)]),
        rtol=2e-6,
    )
    report = after.nan_report()
    assert report["a"] == vn.NanCount(2, 0)
    assert report["b"] == vn.NanCount(1, 1)
    assert report["loss"] == vn.NanCount(1, 3)
    assert int(after.step_count) == 4
    assert not after.stopped


def led_by(factors):
    """Where gradients multiplied by these factors lead to."""
    params = jax.tree.map(np.asarray, two())
    for a, b in factors:
        grads = {"a": 2 * (params["a"] - 1) * a, "b": 2 * (params["b"] + 2) * b}
        step = lambda p, g: np.asarray(p - np.float32(0.1) * g, np.float32)
        params = jax.tree.map(step, params, grads)
    return params


def test_only_the_bad_entries_are_zeroed():
    class OneEntry(vn.Trainer):
        def loss(self, model, batch):
            return jnp.sum(jnp.sqrt(jnp.abs(model)) + model)

    start = jnp.asarray([0.0, 4.0])
    new, info = OneEntry(start, optax.sgd(1.0), nan_policy=vn.ZeroNans()).step(None)
    np.testing.assert_allclose(new.model, [0.0, 4 - 1.25])
    assert not np.isfinite(info.grad_norm)
    assert info.accepted


def test_the_counter_and_the_key_go_on_over_skipped_steps():
    class Keyed(TwoFit):
        def loss(self, model, batch, key):
            noise = jax.random.normal(key)
            loss = super().loss(model, at(batch, self.step_count))
            return loss, {"noise": noise, "step": self.step_count}

    key = jax.random.key(3)
    result = Keyed(two(), optax.sgd(0.1), nan_policy=vn.SkipStep(), key=key).fit(
        script("..al.."), 6, record=("noise", "step")
    )
    draw = jax.jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i))))
    expected = draw(np.arange(6))
    np.testing.assert_array_equal(result.history["noise"], expected)
    np.testing.assert_array_equal(result.history["step"], range(6))


@pytest.mark.parametrize("policy", [vn.SkipStep, vn.StopFit, vn.ZeroNans])
def test_the_history_has_the_loss_that_was_not_finite(policy):
    trainer = Walk(two(), optimiser(), nan_policy=policy())
    history = trainer.fit(script(".lL"), 3).history
    assert np.isnan(history.loss[1])
    assert len(history) == (2 if policy is vn.StopFit else 3)


# The last guard.


def guarded(policy, steps="..u.."):
    trainer = Walk(two(), optimiser(), nan_policy=policy)
    return trainer.fit(script(steps), len(steps))


def test_a_gradient_that_turns_the_second_moment_to_infinity():
    skipped = guarded(vn.SkipStep())
    reference = guarded(vn.SkipStep(), "....")
    assert same(skipped.model, reference.model)
    assert same(skipped.trainer.opt_state, reference.trainer.opt_state)
    report = skipped.trainer.nan_report()
    assert report["update"] == vn.NanCount(1, 2)
    assert report["a"] == report["loss"] == vn.NanCount(0, None)


@pytest.mark.parametrize(
    ("policy", "last"),
    [
        (vn.StopFit(), 3),
        (vn.ZeroNans(), 5),
        (vn.SkipStep() | vn.StopAfter(1), 3),
        (vn.SkipStep() | vn.StopAfter(2), 5),
    ],
)
def test_the_policy_hears_of_what_the_guard_held(policy, last):
    result = guarded(policy)
    assert int(result.trainer.step_count) == last
    assert result.trainer.nan_report()["update"] == vn.NanCount(1, 2)
    leaves = jax.tree.leaves(result.trainer.opt_state)
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_updates_that_the_guard_holds_count_towards_patience():
    for steps in (".au.", ".ul."):
        result = guarded(vn.SkipStep() | vn.StopAfter(2), steps)
        assert int(result.trainer.step_count) == 3
        assert result.stop_reason is vn.StopReason.NON_FINITE
    result = guarded(vn.SkipStep() | vn.StopAfter(2), ".a.u.l")
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN


def test_raising_on_an_update():
    with pytest.raises(vn.NonFiniteError, match="not finite at step 2: update"):
        guarded(vn.RaiseOnNan())


def test_a_hook_that_makes_nan_of_gradients_or_models():
    class Bad(LineFit):
        def transform_grads(self, grads, model):
            bad = self.step_count == 2
            return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)

    class Worse(LineFit):
        def constrain(self, model):
            bad = self.step_count == 2
            return jax.tree.map(lambda m: jnp.where(bad, jnp.nan, m), model)

    for cls in Bad, Worse:
        trainer = cls(line(), optax.sgd(0.1), nan_policy=vn.SkipStep())
        result = trainer.fit(line_batch(), 5, record="slope")
        assert result.history["slope"][2] == result.history["slope"][3]
        assert result.trainer.nan_report()["update"] == vn.NanCount(1, 2)
        assert result.history.loss[-1] < result.history.loss[0]


BACKTRACKING = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=4)
        ),
        lambda: vn.ParamOptimiser({"**": vn.window(BACKTRACKING, start=3)}),
    ],
    ids=["plateau", "rule"],
)
def test_a_state_that_is_infinite_by_design(make):
    """Some Optax states begin at infinity, and keep it for a while."""
    result = LineFit(line(), make()).fit(line_batch(), 40)
    assert result.stop_reason is vn.StopReason.STEPS_TAKEN
    assert result.history.loss[-1] < 1e-2


# Raising.


@pytest.mark.seams
@pytest.mark.parametrize(
    ("steps", "step", "paths"),
    [
        ("..a.", 2, ("a",)),
        ("l", 0, ("loss",)),
        (".ib", 1, ("a",)),
        ("....b", 4, ("b",)),
    ],
)
@pytest.mark.parametrize("by", ["step", "fit"])
def test_an_error_that_says_where_and_when(by, steps, step, paths):
    trainer = Walk(two(), optimiser(), nan_policy=vn.RaiseOnNan())
    with pytest.raises(vn.NonFiniteError) as caught:
        WALKS[by](trainer, steps)
    error = caught.value
    assert (error.step, error.paths) == (step, paths)
    assert f"not finite at step {step}: {paths[0]}." in str(error)
    assert isinstance(error, FloatingPointError)
    assert error.report[paths[0]] == vn.NanCount(1, step)
    kept = error.result.trainer if by == "fit" else error.result
    reference, _ = by_step(trainer, "." * step) if step else (trainer, None)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-8)
    jax.tree.map(near, kept.model, reference.model)
    if by == "fit":
        assert len(error.result.history) == step + 1
        assert error.result.stop_reason is vn.StopReason.NON_FINITE


def test_an_error_about_what_has_been_bad_before():
    trainer = Walk(two(), optimiser(), nan_policy=vn.SkipStep())
    trainer, _ = by_step(trainer, ".a")
    trainer = trainer.replace(nan_policy=vn.RaiseOnNan())
    with pytest.raises(vn.NonFiniteError) as caught:
        trainer.fit(script("...a"), 4)
    assert caught.value.step == 3
    assert caught.value.paths == ("a",)


def test_composed_with_others_it_still_raises():
    policy = vn.ZeroNans() | vn.RaiseOnNan()
    trainer = Walk(two(), optax.sgd(0.1), nan_policy=policy)
    with pytest.raises(vn.NonFiniteError) as caught:
        trainer.fit(script("aab.l"), 5)
    assert caught.value.step == 4
    assert caught.value.paths == ("loss",)


def test_in_a_jit_of_ones_own_it_raises_as_well():
    trainer = Walk(two(), optimiser(), nan_policy=vn.RaiseOnNan())
    step = jax.jit(lambda trainer, batch: trainer.step(batch))
    trainer, _ = step(trainer, script(".a"))
    with pytest.raises(Exception, match="RaiseOnNan"):
        jax.block_until_ready(step(trainer, script(".a")))


# A breakpoint.


@pytest.mark.parametrize("walk", ["step", "fit", "vmap"])
def test_a_breakpoint_at_the_bad_step_alone(no_breakpoint, walk):
    trainer = Walk(two(), optimiser(), nan_policy=vn.BreakOnNan())
    after, _ = WALKS[walk](trainer, "..a")
    jax.effects_barrier()
    assert no_breakpoint == [True]
    good, _ = WALKS[walk](trainer, "...")
    jax.effects_barrier()
    assert no_breakpoint == [True]
    assert after.stopped
    assert not good.stopped


# A policy of one's own.


class Halve(vn.NanPolicy):
    """Halves all further gradients at each bad step."""

    floor: float = eqx.field(static=True, default=0.2)

    def init(self, params):
        return {"factor": jnp.array(1.0, jnp.float32)}

    def apply(self, loss, grads, state):
        leaves = jax.tree.leaves(grads)
        ok = (
            jnp.isfinite(loss)
            & jnp.stack([jnp.isfinite(g).all() for g in leaves]).all()
        )
        factor = jnp.where(ok, state["factor"], state["factor"] / 2)
        grads = jax.tree.map(lambda g: factor * g, grads)
        return grads, vn.Verdict(ok, factor < self.floor), {"factor": factor}


def test_a_policy_of_ones_own():
    trainer = Walk(two(), optax.sgd(0.1), nan_policy=Halve())
    after, _ = by_fit(trainer, ".a.l.b..")
    assert int(after.step_count) == 6
    assert after.stopped
    close(after.model, led_by([(1, 1), (0.5, 0.5), (0.25, 0.25)]), rtol=2e-6)


def test_composed_policies_have_each_their_own_state_and_order():
    trainer = Walk(two(), optax.sgd(0.1), nan_policy=Halve() | Halve(floor=0.0))
    after, _ = by_step(trainer, "a.")
    close(after.model, led_by([(0.25, 0.25)]), rtol=2e-6)


def test_verdicts_of_plain_python_are_enough():
    class Careless(vn.NanPolicy):
        def init(self, params):
            return 0

        def apply(self, loss, grads, state):
            return grads, vn.Verdict(True, False), state + 1

    trainer = Walk(two(), optax.sgd(0.1), nan_policy=Careless())
    assert not by_step(trainer, "...")[0].stopped


# Reports.


def test_a_report_has_every_name():
    trainer = Walk(two(), optax.sgd(0.1))
    assert list(trainer.nan_report()) == ["loss", "a", "b", "update"]
    assert set(trainer.nan_report().values()) == {vn.NanCount(0, None)}


def test_parameters_that_are_called_as_a_report_calls_others():
    model = {"loss": jnp.ones(1), "update": jnp.ones(1)}
    trainer = vn.fit(
        lambda m, b: jnp.sum(m["loss"]) * jnp.nan + jnp.sum(m["update"]),
        model,
        optax.sgd(0.1),
        None,
        1,
    ).trainer
    report = trainer.nan_report()
    assert len(report) == 4
    assert report["<loss>"].total == report["loss"].total == 1
    assert report["update"].total == report["<update>"].total == 0


def test_a_report_goes_on_over_several_fits():
    trainer = Walk(two(), optimiser(), nan_policy=vn.SkipStep())
    batches = script(".a.ab.")
    for _ in range(3):
        trainer = trainer.fit(batches, 2).trainer
    assert trainer.nan_report()["a"] == vn.NanCount(2, 1)
    assert trainer.nan_report()["b"] == vn.NanCount(1, 4)


# The two functions for gradients.


def test_zeroing_keeps_dtypes_infinities_and_gaps():
    grads = {
        "f": jnp.asarray([jnp.nan, jnp.inf, 2.0], jnp.float32),
        "h": jnp.asarray([jnp.nan, 1.0], jnp.bfloat16),
        "c": jnp.asarray([complex(jnp.nan, 1), 1j]),
        "n": jnp.asarray([1, 2]),
        "b": jnp.asarray([True]),
        "none": None,
    }
    out = vn.zero_nan_check(grads)
    for name, leaf in grads.items():
        assert leaf is None or out[name].dtype == leaf.dtype
    np.testing.assert_array_equal(out["f"], [0, jnp.inf, 2])
    np.testing.assert_array_equal(out["c"], [0, 1j])
    np.testing.assert_array_equal(out["n"], grads["n"])
    assert out["none"] is None


KINDS = ("float16", "float32", "float64", "complex64", "complex128", "longdouble")


@pytest.mark.parametrize("x64", [False, True])
def test_zeroing_keeps_the_dtypes_of_numpy(x64):
    grads = {kind: np.asarray([np.nan, np.inf, 2], kind) for kind in KINDS}
    grads |= {f"{kind} scalar": np.dtype(kind).type(np.nan) for kind in KINDS}
    with jax.enable_x64(x64):
        out = vn.zero_nan_check(grads)
    for name, leaf in grads.items():
        assert out[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(out[name], [0, np.inf, 2] if leaf.ndim else 0)


def test_checking_returns_its_argument(no_breakpoint):
    grads = {"a": jnp.ones(2), "n": jnp.asarray(1), "none": None, "i": jnp.inf}
    assert vn.debug_nan_check(grads) is grads
    jax.effects_barrier()
    assert no_breakpoint == []
    bad = {"a": jnp.asarray([1.0, jnp.nan])}
    assert vn.debug_nan_check(bad) is bad
    jax.block_until_ready(jax.jit(vn.debug_nan_check)(bad))
    jax.effects_barrier()
    assert no_breakpoint == [True, True]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: vn.StopAfter(0), ValueError, r"`patience` is 0.*at least 1"),
        (lambda: vn.StopAfter(-3), ValueError, r"`patience` is -3"),
        (lambda: vn.StopAfter(1.5), TypeError, "patience"),
        (lambda: vn.StopAfter(True), TypeError, "patience"),
        (lambda: vn.SkipStep() | 3, TypeError, r"cannot compose.*`vn\.StopAfter"),
        (lambda: vn.SkipStep() | vn.StopAfter, TypeError, "cannot compose"),
        (lambda: vn.NanPolicy(), TypeError, "abstract"),
    ],
)
def test_a_policy_that_is_wrong(make, error, match):
    with pytest.raises(error, match=re.compile(match, re.DOTALL)):
        make()


def test_patience_of_numpy():
    assert vn.StopAfter(np.int64(2)).patience == 2


STOPS = {
    "StopFit": vn.StopFit,
    "RaiseOnNan": vn.RaiseOnNan,
    "StopAfter": lambda: vn.SkipStep() | vn.StopAfter(1),
}


def lowered(trainer, history):
    rates = {"a": 0.9 ** len(history), "b": 1.0}
    return trainer.replace(optimiser=trainer.optimiser.with_scale(rates))


def kept(trainer, history):
    return trainer.replace(model=trainer.model, nan_policy=vn.StopFit())


CHANGES = {"a rate": lowered, "nothing": lambda trainer, _: trainer}


def by_rules(policy):
    rules = {"a": optax.adam(0.1), "b": optax.sgd(0.1)}
    return Walk(two(), vn.ParamOptimiser(rules), nan_policy=policy)


@pytest.mark.parametrize("is_many", [False, True])
@pytest.mark.parametrize("policy", STOPS)
def test_a_callback_does_not_override_a_policy(policy, is_many):
    trainer, batch = by_rules(STOPS[policy]()), script("..a.....")
    for change in CHANGES.values():
        options = {"chunk": 2, "callback": change, "progress": False}
        fit = lambda options=options: (
            vn.fit_many([trainer] * 2, batch, 8, **options)
            if is_many
            else trainer.fit(batch, 8, **options)
        )
        if policy == "RaiseOnNan":
            with pytest.raises(vn.NonFiniteError) as caught:
                fit()
            assert caught.value.step == 2
            continue
        result = fit()
        after = result.trainer(1) if is_many else result.trainer
        assert (int(after.step_count), bool(after.stopped)) == (3, True)
        assert result.failed == (0, 1) if is_many else result.stop_reason.is_failure


def test_a_policy_stays_where_a_callback_replaces_it():
    trainer, batch = by_rules(vn.StopFit()), script("..a.....")
    result = trainer.fit(batch, 8, chunk=2, callback=kept, progress=False)
    assert (int(result.trainer.step_count), bool(result.trainer.stopped)) == (3, True)


def test_nor_where_a_parameter_is_nan():
    trainer, batch = by_rules(vn.StopFit()), script("........")
    bad = jnp.asarray(jnp.nan, jnp.float32)
    trainer = eqx.tree_at(lambda t: t.model["b"], trainer, bad)
    result = trainer.fit(batch, 8, chunk=2, callback=lowered, progress=False)
    assert int(result.trainer.step_count) == 1


@pytest.mark.parametrize("is_many", [False, True])
def test_a_callback_may_begin_again_from_another_point(is_many):
    trainer, batch = by_rules(vn.StopFit()), script("..a.....")

    def again(trainer, history):
        flags = np.asarray(trainer.stopped)
        if not flags.any():
            return None
        begin = lambda now, new: jnp.where(
            flags.reshape(flags.shape + (1,) * (now.ndim - flags.ndim)), new, now
        )
        other = jax.tree.map(lambda x: jnp.asarray(x) + 1, two())
        return trainer.replace(model=jax.tree.map(begin, trainer.model, other))

    options = {"chunk": 2, "callback": again, "progress": False}
    if is_many:
        good = eqx.tree_at(lambda t: t.model["b"], trainer, jnp.asarray(0.7, "f4"))
        result = vn.fit_many([trainer, good], batch, 8, **options)
        assert [int(x) for x in result.trainers.step_count] == [8, 8]
    else:
        result = trainer.fit(batch, 8, **options)
        assert result.stop_reason is vn.StopReason.STEPS_TAKEN
        assert int(result.trainer.step_count) == 8
