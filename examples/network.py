"""How far away a galaxy is, from its colours, with an honest error bar.

The redshift of a galaxy takes an hour of spectroscopy, its brightness through six
filters a minute of imaging. 200 galaxies have had both. A small network learns from
them to tell the redshift and its standard error from the colours alone. Another 200
are held out, and 5,000 are there for judgement at the end.

So few galaxies a network soon knows by heart, and then believes itself more precise
than it is. `Patience` ends the fit when the held-out likelihood has not improved for a
while; then it goes on from the best network, at a tenth of the rate.

The rates warm up and follow a cosine, the weights decay, and biases and BatchNorm's
scales do not. Dropout draws from `key`; BatchNorm's running means are the `state`, of
which the best network has its own.
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
OXYGEN_AND_HYDROGEN = (372.7, 500.7, 656.3)  # nanometres, as the filters
WIDTH, RATE, STEPS, EVERY = 128, 5e-3, 5_000, 50


def observe(count, rng):
    """Brightness and colours of galaxies, and their redshifts."""
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
        magnitudes.append(-2.5 * np.log10(flux) + rng.normal(0, 0.05, count))
    colours = np.diff(magnitudes, axis=0)
    distance = 5 * np.log10(redshift + 0.01) + rng.normal(0, 0.8, count)
    inputs = np.column_stack([magnitudes[3] + distance, *colours])
    return inputs.astype(np.float32), redshift.astype(np.float32)


class Network(eqx.Module):
    """Tells a redshift, and the logarithm of its standard error."""

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
        norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch")
        self.norms = (norm, eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch"))
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, state, key=None):
        *hidden, readout = self.layers
        for layer, norm in zip(hidden, self.norms, strict=True):
            x, state = norm(layer(x), state)
            x = jax.nn.gelu(x)
        return readout(self.dropout(x, key=key)), state


def surprise(told, redshift):
    """The mean negative log-likelihood of a redshift, up to a constant."""
    mean, log_sigma = told.T
    pull = (redshift - mean) / jnp.exp(log_sigma)
    return jnp.mean(log_sigma + 0.5 * pull**2)


@eqx.filter_jit
def tell(model, state, inputs):
    """What a network tells outside of training: no dropout, and the running means."""
    model = eqx.nn.inference_mode(model)
    return jax.vmap(model, (0, None), (0, None), axis_name="batch")(inputs, state)[0]


class RedshiftFit(vn.Trainer):
    def loss(self, model, batch, *, key, state):
        inputs, redshift = batch
        keys = jax.random.split(key, len(inputs))
        run = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        told, state = run(inputs, state, keys)
        return surprise(told, redshift), state

    def evaluate(self, model, batch):
        inputs, redshift = batch
        return surprise(tell(model, self.state, inputs), redshift)


def rules(rate):
    """Only weights decay: a node, `norms`, is more specific than a glob."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 10, STEPS)
    return vn.ParamOptimiser(
        {
            "**.weight": optax.adamw(schedule, weight_decay=0.1),
            ("**.bias", "norms"): optax.adam(schedule),
        }
    )


def main(output):
    rng = np.random.default_rng(0)
    train, held_out, test = (observe(count, rng) for count in (200, 200, 5_000))
    keys = jax.random.split(jax.random.key(0), 3)
    model, state = eqx.nn.make_with_state(Network)(keys[0])
    trainer = RedshiftFit(model, rules(RATE), state=state, key=keys[1])
    batches = vn.Minibatches(train, 50, key=keys[2])
    rates = []

    def watch(trainer, history):
        rate = trainer.learning_rates()["layers.0.weight"]
        rates.append((int(trainer.step_count), rate))

    options = {"validation": (held_out, EVERY), "callback": watch, "chunk": EVERY}
    unstopped = trainer.fit(batches, STEPS, **options)
    rates.clear()
    stopped = trainer.fit(batches, STEPS, stop=vn.Patience(15), **options)
    trainer = stopped.trainer.replace(
        model=stopped.best,
        state=stopped.trainer.best_state,
        optimiser=rules(RATE / 10),
    )
    resumed = trainer.fit(batches, STEPS, stop=vn.Patience(15), **options)
    results = {"stopped in time": stopped, "and resumed": resumed}

    for name, result in results.items():
        lowest = result.history.validation.argmin()
        print(f"{name}, after {result.trainer.step_count} steps.", end=" ")
        print(f"The best was after {result.history.validation_steps[lowest]}.")
        print(f"  {result.stop_reason}")
        assert result.stop_reason is vn.StopReason.NO_PATIENCE

    told = {
        name: tell(result.best, result.trainer.best_state, test[0])
        for name, result in results.items()
    }
    told["not stopped"] = tell(unstopped.model, unstopped.trainer.state, test[0])
    print(f"\n{len(test[0])} other galaxies  surprise  rms of (true - told) / error")
    scores = {}
    for name, (mean, log_sigma) in {name: x.T for name, x in told.items()}.items():
        scores[name] = float(surprise(told[name], test[1]))
        rms = np.sqrt(np.mean(((test[1] - mean) / np.exp(log_sigma)) ** 2))
        print(f"{name:19}{scores[name]:10.2f}{rms:29.2f}")
    assert scores["and resumed"] < scores["stopped in time"] < scores["not stopped"]
    draw(unstopped.history, results, rates, test[1], told["and resumed"], output)


def draw(unstopped, results, rates, redshift, told, output):
    """The scores and the rate on the way, and what is told of other galaxies."""
    plt.style.use(HERE / "style.mplstyle")
    figure = plt.figure(figsize=(9, 4.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(3, 2))
    scores, rate = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    told_of = figure.add_subplot(grid[:, 1])

    label = "held out, not stopped"
    scores.plot(
        unstopped.validation_steps, unstopped.validation, color="0.7", label=label
    )
    for color, (name, result) in zip(("C0", "C2"), results.items(), strict=True):
        history = result.history
        batches = history.loss[: len(history) // EVERY * EVERY].reshape(-1, EVERY)
        middle = history.steps[EVERY // 2 :: EVERY][: len(batches)]
        scores.plot(middle, batches.mean(axis=1), ":", lw=1, color=color)
        steps, score = history.validation_steps, history.validation
        scores.plot(steps, score, color=color, label=f"held out, {name}")
        best = score.argmin()
        scores.plot(steps[best], score[best], "o", color=color)
        scores.axvline(steps[-1], color=color, lw=0.8, ls="--")
    scores.plot([], [], ":", lw=1, color="0.3", label="training")
    scores.set(title="Stopped, and resumed from the best", ylabel="surprise")
    scores.set(ylim=(-2.6, 0.2), xlim=(0, STEPS))
    scores.legend(loc="upper right", fontsize=8)
    scores.tick_params(labelbottom=False)
    rate.semilogy(*np.transpose(rates), ".", ms=2.5, color="0.3")
    rate.set(xlabel="step", ylabel="rate", xlim=(0, STEPS))

    mean, log_sigma = np.asarray(told).T
    dots = told_of.scatter(
        redshift, mean, s=3, c=np.exp(log_sigma), vmax=0.5, cmap="viridis_r"
    )
    told_of.plot([0, 3], [0, 3], color="0.5", lw=1, zorder=0)
    told_of.set(title=f"{len(redshift)} other galaxies", xlabel="true redshift")
    told_of.set(ylabel="redshift told", xlim=(0, 2.5), ylim=(0, 2.5))
    figure.colorbar(dots, label="error bar told")
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "network.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    main(parser.parse_args().output)
