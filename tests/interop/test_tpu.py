"""The training step compiles ahead of time for a TPU topology, on a machine without a TPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Beside the environment and not in it: with libtpu importable, JAX looks for TPUs at every start.
LIBRARY = Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"

# In a process of its own: libtpu reads its environment once, when it is first used.
SCRIPT = """
import math
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import lora_jax as lj
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
mesh = Mesh(topology.devices, ("data",))
config = DecoderConfig(
    vocab_size=512, dim=512, mlp_dim=1024, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64,
    dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="nothing_saveable",
)
model, kernels = Decoder(config), r"layers/.*kernel"
tokens = jax.ShapeDtypeStruct((16, 129), jnp.int32)
params = jax.eval_shape(lambda t: model.init(jax.random.key(0), t)["params"], tokens)
base = jax.eval_shape(lambda p: lj.quantize(p, kernels, layout="b i o", block_size=32), params)
adapters = jax.eval_shape(
    lambda b: lj.init_adapters(jax.random.key(0), b, [lj.LoraRule(kernels, rank=8)]), base)
apply, tx = lj.adapt(model.apply), optax.adamw(1e-4)
rules = [(kernels, P(None, None, "data"))]

def step(adapters, opt_state, base, tokens):
    def loss_fn(adapters):
        logits = apply({"params": lj.combine(base, adapters)}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state, loss

everywhere = NamedSharding(mesh, P())
opt_state = jax.eval_shape(tx.init, adapters)
arguments = (adapters, opt_state, base, tokens)
placement = (
    lj.shardings(adapters, mesh, rules), jax.tree.map(lambda _: everywhere, opt_state),
    lj.shardings(base, mesh, rules), NamedSharding(mesh, P("data")),
)
program = jax.jit(step, in_shardings=placement).lower(*arguments).compile()

def share(tree, placement):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placement))
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)

print(
    program.memory_analysis().argument_size_in_bytes, share(arguments, placement),
    share(base["layers"], placement[2]["layers"]), program.as_text().count(" all-gather"),
)
"""


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu is for Linux on x86-64",
)
def test_compiles_for_sixteen_tpus() -> None:
    environment = {
        **os.environ,
        "TPU_LIBRARY_PATH": str(LIBRARY),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, expected, layers, gathers = map(int, done.stdout.split()[-4:])
    assert compiled == pytest.approx(expected, rel=0.02)
    # 9.4 million parameters in four bits over sixteen devices: 0.3 MB each. In bfloat16: 1.2 MB.
    assert layers < 400_000
    assert gathers > 0
