"""Samples of a posterior, in a space in which it is round.

The model is a spectral line on a slope: five parameters, whose units differ by twelve
orders of magnitude. Whitened at the best fit, the posterior is nearly a ball of radius
one, so a sampler needs no mass matrix, and no warm-up to find one.

`trainer.objective` returns the negative log-likelihood in that space as a pure
function. NumPyro and BlackJAX sample it as it is, and `trainer.params_at` maps the
samples back. If only the slope and the level are fitted, the posterior is a Gaussian
that is known exactly. The script compares both samplers with it, and then with the
Fisher errors of the whole model.
"""

import argparse
from pathlib import Path
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
from numpyro.infer import MCMC, NUTS

import vernal as vn

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
SAMPLES, WARM_UP, STEP_SIZE = 2_000, 50, 0.8


class Spectrum(eqx.Module):
    """A line on a slope, in watts per metre of wavelength."""

    level: jax.Array
    slope: jax.Array
    power: jax.Array
    centre: jax.Array  # metres
    width: jax.Array  # metres

    def __call__(self, wavelength):
        line = jnp.exp(-0.5 * ((wavelength - self.centre) / self.width) ** 2)
        return self.level + self.slope * (wavelength - 5e-7) + self.power * line


class Fit(vn.Trainer):
    def residuals(self, model, batch):
        wavelength, measured, sigma = batch
        return (model(wavelength) - measured) / sigma


def sample_numpyro(potential, start):
    """Samples with NumPyro's No-U-Turn sampler, without any adaptation."""
    kernel = NUTS(
        potential_fn=potential,
        step_size=STEP_SIZE,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    mcmc = MCMC(kernel, num_warmup=WARM_UP, num_samples=SAMPLES, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params=start)
    return mcmc.get_samples()


def sample_blackjax(potential, start):
    """Samples with BlackJAX's No-U-Turn sampler, in a scan."""
    # BlackJAX's types do not know the position of a state.
    nuts: Any = blackjax.nuts(
        lambda latent: -potential(latent),
        step_size=STEP_SIZE,
        inverse_mass_matrix=jnp.ones(start.size),
    )

    @jax.jit
    def run(keys):
        def step(state, key):
            state, _ = nuts.step(key, state)
            return state, state.position

        return jax.lax.scan(step, nuts.init(start), keys)[1]

    return run(jax.random.split(jax.random.key(1), WARM_UP + SAMPLES))[WARM_UP:]


SAMPLERS = {"NumPyro": sample_numpyro, "BlackJAX": sample_blackjax}


def posterior(trainer, batch):
    """Fits, whitens at the best fit, and samples with both samplers."""
    solver = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    trainer = trainer.whiten(batch).solve(solver, batch).trainer.whiten(batch)
    potential, start = trainer.objective(batch)
    params_at = jax.vmap(trainer.params_at)
    draws = {
        name: jnp.stack(jax.tree.leaves(params_at(sample(potential, start))), axis=1)
        for name, sample in SAMPLERS.items()
    }
    return trainer, draws


def main(output):
    truth = Spectrum(*map(jnp.asarray, (3.0, 2e6, 5.0, 5.02e-7, 2e-9)))
    wavelength = jnp.linspace(4.9e-7, 5.1e-7, 120)
    sigma = jnp.full(wavelength.shape, 0.4)
    noise = sigma * jax.random.normal(jax.random.key(3), sigma.shape)
    batch = wavelength, truth(wavelength) + noise, sigma
    start = Spectrum(*map(jnp.asarray, (2.0, 0.0, 4.0, 5.0e-7, 3e-9)))

    # With slope and level alone the model is linear, and its posterior Gaussian.
    linear, draws = posterior(Fit(truth, train=("level", "slope")), batch)
    covariance = jnp.linalg.inv(linear.fisher(batch))
    mean = jnp.stack([linear.model.level, linear.model.slope])
    errors = jnp.sqrt(jnp.diag(covariance))
    for name, drawn in draws.items():
        off = jnp.abs(drawn.mean(axis=0) - mean) / errors
        excess = (jnp.cov(drawn.T) - covariance) / jnp.outer(errors, errors)
        assert off.max() < 0.1, f"{name}: a mean is wrong"
        assert jnp.abs(excess).max() < 0.15, f"{name}: the covariance is wrong"

    trainer, draws = posterior(Fit(start), batch)
    paths = vn.paths(trainer.params)
    fitted = np.array(jax.tree.leaves(trainer.params))
    errors = np.array(jax.tree.leaves(trainer.standard_errors(batch)))
    print("             best fit  Fisher error", *(f"{name:>10}" for name in draws))
    spreads = {name: np.array(drawn.std(axis=0)) for name, drawn in draws.items()}
    for index, path in enumerate(paths):
        cells = (f"{spread[index]:11.2e}" for spread in spreads.values())
        print(f"{path:9}{fitted[index]:13.4e}{errors[index]:14.2e}", *cells, sep="")
    for name, spread in spreads.items():
        assert np.abs(spread / errors - 1).max() < 0.15, f"{name}: an error is wrong"
    draw(paths, fitted, errors, draws, trainer.projector.covariance(), output)


def draw(paths, fitted, errors, draws, covariance, output):
    """Samples of each pair of parameters, with the ellipse of two standard errors."""
    plt.style.use(HERE / "style.mplstyle")
    size = len(paths)
    figure, axes = plt.subplots(size, size, figsize=(9, 9), sharex="col")
    angle = np.linspace(0, 2 * np.pi, 200)
    correlation = np.asarray(covariance) / np.outer(errors, errors)
    scaled = (np.asarray(draws["NumPyro"]) - fitted) / errors
    for row in range(size):
        for column in range(size):
            panel = axes[row, column]
            panel.set_axis_off() if column > row else None
            if row == column:
                for name, drawn in draws.items():
                    own = (np.asarray(drawn)[:, row] - fitted[row]) / errors[row]
                    panel.hist(own, 30, density=True, histtype="step", label=name)
                panel.set_yticks([])
                panel.set_title(paths[row])
            elif column < row:
                panel.plot(scaled[:, column], scaled[:, row], ".", ms=1, alpha=0.3)
                pair = np.ix_([column, row], [column, row])
                ellipse = 2 * np.linalg.cholesky(correlation[pair])
                panel.plot(*ellipse @ [np.cos(angle), np.sin(angle)], color="C1")
                panel.set(xlim=(-4, 4), ylim=(-4, 4))
            if row == size - 1:
                panel.set_xlabel(paths[column])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = "Samples, and two Fisher errors, in error bars"
    figure.legend(handles, labels, title=title, loc=(0.55, 0.85))
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "posterior.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
