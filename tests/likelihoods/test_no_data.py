"""A mask that leaves out all data: any model fits them, which a warning says."""

import warnings

import jax
import jax.numpy as jnp
import optax
import optimistix as optx
import pytest

import vernal as vn
from vernal.likelihoods import Gaussian, Poisson, Robust

X = jnp.linspace(0.0, 1.0, 20)
Y = 2 * X + 1
NONE = (X, Y, X > 5)
SOLVER = optx.BFGS(1e-6, 1e-6)
KINDS = {
    "Gaussian": lambda mean, y, where: Gaussian(mean, y, 0.1, where=where),
    "Poisson": lambda mean, y, where: Poisson(mean, y, where=where),
    "Robust": lambda mean, y, where: Robust(mean - y, "huber", where=where),
}


class Fit(vn.Trainer):
    kinds: tuple[str, ...]

    def __init__(self, slope=1.0, kinds=("Gaussian",), **options):
        self.kinds = kinds
        model = {"slope": jnp.array(slope), "offset": jnp.array(1.0)}
        super().__init__(model, optax.adam(0.1), **options)

    def residuals(self, model, batch):
        x, y, where = batch
        mean = model["slope"] * x + model["offset"]
        return [KINDS[kind](mean, y, where) for kind in self.kinds]


def many(**options):
    return lambda data: vn.fit_many([Fit(2.0), Fit(1.0)], data, 5, **options)


ENTRANCES = {
    "fit": lambda data: Fit().fit(data, 5),
    "fit, minibatches": lambda data: Fit().fit(
        vn.Minibatches(data, 5, key=jax.random.key(0)), 5
    ),
    "fit, stream": lambda data: Fit().fit(vn.Stream([data] * 6), 5),
    "fit, whitened": lambda data: (
        Fit().whiten((X, Y, X < 5), optimiser=optax.adam(0.1)).fit(data, 5)
    ),
    "solve": lambda data: Fit().solve(SOLVER, data),
    "fit_many": many(),
    "fit_many, solver": many(solver=SOLVER),
}


def test_each_likelihood():
    """A datum that one of them counted would be left."""
    with pytest.warns(UserWarning, match="`fit`: no datum is left.*`where`"):
        Fit(kinds=tuple(KINDS)).fit(NONE, 5, progress=False)


@pytest.mark.loose_ranks
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_each_entrance(entrance):
    name = entrance.split(",")[0]
    with pytest.warns(UserWarning, match=f"`{name}`: no datum .*is left"):
        ENTRANCES[entrance](NONE)


VALIDATED = {
    "fit": lambda options: Fit().fit((X, Y, X < 5), 5, **options),
    "fit_many": lambda options: many(**options)((X, Y, X < 5)),
}


@pytest.mark.parametrize("entrance", VALIDATED)
def test_a_validation(entrance):
    with pytest.warns(UserWarning, match="`validation`: no datum .*is left"):
        VALIDATED[entrance]({"validation": (NONE, 2)})


def test_all_members_without_data_are_named():
    masks = jnp.stack([jnp.full(X.shape, i % 2 == 1) for i in range(22)])
    trainers = [Fit(3.0 + i) for i in range(22)]
    axes = None, None, 0
    told = "member 0 is left.* The loss of member 2, 4, .*16 and of 2 more is zero, too"
    with pytest.warns(UserWarning, match=told):
        vn.fit_many(trainers, (X, Y, masks), 3, data_axis=axes)


BEST = {
    "fit_many": many(data_axis=0),
    "solver": many(data_axis=0, solver=SOLVER),
    "a validation": lambda data: vn.fit_many(
        [Fit(2.0), Fit(1.0)],
        tuple(jnp.stack([leaf, leaf]) for leaf in (X, Y, X < 5)),
        5,
        data_axis=0,
        validation=(data, 2),
    ),
}


@pytest.mark.parametrize("case", BEST)
def test_a_member_without_data_is_not_the_best(case):
    noisy = Y + 0.1 * jnp.cos(9 * X)
    batches = (X, noisy, X < 5), NONE, (X, noisy, X < 5)
    for which in (slice(0, 2), slice(1, 3)):
        data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches[which])
        lost = 1 - which.start
        with pytest.warns(UserWarning, match=f"no datum of member {lost} is left"):
            result = BEST[case](data)
        assert result.best_losses[lost] == 0
        assert result.best_index == 1 - lost
        assert f"of member {1 - lost})" in repr(result)


def test_an_exact_start_is_the_best():
    data = jax.tree.map(lambda *x: jnp.stack(x), (X, Y, X < 5), (X, Y + 1, X < 5))
    assert many(data_axis=0)(data).best_index == 0


def test_one_program_counts_the_data_of_all_members():
    """Where each has a loss of zero with data, as of an exact start."""
    traced = []

    class Counted(Fit):
        def residuals(self, model, batch):
            traced.append(1)
            return super().residuals(model, batch)

    counts = []
    for size in 2, 5:
        traced.clear()
        vn.fit_many([Counted(2.0) for _ in range(size)], (X, Y, X < 5), 5)
        counts.append(len(traced))
    assert counts[1] <= counts[0]


SOUND = {
    "one datum is left": lambda: Fit().fit((X, Y, X == 0), 5),
    "an exact start": lambda: Fit(2.0).fit((X, Y, X < 5), 5),
    # Then the prior alone is the answer.
    "a prior": lambda: Fit(priors={"slope": vn.Normal(1.0, 1.0)}).fit(NONE, 5),
    "a validation": lambda: Fit().fit((X, Y, X < 5), 5, validation=((X, Y, X < 5), 2)),
    "one batch of two": lambda: Fit().fit(vn.Stream([(X, Y, X < 5), NONE]), 2),
}


@pytest.mark.parametrize("case", SOUND)
def test_nothing_is_said_of(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SOUND[case]()
