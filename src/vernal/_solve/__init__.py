"""Solvers of Optimistix."""

from .box import is_lost
from .problem import (
    IS_OVER,
    REASONS,
    End,
    Problem,
    Solver,
    Start,
    checked_solver,
    find_bad,
    in_parameters,
    is_least_squares,
    is_suspect,
    progress_at,
    require_squares,
    run_solver,
)
from .rounds import Asked, Rounds
from .solve import SolveOptions, solve
from .whiten_again import can_whiten, whitened_without_signs
