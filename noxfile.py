"""The project's checks, each in an environment of its own.

`nox` runs all that must pass; `nox -s bench` and `nox -s examples` are on request.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests_min", "tests"]

# Each worker has tests that follow each other, which share what they have compiled.
WORKERS = ("-n", "2", "--dist", "worksteal")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and layout."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright: the source, and how complete the public types are."""
    session.install(".[types]")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "vernal", "--ignoreexternal")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, built strictly; the examples run while it is built."""
    session.install(".[docs]")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=quiet)


@nox.session
def tests_min(session: nox.Session) -> None:
    """The tests of the library with the oldest dependencies that are supported."""
    session.install(".[test]", "--constraint", "tests/lower-bounds.txt")
    # Agreement with Optax to the bit is that of programs as users compile them.
    to_the_bit = [f"tests/test_{name}.py" for name in ("partition", "transform")]
    session.run("pytest", *WORKERS, *to_the_bit, *session.posargs)
    # For the rest compilation is made cheap: it is `tests` that has the compiler as
    # users have it. The release is pinned here, so that it knows these of its flags.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    # Faults are about logic alone, which no version of a dependency changes.
    names = ("examples", "docs", "faults")
    left_out = [f"tests/test_{name}.py" for name in names] + to_the_bit
    ignored = [f"--ignore={path}" for path in left_out]
    env = {"XLA_FLAGS": flags}
    session.run("pytest", *WORKERS, *ignored, *session.posargs, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, the code blocks of the documentation among them.

    The examples run, with the same checks, while `docs` builds their pages.
    """
    session.install(".[test]")
    left_out = "--ignore=tests/test_examples.py"
    session.run("pytest", *WORKERS, left_out, *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Runs the examples and renews the picture that the README shows."""
    session.install(".[examples]")
    for path in sorted(Path("examples").glob("*.py")):
        session.run("python", path, "--output", "output")
    session.run("python", "examples/enso.py", "--output", "docs")


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory against hand-written loops, as a Markdown table."""
    session.install(".[test,examples]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
