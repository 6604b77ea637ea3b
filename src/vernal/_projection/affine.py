"""An affine map between a tree of parameters and a latent space, block by block."""

from collections.abc import Callable
from functools import reduce
from itertools import chain
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._boundary import (
    Params,
    PyTree,
    checked,
    refuse_foreign,
    spelled_leaves,
    undebugged,
)
from .._pickling import Portable
from .._tree import (
    as_parameters,
    by_path,
    ravel,
    ravel_size,
    require_alike,
    unravel,
    widest,
)
from .blocks import (
    Block,
    leaves_by_path,
    nest_blocks,
    on_each,
    places,
    scatter,
)
from .whitening import AbstractWhitening

SelfT = TypeVar("SelfT", bound="AbstractProjector")
FnT = TypeVar("FnT", bound=Callable[..., Any])

VECTOR = jax.tree.structure(0)
"""The structure of a latent space that is one vector."""


def _compiled(fn: FnT) -> FnT:
    """Makes a function one program; by itself, each of its operations would be one."""
    return cast(FnT, jax.jit(fn, inline=True))


class AbstractProjector(Portable, eqx.Module):
    """What `EigenProjector` can do, however it was made.

    There is a whitening for each block of parameters, and the latent space is the tree
    of their latent arrays.
    """

    _origin: Params
    _whitenings: tuple[AbstractWhitening, ...]
    _blocks: tuple[Block, ...] = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)
    _is_of_free: bool = eqx.field(static=True, default=False)

    @property
    def is_of_free(self) -> bool:
        """Whether it maps the free coordinates of bijections, and not parameters."""
        return self._is_of_free

    @property
    def _held(self) -> tuple[AbstractWhitening, ...]:
        return jax.lax.stop_gradient(self._whitenings)

    @property
    def whitenings(self) -> tuple[AbstractWhitening, ...]:
        """The linear map of each block."""
        return self._whitenings

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The indices in `jax.tree.leaves` of the leaves of each block."""
        return self._blocks

    @property
    def has_names(self) -> bool:
        """Whether the latent space is a dictionary by parameter, and not one vector."""
        return self._structure != VECTOR

    @property
    def latent_like(self) -> PyTree:
        """The latent tree, with shapes and dtypes in place of arrays."""
        return self._structure.unflatten(
            jax.ShapeDtypeStruct(w.latent_shape, w.dtype) for w in self._whitenings
        )

    def _pieces(self, latent: PyTree) -> list[Array]:
        """Checks a latent tree, and lists its arrays."""
        like = self.latent_like
        for where, leaf in spelled_leaves("latent", latent):
            refuse_foreign(leaf, where)
        if not self.has_names and jnp.shape(latent) != like.shape:
            raise ValueError(
                f"`latent` has shape {jnp.shape(latent)}, but the latent space of this "
                f"projector is made of vectors of shape {like.shape}."
            )
        # In the order of the parameters, where JAX would sort the keys.
        order, given = by_path(like).names, by_path(latent)
        if sorted(given.names) == sorted(order):
            found = given.by_name()
            latent = self._structure.unflatten(found[path] for path in order)
        require_alike(latent, like, "`latent`", "this projector's latent space")
        return jax.tree.leaves(latent)

    @property
    def origin(self) -> Params:
        """The point $x_0$, a tree of arrays; it has the latent vector zero."""
        return jax.lax.stop_gradient(self._origin)

    @property
    @_compiled
    def matrix(self) -> Float[Array, "D latent"]:
        """The matrix $P$, of shape `(D, latent_size)`, formed on each access.

        Rows are in the order of `ravel_pytree` of the parameters, columns in that of
        `ravel_pytree` of the latent tree.
        """
        matrices = [whitening.matrix() for whitening in self._held]
        sizes = [whitening.latent_size for whitening in self._whitenings]
        columns = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        shape = (ravel_size(self._origin), sum(sizes))
        return scatter(matrices, self._rows, columns, shape)

    @property
    def _rows(self) -> list[np.ndarray]:
        return places(self._origin, self._blocks)

    @property
    def eigenvalues(self) -> Float[Array, "*members D"]:
        r"""All $D$ eigenvalues $\Lambda$ of the scaled matrix, descending.

        Those of null directions come last, without a prior. A parameter without a block
        has the eigenvalue 1. After [`vernal.EigenProjector.from_matvec`][] only the
        leading ones are known.
        """
        if len(self._whitenings) == 1:
            return self._held[0].eigenvalues
        return self._sorted()

    @_compiled
    def _sorted(self) -> Float[Array, "*members D"]:
        held = [w.eigenvalues.astype(self._dtype) for w in self._held]
        values = jnp.concatenate(held)
        is_null = jnp.concatenate([w.is_null for w in self._held], axis=-1)
        return values[jnp.lexsort((-values, is_null))]

    @property
    def _dtype(self) -> np.dtype:
        return widest(w.dtype for w in self._whitenings)

    @property
    def rank(self) -> int | Any:
        """The number of directions that are not null.

        With `on_null="prior"` it is an array under `jax.jit` and `jax.vmap`.
        """
        rank = sum(whitening.rank for whitening in self._whitenings)
        return rank if isinstance(rank, Tracer) or np.ndim(rank) else int(rank)

    @property
    def latent_size(self) -> int:
        """The number of elements of the latent space.

        It is $D$, or `rank` where null directions were dropped.
        """
        return sum(whitening.latent_size for whitening in self._whitenings)

    @property
    @_compiled
    def condition_number(self) -> Float[Array, "*members"]:
        r"""The largest eigenvalue in $\Lambda$ over the smallest that is not null."""
        values = self.eigenvalues
        last = jnp.maximum(jnp.asarray(self.rank), 1)[..., None] - 1
        return values[..., 0] / jnp.take_along_axis(values, last, axis=-1)[..., 0]

    @property
    @_compiled
    def log_abs_det(self) -> Float[Array, "*members"]:
        r"""The logarithm of the factor by which $P$ changes volumes, $\log|\det P|$.

        It is $\frac12\log\det(P^\top P)$ where directions were dropped and $P$ has
        fewer columns than rows.
        """
        volumes = [w.log_abs_det().astype(self._dtype) for w in self._held]
        return reduce(jnp.add, volumes)

    @checked
    def at(self: SelfT, params: Params) -> SelfT:
        """Returns a projector with the same matrix and another origin.

        **Arguments:**

        - `params`: the new origin. Its structure may differ, as long as its leaves have
            the same shapes in the same order.
        """
        origin = as_parameters(params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(origin)]
        expected = [leaf.shape for leaf in jax.tree.leaves(self._origin)]
        if shapes != expected:
            raise ValueError(
                f"`params` has leaves of the shapes {shapes}, but the projector was "
                f"made for {expected}."
            )
        structure = self._structure
        if self.has_names:
            structure = jax.tree.structure(nest_blocks(origin, self._blocks))
        origin = jax.lax.stop_gradient(origin)
        parts = origin, self._whitenings, self._blocks, structure
        return type(self)(*parts, self._is_of_free)

    @checked
    def to_params(self, latent: PyTree) -> Params:
        """Returns $x_0 + P u$ as a tree.

        **Arguments:**

        - `latent`: the latent vector $u$, of shape `(latent_size,)`; after
            [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.

        **Returns:**

        A tree like the parameters, each leaf in its dtype.
        """
        return self._moved(self._pieces(latent))

    @_compiled
    def _moved(self, latents: list[Array]) -> Params:
        pieces = [
            jnp.asarray(piece, w.dtype)
            for w, piece in zip(self._whitenings, latents, strict=True)
        ]
        move = lambda w, start, piece: start + w.apply(piece)
        moved = on_each(move, self._held, self._ravel(self.origin), pieces)
        return self._unravel(moved)

    @checked
    def to_latent(self, params: Params) -> PyTree:
        r"""Returns the latent vector of a point, $P^+ (x - x_0)$.

        Here $P^+ = P^\top F = \Lambda^{1/2} V^\top S^{-1}$. Where directions were
        dropped, this is a pseudo-inverse: `to_params` of the result is the nearest
        point that the latent space can reach, with each parameter measured in its own
        scale.

        **Arguments:**

        - `params`: the point $x$, a tree like the origin.

        **Returns:**

        A vector of shape `(latent_size,)`; after
        [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.
        """
        return self._latent_of(self._checked(params, "params"))

    @_compiled
    def _latent_of(self, params: Params) -> PyTree:
        points, starts = self._ravel(params), self._ravel(self.origin)
        invert = lambda w, point, start: w.invert(point - start)
        latents = on_each(invert, self._held, points, starts)
        return self._structure.unflatten(latents)

    @checked
    def pull_back(self, grads: Params) -> PyTree:
        r"""Returns $P^\top g$, the gradient with respect to the latent vector.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A vector of shape `(latent_size,)`; after
        [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.
        """
        return self._pulled_back(self._checked(grads, "grads"))

    @_compiled
    def _pulled_back(self, grads: Params) -> PyTree:
        flats = self._ravel(grads)
        latents = on_each(lambda w, x: w.transpose(x), self._held, flats)
        return self._structure.unflatten(latents)

    @checked
    def precondition(self, grads: Params) -> Params:
        r"""Returns $P P^\top g$, the natural gradient.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A tree like the parameters, zero along directions that were dropped.
        """
        return self._natural(self._checked(grads, "grads"))

    @_compiled
    def _natural(self, grads: Params) -> Params:
        flats = self._ravel(grads)
        natural = on_each(lambda w, x: w.apply(w.transpose(x)), self._held, flats)
        return self._unravel(natural)

    def _ravel(self, tree: Params) -> list[Float[Array, " _"]]:
        """Joins the leaves of each block into one vector."""
        leaves = jax.tree.leaves(tree)
        return [
            ravel([leaves[index] for index in block], whitening.dtype)
            for block, whitening in zip(self._blocks, self._whitenings, strict=True)
        ]

    def _unravel(self, flats: list[Float[Array, " _"]]) -> Params:
        """Undoes `_ravel`; shapes and dtypes are those of the origin."""
        leaves, structure = jax.tree.flatten(self._origin)
        for flat, block in zip(flats, self._blocks, strict=True):
            own = unravel(flat, [leaves[index] for index in block])
            for index, leaf in zip(block, own, strict=True):
                leaves[index] = leaf
        return structure.unflatten(leaves)

    def _checked(self, tree: Params, name: str) -> Params:
        arrays = as_parameters(tree, name)
        require_alike(arrays, self._origin, f"`{name}`", "the projector's parameters")
        return arrays

    @checked
    def null_space(self) -> tuple[dict[str, float], ...]:
        """Names the combinations of parameters that the data do not constrain.

        Each null direction is a unit vector, with every parameter measured in its own
        scale, so that the weights of parameters with different units can be compared.
        Directions are combined so that each involves few parameters. They are listed
        whatever `on_null` was.

        **Returns:**

        A dictionary for each null direction, from the names of elements, such as
        `optics.wfe[6]`, to their weights. The largest comes first and is positive.

        **Raises:**

        - `ValueError`: under `jax.jit`, where the weights are not known; or after
            [`vernal.EigenProjector.from_matvec`][], which knows only the leading
            directions.
        """
        leaves = leaves_by_path(self._origin, self._blocks)
        pairs = zip(self._whitenings, leaves, strict=True)
        found = [whitening.null_space(own) for whitening, own in pairs]
        return tuple(chain.from_iterable(found))

    @undebugged
    @checked
    @_compiled
    def covariance(self) -> Float[Array, "D D"]:
        r"""Returns the covariance of the parameters, $P P^\top = F^{-1}$.

        Elements to which a dropped direction contributes are $\pm\infty$. Those of
        parameters without a block are NaN, since nothing is known of them.

        **Returns:**

        A matrix of shape `(D, D)`, in the order of `ravel_pytree`.
        """
        matrices = [whitening.covariance() for whitening in self._held]
        size = ravel_size(self._origin)
        return scatter(matrices, self._rows, self._rows, (size, size))

    @undebugged
    @checked
    @_compiled
    def standard_errors(self) -> Params:
        """Returns the standard error of each parameter.

        It is the root of the diagonal of the covariance: infinite for a parameter that
        contributes to a dropped direction, NaN for one without a block.

        **Returns:**

        A tree like the parameters.
        """
        errors = [whitening.standard_errors() for whitening in self._held]
        return self._unravel(errors)
