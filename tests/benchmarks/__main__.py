"""All benchmarks, as one Markdown table: `python -m tests.benchmarks`."""

import jax

jax.config.update("jax_enable_x64", True)

from . import (  # noqa: E402
    bench_checkpoint,
    bench_compile,
    bench_curvature,
    bench_eigen,
    bench_fit,
    bench_history,
    bench_import,
    bench_many,
    bench_memory,
    bench_mesh,
    bench_partition,
    bench_programs,
    bench_solve,
    bench_step,
    bench_telescope,
)

MODULES = (
    bench_fit,
    bench_compile,
    bench_step,
    bench_history,
    bench_partition,
    bench_eigen,
    bench_curvature,
    bench_solve,
    bench_telescope,
    bench_checkpoint,
    bench_many,
    bench_mesh,
    bench_programs,
    bench_memory,
    bench_import,
)

print("| measured | result | bound |")
print("|---|---|---|")
for module in MODULES:
    for row in module.rows():
        print(f"| {' | '.join(row)} |", flush=True)
