"""Rules of a `ParamOptimiser` in the latent space of blocks, and the tree it is."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn
from models import Gaussian, GaussianFit

from_blocks = vn.EigenProjector.from_blocks
SGD = optax.sgd(0.1)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# --- the latent tree ---


class Optics(eqx.Module):
    wfe: jax.Array
    pupil: jax.Array | None


class Telescope(eqx.Module):
    """Its fields are not in the order of the alphabet, and two are not trained."""

    position: jax.Array
    flux: jax.Array
    optics: Optics
    layers: list[jax.Array]
    gain: jax.Array | None


def telescope(dtype=jnp.float64, other=None):
    return Telescope(
        position=jnp.asarray([0.5, -0.5], other or dtype),
        flux=jnp.asarray(1e4, dtype),
        optics=Optics(jnp.arange(4, dtype=dtype).reshape(2, 2), None),
        layers=[jnp.ones(2, dtype), jnp.zeros((), dtype)],
        gain=None,
    )


D = 10


def fisher(size, seed=0):
    root = np.random.default_rng(seed).normal(size=(2 * size, size))
    return root.T @ root


ONE_EACH = {"optics.wfe": fisher(4), "position": fisher(2), "flux": fisher(1)}


def test_it_has_the_paths_of_the_parameters_in_their_order():
    params = telescope()
    latent = from_blocks(ONE_EACH, params).to_latent(params)
    assert vn.paths(latent) == vn.paths(params)
    # Frozen, but no stranger to a rule.
    assert latent["gain"] is latent["optics"]["pupil"] is None


@pytest.mark.parametrize("kind", [list, reversed])
def test_a_dictionary_by_hand_will_do(kind):
    projector = from_blocks(ONE_EACH, telescope())
    latent = projector.to_latent(jax.tree.map(lambda x: x + 1, telescope()))
    plain = {k: latent[k] for k in kind(list(latent)) if latent[k] is not None}
    plain["optics"] = {"wfe": np.asarray(latent["optics"]["wfe"])}
    assert eqx.tree_equal(projector.to_params(plain), projector.to_params(latent))
    for wrong in ({"flux": jnp.ones(1)}, plain | {"new": jnp.ones(1)}, jnp.ones(D)):
        with pytest.raises(ValueError, match="`latent` must have the structure"):
            projector.to_params(wrong)
    with pytest.raises(ValueError, match=r"`latent`.*'flux' has shape \(2,\)"):
        projector.to_params(plain | {"flux": jnp.ones(2)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.dumps(p)])
def test_it_can_be_copied_and_pickled(copied):
    params = {"b": jnp.ones(2), "a": [jnp.ones(()), None]}
    projector = from_blocks({"b": fisher(2)}, params)
    again = copied(projector)
    again = pickle.loads(again) if isinstance(again, bytes) else again
    assert eqx.tree_equal(again, projector)
    assert eqx.tree_equal(again.to_latent(params), projector.to_latent(params))


@pytest.mark.parametrize("other", [None, jnp.float64])
def test_every_leaf_keeps_its_precision(other):
    params = telescope(jnp.float32, other)
    blocks = {"optics": fisher(4), ("flux", "layers.0"): fisher(3)}
    blocks = {name: matrix.astype(np.float32) for name, matrix in blocks.items()}
    # Nothing is promoted by chance where all is of one precision.
    with jax.numpy_dtype_promotion("standard" if other else "strict"):
        projector = from_blocks(blocks, params)
        moved = projector.to_params(projector.to_latent(params))
        again = projector.precondition(projector.standard_errors())
        numbers = (projector.matrix, projector.covariance(), projector.eigenvalues)
        numbers += (projector.log_abs_det, projector.condition_number)
    for tree in (moved, again):
        for leaf, like in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
            assert leaf.dtype == like.dtype
    assert {number.dtype for number in numbers} == {np.dtype(other or np.float32)}


def test_the_cost_is_the_sum_of_the_blocks():
    n, size = 200, 50
    params = {f"p{i}": jnp.zeros(size) for i in range(n)}
    projector = from_blocks({name: np.eye(size) for name in params}, params)
    held = sum(leaf.size for leaf in jax.tree.leaves(projector))
    assert held < 1.2 * n * size**2
    latent = projector.to_latent(params)
    program = jax.make_jaxpr(lambda p, u: p.to_params(u))(projector, latent)
    sizes = [v.aval.size for eqn in program.eqns for v in eqn.outvars]
    assert max(sizes) == size**2


def test_made_under_jit_and_vmap():
    stack = np.stack([fisher(4, seed) for seed in range(3)])
    make = lambda fmat: from_blocks({"optics": fmat}, telescope(), rank={"optics": 3})
    mapped = eqx.filter_jit(eqx.filter_vmap(make))(jnp.asarray(stack))
    assert (mapped.rank, mapped.latent_size) == (D - 1, D - 1)
    found = jax.vmap(lambda p: p.precondition(telescope()))(mapped)
    for index, fmat in enumerate(stack):
        one = jax.tree.map(lambda x, i=index: x[i], found)
        expected = make(fmat).precondition(telescope())
        np.testing.assert_allclose(flat(one), flat(expected), rtol=1e-8)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ({(): fisher(1)}, ValueError, r"the block \(\) selects nothing"),
        ({"gain": fisher(1)}, vn.UnknownPathError, "'gain'"),
        ({"flux": 3.0}, TypeError, "blocks"),
    ],
)
def test_blocks_of_nothing(blocks, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        from_blocks(blocks, telescope())


# --- rules ---

X = jnp.linspace(-4.0, 4.0, 40)


class Scene(eqx.Module):
    """Two peaks, each seen by a detector of its own; and a gain."""

    narrow: Gaussian
    broad: Gaussian
    gain: jax.Array


def scene(offset=0.0, dtype=jnp.float64):
    values = {"narrow": (0.3, 0.8, 2.0), "broad": (-0.5, 2.0, 500.0)}
    shift = 1 + offset * np.array([0.1, 0.1, 0.2])
    peaks = {
        name: Gaussian(*(jnp.asarray(v, dtype) for v in np.array(own) * shift))
        for name, own in values.items()
    }
    return Scene(**peaks, gain=jnp.asarray(1.0, dtype))


SIGMA = {"narrow": 0.05, "broad": 3.0}
BLOCKS = tuple(SIGMA)


class SceneFit(vn.Trainer):
    def residuals(self, model, batch):
        seen = [(getattr(model, k)(X) - batch[k]) / SIGMA[k] for k in BLOCKS]
        return jnp.concatenate(seen) * model.gain


START = scene(1.0)
TRUTH = {name: getattr(scene(), name)(X) for name in BLOCKS}
TRAINED = vn.split(START, BLOCKS)[0]


def fishers(selectors=BLOCKS):
    return SceneFit(START, train=BLOCKS).fisher(TRUTH, blocks=selectors)


PROJECTOR = from_blocks(fishers(), TRAINED)

TRANSFORMS = {
    "adam, of a group": (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.2)),
        1,
    ),
    "a window on momentum": (vn.window(optax.sgd(0.3, momentum=0.2), start=5), 1),
    "scaled": (optax.adam(0.4), 0.5),
    "a line search": (optax.lbfgs(), 1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_rule_goes_as_if_alone(name):
    transform, scale = TRANSFORMS[name]
    members = ("narrow.mean", "narrow.std", "narrow.power")
    rules = {members: transform, "broad": optax.adam(0.1), "gain": None}
    optimiser = vn.ParamOptimiser(rules).with_scale({"narrow.std": scale})
    together = SceneFit(START, optimiser, projector=PROJECTOR)
    together = together.fit(TRUTH, 20, progress=False)

    alone = GaussianFit(
        START.narrow,
        optax.chain(transform, optax.scale(scale)) if scale != 1 else transform,
        projector=vn.EigenProjector.from_fisher(fishers()["narrow"], START.narrow),
    )
    sigma = jnp.full(X.shape, SIGMA["narrow"])
    alone = alone.fit((X, TRUTH["narrow"], sigma), 20, progress=False)
    np.testing.assert_allclose(
        flat(together.model.narrow), flat(alone.model), rtol=1e-10
    )
    assert alone.history.loss[-1] < alone.history.loss[0]
    assert together.history.loss[-1] < together.history.loss[0]
    assert together.model.gain == 1


def test_a_fit_and_a_solve_in_one_latent_space():
    optimiser = vn.ParamOptimiser({"narrow": optax.sgd(0.6), "broad": optax.sgd(0.9)})
    trainer = SceneFit(START, optimiser, projector=PROJECTOR)
    result = trainer.fit(TRUTH, 60, record=("narrow.mean",), progress=False)
    np.testing.assert_allclose(flat(result.model), flat(scene()), rtol=1e-6)
    assert result.history["narrow.mean"].shape == (60,)
    solved = trainer.solve(optx.BFGS(1e-8, 1e-8), TRUTH)
    np.testing.assert_allclose(flat(solved.model), flat(scene()), rtol=1e-5)


class Bounded(SceneFit):
    def constrain(self, model):
        clip = lambda x: jnp.clip(x, 0.85)
        return eqx.tree_at(lambda m: m.narrow.std, model, replace_fn=clip)


def test_a_constraint_is_encoded_again():
    optimiser = vn.ParamOptimiser({BLOCKS: optax.sgd(0.5)})
    projector = from_blocks(fishers(vn.paths(TRAINED)), TRAINED)
    trainer = Bounded(START, optimiser.with_scale({"broad": 0.1}), projector=projector)
    trainer = trainer.fit(TRUTH, 20, progress=False).trainer
    np.testing.assert_allclose(trainer.model.narrow.std, 0.85, rtol=1e-12)
    back = trainer.projector.to_params(trainer.latent)
    np.testing.assert_allclose(flat(back), flat(trainer.params), rtol=1e-12)


def test_a_constraint_is_refused_where_a_block_was_dropped():
    projector = from_blocks(fishers() | {"narrow": np.ones((3, 3))}, TRAINED)
    with pytest.raises(ValueError, match=r'`constrain`.*on_null="prior"'):
        Bounded(START, vn.ParamOptimiser({BLOCKS: SGD}), projector=projector)


def test_minibatches():
    class Seen(vn.Trainer):
        def residuals(self, model, batch):
            x, y = batch
            return model(x) - y

    start = Gaussian(*(jnp.asarray(v) for v in (0.2, 1.1, 2.1)))
    x = jnp.linspace(-2, 2, 64)
    data = (x, Gaussian(*map(jnp.asarray, (0.0, 1.0, 2.0)))(x))
    optimiser = vn.ParamOptimiser({("mean", "std"): SGD, "power": optax.sgd(0.3)})
    blocks = Seen(start).fisher(data, blocks=(("mean", "std"), "power"))
    trainer = Seen(start, optimiser, projector=from_blocks(blocks, start))
    batches = vn.Minibatches(data, 16, key=jax.random.key(0))
    found = trainer.fit(batches, 400, progress=False).model
    np.testing.assert_allclose(flat(found), [0, 1, 2], atol=1e-3)


def by_shape(path, leaf):
    return leaf.ndim == 0


def by_name(path, leaf):
    return path.startswith("narrow")


def test_predicates_are_of_names():
    kept = vn.ParamOptimiser({by_name: SGD, "broad": SGD, "gain": None})
    assert SceneFit(START, kept, projector=PROJECTOR).step(TRUTH)[1].accepted
    lost = vn.ParamOptimiser({by_shape: SGD, "broad": SGD, "gain": None})
    with pytest.raises(ValueError, match=r"another rule for 'narrow.mean'.*predicate"):
        SceneFit(START, lost, projector=PROJECTOR)


def test_a_low_rank_has_no_names():
    trainer = SceneFit(START, optax.sgd(0.7), train=BLOCKS)
    residuals = lambda params: trainer.residuals(eqx.combine(params, START), TRUTH)
    projector = vn.EigenProjector.from_matvec(
        vn.gauss_newton_matvec(residuals, TRAINED),
        TRAINED,
        4,
        key=jax.random.key(0),
        scale=trainer.standard_errors(TRUTH),
    )
    moved = trainer.reproject(projector).fit(TRUTH, 60, progress=False).model
    np.testing.assert_allclose(flat(moved), flat(scene()), rtol=1e-2)
    with pytest.raises(ValueError, match=r"they have no names.*from_blocks"):
        SceneFit(START, vn.ParamOptimiser({BLOCKS: SGD}), projector=projector)
