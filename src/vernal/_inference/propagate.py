"""Errors of functions of the model, and models drawn from the likelihood."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._boundary import (
    PyTree,
    in_few_words,
    prng_key,
    refuse_program,
    spelled_leaves,
    takes,
    warn,
    whole_number,
)
from .._closure import Closure
from .._curvature import (
    Flat,
    Mode,
    Subject,
    choose_mode,
    matmul,
    positive,
    traced,
    transposed_product,
)
from .._program import program
from .._projection import DenseWhitening, written_directions
from .._report import Propagated
from .._step import (
    AbstractTrainer,
    bounds_of,
    in_free_coordinates,
    live,
    priors_of,
    stripped,
)
from .._tree import as_parameters, element_name, is_inexact, ravel, ravel_dtype, unravel
from .elements import with_held
from .expansion import Around, around, warn_if_misleading, warn_if_of_few
from .laplace import ErrorOptions
from .truncated import draw_within


def propagate(
    trainer: AbstractTrainer,
    fn: Callable[[Any], PyTree],
    batch: Any,
    options: ErrorOptions,
) -> Propagated:
    """Implements `Trainer.propagate`."""
    refuse_program("propagate", trainer, batch)
    if not callable(fn):
        raise TypeError(
            f"`fn` is {in_few_words(fn)}, but must be a function of the model: "
            "`fn(model)`."
        )
    takes(fn, 1, "fn", "fn(model)")
    trainer = in_free_coordinates(trainer)
    here = around(trainer, batch, "A propagated error", options.jac, options.kind)
    scale = here.error_scale(options.scale_errors)
    warn_if_misleading(trainer, batch, here, "propagate", options.scale_errors)
    try:
        value, error, pinned, steep = propagated(trainer, fn, here, scale)
    except _OF_TRACERS as cause:
        raise TypeError(
            "`fn` asks for the number in a traced array, as `float`, `if` and the "
            "functions of NumPy do. `propagate` differentiates it in a compiled "
            "program: use `jax.numpy` in it, and `jnp.where` instead of `if`."
        ) from cause
    if here.is_of_few.any() and _depends(trainer, fn, here, scale, error):
        warn_if_of_few(trainer, here, "propagate", ", on which `fn` depends,")
    if odd := list(_odd(value, steep)):
        more = f"; and so on for {len(odd) - 4} more" if len(odd) > 4 else ""
        warn(
            f"`propagate`: {'; '.join(odd[:4])}{more}. The error is NaN there: no "
            "linear function is near. `trainer.draw` shows how such a function "
            "scatters."
        )
    if text := pinned_text(trainer, pinned, "`fn`"):
        warn(f"`propagate`: {text}.")
    if still := _still(value, error, steep):
        warn(
            f"`propagate`: {still} depends only on what is held at its bound (held "
            f"here: {_named(trainer, here.held)}). The error is NaN there. "
            "`trainer.intervals(solver, batch)` has the limit on the other side."
        )
    return Propagated(value, error)


def pinned_text(
    trainer: AbstractTrainer, pinned: Bool[Array, " D"] | None, what: str
) -> str | None:
    """Says that errors are too small for what is held; `None` if they are not."""
    if pinned is None or not pinned.any():
        return None
    return (
        f"{what} depends on {_named(trainer, pinned)}, held at its bound, and on what "
        "is free. The error is that of the free alone, and may be too small. "
        "`trainer.intervals(solver, batch)` has errors of what is held"
    )


def _named(trainer: AbstractTrainer, flags: Any) -> str:
    """Names the elements for which a flag is true."""
    indices, params = np.flatnonzero(flags), as_parameters(trainer.params)
    names = [repr(element_name(params, int(index))) for index in indices[:5]]
    more = f" and {indices.size - 5} more" if indices.size > 5 else ""
    return ", ".join(names) + more


def _still(value: PyTree, error: PyTree, steep: PyTree) -> str:
    """Names the first output that is finite, as its slopes are, and has no error."""
    parts = spelled_leaves("fn(model)", value), *map(jax.tree.leaves, (error, steep))
    for (where, leaf), own, is_steep in zip(*parts, strict=True):
        is_known = np.isfinite(leaf) & ~np.asarray(is_steep)
        if (still := np.isnan(own) & is_known).any():
            return _placed(where, still, ",")
    return ""


def _placed(where: str, flags: Any, end: str = "") -> str:
    """Adds to a name the place of the first true flag."""
    first = np.argwhere(flags)[0].tolist()
    return where + (f", first at {first} of shape {flags.shape}{end}" if first else "")


# What JAX raises where Python needs to know what is in an array.
_OF_TRACERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _odd(value: PyTree, steep: PyTree) -> Iterator[str]:
    """Says which outputs have no error since they, or their slopes, are not finite."""
    named = spelled_leaves("fn(model)", value)
    for (where, leaf), is_steep in zip(named, jax.tree.leaves(steep), strict=True):
        array = np.asarray(leaf)
        kinds = {
            f"{where} is NaN": np.isnan(array),
            f"{where} is infinite": np.isinf(array),
            f"the derivative of {where} is not finite": np.asarray(is_steep),
        }
        for what, bad in kinds.items():
            if bad.any():
                yield _placed(what, bad)
                break


def propagated(
    trainer: AbstractTrainer, fn: Callable[[Any], PyTree], here: Around, scale: float
) -> tuple[PyTree, PyTree, Bool[Array, " D"] | None, PyTree]:
    """Evaluates a function of the model, and its errors, as `run_propagate` does."""
    args = stripped(trainer), Closure.encode(fn), here.whitening, jnp.asarray(scale)
    return run_propagate(*args, jnp.asarray(here.held) if here.held.any() else None)


def _depends(
    trainer: AbstractTrainer,
    fn: Callable[[Any], PyTree],
    here: Around,
    scale: float,
    error: PyTree,
) -> bool:
    """Whether an error is another without that of parameters of too few data."""
    here = here._replace(whitening=with_held(here.whitening, here.is_of_few))
    pairs = jax.tree.leaves((error, propagated(trainer, fn, here, scale)[1]))
    half = len(pairs) // 2
    is_same = lambda old, new: np.allclose(old, new, rtol=0.01, atol=0, equal_nan=True)
    return not all(map(is_same, pairs[:half], pairs[half:]))


@program
def run_propagate(
    trainer: AbstractTrainer,
    closure: Closure,
    whitening: DenseWhitening,
    factor: Float[Array, ""],
    held: Bool[Array, " D"] | None = None,
) -> tuple[PyTree, PyTree, Bool[Array, " D"] | None, PyTree]:
    """Evaluates a function and its errors, and finds what makes these too small.

    That is each `held` element of an output which depends on free ones too; of held
    ones alone it has no error. In `whitening` the scales of held elements are zero.
    Last come the outputs whose derivative is not finite.
    """
    fn, params = closure.decode(), as_parameters(trainer.params)
    of_model = lambda flat: _checked(fn(live(trainer, unravel(flat, params)).model))
    flat = ravel(params)
    value = of_model(flat)
    outputs = traced(lambda x: ravel(of_model(x)), flat)
    is_wide = sum(leaf.size for leaf in jax.tree.leaves(value)) >= flat.size
    # A pass for each direction, or a pass for each output.
    order: tuple[Mode, Mode] = ("fwd", "bwd") if is_wide else ("bwd", "fwd")
    mode = choose_mode(outputs, flat, Subject("`fn`", is_quiet=True), order)
    norms = _by_direction if mode == "fwd" else _by_output
    known, null, whole = norms(outputs, flat, whitening)
    # The same threshold as for the errors of the parameters themselves.
    is_unbounded = null > whitening.resolution * whole
    error = jnp.where(is_unbounded, jnp.inf, factor.astype(known.dtype) * known)
    is_steep = ~jnp.isfinite(whole)
    error = jnp.where(is_steep | ~jnp.isfinite(ravel(value)), jnp.nan, error)
    flags = jax.tree.map(lambda x: x != 0, unravel(is_steep.astype(error.dtype), value))
    if held is None:
        return value, unravel(error, value), None, flags
    is_moved = whole != 0
    is_pinned, pinned = _pinned(mode, outputs, flat, held, is_moved)
    error = jnp.where(is_pinned & ~is_moved, jnp.nan, error)
    return value, unravel(error, value), pinned, flags


def _weights(roots: Float[Array, "*D"]) -> Float[Array, "3 *D"]:
    """Weighs directions of the spectrum: known ones by their errors, null ones, all."""
    known, is_null = jnp.where(roots > 0, roots, 0), roots < 0
    return jnp.stack([known, is_null.astype(roots.dtype), jnp.ones_like(roots)])


def _by_direction(
    outputs: Flat, flat: Float[Array, " D"], whitening: DenseWhitening
) -> Float[Array, "3 M"]:
    """Computes weighted norms of the gradient of each output, a direction at a time."""
    value, push = jax.linearize(outputs, flat)

    def add(
        norms: Float[Array, "3 M"], direction: tuple[Array, Array]
    ) -> tuple[Float[Array, "3 M"], None]:
        vector, root = direction
        image = push((whitening.scale * vector).astype(flat.dtype))
        parts = _weights(root).astype(image.dtype)[:, None] * image[None, :]
        # Unlike a sum of squares, it does not overflow.
        return jnp.hypot(norms, parts), None

    zeros = jnp.zeros((3, value.size), value.dtype)
    return jax.lax.scan(add, zeros, (whitening.vectors.T, whitening.roots))[0]


def _by_output(
    outputs: Flat, flat: Float[Array, " D"], whitening: DenseWhitening
) -> Float[Array, "3 M"]:
    """Computes the same, an output at a time."""
    pull, like = transposed_product(outputs, flat), outputs(flat)

    def of_one(index: Array) -> Float[Array, "3"]:
        unit = jax.nn.one_hot(index, like.size, dtype=like.dtype)
        slope = pull(unit).astype(whitening.scale.dtype)
        inner = matmul(whitening.scale * slope, whitening.vectors)
        size = positive(jnp.max(jnp.abs(inner)))
        parts = _weights(whitening.roots) * (inner / size)[None, :]
        return size * jnp.linalg.norm(parts, axis=1)

    return jax.lax.map(of_one, jnp.arange(like.size)).T


def _pinned(
    mode: Mode,
    outputs: Flat,
    flat: Float[Array, " D"],
    held: Bool[Array, " D"],
    is_moved: Bool[Array, " M"],
) -> tuple[Bool[Array, " M"], Bool[Array, " D"]]:
    """Finds the outputs of held elements, and the held elements of moved outputs."""
    if mode == "fwd":
        like, image = flat, jax.linearize(outputs, flat)[1]
        own, across = held, is_moved
    else:
        like, image = outputs(flat), transposed_product(outputs, flat)
        own, across = is_moved, held

    def add(found: Array, of_one: tuple[Array, Array]) -> tuple[Array, Array]:
        index, is_own = of_one
        depends = image(jax.nn.one_hot(index, like.size, dtype=like.dtype)) != 0
        return found | (depends & is_own), jnp.any(depends & across)

    none = jnp.zeros(across.shape, bool)
    found = jax.lax.scan(add, none, (jnp.arange(like.size), own))
    is_pinned, pinned = found if mode == "fwd" else found[::-1]
    return is_pinned, pinned & held


def _checked(value: PyTree) -> PyTree:
    """Refuses what a function returned, unless it is made of real arrays."""
    leaves, structure = jax.tree.flatten(value)
    if not leaves:
        raise ValueError("`fn` returned no array: there is nothing to propagate.")
    arrays = [jnp.asarray(x) if isinstance(x, float) else x for x in leaves]
    for leaf in arrays:
        if not is_inexact(leaf) or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"`fn` returned {kind}, but must return real floating-point arrays, "
                "alone or in a pytree. Of a complex number, return the real and the "
                "imaginary part, or `jnp.abs` and `jnp.angle`."
            )
    return structure.unflatten(arrays)


def draw(
    trainer: AbstractTrainer,
    key: PRNGKeyArray,
    count: int,
    batch: Any,
    options: ErrorOptions,
) -> PyTree:
    """Implements `Trainer.draw`."""
    refuse_program("draw", trainer, key, batch)
    scale_errors, jac, kind = options
    key, count = prng_key(key), whole_number(count, "count", least=1, most=2**31 - 1)
    trainer = in_free_coordinates(trainer)
    here = around(trainer, batch, "A draw from the likelihood", jac, kind)
    params = as_parameters(trainer.params)
    held = {element_name(params, int(index)) for index in np.flatnonzero(here.held)}
    null = [row for row in here.whitening.null_space(params) if not row.keys() <= held]
    if null:
        raise ValueError(
            f"`batch` does not constrain {len(null)} of {here.free_count} "
            f"directions, which nothing can be drawn from: {written_directions(null)}. "
            "Freeze a parameter of each (`train=`), or add a prior."
        )
    scale = here.error_scale(scale_errors)
    warn_if_misleading(trainer, batch, here, "draw", scale_errors)
    warn_if_of_few(trainer, here, "draw")
    shape, dtype = (count, here.whitening.latent_size), ravel_dtype(params)
    normal, again = jax.random.normal(key, shape, dtype), jax.random.fold_in(key, 1)
    bare, scale = stripped(trainer), jnp.asarray(scale)
    models, latents, flags = run_draw(bare, here.whitening, normal, scale, again)
    if flags is None or np.all(flags):
        return models
    if bounds_of(trainer) is not None:
        # They are small beside the errors.
        last = jax.random.fold_in(key, 2)
        models, flags = run_draw_within(
            bare, here.whitening, latents, flags, scale, last
        )
    if (kept := int(np.sum(flags))) < count:
        raise ValueError(
            f"`draw`: of {count} models {kept} are where the density of their `priors` "
            f"is not zero, after {_MOST_TRIES:,} tries for each: the errors are large "
            "beside that. Give `bounds` at the ends of the priors, within which it "
            "draws; or sample the posterior, by `trainer.objective(batch)`."
        )
    return models


@program
def run_draw(
    trainer: AbstractTrainer,
    whitening: DenseWhitening,
    latents: Float[Array, "count D"],
    factor: Float[Array, ""],
    again: PRNGKeyArray,
) -> tuple[PyTree, Float[Array, "count D"], Bool[Array, " count"] | None]:
    """Draws models; returns their latents, and flags, if any may not be allowed."""
    bounds, priors = bounds_of(trainer), priors_of(trainer)
    drawn = _drawn(trainer, whitening, factor)

    def is_within(latent: Float[Array, " D"]) -> Bool[Array, ""]:
        own, is_allowed = drawn(latent), jnp.array(True)
        if bounds is not None:
            is_allowed &= bounds.contain(own)
        if priors is not None:
            is_allowed &= priors.allow(live(trainer, own).model)
        return is_allowed

    flags = None
    if bounds is not None or (priors is not None and priors.others):
        latents, flags = _within(is_within, latents, again)
    models = eqx.filter_vmap(lambda x: live(trainer, drawn(x)).model)(latents)
    return models, latents, flags


@program
def run_draw_within(
    trainer: AbstractTrainer,
    whitening: DenseWhitening,
    latents: Float[Array, "count D"],
    is_kept: Bool[Array, " count"],
    factor: Float[Array, ""],
    key: PRNGKeyArray,
) -> tuple[PyTree, Bool[Array, " count"]]:
    """Draws those again that are not kept, within the bounds.

    It returns flags of those that the priors allow.
    """
    priors = priors_of(trainer)
    params, bounds = as_parameters(trainer.params), bounds_of(trainer)
    assert bounds is not None
    drawn = _drawn(trainer, whitening, factor)
    flat, dtype = ravel(params), whitening.roots.dtype
    # A complex parameter has no bounds, on both of its parts.
    both = lambda x: jax.lax.complex(x.real, x.real) if jnp.iscomplexobj(x) else x
    sides = [ravel(jax.tree.map(both, side)) for side in bounds.limits(params)]
    low, high = ((side - flat).astype(dtype) for side in sides)

    def of_one(latent: Array, is_kept: Array, key: PRNGKeyArray) -> tuple[PyTree, Any]:
        new = draw_within(whitening, factor, (low, high), key).astype(latent.dtype)
        # Rounding may lead beyond a bound.
        own = bounds.clip(drawn(jnp.where(is_kept, latent, new)))
        model = live(trainer, own).model
        return model, jnp.array(True) if priors is None else priors.allow(model)

    keys = jax.random.split(key, len(latents))
    return eqx.filter_vmap(of_one)(latents, is_kept, keys)


def _drawn(
    trainer: AbstractTrainer, whitening: DenseWhitening, factor: Float[Array, ""]
) -> Callable[[Float[Array, " D"]], PyTree]:
    """Returns a function from a latent vector to parameters."""
    params = as_parameters(trainer.params)
    flat = ravel(params)

    def drawn(latent: Float[Array, " D"]) -> PyTree:
        step = whitening.apply(factor.astype(latent.dtype) * latent)
        return unravel(flat + step.astype(flat.dtype), params)

    return drawn


# So often is a draw that is not allowed drawn again.
_MOST_TRIES = 1_000


def _within(
    is_within: Callable[[Array], Array],
    latents: Float[Array, "count D"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "count D"], Bool[Array, " count"]]:
    """Draws again what is not within, and says what is: a truncated distribution."""
    contained = jax.vmap(is_within)

    def draw_again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count, latents = carry
        new = jax.random.normal(
            jax.random.fold_in(key, count), latents.shape, latents.dtype
        )
        is_kept = contained(latents)[:, None]
        return count + 1, jnp.where(is_kept, latents, new)

    goes_on = lambda carry: (carry[0] < _MOST_TRIES) & ~jnp.all(contained(carry[1]))
    _, latents = jax.lax.while_loop(goes_on, draw_again, (jnp.int32(0), latents))
    return latents, contained(latents)
