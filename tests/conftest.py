"""What all tests share: JAX on eight simulated CPU devices, and what has been compiled before.

The devices are for sharding tests; everything else lands on device 0, as it would on a laptop.
"""

import functools
import os
import tempfile
from typing import Any

# Set before JAX is imported, so that a machine with a GPU tests the same thing.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from jax._src import compiler  # no public way to set an option of XLA for some programs only

jax.config.update("jax_num_cpu_devices", 8)

CACHE = "JAX_COMPILATION_CACHE_DIR"
FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
QUICKLY = "jax_disable_most_optimizations"


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles in two fifths of the time where a test is marked `compiled_quickly`.

    XLA rewrites a program as ever, writes its loops with the older and quicker of its two emitters,
    and LLVM then leaves them as they are: in particular, it contracts no product and sum into one
    rounding. So a test that claims equal bits of two computations is not marked; nor is one whose
    programs run long.
    """
    quickly = item.get_closest_marker("compiled_quickly") is not None
    if quickly != jax.config.values[QUICKLY]:
        jax.clear_caches()  # which do not know in which way their programs were compiled
        jax.config.update(QUICKLY, quickly)


@functools.wraps(compiler.get_compile_options)
def compile_options(*args: Any, **kwargs: Any) -> Any:
    """JAX's own, with the older emitter where programs are compiled quickly."""
    options = compile_options.__wrapped__(*args, **kwargs)
    if jax.config.values[QUICKLY]:
        options.env_option_overrides += [("xla_cpu_use_fusion_emitters", False)]
    return options


if jax.__version_info__ < (0, 11):  # XLA has but one emitter since
    compiler.get_compile_options = compile_options
