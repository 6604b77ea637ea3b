"""`EigenProjector.from_blocks`: where things are, and fits in such a latent space."""

import functools
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import vernal as vn
from models import GaussianFit, gaussian

from_blocks = vn.EigenProjector.from_blocks


class Optics(eqx.Module):
    wfe: jax.Array
    name: str | None


class Telescope(eqx.Module):
    flux: jax.Array
    optics: Optics
    layers: list[jax.Array]

    def __call__(self, x):
        return self.flux * x


def telescope():
    """Twenty parameters, ten of them in a list whose names do not sort as numbers."""
    return Telescope(
        flux=jnp.asarray(3.0),
        optics=Optics(jnp.ones((2, 3)), None),
        layers=[jnp.asarray(float(k)) for k in range(13)],
    )


def fisher(size, seed=0):
    factor = np.random.default_rng(seed).normal(size=(size + 5, size))
    return jnp.asarray(factor.T @ factor)


def as_dict(tree):
    """Plain dictionaries, whatever kind of mapping the latent space is made of."""
    if isinstance(tree, Mapping):
        return {key: as_dict(value) for key, value in tree.items()}
    return tree if tree is None else jnp.shape(tree)


# --- where things are ---


def test_the_latent_space_has_the_paths_of_the_parameters():
    blocks = {"flux": fisher(1), "optics": fisher(6), "layers": fisher(13)}
    projector = from_blocks(blocks, telescope())
    names = [str(k) for k in range(13)]
    assert as_dict(projector.to_latent(telescope())) == {
        "flux": (1,),
        "optics": {"wfe": (6,), "name": None},
        "layers": {"0": (13,), **dict.fromkeys(names[1:])},
    }


def test_a_block_of_several_leaves_is_at_the_first_of_them():
    blocks = {("layers.7", "flux"): fisher(2), "layers.12": fisher(1)}
    latent = as_dict(from_blocks(blocks, telescope()).to_latent(telescope()))
    assert latent["flux"] == (2,)
    assert latent["layers"]["7"] is None
    assert latent["layers"]["12"] == (1,)
    # Without a block it is a parameter as it was.
    assert latent["optics"]["wfe"] == (2, 3)
    assert latent["layers"]["3"] == ()


def test_parameters_without_a_block_stay_as_they_are():
    projector = from_blocks({"flux": jnp.full((1, 1), 4.0)}, telescope())
    moved = eqx.tree_at(lambda t: t.optics.wfe, telescope(), jnp.full((2, 3), 5.0))
    moved = eqx.tree_at(lambda t: t.flux, moved, jnp.asarray(4.0))
    latent = projector.to_latent(moved)
    np.testing.assert_array_equal(latent["optics"]["wfe"], np.full((2, 3), 4.0))
    np.testing.assert_allclose(latent["flux"], [2.0])
    errors = projector.standard_errors()
    np.testing.assert_allclose(errors.flux, 0.5)
    assert jnp.isnan(errors.optics.wfe).all()
    assert projector.null_space() == ()


def test_a_block_without_information_is_empty():
    blocks = {"flux": jnp.zeros((1, 1)), "optics": fisher(6)}
    projector = from_blocks(blocks, telescope())
    assert projector.latent_size == projector.rank == 19
    zero = projector.to_latent(telescope())
    assert zero["flux"].shape == (0,)
    assert projector.to_params(zero).flux == 3
    assert jnp.isinf(projector.standard_errors().flux)
    assert projector.null_space() == ({"flux": 1.0},)


@pytest.mark.parametrize("on_null", ["drop", "prior"])
def test_it_is_the_projector_of_the_block_diagonal_matrix(on_null):
    """The same step, the same errors and the same volume, though not the same basis."""
    singular = fisher(6).at[5].set(0).at[:, 5].set(0)
    blocks = {"optics": singular, "layers": fisher(13), "flux": fisher(1)}
    whole = jax.scipy.linalg.block_diag(fisher(1), singular, fisher(13))
    found = from_blocks(blocks, telescope(), on_null=on_null)
    expected = vn.EigenProjector.from_fisher(whole, telescope(), on_null=on_null)
    assert (found.rank, found.latent_size) == (expected.rank, expected.latent_size)
    np.testing.assert_allclose(found.covariance(), expected.covariance(), rtol=1e-8)
    np.testing.assert_allclose(found.log_abs_det, expected.log_abs_det, rtol=1e-9)
    np.testing.assert_allclose(
        found.matrix @ found.matrix.T, expected.matrix @ expected.matrix.T, atol=1e-9
    )
    np.testing.assert_allclose(
        found.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-14
    )
    assert found.null_space() == ({"optics.wfe[1,2]": 1.0},)


def test_rank_is_of_a_block():
    blocks = {"flux": fisher(1), "optics": fisher(6)}
    projector = from_blocks(blocks, telescope(), rank={"optics": 4})
    assert projector.to_latent(telescope())["optics"]["wfe"].shape == (4,)
    make = lambda blocks: from_blocks(blocks, telescope(), rank={"flux": 1})
    with pytest.raises(ValueError, match="`rank` must be given"):
        jax.jit(make)(blocks)


# --- errors ---

BAD = {
    "empty": ({}, {}, ValueError, "`blocks` is empty"),
    "not a mapping": ([jnp.eye(1)], {}, Exception, "blocks"),
    "no match": ({"fluxes": fisher(1)}, {}, vn.UnknownPathError, "fluxes.*flux"),
    "overlap": (
        {"optics": fisher(6), "optics.wfe": fisher(6)},
        {},
        ValueError,
        r"'optics' and 'optics\.wfe' share 'optics\.wfe'",
    ),
    "shape": (
        {"flux": fisher(1), "optics": fisher(5)},
        {},
        ValueError,
        r"`blocks\['optics'\]` has shape \(5, 5\).*\(6, 6\)",
    ),
    "not square": (
        {"optics": jnp.ones((6, 5))},
        {},
        ValueError,
        r"`blocks\['optics'\]`.*\(6, 5\)",
    ),
    "not finite": (
        {"optics": fisher(6).at[1, 2].set(jnp.nan)},
        {},
        ValueError,
        r"`blocks\['optics'\]`.*not finite.*\[1, 2\]",
    ),
    "indefinite": (
        {"optics": fisher(6).at[4, 4].set(-1)},
        {},
        ValueError,
        r"`blocks\['optics'\]`.*negative.*gauss_newton.*optics\.wfe\[1,1\]",
    ),
    "complex": (
        {"optics": fisher(6) * 1j},
        {},
        TypeError,
        r"`blocks\['optics'\]` must be real",
    ),
    "rank of no block": (
        {"flux": fisher(1)},
        {"rank": {"optics": 2}},
        ValueError,
        "`rank` has 'optics'.*'flux'",
    ),
    "null": (
        {"flux": fisher(1), "layers": jnp.zeros((13, 13))},
        {"on_null": "raise"},
        ValueError,
        r"`blocks\['layers'\]`.*13 of 13.*layers\.0",
    ),
    "nothing left": ({"**": jnp.zeros((20, 20))}, {}, ValueError, "constrains no"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_block(name):
    blocks, options, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        from_blocks(blocks, telescope(), **options)


def test_a_latent_tree_of_another_kind_is_refused():
    projector = from_blocks({"flux": fisher(1)}, telescope())
    with pytest.raises(ValueError, match=r"`latent`.*structure"):
        projector.to_params(jnp.zeros(20))


# --- fits ---


class Quadratic(vn.Trainer):
    """Half the sum of squares, by which every gradient is the parameter itself."""

    def residuals(self, model, batch):
        return ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0] - batch


BATCH = jnp.linspace(-1, 1, 20)
# With such blocks a plain step of rate r moves the flux by r/4 of its distance, the
# wavefront by r/100, and the layers, which have no block, by r.
BLOCKS = {"flux": 4 * jnp.eye(1), "optics": 100 * jnp.eye(6)}

RULES = {
    "paths": {"flux": 0.4, "optics.wfe": 10.0, "layers": 0.1},
    "a node": {"flux": 0.4, "optics": 10.0, "layers": 0.1},
    "globs": {"flux": 0.4, "**.wfe": 10.0, "layers.*": 0.1},
    "tuples": {"flux": 0.4, ("optics.wfe",): 10.0, ("layers", "layers.3"): 0.1},
    "the rest": {"flux": 0.4, "optics": 10.0, "**": 0.1},
}


def rules(rates, wrap=lambda rate: optax.sgd(rate), **options):
    return vn.ParamOptimiser({k: wrap(v) for k, v in rates.items()}, **options)


@pytest.mark.parametrize("kind", RULES)
def test_every_selector_keeps_its_meaning(kind):
    projector = from_blocks(BLOCKS, telescope())
    trainer = Quadratic(telescope(), rules(RULES[kind]), projector=projector)
    known = dict.fromkeys(vn.paths(telescope()), 0.1) | {"flux": 0.4}
    known["optics.wfe"] = 10.0
    assert trainer.learning_rates() == pytest.approx(known)


def of_every_kind(flux, optics, layers):
    return vn.ParamOptimiser(
        {
            "flux": optax.sgd(flux, momentum=0.5),
            "optics.wfe": vn.window(optax.sgd(optics), start=1),
            "layers": optax.sgd(optax.linear_schedule(0, layers, 3)),
        }
    )


def test_rules_of_every_kind():
    projector = from_blocks(BLOCKS, telescope())
    trainer = Quadratic(telescope(), of_every_kind(0.4, 10.0, 0.1), projector=projector)
    expected = Quadratic(telescope(), of_every_kind(0.1, 0.1, 0.1))
    for _ in range(4):
        trainer, expected = trainer.step(BATCH)[0], expected.step(BATCH)[0]
    np.testing.assert_allclose(
        ravel_pytree(trainer.params)[0], ravel_pytree(expected.params)[0], rtol=1e-7
    )


def test_with_scale():
    projector = from_blocks(BLOCKS, telescope())
    scaled = rules(RULES["paths"]).with_scale({"flux": 0.5})
    start, step = (
        Quadratic(telescope(), optimiser, projector=projector).step(BATCH)[0]
        for optimiser in (rules(RULES["paths"]), scaled)
    )
    whole, half = start.params.flux - 3, step.params.flux - 3
    np.testing.assert_allclose(half, whole / 2, rtol=1e-12)
    assert eqx.tree_equal(start.params.layers, step.params.layers)


MIXING = {"flux": 0.1, "optics": 0.1, "layers": 0.1}
ENTRIES = {
    "construction": lambda projector: Quadratic(
        telescope(), rules(MIXING), projector=projector
    ),
    "replace": lambda projector: Quadratic(
        telescope(), optax.sgd(0.1), projector=projector
    ).replace(optimiser=rules(MIXING)),
    "reproject": lambda projector: Quadratic(telescope(), rules(MIXING)).reproject(
        projector
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_several_rules_for_one_block_are_refused(entry):
    projector = from_blocks({("flux", "optics"): fisher(7)}, telescope())
    with pytest.raises(ValueError, match=r"several rules for 'flux' and 'optics\.wfe'"):
        ENTRIES[entry](projector)


def test_one_rule_for_one_block_by_a_tuple():
    projector = from_blocks({("flux", "optics"): jnp.eye(7)}, telescope())
    optimiser = rules({("flux", "optics"): 0.1, "layers": 0.2})
    trainer = Quadratic(telescope(), optimiser, projector=projector).step(BATCH)[0]
    plain = Quadratic(telescope(), optimiser).step(BATCH)[0]
    np.testing.assert_allclose(
        ravel_pytree(trainer.params)[0], ravel_pytree(plain.params)[0], rtol=1e-12
    )


# --- degenerate fits ---


class Doubled(eqx.Module):
    """Of two of its parameters only the sum matters, and of one nothing."""

    shape: eqx.Module
    extra: jax.Array
    dead: jax.Array

    def __call__(self, x):
        shape = eqx.tree_at(
            lambda g: g.power, self.shape, self.shape.power + self.extra
        )
        return shape(x)


def batch():
    x = jnp.linspace(-3, 3, 40)
    truth = eqx.tree_at(lambda g: g.power, gaussian(), jnp.asarray(1.1))
    noise = 0.05 * jax.random.normal(jax.random.key(0), x.shape)
    return x, truth(x) + noise, jnp.full(x.shape, 0.05)


def doubled():
    return Doubled(gaussian(), jnp.asarray(0.0), jnp.asarray(2.0))


@functools.cache
def minimum():
    """The loss, and the model's curve, of the problem without what is degenerate."""
    trainer = GaussianFit(gaussian()).whiten(batch(), optimiser=optax.sgd(0.7))
    result = trainer.fit(batch(), 60)
    return result.history.loss[-1], result.trainer.model(batch()[0])


PAIR = {"shape.power", "extra"}


def fisher_of(model):
    return GaussianFit(model).fisher(batch())


def one_block(on_null):
    projector = from_blocks({"**": fisher_of(doubled())}, doubled(), on_null=on_null)
    return GaussianFit(doubled(), optax.sgd(0.7), projector=projector)


def dense(on_null):
    return GaussianFit(doubled()).whiten(
        batch(), optimiser=optax.sgd(0.7), on_null=on_null
    )


@pytest.mark.parametrize(("make", "on_null"), [(dense, "prior"), (one_block, "drop")])
def test_a_degenerate_fit_reaches_the_same_minimum(make, on_null):
    loss, curve = minimum()
    result = make(on_null).fit(batch(), 60)
    np.testing.assert_allclose(result.history.loss[-1], loss, rtol=1e-9)
    np.testing.assert_allclose(result.trainer.model(batch()[0]), curve, atol=1e-5)
    assert result.trainer.model.dead == 2
    dead, pair = sorted(result.trainer.projector.null_space(), key=len)
    assert dead == {"dead": pytest.approx(1)}
    assert pair.keys() == PAIR
    assert sorted(pair.values()) == pytest.approx([-(0.5**0.5), 0.5**0.5])


@pytest.mark.parametrize("make", [dense, one_block])
def test_a_degenerate_fit_may_be_refused(make):
    with pytest.raises(ValueError, match="2 of 5 directions") as info:
        make("raise")
    assert all(name in str(info.value) for name in ("dead", "shape.power", "extra"))
    assert "shape.mean" not in str(info.value)


def test_blocks_by_name_with_a_parameter_that_is_dead():
    """Rules keep their names where one of the blocks has nothing left."""
    fmat = np.asarray(fisher_of(doubled()))
    blocks = {
        "shape": jnp.asarray(fmat[:3, :3]),
        "extra": jnp.asarray(fmat[3:4, 3:4]),
        "dead": jnp.asarray(fmat[4:, 4:]),
    }
    optimiser = rules({"shape": 0.3, "extra": 0.3, "dead": 0.3})
    trainer = GaussianFit(
        doubled(), optimiser, projector=from_blocks(blocks, doubled())
    )
    assert trainer.latent["dead"].shape == (0,)
    result = trainer.fit(batch(), 200)
    np.testing.assert_allclose(result.history.loss[-1], minimum()[0], rtol=1e-9)
    assert result.trainer.model.dead == 2


def test_no_leaf_of_a_latent_tree_takes_the_place_of_another():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}
    projector = from_blocks({"a": jnp.eye(2), "b.c": jnp.eye(2)}, params)
    twice = {**params, "b.c": jnp.full(2, 7.0)}
    with pytest.raises(ValueError, match="`latent`"):
        projector.to_params(twice)
