"""What all tests share: JAX on eight simulated CPU devices, and what has been compiled before.

The devices are for sharding tests; everything else lands on device 0, as it would on a laptop.
"""

import os
import tempfile

# Set before JAX is imported, so that a machine with a GPU tests the same thing.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

CACHE = "JAX_COMPILATION_CACHE_DIR"
FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what is compiled until the run is over, also for the commands that tests start.

    Compilation is four fifths of a run, and many programs are met again: in another test, or in the
    process of a command that is run again. To write them takes 1.5 % of the time they compile in,
    so that even the smallest are kept.

    Each of several workers has a folder for itself, since JAX does not write a program in one go,
    and another process could meet half of one. Whoever names a folder has it used, and kept.
    """
    distributes = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if distributes or CACHE in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="lora_jax-")
    config.add_cleanup(folder.cleanup)
    os.environ.update({CACHE: folder.name, FROM: "0"})
    jax.config.update(CACHE.lower(), folder.name)
    jax.config.update(FROM.lower(), 0.0)
