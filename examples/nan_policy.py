"""A NaN gradient behind a finite loss, and a policy of your own.

A pendulum swings at the frequency `sqrt(stiffness - damping**2)`. If it is overdamped,
the root would be imaginary, so the model takes the root of a `maximum` with zero. The
loss then stays finite, but the derivative of the root at zero does not: a step that is
too long puts NaN into two of the three gradients.

The default policy ends the fit there, and the report says where and when. `ZeroNans`
continues with the one parameter that is left, and a warning says so. `Retreat`, which
is defined here, undoes the last step, halves the step size, and finds the minimum.
"""

import argparse
import textwrap
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import vernal as vn

HERE = Path(__file__).parent
TRUTH, NOISE = {"amplitude": 2.0, "damping": 0.25, "stiffness": 1.5}, 0.05


class Pendulum(eqx.Module):
    amplitude: jax.Array
    damping: jax.Array
    stiffness: jax.Array

    def __call__(self, time):
        frequency = jnp.sqrt(jnp.maximum(self.stiffness - self.damping**2, 0))
        decay = jnp.exp(-self.damping * time)
        return self.amplitude * decay * jnp.cos(frequency * time)


class PendulumFit(vn.Trainer):
    def loss(self, model, batch):
        time, angle = batch
        return jnp.mean((model(time) - angle) ** 2) / 2


class Retreat(vn.NanPolicy):
    """Undoes the step that led to a non-finite value, then halves the step size.

    The last gradient with the opposite sign undoes a step of plain gradient descent.
    """

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params), jnp.asarray(1.0)

    def apply(self, loss, grads, state):
        last, scale = state
        values = jax.tree.leaves((loss, grads))
        finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in values]))

        def choose(grad, last):
            return jnp.where(finite, scale * grad, -last)

        grads = jax.tree.map(choose, grads, last)
        last = jax.tree.map(lambda grad: jnp.where(finite, grad, 0), grads)
        scale = jnp.where(finite, scale, scale / 2)
        yes, no = jnp.asarray(True), jnp.asarray(False)
        return grads, vn.Verdict(accept=yes, stop=no), (last, scale)


def main(output):
    time = jnp.linspace(0, 10, 80)
    noise = NOISE * jax.random.normal(jax.random.key(1), time.shape)
    angle = Pendulum(**{k: jnp.asarray(v) for k, v in TRUTH.items()})(time) + noise
    start = Pendulum(jnp.asarray(1.0), jnp.asarray(0.6), jnp.asarray(0.8))
    rates = {"amplitude": optax.sgd(1.0), ("damping", "stiffness"): optax.sgd(2.0)}

    results, warned = {}, []
    for policy in vn.StopFit(), vn.ZeroNans(), Retreat():
        trainer = PendulumFit(start, vn.ParamOptimiser(rates), nan_policy=policy)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = trainer.fit((time, angle), 600, record=vn.paths(start))
        results[type(policy).__name__] = result
        print(f"\n{type(policy).__name__}: {result.stop_reason}")
        for warning in caught:
            warned.append(type(policy).__name__)
            print(textwrap.indent(textwrap.fill(str(warning.message), 78), "  "))
        steps = len(result.history.loss)
        print(f"  {steps} steps, best loss {result.trainer.best_loss:.5f}")
        for path, count in result.trainer.nan_report().items():
            if count.total:
                print(f"  {path}: {count.total} NaN, first at step {count.first_step}")

    assert warned == ["ZeroNans"]
    report = results["StopFit"].trainer.nan_report()
    assert report["loss"].total == report["amplitude"].total == 0
    assert report["damping"].total == report["stiffness"].total == 1
    assert results["ZeroNans"].trainer.best_loss > 10 * NOISE**2
    found = results["Retreat"].model
    for name, value in TRUTH.items():
        assert abs(getattr(found, name) - value) < 0.05, name

    draw(time, angle, results, output)


def draw(time, angle, results, output):
    """The best fits, and the parameters at each step."""
    plt.style.use(HERE / "style.mplstyle")
    figure, (fits, plane) = plt.subplots(1, 2, figsize=(9, 3.8))
    fits.plot(time, angle, "o", ms=3.5, color="0.6", label="measured")
    for style, (name, result) in zip(("-", ":", "-"), results.items(), strict=True):
        fits.plot(time, result.best(time), style, lw=2, label=name)
    fits.set(title="Best fit under each policy", xlabel="time", ylabel="angle")
    fits.legend()

    damping = np.linspace(0, 2)
    plane.fill_between(damping, damping**2, color="0.92", zorder=0)
    plane.fill_between((2, 5), (4, 4), color="0.92", zorder=0)
    plane.annotate("overdamped: NaN", (2.2, 0.8), color="0.4")
    history = results["Retreat"].history
    plane.plot(history["damping"], history["stiffness"], "C2.-", label="Retreat")
    stop = results["StopFit"].model
    plane.plot(stop.damping, stop.stiffness, "C0X", ms=8, label="StopFit ends here")
    plane.plot(TRUTH["damping"], TRUTH["stiffness"], "k*", ms=9, label="truth")
    plane.set(xlim=(-0.1, 4.5), ylim=(0.6, 2.1), xlabel="damping", ylabel="stiffness")
    plane.set_title("Parameters at each step")
    plane.legend(loc="upper right", ncols=3, columnspacing=1)
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "nan_policy.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
