"""Programs that are alike to the byte are compiled once.

Tests of many files write the same small ones down: a sixth of all.
"""

from jax._src import compiler
from jax._src.interpreters import mlir

programs = {}
_compile = compiler.backend_compile_and_load


def install():
    compiler.backend_compile_and_load = compiled


def compiled(backend, module, devices, options, callbacks):
    if callbacks:  # which are the program's own
        return _compile(backend, module, devices, options, callbacks)
    key = mlir.module_to_bytecode(module), options.SerializeAsString(), tuple(devices)
    if key not in programs:
        programs[key] = _compile(backend, module, devices, options, callbacks)
    return programs[key]


def forget(most=0):
    """Lets go of all, if they are more than so many."""
    if len(programs) > most:
        programs.clear()
