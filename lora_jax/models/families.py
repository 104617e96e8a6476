"""Model families: from what a checkpoint says about itself to a `DecoderConfig`.

Each reader takes the fields it understands and refuses those that would change the computation in
a way that the decoder does not know: a checkpoint read in part is a wrong model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax.models.config import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    DecoderConfig,
    RopeScaling,
)
from lora_jax.models.shapes import SHAPES

__all__ = ["SHAPES", "from_gguf", "from_hf"]


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


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a `model_type` of transformers means beyond the fields of its config.json.

    Attributes:
      shape: Fields of `DecoderConfig` that are so in the whole family.
      implied: Fields of config.json that a file may leave out where that is not to say no.
      windowed: Whether a layer has a window, by the fields and its number, if there is a window.
      switched: Whether there is one only if `use_sliding_window` says so.
      typed: Whether `layer_types` may say otherwise which layers have it.
    """

    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windowed: Callable[[Mapping[str, Any], int], bool] = lambda fields, layer: True
    switched: bool = False
    typed: bool = False


def _is_late(fields: Mapping[str, Any], layer: int) -> bool:
    return layer >= fields["max_window_layers"]


def _is_rotated(fields: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of SmolLM3 knows positions: despite its name, the list has a 1 for those."""
    listed = fields.get("no_rope_layers")
    if listed is None:
        return (layer + 1) % fields["no_rope_layer_interval"] != 0
    if layer >= len(listed):
        raise ValueError(f"no_rope_layers is {listed} in config.json; expected one for each layer.")
    return bool(listed[layer])


_QWEN_IMPLIED: Mapping[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA_SHAPE: Mapping[str, Any] = {"zero_centered_norms": True, "post_norms": True}
_GEMMA_IMPLIED: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(windowed=lambda fields, layer: False),
    "mistral": _Family(implied={"sliding_window": 4096}),
    "qwen2": _Family(
        shape={"biases": ATTENTION_PROJECTIONS[:3]},
        implied=_QWEN_IMPLIED,
        windowed=_is_late,
        switched=True,
        typed=True,
    ),
    "qwen3": _Family(
        shape={"qk_norm": True},
        implied={**_QWEN_IMPLIED, "head_dim": 128},
        windowed=_is_late,
        switched=True,
        typed=True,
    ),
    "qwen3_moe": _Family(shape={"qk_norm": True}, implied={"sliding_window": 4096}, switched=True),
    "smollm3": _Family(
        implied={
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
        windowed=lambda fields, layer: not _is_rotated(fields, layer),
        switched=True,
        typed=True,
    ),
    "gemma2": _Family(
        shape=_GEMMA_SHAPE,
        implied={
            **_GEMMA_IMPLIED,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windowed=lambda fields, layer: layer % 2 == 0,
        typed=True,
    ),
    "gemma3_text": _Family(
        shape={**_GEMMA_SHAPE, "qk_norm": True},
        implied={
            **_GEMMA_IMPLIED,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        windowed=lambda fields, layer: (layer + 1) % fields["sliding_window_pattern"] != 0,
        typed=True,
    ),
}
# The fields in which null is a value, and no other word for leaving them out.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_MOST = 10_000  # layers or experts, which are listed one by one: more are a broken file
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
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type {family!r} in config.json; only {', '.join(_FAMILIES)} can be read."
        )
    said = {name: x for name, x in config.items() if x is not None or name in _NULLABLE}
    fields = {**_FAMILIES[family].implied, **said}
    for name in ("use_bidirectional_attention", "use_mrope"):
        _refuse_all_but([False], name, fields.get(name, False))
    dim, num_heads = _need(fields, "hidden_size"), _need(fields, "num_attention_heads")
    layers = _count(fields, "num_hidden_layers")
    window, windowed = _windows(fields, layers)
    shape = {
        "vocab_size": _need(fields, "vocab_size"),
        "dim": dim,
        "num_layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads", num_heads),
        "head_dim": fields.get("head_dim", dim // num_heads),
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
    return DecoderConfig(**{**shape, **_FAMILIES[family].shape})


def _need(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"config.json lacks {name!r}, without which no model is defined.")
    return fields[name]


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = _need(fields, name)
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ValueError(
            f"{name} is {value!r} in config.json; expected a whole number from 1 to {_MOST:,}."
        )
    return value


def _refuse_all_but(known: Collection[Any], name: str, value: Any) -> None:
    if value not in known:
        options = " or ".join(repr(option) for option in known)
        raise ValueError(f"{name} is {value!r} in config.json; only {options} can be read.")


def _windows(fields: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it."""
    family, window = _FAMILIES[fields["model_type"]], fields.get("sliding_window")
    if family.switched and not fields.get("use_sliding_window"):
        window = None
    types = fields.get("layer_types")
    if types is None or not family.typed:
        windowed = [window is not None and family.windowed(fields, k) for k in range(layers)]
        for one in types or ():
            _refuse_all_but([_SLIDING if any(windowed) else _FULL], "layer_types", one)
    else:
        for one in types:
            _refuse_all_but([_FULL, _SLIDING], "layer_types", one)
        if len(types) != layers or (_SLIDING in types and window is None):
            raise ValueError(
                f"layer_types is {types} in config.json; expected one of each of the {layers} "
                f"layers, and a sliding_window for {_SLIDING!r}."
            )
        windowed = [one == _SLIDING for one in types]
    numbers = tuple(k for k in range(layers) if windowed[k])
    return (window if numbers else None), numbers


def _biases(fields: Mapping[str, Any]) -> tuple[str, ...]:
    attention = ATTENTION_PROJECTIONS if fields.get("attention_bias") else ()
    return attention + (MLP_PROJECTIONS if fields.get("mlp_bias") else ())


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions; transformers 5 moved theta and scaling into `rope_parameters`."""
    whole = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    given, scaling = fields.get("rope_parameters", {}), fields.get("rope_scaling", {})
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
    _refuse_all_but([1.0], part, rope.get(part) or fields.get(part, 1.0))
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
    _refuse_all_but(list(_ACTIVATIONS), activation, value)
    shape: dict[str, Any] = {"activation": _ACTIVATIONS[value]}
    if fields["model_type"] != "qwen3_moe":
        return shape | {"mlp_dim": _need(fields, "intermediate_size")}
    # Layers of both kinds could not be scanned as one.
    _refuse_all_but([[]], "mlp_only_layers", fields.get("mlp_only_layers", []))
    _refuse_all_but([1], "decoder_sparse_step", fields.get("decoder_sparse_step", 1))
    experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    return shape | {
        "mlp_dim": _need(fields, "moe_intermediate_size"),
        "num_experts": _count(fields, experts),
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
