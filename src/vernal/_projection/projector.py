"""`EigenProjector`, and the ways to make one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from .._boundary import Params, checked, takes
from .._curvature import Matrix
from .._tree import as_parameters
from .affine import VECTOR, AbstractProjector
from .blocks import Block, find_blocks, leaves_by_path, nest_blocks, places
from .decompose import Kind, check_jacobian, whiten, whiten_jacobian
from .low_rank import whiten_matvec
from .null_policy import NullPolicy, OnNull
from .whitening import AbstractWhitening, Unchanged


class EigenProjector(AbstractProjector):
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

    A projector is constant: no gradient flows into its arrays.
    """

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

        - `ValueError`: if `fmat` is not a finite matrix of shape `(D, D)`, has a
            negative eigenvalue beyond the threshold, or leaves a kept direction
            unconstrained. Under `jax.jit`, an error when the program runs.
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

        - `ValueError`: if `jac` is not a finite matrix with $D$ columns, or leaves a
            kept direction unconstrained. Under `jax.jit`, an error when the program
            runs.
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


def make_projector(
    whitening: AbstractWhitening, params: Params, name: str, is_of_free: bool = False
) -> EigenProjector:
    """Makes a projector whose latent space is one vector, which may not be empty."""
    _refuse_empty((whitening,), name)
    origin = jax.lax.stop_gradient(as_parameters(params))
    every = tuple(range(len(jax.tree.leaves(origin))))
    return EigenProjector(origin, (whitening,), (every,), VECTOR, is_of_free)


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
