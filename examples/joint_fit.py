"""A joint fit: three spectra, bounds, a tie, a prior, and what to report.

Three exposures of one galaxy show the line of hydrogen at 656.3 nm and one of nitrogen
beside it. The exposures share the redshift and the width of the lines. Each has its own
background and its own fluxes, which cannot be negative: in the third exposure the best
flux of nitrogen is zero, its bound. The two wavelengths have a known ratio (a tie), and
a lamp has given the width to 10 % (a prior).

lmfit fits the same, with the parameter at the bound left out, which its transformation
would never reach.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lmfit
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import vernal as vn
import vernal.plot

jax.config.update("jax_enable_x64", True)
plt.style.use(Path(__file__).parent / "style.mplstyle")
RATIO = 658.346 / 656.281  # of the wavelengths of [N II] and of hydrogen


class Galaxy(eqx.Module):
    hydrogen: jax.Array
    nitrogen: jax.Array
    width: jax.Array
    exposures: list

    def __call__(self, x, exposure):
        peak = lambda place: jnp.exp(-0.5 * ((x - place) / self.width) ** 2)
        lines = exposure["h"] * peak(self.hydrogen) + exposure["n"] * peak(
            self.nitrogen
        )
        return exposure["background"] + lines


def galaxy(place, width, *exposures):
    rows = [
        dict(zip(("background", "h", "n"), map(jnp.array, e), strict=True))
        for e in exposures
    ]
    return Galaxy(jnp.array(place), jnp.array(RATIO * place), jnp.array(width), rows)


class JointFit(vn.Trainer):
    def residuals(self, model, batch):
        pairs = zip(model.exposures, batch, strict=True)
        return [(model(x, own) - y) / sigma for own, (x, y, sigma) in pairs]


# What is observed: another grid and another noise for each exposure.
TRUTH = galaxy(660.0, 0.42, (1.0, 8.0, 3.0), (1.4, 6.0, 2.2), (0.7, 2.0, 0.0))
random = np.random.default_rng(9)
data = []
for count, sigma, own in zip(
    (120, 90, 60), (0.25, 0.3, 0.35), TRUTH.exposures, strict=True
):
    x = np.linspace(656.0, 666.0, count)
    y = TRUTH(x, own) + sigma * random.normal(size=count)
    data.append((jnp.array(x), jnp.array(y), sigma))

# The fit.
trainer = JointFit(
    galaxy(659.5, 0.6, *[(0.5, 3.0, 1.0)] * 3),
    bounds={("**.h", "**.n"): (0, None), "width": (0.01, None)},
    ties={"nitrogen": lambda model: RATIO * model.hydrogen},
    priors={"width": vn.Normal(0.4, 0.04)},
)
solver = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
result = trainer.whiten(data).solve(solver, data)
report = result.report(data)
print(report)

fluxes = lambda model: model.exposures[0]["n"] / model.exposures[0]["h"]
ratio, error = result.trainer.propagate(fluxes, data)
print(f"\n[N II] / H in the first exposure: {ratio:.4f} ± {error:.4f}")


def by_lmfit():
    """Fits the same with lmfit; the prior is one more residual."""
    known = lmfit.create_params(place=659.5, width={"value": 0.6, "min": 0.01})
    for i in range(3):
        known.add(f"background{i}", 0.5)
        known.add(f"h{i}", 3.0, min=0)
        known.add(f"n{i}", 1.0 if i < 2 else 0.0, min=0, vary=i < 2)

    def residuals(p):
        rows = [
            (p[f"background{i}"].value, p[f"h{i}"].value, p[f"n{i}"].value)
            for i in range(3)
        ]
        model = galaxy(p["place"].value, p["width"].value, *rows)
        vectors = trainer.residuals(model, data)
        return np.concatenate([*vectors, [(p["width"].value - 0.4) / 0.04]])

    options = {"scale_covar": False, "xtol": 1e-12, "ftol": 1e-12}
    found: Any = lmfit.minimize(residuals, known, **options)
    return found.params


known = by_lmfit()
pairs = {"hydrogen": "place", "width": "width"} | {
    f"exposures.{i}.{name}": f"{name}{i}"
    for i in range(3)
    for name in ("background", "h", "n")
}
for own, other in pairs.items():
    row = report[own]
    if own == "exposures.2.n":
        assert row.value == 0
        assert row.status == "at its bound (0)"
        continue
    np.testing.assert_allclose(row.value, known[other].value, rtol=1e-5)
    np.testing.assert_allclose(row.error, known[other].stderr, rtol=1e-3)
assert report["nitrogen"].status == "tied to a function"
np.testing.assert_allclose(report["nitrogen"].error, RATIO * report["hydrogen"].error)
assert result.stop_reason is vn.StopReason.CONVERGED
assert abs(ratio - 3 / 8) < 3 * error
assert report.p_value > 0.01

fine = jnp.linspace(656.0, 666.0, 400)
figure, axes = plt.subplot_mosaic("012;rrr", figsize=(9, 5), height_ratios=(3, 2))
for i, (x, y, sigma) in enumerate(data):
    ax = axes[str(i)]
    ax.sharey(axes["0"])
    ax.errorbar(x, y, sigma, fmt=".", color="0.6", ms=3, lw=0.5)
    curve = lambda model, i=i: model(fine, model.exposures[i])
    with warnings.catch_warnings():
        # One flux is held at zero: that band is of all the others.
        warnings.filterwarnings("ignore", "`propagate`: `fn` depends on")
        vernal.plot.band(result.trainer, curve, data, fine, ax=ax)
    ax.set(title=f"exposure {i + 1}")
axes["0"].set_ylabel("flux")
places = [x for x, _, _ in data]
vernal.plot.residuals(result.trainer, data, places, ax=axes["r"])
axes["r"].set_xlabel("wavelength (nm)")
parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--output", default="output", help="folder for the picture")
output = Path(parser.parse_args().output)
output.mkdir(parents=True, exist_ok=True)
figure.savefig(output / "joint_fit.png")
