"""Groups of a sweep as tasks of Ray: on all machines of a cluster, and again if a worker dies.

    executor = lj.sweep.ray_executor(num_gpus=1)
    fitted = lj.sweep.fit(..., folder="/shared/sweep", save_every=50, executor=executor)

`pip install "lora-jax[ray]"`; scheduling, transport and retries are Ray's (https://docs.ray.io).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a worker's JAX has to have in common with the caller's for results to be the same.
CONFIG = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
)


class RayExecutor:
    """Runs tasks on Ray; made by `ray_executor`."""

    needs_folder = True

    def __init__(self, options: dict[str, Any]):
        self._options = options
        self._sent: tuple[Any, Any] = (None, None)  # what was put into the object store last

    def map(self, fn: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]:
        """The results, in the order of the tasks, which begin at once."""
        ray = _imported()
        if not ray.is_initialized():
            with warnings.catch_warnings():
                # Of JAX, about a fork; what Ray forks becomes another program at once.
                warnings.filterwarnings("ignore", r"os.fork\(\) was called", RuntimeWarning)
                ray.init()
        # An array as NumPy's lies in the object store once, for all workers of a machine to read.
        kind = type(jnp.zeros(()))
        ray.util.register_serializer(kind, serializer=np.asarray, deserializer=jnp.asarray)
        if self._sent[0] is not fn:
            self._sent = (fn, ray.put(fn))
        config = {name: getattr(jax.config, name) for name in CONFIG}
        call = ray.remote(**self._options)(_call)
        # In a list, the reference is for the worker to follow, once its JAX is like the caller's.
        waiting = [call.remote(config, [self._sent[1]], task) for task in tasks]
        return _results(ray, waiting)


def ray_executor(*, retries: int = 3, **options: Any) -> RayExecutor:
    """What has `lj.sweep.fit` train its groups on Ray.

    The folder of the sweep must be one that all machines see, at the same path. A group whose
    worker dies, for want of memory for instance or with its machine, begins elsewhere at its last
    save. What is given to `fit` and `plan` goes to the workers, so that functions may be whatever
    cloudpickle takes; `lora_jax`, and modules of your own, have to be installed there.

    Args:
      retries: how often a group may lose its worker; -1 for any number.
      options: those of `ray.remote` for a group, such as `num_cpus`, `num_gpus` and `memory`.

    Returns:
      The executor. Ray is started, or connected to, when it is first needed, unless `ray.init` was
      called before.

    Raises:
      ImportError: if Ray is not installed.
    """
    _imported()
    return RayExecutor({"max_retries": retries, **options})


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError('Ray is not installed; write pip install "lora-jax[ray]"') from error
    return ray


def _results(ray: Any, waiting: list[Any]) -> Iterator[Any]:
    try:
        for reference in waiting:
            yield ray.cloudpickle.loads(ray.get(reference))
    finally:  # also if one failed, or nobody wants the others any more
        for reference in waiting:
            ray.cancel(reference, force=True)


# In a worker.


def _call(config: dict[str, Any], sent: list[Any], task: Any) -> bytes:
    for name, value in config.items():
        jax.config.update(name, value)
    # As bytes, which the caller unpacks: arrays of its own, and none in memory that Ray may close.
    return _imported().cloudpickle.dumps(_fetched(sent[0])(task))


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> Callable[[Any], Any]:
    # The same object for the next task, which finds there what was compiled for this one.
    return _imported().get(reference)
