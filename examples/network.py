"""The redshift of a galaxy and its error bar, from its colours.

Measuring the redshift of a galaxy takes an hour of spectroscopy; measuring its
brightness through six filters takes a minute of imaging. For 150 galaxies both are
known. From these a small network learns to predict the redshift, and its standard
error, from brightness and colours alone. Another 150 galaxies are held out of the fit,
and 5,000 test the result.

A network soon memorises so few galaxies. It then underestimates its errors: for other
galaxies it is wrong by twice its error bars. With `validation` and `vn.Patience` the
fit ends when the likelihood of the held-out galaxies no longer improves. A second fit
continues from the best network at a tenth of the rate, gains little, and ends too.

The learning rate warms up and then follows a cosine. Weights decay; biases and the
scales of BatchNorm do not. Dropout draws from the trainer's `key`. The running means of
BatchNorm are the trainer's `state`; those of the best network are its `best_state`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import vernal as vn

HERE = Path(__file__).parent
FILTERS = ((320, 400), (400, 552), (552, 691), (691, 818), (818, 922), (930, 1080))
OXYGEN_AND_HYDROGEN = (372.7, 500.7, 656.3)  # nanometres, like the filters
WIDTH, RATE, STEPS, EVERY = 128, 5e-3, 5_000, 50


def observe(count, rng):
    """Returns brightness and colours of galaxies, and their redshifts."""
    redshift = rng.gamma(4.0, 0.2, count)
    young, dust = rng.beta(0.7, 1.0, (count, 1)), rng.uniform(0, 1, (count, 1))
    magnitudes = []
    for shortest, longest in FILTERS:
        emitted = np.linspace(shortest, longest, 60) / (1 + redshift[:, None])
        old_stars = 1 / (1 + np.exp((400 - emitted) / 8))
        young_stars = (emitted / 400) ** -1.8
        for line in OXYGEN_AND_HYDROGEN:
            young_stars += np.exp(-0.5 * ((emitted - line) / 3) ** 2)
        stars = (1 - young) * (old_stars + 0.05) + young * young_stars
        flux = np.mean(stars * np.exp(-dust * 400 / emitted), axis=1)
        magnitudes.append(-2.5 * np.log10(flux) + rng.normal(0, 0.07, count))
    colours = np.diff(magnitudes, axis=0)
    distance = 5 * np.log10(redshift + 0.01) + rng.normal(0, 0.8, count)
    inputs = np.column_stack([magnitudes[3] + distance, *colours])
    return inputs.astype(np.float32), redshift.astype(np.float32)


class Network(eqx.Module):
    """Predicts a redshift, and the logarithm of its standard error."""

    layers: tuple[eqx.nn.Linear, ...]
    norms: tuple[eqx.nn.BatchNorm, ...]
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.layers = (
            eqx.nn.Linear(len(FILTERS), WIDTH, key=keys[0]),
            eqx.nn.Linear(WIDTH, WIDTH, key=keys[1]),
            eqx.nn.Linear(WIDTH, 2, key=keys[2]),
        )
        self.norms = tuple(
            eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch") for _ in range(2)
        )
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, state, key=None):
        *hidden, readout = self.layers
        for layer, norm in zip(hidden, self.norms, strict=True):
            x, state = norm(layer(x), state)
            x = jax.nn.gelu(x)
        return readout(self.dropout(x, key=key)), state


def mean_nll(predicted, redshift):
    """Returns the mean negative log-likelihood of redshifts, up to a constant."""
    mean, log_sigma = predicted.T
    pull = (redshift - mean) / jnp.exp(log_sigma)
    return jnp.mean(log_sigma + 0.5 * pull**2)


@eqx.filter_jit
def predict(model, state, inputs):
    """Predicts outside of training: without dropout, with the running means."""
    model = eqx.nn.inference_mode(model)
    return jax.vmap(model, (0, None), (0, None), axis_name="batch")(inputs, state)[0]


class RedshiftFit(vn.Trainer):
    def loss(self, model, batch, *, key, state):
        inputs, redshift = batch
        keys = jax.random.split(key, len(inputs))
        run = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        predicted, state = run(inputs, state, keys)
        return mean_nll(predicted, redshift), state

    def evaluate(self, model, batch):
        inputs, redshift = batch
        return mean_nll(predict(model, self.state, inputs), redshift)


def rules(rate):
    """Decays weights, except those of `norms`: a node is more specific than a glob."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 10, STEPS)
    return vn.ParamOptimiser(
        {
            "**.weight": optax.adamw(schedule, weight_decay=0.1),
            ("**.bias", "norms"): optax.adam(schedule),
        }
    )


def main(output):
    rng = np.random.default_rng(3)
    train, held_out, test = (observe(count, rng) for count in (150, 150, 5_000))
    keys = jax.random.split(jax.random.key(0), 3)
    model, state = eqx.nn.make_with_state(Network)(keys[0])
    trainer = RedshiftFit(model, rules(RATE), state=state, key=keys[1])
    groups = trainer.optimiser.owners(trainer.params)
    owned = zip(vn.paths(trainer.params), groups, strict=True)
    decaying = [path for path, group in owned if group == 0]
    print(f"These decay: {', '.join(decaying)}.\n")
    assert decaying == [f"layers.{i}.weight" for i in range(3)]

    batches = vn.Minibatches(train, 50, key=keys[2])
    rates = []

    def watch(trainer, history):
        rate = trainer.learning_rates()["layers.0.weight"]
        rates.append((int(trainer.step_count), rate))

    options = {"validation": (held_out, EVERY), "chunk": EVERY}
    unstopped = trainer.fit(batches, STEPS, **options)

    options |= {"stop": vn.Patience(15), "callback": watch}
    stopped = trainer.fit(batches, STEPS, **options)
    trainer = stopped.trainer.replace(
        model=stopped.best,
        state=stopped.trainer.best_state,
        optimiser=rules(RATE / 10),  # its cosine continues from the same step
    )
    resumed = trainer.fit(batches, STEPS, **options)

    last = predict(unstopped.model, unstopped.trainer.state, test[0])
    predicted = {"not stopped": last}
    for name, result in {"stopped": stopped, "resumed": resumed}.items():
        print(f"{name:11} after {result.trainer.step_count} steps, the best", end=" ")
        lowest = result.history.validation.argmin()
        print(f"after {result.history.validation_steps[lowest]}: {result.stop_reason}")
        assert result.stop_reason is vn.StopReason.NO_PATIENCE
        best, state = result.best, result.trainer.best_state
        score = mean_nll(predict(best, state, held_out[0]), held_out[1])
        assert np.isclose(score, result.trainer.best_loss, rtol=1e-4)
        predicted[name] = predict(best, state, test[0])

    columns = "   mean nll        error   rms of (true - predicted) / error"
    print(f"\n{len(test[1])} others{columns}")
    scores, pulls, spread = {}, {}, {}
    for name, of_test in predicted.items():
        mean, sigma = of_test[:, 0], jnp.exp(of_test[:, 1])
        scores[name] = mean_nll(of_test, test[1])
        pulls[name] = (test[1] - mean) / sigma
        spread[name] = jnp.sqrt(jnp.mean(pulls[name] ** 2))
        row = scores[name], jnp.median(sigma), spread[name]
        print("{:11}{:11.2f}{:13.3f}{:14.2f}".format(name, *row))
    assert spread["not stopped"] > 1.5
    assert abs(spread["resumed"] - 1) < 0.4
    assert scores["stopped"] < scores["not stopped"] - 0.3
    assert scores["resumed"] < scores["stopped"] + 0.05
    draw(unstopped, stopped, resumed, rates, test[1], predicted, pulls, output)


def draw(unstopped, stopped, resumed, rates, redshift, predicted, pulls, output):
    """The fit and its learning rate; the predictions and their errors."""
    plt.style.use(HERE / "style.mplstyle")
    figure = plt.figure(figsize=(9, 5.6))
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.35, 1))
    loss, rate = left.subplots(2, sharex=True, height_ratios=(2.6, 1))
    grey = {"color": "0.6", "lw": 1, "label": "held out, not stopped"}
    loss.plot(unstopped.history.validation_steps, unstopped.history.validation, **grey)
    bests = []
    for colour, result in ("C0", stopped), ("C1", resumed):
        history, label = result.history, colour == "C0"
        steps, scores = history.validation_steps, history.validation
        means = history.loss.reshape(-1, EVERY).mean(axis=1)
        lowest = scores.argmin()
        bests.append((steps[lowest], scores[lowest]))
        names = ("training", "held out", "best", "stopped") if label else [None] * 4
        loss.plot(steps, means, "--", lw=1, color=colour, label=names[0])
        loss.plot(steps, scores, color=colour, label=names[1])
        star, cross = {"ms": 11, "mec": "w"}, {"ms": 7, "mec": "w"}
        loss.plot(*bests[-1], "*", color=colour, label=names[2], **star)
        loss.plot(steps[-1], scores[-1], "X", color=colour, label=names[3], **cross)
    loss.plot(*np.transpose(bests), "C1:", lw=1, zorder=1)
    loss.set(ylim=(-2.6, 0.5))
    loss.set_title("Mean negative log-likelihood")
    loss.legend(ncols=2)

    end = stopped.history.validation_steps[-1]
    steps, values = np.array(rates).T
    for colour, is_part in ("C0", steps <= end), ("C1", steps > end):
        rate.plot(steps[is_part], values[is_part], color=colour)
    rate.set(yscale="log", ylim=(1e-4, 1e-2), xlabel="step")
    rate.set_title("Learning rate")

    points, histogram = right.subplots(2, height_ratios=(1.5, 1))
    mean, log_sigma = predicted["resumed"][:400].T
    bars = {"fmt": "C1.", "ms": 3, "lw": 0.5, "alpha": 0.6}
    points.errorbar(redshift[:400], mean, np.exp(log_sigma), **bars)
    points.plot((0, 2), (0, 2), color="0.4", lw=0.8)
    points.set(xlim=(0, 2), ylim=(0, 2), xlabel="true redshift")
    points.set_title("Predicted redshift, with its error")
    bins = np.linspace(-6, 6, 61)
    for colour, name in ("0.6", "not stopped"), ("C1", "resumed"):
        weights = np.full(len(redshift), 5 / len(redshift))  # five bins to the unit
        look = {"histtype": "step", "color": colour, "label": name, "lw": 1.4}
        histogram.hist(np.asarray(pulls[name]), bins, weights=weights, **look)
    bell = np.exp(-(bins**2) / 2) / np.sqrt(2 * np.pi)
    histogram.plot(bins, bell, "k:", lw=1, label="Gaussian")
    histogram.set(xlim=(-6, 6))
    histogram.set_title("(true - predicted) / error")
    histogram.legend()
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "network.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
