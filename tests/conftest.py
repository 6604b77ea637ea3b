import sys
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# What the annotations say is checked at every call, inside the library too.
install_import_hook("vernal", "beartype.beartype")

# Both precisions are tested from one process: float32 arrays are asked for by dtype.
jax.config.update("jax_enable_x64", True)
# What is said of several devices is tested on virtual ones.
jax.config.update("jax_num_cpu_devices", 8)

# `import models`: in the import mode that these tests have, no folder is a package.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Lets go of the programs of a file: a process may map only so many into memory."""
    yield
    jax.clear_caches()
