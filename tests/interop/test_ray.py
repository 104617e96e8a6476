"""Sweeps on Ray: to the last bit what they are here, also where a worker is killed."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import ray
import sweep_resume_check
from sweep_resume_check import batches_of, outcome, sweep

import lora_jax as lj

# JAX warns of every fork; what Ray forks becomes another program at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """A machine of two CPUs, whose workers find the modules of the tests."""
    paths = [str(Path(sweep_resume_check.__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": env},
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class Deadly(sweep_resume_check.Positioned):
    """Batches at whose tenth the worker kills itself, the first time; each draw is noted."""

    def __init__(self, data, folder):
        super().__init__(data)
        self.folder = folder

    def __next__(self):
        if self.next == 10 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        batch = super().__next__()
        with (self.folder / "drawn").open("a") as file:
            file.write(".")
        return batch


def test_a_group_whose_worker_is_killed_goes_on_from_its_last_save(tmp_path):
    batches = batches_of("own")
    expected = sweep(batches)

    def deadly(run):
        return Deadly(batches(run).data, tmp_path)

    executor = lj.sweep.ray_executor(retries=1)
    found = sweep(deadly, folder=tmp_path / "sweep", save_every=3, executor=executor)
    assert outcome(found) == outcome(expected)
    assert (tmp_path / "killed").exists()
    # Two runs draw again what they drew since the last save.
    most = sum(x.step for x in found) + 2 * 3 + 2
    assert len((tmp_path / "drawn").read_text()) <= most


def test_a_folder_is_asked_for():
    executor = lj.sweep.ray_executor()
    with pytest.raises(ValueError, match="there is no folder; give one that all machines share"):
        sweep(batches_of("same"), executor=executor)


def test_functions_can_be_sent_once_they_have_been_used():
    """An adapted function, which keeps its traces, and what else a loss is made of."""
    key, w = jax.random.key(0), jax.numpy.ones((64, 64))
    base, apply = lj.quantize({"kernel": w}, "kernel"), lj.adapt(lambda p, x: x @ p["kernel"])
    loss = jax.jit(lambda x: apply(base, x).sum() + jax.random.uniform(key))
    apply(base, w)
    expected = loss(w)
    sent = ray.cloudpickle.loads(ray.cloudpickle.dumps((loss, apply)))
    np.testing.assert_array_equal(sent[0](w), expected)
    np.testing.assert_array_equal(sent[1](base, w), apply(base, w))
