import copy
import dataclasses
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import vernal as vn
from marked import marked
from vernal._closure.reads import reads
from vernal._optimiser.transform import AbstractTransform, Transform, as_transform

pytestmark = pytest.mark.loose_dtypes

# Two dtypes at once, so that each alias is compiled once for both.
PARAMS = {
    "b": jnp.linspace(-1.0, 1.0, 3),
    "w": jnp.linspace(0.3, 1.7, 6, dtype=jnp.float32).reshape(2, 3),
}


def loss(params):
    return jnp.sum(jnp.sin(params["w"] * params["b"][None] + 0.9) ** 2)


def single_loss(params):
    return jnp.sum(jnp.sin(params["w"]) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(loss))


# Of each kind some: for XLA a rate is an argument here, and there a constant; the bits
# of Adan and of the optimistic Adam differ without its optimisation.
AS_FOR_USERS = {"adafactor", "adam", "adan", "lamb", "muon", "optimistic_adam"}
AS_FOR_USERS |= {"prodigy", "rprop", "sgd"}
ON_OLDEST = {"adafactor", "adam", "dadapt_adamw", "lbfgs", "momo", "muon", "sgd"}


def aliases():
    """Every transformation of Optax that a learning rate is enough for."""
    for module in (optax, optax.contrib):
        for name, fn in sorted(vars(module).items()):
            if not inspect.isfunction(fn) or name.startswith("_"):
                continue
            parameters = inspect.signature(fn).parameters
            rest = [p for n, p in parameters.items() if n != "learning_rate"]
            if "learning_rate" not in parameters or name in ("noisy_sgd", "sophia"):
                continue
            if all(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in rest):
                marks = [pytest.mark.as_compiled] if name in AS_FOR_USERS else []
                marks += [pytest.mark.seams] if name in ON_OLDEST else []
                yield pytest.param(fn, id=f"{module.__name__}.{name}", marks=marks)


def of(tx):
    return Transform.of(tx, "tx")


def run(tx, params=PARAMS, steps=5, objective=loss):
    takes_extra = isinstance(tx, optax.GradientTransformationExtraArgs)

    def update(tx, grads, state, params, value):
        extra = {"value": value, "grad": grads, "value_fn": objective}
        return tx.update(grads, state, params, **(extra if takes_extra else {}))

    state, out = tx.init(params), []
    if isinstance(tx, AbstractTransform):
        step = eqx.filter_jit(update)
    else:
        step = jax.jit(lambda *args: update(tx, *args))
        step = (lambda inner: lambda _, *args: inner(*args))(step)
    evaluate = value_and_grad if objective is loss else jax.value_and_grad(objective)
    for _ in range(steps):
        value, grads = evaluate(params)
        updates, state = step(tx, grads, state, params, value)
        params = optax.apply_updates(params, updates)
        out.append((updates, params, state))
    return out


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("alias", [*aliases()])
def test_agrees_with_optax_to_the_bit(alias):
    tx = alias(learning_rate=1e-2)
    assert_same_bits(run(tx), run(of(tx)))


@pytest.mark.seams
def test_the_two_that_need_more_than_a_rate():
    params = {"w": PARAMS["w"]}
    noisy = optax.noisy_sgd(1e-2, key=jax.random.key(0))
    for tx in (noisy, optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2)):
        assert_same_bits(run(tx), run(of(tx)))
    tx = optax.contrib.sophia(1e-2)
    ours = of(tx)
    update = jax.jit(lambda t, *args: t.update(*args, obj_fn=single_loss))
    grads = jax.grad(single_loss)(params)
    expected = jax.jit(lambda *args: tx.update(*args, obj_fn=single_loss))(
        grads, tx.init(params), params
    )
    assert_same_bits(expected, update(ours, grads, ours.init(params), params))


SCHEDULES = {
    "constant": lambda r: optax.constant_schedule(r),
    "linear": lambda r: optax.linear_schedule(r, r / 10, 4, 1),
    "exponential": lambda r: optax.exponential_decay(r, 3, 0.7, end_value=r / 8),
    "cosine": lambda r: optax.cosine_decay_schedule(r, 4),
    "piecewise": lambda r: optax.piecewise_constant_schedule(r, {2: 0.1, 4: 0.5}),
    "onecycle": lambda r: optax.cosine_onecycle_schedule(5, r),
    "warmup": lambda r: optax.warmup_cosine_decay_schedule(0.0, r, 2, 5),
}


@pytest.mark.parametrize(
    "name", marked(pytest.mark.as_compiled, SCHEDULES, "exponential", "onecycle")
)
def test_schedules_agree_to_the_bit(name):
    make = SCHEDULES[name]
    tx = optax.sgd(make(0.1))
    assert_same_bits(run(tx), run(of(tx)))
    others = {k: of(optax.sgd(v(0.1))).closure.skeleton for k, v in SCHEDULES.items()}
    assert len(set(others.values())) == len(SCHEDULES)


@pytest.mark.seams
@pytest.mark.parametrize(
    "name", ["constant", "linear", "exponential", "cosine", "piecewise"]
)
def test_a_schedule_with_another_rate_shares(name):
    a, b = (of(optax.adam(SCHEDULES[name](r))) for r in (0.1, 0.2))
    assert a.closure.skeleton is b.closure.skeleton
    assert not eqx.tree_equal(a, b)


@pytest.mark.seams
def test_what_shares_one_compilation():
    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def first(tx):
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]

    slow, fast = (
        first(of(optax.adamw(r, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))))
        for r in (1e-2, 1e-1)
    )
    np.testing.assert_allclose(fast["w"], 10 * slow["w"], rtol=1e-6)


@pytest.mark.seams
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (optax.adam(1e-2), optax.adam(1e-2, b1=0.8)),
        (optax.adam(1e-2), optax.adam(1e-2, eps=1e-7)),
        (optax.adam(1e-2), optax.adam(1e-2, nesterov=True)),
        (
            optax.sgd(optax.linear_schedule(1.0, 0.0, 5)),
            optax.sgd(optax.linear_schedule(1.0, 0.0, 6)),
        ),
        (optax.sgd(lambda count, power=2: 0.1**power), optax.sgd(lambda count: 0.1)),
        (
            optax.masked(optax.sgd(0.1), {"a": True}),
            optax.masked(optax.sgd(0.1), {"a": 1}),
        ),
    ],
)
def test_what_never_shares(a, b):
    assert of(a).closure.skeleton != of(b).closure.skeleton


def defaults_apart():
    def make(power):
        def schedule(count, power=power):
            return 0.1 * power

        return optax.sgd(schedule)

    return make(1), make(2)


def test_defaults_tell_schedules_apart():
    a, b = map(of, defaults_apart())
    assert a.closure.skeleton != b.closure.skeleton


class Doubled(AbstractTransform):
    factor: jax.Array

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra):
        assert "value" in extra
        return jax.tree.map(lambda g: g * self.factor.astype(g.dtype), updates), state


LABELS = {"b": "x", "w": "y"}
COMPOSED = {
    "chain": lambda r: optax.chain(optax.clip(1.0), optax.adam(r)),
    "inject": lambda r: optax.inject_hyperparams(optax.adam)(learning_rate=r),
    "multi": lambda r: optax.multi_transform(
        {"x": optax.adam(r), "y": optax.sgd(r)}, LABELS
    ),
    "masked": lambda r: optax.masked(
        optax.adam(r), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "finite": lambda r: optax.apply_if_finite(optax.adam(r), 3),
    "flatten": lambda r: optax.flatten(optax.adam(r)),
    "lookahead": lambda r: optax.contrib.mechanize(optax.adam(r)),
    "plateau": lambda r: optax.chain(optax.adam(r), optax.contrib.reduce_on_plateau()),
    "named": lambda r: optax.named_chain(("a", optax.adam(r)), ("b", optax.clip(1.0))),
    "module": lambda r: optax.chain(optax.clip(1.0), Doubled(jnp.asarray(-r))),
    "transform": lambda r: optax.chain(optax.clip(1.0), of(optax.adam(r))),
    # What has its functions in an object of a class of Optax.
    "accumulated": lambda r: optax.chain(
        optax.clip(1.0), optax.MultiSteps(optax.adam(r), 2).gradient_transformation()
    ),
    "skipping": lambda r: optax.MultiSteps(
        optax.sgd(r), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.seams
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_survive_and_share(name):
    make = COMPOSED[name]
    a, b = of(make(1e-2)), of(make(2e-2))
    assert a.closure.skeleton is b.closure.skeleton
    # The rate; that of Adam twice where it is composed; each that is injected.
    assert len(a.closure.leaves) in ((5,) if name == "inject" else (1, 2))
    objective, params = loss, PARAMS
    if name in ("flatten", "lookahead", "accumulated", "skipping"):
        # Of these, Optax's own state changes its dtype in a mixed tree.
        params, objective = {"w": PARAMS["w"]}, single_loss
    assert_same_bits(
        run(make(1e-2), params, 3, objective), run(a, params, 3, objective)
    )


def test_lookahead_is_refused_by_name():
    tx = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    accumulated = optax.MultiSteps(tx, 2).gradient_transformation()
    masked = optax.masked(tx, {"x": True})
    for given in (tx, optax.chain(optax.clip(1.0), tx), masked, accumulated):
        with pytest.raises(TypeError, match=r"`rules\['x'\]` is, .*optax\.lookahead"):
            vn.ParamOptimiser({"x": given})


@pytest.mark.seams
@pytest.mark.parametrize(
    "tx",
    [
        optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 5)),
    ],
)
def test_what_cannot_be_converted_still_works(tx):
    params = {"w": PARAMS["w"]}
    assert_same_bits(
        run(tx, params, 3, single_loss), run(of(tx), params, 3, single_loss)
    )


@pytest.mark.seams
def test_rates_keep_dtypes():
    params = {"h": jnp.ones(2, jnp.bfloat16), "f": jnp.ones(2, jnp.float32)}
    for tx in (of(optax.adam(0.1)), of(optax.sgd(SCHEDULES["linear"](0.1)))):
        updates, _ = eqx.filter_jit(lambda t: t.update(params, t.init(params)))(tx)
        assert updates["h"].dtype == jnp.bfloat16
        assert updates["f"].dtype == jnp.float32
        stacked = jax.tree.map(lambda *x: jnp.stack(x), tx, tx)
        many = jax.jit(jax.vmap(lambda t: t.update(params, t.init(params))[0]))(stacked)
        assert many["h"].dtype == jnp.bfloat16
        assert many["f"].shape == (2, 2)


@pytest.mark.seams
def test_the_face_towards_optax():
    tx = of(optax.adam(1e-2))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert isinstance(tx, eqx.Module)
    assert tx.__class__ is type(tx) is Transform
    assert {eqx.Module, optax.GradientTransformationExtraArgs} < {*Transform.__mro__}
    init, update = tx
    assert len(tx) == len([*tx]) == len({**tx._asdict()}) == 2
    assert tx[0] == init
    assert type(tx._replace(init=init)) is optax.GradientTransformationExtraArgs
    with pytest.raises(dataclasses.FrozenInstanceError, match="'closure'"):
        tx.closure = None
    with pytest.raises(dataclasses.FrozenInstanceError, match="'other'"):
        tx.other = None
    assert [field.name for field in dataclasses.fields(tx)] == ["closure"]
    assert eqx.tree_equal(tx, dataclasses.replace(tx, closure=tx.closure))
    (keys, _), *_ = jax.tree_util.tree_flatten_with_path(tx)[0]
    assert jax.tree_util.keystr(keys) == ".closure.leaves[0]"
    state = jax.jit(tx.init)(PARAMS)
    assert_same_bits(jax.jit(update)(PARAMS, state), jax.jit(tx.update)(PARAMS, state))
    assert optax.with_extra_args_support(tx) is tx
    assert repr(tx).startswith("Transform(\n  closure=Closure(")
    assert "Transform(" in repr({"a": tx})
    assert "Transform(" in eqx.tree_pformat((tx, Doubled(jnp.ones(()))))
    assert "factor=f64[]" in repr(Doubled(jnp.ones(())))
    for other in (copy.copy(tx), copy.deepcopy(tx), jax.jit(lambda t: t)(tx)):
        assert type(other) is Transform
        assert eqx.tree_equal(tx, other)
    assert jax.tree.leaves(tx)[0] == -1e-2


@pytest.mark.seams
def test_gradients_with_respect_to_a_rate():
    def moved(rate):
        tx = of(optax.sgd(rate))
        return jnp.sum(tx.update(PARAMS, tx.init(PARAMS))[0]["w"])

    slope = jax.grad(moved)(0.1)
    np.testing.assert_allclose(slope, -jnp.sum(PARAMS["w"]), rtol=1e-6)
    rates = jnp.asarray([0.1, 0.2])
    np.testing.assert_allclose(jax.vmap(moved)(rates), slope * rates, rtol=1e-6)


@pytest.mark.own_words
@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (0.01, r"`rules\['a'\]` is the number 0.01.*`optax.sgd\(0.01\)`"),
        (None, r"`None`.*set_to_zero"),
        (optax.adam, r"the function `adam`.*`adam\(1e-3\)`"),
        (optax.constant_schedule(1.0), "schedule"),
        (optax.MultiSteps(optax.sgd(0.1), 2), "gradient_transformation"),
        ("adam", r"of type `str`.*optax.adam"),
    ],
)
def test_what_is_not_a_transformation(tx, message):
    with pytest.raises(TypeError, match=message):
        as_transform(tx, "rules['a']")


def test_as_transform_leaves_one_alone():
    tx = Doubled(jnp.ones(()))
    assert as_transform(tx, "tx") is tx
    assert isinstance(as_transform(optax.sgd(0.1), "tx"), Transform)


def test_what_code_reads_from_an_optimiser_is_its_fields():
    made = lambda decay: vn.ParamOptimiser({"w": optax.adam(1e-2, b1=decay)})
    first = made(0.9)
    assert reads(first).key == reads(first).key
    assert reads(first).key != reads(made(0.8)).key


def test_what_takes_no_more_than_the_gradients():
    """Optax says of SAM that it takes any argument, and it takes none."""
    sam = optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    )
    params = {"a": jnp.asarray([1.0, 2.0])}
    loss = lambda params, target: jnp.sum((params["a"] - target) ** 2)
    found = vn.fit(loss, params, sam, jnp.asarray(3.0), 6).model
    state = sam.init(params)
    for _ in range(6):
        grads = jax.grad(loss)(params, 3.0)
        updates, state = sam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found["a"], params["a"], rtol=1e-6)


# In a loop XLA merges the rates of these with others where they are constants.
MERGED = {
    "adagrad": optax.adagrad,
    "adadelta": optax.adadelta,
    "accumulated": lambda r: optax.MultiSteps(
        optax.adam(r), 3
    ).gradient_transformation(),
}


@pytest.mark.as_compiled
@pytest.mark.parametrize("name", MERGED)
def test_a_fit_is_a_loop_of_optax_to_which_the_rate_is_given(name):
    params = {"w": PARAMS["w"]}

    @jax.jit
    def by_hand(rate, params):
        tx = MERGED[name](rate)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(single_loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=25)[0][0]

    objective = lambda params, batch: single_loss(params)
    found = vn.fit(objective, params, MERGED[name](1e-2), 0.0, 25).model
    assert_same_bits(found, by_hand(jnp.asarray(1e-2, jnp.float32), params))
