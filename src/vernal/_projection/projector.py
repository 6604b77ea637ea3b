"""An affine map between a tree of parameters and a whitened latent vector."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._boundary import (
    Params,
    PyTree,
    checked,
    refuse_foreign,
    spelled_leaves,
    takes,
    undebugged,
)
from .._curvature import Matrix
from .._pickling import Portable
from .._tree import as_parameters, ravel_size, require_alike, widest
from .block_diagonal import whiten_blocks
from .blocks import (
    Block,
    arrange,
    find_blocks,
    leaves_by_path,
    nest_blocks,
    places,
    ravel_blocks,
    scatter,
    unravel_blocks,
)
from .decompose import Kind, whiten, whiten_jacobian
from .dense import DenseWhitening, OnNull, check_rank_kind
from .low_rank import whiten_matvec
from .null_space import name_null_space
from .whitening import AbstractWhitening, Unchanged

_VECTOR = jax.tree.structure(0)


class EigenProjector(Portable, eqx.Module):
    r"""An affine map between parameters and a latent space in which they are whitened.

    $$x = x_0 + P u, \qquad P^\top F P = I$$

    where $x$ holds the parameters in the order of `jax.flatten_util.ravel_pytree`,
    $x_0$ is the point at which the projector was made, and $F$ the Fisher matrix there.
    In the latent vector $u$ every direction is constrained equally well, however the
    units of the parameters differ and however they are correlated.

    The matrix is first scaled to a unit diagonal, $N = S F S = V \Lambda V^\top$ with
    $S = \mathrm{diag}(F)^{-1/2}$, and then $P = S V \Lambda^{-1/2}$. The scale of a
    parameter is its entry of $S$: its standard error, were all others known. Where the
    row of a parameter is zero its scale is 1. For a covariance $C$,
    $S = \mathrm{diag}(C)^{1/2}$, $S^{-1} C S^{-1} = V \Lambda V^\top$ and
    $P = S V \Lambda^{1/2}$.

    Make one from the Jacobian of residuals with
    [`vernal.EigenProjector.from_jacobian`][]; from a matrix, if that is all there is,
    with [`vernal.EigenProjector.from_fisher`][] or
    [`vernal.EigenProjector.from_covariance`][]; from a matrix for each group of
    parameters, with [`vernal.EigenProjector.from_blocks`][]; from products with a
    matrix too large to form, with [`vernal.EigenProjector.from_matvec`][].

    A projector never changes: no gradient flows into its arrays.
    """

    _origin: Params
    _whitenings: tuple[AbstractWhitening, ...]
    # The leaves that each of them is of, and the tree of their latent arrays.
    _blocks: tuple[Block, ...] = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)

    @classmethod
    @checked
    def from_fisher(
        cls,
        fmat: Matrix,
        params: Params,
        *,
        rtol: float | int | None = None,
        rank: int | None = None,
        on_null: OnNull = "drop",
    ) -> "EigenProjector":
        r"""Makes a projector from a Fisher matrix, or a Hessian at a minimum.

        A direction is null, that is, not constrained by the data, if its eigenvalue in
        $\Lambda$ is no larger than `rtol` times the largest.

        **Arguments:**

        - `fmat`: the Fisher matrix $F$, of shape `(D, D)`, in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`: the point $x_0$, a tree of the trained leaves, with `None` for the
            others. $D$ is the number of all their elements. They may differ in dtype.
        - `rtol`: the threshold below which a direction is null. By default $D$ times
            the machine epsilon of `fmat`.
        - `rank`: the number of leading directions to keep; those that follow are then
            the null directions, whatever their eigenvalues. To drop directions under
            `jax.jit` and `jax.vmap` it must be given, since a shape cannot depend on
            values.
        - `on_null`: what becomes of null directions. `"drop"`: the latent space goes
            without them. `"raise"`: an error that names the parameters involved.
            `"prior"`: each gets the eigenvalue 1 in $\Lambda$, a Gaussian prior as wide
            as the parameter's own scale. No shape then depends on how many there are.

        **Raises:**

        A `ValueError` if `fmat` is not a finite matrix of shape `(D, D)`, if it has a
        negative eigenvalue beyond the threshold, or if a direction that is kept is
        null; under `jax.jit`, an error when the program runs. A `TypeError` if a
        parameter is complex or not an array of floats.
        """
        return cls._dense(fmat, params, rtol, rank, on_null, "fmat")

    @classmethod
    @checked
    def from_jacobian(
        cls,
        jac: Matrix,
        params: Params,
        *,
        blocks: Sequence[Any] | None = None,
        rtol: float | int | None = None,
        rank: int | Mapping[Any, int] | None = None,
        on_null: OnNull = "drop",
    ) -> "EigenProjector":
        r"""Makes a projector from the Jacobian of residuals, such that $F = J^\top J$.

        The square of a number has twice its digits, and $J^\top J$ loses what it has no
        room for: a line through the years 2010 to 2024 has a Fisher matrix that is
        singular in single precision. So $\Lambda$ and $V$ are found from the singular
        values of $JS$, its columns scaled to unit norm, to a relative accuracy of the
        machine epsilon times their condition number, and not its square. Where that is
        small the eigenvalues of $S J^\top J S$ do as well, and are used, as they are
        cheaper.

        See Golub and Van Loan, *Matrix computations* (2013), sections 5.2 and 5.3.

        **Arguments:**

        - `jac`: the Jacobian $J$, of shape `(N, D)`, as [`vernal.jacobian`][] returns
            it: a row for each residual, columns in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`, `on_null`: as in [`vernal.EigenProjector.from_fisher`][].
        - `blocks`: selectors of groups of parameters, to be whitened each by its own
            columns, as in [`vernal.EigenProjector.from_blocks`][].
        - `rtol`: the fraction of the largest eigenvalue of $S J^\top J S$, the square
            of a singular value, up to which a direction is null. By default the square
            of the larger of $D$ and 64 times the machine epsilon of `jac`: as much of
            a singular value is left by the rounding of the elements of $J$.
        - `rank`: as in [`vernal.EigenProjector.from_fisher`][]; with `blocks`, as in
            [`vernal.EigenProjector.from_blocks`][].

        **Raises:**

        A `ValueError` if `jac` is not a finite matrix with $D$ columns, or if a
        direction that is kept is null; under `jax.jit`, an error when the program runs.
        A `TypeError` if `jac` or a parameter is complex.
        """
        origin = jax.lax.stop_gradient(as_parameters(params))
        check_rank_kind(rank, blocks)
        ranks: Any = rank
        if blocks is None:
            whitening = whiten_jacobian(jac, origin, rtol, ranks, on_null, "`jac`")
            return cls._of_vectors(origin, whitening, "`jac`")
        selectors = tuple(tuple(b) if isinstance(b, list) else b for b in blocks)
        size = ravel_size(origin)
        if np.ndim(jac) != 2 or np.shape(jac)[1] != size:
            raise ValueError(
                f"`jac` has shape {np.shape(jac)}, but must have {size} columns, one "
                "for each element of `params`."
            )
        own = places(origin, find_blocks(origin, selectors, "blocks"))
        given = {s: jac[:, index] for s, index in zip(selectors, own, strict=True)}

        def whiten_one(jac: Matrix, own: Params, rank: int | None, name: str) -> Any:
            return whiten_jacobian(jac, own, rtol, rank, on_null, f"`{name}`")

        return cls._of_blocks(given, origin, ranks or {}, whiten_one)

    @classmethod
    @checked
    def from_covariance(
        cls,
        cov: Matrix,
        params: Params,
        *,
        rtol: float | int | None = None,
        rank: int | None = None,
        on_null: OnNull = "drop",
    ) -> "EigenProjector":
        r"""Makes a projector from a covariance matrix, such that $P P^\top = C$.

        A direction without variance is null. It says nothing about the parameters: it
        is what a pseudo-inverse, or too small a sample, leaves of a direction that the
        data do not constrain. Hence it has an infinite standard error, and not a zero.

        **Arguments:**

        - `cov`: the covariance matrix $C$, of shape `(D, D)`, in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`, `rtol`, `rank`, `on_null`: as in
            [`vernal.EigenProjector.from_fisher`][].

        **Raises:**

        As [`vernal.EigenProjector.from_fisher`][].
        """
        return cls._dense(cov, params, rtol, rank, on_null, "cov")

    @classmethod
    def _dense(
        cls,
        matrix: Matrix,
        params: Params,
        rtol: float | int | None,
        rank: int | None,
        on_null: OnNull,
        kind: Kind,
    ) -> "EigenProjector":
        origin = jax.lax.stop_gradient(as_parameters(params))
        whitening = whiten(matrix, origin, rtol, rank, on_null, kind, f"`{kind}`")
        return cls._of_vectors(origin, whitening, f"`{kind}`")

    @classmethod
    def _of_vectors(
        cls, origin: Params, whitening: AbstractWhitening, name: str
    ) -> "EigenProjector":
        _refuse_empty((whitening,), name)
        origin = jax.lax.stop_gradient(as_parameters(origin))
        every = tuple(range(len(jax.tree.leaves(origin))))
        return cls(origin, (whitening,), (every,), _VECTOR)

    @classmethod
    @checked
    def from_blocks(
        cls,
        blocks: Mapping[Any, Matrix],
        params: Params,
        *,
        rtol: float | int | None = None,
        rank: Mapping[Any, int] | None = None,
        on_null: OnNull = "drop",
    ) -> "EigenProjector":
        r"""Makes a projector from a Fisher matrix for each of several groups.

        As if the Fisher matrix were block-diagonal, at the sum of the costs of its
        blocks: thousands of parameters, a few at a time. Parameters without a block are
        left as they are: their part of the latent space is their distance from the
        origin.

        The latent space is a dictionary with the same paths as the parameters, `None`
        at those that are not trained, so that the rules of a
        [`vernal.ParamOptimiser`][] keep their names. The block of one parameter is a
        vector at its path; that of several is a vector at the path of the first, with
        `None` at the others, and belongs to one rule.

        ```python
        trainer = Fit(model, vn.ParamOptimiser(rules))
        blocks = trainer.fisher(batch, blocks=("position", "flux"))
        projector = vn.EigenProjector.from_blocks(blocks, trainer.params)
        trainer = trainer.reproject(projector)
        ```

        **Arguments:**

        - `blocks`: from selectors (see [`vernal.split`][]) to Fisher matrices of the
            parameters that they select, each in the order of `ravel_pytree`.
        - `params`: as in [`vernal.EigenProjector.from_fisher`][].
        - `rtol`, `on_null`: as there, for each block. A block that the data do not
            constrain at all may be dropped; its latent vector is then empty.
        - `rank`: from selectors to the number of leading directions to keep. To drop
            directions under `jax.jit` and `jax.vmap` it must be given for every block.

        **Raises:**

        As [`vernal.EigenProjector.from_fisher`][]; an error names the block. An
        `UnknownPathError` if a selector matches nothing, a `ValueError` if two blocks
        share a parameter.
        """

        def whiten_one(matrix: Matrix, own: Params, rank: int | None, name: str) -> Any:
            return whiten(matrix, own, rtol, rank, on_null, "fmat", f"`{name}`")

        return cls._of_blocks(blocks, params, rank or {}, whiten_one)

    @classmethod
    def _of_blocks(
        cls,
        given: Mapping[Any, Any],
        params: Params,
        rank: Mapping[Any, int],
        whiten: Callable[[Any, Params, int | None, str], AbstractWhitening],
    ) -> "EigenProjector":
        origin = jax.lax.stop_gradient(as_parameters(params))
        members, whitenings = whiten_blocks(given, origin, rank, whiten)
        _refuse_empty(whitenings, "`blocks`")
        structure = jax.tree.structure(nest_blocks(origin, members))
        return cls(origin, whitenings, members, structure)

    @classmethod
    @checked
    def from_matvec(
        cls,
        matvec: Callable[[Params], Params],
        params: Params,
        rank: int,
        *,
        key: PRNGKeyArray,
        scale: Params = None,
    ) -> "EigenProjector":
        r"""Makes a projector from products with a Fisher matrix that is never formed.

        The `rank` leading eigenvectors $V$ and eigenvalues $\Lambda$ of the scaled
        matrix $SFS$ are found by Lanczos iterations, with all vectors kept orthogonal.
        The complement, which is not looked at direction by direction, is scaled by one
        number, its own mean curvature

        $$c = \frac{\operatorname{tr}(SFS) - \sum_i \Lambda_i}{D - \text{rank}},$$

        whose trace is estimated by random probes, and

        $$P = S \left( c^{-1/2} (I - V V^\top) + V \Lambda^{-1/2} V^\top \right).$$

        So the latent space keeps all $D$ dimensions and is close to whitened
        everywhere, on the kept directions exactly. Memory is that of some multiple of
        `rank` vectors.

        See Lanczos, *An iteration method for the solution of the eigenvalue problem of
        linear differential and integral operators*, Journal of Research of the
        National Bureau of Standards 45 (1950); Meyer, Musco, Musco and Woodruff,
        *Hutch++: optimal stochastic trace estimation* (2021).

        **Arguments:**

        - `matvec`: a function from a tree like `params` to one, the product with a
            symmetric matrix, such as [`vernal.gauss_newton_matvec`][] and
            [`vernal.hessian_matvec`][] return. It is compiled once.
        - `params`: as in [`vernal.EigenProjector.from_fisher`][].
        - `rank`: the number of leading directions.
        - `key`: a PRNG key, for the first vector and the probes.
        - `scale`: a tree like `params` of positive numbers $S$, the size of each
            parameter in its own unit; ones by default. A matrix that is never formed
            cannot be scaled to a unit diagonal, so that parameters whose units differ
            by orders of magnitude need this.

        **Raises:**

        A `ValueError` if `rank` is not between 1 and $D$ or larger than the number of
        directions that the matrix constrains, if a product is not finite or the matrix
        not symmetric, or if it has a negative eigenvalue; under `jax.jit`, an error
        when the program runs. A `TypeError` if a parameter is complex or not an array
        of floats.
        """
        origin = jax.lax.stop_gradient(as_parameters(params))
        takes(matvec, 1, "matvec", "matvec(tree)")
        whitening = whiten_matvec(matvec, origin, rank, key=key, scale=scale)
        return cls._of_vectors(origin, whitening, "`matvec`")

    @property
    def _held(self) -> tuple[AbstractWhitening, ...]:
        return jax.lax.stop_gradient(self._whitenings)

    @property
    def _has_names(self) -> bool:
        return self._structure != _VECTOR

    @property
    def _latent_like(self) -> PyTree:
        """The shapes of the latent arrays, as their tree."""
        return self._structure.unflatten(
            jax.ShapeDtypeStruct(w.latent_shape, w.dtype) for w in self._whitenings
        )

    def _pieces(self, latent: PyTree) -> list[Array]:
        """Takes a latent tree apart, once it is known to be one."""
        like = self._latent_like
        for where, leaf in spelled_leaves("latent", latent):
            refuse_foreign(leaf, where)
        if not self._has_names and jnp.shape(latent) != like.shape:
            raise ValueError(
                f"`latent` has shape {jnp.shape(latent)}, but the latent space of this "
                f"projector is made of vectors of shape {like.shape}."
            )
        latent = arrange(latent, like)
        require_alike(latent, like, "`latent`", "this projector's latent space")
        return jax.tree.leaves(latent)

    @property
    def origin(self) -> Params:
        """The point $x_0$, a tree of arrays; it has the latent vector zero."""
        return jax.lax.stop_gradient(self._origin)

    @property
    def matrix(self) -> Float[Array, "D latent"]:
        """The matrix $P$, of shape `(D, latent_size)`. It is formed when asked for.

        Rows are in the order of `ravel_pytree` of the parameters, columns in that of
        `ravel_pytree` of the latent tree.
        """
        matrices = [whitening.matrix() for whitening in self._held]
        if len(matrices) == 1:
            return matrices[0]
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

        Those of null directions come last, as they were found. A parameter without a
        block has the eigenvalue 1. Of [`vernal.EigenProjector.from_matvec`][] it is
        the leading ones that are known.
        """
        if len(self._whitenings) == 1:
            return self._held[0].spectrum
        values = jnp.concatenate([w.spectrum.astype(self._dtype) for w in self._held])
        return values[jnp.lexsort((-values, self._is_null))]

    @property
    def _is_null(self) -> Bool[Array, " D"]:
        return jnp.concatenate([w.is_null for w in self._held], axis=-1)

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
    def condition_number(self) -> Float[Array, "*members"]:
        r"""The largest eigenvalue in $\Lambda$ over the smallest that is not null."""
        values = self.eigenvalues
        last = jnp.maximum(jnp.asarray(self.rank), 1)[..., None] - 1
        return values[..., 0] / jnp.take_along_axis(values, last, axis=-1)[..., 0]

    @property
    def log_abs_det(self) -> Float[Array, "*members"]:
        r"""The logarithm of the volume that $P$ gives to a unit cube.

        It is $\log|\det P|$, and $\frac12\log\det(P^\top P)$ where directions were
        dropped and $P$ has fewer columns than rows.
        """
        volumes = [w.log_abs_det().astype(self._dtype) for w in self._held]
        return reduce(jnp.add, volumes)

    @checked
    def at(self, params: Params) -> "EigenProjector":
        """Returns the projector of the same directions around another point.

        **Arguments:**

        - `params`: the new origin. It may be a tree of another structure, if its
            leaves have the same shapes in the same order.
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
        if self._has_names:
            structure = jax.tree.structure(nest_blocks(origin, self._blocks))
        return EigenProjector(
            jax.lax.stop_gradient(origin), self._whitenings, self._blocks, structure
        )

    @checked
    def to_params(self, latent: PyTree) -> Params:
        """Returns $x_0 + P u$ as a tree.

        **Arguments:**

        - `latent`: the latent vector $u$, of shape `(latent_size,)`; of
            [`vernal.EigenProjector.from_blocks`][] the dictionary by parameter.

        **Returns:**

        A tree like the parameters, each leaf in its own dtype.
        """
        starts = self._ravel(self.origin)
        pieces = self._pieces(latent)
        moved = [
            start + whitening.apply(jnp.asarray(piece, whitening.dtype))
            for whitening, start, piece in zip(self._held, starts, pieces, strict=True)
        ]
        return unravel_blocks(moved, self._blocks, self._origin)

    @checked
    def to_latent(self, params: Params) -> PyTree:
        r"""Returns the latent vector of a point.

        It is $P^+ (x - x_0)$ with $P^+ = P^\top F = \Lambda^{1/2} V^\top S^{-1}$,
        computed from the same factors as $P$. Where directions were dropped, this is
        the pseudo-inverse in the metric of $F$: `to_params` of the result is the
        nearest point that the latent space can reach, in units of each parameter's
        scale.

        **Arguments:**

        - `params`: the point $x$, a tree like that of the projector.

        **Returns:**

        A vector of shape `(latent_size,)`; of
        [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.
        """
        points, starts = self._checked(params, "params"), self._ravel(self.origin)
        return self._structure.unflatten(
            whitening.invert(point - start)
            for whitening, point, start in zip(self._held, points, starts, strict=True)
        )

    @checked
    def pull_back(self, grads: Params) -> PyTree:
        r"""Returns $P^\top g$, the gradient with respect to the latent vector.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A vector of shape `(latent_size,)`; of
        [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.
        """
        flats = self._checked(grads, "grads")
        return self._structure.unflatten(
            w.transpose(flat) for w, flat in zip(self._held, flats, strict=True)
        )

    @checked
    def precondition(self, grads: Params) -> Params:
        r"""Returns $P P^\top g$, the natural gradient.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A tree like the parameters. It is zero along directions that were dropped.
        """
        flats = self._checked(grads, "grads")
        natural = [
            whitening.apply(whitening.transpose(flat))
            for whitening, flat in zip(self._held, flats, strict=True)
        ]
        return unravel_blocks(natural, self._blocks, self._origin)

    def _checked(self, tree: Params, name: str) -> list[Float[Array, " _"]]:
        arrays = as_parameters(tree, name)
        require_alike(arrays, self._origin, f"`{name}`", "the projector's parameters")
        return self._ravel(arrays)

    def _ravel(self, tree: Params) -> list[Float[Array, " _"]]:
        dtypes = [whitening.dtype for whitening in self._whitenings]
        return ravel_blocks(tree, self._blocks, dtypes)

    @checked
    def null_space(self) -> tuple[dict[str, float], ...]:
        """Names the combinations of parameters that the data do not constrain.

        Each null direction is a unit vector in which every parameter is measured in its
        own scale, so that weights of parameters of different units compare. Directions
        are combined so that each involves few parameters. They are listed whatever
        `on_null` was.

        **Returns:**

        A tuple with a dictionary for each null direction, from the names of elements,
        such as `optics.wfe[6]`, to their weights, the largest first and positive.

        **Raises:**

        A `ValueError` under `jax.jit`, where the weights are not known; or of
        [`vernal.EigenProjector.from_matvec`][], which does not look at the directions
        of the complement.
        """
        found: list[dict[str, float]] = []
        leaves = leaves_by_path(self._origin, self._blocks)
        for whitening, own in zip(self._whitenings, leaves, strict=True):
            match whitening:
                case DenseWhitening():
                    if isinstance(whitening.vectors, Tracer):
                        raise ValueError(
                            "`null_space` names parameters by the values of the "
                            "projector, which are not known under `jax.jit`. Call it "
                            "outside."
                        )
                    null = whitening.null_space()
                    found += name_null_space(own, null, whitening.resolution)
                case Unchanged():
                    pass
                case _:
                    raise ValueError(
                        "`from_matvec` finds the leading directions, and does not look "
                        "at the others one by one. Form the matrix, of some of the "
                        "parameters at a time if it is large, and use `from_fisher` or "
                        "`from_blocks`."
                    )
        return tuple(found)

    @undebugged
    @checked
    def covariance(self) -> Float[Array, "D D"]:
        r"""Returns the covariance of the parameters, $P P^\top = F^{-1}$.

        Where directions were dropped, elements that grow without bound as such a
        direction gets less and less constrained are $\pm\infty$. Of parameters without
        a block nothing is known, and they are NaN.

        **Returns:**

        A matrix of shape `(D, D)`, in the order of `ravel_pytree`.
        """
        matrices = [whitening.covariance() for whitening in self._held]
        if len(matrices) == 1:
            return matrices[0]
        size = ravel_size(self._origin)
        return scatter(matrices, self._rows, self._rows, (size, size))

    @undebugged
    @checked
    def standard_errors(self) -> Params:
        """Returns the standard error of each parameter.

        It is the root of the diagonal of the covariance, infinite for a parameter that
        has a part in a direction that was dropped, NaN for one without a block.

        **Returns:**

        A tree like the parameters.
        """
        errors = [whitening.standard_errors() for whitening in self._held]
        return unravel_blocks(errors, self._blocks, self._origin)


def _refuse_empty(whitenings: tuple[AbstractWhitening, ...], name: str) -> None:
    if not any(whitening.latent_size for whitening in whitenings):
        raise ValueError(
            f"{name} constrains no parameter at all, so that nothing is left once "
            'its null directions are dropped. Use `on_null="prior"`.'
        )
