"""El Niño in 168 months of air pressure.

The trade winds follow the difference of air pressure between Easter Island and
Darwin. The model has a level, an annual cycle and two slower cycles whose periods are
unknown.

Its nine parameters, some of them strongly correlated, are whitened by their Fisher
matrix. In the whitened space a learning rate is a distance in error bars, the same for
a level as for a period. There Adam goes from NIST's first start to NIST's certified
values. The projector that whitens also holds the standard errors.
"""

import argparse
import functools
import operator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import vernal as vn

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
STEPS, RATES = 300, (0.5, 0.05)


class Cycle(eqx.Module):
    """One oscillation. A period that is a Python float is not fitted."""

    period: jax.Array | float
    cos: jax.Array
    sin: jax.Array

    def __call__(self, month):
        phase = 2 * jnp.pi * month / self.period
        return self.cos * jnp.cos(phase) + self.sin * jnp.sin(phase)


class Pressure(eqx.Module):
    """The pressure difference: a level and three cycles."""

    level: jax.Array
    annual: Cycle
    el_nino: Cycle
    southern: Cycle

    def __call__(self, month):
        slow = self.el_nino(month) + self.southern(month)
        return self.level + self.annual(month) + slow


class PressureFit(vn.Trainer):
    def residuals(self, model, batch):
        month, pressure = batch
        return model(month) - pressure


def digits(value, certified):
    return -np.log10(np.abs(value - certified) / np.abs(certified))


def main(output):
    batch = jnp.asarray(np.loadtxt(HERE / "data/enso.csv", delimiter=",")).T
    nist = np.loadtxt(HERE / "data/enso_nist.csv", delimiter=",", usecols=(1, 3, 4)).T
    first, certified, deviations = jnp.asarray(nist)
    start = Pressure(
        first[0], Cycle(12.0, *first[1:3]), Cycle(*first[3:6]), Cycle(*first[6:])
    )
    trainer, histories = PressureFit(start), []
    paths = vn.paths(trainer.params)

    for rate in RATES:  # whiten and fit, twice
        adam = optax.adam(optax.cosine_decay_schedule(rate, STEPS))
        trainer = trainer.whiten(batch, optimiser=adam)
        result = trainer.fit(batch, STEPS, record=paths)
        trainer = result.trainer
        histories.append(result.history)
    history = functools.reduce(operator.add, histories)

    # The errors of the data are not known: their scatter gives the scale.
    report = trainer.report(batch, scale_errors=True)
    errors = np.array([report[path].error for path in paths])
    fitted = np.array([report[path].value for path in paths])
    correct, correct_errors = digits(fitted, certified), digits(errors, deviations)

    print("                                       correct digits")
    print("parameter            value      error    value  error")
    for row in zip(paths, fitted, errors, correct, correct_errors, strict=True):
        print("{:15}{:11.6f}{:11.6f}{:9.1f}{:7.1f}".format(*row))
    assert correct.min() >= 4, "a parameter has fewer than 4 certified digits"
    assert correct_errors.min() >= 3, "an error has fewer than 3 certified digits"

    distances = {
        path: (history[path] - value) / error
        for path, value, error in zip(paths, certified, deviations, strict=True)
    }
    draw(batch, trainer.model, history.loss, distances, output)


def draw(batch, model, losses, distances, output):
    """Data and fit above; below, the loss and the parameters at each step."""
    plt.style.use(HERE / "style.mplstyle")
    figure, axes = plt.subplot_mosaic("AA;BC", figsize=(9, 6.4))
    data, loss, parameters = axes["A"], axes["B"], axes["C"]
    month = jnp.linspace(1, 168, 1000)
    slow = model.level + model.el_nino(month) + model.southern(month)
    data.plot(*batch, "o", ms=3.5, color="0.6", label="measured")
    data.plot(month, model(month), label="fitted")
    data.plot(month, slow, lw=2, label="without the annual cycle")
    data.set(xlabel="month", ylim=(-0.5, 21), xlim=(-1, 170))
    data.set_title("Air pressure, Easter Island less Darwin")
    data.legend(ncols=3, loc="upper center")

    loss.semilogy(np.maximum(losses - losses.min(), 1e-12))
    loss.set(xlabel="step", title="Loss above its minimum")
    loss.set_xticks(range(0, len(losses) + 1, STEPS))

    for path, distance in distances.items():
        parameters.plot(distance, label=path)
    parameters.set_yscale("symlog", linthresh=0.1)
    parameters.set(xlabel="step", title="Distance from NIST's values, in error bars")
    parameters.set_xticks(range(0, len(losses) + 1, STEPS))
    parameters.legend(ncols=2)
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "enso.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
