"""`EigenProjector`, and the ways to make one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce, wraps
from itertools import chain
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

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
    find_blocks,
    leaves_by_path,
    nest_blocks,
    on_each,
    places,
    scatter,
)
from .dense import Kind, check_jacobian, whiten, whiten_jacobian
from .low_rank import whiten_matvec
from .nulls import NullPolicy, OnNull
from .whitening import AbstractWhitening, Unchanged

FnT = TypeVar("FnT", bound=Callable[..., Any])

# The structure of a latent space that is one vector.
_VECTOR = jax.tree.structure(0)


def _compiled(fn: FnT) -> FnT:
    """Makes a method one program; by itself, each of its operations would be one.

    That of a stacked projector is mapped over its members, and so are the arguments.
    """

    @wraps(fn)
    def of_each(projector: "EigenProjector", *args: Any) -> Any:
        mapped = eqx.filter_vmap(of_each) if projector.members else fn
        return mapped(projector, *args)

    return cast(FnT, jax.jit(of_each, inline=True))


class EigenProjector(Portable, eqx.Module):
    r"""An affine map between parameters and a latent space in which they are whitened.

    $$x = x_0 + P u, \qquad P^\top F P = I$$

    where $x$ holds the parameters in the order of `jax.flatten_util.ravel_pytree`,
    $x_0$ is the point at which the projector was made, and $F$ the Fisher matrix there.
    The data constrain every direction of the latent vector $u$ equally well, whatever
    the units of the parameters and their correlations.

    The matrix is first scaled to a unit diagonal, $N = S F S = V \Lambda V^\top$ with
    $S = \mathrm{diag}(F)^{-1/2}$, and then $P = S V \Lambda^{-1/2}$. The scale of a
    parameter is its entry of $S$: its standard error if all others were known, or 1 if
    its row of $F$ is zero. For a covariance $C$,
    $S = \mathrm{diag}(C)^{1/2}$, $S^{-1} C S^{-1} = V \Lambda V^\top$ and
    $P = S V \Lambda^{1/2}$.

    Make one from

    - the Jacobian of residuals: [`vernal.EigenProjector.from_jacobian`][];
    - a matrix, if that is all you have: [`vernal.EigenProjector.from_fisher`][],
        [`vernal.EigenProjector.from_covariance`][];
    - a matrix for each group of parameters: [`vernal.EigenProjector.from_blocks`][];
    - products with a matrix too large to form: [`vernal.EigenProjector.from_matvec`][].

    A projector is constant: no gradient flows into its arrays. The arrays of a stacked
    one, which `jax.vmap` makes, have a row for each member, and so have those that its
    methods take and return.
    """

    # A whitening for each block; the latent space is the tree of their latent arrays.
    _origin: Params
    _whitenings: tuple[AbstractWhitening, ...]
    _blocks: tuple[Block, ...] = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)
    _is_of_free: bool = eqx.field(static=True, default=False)

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

        A direction is null, that is, the data do not constrain it, if its eigenvalue
        in $\Lambda$ is at most `rtol` times the largest.

        **Arguments:**

        - `fmat`: the Fisher matrix $F$, of shape `(D, D)`, in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`: the point $x_0$, a tree of the trained leaves, with `None` for the
            others. $D$ is the number of all their elements. They may differ in dtype.
        - `rtol`: the fraction of the largest eigenvalue up to which a direction is
            null. By default $D$ times the machine epsilon of `fmat`.
        - `rank`: the number of leading directions to keep. All others are then null,
            whatever their eigenvalues. It is needed to drop directions under `jax.jit`
            and `jax.vmap`, where shapes cannot depend on values.
        - `on_null`: what to do with null directions. `"drop"`: leave them out of the
            latent space. `"raise"`: raise an error that names the parameters involved.
            `"prior"`: give each the eigenvalue 1 in $\Lambda$, a Gaussian prior as wide
            as the parameter's own scale; no shape then depends on how many there are.

        **Raises:**

        - `ValueError`: if `fmat` is not a finite symmetric matrix of shape `(D, D)`,
            but for rounding, has a negative eigenvalue beyond the threshold, or leaves
            a kept direction unconstrained. Under `jax.jit`, an error when the program
            runs.
        - `TypeError`: if a parameter is complex or not an array of floats.
        """
        nulls = NullPolicy(rtol, rank, on_null)
        return _from_matrix(fmat, params, nulls, "fmat")

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

        Forming $J^\top J$ squares the condition number and loses half of the digits: a
        line through the years 2010 to 2024 has a Fisher matrix that is singular in
        single precision. So $\Lambda$ and $V$ come from the singular values of $JS$,
        the Jacobian with columns of unit norm. Their relative accuracy is the machine
        epsilon times the condition number of $JS$, and not its square. Where that
        number is small, the eigenvalues of $S J^\top J S$ are as accurate and cheaper,
        and are used.

        See Golub and Van Loan, *Matrix computations* (2013), sections 5.2 and 5.3.

        **Arguments:**

        - `jac`: the Jacobian $J$, of shape `(N, D)`, as [`vernal.jacobian`][] returns
            it: a row for each residual, columns in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`, `on_null`: as in [`vernal.EigenProjector.from_fisher`][].
        - `blocks`: selectors of groups of parameters. Each group is whitened by its own
            columns, as in [`vernal.EigenProjector.from_blocks`][].
        - `rtol`: the fraction of the largest eigenvalue of $S J^\top J S$ (the square
            of a singular value) up to which a direction is null. By default
            $(\max(D, 64)\,\epsilon)^2$ with the machine epsilon $\epsilon$ of `jac`:
            rounding of the elements of $J$ leaves a zero singular value about this
            large.
        - `rank`: as in [`vernal.EigenProjector.from_fisher`][]; with `blocks`, as in
            [`vernal.EigenProjector.from_blocks`][].

        **Raises:**

        - `ValueError`: if `jac` is not a finite matrix with $D$ columns, has one whose
            standard error underflows, or leaves a kept direction unconstrained. Under
            `jax.jit`, an error when the program runs.
        - `TypeError`: if `jac` or a parameter is complex.
        """
        origin = jax.lax.stop_gradient(as_parameters(params))
        nulls = NullPolicy(rtol, rank, on_null)
        nulls.check_rank_kind(blocks)
        check_jacobian(jac, origin, "`jac`")
        if blocks is None:
            whitening = whiten_jacobian(jac, origin, nulls, "`jac`")
            return make_projector(whitening, origin, "`jac`")
        selectors = tuple(tuple(b) if isinstance(b, list) else b for b in blocks)
        own = places(origin, find_blocks(origin, selectors))
        given = {s: jac[:, index] for s, index in zip(selectors, own, strict=True)}
        return make_block_projector(given, origin, nulls, whiten_jacobian)

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

        A direction without variance is null: its standard error is infinite, not zero.
        A pseudo-inverse, or a sample that is too small, leaves no variance in a
        direction that the data do not constrain.

        **Arguments:**

        - `cov`: the covariance matrix $C$, of shape `(D, D)`, in the order of
            `jax.flatten_util.ravel_pytree(params)`.
        - `params`, `rtol`, `rank`, `on_null`: as in
            [`vernal.EigenProjector.from_fisher`][].

        **Raises:**

        As [`vernal.EigenProjector.from_fisher`][].
        """
        nulls = NullPolicy(rtol, rank, on_null)
        return _from_matrix(cov, params, nulls, "cov")

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

        The Fisher matrix is taken to be block-diagonal. The cost is the sum of the
        costs of the blocks, so thousands of parameters can be whitened, a few at a
        time. Parameters without a block are not whitened: their part of the latent
        space is their distance from the origin.

        The latent space is a dictionary with the same paths as the parameters, so that
        the rules of a [`vernal.ParamOptimiser`][] keep their names. The block of one
        parameter is a vector at its path. The block of several is a vector at the path
        of the first, with `None` at the others, and belongs to one rule.

        ```python
        trainer = Fit(model, vn.ParamOptimiser(rules))
        blocks = trainer.fisher(batch, blocks=("position", "flux"))
        projector = vn.EigenProjector.from_blocks(blocks, trainer.params)
        trainer = trainer.reproject(projector)
        ```

        **Arguments:**

        - `blocks`: a mapping from selectors (see [`vernal.split`][]) to the Fisher
            matrices of the selected parameters, each in the order of `ravel_pytree`.
        - `params`: as in [`vernal.EigenProjector.from_fisher`][].
        - `rtol`, `on_null`: as there, for each block. A block that the data do not
            constrain at all may be dropped; its latent vector is then empty.
        - `rank`: a mapping from selectors to the number of leading directions to keep.
            To drop directions under `jax.jit` and `jax.vmap`, give it for every block.

        **Raises:**

        As [`vernal.EigenProjector.from_fisher`][], with the name of the block, and

        - `UnknownPathError`: if a selector matches nothing.
        - `ValueError`: if two blocks share a parameter.
        """
        nulls = NullPolicy(rtol, rank, on_null)
        whiten_one = partial(whiten, kind="fmat")
        return make_block_projector(blocks, params, nulls, whiten_one)

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

        Lanczos iterations with full reorthogonalisation find the `rank` leading
        eigenvectors $V$ and eigenvalues $\Lambda$ of the scaled matrix $SFS$. Their
        orthogonal complement is scaled by one number, its mean curvature

        $$c = \frac{\operatorname{tr}(SFS) - \sum_i \Lambda_i}{D - \text{rank}},$$

        with a trace estimated from random probes, and

        $$P = S \left( c^{-1/2} (I - V V^\top) + V \Lambda^{-1/2} V^\top \right).$$

        The latent space keeps all $D$ dimensions. It is whitened in the leading
        directions, and approximately in the others. Memory grows as $D$ times `rank`.

        See Lanczos, *An iteration method for the solution of the eigenvalue problem of
        linear differential and integral operators*, Journal of Research of the
        National Bureau of Standards 45 (1950); Meyer, Musco, Musco and Woodruff,
        *Hutch++: optimal stochastic trace estimation* (2021).

        **Arguments:**

        - `matvec`: the product with a symmetric matrix, a function from a tree like
            `params` to another, such as [`vernal.gauss_newton_matvec`][] and
            [`vernal.hessian_matvec`][] return. It is compiled once.
        - `params`: as in [`vernal.EigenProjector.from_fisher`][].
        - `rank`: the number of leading directions.
        - `key`: a PRNG key, for the first vector and the probes.
        - `scale`: a tree like `params` of positive numbers $S$, the size of each
            parameter in its own unit; ones by default. Give it if units differ by
            orders of magnitude: a matrix that is never formed cannot be scaled to a
            unit diagonal.

        **Raises:**

        - `ValueError`: if `rank` is not between 1 and $D$, or larger than the number of
            directions that the matrix constrains; if a product is not finite; if the
            matrix is not symmetric or has a negative eigenvalue. Under `jax.jit`, an
            error when the program runs.
        - `TypeError`: if a parameter is complex or not an array of floats.
        """
        origin = jax.lax.stop_gradient(as_parameters(params))
        takes(matvec, 1, "matvec", "matvec(tree)")
        whitening = whiten_matvec(matvec, origin, rank, key=key, scale=scale)
        return make_projector(whitening, origin, "`matvec`")

    @property
    def is_of_free(self) -> bool:
        """Whether it maps the free coordinates of bijections, and not parameters."""
        return self._is_of_free

    @property
    def members(self) -> tuple[int, ...]:
        """The leading axes of the arrays of a stacked projector; `()` of one alone."""
        return max((w.scale.shape[:-1] for w in self._whitenings), key=len)

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
        return self._structure != _VECTOR

    @property
    def latent_like(self) -> PyTree:
        """The latent tree, with shapes and dtypes in place of arrays."""
        return self._structure.unflatten(
            jax.ShapeDtypeStruct((*self.members, *w.latent_shape), w.dtype)
            for w in self._whitenings
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
    def matrix(self) -> Float[Array, "*members D latent"]:
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
    def at(self, params: Params) -> "EigenProjector":
        """Returns a projector with the same matrix and another origin, `params`.

        Its structure may differ, as long as its leaves have the same shapes in the same
        order.
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
        """Returns $x_0 + P u$ as a tree like the parameters, each leaf in its dtype.

        **Arguments:**

        - `latent`: the latent vector $u$, of shape `(latent_size,)`; after
            [`vernal.EigenProjector.from_blocks`][] a dictionary by parameter.
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
        r"""Returns the latent vector of a point $x$, $P^+ (x - x_0)$.

        Here $P^+ = P^\top F = \Lambda^{1/2} V^\top S^{-1}$. Where directions were
        dropped, this is a pseudo-inverse: `to_params` of the result is the nearest
        point that the latent space can reach, with each parameter measured in its own
        scale.
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

        That with respect to the parameters is $g$, a tree like them.
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

        It is a tree like the parameters, as the gradient $g$ with respect to them, and
        zero along directions that were dropped.
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
            directions; or of a stacked projector.
        """
        if self.members:
            raise ValueError(
                "`null_space` is for one projector, and this one has members: take "
                "one, such as the first, `jax.tree.map(lambda x: x[0], projector)`."
            )
        leaves = leaves_by_path(self._origin, self._blocks)
        pairs = zip(self._whitenings, leaves, strict=True)
        found = [whitening.null_space(own) for whitening, own in pairs]
        return tuple(chain.from_iterable(found))

    @undebugged
    @checked
    @_compiled
    def covariance(self) -> Float[Array, "*members D D"]:
        r"""Returns the covariance of the parameters, $P P^\top = F^{-1}$.

        Elements to which a dropped direction contributes are $\pm\infty$. Those of
        parameters without a block are NaN, since nothing is known of them. The order is
        that of `ravel_pytree`.
        """
        matrices = [whitening.covariance() for whitening in self._held]
        size = ravel_size(self._origin)
        return scatter(matrices, self._rows, self._rows, (size, size))

    @undebugged
    @checked
    @_compiled
    def standard_errors(self) -> Params:
        """Returns the standard error of each parameter, a tree like the parameters.

        It is the root of the diagonal of the covariance: infinite for a parameter that
        contributes to a dropped direction, NaN for one without a block.
        """
        errors = [whitening.standard_errors() for whitening in self._held]
        return self._unravel(errors)


def encode_near(
    projector: EigenProjector, params: Params
) -> tuple[EigenProjector, PyTree]:
    """Encodes parameters, with an origin there if rounding would move them."""
    origin, latent = _near(projector, params)
    return projector.at(origin), latent


@eqx.filter_jit
def _near(projector: EigenProjector, params: Params) -> tuple[Params, PyTree]:
    """Returns the origin to use, and the latent array from there.

    Whatever is added to an origin far away has its spacing. It is felt where it is
    coarser than that of the parameter, and than a ten thousandth of the scale.
    """
    latent = projector.to_latent(params)
    moved = projector.to_params(latent)
    scales = [whitening.scale for whitening in projector.whitenings]
    scales = projector._unravel(scales)  # pyright: ignore[reportPrivateUsage]

    def is_kept(new: Array, old: Array, start: Array, scale: Array) -> Array:
        eps = float(jnp.finfo(old.dtype).eps)
        shift = jnp.maximum(jnp.abs(new - old), eps * jnp.abs(start))
        limit = jnp.maximum(8 * eps * jnp.abs(old), 1e-4 * scale)
        # What is not finite is no reason to move.
        return ~jnp.any(shift > limit)

    flags = jax.tree.map(is_kept, moved, params, projector.origin, scales)
    is_near = jnp.all(jnp.stack(jax.tree.leaves(flags)))
    either = lambda x, y: jax.tree.map(lambda x, y: jnp.where(is_near, x, y), x, y)
    zeros = jax.tree.map(jnp.zeros_like, latent)
    return either(projector.origin, params), either(latent, zeros)


def make_projector(
    whitening: AbstractWhitening, params: Params, name: str, is_of_free: bool = False
) -> EigenProjector:
    """Makes a projector whose latent space is one vector, which may not be empty."""
    _refuse_empty((whitening,), name)
    origin = jax.lax.stop_gradient(as_parameters(params))
    every = tuple(range(len(jax.tree.leaves(origin))))
    return EigenProjector(origin, (whitening,), (every,), _VECTOR, is_of_free)


def make_block_projector(
    given: Mapping[Any, Any],
    params: Params,
    nulls: NullPolicy,
    whiten: Callable[[Any, Params, NullPolicy, str], AbstractWhitening],
    is_of_free: bool = False,
) -> EigenProjector:
    """Makes a projector with a whitening for each block.

    For each selector, `whiten` takes what is given, the parameters of the block, its
    policy, and its name in errors. A leaf without a selector is an unchanged block.
    """
    if not given:
        raise ValueError(
            '`blocks` is empty: it needs at least one matrix, such as `{"flux": fmat}`.'
        )
    if odd := [selector for selector in nulls.rank or () if selector not in given]:
        raise ValueError(
            f"`rank` has {odd[0]!r}, which is not a block. The blocks are "
            f"{', '.join(map(repr, given))}."
        )
    origin = jax.lax.stop_gradient(as_parameters(params))
    blocks = find_blocks(origin, tuple(given))
    leaves, owned = leaves_by_path(origin, blocks), set(chain.from_iterable(blocks))
    found: dict[Block, AbstractWhitening] = {
        (index,): Unchanged(leaf)
        for index, leaf in enumerate(jax.tree.leaves(origin))
        if index not in owned
    }
    for selector, block, own in zip(given, blocks, leaves, strict=True):
        name = f"`blocks[{selector!r}]`"
        found[block] = whiten(given[selector], own, nulls.of_block(selector), name)
    # By their first leaves.
    blocks = tuple(sorted(found))
    whitenings = tuple(found[block] for block in blocks)
    _refuse_empty(whitenings, "`blocks`")
    structure = jax.tree.structure(nest_blocks(origin, blocks))
    return EigenProjector(origin, whitenings, blocks, structure, is_of_free)


def _from_matrix(
    matrix: Matrix, params: Params, nulls: NullPolicy, kind: Kind
) -> EigenProjector:
    origin, name = jax.lax.stop_gradient(as_parameters(params)), f"`{kind}`"
    return make_projector(whiten(matrix, origin, nulls, name, kind), origin, name)


def _refuse_empty(whitenings: tuple[AbstractWhitening, ...], name: str) -> None:
    if not any(whitening.latent_size for whitening in whitenings):
        raise ValueError(
            f"{name} constrains no parameter at all, so that nothing is left once "
            'its null directions are dropped. Use `on_null="prior"`.'
        )
