"""A method of a trainer is bound quickly, and is what Equinox makes of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import vernal as vn


class Slope(vn.Trainer):
    def residuals(self, model, batch):
        """The distance from six times the batch."""
        return model["w"] * batch - 6 * batch


def test_a_bound_method_is_that_of_equinox():
    trainer = Slope({"w": jnp.ones(())}, optax.adam(0.1))
    for name in ("residuals", "step", "fit", "constrain"):
        quick = getattr(trainer, name)
        slow = eqx.Module.__getattribute__(trainer, name)
        slow = type(slow)(quick.__func__, trainer)
        assert type(quick) is type(slow)
        assert jax.tree.structure(quick) == jax.tree.structure(slow)
        assert (quick.__name__, quick.__doc__) == (slow.__name__, slow.__doc__)
        assert quick.__self__ is trainer
    assert Slope.residuals.__doc__ == trainer.residuals.__doc__


def test_a_bound_method_is_a_pytree():
    trainer = Slope({"w": jnp.ones(())}, optax.adam(0.1))
    grads = eqx.filter_grad(lambda fn: fn({"w": jnp.ones(())}, jnp.ones(2)).sum())
    leaves = jax.tree.leaves(grads(trainer.residuals))
    assert all(not leaf.any() for leaf in leaves)
    run = jax.jit(lambda fn, x: fn({"w": x}, jnp.ones(2)))
    assert run(trainer.residuals, jnp.ones(())).shape == (2,)
