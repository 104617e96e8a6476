"""A language model of 60,000 random weights in a GGUF file, and sentences for it to learn."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from flax import traverse_util

from lora_jax.models.decoder import DecoderConfig, parameter_shapes

CHARACTERS = [chr(code) for code in range(0x21, 0x7F)]  # stand for themselves in the vocabulary
# Ġ and Ċ are the space and the line break; a file must have at least one merge.
TOKENS = ["<|endoftext|>", *CHARACTERS, "Ġ", "Ċ", "!!"]

EOS = 0
TEMPLATE = (
    "{% for message in messages %}@{{ message.role }}:{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}@assistant:{% endif %}"
)

CONFIG = DecoderConfig(
    vocab_size=len(TOKENS),
    dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    tied_head=True,
)
NAMES = {
    "embed/embedding": "token_embd",
    "final_norm/scale": "output_norm",
    "attn_norm/scale": "attn_norm",
    "attn/q_proj/kernel": "attn_q",
    "attn/k_proj/kernel": "attn_k",
    "attn/v_proj/kernel": "attn_v",
    "attn/o_proj/kernel": "attn_output",
    "mlp_norm/scale": "ffn_norm",
    "mlp/gate_proj/kernel": "ffn_gate",
    "mlp/up_proj/kernel": "ffn_up",
    "mlp/down_proj/kernel": "ffn_down",
}


def write_model(path: Path, template: str | None = TEMPLATE, kind: str = "F32") -> Path:
    """Writes the model, whose tokens are single characters, and its chat template if it has one.

    Kernels are stored as `kind`, and all else in float32.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_embedding_length(CONFIG.dim)
    writer.add_feed_forward_length(CONFIG.mlp_dim)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    normal = [gguf.TokenType.NORMAL] * (len(TOKENS) - 1)
    writer.add_token_types([gguf.TokenType.CONTROL, *normal])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(EOS)
    if template is not None:
        writer.add_chat_template(template)
    for name, shape in traverse_util.flatten_dict(parameter_shapes(CONFIG), sep="/").items():
        layers = [""] if not name.startswith("layers/") else ["blk.0.", "blk.1."]
        for prefix in layers:
            size = shape.shape if not prefix else shape.shape[1:]
            values = np.ones(size) if name.endswith("scale") else rng.normal(size=size) * 0.1
            values = values if name.startswith("embed") else values.T  # kernels as [out, in]
            tensor = NAMES[name.removeprefix("layers/")]
            values, stored = values.astype(np.float32), gguf.GGMLQuantizationType.F32
            if name.endswith("kernel"):
                stored = gguf.GGMLQuantizationType[kind]
                values = gguf.quantize(np.ascontiguousarray(values), stored)
            writer.add_tensor(f"{prefix}{tensor}.weight", values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sentences(path: Path, number: int = 600) -> Path:
    """Writes sentences of eight letters, labelled by which of two alphabets they are from."""
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for _ in range(number):
            label = int(rng.integers(2))
            letters = rng.choice(list(("abcdefgh", "stuvwxyz")[label]), 8)
            file.write(json.dumps({"text": "".join(letters), "label": label}) + "\n")
    return path
