"""A spectrum with a dead parameter and corrupt exposures, in four pictures.

120 exposures of one spectrum show four emission lines at known wavelengths, two of
them blended, on a sloping background. The last line lies beyond the edge of the
detector, so no datum depends on its flux. Two of the exposures are spoilt and contain
NaN.

The parameters are whitened by the Fisher matrix of the good exposures. The dead flux
is a null direction without a gradient, so it stays at its start. Gradient descent then
fits five exposures a step, and `SkipStep` skips the steps with a spoilt one.

[`vernal.plot`](../api/plot.md) draws

- the loss, with marks below for the skipped steps;
- the parameters at each step, as distances from their final values in standard errors;
- the spectrum of the Fisher matrix, with its null direction;
- the correlations: those of the blended lines, and that of the slope of the background
  with its level at wavelength zero.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import vernal as vn
import vernal.plot

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
LINES = jnp.array([640.0, 652.0, 653.0, 720.0])  # nanometres
NOISE, SPOILT, STEPS = 45.0, (7, 41), 400


class Spectrum(eqx.Module):
    """Lines of one width, shifted together, on a background."""

    flux: jax.Array
    shift: jax.Array
    width: jax.Array
    level: jax.Array
    slope: jax.Array

    def __call__(self, wavelength):
        distance = (wavelength - LINES[:, None] - self.shift) / self.width
        lines = self.flux @ jnp.exp(-0.5 * distance**2)
        return lines + self.level + self.slope * wavelength


class SpectrumFit(vn.Trainer):
    def residuals(self, model, batch):
        wavelength, counts = batch
        return (jax.vmap(model)(wavelength) - counts) / NOISE


def observe(truth):
    """Returns exposures with their wavelengths; some of them are spoilt."""
    wavelength = jnp.tile(jnp.linspace(630.0, 670.0, 200), (120, 1))
    noise = NOISE * jax.random.normal(jax.random.key(0), wavelength.shape)
    counts = jax.vmap(truth)(wavelength) + noise
    return wavelength, counts.at[np.array(SPOILT), 50].set(jnp.nan)


def main(output):
    values = jnp.array([900.0, 700.0, 400.0, 500.0]), 0.02, 0.8, 300.0, -0.25
    truth = Spectrum(*map(jnp.asarray, values))
    wavelength, counts = observe(truth)
    good = jnp.isfinite(counts).all(axis=1)
    start = eqx.tree_at(
        lambda model: (model.flux, model.shift, model.slope),
        truth,
        (0.5 * truth.flux, jnp.asarray(0.0), jnp.asarray(-0.3)),
    )

    kept = wavelength[good], counts[good]
    descent = optax.sgd(optax.cosine_decay_schedule(1.0, STEPS))
    trainer = SpectrumFit(start, nan_policy=vn.SkipStep())
    trainer = trainer.whiten(kept, optimiser=descent)
    few = vn.Minibatches((wavelength, counts), 5, key=jax.random.key(1))
    names = vn.paths(trainer.params)
    result = trainer.fit(few, STEPS, record=names, progress=False)
    trainer, projector = result.trainer, result.trainer.projector
    errors = trainer.standard_errors(kept)

    skipped = trainer.nan_report()["loss"].total
    print(f"{skipped} of {STEPS} steps were skipped.")
    (null,) = projector.null_space()
    print(f"Not constrained: {', '.join(null)}.")
    print(trainer.table(kept))
    assert skipped == np.count_nonzero(np.isnan(result.history.loss)) > 0
    assert list(null) == ["flux[3]"]
    assert np.isinf(errors.flux[3])
    pulls = jax.tree.map(
        lambda x, y, error: (x - y) / error, result.model, truth, errors
    )
    assert all(jnp.all(abs(pull) < 4) for pull in jax.tree.leaves(pulls))
    assert jnp.isclose(trainer.model.flux[3], start.flux[3])
    covariance = projector.covariance()
    blend = covariance[1, 2] / jnp.sqrt(covariance[1, 1] * covariance[2, 2])
    line = covariance[6, 7] / jnp.sqrt(covariance[6, 6] * covariance[7, 7])
    assert blend < -0.5, blend
    assert line < -0.99, line
    draw(result, errors, output)


def draw(result, errors, output):
    """The four pictures of `vernal.plot`."""
    plt.style.use(HERE / "style.mplstyle")
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.6))
    vernal.plot.history(result, ax=axes[0, 0]).set_title("Loss")
    vernal.plot.trajectories(result, errors=errors, ax=axes[0, 1])
    axes[0, 1].set_title("Parameters")
    projector = result.trainer.projector
    vernal.plot.spectrum(projector, ax=axes[1, 0]).set_title("Spectrum")
    vernal.plot.correlation(projector, ax=axes[1, 1]).set_title("Correlation")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "pictures.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
