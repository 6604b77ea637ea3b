"""Users' own annotations: right ones pass everywhere, wrong ones are reported."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from beartype import beartype
from jaxtyping import Array, Float, TypeCheckError, install_import_hook, jaxtyped

import annotations
import vernal as vn

with install_import_hook("annotated", "beartype.beartype"):
    from annotated import right, wrong

# Their curve has powers of integers.
pytestmark = pytest.mark.loose_dtypes


def solver():
    return optx.LevenbergMarquardt(1e-6, 1e-6)


def sgd():
    return optax.sgd(1e-5)


def data():
    """Examples along the first axis of each array, for minibatches."""
    return {"x": jnp.linspace(-1, 1, 8), "y": jnp.linspace(-1, 3, 8)}


# What is done with a trainer that has `residuals`, or an `nll`.

FITS = {
    "step": lambda t: t.step(right.batch()),
    "fit": lambda t: t.fit(right.batch(), 3),
    "fit_many": lambda t: vn.fit_many([t, t], right.batch(), 2),
    "unroll": lambda t: vn.unroll(t, right.batch(), 2),
}
CALLS = FITS | {
    "solve": lambda t: t.solve(solver(), right.batch()),
    "solve a minimiser": lambda t: t.solve(optx.BFGS(1e-3, 1e-3), right.batch()),
    "solve many": lambda t: vn.fit_many([t, t], right.batch(), 9, solver=solver()),
    "fisher": lambda t: t.fisher(right.batch()),
    "fisher of blocks": lambda t: t.fisher(right.batch(), blocks=["slope"]),
    "whiten": lambda t: t.whiten(right.batch()),
    "standard_errors": lambda t: t.standard_errors(right.batch()),
    "table": lambda t: t.table(right.batch()),
    "objective": lambda t: call(*t.objective(right.batch())),
}


def call(fn, point):
    return jax.jit(fn)(point)


def reported(name):
    """The checker's own error, which names the user's function."""
    return pytest.raises(TypeCheckError, match=rf"annotated\.wrong\.{name}\.?\n?")


def residuals(kind=right.ByResiduals, **options):
    return kind(right.model(), sgd(), **options)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*far from the minimum")
def test_what_is_right_passes(name):
    CALLS[name](residuals())


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_is_reported(name):
    with reported("Residuals.residuals") as caught:
        CALLS[name](residuals(wrong.Residuals))
    # By itself, and once.
    assert not isinstance(caught.value.__cause__, TypeCheckError)
    assert str(caught.value).count("wrong.Residuals.residuals") == 1


@pytest.mark.parametrize("name", ["step", "fit", "solve a minimiser", "objective"])
def test_a_likelihood_and_a_loss(name):
    CALLS[name](right.ByLikelihood(right.model(), sgd()))
    with reported("Likelihood.nll"):
        CALLS[name](wrong.Likelihood(right.model(), sgd()))
    if name != "objective":
        with reported("Loss.loss"):
            CALLS[name](wrong.Loss(right.model(), sgd()))


@pytest.mark.parametrize("name", FITS)
def test_keys_metrics_states_and_policies(name):
    policy = right.Lenient(jnp.asarray(3)) | vn.SkipStep()
    trainer = right.ByLoss(
        right.model(),
        vn.ParamOptimiser({"slope": optax.sgd(right.rate), right.is_bend: sgd()}),
        nan_policy=policy,
        key=jax.random.key(0),
        state=jnp.asarray(0),
    )
    FITS[name](trainer)
    with reported("Judges.apply"):
        FITS[name](residuals(nan_policy=wrong.Judges(jnp.asarray(3))))


def test_all_that_a_fit_calls():
    validation = (right.batch(5), 2)
    trainer = residuals(right.Hooked)
    result = trainer.fit(
        right.batch(),
        4,
        record=("slope", right.is_bend, "grad_norm"),
        validation=validation,
        stop=right.Near(1e-9) | vn.Patience(5),
        callback=right.callback,
    )
    assert result.trainer.learning_rates()
    many = vn.fit_many(
        [trainer, trainer],
        right.batch(),
        4,
        validation=validation,
        stop=right.Near(1e-9),
        callback=right.callback,
    )
    assert many.best.slope.shape == ()
    again = trainer.replace(model=right.model(), optimiser=sgd())
    assert isinstance(again, right.Hooked)


WRONG = {
    "Evaluates.evaluate": lambda: residuals(wrong.Evaluates).fit(
        right.batch(), 2, validation=(right.batch(), 1)
    ),
    "Constrains.constrain": lambda: residuals(wrong.Constrains).step(right.batch()),
    "Transforms.transform_grads": lambda: residuals(wrong.Transforms).step(
        right.batch()
    ),
    "Begins.init": lambda: residuals(nan_policy=wrong.Begins(jnp.asarray(1))),
    "Stops.apply": lambda: residuals().fit(right.batch(), 2, stop=wrong.Stops(1.0)),
    "rate": lambda: residuals_at(wrong.rate).step(right.batch()),
    "is_bend": lambda: residuals(train=wrong.is_bend),
    "callback": lambda: residuals().fit(right.batch(), 2, callback=wrong.callback),
    "plain_loss": lambda: vn.fit(
        wrong.plain_loss, right.model(), sgd(), right.batch(), 2
    ),
    "total": lambda: vn.hessian(wrong.total, {"a": jnp.ones(3)}),
}


def residuals_at(rate):
    return right.ByResiduals(right.model(), optax.sgd(rate))


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_annotation_is_reported(name):
    with reported(name):
        WRONG[name]()


def test_plain_functions():
    model, batch = right.model(), right.batch()
    vn.fit(right.plain_loss, model, sgd(), batch, 2)
    tree = {"a": jnp.ones(3), "b": jnp.ones(())}
    assert vn.hessian(right.total, tree).shape == (4, 4)
    vn.hessian_matvec(right.total, tree)(tree)


def test_batches_of_several_lengths():
    """Names of axes are those of one call."""
    trainer = residuals()
    held_out = right.batch(3)
    for size in (8, 5):
        trainer.fit(right.batch(size), 1, validation=(held_out, 1))
    trainer.fit(vn.Stream([right.batch(4), right.batch(6)]), 2)


# A checker on one method alone, with no hook.


class OneMethod(vn.Trainer):
    @jaxtyped(typechecker=beartype)
    def residuals(
        self, model: dict[str, Float[Array, " k"]], batch: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        return jnp.sum(model["a"]) * batch - 1


@jaxtyped(typechecker=beartype)
class OneClass(eqx.Module):
    weights: Float[Array, " n"]
    bias: Float[Array, " n"]


class Sums(vn.Trainer):
    def residuals(self, model, batch):
        return model.weights * batch + model.bias


def test_a_checker_on_one_method_or_class():
    trainer = OneMethod({"a": jnp.ones(2)}, sgd())
    trainer.fit(jnp.ones(3), 2)
    trainer.whiten(jnp.ones(3)).solve(solver(), jnp.ones(3))
    models = [OneClass(jnp.ones(3), jnp.full(3, x)) for x in (0.0, 1.0)]
    trainers = [Sums(model, sgd()) for model in models]
    vn.fit_many(trainers, jnp.ones((2, 3)), 9, data_axis=0, solver=solver())
    with pytest.raises(TypeCheckError, match="residuals"):
        trainer.step(jnp.ones((3, 1)))


# Beartype by itself checks axes within whatever call of jaxtyping's there is around.


@beartype
def leaning(params: Float[Array, " D"]) -> Float[Array, ""]:
    assert isinstance(params, Float[Array, " N"])
    return jnp.sum(params**2)


@beartype
def many_values(params: Float[Array, " N"]) -> Float[Array, " D"]:
    return jnp.concatenate([params, params])


# With `--annotations` more calls of jaxtyping's are around a function than users have.
@pytest.mark.as_compiled
def test_names_of_axes_do_not_meet_those_of_the_library():
    point = jnp.ones(3)
    np.testing.assert_array_equal(vn.hessian(leaning, point), 2 * np.eye(3))
    assert vn.jacobian(many_values, point).shape == (6, 3)
    assert vn.gauss_newton(many_values, point).shape == (3, 3)
    product = vn.gauss_newton_matvec(many_values, point)
    vn.EigenProjector.from_matvec(product, point, 1, key=jax.random.key(0))


# What `--annotations` checks vernal with leaves jaxtyping out where it is not needed.


def half(number: int) -> float:
    return number / 2


def added(one: Float[Array, " N"], other: Float[Array, " N"]) -> Float[Array, " N"]:
    return jnp.concatenate([one, other])


@pytest.mark.parametrize(
    ("fn", "args"),
    [(half, [0.5]), (added, [jnp.ones(2), jnp.ones(3)]), (added, [jnp.ones(2)] * 2)],
    ids=["a plain one", "axes of arguments", "an axis of what is returned"],
)
def test_vernal_is_checked_at_every_call(fn, args, monkeypatch):
    monkeypatch.setattr(fn, "__module__", "vernal.example")
    checked = annotations.jaxtyped(typechecker=annotations.checks)(fn)
    with pytest.raises(TypeCheckError):
        checked(*args)
    with annotations.unchecked():
        checked(*args)
