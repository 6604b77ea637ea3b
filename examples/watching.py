"""A fit that is watched: TensorBoard, and a rate that is a thousand times too high.

A spectral line on a background, one rate for each parameter, and one of them mistyped.
The loss falls all the same, since the other parameters make up for it; but each update
moves the width by more than itself. The ratio of update and parameter shows that at a
glance: about 1e-3 is healthy.

`Scribe` is a callback. After every chunk of steps it writes to TensorBoard what is new:
the loss, the norm of the gradients and the relative update of each rule, the rates, the
number of values that were not finite. `tensorboard --logdir output/watching` shows it.
"""

import argparse
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tensorboardX import SummaryWriter

import vernal as vn

HERE = Path(__file__).parent
RATES = {"centre": 2e-3, "width": 2.0, ("height", "level"): 5e-3}  # width: 2e-3


class Scribe:
    """Writes what a fit records to TensorBoard, as it comes."""

    def __init__(self, folder):
        self.writer, self.rows = SummaryWriter(str(folder)), 0

    def __call__(self, trainer, history):
        for row in range(self.rows, len(history)):
            step = int(history.steps[row])
            self.writer.add_scalar("loss", history.loss[row], step)
            for name, values in history.records.items():
                self.writer.add_scalar(
                    name.replace("[", "/").strip("]"), values[row], step
                )
        self.rows, now = len(history), int(trainer.step_count)
        for path, rate in trainer.learning_rates().items():
            self.writer.add_scalar(f"rate/{path}", rate, now)
        for path, count in trainer.nan_report().items():
            self.writer.add_scalar(f"not finite/{path}", count.total, now)
        self.writer.flush()


class Line(eqx.Module):
    centre: jax.Array
    width: jax.Array
    height: jax.Array
    level: jax.Array

    def __call__(self, x):
        return self.level + self.height / (1 + ((x - self.centre) / self.width) ** 2)


class LineFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y, sigma = batch
        return (model(x) - y) / sigma


def main(output):
    truth = Line(*map(jnp.asarray, (0.3, 0.8, 2.0, 1.0)))
    x = jnp.linspace(-5, 5, 200)
    noise = 0.05 * jax.random.normal(jax.random.key(0), x.shape)
    data = x, truth(x) + noise, jnp.full(x.shape, 0.05)
    start = Line(*map(jnp.asarray, (0.2, 1.0, 1.0, 0.5)))
    optimiser = vn.ParamOptimiser({name: optax.adam(r) for name, r in RATES.items()})
    logs = Path(output) / "watching"
    shutil.rmtree(logs, ignore_errors=True)

    histories = {}
    for name, scales in {"mistyped": {}, "repaired": {"width": 1e-3}}.items():
        trainer = LineFit(start, optimiser.with_scale(scales))
        scribe = Scribe(logs / name)
        result = trainer.fit(
            data, 1_500, record=("grad_norms", "update_ratios"), callback=scribe
        )
        histories[name] = result.history
        ratios = {
            rule: np.max(values[:100])
            for rule, values in result.history.records.items()
            if rule.startswith("update_ratio")
        }
        print(f"{name}: chi-squared {2 * float(result.trainer.best_loss):.0f}")
        for path, rate in result.trainer.learning_rates().items():
            print(f"  rate of {path}: {rate:.3g}")
        for rule, ratio in ratios.items():
            print(f"  {rule}: {ratio:.0e}")
        assert (max(ratios.values()) > 0.1) == (name == "mistyped")
        written = sum(path.stat().st_size for path in (logs / name).iterdir())
        assert written > 1_500 * len(result.history.records) * 20

    result.history.save(logs / "history")
    kept = vn.History.load(logs / "history")
    np.testing.assert_array_equal(kept.loss, result.history.loss)
    assert 2 * result.history.loss[-1] < 250
    draw(histories, output)


def draw(histories, output):
    """The relative update of each rule, before and after the repair."""
    plt.style.use(HERE / "style.mplstyle")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        ax.axhspan(3e-4, 3e-3, color="0.93", zorder=0)
        for rule in ("centre", "width", "height, level"):
            values = history[f"update_ratio[{rule}]"]
            ax.semilogy(history.steps, values, lw=1, label=rule)
        ax.set(title=name.capitalize(), xlabel="step", ylim=(1e-6, 30))
    axes[0].set_ylabel("update over parameter")
    axes[1].legend(title="rule")
    figure.savefig(Path(output) / "watching.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
