"""Solvers of Optimistix."""

from .problem import (
    REASONS,
    End,
    Problem,
    Solver,
    Start,
    checked_solver,
    find_bad,
    is_suspect,
    run,
    run_solver,
)
from .solve import solve
