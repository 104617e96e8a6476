"""A tiny model of each family as a folder of transformers: its config.json, and made-up weights.

The weights are drawn here, by their names, so that no file need hold them; golden/families.npz has
the logits that transformers computed with them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from byte_tokenizer import byte_tokenizer

GOLDEN_FILE = Path(__file__).parent / "golden" / "families.npz"
VOCAB, DIM, LAYERS, LENGTH = 64, 32, 4, 16
WINDOW = 5  # shorter than the texts
SHORT = 5  # where the second text begins that is shorter
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _case(model_type: str, **fields: Any) -> dict[str, Any]:
    return {**_COMMON, "model_type": model_type, "rope_parameters": _ROPE, **fields}


CASES = {
    "llama": _case("llama", rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True),
    "llama, linear": _case(
        "llama", rope_parameters={**_ROPE, "rope_type": "linear", "factor": 3.0}
    ),
    "mistral": _case("mistral", sliding_window=WINDOW, head_dim=12),
    "mistral, no window": _case("mistral", sliding_window=None, tie_word_embeddings=True),
    "qwen2": _case("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2, no window": _case(
        "qwen2", use_sliding_window=False, sliding_window=WINDOW, tie_word_embeddings=True
    ),
    "qwen3": _case("qwen3", head_dim=12, attention_bias=True, tie_word_embeddings=True),
    "smollm3": _case("smollm3", no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=True),
    "smollm3, window": _case("smollm3", use_sliding_window=True, sliding_window=WINDOW),
    "gemma2": _case(
        "gemma2",
        sliding_window=WINDOW,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _case(
        "gemma3_text",
        sliding_window=WINDOW,
        sliding_window_pattern=3,
        query_pre_attn_scalar=6,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 9000.0},
            "sliding_attention": _ROPE,
        },
        tie_word_embeddings=True,
    ),
    "qwen3_moe": _case("qwen3_moe", **_EXPERTS, norm_topk_prob=True),
    "qwen3_moe, not normalized": _case(
        "qwen3_moe",
        **_EXPERTS,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
    ),
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the folder, by transformers' names."""
    family, dim, width = config["model_type"], config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"embed_tokens.weight": (config["vocab_size"], dim), "norm.weight": (dim,)}
    projections = {
        "self_attn.q_proj": (heads * width, dim),
        "self_attn.k_proj": (kv_heads * width, dim),
        "self_attn.v_proj": (kv_heads * width, dim),
        "self_attn.o_proj": (dim, heads * width),
    }
    biased = list(projections) if config.get("attention_bias") else []
    norms = {"input_layernorm": dim, "post_attention_layernorm": dim}
    hidden, groups = config["intermediate_size"], ["mlp"]
    if family == "qwen2":
        biased = list(projections)[:3]
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    if family in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": dim, "post_feedforward_layernorm": dim}
    if family == "qwen3_moe":
        hidden = config["moe_intermediate_size"]
        groups = [f"mlp.experts.{k}" for k in range(config["num_experts"])]
        projections["mlp.gate"] = (config["num_experts"], dim)
    for group in groups:
        kernels = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
        projections |= {f"{group}.{name}": shape for name, shape in kernels.items()}
    if config.get("mlp_bias"):
        biased += [name for name in projections if name.startswith("mlp")]
    for layer in (f"layers.{k}" for k in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in projections.items()}
        shapes |= {f"{layer}.{name}.bias": projections[name][:1] for name in biased}
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    return shapes


def weight(name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
    """Random, and never near what a model begins with: norms and biases are to matter."""
    values = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("norm.weight"):
        return np.float32(values * 0.5 + (not family.startswith("gemma")))
    return np.float32(values * 0.5)


def write_family(path: Path, config: Mapping[str, Any]) -> Path:
    """Writes the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config)
    weights = {name: weight(name, shape, config["model_type"]) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
