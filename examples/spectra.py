"""500 spectra to one table.

Each spectrum is an emission line on a sloping continuum, with a known error bar. Some
fibers were broken: all of their pixels are NaN.

One call fits all of them by Levenberg–Marquardt, another one computes all standard
errors. The result is a table with a row for each spectrum: values, errors, and why its
fit ended. The broken spectra cost their own rows alone. A warning names them, and they
are listed at the end of the table.
"""

import argparse
import time
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import vernal as vn
import vernal.plot

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
SPECTRA, PIXELS = 500, 80
BROKEN = tuple(range(23, SPECTRA, 50))
LM = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)


class Line(eqx.Module):
    """An emission line: wavelengths in nm, fluxes in units of the continuum."""

    flux: jax.Array
    centre: jax.Array
    width: jax.Array
    level: jax.Array
    slope: jax.Array

    def __call__(self, wavelength):
        offset = (wavelength - self.centre) / self.width
        height = self.flux / (self.width * jnp.sqrt(2 * jnp.pi))
        continuum = self.level + self.slope * (wavelength - 656)
        return continuum + height * jnp.exp(-0.5 * offset**2)


class LineFit(vn.Trainer):
    def residuals(self, line, batch):
        wavelength, flux, error = batch
        return (line(wavelength) - flux) / error


def observe():
    """Returns the true parameters of all lines, and their spectra."""
    rng = np.random.default_rng(0)
    low = np.array([1.0, 655.0, 0.4, 0.8, -0.02])
    high = np.array([4.0, 657.0, 0.8, 1.2, 0.02])
    truth = rng.uniform(low, high, (SPECTRA, 5))
    wavelength = jnp.linspace(651, 661, PIXELS)
    error = rng.uniform(0.05, 0.15, SPECTRA)
    flux = jax.vmap(lambda row: Line(*row)(wavelength))(jnp.asarray(truth))
    flux = np.array(flux) + error[:, None] * rng.normal(size=(SPECTRA, PIXELS))
    flux[list(BROKEN)] = np.nan
    return truth, (wavelength, jnp.asarray(flux), jnp.asarray(error))


def main(output):
    truth, data = observe()
    guess = Line(*map(jnp.asarray, (2.0, 656.0, 0.6, 1.0, 0.0)))
    began = time.perf_counter()
    trainers, axes = [LineFit(guess)] * SPECTRA, (None, 0, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = vn.fit_many(trainers, data, 100, data_axis=axes, solver=LM)
    (warning,) = caught
    table = result.table(data).splitlines()
    took = time.perf_counter() - began
    print("\n".join([*table[:10], "...", *table[-4:]]))
    print(f"\nWarning: {warning.message}")
    print(f"\n{SPECTRA} spectra, {took:.0f} s with compilation")
    assert result.failed == BROKEN

    # As columns, for a file, for pandas or astropy.
    columns = result.to_dict(data)
    good = np.setdiff1d(np.arange(SPECTRA), result.failed)
    names = ("flux", "centre", "width", "level", "slope")
    pulls = {
        name: (columns[name] - true)[good] / columns[f"error[{name}]"][good]
        for name, true in zip(names, truth.T, strict=True)
    }
    for name, pull in pulls.items():
        print(f"  {name:6} is off by {np.std(pull):.2f} of its error (rms)")
        assert 0.9 < np.std(pull) < 1.1

    report = result.report(0, data)
    print(f"\nThe first one:\n{report}")
    assert report.p_value > 1e-3
    draw(result, data, columns, good, pulls, output)


def draw(result, data, columns, good, pulls, output):
    """One spectrum with its band; all fluxes and their errors; the pulls."""
    plt.style.use(HERE / "style.mplstyle")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    wavelength, fluxes, errors = data
    own = wavelength, fluxes[0], errors[0]
    left.errorbar(wavelength, fluxes[0], errors[0], fmt=".", color="0.6", zorder=0)
    fine = jnp.linspace(651, 661, 400)
    trainer = result.trainer(0)
    vernal.plot.band(trainer, lambda line: line(fine), own, fine, errors=2, ax=left)
    left.set(xlabel="wavelength, nm", ylabel="flux", title="One, and twice its error")

    flux, width = columns["flux"][good], columns["width"][good]
    middle.errorbar(
        flux,
        width,
        columns["error[width]"][good],
        columns["error[flux]"][good],
        fmt=".",
        ms=3,
        lw=0.5,
    )
    middle.set(xlabel="flux", ylabel="width, nm", title=f"{len(good)} lines")

    bins = np.linspace(-4, 4, 33)
    right.hist(np.concatenate(list(pulls.values())), bins, density=True, color="0.8")
    right.plot(bins, np.exp(-(bins**2) / 2) / np.sqrt(2 * np.pi))
    right.set(xlabel="(fitted - true) / error", title="All parameters")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "spectra.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
