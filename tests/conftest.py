import jax
import pytest
from jaxtyping import install_import_hook

# Both precisions are tested from one process: float32 arrays are asked for by dtype.
jax.config.update("jax_enable_x64", True)
# What is said of several devices is tested on virtual ones.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--annotations",
        action="store_true",
        help="check every annotation in vernal at every call, private ones too",
    )


def pytest_configure(config):
    if config.getoption("--annotations"):
        install_import_hook("vernal", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Lets go of the programs of a file: a process may map only so many into memory."""
    yield
    jax.clear_caches()
