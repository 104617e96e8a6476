"""How much memory a model takes while it is read into 4 bits, or written in another form.

    python experiments/loading/memory.py
    python experiments/loading/memory.py --stored float16 --dtype float32
    python experiments/loading/memory.py --convert
    python experiments/loading/memory.py --convert --adapter --base nf4

A Llama of a billion random parameters is written into a temporary folder, 2 GB in four files (4 GB
of float32), and read by a process of its own. The peak is the largest resident size that the kernel
has seen (VmHWM, which is ru_maxrss; file pages count) less the size before anything was read, JAX's
backend having started; the largest tensor is as it lies in the files. What must hold is

    peak <= size of the model read + 1.5 * largest tensor.

`lora-jax convert` (`--convert`) writes the model into another folder, or merges an adapter of all
kernels in the layers (`--adapter`), and keeps nothing: there the model read has size zero.
Merging adds the adapter twice, as it is read and stacked, and four float32 copies of a kernel.
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


def write_adapter(folder: Path, model: Path) -> None:
    """An adapter of rank 16 for every kernel in the layers, as PEFT has it."""
    import jax

    import lora_jax as lj
    from lora_jax.formats.outline import read_outline
    from lora_jax.formats.peft import write_peft
    from lora_jax.models.decoder import parameter_shapes

    rule = lj.LoraRule("layers/.*/kernel", 16, layout="b i o")
    shapes = parameter_shapes(read_outline(model).config())
    adapters = lj.init_adapters(jax.random.key(0), shapes, rule)
    write_peft(folder, jax.tree.map(lambda x: x + 0.01, adapters), base_model=str(model))


def convert(source: Path, base: str | None) -> None:
    """Converts a model, or an adapter with its model, and prints what it took."""
    import jax
    import jax.numpy as jnp

    from lora_jax.cli import main
    from lora_jax.cli.convert import read_model  # noqa: F401 what main would import

    jax.block_until_ready(jnp.zeros(()))  # the backend's own threads and buffers
    before = status()
    began = time.perf_counter()
    options = ["--dtype", "bfloat16", "--shard-size", "0.5", "--log", "quiet"]
    options += [] if base is None else ["--base", base]
    if main(["convert", str(source), str(source.parent / "converted"), *options]):
        sys.exit("lora-jax convert failed")
    print(
        json.dumps(
            {
                "seconds": round(time.perf_counter() - began, 1),
                "final": 0,
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
    parser.add_argument("--convert", action="store_true", help="write it into another folder")
    parser.add_argument("--adapter", action="store_true", help="with an adapter merged into it")
    parser.add_argument("--base", help="in which its kernels are stored before that")
    options = parser.parse_args()
    if options.read is not None and options.convert:
        convert(options.read, options.base)
        return
    if options.read is not None:
        read(options.read, options.dtype)
        return
    adapter = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_folder(folder, options.stored)
        on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if options.adapter:
            write_adapter(Path(name) / "adapter", folder)
            folder = Path(name) / "adapter"
            adapter = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, __file__, "--read", str(folder), "--dtype", options.dtype]
        command += ["--convert"] if options.convert else []
        command += ["--base", options.base] if options.base else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
    item = 4 if options.stored == "float32" else 2
    largest = item * max(math.prod(shape) for shape in shapes().values())
    bound = found["final"] + 1.5 * largest
    if options.adapter:
        bound += 2 * adapter + 4 * (4 * CONFIG["hidden_size"] * CONFIG["intermediate_size"])
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
