"""How much memory a model takes while it is read into 4 bits, against what it takes then.

    python experiments/loading/memory.py
    python experiments/loading/memory.py --stored float16 --dtype float32

A Llama of a billion random parameters is written into a temporary folder, 2 GB in four files (4 GB
of float32), and read by a process of its own. The peak is the largest resident size that the kernel
has seen (VmHWM, which is ru_maxrss; file pages count) less the size before anything was read, JAX's
backend having started; the largest tensor is as it lies in the files. What must hold is

    peak <= size of the model read + 1.5 * largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 21,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FILES = 4


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by its name in the files."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    narrow = width // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    found = {"model.embed_tokens": (CONFIG["vocab_size"], width)}
    for number in range(CONFIG["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    found |= {"model.norm": (width,), "lm_head": (CONFIG["vocab_size"], width)}
    return {f"{name}.weight": shape for name, shape in found.items()}


def write_folder(folder: Path, stored: str) -> None:
    """The model, as transformers would write it."""
    import jax.numpy as jnp
    import numpy as np
    import safetensors.numpy
    from tokenizers import Tokenizer, models

    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(2**24, np.float32)).astype(jnp.dtype(stored))
    names = list(shapes())
    index = {}
    for number in range(FILES):
        part = {}
        for name in names[len(names) * number // FILES : len(names) * (number + 1) // FILES]:
            shape = shapes()[name]
            part[name] = np.resize(np.roll(noise, rng.integers(noise.size)), shape)
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        safetensors.numpy.save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))


def status() -> dict[str, int]:
    """What the kernel says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}


def read(folder: Path, dtype: str) -> None:
    """Reads the folder, and prints what it took."""
    import jax
    import jax.numpy as jnp

    from lora_jax.formats import Quantization, gguf, hf, read_model  # noqa: F401 what read_model would import

    jax.block_until_ready(jnp.zeros(()))  # the backend's own threads and buffers
    before = status()
    began = time.perf_counter()
    checkpoint = read_model(folder, dtype=jnp.dtype(dtype), quantize=Quantization())
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "final": sum(x.nbytes for x in jax.tree.leaves(checkpoint.params)),
                "peak": status()["VmHWM"] - before["VmRSS"],
                "after": status()["VmRSS"] - before["VmRSS"],
                "file pages": status()["RssFile"] - before["RssFile"],
            }
        )
    )


def main() -> None:
    """Writes, reads in a process of its own, and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stored", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--read", type=Path, help="read this folder in this process, and no more")
    options = parser.parse_args()
    if options.read is not None:
        read(options.read, options.dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), options.stored)
        command = [sys.executable, __file__, "--read", name, "--dtype", options.dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        on_disk = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    item = 4 if options.stored == "float32" else 2
    largest = item * max(math.prod(shape) for shape in shapes().values())
    bound = found["final"] + 1.5 * largest
    print(f"{'on disk':16}{on_disk / MIB:10,.1f} MiB, {options.stored}")
    print(f"{'largest tensor':16}{largest / MIB:10,.1f} MiB")
    for name in ("final", "peak", "after", "file pages"):
        print(f"{name:16}{found[name] / MIB:10,.1f} MiB")
    print(f"{'bound':16}{bound / MIB:10,.1f} MiB")
    print(f"{'seconds':16}{found['seconds']:10}")
    if found["peak"] > bound:
        sys.exit(f"the peak is {(found['peak'] - bound) / MIB:,.1f} MiB above the bound")


if __name__ == "__main__":
    main()
