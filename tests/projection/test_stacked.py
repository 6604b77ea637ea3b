"""A stacked projector maps each member as it maps one alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vernal as vn

PARAMS = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0)}
JACOBIANS = np.random.default_rng(0).normal(size=(3, 10, 3)) * [1.0, 1e3, 1e-3]
FISHERS = jnp.asarray(np.swapaxes(JACOBIANS, 1, 2) @ JACOBIANS)


def one(fisher):
    return vn.EigenProjector.from_fisher(fisher, PARAMS, rank=3)


def with_prior(fisher):
    return vn.EigenProjector.from_fisher(fisher, PARAMS, on_null="prior")


def of_a_block(fisher):
    blocks = {"a": fisher[:2, :2]}
    return vn.EigenProjector.from_blocks(blocks, PARAMS, rank={"a": 2})


MAKERS = {"a matrix": one, "a prior": with_prior, "a block": of_a_block}
FOUND = {
    "matrix": lambda p, x, u: p.matrix,
    "eigenvalues": lambda p, x, u: p.eigenvalues,
    "condition number": lambda p, x, u: p.condition_number,
    "volume": lambda p, x, u: p.log_abs_det,
    "covariance": lambda p, x, u: p.covariance(),
    "errors": lambda p, x, u: p.standard_errors(),
    "to_latent": lambda p, x, u: p.to_latent(x),
    "to_params": lambda p, x, u: p.to_params(u),
    "pull_back": lambda p, x, u: p.pull_back(x),
    "precondition": lambda p, x, u: p.precondition(x),
    "at": lambda p, x, u: p.at(x).to_params(u),
}


def row(tree, index):
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, tree)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("maker", MAKERS)
def test_each_member_is_as_alone(maker, name):
    # As many members as elements: what is mapped wrongly has the right shape.
    many = eqx.filter_vmap(MAKERS[maker])(FISHERS)
    assert many.members == (3,)
    points = {"a": jnp.arange(6.0).reshape(3, 2) + 1, "b": jnp.arange(3.0)}
    latents = many.to_latent(points)
    found = FOUND[name](many, points, latents)
    for index in range(3):
        alone = MAKERS[maker](FISHERS[index])
        own = row(points, index)
        expected = FOUND[name](alone, own, alone.to_latent(own))
        assert jax.tree.structure(row(found, index)) == jax.tree.structure(expected)
        for new, old in zip(
            jax.tree.leaves(row(found, index)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(new, old, rtol=1e-9, atol=1e-12)


def test_those_of_those():
    grid = jnp.stack([FISHERS, 2 * FISHERS])
    many = eqx.filter_vmap(eqx.filter_vmap(one))(grid)
    assert many.members == (2, 3)
    expected = [[one(fisher).log_abs_det for fisher in row] for row in grid]
    np.testing.assert_allclose(many.log_abs_det, expected, rtol=1e-9)


def test_one_point_for_all_is_refused():
    many = eqx.filter_vmap(one)(FISHERS)
    for use in (many.to_latent, many.pull_back, many.precondition, many.at):
        with pytest.raises(ValueError, match=r"\(2,\)"):
            use(PARAMS)
    with pytest.raises(ValueError, match=r"`latent` has shape \(3,\)"):
        many.to_params(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`null_space` is for one .* x\[0\]"):
        many.null_space()
    assert row(many, 0).null_space() == ()
