import sys
from pathlib import Path

import jax

# Both precisions are tested from one process: float32 arrays are asked for by dtype.
jax.config.update("jax_enable_x64", True)

# `import models`: in the import mode that these tests have, no folder is a package.
sys.path.append(str(Path(__file__).parent))
