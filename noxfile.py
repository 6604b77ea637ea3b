"""The project's checks, each in an environment of its own.

`nox` runs all that must pass; `nox -s bench` and `nox -s examples` are on request.
"""

from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests_min", "tests"]

# Each worker has tests that follow each other, which share what they have compiled.
WORKERS = ("-n", "2", "--dist", "worksteal")

# Most of the time of a test is that of XLA, which need not optimise to show that the
# logic is right. What is marked `as_compiled` is compiled as it is for users.
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Where the library meets its dependencies: this is what the oldest of them are tried
# on. The rest is logic, which no version changes. Of long files, some tests each.
SEAMS = (
    # JAX and Equinox: trees, dtypes, keys, transformations, what compiles and when.
    "test_step.py",
    "test_promises.py",
    "test_window.py",
    "test_fit.py::test_a_fit_is_one_scan_by_hand",
    "test_fit.py::test_two_fits_are_one_to_the_bit",
    "test_nonfinite.py::test_an_error_that_says_where_and_when",
    "test_in_place.py::test_the_state_is_there_once",
    "test_retrace.py::test_a_step_compiles_anew_exactly_if_a_difference_is_told",
    "test_closures.py",
    "test_unroll.py::test_it_takes_the_steps_of_a_trainer",
    "test_unroll.py::test_gradients_through_one_rule_for_each_leaf",
    "test_unroll.py::test_many_scales_at_once",
    "test_many.py::test_each_is_as_it_were_alone",
    "test_mesh.py::test_a_fit_on_eight_devices",
    "test_mesh.py::test_a_mesh_of_which_the_compiler_asks_for_types",
    "test_mesh.py::test_large_leaves_are_split",
    "test_mesh.py::test_one_device_needs_no_collectives",
    "test_processes.py::test_what_one_decides_all_do",
    # Optax, to the bit; NumPyro, FlowJAX and Zodiax, which drive our optimisers.
    "test_partition.py",
    "test_transform.py",
    "test_optimiser.py",
    "test_map_optimisers.py",
    # Optimistix.
    "test_solve.py::test_as_by_hand",
    "test_solve.py::test_a_value_that_is_not_finite_is_told_and_never_kept",
    "test_many.py::test_a_solver_for_each",
    # Matfree, and the linear algebra of JAX.
    "test_low_rank.py",
    "test_curvature.py::test_gauss_newton_is_the_square_of_the_jacobian",
    "test_curvature.py::test_a_product_is_that_with_the_matrix",
    "test_projector.py::test_it_whitens_what_is_kept",
    "test_projector.py::test_it_goes_through_jit_and_vmap",
    # Orbax, and files of our own.
    "test_checkpoint.py::test_told_to_end",
    "test_checkpoint.py::test_in_two_parts",
    "test_checkpoint.py::test_the_newest_that_is_whole",
    "test_checkpoint.py::test_flipped_bits_in_large_arrays",
    "test_save.py",
    # Jaxtyping and beartype; tqdm; matplotlib.
    "test_bad_input.py",
    "test_fit.py::test_a_bar_that_says_that_it_compiles",
    "test_plot.py::test_every_call_without_axes_makes_a_figure",
)


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
    """Where the library meets its dependencies, with the oldest that are supported."""
    session.install(".[test]", "--constraint", "tests/lower-bounds.txt")
    run_tests(session, *(f"tests/{path}" for path in SEAMS))


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, the code blocks of the documentation among them.

    The examples run, with the same checks, while `docs` builds their pages.
    """
    session.install(".[test]")
    run_tests(session, "--ignore=tests/test_examples.py")


def run_tests(session: nox.Session, *selected: str) -> None:
    """Runs what is marked `as_compiled`, and all the rest with cheap compilation."""
    options = (*WORKERS, *selected, *session.posargs)
    session.run("pytest", "-m", "as_compiled", *options)
    # A flag that XLA no longer knows ends the process: then it compiles as it does.
    probe = ("python", "-c", "import jax; jax.devices()")
    env = {"XLA_FLAGS": CHEAP}
    try:
        session.run(*probe, env=env, silent=True)
    except CommandFailed:
        session.warn(f"XLA does not know these flags: {CHEAP}")
        env = {}
    session.run("pytest", "-m", "not as_compiled", *options, env=env)


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
