"""A telescope's wavefront from three exposures.

Three exposures of a star, out of focus by known amounts, share the errors of the
telescope's wavefront: twelve Zernike coefficients of about 1e-8 metres. Each exposure
has its own position, of about 1e-7 radians, and its own flux, up to 1e6 photons.
[dLux](https://louisdesdoigts.github.io/dLux/) computes the images, with a pupil of
64 × 64 pixels whose central obstruction correlates the coefficients. The noise is that
of photons and of the detector.

Five methods go from the same start to the same chi-squared, within one per cent of the
lowest:

- *sgd*: a rate for each element, from the diagonal of the Fisher matrix. This is the
  best that one could tune by hand;
- *natural gradient*: sgd preconditioned by the whole matrix, which a callback computes
  again every few steps;
- *LBFGS*: Optimistix's solver, in the space whitened by the matrix;
- *Levenberg–Marquardt*: Optimistix's solver, which computes its own matrix at every
  step, in the parameters themselves and in the whitened space.

The seconds are those of a second run, compiled by the first, with the number of steps
that the method needs. The table at the end lists the parameters with their errors from
the Fisher matrix.
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
from dLux.layers.optics import BasisOptic
from dLux.optical_systems import AngularOpticalSystem
from dLux.utils.coordinates import pixel_coords
from dLux.utils.geometry import circle
from dLux.utils.zernikes import zernike_basis

import vernal as vn

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
WAVELENGTHS = jnp.array([500e-9, 550e-9, 600e-9])
READ_NOISE = 5.0
PARAMETERS = ("zernikes", "position", "flux")
RATE, RENEWED_EVERY = 0.3, 4
SOLVER = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)


class Exposures(eqx.Module):
    """A telescope, and a star in each exposure."""

    zernikes: jax.Array  # metres
    position: jax.Array  # radians
    flux: jax.Array  # photons
    defocus: jax.Array  # metres, known
    optics: AngularOpticalSystem

    def __call__(self):
        def image(position, flux, defocus):
            coefficients = self.zernikes.at[0].add(defocus)
            optics = self.optics.set("pupil.coefficients", coefficients)
            return flux * optics.propagate(WAVELENGTHS, position)

        return jax.vmap(image)(self.position, self.flux, self.defocus)


images_of = eqx.filter_jit(Exposures.__call__)


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        images, sigma = batch
        return (model() - images) / sigma


def telescope():
    """Returns the optics: an annulus of one metre, the twelve Zernikes after tilt."""
    grid = pixel_coords(64, 1.0)
    zernikes = zernike_basis(list(range(4, 16)), grid, 1.0)
    pupil = BasisOptic(
        basis=zernikes,
        transmission=circle(grid, 0.5) - circle(grid, 0.3),
        coefficients=jnp.zeros(12),
        normalise=True,
    )
    return AngularOpticalSystem(64, 1.0, [("pupil", pupil)], 32, 0.03)


def observe(seed):
    """Returns the truth, and noisy images of it."""
    rng = np.random.default_rng(seed)
    truth = Exposures(
        zernikes=jnp.asarray(rng.normal(0, 2e-8, 12)),
        position=jnp.asarray(rng.normal(0, 1e-7, (3, 2))),
        flux=jnp.asarray([1e5, 3e5, 1e6]),
        defocus=jnp.asarray([0.0, 6e-8, -6e-8]),
        optics=telescope(),
    )
    expected = images_of(truth)
    sigma = jnp.sqrt(expected + READ_NOISE**2)
    noise = rng.normal(0, READ_NOISE, expected.shape)
    return truth, (jnp.asarray(rng.poisson(expected) + noise), sigma)


def guess(truth):
    """Returns the start of the fit: a flat wavefront, on axis, with wrong fluxes."""
    return eqx.tree_at(
        lambda model: (model.zernikes, model.position, model.flux),
        truth,
        (jnp.zeros(12), jnp.zeros((3, 2)), truth.flux * jnp.array([1.2, 0.8, 0.9])),
    )


def sgd(model, batch, steps=300):
    trainer = Fit(model, train=PARAMETERS)
    fisher = jnp.diag(trainer.fisher(batch))
    _, unravel = jax.flatten_util.ravel_pytree(trainer.params)
    variances = vn.precondition(unravel(1 / fisher))
    optimiser = vn.ParamOptimiser({PARAMETERS: optax.sgd(RATE)}, first=variances)
    return Fit(model, optimiser).fit(batch, steps, progress=False)


def natural_gradient(model, batch, steps=28):
    def renewed(trainer, history=None):
        fisher = trainer.fisher(batch)
        projector = vn.EigenProjector.from_fisher(fisher, trainer.params)
        rules = {PARAMETERS: optax.sgd(RATE)}
        optimiser = vn.ParamOptimiser(rules, first=vn.precondition(projector))
        return trainer.replace(optimiser=optimiser)

    trainer = renewed(Fit(model, train=PARAMETERS))
    options = {"callback": renewed, "chunk": RENEWED_EVERY, "progress": False}
    return trainer.fit(batch, steps, **options)


def lbfgs(model, batch, steps=100):
    trainer = Fit(model, train=PARAMETERS).whiten(batch)
    return trainer.solve(optx.LBFGS(rtol=1e-6, atol=1e-6), batch, max_steps=steps)


def levenberg_marquardt(model, batch, steps=100):
    return Fit(model, train=PARAMETERS).solve(SOLVER, batch, max_steps=steps)


def whitened_levenberg_marquardt(model, batch, steps=100):
    trainer = Fit(model, train=PARAMETERS).whiten(batch)
    return trainer.solve(SOLVER, batch, max_steps=steps)


METHODS = {
    "sgd": sgd,
    "natural gradient": natural_gradient,
    "LBFGS": lbfgs,
    "Levenberg–Marquardt": levenberg_marquardt,
    "the same, whitened": whitened_levenberg_marquardt,
}


def main(output):
    truth, batch = observe(seed=0)
    start = guess(truth)
    results = {name: method(start, batch) for name, method in METHODS.items()}
    best = results["Levenberg–Marquardt"].trainer
    report = best.report(batch)
    scale = 2 / report.degrees_of_freedom
    losses = {name: scale * r.history.loss for name, r in results.items()}
    goal = 1.01 * report.reduced_chi_squared

    print("method               steps  seconds  chi-squared")
    steps = {}
    for name, method in METHODS.items():
        assert losses[name].min() <= goal, f"{name} does not reach the goal"
        steps[name] = int(np.argmax(losses[name] <= goal))
        before = time.perf_counter()
        jax.block_until_ready(method(start, batch, steps[name]).trainer.params)
        took = time.perf_counter() - before
        print(f"{name:20}{steps[name]:6}{took:9.2f}{losses[name].min():13.4f}")
    print("\n" + best.table(batch))
    assert 5 * max(steps[name] for name in list(METHODS)[1:]) < steps["sgd"]

    errors = best.standard_errors(batch)
    pulls = jax.tree.map(
        lambda fitted, true, error: (fitted - true) / error,
        best.params,
        Fit(truth, train=PARAMETERS).params,
        errors,
    )
    pulls = jnp.concatenate([jnp.ravel(pull) for pull in jax.tree.leaves(pulls)])
    assert 0.5 < jnp.sqrt(jnp.mean(pulls**2)) < 1.5, "the errors are wrong"
    draw(batch, best.model, losses, goal, output)


def draw(batch, model, losses, goal, output):
    """One exposure above; below, chi-squared at each step of each method."""
    plt.style.use(HERE / "style.mplstyle")
    figure, axes = plt.subplot_mosaic("ABC;DDD", figsize=(9, 6.4))
    (data, _, _), (sigma, _, _) = batch
    fitted, _, _ = images_of(model)
    pictures = {
        "data, square root": (jnp.sqrt(jnp.maximum(data, 0)), "magma"),
        "fitted, square root": (jnp.sqrt(fitted), "magma"),
        "difference in error bars": ((data - fitted) / sigma, "RdBu"),
    }
    for label, (title, (image, colours)) in zip("ABC", pictures.items(), strict=True):
        low, high = (-4, 4) if colours == "RdBu" else (None, None)
        axes[label].imshow(image, cmap=colours, vmin=low, vmax=high)
        axes[label].set_title(title)
        axes[label].set_axis_off()
    chi_squared = axes["D"]
    for name, values in losses.items():
        chi_squared.plot(np.arange(len(values)) + 1, values, label=name)
    chi_squared.axhline(goal, color="0.6", lw=1, zorder=0)
    chi_squared.set(xscale="log", yscale="log", xlabel="step")
    chi_squared.set_title("Chi-squared per datum")
    chi_squared.legend()
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "telescope.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
