"""Solvers of Optimistix."""

from .problem import (
    REASONS as REASONS,
    End as End,
    Problem as Problem,
    Solver as Solver,
    Start as Start,
    checked_solver as checked_solver,
    find_bad as find_bad,
    is_suspect as is_suspect,
    progress_at as progress_at,
    run as run,
    run_solver as run_solver,
)
from .solve import SolveOptions as SolveOptions, solve as solve
