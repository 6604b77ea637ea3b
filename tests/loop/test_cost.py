"""What a good step costs beside one written by hand, as XLA counts it."""

import functools
import itertools

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import optax
import pytest

import vernal as vn
from inside import many_trainers, one_trainer, run_chunk, run_many

MOST_ROWS = 16_384
RULE = optax.adam(1e-3)


def curve(params, batch):
    """Eight harmonics of one period."""
    x, y = batch
    angles = [k * (x / params["period"] + params["phase"]) for k in range(1, 9)]
    decays = [jnp.exp(-k * params["decay"]) for k in range(1, 9)]
    sums = sum(d * jnp.cos(a) for d, a in zip(decays, angles, strict=True))
    return jnp.mean(jnp.square(params["offset"] + params["power"] * sums - y))


def network(params, batch):
    x, y = batch
    for weight, bias in params:
        x = jnp.tanh(x @ weight + bias)
    return jnp.mean(jnp.square(x[:, 0] - y))


def light_curve():
    names = ("period", "phase", "decay", "offset", "power")
    x = jnp.linspace(-5.0, 5.0, 500)
    return curve, dict.fromkeys(names, jnp.array(1.5)), (x, jnp.sin(x))


def perceptron():
    sizes = (1, 256, 256, 256, 1)
    pairs = itertools.pairwise(sizes)
    params = [(jnp.full((n, m), 0.1), jnp.full((1, m), 0.1)) for n, m in pairs]
    x = jnp.linspace(-1.0, 1.0, 128)
    return network, params, (x[:, None], jnp.sin(5 * x))


# The problem; the most operations, bytes and kernels beside the program by hand. Of the
# bytes of a network most are those of what happens once in 128 steps.
CASES = {
    "light curve": (light_curve, {}, 1.02, 1.04, 1.3),
    "light curve, bounds": (light_curve, {"bounds": {"**": (0, 2)}}, 1.02, 1.05, 1.35),
    "network": (perceptron, {}, 1.07, 3.3, 2.1),
}


@functools.cache
def by_hand(problem):
    """Returns the compiled loop that one would write for a problem."""
    loss, params, batch = problem()

    @jax.jit
    def run(params, state, batch, goal):
        def body(carry):
            params, state, losses, step = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = RULE.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return params, state, losses.at[step].set(value), step + 1

        start = params, state, jnp.zeros(MOST_ROWS), jnp.int32(0)
        return jax.lax.while_loop(lambda carry: carry[-1] < goal, body, start)

    return run.lower(params, RULE.init(params), batch, jnp.int32(1)).compile()


class Compiled(Exception):
    """Leaves a fit, whose program is looked at and need not run."""


def show(run, *args):
    raise Compiled(run.lower(*args).compile())


def kernels(compiled):
    return sum(" fusion(" in line for line in compiled.as_text().splitlines())


@pytest.mark.as_compiled
@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_it_costs_by_hand(case, monkeypatch):
    problem, options, most_operations, most_bytes, most_kernels = CASES[case]
    loss, params, batch = problem()

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return loss(model, batch)

    monkeypatch.setattr(one_trainer, "run_chunk", functools.partial(show, run_chunk))
    with pytest.raises(Compiled) as caught:
        Fit(params, RULE, **options).fit(batch, 1, progress=False)
    hand, ours = by_hand(problem), caught.value.args[0]
    assert kernels(ours) <= most_kernels * kernels(hand)
    hand, ours = hand.cost_analysis(), ours.cost_analysis()
    assert ours["transcendentals"] == hand["transcendentals"]
    assert ours["flops"] <= most_operations * hand["flops"]
    assert ours["bytes accessed"] <= most_bytes * hand["bytes accessed"]


@pytest.mark.as_compiled
def test_many_compile_to_little_more_than_by_hand(monkeypatch):
    """Checks and branches of a step are shared, not part of the code of each array."""
    loss, params, batch = light_curve()
    each = jax.tree.map(lambda x: jnp.linspace(x, 2 * x, 16), params)

    @jax.jit
    def hand(params, batch):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = RULE.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        run = lambda own: jax.lax.scan(step, (own, RULE.init(own)), length=100)
        return jax.vmap(run)(params)

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return loss(model, batch)

    monkeypatch.setattr(many_trainers, "run_many", functools.partial(show, run_many))
    trainers = eqx.filter_vmap(lambda own: Fit(own, RULE))(each)
    with pytest.raises(Compiled) as caught:
        vn.fit_many(trainers, batch, 1)
    # A user's own `vmap` has no axis that is known.
    arrays, static = eqx.partition(trainers, eqx.is_array)
    unrolled = lambda own: vn.unroll(eqx.combine(own, static), batch, 100)[1]
    found = caught.value.args[0], jax.jit(jax.vmap(unrolled)).lower(arrays).compile()
    count = lambda compiled: compiled.as_text().count(" = ")
    most = 4 * count(hand.lower(each, batch).compile())
    for ours in found:
        assert count(ours) <= most


def in_branches(jaxpr, is_within=False):
    """The names of the operations of a program that are within a `cond`."""
    for equation in jaxpr.eqns:
        if is_within:
            yield equation.primitive.name
        is_branch = is_within or equation.primitive.name == "cond"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from in_branches(inner, is_branch)


@pytest.mark.parametrize("policy", [vn.StopFit(), vn.SkipStep(), vn.ZeroNans()])
def test_nothing_of_a_step_is_computed_in_a_branch(policy):
    """XLA's code for a CPU is for one thread there."""
    _, params, batch = perceptron()

    class Fit(vn.Trainer):
        def loss(self, model, batch):
            return network(model, batch)

    trainer = Fit(params, optax.adam(1e-3), nan_policy=policy)
    step = eqx.filter_make_jaxpr(lambda trainer, batch: trainer.step(batch)[0])
    found = set(in_branches(step(trainer, batch)[0].jaxpr))
    assert found
    assert not found & {"dot_general", "tanh", "sqrt", "integer_pow", "square", "div"}
