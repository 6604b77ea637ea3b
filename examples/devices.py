"""A map of the sky from eight devices, and the data that they exchange.

A telescope sweeps over a patch of the sky. Each sample sees nine pixels, through a
beam and with noise. The fit makes the map: 48 × 48 pixels, each of them a parameter.
With `mesh=` the samples are split over the devices. Each device has the whole map, and
they sum their gradients once in a step. The answer is that of one device, to rounding.

You can work out beforehand whether this pays. In each step, each of *n* devices

- computes *W/n* operations for the model and *U* for the optimiser, which is the same
  on all devices;
- takes part in one sum of the gradients of all *P* parameters and of the loss. In a
  ring it sends and receives 2 (*n* − 1)/*n* times their 4 (*P* + 1) bytes.

It pays if *W/n* is much more than a device could compute during the sum, so the more
samples in a batch, the better. Here a batch is all of them. *W* and *U* come from two
programs for one device. The script then compares them with the operations and the sums
in the compiled programs for 2, 4 and 8 devices. (The bytes on the wire are computed
from the sums.) The devices of this script are eight parts of one processor: they show
that the answer is right, not how fast it is.
"""

import argparse
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vernal as vn

HERE = Path(__file__).parent
SIDE, SAMPLES, NOISE, STEPS = 48, 65_536, 0.5, 100
DEVICES = (1, 2, 4, 8)


class MapFit(vn.Trainer):
    """Predicts each sample as a weighted sum of the pixels in the beam."""

    def residuals(self, sky, batch):
        pixels, weights, seen = batch
        return (jnp.sum(weights * sky.ravel()[pixels], axis=1) - seen) / NOISE


def observe(rng):
    """Returns the true sky, and the samples of all sweeps."""
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    sky = np.zeros((SIDE, SIDE))
    for _ in range(12):
        (u, v), width = rng.uniform(0, SIDE, 2), rng.uniform(1.5, 6)
        height = rng.uniform(0.5, 3)
        sky += height * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * width**2))
    # The beam covers the three by three pixels around the line of sight.
    where = rng.uniform(1, SIDE - 2, (2, SAMPLES, 1))
    offsets = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]).T[:, None]
    u, v = near = np.rint(where).astype("i4") + offsets
    weights = np.exp(-np.sum((near - where) ** 2, axis=0) / (2 * 0.4**2))
    weights /= weights.sum(axis=1, keepdims=True)
    pixels = (u * SIDE + v).astype("i4")
    seen = np.sum(weights * sky.ravel()[pixels], axis=1)
    seen += rng.normal(0, NOISE, SAMPLES)
    return sky.astype("f4"), (pixels, weights.astype("f4"), seen.astype("f4"))


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("samples",))


def compiled_step(trainer, data, count):
    """Returns a compiled step on `count` devices."""
    mesh = mesh_of(count)
    put = lambda tree, *axes: jax.device_put(
        tree, NamedSharding(mesh, PartitionSpec(*axes))
    )
    step = jax.jit(lambda trainer, batch: trainer.step(batch, mesh=mesh))
    return step.lower(put(trainer), put(data, "samples")).compile()


def sums(compiled):
    """Returns the bytes of each sum over all devices in a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        result, called, _ = line.partition(" all-reduce(")
        if called:
            shapes = re.findall(r"f32\[([\d,]*)\]", result.split(" = ")[1])
            sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append(4 * int(sum(sizes)))
    return found


def operations(compiled):
    """Returns the number of operations of a compiled program on each device."""
    return compiled.cost_analysis()["flops"]


def main(output):
    sky, data = observe(np.random.default_rng(2))
    rate = optax.cosine_decay_schedule(0.2, STEPS)
    trainer = MapFit(jnp.zeros((SIDE, SIDE)), optax.adam(rate))
    batches = vn.Minibatches(data, 8_192, key=jax.random.key(0))
    one = trainer.fit(batches, STEPS)
    many = trainer.fit(batches, STEPS, mesh=mesh_of(8))
    difference = np.abs(many.model - one.model).max()
    inner = (slice(2, -2), slice(2, -2))  # few samples see the edge
    error = np.std((many.model - sky)[inner])
    print(f"{STEPS} steps, {SAMPLES:,} samples, {sky.size:,} pixels:")
    print(f"  the maps of 8 devices and of 1 differ by {difference:.0e} at most")
    print(f"  the error of the map is {error:.2f}, that of a sample {NOISE}")
    assert difference < 1e-3
    assert error < 0.2

    half = tuple(column[: SAMPLES // 2] for column in data)
    work = {count: compiled_step(trainer, data, count) for count in DEVICES}
    flops = {count: operations(step) for count, step in work.items()}
    half_flops = operations(compiled_step(trainer, half, 1))
    model = 2 * (flops[1] - half_flops)
    optimiser = flops[1] - model
    print(f"\nW = {model:,.0f} operations, U = {optimiser:,.0f}\n")
    print("devices  operations     W/n + U  bytes in sums   4 (P + 1)   on the wire")
    payload, table = 4 * (sky.size + 1), []
    for count, step in work.items():
        summed = sums(step) if count > 1 else []
        expected = model / count + optimiser
        wire = 2 * (count - 1) / count * payload
        table.append((count, flops[count], expected, wire))
        row = (
            count,
            flops[count],
            expected,
            sum(summed),
            payload if count > 1 else 0,
            wire,
        )
        print("{:7}{:12,.0f}{:12,.0f}{:15,}{:12,}{:14,.0f}".format(*row))
        assert abs(flops[count] / expected - 1) < 0.1
        assert summed == ([payload] if count > 1 else [])
    draw(sky[inner], many.model[inner], table, output)


def draw(sky, found, table, output):
    """The sky, its map, and the operations and bytes of each device."""
    plt.style.use(HERE / "style.mplstyle")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6))
    scale = {"vmin": sky.min(), "vmax": sky.max(), "cmap": "magma"}
    for axes, image, title in (
        (left, sky, "The sky"),
        (middle, found, "The map, from eight devices"),
    ):
        axes.imshow(image, **scale)
        axes.set(title=title, xticks=[], yticks=[])
        axes.grid(False)
    counts, counted, expected, wire = np.transpose(table)
    right.loglog(counts, expected, "C0-", label="operations, W/n + U")
    right.loglog(counts, counted, "C0o", label="as compiled")
    right.loglog(counts[1:], wire[1:], "C1s--", label="bytes sent and received")
    right.set_xticks(counts, [f"{count:.0f}" for count in counts])
    right.minorticks_off()
    right.set(title="Each device, in each step", xlabel="devices")
    right.legend()
    Path(output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(output) / "devices.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", default="output", help="folder for the picture")
    jax.config.update("jax_num_cpu_devices", 8)
    main(parser.parse_args().output)
