"""One training step of PEFT with bitsandbytes, or of Unsloth, measured as train_step.py does ours.

    python experiments/speed/peer_step.py peft checkpointing       # Llama 3 8B's shape, 4x2048
    python experiments/speed/peer_step.py unsloth unsloth          # its activations offloaded
    python experiments/speed/peer_step.py peft none --device cpu --batch 1 --length 16 --fields \
        '{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 99}'

Random weights of a Llama; LoRA on all seven linear layers of each block; AdamW; bfloat16; the base
in NF4 with double quantization or in bfloat16. The whole step (forward, backward, optimizer) is
timed. The last line printed is JSON: the numbers, or an `error` that says why there are none.
Nothing of lora_jax is imported, so that the peer has the process and the GPU to itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Nothing is asked of a hub: every file that is read was made here.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")

VARIANTS = {"peft": ("none", "checkpointing"), "unsloth": ("false", "true", "unsloth")}
PACKAGES = {"peft": ("peft", "bitsandbytes"), "unsloth": ("unsloth", "unsloth_zoo", "bitsandbytes")}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 3  # steps
AT_ONCE = 3  # steps that are timed together, as in train_step.py


def require(device: str) -> None:
    """Says that there is no GPU before a library says it in its own words."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")


def quantized(layer: Any) -> Any:
    """A layer whose linear layers are bitsandbytes' own, in NF4 with double quantization."""
    import bitsandbytes as bnb
    import torch

    options = {"quant_type": "nf4", "compress_statistics": True}
    for parent in list(layer.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                device, weight = linear.weight.device, linear.weight.data
                packed = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    device="meta",
                    **options,
                )
                packed.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, module=packed, **options
                )
                setattr(parent, name, packed.to(device))  # which quantizes
    return layer


def peft_model(fields: dict[str, Any], args: argparse.Namespace) -> Any:
    """A Llama made on the device a layer at a time, so that 65B fits while it is made."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    require(args.device)
    config = LlamaConfig(**fields, attn_implementation="sdpa", use_cache=False)
    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
        config.num_hidden_layers = layers
        for index in range(layers):
            layer = LlamaDecoderLayer(config, index)
            model.model.layers.append(layer if args.kind == "none" else quantized(layer))
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    if args.variant == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def save(fields: dict[str, Any], folder: Path, device: str) -> None:
    """Writes a random Llama and a tokenizer of five words, which Unsloth wants to read."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    require(device)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(**fields, bos_token_id=0, eos_token_id=1, pad_token_id=2)
        )
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise OSError(
            f"the model takes {needed / 2**30:.0f} GiB in {folder.parent}, which has "
            f"{free / 2**30:.0f} GiB left; set TMPDIR or --folder to a larger disk"
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = {word: number for number, word in enumerate([*special.values(), "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    unfinished = folder.with_name("unfinished")
    model.save_pretrained(unfinished)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(unfinished)
    unfinished.rename(folder)


def unsloth_model(folder: Path, args: argparse.Namespace) -> Any:
    """The saved Llama, read and quantized by Unsloth."""
    if not folder.exists():
        # In a process of its own: Unsloth must come before transformers, whose classes it changes.
        command = [sys.executable, *sys.argv, "--folder", str(folder.parent), "--save"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not folder.exists():
            raise RuntimeError(f"saving the model failed: {outcome(done)['error']}")
    from unsloth import FastLanguageModel

    # isort: split
    import torch

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=args.length,
        dtype=torch.bfloat16,
        load_in_4bit=args.kind == "nf4",
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing={"false": False, "true": True}.get(args.variant, args.variant),
        target_modules=TARGETS,
    )
    FastLanguageModel.for_training(model)
    return model


def measure(model: Any, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Times the step, and asks torch for the peak of its memory."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, vocab_size, (args.batch, args.length), device=args.device)

    def run(times: int) -> float:
        for _ in range(times):
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()  # which waits for the device

    gpu = args.device == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # making the model took more than its step does
    start = time.perf_counter()
    losses, seconds = [run(WARM_UP)], []
    warm_up_seconds = time.perf_counter() - start
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(run(AT_ONCE))
        seconds.append((time.perf_counter() - start) / AT_ONCE)
    median = statistics.median(seconds)
    return {
        "device": torch.cuda.get_device_name() if gpu else args.device,
        "milliseconds": median * 1e3,
        "tokens_per_second": args.batch * args.length / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else 0.0,
        "trained_parameters": sum(p.numel() for p in trained),
        "losses": [losses[0], losses[-1]],
        "warm_up_seconds": warm_up_seconds,
        "seconds": seconds,
    }


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a process of this script printed last, or how it ended before it could."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    return {"error": f"ended with exit status {done.returncode}: {said}"}


def result(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the model, measures its step."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[args.peer]}
    positions = {"max_position_embeddings": max(8192, args.length)}
    fields = {**LLAMA_3_8B, **args.fields, **positions}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / "model"
        if args.save:
            save(fields, folder, args.device)
            return {"saved": str(folder)}
        model = peft_model(fields, args) if args.peer == "peft" else unsloth_model(folder, args)
    for name in ("torch", "transformers"):
        versions[name] = importlib.metadata.version(name)
    return {"versions": versions, **measure(model, fields["vocab_size"], args)}


def main() -> None:
    """Prints what was measured, or what went wrong, as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=VARIANTS)
    parser.add_argument("variant", help=f"of its checkpointing: {VARIANTS}")
    parser.add_argument("--fields", type=json.loads, default={}, help="other than 8B's, as JSON")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kind", default="nf4", choices=("nf4", "none"), help="of the base")
    parser.add_argument("--steps", type=int, default=8, help="timed samples")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, help="where Unsloth's model is kept")
    parser.add_argument("--save", action="store_true", help="write that model, and no more")
    args = parser.parse_args()
    if args.variant not in VARIANTS[args.peer]:
        parser.error(f"{args.peer} has no {args.variant!r}; write one of {VARIANTS[args.peer]}")
    # This folder's kernels.py is not the package of that name, for which transformers looks.
    sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
    try:
        found = result(args)
    except importlib.metadata.PackageNotFoundError as error:
        found = {"error": f"{error.name} is not installed"}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"peer": args.peer, "variant": args.variant, **found}), flush=True)


if __name__ == "__main__":
    main()
