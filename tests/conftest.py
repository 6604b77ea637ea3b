import contextlib
import functools
import gc
import itertools
import re
import signal
from pathlib import Path

import jax
import optax
import pytest
from jax._src import traceback_util
from jax._src.interpreters import mlir
from jax._src.lib import _jax

import alike
import annotations

alike.install()

# Programs are many objects that live long. To look through them takes a tenth of the
# time by default. The tests of what is let go of collect by themselves.
gc.set_threshold(50_000, 20, 20)

# A shell has what it starts in the background ignore Ctrl-C, which some tests press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Both precisions are tested from one process: float32 arrays are asked for by dtype.
jax.config.update("jax_enable_x64", True)
# There is no folder for it, and yet JAX would find each program's name there.
jax.config.update("jax_enable_compilation_cache", False)
# What is said of several devices is tested on virtual ones.
jax.config.update("jax_num_cpu_devices", 8)

# To make a context, in which JAX writes a program down, takes a quarter of the time of
# a small one. So one is kept, for all but those that are written while another is.
make_context = mlir.make_ir_context
kept_context = functools.cache(make_context)


def context():
    try:
        return make_context() if mlir.ir.Context.current else kept_context()
    except ValueError:  # there is none
        return kept_context()


mlir.make_ir_context = context


# At each error JAX asks of each file on the stack whether it is one of its own, which
# takes as long as a small fit.
traceback_util.include_filename = functools.cache(traceback_util.include_filename)


def let_promote(function):
    """Lets a function of Optax promote dtypes where the tests refuse it."""

    @functools.wraps(function)
    def promoting(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoting


# Adam and its kin raise a float to the power of an integer.
optax.tree.bias_correction = let_promote(optax.tree.bias_correction)

# Of some 65,000 that Linux allows: with so many a process takes two gigabytes.
MOST_MAPS = 16_000


def pytest_addoption(parser):
    parser.addoption(
        "--annotations",
        action="store_true",
        help="check every annotation in vernal at every call, private ones too",
    )
    parser.addoption(
        "--every-other",
        action="store_true",
        help="of a test over several tables, run every other combination, or fewer",
    )


def pytest_ignore_collect(collection_path, config):
    """Where `-m` asks for marks, a file without them need not be imported."""
    asked = re.sub(r"\bnot \w+", "", config.option.markexpr)
    marks = () if "or" in asked.split() else re.findall(r"\b(?!and\b)\w+", asked)
    if collection_path.suffix == ".py" and marks:
        text = collection_path.read_text(encoding="utf-8")
        if not all(f"mark.{mark}" in text for mark in marks):
            return True
    return None


def pytest_configure(config):
    if config.getoption("--annotations"):
        annotations.install()
        # To keep the stack of each operation takes a thirtieth of the time. JAX shows
        # it beside an error in a transformation; vernal asks for none.
        _jax.set_tracebacks_enabled(False)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--every-other"):
        return
    seen, places = {}, {}
    for item in items:
        tables = seen.setdefault(getattr(item, "function", item), {})
        places[item] = [
            (rows := tables.setdefault(names, {})).setdefault(row, len(rows))
            for names, row in rows_of(item)
        ]

    def is_kept(item):
        """Each row of a table stays, and of three tables each pair of rows."""
        tables = seen[getattr(item, "function", item)].values()
        sizes = [len(rows) for rows in tables if len(rows) > 1]
        return len(sizes) < 2 or sum(places[item]) % min(sizes) == 0

    config.hook.pytest_deselected(items=[x for x in items if not is_kept(x)])
    items[:] = filter(is_kept, items)


def rows_of(item):
    """Yields the names of each of a test's tables, and which row of it this is."""
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        if isinstance(names, str):
            names = names.replace(" ", "").split(",")
        yield tuple(names), tuple(id(item.callspec.params[name]) for name in names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish():
    """What is imported stays: there is nothing to collect of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Nothing promotes dtypes or ranks by accident, on any thread of a test."""
    marks = {mark.name for mark in item.iter_markers()}
    dtypes = "standard" if "loose_dtypes" in marks else "strict"
    ranks = "allow" if "loose_ranks" in marks else "raise"
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)
    return (yield)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Lets go of programs in time: a process may map only so many into memory."""
    yield
    alike.forget(most=1_000)
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def own_words(request):
    """Those tests see what vernal says of a wrong argument, not beartype."""
    is_marked = request.node.get_closest_marker("own_words") is not None
    with annotations.unchecked() if is_marked else contextlib.nullcontext():
        yield


@pytest.fixture
def seldom_explained(monkeypatch):
    """One bad fit in many is explained: for each, programs are compiled."""
    import inside  # the annotations are to be checked before vernal is imported

    explain, seen = inside.remarks.diagnosed, itertools.count()

    def sometimes(*args):
        return inside.remarks.Diagnosis() if next(seen) % 40 else explain(*args)

    monkeypatch.setattr(inside.remarks, "diagnosed", sometimes)
