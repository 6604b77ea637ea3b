"""Draws from a normal distribution that bounds cut off."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._curvature import matmul, positive
from .._projection import DenseWhitening

# Along each direction so often.
_SWEEPS = 100


def draw_within(
    whitening: DenseWhitening,
    factor: Float[Array, ""],
    box: tuple[Float[Array, " D"], Float[Array, " D"]],
    key: PRNGKeyArray,
) -> Float[Array, " latent"]:
    """Draws one latent vector whose parameters are within a box that has the mean.

    The `box` is the bounds of each element, as distances from the mean.

    It moves along each axis of the latent space, and along what changes one parameter
    alone: the first mixes where the box is large beside the errors, the second where it
    is small. On each line the density is a normal one, cut off, and the move is that of
    a slice sampler. See Neal, *Slice sampling*, Annals of Statistics 31 (2003).
    """
    matrix = factor.astype(whitening.roots.dtype) * whitening.matrix()
    roots = whitening.roots
    inverse = jnp.where(roots > 0, 1 / positive(roots), 0)

    def alone(row: Float[Array, " latent"]) -> Float[Array, " latent"]:
        """Returns what moves one parameter alone; zeros for one that is held."""
        line = row * inverse
        line = line / positive(jnp.max(jnp.abs(line)))
        return line / positive(jnp.linalg.norm(line))

    single = jax.vmap(alone)(whitening.vectors)
    lines = jnp.concatenate([jnp.eye(roots.size, dtype=roots.dtype), single])
    moved = matmul(lines, matrix.T)

    def move(
        place: tuple[Array, Array], along: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        (latent, step), (line, own, level, share) = place, along
        ends = [(side - step) / jnp.where(own != 0, own, 1) for side in box]
        least = jnp.where(own != 0, jnp.minimum(*ends), -jnp.inf)
        most = jnp.where(own != 0, jnp.maximum(*ends), jnp.inf)
        # Where the density is above a level below that of this place: from `-far` to
        # `near` on the other side of it, without a difference of squares.
        at = jnp.sum(line * latent)
        far = jnp.sqrt(at**2 + 2 * level) + jnp.abs(at)
        near = 2 * level / far
        low = jnp.maximum(
            jnp.where(at < 0, -near, -far), jnp.minimum(jnp.max(least), 0)
        )
        high = jnp.minimum(jnp.where(at < 0, far, near), jnp.maximum(jnp.min(most), 0))
        by = low + share * (high - low)
        return (latent + by * line, step + by * own), None

    def sweep(latent: Array, key: PRNGKeyArray) -> tuple[Array, None]:
        of_level, of_share = jax.random.split(key)
        shape, dtype = lines.shape[:1], lines.dtype
        level = jax.random.exponential(of_level, shape, dtype)
        share = jax.random.uniform(of_share, shape, dtype)
        place = latent, matmul(matrix, latent)
        (latent, _), _ = jax.lax.scan(move, place, (lines, moved, level, share))
        return latent, None

    start = jnp.zeros(roots.size, roots.dtype)
    return jax.lax.scan(sweep, start, jax.random.split(key, _SWEEPS))[0]
