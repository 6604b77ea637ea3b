"""Scripts in processes of their own that begin with libraries imported.

To import it takes longer than most of what they do. Only a process that has not yet
started JAX is forked.
"""

import atexit
import importlib.metadata
import multiprocessing
import os
import runpy
import sys

_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = ["jax", "optax", "orbax.checkpoint"]
# Optimistix before 0.1 starts JAX when it is imported.
if not importlib.metadata.version("optimistix").startswith("0.0."):
    _IMPORTED += ["optimistix", "vernal"]
_FORKS.set_forkserver_preload(_IMPORTED)


def started(script, *args, log):
    """Returns the process of `python script args`, which writes to the file `log`."""
    log.write_bytes(b"")  # of one before
    process = _FORKS.Process(target=_run, args=(str(script), args, str(log)))
    process.start()
    return process


def _run(script, args, log):
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # `multiprocessing` leaves these out
        atexit._run_exitfuncs()
