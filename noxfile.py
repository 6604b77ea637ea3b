"""The project's checks, each in an environment of its own.

`nox` runs all that must pass; `nox -s bench` and `nox -s examples` are on request.
"""

from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "docs", "tests_min", "tests"]

Environment = dict[str, str] | None

# Each worker has tests that follow each other, which share what they have compiled.
WORKERS = ("-n", "2", "--dist", "worksteal")

# Most of the time of a test is that of XLA, which need not optimise to show that the
# logic is right. What is marked `as_compiled` is compiled as it is for users.
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Where the library meets its dependencies: this is what the oldest of them are tried
# on. The rest is logic, which no version changes. Of long files, some tests each.
SEAMS = tuple(
    f"tests/test_{name}"
    for name in (
        # JAX and Equinox: trees, dtypes, keys, transformations, what compiles and when.
        "step.py",
        "promises.py",
        "window.py",
        "fit.py::test_a_fit_is_one_scan_by_hand",
        "fit.py::test_two_fits_are_one_to_the_bit",
        "nonfinite.py::test_an_error_that_says_where_and_when",
        "in_place.py::test_the_state_is_there_once",
        "retrace.py::test_a_fit_compiles_anew_exactly_if_a_difference_is_told",
        "retrace.py::test_a_function_compiles_anew_exactly_if_a_difference_is_told",
        "closures.py",
        "pickle.py::test_optimisers_and_their_trainers",
        "pickle.py::test_models",
        "programs.py::test_cells_that_are_run_again",
        "programs.py::test_two_models_share_a_helper_that_jax_keeps",
        "programs.py::test_forget_reaches_what_jax_keeps",
        "modes.py::test_hessians",
        "modes.py::test_functions",
        "messages.py::test_a_traceback_shows_the_users_frames_and_few_others",
        "messages.py::test_an_array_in_a_static_field_is_named",
        "x64.py::test_made_in_float32_and_used_in_float64",
        "unroll.py::test_it_ends_where_a_fit_ends_and_a_fit_goes_on_from_there",
        "unroll.py::test_gradients_through_one_rule_for_each_leaf",
        "unroll.py::test_many_scales_at_once",
        "many.py::test_each_is_as_it_were_alone",
        "mesh.py::test_a_fit_on_eight_devices",
        "mesh.py::test_a_mesh_of_which_the_compiler_asks_for_types",
        "mesh.py::test_large_leaves_are_split",
        "mesh.py::test_one_device_needs_no_collectives",
        "processes.py::test_what_one_decides_all_do",
        # Optax; NumPyro, FlowJAX and Zodiax, which drive our optimisers.
        "optimiser.py",
        "map_optimisers.py",
        "hyperparams.py::test_the_script_has_its_rates",
        "messages.py::test_rules_of_masked_leaves_have_nothing_to_do",
        "messages.py::test_optax_maps_the_parts_of_a_state_that_are_like_parameters",
        # Optimistix.
        "solve.py::test_as_by_hand",
        "solve.py::test_a_value_that_is_not_finite_is_told_and_never_kept",
        "many.py::test_a_solver_for_each",
        "rewhiten.py::test_the_rounds_compile_once_and_draw_the_same_numbers",
        "solver_modes.py::test_one_mode_is_enough",
        "solver_modes.py::test_dogleg_of_many",
        "solver_modes.py::test_an_error_of_one_member_is_its_own",
        # Matfree, and the linear algebra of JAX.
        "low_rank.py",
        "edm.py::test_of_residuals",
        "edm.py::test_of_very_many_parameters",
        "jacobian.py::test_errors_are_those_of_the_singular_values",
        "jacobian.py::test_under_jit_and_vmap",
        "curvature.py::test_gauss_newton_is_the_square_of_the_jacobian",
        "curvature.py::test_a_product_is_that_with_the_matrix",
        "projector.py::test_it_whitens_what_is_kept",
        "projector.py::test_it_goes_through_jit_and_vmap",
        # Orbax, and files of our own.
        "checkpoint.py::test_told_to_end",
        "checkpoint.py::test_in_two_parts",
        "checkpoint.py::test_the_newest_that_is_whole",
        "checkpoint.py::test_flipped_bits_in_large_arrays",
        "save.py",
        # Jaxtyping and beartype; tqdm; matplotlib.
        "bad_input.py",
        "fit.py::test_a_bar_that_says_that_it_compiles",
        "plot.py::test_every_call_without_axes_makes_a_figure",
    )
)
# Agreement with Optax to the bit is that of programs as users compile them.
TO_THE_BIT = ("tests/test_partition.py", "tests/test_transform.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and layout."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright: the source. Pyright and mypy: users' code, and what vernal exports."""
    session.install(".[types]")
    session.run("pyright")
    session.run("python", "tests/typing/check.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, built strictly; the examples that have changed run while it is built.

    Editable, so that `nox -R -s docs`, which installs nothing again, is of the source.
    """
    session.install("--editable", ".[docs]")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=quiet)


@nox.session
def tests_min(session: nox.Session) -> None:
    """Where the library meets its dependencies, with the oldest that are supported."""
    session.install(".[test]", "--constraint", "tests/lower-bounds.txt")
    run_tests(session, *TO_THE_BIT)
    run_tests(session, *SEAMS, env=cheap(session))


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, the code blocks of the documentation among them.

    What is not compiled as for users has each annotation of the library checked, at
    every call. The examples run, with the same checks, when `docs` builds the site.
    """
    session.install(".[test]")
    left_out = "--ignore=tests/test_examples.py"
    quick = cheap(session)
    run_tests(session, left_out, "-m", "as_compiled")
    run_tests(session, left_out, "-m", "own_words and not as_compiled", env=quick)
    rest = "not own_words and not as_compiled"
    run_tests(session, left_out, "--annotations", "-m", rest, env=quick)


def run_tests(session: nox.Session, *options: str, env: Environment = None) -> None:
    # What is asked for (`-- -k name`) may be in one of two runs alone: 5 is none found.
    codes = [0, 5] if session.posargs else [0]
    options = (*WORKERS, *options, *session.posargs)
    session.run("pytest", *options, env=env, success_codes=codes)


def cheap(session: nox.Session) -> Environment:
    """The environment in which XLA compiles cheaply, if it still knows the flags.

    A flag that it does not know would end the process.
    """
    env = {"XLA_FLAGS": CHEAP}
    try:
        session.run("python", "-c", "import jax; jax.devices()", env=env, silent=True)
    except CommandFailed:
        session.warn(f"XLA does not know all of {CHEAP}: it compiles as it does.")
        return None
    return env


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
