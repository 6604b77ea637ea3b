"""Handwritten digits, with a learning rate for each kind of layer.

A small convolutional network learns scikit-learn's 1,797 digits. Each kind of layer has
its own optimiser, chosen by a glob.

Three of the training images have a dead pixel that reads NaN. `SkipStep` rejects the
step of every minibatch that contains one, and the network and its moments stay as they
were. `StopAfter` would end the fit after ten such steps in a row.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import vernal as vn

HERE = Path(__file__).parent
EPOCHS, SIZE = 10, 64


class Network(eqx.Module):
    """Two convolutions, each of which halves the image, and a readout."""

    convolutions: tuple[eqx.nn.Conv2d, ...]
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convolutions = (
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(16, 32, 3, padding=1, key=keys[1]),
        )
        self.readout = eqx.nn.Linear(32 * 2 * 2, 10, key=keys[2])

    def __call__(self, image):
        x = image[None]
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, -1, 2).max((2, 4))
        return self.readout(x.ravel())


def accuracy(model, images, labels):
    return jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == labels)


class DigitsFit(vn.Trainer):
    def loss(self, model, batch):
        images, labels = batch
        logits = jax.vmap(model)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"accuracy": accuracy(model, images, labels)}


def main(output):
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    train_x = np.asarray(train_x)
    train_x[[100, 500, 900], 3, 3] = np.nan

    model_key, data_key = jax.random.split(jax.random.key(0))
    model = Network(model_key)
    optimiser = vn.ParamOptimiser(
        {
            "convolutions.*.weight": optax.adam(4e-3),
            "**.bias": optax.adam(1e-2),
            "readout": optax.adamw(2e-3, weight_decay=1e-2),
        }
    )
    print(optimiser.summary(model))

    trainer = DigitsFit(model, optimiser, nan_policy=vn.SkipStep() | vn.StopAfter(10))
    batches = vn.Minibatches((train_x, train_y), SIZE, key=data_key)
    epoch = batches.steps_per_epoch
    score = eqx.filter_jit(accuracy)
    held_out = []

    def watch(trainer, history):
        held_out.append(float(score(trainer.model, test_x, test_y)))

    result = trainer.fit(
        batches, EPOCHS * epoch, record="accuracy", callback=watch, chunk=epoch
    )
    skipped = result.trainer.nan_report()["loss"]
    print(f"\nskipped {skipped.total} steps, the first at {skipped.first_step}")
    print(f"{held_out[-1]:.1%} of {len(test_y)} held-out images are right")
    assert skipped.total > 0
    assert held_out[-1] > 0.95, "fewer than 95 % of the held-out images are right"

    guesses = np.argmax(jax.vmap(result.model)(test_x), axis=1)
    draw(result.history, held_out, test_x, test_y, guesses, output)


def draw(history, held_out, images, labels, guesses, output):
    """The loss, the accuracy, and held-out images with the mistakes first."""
    plt.style.use(HERE / "style.mplstyle")
    figure = plt.figure(figsize=(9, 4.5))
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1))
    loss, right_on = left.subplots(2, sharex=True)
    epochs = np.arange(len(history.loss)) / len(history.loss) * len(held_out)
    loss.semilogy(epochs, history.loss, lw=0.8)
    skipped = epochs[~np.isfinite(history.loss)]
    loss.plot(skipped, np.full_like(skipped, 3e-3), "|", ms=5, label="skipped: NaN")
    loss.set_title("Loss of each minibatch")
    loss.legend(loc="upper right")
    right_on.plot(epochs, history["accuracy"], lw=0.6, alpha=0.5, label="minibatch")
    right_on.plot(np.arange(len(held_out)) + 1, held_out, label="held out")
    right_on.set(title="Accuracy", xlabel="epoch", ylim=(0.85, 1.005))
    right_on.legend(loc="lower right")

    right.suptitle("Held-out images, mistakes first", fontweight="bold", fontsize=10)
    order = np.argsort(labels == guesses, kind="stable")
    for ax, i in zip(right.subplots(5, 7).flat, order, strict=False):
        ax.imshow(images[i], cmap="gray_r")
        wrong = guesses[i] != labels[i]
        title = f"{guesses[i]}, not {labels[i]}" if wrong else f"{labels[i]}"
        colour = "#d1495b" if wrong else "0.4"
        ax.set_title(title, fontsize=7, loc="center", color=colour, fontweight="normal")
        ax.axis("off")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
