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
from jax._src import compiler, lru_cache  # for what has no public way

jax.config.update("jax_num_cpu_devices", 8)

CACHE = "JAX_COMPILATION_CACHE_DIR"
FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
COMPILED = "LORA_JAX_TESTS_COMPILED"  # the folder of the run, as its workers are told
QUICKLY = "jax_disable_most_optimizations"
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
# Of XLA's two emitters of loops the older one is the quicker; of late there is but one.
TWO_EMITTERS = jax.__version_info__ < (0, 11)
OLDER_EMITTER = ("xla_cpu_use_fusion_emitters", False)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what is compiled until the run is over, also for the commands that tests start.

    Compilation is most of a run, and many programs are met again: in another test, in the other
    worker, or in the process of a command that is run again. To write them takes 1.5 % of the time
    they compile in, so that even the smallest are kept.

    The commands of each worker have a folder for themselves, since JAX by itself does not write a
    program in one go, and another process could meet half of one. Whoever names a folder has it
    used for everything, and kept.
    """
    if CACHE in os.environ:
        return
    if COMPILED not in os.environ:
        made = tempfile.TemporaryDirectory(prefix="lora_jax-")
        config.add_cleanup(made.cleanup)
        os.environ[COMPILED] = made.name
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        folder = os.environ[COMPILED]
        os.environ.update({CACHE: f"{folder}/of-commands-{os.getpid()}", FROM: "0"})
        jax.config.update(CACHE.lower(), folder)
        jax.config.update(FROM.lower(), 0.0)


def put(self: lru_cache.LRUCache, key: str, program: bytes) -> None:
    """Writes a program in one go, unlike JAX's own."""
    with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as file:
        file.write(program)
    os.replace(file.name, self.path / f"{key}-cache")


lru_cache.LRUCache.put = put


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles in two fifths of the time where a test is marked `compiled_quickly`.

    XLA writes the loops of a program with the older of its two emitters, and LLVM then leaves them
    as they are: in particular, it contracts no product and sum into one rounding. So a test is not
    marked that claims equal bits of what two programs computed, or looks into a compiled program,
    or whose programs run long. Among others that are marked, `compiled_quickly(False)` excepts one.
    """
    marker = item.get_closest_marker("compiled_quickly")
    quickly = marker is not None and marker.args != (False,)
    if quickly == jax.config.values[QUICKLY]:
        return
    jax.clear_caches()  # which do not know in which way their programs were compiled
    jax.config.update(QUICKLY, quickly)
    # The commands that the test starts compile as it does.
    os.environ[QUICKLY.upper()] = str(int(quickly))
    if TWO_EMITTERS:
        os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} --{OLDER_EMITTER[0]}={not quickly}"


@functools.wraps(compiler.get_compile_options)
def compile_options(*args: Any, **kwargs: Any) -> Any:
    """JAX's own, and the emitter."""
    options = compile_options.__wrapped__(*args, **kwargs)
    if jax.config.values[QUICKLY] and TWO_EMITTERS:
        options.env_option_overrides += [OLDER_EMITTER]
    return options


compiler.get_compile_options = compile_options
