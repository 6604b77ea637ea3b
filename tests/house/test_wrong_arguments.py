"""A walk over every public function, with one argument wrong at a time.

Either the call works; or the error is raised by this library or by the user's own code,
and it names the argument. What JAX, Optax or NumPy say of their own arguments helps
nobody. The functions, and the names of their arguments, are found by introspection.
"""

import collections
import functools
import inspect
import itertools
import linecache
import re
import traceback
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest
from jax._src import traceback_util
from jaxtyping import _decorator

import vernal as vn
import vernal.plot
from models import GaussianFit, line, line_batch

pytestmark = pytest.mark.own_words

BATCH = (*line_batch(4), jnp.ones(4))
MODEL, KEY, SGD, EYE = line(), jax.random.key(0), optax.sgd(0.1), jnp.eye(2)


class Fit(GaussianFit):
    """A trainer of a user."""


TRAINER, OTHER = Fit(MODEL, SGD), Fit(line(0.1, 0.2), SGD)
RULES = vn.ParamOptimiser({"slope": SGD}, default=SGD)
PRIOR = vn.Normal(0.0, 1.0)
PROJECTOR = vn.EigenProjector.from_fisher(EYE, MODEL)
RESULT = TRAINER.fit(BATCH, 2, record="slope", progress=False)
SOLVER = optx.LevenbergMarquardt(1e-8, 1e-8)
FITTED = TRAINER.solve(SOLVER, BATCH).trainer
MANY = vn.fit_many([TRAINER, OTHER], BATCH, 2, progress=False)


def user_function(*args):
    return None


# As jaxtyping writes it into its messages.
WRITTEN = eqx.tree_pformat

# What is wrong nearly everywhere. A call that takes one of them anyway may. Neighbours
# are alike: a parameter that three functions have meets every second in each of them,
# every third if five have it, and every fourth if ten do.
WRONG = {
    "None": None,
    "an integer": 3,
    "zero": 0,
    "a negative number": -2,
    "a huge number": 10**30,
    "a float": 2.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a complex number": 1j,
    "a boolean": True,
    "text": "nothing of the kind",
    "no text": "",
    "bytes": b"bytes",
    "a dictionary": {"unknown": 1.0},
    "an empty dictionary": {},
    "a list": [1.0, "a"],
    "an empty list": [],
    "a tuple": (1, 2),
    "a set": {1},
    "a range": range(3),
    "a generator": (BATCH for _ in range(3)),
    "a function": user_function,
    "a function of nothing": lambda: None,
    "a class": Fit,
    "an object": object(),
    "a module": np,
    "a trainer": TRAINER,
    "a result": RESULT,
    "a model": MODEL,
    "a policy": vn.SkipStep(),
    "an optimiser": SGD,
    "a projector": PROJECTOR,
    "a key": KEY,
    "a path": Path("/nothing/of/the/kind"),
    "an array of objects": np.array([None, "a"], object),
    "an array of text": np.array(["a", "b"]),
    "an array of booleans": np.array([True, False]),
    "a masked array": np.ma.masked_array([1.0, 2.0], [True, False]),
    "an array without shape": jnp.asarray(1.0),
    "an empty array": jnp.zeros(0),
    "a vector": jnp.ones(3),
    "an array of rank 3": jnp.ones((2, 2, 2)),
    "integers": jnp.arange(2),
    "an array with NaN": jnp.asarray([1.0, jnp.nan]),
}
# These stand for the others within a tuple, a dictionary or a model.
WITHIN = (
    "None",
    "text",
    "an object",
    "a set",
    "a class",
    "a trainer",
    "an array of objects",
    "a masked array",
    "an array of rank 3",
    "an array with NaN",
)

# What is right, by the name of the parameter; and where it is another thing.
RIGHT = {
    "arrays": BATCH,
    "batch": BATCH,
    "blocks": {"slope": EYE[:1, :1]},
    "count": 3,
    "cov": EYE,
    "data": BATCH,
    "directory": "checkpoints",
    "errors": MODEL,
    "first": "slope",
    "fmat": EYE,
    "fn": lambda p: p.slope**2 + p.offset**2,
    "grads": MODEL,
    "history": RESULT,
    "index": 1,
    "key": KEY,
    "latent": jnp.ones(2),
    "like": {"a": 1.0},
    "loss": lambda model, batch: jnp.sum(model(batch[0]) ** 2),
    "lr": 0.1,
    "matrix": EYE,
    "matvec": lambda tree: tree,
    "model": MODEL,
    "n": 3,
    "new": MODEL,
    "old": MODEL,
    "optimiser": SGD,
    "optimisers": {"a": SGD},
    "owner": 0,
    "param_labels": {"a": "a"},
    "params": MODEL,
    "patience": 3,
    "path": "tree.vernal",
    "projector": PROJECTOR,
    "rank": 1,
    "residuals": lambda p: jnp.stack([p.slope, p.offset]),
    "rtol": 1e-3,
    "rules": {"slope": SGD, "offset": None},
    "scales": {"slope": 2.0},
    "selector": "slope",
    "size": 2,
    "vector": jnp.ones(2),
    "second": "offset",
    "solver": SOLVER,
    "source": [BATCH, BATCH],
    "start": 1,
    "state": RULES.init(MODEL),
    "step": 0,
    "steps": 2,
    "trainer": TRAINER,
    "trainers": [TRAINER, OTHER],
    "transforms": {"a": SGD},
    "tree": MODEL,
    "tx": SGD,
    "updates": MODEL,
    "value": 0.5,
    "x": jnp.linspace(0.0, 1.0, 4),
}
ELSEWHERE = {
    "EigenProjector.from_jacobian": {"jac": EYE},
    "History": {"steps": np.arange(2), "loss": np.ones(2)},
    "History.load": {"path": "history.vernal"},
    "History.save": {"path": "written.vernal"},
    "Normal": {"mean": 0.0, "std": 1.0},
    "Trainer": {"bounds": {"slope": (-9.0, 9.0)}, "priors": {"slope": PRIOR}},
    "Trainer.fit": {"progress": False},
    "eigen_projection": {"cov": None, "fmat": EYE},
    "fit": {"progress": False, "state": None},
    "Trainer.profile": {"name": "slope"},
    "map_optimisers": {"params": {"a": jnp.ones(())}},
    "plot.contour": {"trainer": FITTED},
    "plot.profile": {"profile": FITTED.profile(SOLVER, BATCH, "slope", [1.9, 2.1])},
    "plot.band": {"fn": lambda model: model(jnp.linspace(0.0, 1.0, 4))},
    "save": {"path": "written.vernal"},
}
INSTANCES = {
    "EigenProjector": PROJECTOR,
    "FitResult": RESULT,
    "History": RESULT.history,
    "ManyResult": MANY,
    "Minibatches": vn.Minibatches(BATCH, 2, key=KEY),
    "Normal": PRIOR,
    "ParamOptimiser": RULES,
    "Report": TRAINER.report(BATCH),
    "Stream": vn.Stream([BATCH] * 9),
    "Trainer": FITTED,
}
# What the library alone makes and calls: results and errors, and parts of a step.
MADE = {
    *("FitResult", "ManyResult", "EigenProjector", "Profile", "Report", "StopReason"),
}
ABSTRACT = {"Bijection", "NanPolicy", "StopCriterion"}
CALLED = {
    *("Minibatches.start", "Minibatches.next", "ParamOptimiser.count"),
    *("ParamOptimiser.index", "Trainer.transform_grads", "Trainer.constrain"),
}
# For these each new shape is compiled.
SLOW = {
    *("EigenProjector.from_matvec.params", "fit.data", "fit_many.data"),
    *("Trainer.intervals.batch", "Trainer.profile.batch", "plot.contour.batch"),
}
# `forget` takes nothing, and would only make the rest slow.
LEFT_OUT = MADE | ABSTRACT | CALLED | {"forget"}


def public():
    """Yields all functions, constructors and methods, by name."""
    for name, value in inspect.getmembers(vn):
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if not isinstance(value, type):
            yield name, value
        elif not issubclass(value, Exception | tuple) or name in INSTANCES:
            yield name, Fit if value is vn.Trainer else value
            yield from methods(name, INSTANCES.get(name))
    for name, value in inspect.getmembers(vernal.plot, inspect.isfunction):
        if value.__module__ == "vernal.plot" and not name.startswith("_"):
            yield f"plot.{name}", value


def methods(name, instance):
    for method in dir(getattr(vn, name)) if instance is not None else ():
        static = inspect.getattr_static(getattr(vn, name), method)
        # A function, or what Equinox makes of one.
        is_method = inspect.isroutine(static) or hasattr(static, "method")
        if is_method and not method.startswith("_"):
            yield f"{name}.{method}", getattr(instance, method)


TARGETS = {name: fn for name, fn in public() if name not in LEFT_OUT}
# The functions that have a parameter of this name.
OWNERS = collections.defaultdict(list)
for target, fn in TARGETS.items():
    for parameter in inspect.signature(fn).parameters:
        OWNERS[parameter].append(target)


def right(name):
    """Arguments with which the function works, by name."""
    special, given = ELSEWHERE.get(name, {}), {}
    for parameter in inspect.signature(TARGETS[name]).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = parameter.default
        other = RIGHT.get(parameter.name) if default is parameter.empty else default
        given[parameter.name] = special.get(parameter.name, other)
    return given


def with_one(value, wrong):
    """A container with one wrong thing in it, `None` for what is no container."""
    if isinstance(value, dict) and value:
        return value | {next(iter(value)): wrong}
    if type(value) in (tuple, list) and value:
        return type(value)([wrong, *value[1:]])
    if value is MODEL:
        return eqx.tree_at(lambda model: model.slope, value, wrong)
    return None


def compiles(wrong):
    """Whether it is an array, so that a program is compiled for its shape."""
    if inspect.isgenerator(wrong):
        return False
    leaves = jax.tree.leaves(wrong) or [0.0]
    return any(isinstance(leaf, jax.Array | float) for leaf in leaves)


def variations(name):
    """Yields what is wrong, of which parameters, and the arguments with it."""
    given = right(name)
    for parameter, value in given.items():
        is_slow = f"{name}.{parameter}" in SLOW
        owners = OWNERS[parameter]
        step = 1 + sum(len(owners) > least for least in (2, 4, 9))
        for what, wrong in [*WRONG.items()][owners.index(name) % step :: step]:
            if not (is_slow and compiles(wrong)):
                yield what, (parameter,), given | {parameter: wrong}
        for what in WITHIN:
            tree = with_one(value, WRONG[what])
            if tree is not None and not (is_slow and compiles(WRONG[what])):
                yield f"{what} within", (parameter,), given | {parameter: tree}
    names = list(given)
    for pair in itertools.pairwise(names):
        swapped = dict(zip(pair, (given[n] for n in pair[::-1]), strict=True))
        yield "two that are swapped", pair, given | swapped
    for parameter in names:
        rest = {n: value for n, value in given.items() if n != parameter}
        yield "one that is missing", (parameter,), rest
    yield "one too many", ("nonsense",), given | {"nonsense": 1}


# What Python says, or `inspect`, of arguments that do not fit a signature.
SIGNATURE = re.compile(
    r"([\w.<>]+\(\) )?(missing (\d+|a) required|got an unexpected keyword)"
)
OWN = {__name__.split(".")[0], "models"}


def line_of(frame, number):
    return linecache.getline(frame.f_code.co_filename, number).strip()


def fault(error, names):
    """Says what is wrong with an error; nothing if it helps."""
    frames = [*traceback.walk_tb(error.__traceback__)][1:]
    packages = [
        frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in frames
    ]
    users = [index for index, package in enumerate(packages) if package in OWN]
    if users and "vernal" not in packages[users[-1] :]:
        return None  # It is in the user's own code, which was called.
    if SIGNATURE.match(str(error)) and re.search(rf"'{names[0]}'", str(error)):
        return None
    if packages and packages[-1] not in ("vernal", "beartype", "jaxtyping"):
        return f"raised by {packages[-1]} ({frames[-1][0].f_code.co_name})"
    line = line_of(*frames[-1]) if frames else ""
    if packages[-1:] == ["vernal"] and not line.startswith("raise"):
        return f"not raised on purpose: {line}"
    if not re.search("|".join(rf"\b{name}\b" for name in names), str(error)):
        return "names no argument"
    return None


@pytest.fixture(autouse=True, scope="module")
def somewhere(tmp_path_factory):
    """A folder with the files that are read; and errors with all their frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("somewhere"))
        patch.setattr(eqx.debug, "breakpoint_if", lambda *args, **options: None)
        # For each message jaxtyping writes down all that was given, and makes functions
        # that find the wrong argument. Both take long.
        patch.setattr(eqx, "tree_pformat", lambda tree, **options: type(tree).__name__)
        for name in ("_make_fn_with_signature", "_apply_typechecker"):
            patch.setattr(_decorator, name, functools.cache(getattr(_decorator, name)))
        # JAX raises errors as they are, and looks through the stack nevertheless.
        patch.setattr(traceback_util, "_is_under_reraiser", lambda error: True)
        vn.save("tree.vernal", {"a": 1.0})
        RESULT.history.save("history.vernal")
        before = jax.config.jax_traceback_filtering
        jax.config.update("jax_traceback_filtering", "off")
        yield
        jax.config.update("jax_traceback_filtering", before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_one_argument_is_wrong(name):
    fn, given, faults = TARGETS[name], right(name), []
    fn(**given)
    # Of what is given together with a wrong argument, an error may name that too, and
    # the methods of a user's class.
    also = [*given, "rules", r"Fit\.\w+"]
    for what, names, arguments in variations(name):
        try:
            fn(**arguments)
        except Exception as error:
            if told := fault(error, [*names, *also]):
                faults.append(f"{what} as {names}: {told}: {error!r:.200}")
    vernal.plot.plt.close("all")
    assert not faults, "\n".join(faults)


def test_what_is_given_can_be_written_into_a_message():
    for given in (*WRONG.values(), *RIGHT.values(), *INSTANCES.values()):
        assert WRITTEN(given)


def test_there_is_something_to_walk():
    assert len(TARGETS) > 60
    assert not LEFT_OUT - {name for name, _ in public()}
    cases = [case for name in TARGETS for case in variations(name)]
    assert len(cases) > 7_000
    assert {what for what, *_ in cases} >= set(WRONG)
