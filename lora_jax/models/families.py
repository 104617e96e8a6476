"""Model families: from what a checkpoint says about itself to a `DecoderConfig`.

Each reader takes the fields it understands and refuses those that would change the computation in
a way that the decoder does not know: a checkpoint read in part is a wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax.models.config import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    DecoderConfig,
    RopeScaling,
)

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


# What the decoder is in each family of transformers, whatever the fields of its config.json.
_GEMMA: Mapping[str, Any] = {"zero_centered_norms": True, "post_norms": True}
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biases": ATTENTION_PROJECTIONS[:3]},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "smollm3": {},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "qk_norm": True},
}
# What a file means that leaves a field out, where that is not "no".
_GEMMA_FIELDS: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN_FIELDS: Mapping[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}
_IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "use_sliding_window": True},
    "qwen2": _QWEN_FIELDS,
    "qwen3": {**_QWEN_FIELDS, "head_dim": 128},
    "qwen3_moe": {"sliding_window": 4096},
    "smollm3": {
        "no_rope_layer_interval": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_GEMMA_FIELDS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_sliding_window": True,
    },
    "gemma3_text": {
        **_GEMMA_FIELDS,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "use_sliding_window": True,
    },
}
# Whether a layer has a window, where `layer_types` does not say.
_HAS_WINDOW: Mapping[str, Callable[[Mapping[str, Any], int], bool]] = {
    "llama": lambda fields, layer: False,
    "mistral": lambda fields, layer: True,
    "qwen2": lambda fields, layer: layer >= fields["max_window_layers"],
    "qwen3": lambda fields, layer: layer >= fields["max_window_layers"],
    "qwen3_moe": lambda fields, layer: True,
    "smollm3": lambda fields, layer: not _is_rotated(fields, layer),
    "gemma2": lambda fields, layer: layer % 2 == 0,
    "gemma3_text": lambda fields, layer: (layer + 1) % fields["sliding_window_pattern"] != 0,
}
_TYPED = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")  # those that know `layer_types`
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Args:
      config: The parsed file, of transformers 4 or 5.

    Returns:
      The shape; how it is run is left at its defaults.

    Raises:
      ValueError: If `model_type` is none of the families that can be read, a field is missing, or
        one asks for something that the decoder does not do.
    """
    family = str(config.get("model_type"))
    if family not in _FIXED:
        raise ValueError(
            f"model_type {family!r} in config.json; only {', '.join(_FIXED)} can be read."
        )
    fields = {**_IMPLIED[family], **config}
    for name in ("use_bidirectional_attention", "use_mrope"):
        _refuse_all_but([False], name, fields.get(name) or False)
    dim, num_heads = _need(fields, "hidden_size"), _need(fields, "num_attention_heads")
    layers = _need(fields, "num_hidden_layers")
    window, windowed = _windows(fields, layers)
    shape = {
        "vocab_size": _need(fields, "vocab_size"),
        "dim": dim,
        "num_layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads") or num_heads,
        "head_dim": fields.get("head_dim") or dim // num_heads,
        "window": window,
        "windowed_layers": windowed,
        "norm_eps": _need(fields, "rms_norm_eps"),
        "biases": _biases(fields),
        "tied_head": fields.get("tie_word_embeddings", False),
        **_rope(fields),
        **_mlp(fields),
    }
    if family == "smollm3":
        shape["unrotated_layers"] = tuple(k for k in range(layers) if not _is_rotated(fields, k))
    if family in ("gemma2", "gemma3_text"):
        shape |= _gemma(fields)
    return DecoderConfig(**{**shape, **_FIXED[family]})


def _need(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"config.json lacks {name!r}, without which no model is defined.")
    return fields[name]


def _refuse_all_but(known: Collection[Any], name: str, value: Any) -> None:
    if value not in known:
        options = " or ".join(repr(option) for option in known)
        raise ValueError(f"{name} is {value!r} in config.json; only {options} can be read.")


def _windows(fields: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it."""
    family = fields["model_type"]
    window = fields.get("sliding_window") if fields.get("use_sliding_window") else None
    has_window = [window is not None and _HAS_WINDOW[family](fields, k) for k in range(layers)]
    if (types := fields.get("layer_types")) is not None:
        usual = [_SLIDING if one else _FULL for one in has_window]
        for one in types:
            _refuse_all_but(
                [_FULL, _SLIDING] if family in _TYPED else [usual[0]], "layer_types", one
            )
        if len(types) != layers or (_SLIDING in types and window is None):
            raise ValueError(
                f"layer_types is {types} in config.json; expected one of each of the {layers} "
                f"layers, and a sliding_window for {_SLIDING!r}."
            )
        has_window = [one == _SLIDING for one in types]
    windowed = tuple(k for k in range(layers) if has_window[k])
    return (window if windowed else None), windowed


def _is_rotated(fields: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of SmolLM3 knows positions: despite its name, the list has a 1 for those."""
    listed = fields.get("no_rope_layers")
    if listed is None:
        return (layer + 1) % fields["no_rope_layer_interval"] != 0
    if layer >= len(listed):
        raise ValueError(f"no_rope_layers is {listed} in config.json; expected one for each layer.")
    return bool(listed[layer])


def _biases(fields: Mapping[str, Any]) -> tuple[str, ...]:
    attention = ATTENTION_PROJECTIONS if fields.get("attention_bias") else ()
    return attention + (MLP_PROJECTIONS if fields.get("mlp_bias") else ())


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions; transformers 5 moved theta and scaling into `rope_parameters`."""
    whole = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    given, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if fields["model_type"] != "gemma3_text":
        whole |= scaling or given
        for name in whole:
            if name in (_FULL, _SLIDING):
                raise ValueError(
                    f"rope_parameters has {name!r} in config.json; only one of all layers can be "
                    "read in this family."
                )
        return {"rope_theta": whole["rope_theta"], "rope_scaling": _scaling(whole, fields)}
    for name in given:
        _refuse_all_but([_FULL, _SLIDING], "a name in rope_parameters", name)
    whole |= {**(given.get(_FULL) or {}), **scaling}
    local = {"rope_theta": fields["rope_local_base_freq"], **(given.get(_SLIDING) or {})}
    _refuse_all_but(["default"], f"rope_type of {_SLIDING}", _rope_type(local))
    return {
        "rope_theta": whole["rope_theta"],
        "rope_scaling": _scaling(whole, fields),
        "local_rope_theta": local["rope_theta"],
    }


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> RopeScaling | None:
    kind, part = _rope_type(rope), "partial_rotary_factor"
    _refuse_all_but(["default", "linear", "llama3"], "rope_type", kind)
    _refuse_all_but([1.0], part, rope.get(part, fields.get(part)) or 1.0)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(_need(rope, "factor"))
    length = "original_max_position_embeddings"
    return RopeScaling(
        _need(rope, "factor"),
        length=fields.get(length) or rope.get(length) or _need(fields, "max_position_embeddings"),
        low=_need(rope, "low_freq_factor"),
        high=_need(rope, "high_freq_factor"),
    )


def _mlp(fields: Mapping[str, Any]) -> dict[str, Any]:
    activation = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    value = fields.get(activation, "silu")
    _refuse_all_but(_ACTIVATIONS, activation, value)
    shape: dict[str, Any] = {"activation": _ACTIVATIONS[value]}
    if fields["model_type"] != "qwen3_moe":
        return shape | {"mlp_dim": _need(fields, "intermediate_size")}
    # Layers of both kinds could not be scanned as one.
    _refuse_all_but([[]], "mlp_only_layers", fields.get("mlp_only_layers") or [])
    _refuse_all_but([1], "decoder_sparse_step", fields.get("decoder_sparse_step", 1))
    experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    return shape | {
        "mlp_dim": _need(fields, "moe_intermediate_size"),
        "num_experts": _need(fields, experts),
        "experts_per_token": _need(fields, "num_experts_per_tok"),
        "normalized_routing": fields.get("norm_topk_prob", False),
    }


def _gemma(fields: Mapping[str, Any]) -> dict[str, Any]:
    cap = fields.get("attn_logit_softcapping")
    if fields["model_type"] == "gemma3_text":
        _refuse_all_but([None], "attn_logit_softcapping", cap)
    return {
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": cap,
        "logit_cap": fields.get("final_logit_softcapping"),
    }
