"""Good steps run without a guard: no answer changes, whatever is bad, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import inside
import vernal as vn
from inside import cache_size, run_chunk, small
from models import close, same

STEPS = 300
DATA = np.linspace(0.0, 1.0, 7)
SOME = (0, 7, 8, 200)


@pytest.fixture(autouse=True, scope="module")
def no_small_loops():
    """The loops of these models would be compiled as one function, with a guard.

    Nor is it explained why a fit ended: each operation of it is a program.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "MOST_READ", -1)
        patch.setattr(
            inside.remarks, "diagnosed", lambda *_: inside.remarks.Diagnosis()
        )
        vn.forget()
        yield
    vn.forget()


@jax.custom_jvp
def pulled(x, factor):
    """Returns `x`, whose derivative is multiplied."""
    return x


@pulled.defjvp
def _(primals, tangents):
    return primals[0], primals[1] * tangents[0]


class Fit(vn.Trainer):
    """A sum of squares. Its model says what is bad, and at which steps."""

    def factor(self, model, kind, value):
        """Returns the value at a step that is bad in this way, and else one."""
        is_bad = (self.step_count == model["bad"][kind]).any()
        return jnp.where(is_bad, value, 1.0)

    def loss(self, model, batch, *, state=None):
        w = pulled(model["w"], self.factor(model, "gradient", jnp.inf))
        w = pulled(w, self.factor(model, "moments", 1e200))
        loss = jnp.square(w - batch.mean()).sum() + jnp.square(model["b"] - 1.0)
        loss *= self.factor(model, "loss", jnp.nan)
        if state is None:
            return loss
        return loss, 0.5 * (state + loss) / self.factor(model, "state", 0.0)

    def transform_grads(self, grads, model):
        factor = self.factor(model, "update", jnp.inf)
        return jax.tree.map(lambda g: g * factor, grads)


class Guarded(vn.NanPolicy):
    """A policy of a user, under which each step is guarded."""

    inner: vn.NanPolicy

    def init(self, params):
        return self.inner.init(params)

    def apply(self, loss, grads, state):
        return self.inner.apply(loss, grads, state)


KINDS = ("loss", "gradient", "moments", "update", "state")


def fit_of(kind="loss", bad=(), size=3, policy=None, rule=None, **options):
    steps = {name: np.full(4, -1, np.int32) for name in KINDS}
    steps[kind][: len(bad)] = bad
    model = {"w": jnp.linspace(-1.0, 1.0, size), "b": jnp.array(3.0), "bad": steps}
    state = jnp.array(1.0) if kind == "state" else None
    optimiser = optax.adam(0.05) if rule is None else rule
    policy = vn.SkipStep() if policy is None else policy
    return Fit(model, optimiser, nan_policy=policy, state=state, **options)


def run(trainer, steps=STEPS, data=DATA, **options):
    return trainer.fit(jnp.asarray(data), steps, progress=False, **options)


# Leaves of few numbers are looked at in a way of their own.
@pytest.mark.parametrize(
    ("kind", "size"),
    [("loss", 3), ("moments", 3), *((kind, 100) for kind in KINDS)],
)
def test_bad_steps_are_found_as_by_a_guard(kind, size):
    """One by one: the report, what was skipped, the history, and the end."""
    bare = run(fit_of(kind, SOME, size))
    slow = run(fit_of(kind, SOME, size, Guarded(vn.SkipStep())))
    assert bare.trainer.nan_report() == slow.trainer.nan_report()
    assert max(x.total for x in bare.trainer.nan_report().values()) == len(SOME)
    np.testing.assert_allclose(bare.history.loss, slow.history.loss, rtol=1e-9)
    for name in ("params", "opt_state", "best", "best_loss", "step_count", "state"):
        close(getattr(bare.trainer, name), getattr(slow.trainer, name), rtol=1e-9)


POLICIES = {
    "skip": vn.SkipStep(),
    "zero": vn.ZeroNans(),
    "count": vn.SkipStep() | vn.StopAfter(3),
    "stop": vn.StopFit(),
}


# Each policy and each kind is met; one of each sort of end as compiled for users too.
PARTS = [(policy, KINDS[i]) for i, policy in enumerate(POLICIES)]
PARTS += [
    pytest.param(policy, kind, marks=pytest.mark.as_compiled)
    for policy, kind in (("skip", "gradient"), ("count", "update"))
]


@pytest.mark.parametrize(("policy", "kind"), PARTS)
def test_a_fit_in_parts_is_one_fit(policy, kind):
    """To the bit, wherever it is cut: at a bad step, before, and after it."""
    start = fit_of(kind, SOME, 100, POLICIES[policy])
    whole = run(start)
    for cut in (1, 7, 8, 9, 150, 201):
        parts = run(run(start, cut).trainer, STEPS - cut)
        assert same(whole.trainer, parts.trainer), cut
    assert same(whole.trainer, run(start, chunk=13).trainer)


def test_a_fit_in_parts_that_monitors_is_one_fit():
    start = fit_of("loss", SOME, 100)
    options = {"validation": (jnp.asarray(DATA), 4), "record": ("grad_norm", "b")}
    whole = run(start, **options)
    parts = run(run(start, 9, **options).trainer, STEPS - 9, **options)
    assert same(whole.trainer, parts.trainer)
    np.testing.assert_array_equal(whole.history["b"][9:], parts.history["b"])


def test_the_best_is_the_lowest_of_the_history():
    result = run(fit_of("loss", SOME, rule=optax.sgd(0.3, momentum=0.9)))
    losses = np.where(np.isfinite(result.history.loss), result.history.loss, np.inf)
    assert result.trainer.best_loss == losses.min()
    assert int(np.argmin(losses)) != len(losses) - 1
    again = run(
        fit_of("loss", SOME, rule=optax.sgd(0.3, momentum=0.9)), int(losses.argmin())
    )
    close(result.trainer.best, again.trainer.model, rtol=1e-9)


def test_a_guard_is_compiled_at_the_first_bad_step():
    good, bad = fit_of(size=5), fit_of("loss", SOME, size=5)
    before = cache_size(run_chunk)
    run(good)
    assert cache_size(run_chunk) == before + 1
    run(bad)
    assert cache_size(run_chunk) == before + 2
    run(bad)
    assert cache_size(run_chunk) == before + 2


def test_a_step_that_prints_is_taken_once(capfd):
    class Talks(Fit):
        def loss(self, model, batch):
            jax.debug.print("step {}", self.step_count)
            return super().loss(model, batch)

    trainer = fit_of("loss", (3,))
    run(Talks(trainer.model, optax.adam(0.05), nan_policy=vn.SkipStep()), 10)
    jax.effects_barrier()
    assert (
        capfd.readouterr().out.split()
        == " ".join(f"step {i}" for i in range(10)).split()
    )


def test_a_state_with_infinities_from_the_start_is_good():
    """Such as the best value of a schedule that waits for a plateau."""

    def init(params):
        return {"few": jnp.full(2, jnp.inf), "many": jnp.full(100, jnp.inf)}

    rule = optax.chain(
        optax.adam(0.05),
        optax.GradientTransformation(init, lambda g, s, _=None: (g, s)),
    )
    bare = run(fit_of("moments", SOME, 100, rule=rule))
    slow = run(fit_of("moments", SOME, 100, Guarded(vn.SkipStep()), rule=rule))
    assert bare.trainer.nan_report() == slow.trainer.nan_report()
    close(bare.trainer.params, slow.trainer.params, rtol=1e-9)


def test_minibatches_are_those_of_guarded_steps():
    arrays = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)))
    fits = [fit_of("loss", SOME, policy=p) for p in (None, Guarded(vn.SkipStep()))]
    data = vn.Minibatches(arrays, 8, key=jax.random.key(0))
    bare, slow = (fit.fit(data, STEPS, progress=False) for fit in fits)
    np.testing.assert_allclose(bare.history.loss, slow.history.loss, rtol=1e-9)
