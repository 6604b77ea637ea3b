"""Many starts and many data sets, each in one compiled program.

*Starts.* How far from the answer may a fit start? For each of NIST's nine curves, 64
starts are drawn around NIST's first one: each parameter is multiplied by a factor
between 1/2 and 2. One call solves from all 64 by Levenberg–Marquardt, in at most 200
steps. The script counts those that reach the certified answer to six digits. (In the
nearly flat valley of MGH10 none does: that takes thousands of steps.)

*Data sets.* 1,000 stars have a planet each, and the light curve of a star dims as its
planet passes. Each star has six parameters (depth, middle and duration of the dip,
steepness of its edges, brightness and its drift) and 100 points, at times that all
stars share, with a known error bar. A few cameras failed: all of their points are NaN.
One call solves for all stars. It warns of the failed ones, which do not harm the
others.
"""

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import vernal as vn
from nist import FORMULAS, Curve, Fit, digits

HERE = Path(__file__).parent
STARTS, STARS, POINTS, FAILED = 64, 1_000, 100, (17, 404, 865)
LM = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)


def solve_from_many_starts(name, data):
    """Returns the number of correct digits from each start."""
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    first, certified = jnp.asarray(data["starts"][0]), np.asarray(data["certified"])
    factors = np.random.default_rng(0).uniform(-1, 1, (STARTS, len(first)))
    starts = first * 2.0**factors
    trainers = [Fit(Curve(start, FORMULAS[name])) for start in starts]
    result = vn.fit_many(trainers, (x, y), 200, solver=LM)
    return np.array([digits(b, certified) for b in result.trainers.params.b])


class Transit(eqx.Module):
    depth: jax.Array
    middle: jax.Array
    duration: jax.Array
    edge: jax.Array
    flux: jax.Array
    drift: jax.Array

    def __call__(self, hours):
        distance = jnp.abs(hours - self.middle) - self.duration / 2
        dip = self.depth * jax.nn.sigmoid(-distance / self.edge)
        return (self.flux + self.drift * hours) * (1 - dip)


class TransitFit(vn.Trainer):
    def residuals(self, star, batch):
        hours, flux, error = batch
        return (star(hours) - flux) / error


def stars():
    """Returns the true parameters of all stars, and their light curves."""
    rng = np.random.default_rng(1)
    low = np.array([0.01, -0.5, 2.0, 0.15, 0.9, -0.002])
    high = np.array([0.03, 0.5, 4.0, 0.30, 1.1, 0.002])
    truth = rng.uniform(low, high, (STARS, 6))
    hours, error = jnp.linspace(-4, 4, POINTS), rng.uniform(5e-4, 2e-3, STARS)
    flux = jax.vmap(lambda row: Transit(*row)(hours))(jnp.asarray(truth))
    flux = np.array(flux) + error[:, None] * rng.normal(size=(STARS, POINTS))
    flux[list(FAILED)] = np.nan
    return truth, (hours, flux, error)


def main(output):
    print(f"Starts that reach six certified digits, of {STARTS}:")
    reached = {}
    sets = json.loads((HERE / "data" / "nist.json").read_text())
    for name in FORMULAS:
        reached[name] = solve_from_many_starts(name, sets[name])
        print(f"  {name:8} {np.sum(reached[name] >= 6):3} of {STARTS}")
    lost = [name for name, found in reached.items() if not (found >= 6).any()]
    assert lost == ["MGH10"]

    truth, data = stars()
    guess = Transit(*map(jnp.asarray, (0.02, 0.0, 3.0, 0.2, 1.0, 0.0)))
    trainers = [TransitFit(guess)] * STARS
    axes = (None, 0, 0)
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = vn.fit_many(trainers, data, 100, data_axis=axes, solver=LM)
    (warning,) = caught
    took = time.perf_counter() - began
    reasons = Counter(map(str, result.stop_reasons))
    print(f"\n{STARS} light curves, {took:.0f} s with compilation:")
    for reason, count in reasons.items():
        print(f"  {count:4} {reason}")
    print(f"  Warning: {warning.message}")
    assert result.failed == FAILED
    assert all(result.nan_report(index)["loss"].total for index in FAILED)

    found = np.stack(jax.tree.leaves(result.trainers.params), axis=1)
    whole = np.setdiff1d(np.arange(STARS), result.failed)
    reports = [result.report(index, data) for index in whole[:100]]
    chi = [report.reduced_chi_squared for report in reports]
    print(f"  chi-squared per degree of freedom: {np.median(chi):.2f} (of 100 stars)")
    assert 0.95 < np.median(chi) < 1.05
    off = np.abs(found - truth)[whole, 0] / truth[whole, 0]
    print(f"  error of the depth: {100 * np.median(off):.1f} % (median)")
    assert np.median(off) < 0.05
    draw(reached, truth, found, whole, data, output)


def draw(reached, truth, found, whole, data, output):
    """The correct digits from all starts; the fitted depths beside the true ones."""
    plt.style.use(HERE / "style.mplstyle")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9))
    rng = np.random.default_rng(2)
    for row, found_digits in enumerate(reached.values()):
        places = row + 0.28 * rng.uniform(-1, 1, STARTS)
        good = found_digits >= 6
        for mask, color in ((good, "C0"), (~good, "C3")):
            left.plot(
                found_digits[mask], places[mask], "o", ms=3, alpha=0.5, color=color
            )
        label = f"{np.sum(good)} of {STARTS}"
        left.annotate(label, (11.4, row), va="center", fontsize=8)
    left.axvline(6, color="0.7", lw=1, zorder=0)
    left.set_yticks(range(len(reached)), list(reached))
    left.set(title="64 starts of each curve", xlabel="correct digits", xlim=(-0.5, 14))
    left.set_xticks(range(0, 12, 2))
    left.invert_yaxis()

    error = data[2][whole]
    dots = right.scatter(
        100 * truth[whole, 0], 100 * found[whole, 0], s=5, c=100 * error, cmap="viridis"
    )
    right.plot([1, 3], [1, 3], color="0.5", lw=1, zorder=0)
    right.set(title=f"{len(whole)} planets", xlabel="true depth, %")
    right.set(ylabel="fitted depth, %", ylim=(0.8, 3.2))
    figure.colorbar(dots, label="error bar of a point, %")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "many_starts.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
