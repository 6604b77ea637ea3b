"""Certified answers: NIST's reference data.

NIST certifies the parameters of these nine curves to eleven digits. Each curve is
fitted from two starts, near and far.

- *LM*: Levenberg–Marquardt of Optimistix, through `solve`, in the parameters
  themselves, with up to 5,000 steps.
- *BFGS, whitened*: at most 1,000 steps, begun in the space that the Fisher matrix
  whitens at the start; `solve` whitens it again where it has gone stale.
- The solvers of Optimistix called directly, with the same tolerances and limits of
  steps, and those of SciPy, with the tightest tolerances that they accept and
  derivatives from JAX.

Each cell has the number of correct digits of the worst parameter, and the number of
steps (for SciPy's `lm`, of evaluations). Six digits count as an answer. *errors* has
the correct digits of the standard errors, and *edm* how far the loss could still
fall, as a fraction of the scatter. (From its far start MGH10 is a curved, nearly flat
valley: Levenberg–Marquardt reaches the answer after thousands of steps.)
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import scipy.optimize
from jax.numpy import cos, exp, sin

import vernal as vn

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
TOLERANCE, STEPS, BFGS_STEPS = 1e-12, 5_000, 1_000
LM = optx.LevenbergMarquardt(TOLERANCE, TOLERANCE)
BFGS = optx.BFGS(TOLERANCE, TOLERANCE)


def saturation(b, x):
    return b[0] * (1 - exp(-b[1] * x))


def cubics(b, x):
    return jnp.polyval(b[3::-1], x) / (1 + x * jnp.polyval(b[:3:-1], x))


def cycle(cosine, sine, period, x):
    phase = 2 * jnp.pi * x / period
    return cosine * cos(phase) + sine * sin(phase)


def peak(x, height, place, width):
    return height * exp(-(((x - place) / width) ** 2))


FORMULAS = {
    "Misra1a": saturation,
    "Chwirut2": lambda b, x: exp(-b[0] * x) / (b[1] + b[2] * x),
    "Gauss1": lambda b, x: b[0] * exp(-b[1] * x) + peak(x, *b[2:5]) + peak(x, *b[5:]),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Hahn1": cubics,
    "ENSO": lambda b, x: (
        b[0]
        + cycle(b[1], b[2], 12, x)
        + cycle(b[4], b[5], b[3], x)
        + cycle(b[7], b[8], b[6], x)
    ),
    "Thurber": cubics,
    "MGH10": lambda b, x: b[0] * exp(b[1] / (x + b[2])),
    "BoxBOD": saturation,
}


class Curve(eqx.Module):
    """A formula and its parameters."""

    b: jax.Array
    formula: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.formula(self.b, x)


class Fit(vn.Trainer):
    def residuals(self, curve, batch):
        x, y = batch
        return curve(x) - y


def digits(values, certified):
    error = np.abs(np.asarray(values) / certified - 1)
    return np.clip(-np.log10(np.maximum(error, 1e-11)), 0, None).min()


def levenberg_marquardt(trainer, batch):
    return trainer.solve(LM, batch, max_steps=STEPS)


def whitened_bfgs(trainer, batch):
    result = trainer.whiten(batch).solve(BFGS, batch, max_steps=BFGS_STEPS)
    return result.trainer, len(result.history)


def others(name, x, y):
    """Returns the solvers of other libraries, as functions of a start."""

    def residuals(b, _=None):
        return FORMULAS[name](b, x) - y

    def loss(b, _=None):
        return 0.5 * jnp.sum(residuals(b) ** 2)

    def optimistix_lm(start):
        options = {"max_steps": STEPS, "throw": False}
        found = optx.least_squares(residuals, LM, start, **options)
        return found.value, int(found.stats["num_steps"])

    def optimistix_bfgs(start):
        options = {"max_steps": BFGS_STEPS, "throw": False}
        found = optx.minimise(loss, BFGS, start, **options)
        return found.value, int(found.stats["num_steps"])

    # SciPy's types do not allow a function for `jac`.
    jacobian: Any = jax.jit(jax.jacfwd(residuals))
    vector, value_and_gradient = jax.jit(residuals), jax.jit(jax.value_and_grad(loss))

    def scipy_lm(start):
        tight = dict.fromkeys(("xtol", "ftol", "gtol"), np.finfo(float).eps)
        found = scipy.optimize.least_squares(
            vector, start, jacobian, method="lm", max_nfev=STEPS, **tight
        )
        return found.x, found.nfev

    def scipy_bfgs(start):
        options = {"gtol": 0.0, "maxiter": BFGS_STEPS}
        found = scipy.optimize.minimize(
            value_and_gradient, start, jac=True, options=options
        )
        return found.x, found.nit

    return {
        "Optimistix LM": optimistix_lm,
        "Optimistix BFGS": optimistix_bfgs,
        "SciPy lm": scipy_lm,
        "SciPy BFGS": scipy_bfgs,
    }


def main(output):
    sets = json.loads((HERE / "data/nist.json").read_text())
    rows, reached, solvers = [], {}, {}
    for name, formula in FORMULAS.items():
        given = sets[name]
        x, y, certified = (jnp.asarray(given[key]) for key in ("x", "y", "certified"))
        solvers = others(name, x, y)
        for number, start in enumerate(given["starts"], 1):
            start = jnp.asarray(start)
            result = levenberg_marquardt(Fit(Curve(start, formula)), (x, y))
            assert result.stop_reason is vn.StopReason.CONVERGED, (
                f"{name}: not converged"
            )
            trainer = result.trainer
            # The errors of the data are not known: their scatter gives the scale.
            report = result.report((x, y), scale_errors=True)
            errors = np.array([row.error for row in report.parameters])
            found = {"LM": (trainer.model.b, len(result.history))}
            edm = f"{result.edm / report.error_scale**2:.0e}"
            trainer, steps = whitened_bfgs(Fit(Curve(start, formula)), (x, y))
            found["BFGS, whitened"] = trainer.best.b, steps
            with warnings.catch_warnings():  # from SciPy's trial steps
                warnings.simplefilter("ignore", RuntimeWarning)
                found |= {label: solve(start) for label, solve in solvers.items()}

            correct = {k: digits(values, certified) for k, (values, _) in found.items()}
            correct["errors"] = digits(errors, np.asarray(given["errors"]))
            for label, value in correct.items():
                reached.setdefault(label, []).append(value)
            cells = [f"{correct[k]:.1f} ({steps:,})" for k, (_, steps) in found.items()]
            cells[1:1] = f"{correct['errors']:.1f}", edm
            rows.append([f"{name}, {number}", *cells])

    labels = ["LM", "errors", "BFGS, whitened", *solvers]
    answers = {
        k: sum(v >= (4 if k == "errors" else 6) for v in reached[k]) for k in reached
    }
    total = ["**answers**", *(f"**{answers[k]} of {len(rows)}**" for k in labels)]
    titles = ["set, start", *labels]
    for row in (titles, total):
        row.insert(3, "edm" if row is titles else "")
    for row in (titles, ["---"] * len(titles), *rows, total):
        print("|", " | ".join(row), "|")
    assert answers["LM"] == answers["errors"] == 18, "LM misses a certified answer"
    assert answers["BFGS, whitened"] == 18, "whitened BFGS misses a certified answer"
    draw(
        [row[0] for row in rows],
        {k: reached[k] for k in labels if k != "errors"},
        output,
    )


def draw(names, reached, output):
    """The correct digits of every run, a mark for each method."""
    plt.style.use(HERE / "style.mplstyle")
    figure, axes = plt.subplots(figsize=(9, 5.2))
    places = np.arange(len(names))
    for index, (label, values) in enumerate(reached.items()):
        ours = index < 2
        axes.plot(
            places + 0.12 * (index - 2.5),
            values,
            "o" if ours else "x",
            ms=7 if ours else 5,
            label=label,
        )
    axes.axhline(6, color="0.6", lw=1, zorder=0)
    axes.set_xticks(places, names, rotation=60, ha="right")
    axes.set(ylabel="correct digits, worst parameter", ylim=(-0.5, 14))
    axes.set_title("Nine certified problems, two starts each")
    axes.legend(ncols=3, loc="upper center")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "nist.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
