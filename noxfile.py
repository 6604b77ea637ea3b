"""The project's checks, each in an environment of its own.

`nox` runs all that must pass; `nox -s bench` and `nox -s examples` are on request.
"""

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests_min", "tests"]


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
    # Faults are about logic alone, which no version of a dependency changes.
    names = ("examples", "docs", "faults")
    left_out = [f"--ignore=tests/test_{name}.py" for name in names]
    session.run("pytest", "-n", "2", *left_out, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, the code blocks of the documentation among them.

    The examples run, with the same checks, while `docs` builds their pages.
    """
    session.install(".[test]")
    left_out = "--ignore=tests/test_examples.py"
    session.run("pytest", "-n", "2", left_out, *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Runs the examples and renews the picture that the README shows."""
    session.install(".[examples]")
    names = ("enso", "nist", "telescope", "posterior", "digits", "nan_policy")
    for name in (*names, "network", "watching", "many_starts", "tuning", "pictures"):
        session.run("python", f"examples/{name}.py", "--output", "output")
    session.run("python", "examples/enso.py", "--output", "docs")


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory against hand-written loops, as a Markdown table."""
    session.install(".[test,examples]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
