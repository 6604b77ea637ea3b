"""What several tests know of the inside of vernal: where it moves, this file changes.

Public behaviour is tested by public names; what is here is looked at, or replaced.
"""

import importlib
import importlib.util

from vernal._closure import Closure as Closure
from vernal._data.sources import as_source as as_source
from vernal._devices import processes as processes
from vernal._devices.placement import placement as placement
from vernal._fit import (
    one_trainer as one_trainer,
    progress_bar as progress_bar,
    remarks as remarks,
    run as run,
)
from vernal._fit.pace import Pace as Pace
from vernal._inference.expansion import around as around
from vernal._inference.propagate import run_propagate as run_propagate
from vernal._loop import blocks as blocks, small as small
from vernal._loop.chunk import run_chunk as run_chunk
from vernal._loop.single_step import run_step as run_step
from vernal._many import many_trainers as many_trainers
from vernal._many.mapped_chunk import run_many as run_many
from vernal._optimiser.transform import Transform as Transform
from vernal._pickling.code import digest_of as digest_of
from vernal._policy import any_non_finite as any_non_finite
from vernal._profile import plane as plane
from vernal._profile.conditional import run_points as run_points
from vernal._profile.search import search as search
from vernal._program import mapped_lapack as mapped_lapack, one_function as one_function
from vernal._program.host import equations as equations
from vernal._program.prepared import prepared as prepared
from vernal._solve import rounds as rounds
from vernal._step import prior_ends as prior_ends, stripped as stripped
from vernal._step.constrain import project as project
from vernal._step.diagnosis import bad_data as bad_data, diagnosed as diagnosed
from vernal._tree import leaf_sums as leaf_sums

# Modules whose names are those of functions, too; as of others, tests replace parts.
errors_of_many = importlib.import_module("vernal._many.errors")
rounds_of_many = importlib.import_module("vernal._many.rounds")
opt_state = importlib.import_module("vernal._step.opt_state")
origin = importlib.import_module("vernal._storage.origin")
reads = importlib.import_module("vernal._closure.reads")
save = importlib.import_module("vernal._storage.save")
solve_many = importlib.import_module("vernal._many.solve_many")

# What `monkeypatch.setattr` replaces by its name.
CHECKPOINT_FORMAT = "vernal._storage.checkpoint_store.FORMAT"
READ_ARRAYS = "vernal._storage.checkpointer.Checkpointer._read_arrays"

# The file of a module that runs without JAX.
ATOMIC = importlib.util.find_spec("vernal._storage.atomic").origin


def cache_size(program):
    """Counts the programs that are compiled for a function."""
    return sum(x._cache_size() for _, x in program._compiled.items())
