"""A map of the sky made on eight devices, and what goes between them.

A telescope sweeps over a patch of the sky. Each sample sees nine pixels, through a
beam and with noise; what is wanted is the map, 48 × 48 pixels, each of them a
parameter. With `mesh=` the samples are split over the devices. Each has the whole map,
and they add up their gradients once in a step. The answer is that of one device, to
rounding.

Whether that is worth while can be told on paper. Per step and device, of *n*:

- the model takes *W/n* operations, the optimiser *U* (it is the same on all devices);
- one sum of the gradients, of all *P* parameters and the loss, in which a device sends
  and receives 2 (*n* − 1)/*n* times their 4 (*P* + 1) bytes, as a ring does it.

So it pays where the first is much more than what a device could compute while the
second is under way: the more samples to a batch, the better. Here a batch is all of
them. *W* and *U* are found from two programs for one device; the compiled programs for
2, 4 and 8 devices are then asked what they do, and what they sum. (What goes over the
wire is computed from that.) The devices of this script are eight views of one
processor: they show that it is right, not how fast it is.
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
    """Each sample is a weighted sum of the pixels in the beam."""

    def residuals(self, sky, batch):
        pixels, weights, seen = batch
        return (jnp.sum(weights * sky.ravel()[pixels], axis=1) - seen) / NOISE


def observe(rng):
    """The true sky, and the samples of all sweeps."""
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    sky = np.zeros((SIDE, SIDE))
    for _ in range(12):
        (u, v), width = rng.uniform(0, SIDE, 2), rng.uniform(1.5, 6)
        height = rng.uniform(0.5, 3)
        sky += height * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * width**2))
    # The beam: the three by three pixels around where the telescope looks.
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
    """A compiled step on so many devices."""
    mesh = mesh_of(count)
    put = lambda tree, *axes: jax.device_put(
        tree, NamedSharding(mesh, PartitionSpec(*axes))
    )
    step = jax.jit(lambda trainer, batch: trainer.step(batch, mesh=mesh))
    return step.lower(put(trainer), put(data, "samples")).compile()


def sums(compiled):
    """The bytes of each sum over all devices that a compiled program takes."""
    found = []
    for line in compiled.as_text().splitlines():
        result, called, _ = line.partition(" all-reduce(")
        if called:
            shapes = re.findall(r"f32\[([\d,]*)\]", result.split(" = ")[1])
            sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append(4 * int(sum(sizes)))
    return found


def operations(compiled):
    """How many a compiled program takes on each device."""
    return compiled.cost_analysis()["flops"]


def main(output):
    sky, data = observe(np.random.default_rng(2))
    rate = optax.cosine_decay_schedule(0.2, STEPS)
    trainer = MapFit(jnp.zeros((SIDE, SIDE)), optax.adam(rate))
    batches = vn.Minibatches(data, 8_192, key=jax.random.key(0))
    one = trainer.fit(batches, STEPS)
    many = trainer.fit(batches, STEPS, mesh=mesh_of(8))
    apart = np.abs(many.model - one.model).max()
    inner = (slice(2, -2), slice(2, -2))  # the edge is hardly seen
    error = np.std((many.model - sky)[inner])
    print(f"{STEPS} steps, {SAMPLES:,} samples, {sky.size:,} pixels:")
    print(f"  8 devices and 1 differ by {apart:.0e} in the map at most")
    print(f"  the map is off by {error:.2f}; a sample has an error of {NOISE}")
    assert apart < 1e-3
    assert error < 0.2

    half = tuple(column[: SAMPLES // 2] for column in data)
    work = {count: compiled_step(trainer, data, count) for count in DEVICES}
    flops = {count: operations(step) for count, step in work.items()}
    less = operations(compiled_step(trainer, half, 1))
    model = 2 * (flops[1] - less)
    optimiser = flops[1] - model
    print(f"\nW = {model:,.0f} operations, U = {optimiser:,.0f}\n")
    print(
        "devices   operations: told   W/n + U   sums: bytes   4 (P + 1)   on the wire"
    )
    payload, table = 4 * (sky.size + 1), []
    for count, step in work.items():
        summed = sums(step) if count > 1 else []
        paper = model / count + optimiser
        wire = 2 * (count - 1) / count * payload
        table.append((count, flops[count], paper, wire))
        row = count, flops[count], paper, sum(summed), payload if count > 1 else 0, wire
        print("{:7}{:12,.0f}{:12,.0f}{:15,}{:12,}{:14,.0f}".format(*row))
        assert abs(flops[count] / paper - 1) < 0.1
        assert summed == ([payload] if count > 1 else [])
    draw(sky[inner], many.model[inner], table, output)


def draw(sky, found, table, output):
    """The map, and the work and the bytes of each device."""
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
    counts, told, paper, wire = np.transpose(table)
    right.loglog(counts, paper, "C0-", label="operations, W/n + U")
    right.loglog(counts, told, "C0o", label="as compiled")
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
