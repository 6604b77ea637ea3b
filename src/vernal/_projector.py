"""An affine map between a tree of parameters and a whitened latent vector."""

import equinox as eqx
import jax
from jax.core import Tracer
from jaxtyping import Array, Float

from ._alike import require_alike
from ._dense import DenseWhitening, OnNull, whiten
from ._directions import name_null_space
from ._eigen import Matrix
from ._ravel import as_parameters, ravel, unravel
from ._typing import Params, checked


class EigenProjector(eqx.Module):
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

    Make one with [`vernal.EigenProjector.from_fisher`][] or
    [`vernal.EigenProjector.from_covariance`][]. A projector never changes: no gradient
    flows into its arrays.
    """

    _origin: Params
    _whitening: DenseWhitening

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
            the null directions, whatever their eigenvalues. Must be given under
            `jax.jit` and `jax.vmap`, where a shape cannot depend on values.
        - `on_null`: what becomes of null directions. `"drop"`: the latent space goes
            without them. `"raise"`: an error that names the parameters involved.
            `"prior"`: each gets the eigenvalue 1 in $\Lambda$, a Gaussian prior as wide
            as the parameter's own scale.

        **Raises:**

        A `ValueError` if `fmat` is not a finite matrix of shape `(D, D)`, if it has a
        negative eigenvalue beyond the threshold, or if a direction that is kept is
        null; under `jax.jit`, an error when the program runs. A `TypeError` if a
        parameter is complex or not an array of floats.
        """
        origin = jax.lax.stop_gradient(as_parameters(params))
        return cls(origin, whiten(fmat, origin, rtol, rank, on_null, "fmat"))

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
        origin = jax.lax.stop_gradient(as_parameters(params))
        return cls(origin, whiten(cov, origin, rtol, rank, on_null, "cov"))

    @property
    def _held(self) -> DenseWhitening:
        return jax.lax.stop_gradient(self._whitening)

    @property
    def origin(self) -> Params:
        """The point $x_0$, a tree of arrays; it has the latent vector zero."""
        return jax.lax.stop_gradient(self._origin)

    @property
    def matrix(self) -> Float[Array, "D latent"]:
        """The matrix $P$, of shape `(D, latent_size)`. It is formed when asked for."""
        return self._held.matrix()

    @property
    def eigenvalues(self) -> Float[Array, " D"]:
        r"""All $D$ eigenvalues $\Lambda$ of the scaled matrix, descending.

        Those of null directions come last, as they were found.
        """
        return self._held.eigenvalues

    @property
    def rank(self) -> int:
        """The number of directions that are not null."""
        return self._whitening.rank

    @property
    def latent_size(self) -> int:
        """The length of the latent vector.

        It is $D$, or `rank` where null directions were dropped.
        """
        return self._whitening.latent_size

    @property
    def condition_number(self) -> Float[Array, ""]:
        r"""The largest eigenvalue in $\Lambda$ over the smallest that is not null."""
        values = self.eigenvalues
        return values[..., 0] / values[..., max(self.rank, 1) - 1]

    @property
    def log_abs_det(self) -> Float[Array, ""]:
        r"""The logarithm of the volume that $P$ gives to a unit cube.

        It is $\log|\det P|$, and $\frac12\log\det(P^\top P)$ where directions were
        dropped and $P$ has fewer columns than rows.
        """
        return self._held.log_abs_det()

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
        return EigenProjector(jax.lax.stop_gradient(origin), self._whitening)

    @checked
    def to_params(self, latent: Float[Array, "..."]) -> Params:
        """Returns $x_0 + P u$ as a tree.

        **Arguments:**

        - `latent`: the latent vector $u$, of shape `(latent_size,)`.

        **Returns:**

        A tree like the parameters, each leaf in its own dtype.
        """
        if latent.shape != (self.latent_size,):
            raise ValueError(
                f"`latent` has shape {latent.shape}, but the latent space of this "
                f"projector is made of vectors of shape {(self.latent_size,)}."
            )
        held = self._held
        dtype = held.scale.dtype
        start = ravel(self.origin, dtype)
        return unravel(start + held.apply(latent.astype(dtype)), self._origin)

    @checked
    def to_latent(self, params: Params) -> Float[Array, " latent"]:
        r"""Returns the latent vector of a point.

        It is $P^+ (x - x_0)$ with $P^+ = P^\top F = \Lambda^{1/2} V^\top S^{-1}$,
        computed from the same factors as $P$. Where directions were dropped, this is
        the pseudo-inverse in the metric of $F$: `to_params` of the result is the
        nearest point that the latent space can reach, in units of each parameter's
        scale.

        **Arguments:**

        - `params`: the point $x$, a tree like that of the projector.

        **Returns:**

        A vector of shape `(latent_size,)`.
        """
        held = self._held
        dtype = held.scale.dtype
        shift = self._ravel(params, "params") - ravel(self.origin, dtype)
        return held.invert(shift)

    @checked
    def pull_back(self, grads: Params) -> Float[Array, " latent"]:
        r"""Returns $P^\top g$, the gradient with respect to the latent vector.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A vector of shape `(latent_size,)`.
        """
        return self._held.transpose(self._ravel(grads, "grads"))

    @checked
    def precondition(self, grads: Params) -> Params:
        r"""Returns $P P^\top g$, the natural gradient.

        **Arguments:**

        - `grads`: the gradient $g$ with respect to the parameters, a tree like them.

        **Returns:**

        A tree like the parameters. It is zero along directions that were dropped.
        """
        held = self._held
        latent = held.transpose(self._ravel(grads, "grads"))
        return unravel(held.apply(latent), self._origin)

    def _ravel(self, tree: Params, name: str) -> Float[Array, " D"]:
        arrays = as_parameters(tree, name)
        require_alike(arrays, self._origin, f"`{name}`", "the projector's parameters")
        return ravel(arrays, self._whitening.scale.dtype)

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

        A `ValueError` under `jax.jit`, where the weights are not known.
        """
        whitening = self._whitening
        if isinstance(whitening.null_vectors, Tracer):
            raise ValueError(
                "`null_space` names parameters by the values of the projector, which "
                "are not known under `jax.jit`. Call it outside."
            )
        return name_null_space(
            self._origin, whitening.null_vectors, whitening.resolution
        )

    @checked
    def covariance(self) -> Float[Array, "D D"]:
        r"""Returns the covariance of the parameters, $P P^\top = F^{-1}$.

        Where directions were dropped, elements that grow without bound as such a
        direction gets less and less constrained are $\pm\infty$.

        **Returns:**

        A matrix of shape `(D, D)`, in the order of `ravel_pytree`.
        """
        return self._held.covariance()

    @checked
    def standard_errors(self) -> Params:
        """Returns the standard error of each parameter.

        It is the root of the diagonal of the covariance, infinite for a parameter that
        has a part in a direction that was dropped.

        **Returns:**

        A tree like the parameters.
        """
        return unravel(self._held.standard_errors(), self._origin)
