"""The project's checks, each in an environment of its own.

`nox` runs all that must pass; `nox -s bench` and `nox -s examples` are on request.
"""

import os
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests_min", "tests"]

# As pip does. Otherwise a module is compiled at its first import, where its author's
# mistakes would be warnings.
os.environ.setdefault("UV_COMPILE_BYTECODE", "1")

# The threads of OpenBLAS wait for each other busily, on small matrices for most of the
# time, which the other worker needs.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}

# Each worker has tests that follow each other, which share what they have compiled.
WORKERS = ("-n", "2", "--dist", "worksteal", "--durations", "30")

# Most of the time of a test is that of XLA, which need not optimise to show that the
# logic is right, nor split a program among threads: the other worker needs them. What
# is marked `as_compiled` is compiled as it is for users.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

# An operation runs on the thread that asks for it: the other worker needs the core.
AT_ONCE = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}

# An example computes more than a test, so that some optimisation pays.
LESS = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and layout. Import-linter: no folder imports from a higher floor."""
    session.install("ruff", "import-linter")
    session.run("ruff", "check", "--no-cache", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """Pyright: the source. Pyright and mypy: users' code, and what vernal exports."""
    # Checkers read the packages and import none of them.
    session.install(".[types]", env={"UV_COMPILE_BYTECODE": "0"})
    session.run("python", "tests/typing/check.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, built strictly; the examples that have changed run while it is built.

    Editable, so that `nox -R -s docs`, which installs nothing again, is of the source.
    """
    session.install("--editable", ".[docs]")
    env = ONE_THREAD | {"NO_MKDOCS_2_WARNING": "1"} | optimised(session, LESS)
    session.run("mkdocs", "build", "--strict", *session.posargs, env=env)


@nox.session
def tests_min(session: nox.Session) -> None:
    """Where the library meets its dependencies, with the oldest that are supported.

    What only their compiler could change is not asked: all is compiled cheaply.
    """
    session.install(".[test]", "--constraint", "tests/lower-bounds.txt")
    quick = optimised(session, CHEAP) | AT_ONCE
    run_tests(session, "-m", "seams", "-k", "not optimistic_adam", **quick)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, the code blocks of the documentation among them.

    What is not compiled as for users has each annotation of the library checked, at
    every call. The examples run, with the same checks, when `docs` builds the site.
    """
    session.install(".[test]")
    left_out = "--ignore=tests/house/test_examples.py"
    quick = optimised(session, CHEAP) | AT_ONCE
    run_tests(session, left_out, "-m", "as_compiled")
    run_tests(session, left_out, "--annotations", "-m", "not as_compiled", **quick)


def run_tests(session: nox.Session, *options: str, **env: str) -> None:
    # What is asked for (`-- -k name`) may be in one of two runs alone: 5 is none found.
    codes = [0, 5] if session.posargs else [0]
    # All combinations of what a test varies would take two minutes more.
    thin = [] if session.posargs else ["--every-other"]
    options = (*WORKERS, *thin, *options, *session.posargs)
    session.run("pytest", *options, env=ONE_THREAD | env, success_codes=codes)


def optimised(session: nox.Session, flags: str) -> dict[str, str]:
    """The environment in which XLA optimises less, by those flags that it knows."""
    if not knows(session, flags):
        flags = " ".join(flag for flag in flags.split() if knows(session, flag))
    # Programs do not name the lines that they come from.
    return {"XLA_FLAGS": flags, "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}


def knows(session: nox.Session, flags: str) -> bool:
    """Whether XLA knows all these flags. It ends a process that has another."""
    start, env = "import jax; jax.devices()", {"XLA_FLAGS": flags}
    try:
        session.run("python", "-c", start, env=env, silent=True)
    except CommandFailed:
        return False
    return True


@nox.session
def examples(session: nox.Session) -> None:
    """Runs the examples and renews the picture that the README shows."""
    session.install(".[examples]")
    for path in sorted(Path("examples").glob("*.py")):
        session.run("python", path, "--output", "output")
    session.run("python", "examples/enso.py", "--output", "docs")


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory against programs by hand; writes docs/benchmarks.md.

    With the names of works (`-- light-curve-20`) it prints these alone.
    """
    session.install(".[bench]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
