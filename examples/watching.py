"""A fit with two rates in the wrong units, watched in TensorBoard.

64 exposures show six stars: their positions in pixels, their fluxes and the sky between
them in photons. Two of the rates were typed in other units, that of the fluxes in
thousands of photons, that of the sky in thousandths. No error reports this. The loss
falls and settles, as in a good fit, but at a chi-squared of 20 per pixel.

`Board`, a callback for you to copy, writes to
[TensorBoard](https://www.tensorflow.org/tensorboard) the new values of each chunk of
steps: the loss and, for each rule, the norm of its gradients and the size of its
updates relative to its parameters; the learning rates; and the counts of non-finite
values. (One exposure is spoilt: `SkipStep` skips it.)

The relative updates show both mistakes from the first steps on. The fluxes move by
three millionths of themselves, and would take a hundred thousand steps; the sky jumps
by as much as its own value. `with_scale` corrects the two rates, and the fit continues
from there. `tensorboard --logdir output` shows everything, also during the fit.
"""

import argparse
import shutil
import struct
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2

import vernal as vn

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).parent
SIZE, READ_NOISE, STEPS, CHUNK = 32, 5.0, 400, 50
EVENT = vars(event_pb2)["Event"]  # the module makes this class when imported


class Board:
    """A callback that writes the new values of each chunk to TensorBoard."""

    def __init__(self, writer):
        self.writer, self.seen = writer, 0

    def __call__(self, trainer, history):
        new = history.steps >= self.seen
        for name, values in {"loss": history.loss, **history.records}.items():
            tag = name.replace("[", "/").removesuffix("]")  # group/chart
            for step, value in zip(history.steps[new], values[new], strict=True):
                if np.isfinite(value):
                    self.writer.add_scalar(tag, value, step)
        self.seen = int(trainer.step_count)
        for path, rate in trainer.learning_rates().items():
            if rate is not None:
                self.writer.add_scalar(f"learning_rate/{path}", rate, self.seen)
        for path, count in trainer.nan_report().items():
            self.writer.add_scalar(f"not_finite/{path}", count.total, self.seen)


def read(folder):
    """Returns the values at each step that TensorBoard finds in a folder, by tag."""
    scalars = {}
    for file in folder.glob("events.*"):
        data, start = file.read_bytes(), 0
        while start < len(data):  # length (8 bytes), checksum (4), event, checksum (4)
            (length,) = struct.unpack_from("<Q", data, start)
            event = EVENT.FromString(data[start + 12 : start + 12 + length])
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            start += length + 16
    return scalars


class Field(eqx.Module):
    """Stars on a uniform sky."""

    position: jax.Array  # pixels
    flux: jax.Array  # photons
    sky: jax.Array  # photons per pixel
    width: jax.Array  # pixels

    def __call__(self):
        distance = (jnp.arange(SIZE) - self.position[..., None]) / self.width
        bell = jnp.exp(-0.5 * distance**2) / (self.width * jnp.sqrt(2 * jnp.pi))
        return jnp.einsum("s,sy,sx->yx", self.flux, bell[:, 0], bell[:, 1]) + self.sky


class FieldFit(vn.Trainer):
    def residuals(self, model, batch):
        images, sigma = batch
        return (model() - images) / sigma


def observe(rng):
    """Returns the truth, and exposures of it with the noise of their pixels."""
    places = [[6, 7], [9, 24], [15, 16], [17, 19], [24, 8], [26, 25]]
    truth = Field(
        position=jnp.array(places, float),
        flux=jnp.array([6e4, 2e4, 5e4, 3e4, 4e4, 8e4]),
        sky=jnp.array(100.0),
        width=jnp.array(1.5),
    )
    expected = np.tile(truth(), (64, 1, 1))
    images = rng.poisson(expected) + rng.normal(0, READ_NOISE, expected.shape)
    images[40, 3, 3] = np.nan
    return truth, (images, np.sqrt(expected + READ_NOISE**2))


def main(output):
    folder = Path(output) / "watching"
    shutil.rmtree(folder, ignore_errors=True)  # files of an earlier run
    rng = np.random.default_rng(0)
    truth, exposures = observe(rng)
    start = Field(
        position=truth.position + rng.normal(0, 0.5, (6, 2)),
        flux=0.7 * truth.flux,
        sky=jnp.array(80.0),
        width=jnp.array(1.8),
    )
    adam = lambda rate: optax.adam(rate, b2=0.95)  # forgets large gradients soon
    optimiser = vn.ParamOptimiser(
        {
            "position": adam(1e-2),
            "flux": adam(1e-1),  # in thousands of photons
            "sky": adam(1e2),  # in thousandths of photons
            "width": adam(2e-3),
        }
    )
    trainer = FieldFit(start, optimiser, nan_policy=vn.SkipStep())
    batches = vn.Minibatches(exposures, 8, key=jax.random.key(0))
    with SummaryWriter(str(folder)) as writer:
        options = {
            "record": ("grad_norms", "update_ratios"),
            "callback": Board(writer),
            "chunk": 50,
        }
        before = trainer.fit(batches, STEPS, **options)
        corrected = optimiser.with_scale({"flux": 1e3, "sky": 1e-3})
        trainer = before.trainer.replace(optimiser=corrected)
        after = trainer.fit(batches, STEPS, **options)

    print("          relative update         learning rate")
    print("rule       first corrected      first corrected")
    first_rates, rates = (r.trainer.learning_rates() for r in (before, after))
    suspects = []
    for rule in rates:
        legs = [result.history[f"update_ratio[{rule}]"] for result in (before, after)]
        typical = [np.median(leg[leg > 0]) for leg in legs]
        cells = *typical, first_rates[rule], rates[rule]
        print("{:10}{:6.0e}{:10.0e}{:11g}{:10g}".format(rule, *cells))
        if not 1e-5 < typical[0] < 1e-2:
            suspects.append(rule)
        assert 1e-5 < typical[1] < 1e-2, rule
    assert suspects == ["flux", "sky"]

    history = before.history + after.history
    history.save(folder / "history.vernal")
    loaded = vn.History.load(folder / "history.vernal")
    np.testing.assert_equal(loaded.to_dict(), history.to_dict())

    scalars = read(folder)
    for name, values in {"loss": history.loss, **history.records}.items():
        written = scalars[name.replace("[", "/").removesuffix("]")]
        rows = zip(history.steps, values.astype(np.float32), strict=True)
        assert written == {step: value for step, value in rows if np.isfinite(value)}
    skipped = scalars["not_finite/loss"][2 * STEPS]
    assert skipped == after.trainer.nan_report()["loss"].total > 0
    assert scalars["learning_rate/flux"][2 * STEPS] == 100
    count = sum(map(len, scalars.values()))
    print(f"\n{count} values in {len(scalars)} charts, {skipped:.0f} steps skipped.")

    scatter = 2 * history.loss / exposures[0][:8].size
    settled = [np.nanmedian(leg[-100:]) for leg in (scatter[:STEPS], scatter[STEPS:])]
    print("Chi-squared per pixel: {:.1f}, corrected {:.2f}.".format(*settled))
    assert settled[0] > 10
    assert abs(settled[1] - 1) < 0.05
    assert jnp.allclose(after.model.flux, truth.flux, rtol=0.01)
    draw(history, scatter, exposures[0], (before.model, after.model), output)


def draw(history, scatter, images, models, output):
    """The relative updates and the loss; the residuals of the models."""
    plt.style.use(HERE / "style.mplstyle")
    figure = plt.figure(figsize=(9, 5.6))
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.4, 1))
    ratios, loss = left.subplots(2, sharex=True, height_ratios=(2, 1))
    middles = history.steps.reshape(-1, 10).mean(axis=1)
    for index, rule in enumerate(("position", "flux", "sky", "width")):
        values = history[f"update_ratio[{rule}]"].copy()
        values[values == 0] = np.nan  # the steps that were skipped
        medians = np.nanmedian(values.reshape(-1, 10), axis=1)
        ratios.plot(history.steps, values, lw=0.6, alpha=0.35, color=f"C{index}")
        ratios.plot(middles, medians, lw=2, color=f"C{index}", label=rule)
    ratios.set(yscale="log", ylim=(5e-7, 8))
    ratios.set_title("Size of an update, relative to its parameters")
    ratios.legend(ncols=4, loc="upper right")
    loss.semilogy(history.steps, scatter, lw=1, color="C4")
    loss.set(xlabel="step")
    loss.set_title("Chi-squared per pixel")
    for panel in (ratios, loss):
        panel.axvline(STEPS, color="0.4", lw=1, ls=":", zorder=1)
    ratios.annotate("with_scale", (STEPS + 8, 1e-6), color="0.4")

    right.suptitle("Data minus model, photons", fontweight="bold", fontsize=10)
    panels = right.subplots(2)
    for panel, name, model in zip(panels, ("first", "corrected"), models, strict=True):
        rest = np.nanmean(images, axis=0) - model()
        panel.imshow(rest, cmap="RdBu", vmin=-1000, vmax=1000)
        panel.set_title(name, fontweight="normal")
        panel.set(xticks=[], yticks=[])
    colours = {"orientation": "horizontal", "shrink": 0.7, "aspect": 30}
    right.colorbar(panels[0].images[0], ax=panels, **colours)
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "watching.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
