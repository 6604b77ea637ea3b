"""One of two processes: `python processes.py scenario number port folder`.

What it finds it writes to `folder/scenario-number.json`. Imported, it is one process
alone.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

ONE_OF_TWO = __name__ == "__main__"
NUMBER = int(sys.argv[2]) if ONE_OF_TWO else 0

if ONE_OF_TWO:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", 2, NUMBER)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import optimistix as optx  # noqa: E402
from jax.sharding import Mesh, PartitionSpec as P  # noqa: E402

import inside  # noqa: E402
import vernal as vn  # noqa: E402

MESH = Mesh(np.array(jax.devices()), ("data",)) if ONE_OF_TWO else None
X = np.linspace(-1, 1, 32)
DATA = X, 2 * X + 1
SHARE = slice(16 * NUMBER, 16 * NUMBER + 16) if ONE_OF_TWO else slice(None)
STEPS = 100


class Line(eqx.Module):
    slope: jax.Array
    offset: jax.Array
    frozen: jax.Array

    def __call__(self, x):
        return self.slope * x + self.offset + 0 * jnp.sum(self.frozen)


class LineFit(vn.Trainer):
    def residuals(self, model, batch):
        x, y = batch
        return model(x) - y


class Noisy(vn.Trainer):
    """Has a key, a state, and a value that is not finite now and then."""

    def loss(self, model, batch, *, key, state):
        x, y = batch
        noise = 0.01 * jax.random.normal(key, x.shape)
        bad = jnp.where(self.step_count % 37 == 5, jnp.nan, 1.0)
        loss = jnp.mean(jnp.square(model(x) + noise - y)) * bad
        return loss, 0.9 * state + 0.1 * model.slope


def model(slope=0.5):
    return Line(jnp.array(slope), jnp.array(-1.0), jnp.arange(8.0))


RULES = {"slope": optax.adam(0.1), "offset": optax.sgd(0.01, momentum=0.5)}


def trainer(kind=LineFit, slope=0.5, **options):
    return kind(model(slope), vn.ParamOptimiser(RULES), **options)


def noisy():
    policy = vn.SkipStep() | vn.StopAfter(3)
    key, state = jax.random.key(1), jnp.zeros(())
    return trainer(Noisy, nan_policy=policy, key=key, state=state)


def fit(data=DATA, steps=30, own=None, **options):
    own = trainer() if own is None else own
    return own.fit(data, steps, **{"mesh": MESH, "progress": False, **options})


def told(result):
    is_many = isinstance(result, vn.ManyResult)
    trainer = result.trainers if is_many else result.trainer
    reasons = result.stop_reasons if is_many else [result.stop_reason]
    leaves = jax.tree.leaves(trainer.params)
    return {
        "loss": result.history.loss.tolist(),
        "params": np.concatenate([np.ravel(leaf) for leaf in leaves]).tolist(),
        "told": " ".join(map(str, reasons)),
        "steps": np.asarray(trainer.step_count).tolist(),
    }


def minibatches(size=8):
    return vn.Minibatches(DATA, size, key=jax.random.key(0))


def stream(length=30, share=SHARE):
    x, y = DATA
    return vn.Stream(lambda step: ((x[share], y[share]) for _ in range(step, length)))


LM = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
SLOPES = (0.0, 1.0, 2.0, 3.0)


def starts(optimiser=None):
    return [LineFit(model(slope), optimiser) for slope in SLOPES]


REPLACED = {
    "replaced": lambda trainer, history: trainer.replace(model=trainer.model),
    "replaced by a new one": lambda trainer, history: trainer.replace(model=model(1.9)),
}


def answers(folder):
    """What must be the answer of one process."""
    options = {"validation": (DATA, 5), "stop": vn.Patience(50), "record": "slope"}
    options |= {"every": 2}
    split = {"sharding": {"frozen": P("data"), "slope": P()}} if ONE_OF_TWO else {}
    many = {"mesh": MESH, "progress": False}
    found = {
        "whole": told(fit()),
        "noisy minibatches": told(fit(minibatches(), own=noisy(), **options)),
        "split, of a stream": told(fit(stream(), **split)),
        "solve": told(LineFit(model()).solve(LM, DATA, mesh=MESH)),
        "many": told(vn.fit_many(starts(optax.adam(0.1)), DATA, 30, **many)),
        "solved": told(vn.fit_many(starts(), DATA, 30, solver=LM, mesh=MESH)),
    }
    # A callback may replace the model, by one of the mesh or of this process.
    for name, back in REPLACED.items():
        replaced = fit(callback=back, chunk=10)
        found[name] = told(replaced) | {"params": [float(replaced.best_loss)]}
    # The loss of a best of other data is lower.
    other = fit((X, 9 * X + 30), own=fit().trainer)
    found["other data"] = told(other) | {"params": [float(other.best_loss)]}
    step, info = trainer().step(DATA, mesh=MESH)
    losses = [info.loss.tolist(), step.step(DATA, mesh=MESH)[1].loss.tolist()]
    found["steps"] = {"loss": losses, "params": [], "told": "", "steps": 2}
    # What comes back belongs to each process: one may go on with it alone.
    inside.progress_bar.is_interactive = lambda: True
    result = fit(progress=True)
    if ONE_OF_TWO:
        many |= {"progress": True, "checkpoint": vn.Checkpoints(folder / "many")}
        for steps in 11, 30:
            resumed = vn.fit_many(starts(optax.adam(0.1)), DATA, steps, **many)
        assert told(resumed) == found["many"]
    if NUMBER == 0:
        assert np.isfinite(result.model(2.0))
        result.trainer.step(DATA)
    path = folder / f"saved-by-{NUMBER}"
    vn.save(path, fit(stream(), **split).trainer)
    assert path.exists() is (NUMBER == 0)
    return found


def stop_on_one(trainer, history):
    return NUMBER == 1 and len(history) >= 10


def fail_on_one(trainer, history):
    if NUMBER == 1 and len(history) >= 10:
        raise ZeroDivisionError("the dog ate it")


def interrupt_one(trainer, history):
    if NUMBER == 1 and len(history) == 10:
        os.kill(os.getpid(), signal.SIGINT)


def broken_on_one():
    for _ in range(6):
        yield DATA[0][SHARE], DATA[1][SHARE]
    if NUMBER == 1:
        raise OSError("the disk is gone")
    yield from [(DATA[0][SHARE], DATA[1][SHARE])] * 50


def terminate_one(trainer, history):
    if NUMBER == 1 and len(history) == 10:
        os.kill(os.getpid(), signal.SIGTERM)


def move_on_one(trainer, history):
    moved = eqx.tree_at(lambda m: m.slope, trainer.model, jnp.array(100.0))
    return trainer.replace(model=moved) if NUMBER == 1 else None


def quit_on_one(trainer, history):
    if NUMBER == 1 and len(history) >= 10:
        raise SystemExit(3)


class Twice(LineFit):
    def residuals(self, model, batch):
        return (1 + NUMBER) * super().residuals(model, batch)


def step(own=None, data=DATA):
    trainer_, info = (trainer() if own is None else own).step(data, mesh=MESH)
    return trainer_, info


def solve(data=DATA, own=None, rtol=1e-8, **options):
    own = LineFit(model()) if own is None else own
    solver = optx.LevenbergMarquardt(rtol=rtol, atol=1e-8)
    return own.solve(solver, data, mesh=MESH, **options)


def solve_many(own=None, data=DATA):
    own = starts() if own is None else own
    return vn.fit_many(own, data, 30, solver=LM, mesh=MESH)


OTHER = X, 2 * X + NUMBER
BROKEN = (DATA, (X, object()))[NUMBER]


def meetings(folder):
    """What one process calls, or is given, and the other is not."""
    first, _ = step()
    cases = {
        "step: data": lambda: step(data=OTHER),
        "step: start": lambda: step(trainer(slope=NUMBER / 2)),
        "step: code": lambda: step(trainer(Twice)),
        "step: the second": lambda: step(first, OTHER),
        "step: another": lambda: step((first, first.step(DATA)[0])[NUMBER]),
        "step: broken": lambda: step(data=BROKEN),
        "solve: data": lambda: solve(OTHER),
        "solve: start": lambda: solve(own=LineFit(model(NUMBER / 2))),
        "solve: code": lambda: solve(own=Twice(model())),
        "solve: solver": lambda: solve(rtol=10.0 ** (-8 - NUMBER)),
        "solve: steps": lambda: solve(max_steps=100 + NUMBER),
        "solve: broken": lambda: solve(BROKEN),
        "many: data": lambda: solve_many(data=OTHER),
        "many: start": lambda: solve_many(starts()[:: 1 - 2 * NUMBER]),
        "many: code": lambda: solve_many([Twice(model(slope)) for slope in SLOPES]),
        "many: broken": lambda: solve_many(data=BROKEN),
        "fit, step": (fit, step)[NUMBER],
        "solve, step": (solve, step)[NUMBER],
        "fit, many": (fit, solve_many)[NUMBER],
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    # What did not agree leaves nothing behind.
    assert np.isfinite(step()[1].loss)
    # One of the two does not come.
    if NUMBER == 0:
        inside.processes._TIMEOUT_SECONDS = 1
        try:
            fit()
        except vn.PeerError as error:
            found["absent"] = str(error)
    return found


def decisions(folder):
    """What one process decides, or gets wrong."""
    steps = {"chunk": 5, "steps": 5_000}
    checkpoints = lambda name: vn.Checkpoints(folder / name)
    taken = checkpoints("taken")
    if NUMBER == 0:
        taken.directory.mkdir()
        (taken.directory / "diary.txt").write_text("Dear diary")
    cases = {
        "callback": lambda: fit(callback=stop_on_one, **steps),
        "interrupt": lambda: fit(callback=interrupt_one, **steps),
        "terminate": lambda: fit(
            callback=terminate_one, checkpoint=checkpoints("told"), **steps
        ),
        "error": lambda: fit(callback=fail_on_one, **steps),
        "dry": lambda: fit(stream(10 + NUMBER)),
        "loader": lambda: fit(vn.Stream(broken_on_one())),
        "shares": lambda: fit(stream(share=slice(0, 16 - 8 * NUMBER))),
        "steps": lambda: fit(steps=30 + NUMBER),
        "data": lambda: fit((X, 2 * X + NUMBER)),
        "start": lambda: fit(own=trainer(slope=NUMBER / 2)),
        "code": lambda: fit(own=trainer(Twice)),
        "record": lambda: fit(record=("slope", "offset")[NUMBER]),
        "directory": lambda: fit(checkpoint=taken),
        "alone": lambda: fit(mesh=None, checkpoint=checkpoints(f"own-{NUMBER}")),
        "moved": lambda: fit(callback=move_on_one),
        "unknown": lambda: fit(record=("slope", "nothing")[NUMBER]),
        "quits": lambda: fit(callback=quit_on_one, **steps),
        "negative": lambda: fit(steps=30 - 31 * NUMBER),
        "elsewhere": lambda: fit(checkpoint=(None, checkpoints("once"))[NUMBER]),
    }
    # Once everything is written the fit passes it on, to whoever was there before.
    passed_on = []
    signal.signal(signal.SIGTERM, lambda *args: passed_on.append(args))
    found = {}
    for name, case in cases.items():
        try:
            found[name] = told(case())
        except (Exception, SystemExit) as error:
            end = getattr(error, "result", None)
            count = None if end is None else int(end.trainer.step_count)
            kind = type(error).__name__
            found[name] = {"told": f"{kind}: {error}", "steps": count}
    assert len(passed_on) == NUMBER
    return found


def long(folder):
    """To be killed at any moment, and begun again; then one that is left alone."""
    # Those that come after it find its programs there, and take steps sooner.
    jax.config.update("jax_compilation_cache_dir", f"{folder}-programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return {"killed": long_fit(folder / "killed"), "whole": long_fit(folder / "whole")}


def long_fit(folder):
    def tell(trainer, history):
        if NUMBER == 0:
            print(len(history), flush=True)

    result = fit(
        minibatches(),
        STEPS,
        own=noisy(),
        record=("slope", "grad_norm"),
        checkpoint=vn.Checkpoints(folder, every=10),
        callback=tell,
        chunk=5,
    )
    bad = [count.total for count in result.trainer.nan_report().values()]
    recorded = {n: column.tolist() for n, column in result.history.records.items()}
    return told(result) | {"bad": bad, "recorded": recorded}


if ONE_OF_TWO:
    each = answers, decisions, meetings, long
    scenarios = {scenario.__name__: scenario for scenario in each}
    scenario, folder = sys.argv[1], Path(sys.argv[4])
    found = scenarios[scenario](folder)
    (folder / f"{scenario}-{NUMBER}.json").write_text(json.dumps(found))
    print("done", flush=True)
