"""Published shapes, for plans and measurements that need no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_jax.models.config import ATTENTION_PROJECTIONS, DecoderConfig, RopeScaling

_LLAMA_2 = DecoderConfig(
    vocab_size=32_000,
    dim=4_096,
    mlp_dim=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
)
_LLAMA_3 = dataclasses.replace(
    _LLAMA_2, vocab_size=128_256, mlp_dim=14_336, num_kv_heads=8, rope_theta=500_000.0
)
_LLAMA_3_2 = dataclasses.replace(
    _LLAMA_3,
    mlp_dim=8_192,
    rope_scaling=RopeScaling(factor=32.0, length=8_192, low=1.0, high=4.0),
    tied_head=True,
)
_QWEN = DecoderConfig(
    vocab_size=151_936,
    dim=2_048,
    mlp_dim=6_144,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
)
_QWEN_2 = dataclasses.replace(_QWEN, biases=ATTENTION_PROJECTIONS[:3])
_QWEN_3 = dataclasses.replace(_QWEN, qk_norm=True)
_GEMMA = DecoderConfig(
    vocab_size=262_144,
    dim=1_152,
    mlp_dim=6_912,
    num_layers=26,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    norm_eps=1e-6,
    zero_centered_norms=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=1_152**0.5,
    attention_scale=256**-0.5,
    tied_head=True,
)

# GPT-3 175B as a decoder of this library: its layers, heads and widths, for plans of that size. Its
# own MLP has two projections of width 49,152 where these are three of 32,768, as many parameters.
# It learned its 2,048 positions, where these are turned. The vocabulary is rounded up to 50,304.
_GPT_3 = DecoderConfig(
    vocab_size=50_304,
    dim=12_288,
    mlp_dim=32_768,
    num_layers=96,
    num_heads=96,
    num_kv_heads=96,
    head_dim=128,
)

SHAPES: Mapping[str, DecoderConfig] = {
    "gpt-3-175b": _GPT_3,
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        dim=576,
        mlp_dim=1_536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        tied_head=True,
    ),
    "smollm3-3b": DecoderConfig(
        vocab_size=128_256,
        dim=2_048,
        mlp_dim=11_008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=5_000_000.0,
        unrotated_layers=tuple(range(3, 36, 4)),
        norm_eps=1e-6,
        tied_head=True,
    ),
    "llama-65b": dataclasses.replace(
        _LLAMA_2, dim=8_192, mlp_dim=22_016, num_layers=80, num_heads=64, num_kv_heads=64
    ),
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": dataclasses.replace(
        _LLAMA_2, dim=5_120, mlp_dim=13_824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama-2-70b": dataclasses.replace(
        _LLAMA_2, dim=8_192, mlp_dim=28_672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-405b": dataclasses.replace(
        _LLAMA_3,
        dim=16_384,
        mlp_dim=53_248,
        num_layers=126,
        num_heads=128,
        rope_scaling=RopeScaling(factor=8.0, length=8_192, low=1.0, high=4.0),
    ),
    "llama-3.2-1b": dataclasses.replace(_LLAMA_3_2, dim=2_048, num_layers=16, head_dim=64),
    "llama-3.2-3b": dataclasses.replace(_LLAMA_3_2, dim=3_072, num_layers=28, num_heads=24),
    "mistral-7b": dataclasses.replace(
        _LLAMA_2,
        mlp_dim=14_336,
        num_kv_heads=8,
        window=4_096,
        windowed_layers=tuple(range(32)),
    ),
    "qwen2.5-0.5b": dataclasses.replace(
        _QWEN_2,
        dim=896,
        mlp_dim=4_864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        tied_head=True,
    ),
    "qwen2.5-7b": dataclasses.replace(
        _QWEN_2, vocab_size=152_064, dim=3_584, mlp_dim=18_944, num_layers=28, num_heads=28
    ),
    "qwen3-0.6b": dataclasses.replace(
        _QWEN_3,
        dim=1_024,
        mlp_dim=3_072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        tied_head=True,
    ),
    "qwen3-8b": dataclasses.replace(
        _QWEN_3, dim=4_096, mlp_dim=12_288, num_layers=36, num_kv_heads=8
    ),
    "qwen3-30b-a3b": dataclasses.replace(
        _QWEN_3, mlp_dim=768, num_experts=128, experts_per_token=8, normalized_routing=True
    ),
    "gemma-2-2b": dataclasses.replace(
        _GEMMA,
        vocab_size=256_000,
        dim=2_304,
        mlp_dim=9_216,
        num_heads=8,
        num_kv_heads=4,
        window=4_096,
        windowed_layers=tuple(range(0, 26, 2)),
        embedding_scale=2_304**0.5,
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    "gemma-3-1b": dataclasses.replace(
        _GEMMA,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        window=512,
        windowed_layers=tuple(layer for layer in range(26) if (layer + 1) % 6),
        qk_norm=True,
    ),
}
