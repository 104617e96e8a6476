"""Model families: from what a checkpoint says about itself to a `DecoderConfig`.

Each reader takes the fields it understands and refuses those that would change the computation in
a way that the decoder does not know: a checkpoint read in part is a wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models.config import DecoderConfig

# Published shapes, for plans and measurements that need no weights.
SHAPES: Mapping[str, DecoderConfig] = {
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
    "llama-2-7b": DecoderConfig(
        vocab_size=32_000,
        dim=4_096,
        mlp_dim=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    ),
    "llama-3-8b": DecoderConfig(
        vocab_size=128_256,
        dim=4_096,
        mlp_dim=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
    ),
    "llama-65b": DecoderConfig(
        vocab_size=32_000,
        dim=8_192,
        mlp_dim=22_016,
        num_layers=80,
        num_heads=64,
        num_kv_heads=64,
        head_dim=128,
    ),
}


def from_gguf(metadata: Mapping[str, Any], *, tied_head: bool) -> DecoderConfig:
    """The decoder that a GGUF file's metadata describes.

    Args:
      metadata: The file's key-value pairs.
      tied_head: Whether the file has no `output.weight`, which its metadata does not say.

    Returns:
      The shape; how it is run is left at its defaults.

    Raises:
      ValueError: If the architecture is not `llama`, a field is missing, or one asks for something
        that the decoder does not do.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"architecture {architecture!r} in the GGUF metadata; only 'llama' can be read."
        )

    def field(name: str) -> Any:
        key = f"llama.{name}"
        if key not in metadata:
            raise ValueError(f"the GGUF metadata lacks {key!r}, without which no model is defined.")
        return metadata[key]

    for key, plain in (("llama.rope.scaling.type", "none"), ("llama.expert_count", 0)):
        value = metadata.get(key, plain)
        if value != plain:
            raise ValueError(
                f"{key} is {value!r} in the GGUF metadata; only {plain!r} can be read."
            )
    dim, num_heads = field("embedding_length"), field("attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", dim // num_heads)
    rotary_dim = metadata.get("llama.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise ValueError(
            f"llama.rope.dimension_count is {rotary_dim} and heads are {head_dim} wide; "
            "only rotary positions over whole heads can be read."
        )
    return DecoderConfig(
        vocab_size=field("vocab_size"),
        dim=dim,
        mlp_dim=field("feed_forward_length"),
        num_layers=field("block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=metadata.get("llama.rope.freq_base", 10_000.0),
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        tied_head=tied_head,
    )


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Args:
      config: The parsed file.

    Returns:
      The shape; how it is run is left at its defaults.

    Raises:
      ValueError: If `model_type` is not `llama`, a field is missing, or one asks for something that
        the decoder does not do.
    """
    if config.get("model_type") != "llama":
        raise ValueError(
            f"model_type {config.get('model_type')!r} in config.json; only 'llama' can be read."
        )

    def field(name: str) -> Any:
        if name not in config:
            raise ValueError(f"config.json lacks {name!r}, without which no model is defined.")
        return config[name]

    # transformers 5 moved theta and scaling into `rope_parameters`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, value, plain in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != plain:
            raise ValueError(f"{key} is {value!r} in config.json; only {plain!r} can be read.")
    dim, num_heads = field("hidden_size"), field("num_attention_heads")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    return DecoderConfig(
        vocab_size=field("vocab_size"),
        dim=dim,
        mlp_dim=field("intermediate_size"),
        num_layers=field("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or dim // num_heads,
        rope_theta=theta,
        norm_eps=field("rms_norm_eps"),
        tied_head=config.get("tie_word_embeddings", False),
    )
