"""What `import vernal` adds to importing what it stands on."""

import json
import subprocess
import sys

SCRIPT = """
import json, time
import jax, equinox, optax, optimistix
start = time.perf_counter()
import vernal
print(json.dumps(time.perf_counter() - start))
"""


def seconds(rounds: int = 5) -> float:
    """The lowest of several fresh processes."""
    run = lambda: subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    return min(json.loads(run().stdout) for _ in range(rounds))


def rows() -> list[tuple[str, str, str]]:
    """The table's row: what, figure, bound."""
    what = "`import vernal`, beyond jax, equinox, optax and optimistix"
    return [(what, f"{seconds():.2f} s", "0.4 s")]


if __name__ == "__main__":
    print(rows())
