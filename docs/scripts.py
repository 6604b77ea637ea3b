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
import warnings

# Pictures go into files.
os.environ.setdefault("MPLBACKEND", "Agg")
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = ["jax", "optax", "orbax.checkpoint", "matplotlib.pyplot"]
# Optimistix before 0.1 starts JAX when it is imported.
if not importlib.metadata.version("optimistix").startswith("0.0."):
    _IMPORTED += ["optimistix", "vernal"]
_FORKS.set_forkserver_preload(_IMPORTED)


def started(script, *args, log, errors=None, strict=False):
    """Returns the process of `python script args`, which writes to the file `log`.

    Its errors go there too, unless they have a file. Strict, a warning is an error.
    """
    files = str(log), str(errors or log)
    for file in files:
        open(file, "wb").close()  # of one before
    process = _FORKS.Process(target=_run, args=(str(script), args, files, strict))
    process.start()
    return process


def _run(script, args, files, strict):
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    if strict:
        warnings.simplefilter("error")
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:  # `multiprocessing` leaves these out
        atexit._run_exitfuncs()
