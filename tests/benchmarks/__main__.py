"""All benchmarks, as one Markdown table: `python -m tests.benchmarks`."""

import jax

jax.config.update("jax_enable_x64", True)

from . import bench_eigen, bench_fit, bench_import, bench_partition  # noqa: E402

print("| measured | result | bound |")
print("|---|---|---|")
for module in (bench_fit, bench_partition, bench_eigen, bench_import):
    for row in module.rows():
        print(f"| {' | '.join(row)} |", flush=True)
