"""Model families: from what a checkpoint says about itself to a `DecoderConfig`.

Each reader takes the fields it understands and refuses those that would change the computation in
a way that the decoder does not know: a checkpoint read in part is a wrong model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax.files import shown
from lora_jax.models.config import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    DecoderConfig,
    RopeScaling,
)
from lora_jax.models.fields import MOST, Fields, refuse_all_but
from lora_jax.models.shapes import SHAPES

__all__ = ["SHAPES", "from_gguf", "from_hf"]

_WIDEST_HEAD = 2**16
_LONGEST = 2**40  # tokens


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
            f"architecture {shown(architecture)} in the GGUF metadata; only 'llama' can be read."
        )

    fields = Fields(metadata, "the GGUF metadata")
    for key, plain in (("llama.rope.scaling.type", "none"), ("llama.expert_count", 0)):
        fields.only([plain], key, plain)
    dim = fields.count("llama.embedding_length")
    num_heads = fields.count("llama.attention.head_count", most=MOST)
    head_dim = _head_dim(fields, "llama.attention.key_length", dim, num_heads)
    rotary_dim = fields.get("llama.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise ValueError(
            f"llama.rope.dimension_count is {shown(rotary_dim)} and heads are {head_dim} wide; "
            "only rotary positions over whole heads can be read."
        )
    return DecoderConfig(
        vocab_size=fields.count("llama.vocab_size"),
        dim=dim,
        mlp_dim=fields.count("llama.feed_forward_length"),
        num_layers=fields.count("llama.block_count", most=MOST),
        num_heads=num_heads,
        num_kv_heads=fields.count("llama.attention.head_count_kv", num_heads, most=MOST),
        head_dim=head_dim,
        rope_theta=fields.number("llama.rope.freq_base", 10_000.0),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        tied_head=tied_head,
    )


def _head_dim(fields: Fields, name: str, dim: int, num_heads: int) -> int:
    """H; where it is not said, the width that each of the heads has of the model's."""
    return fields.count(name, max(1, dim // num_heads), most=_WIDEST_HEAD)


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
    windowed: Callable[[Fields, int], bool] = lambda fields, layer: True
    switched: bool = False
    typed: bool = False


def _is_late(fields: Fields, layer: int) -> bool:
    return layer >= fields.count("max_window_layers", least=0)


def _is_rotated(fields: Fields, layer: int) -> bool:
    """Whether a layer of SmolLM3 knows positions: despite its name, the list has a 1 for those."""
    listed = fields.get("no_rope_layers")
    if listed is None:
        return (layer + 1) % fields.count("no_rope_layer_interval") != 0
    if not isinstance(listed, list) or layer >= len(listed) or listed[layer] not in (0, 1):
        raise fields.wrong("no_rope_layers", listed, "one for each layer, which is 0 or 1")
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
        windowed=lambda fields, layer: (layer + 1) % fields.count("sliding_window_pattern") != 0,
        typed=True,
    ),
}
# The fields in which null is a value, and no other word for leaving them out.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
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
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(
            f"model_type {shown(family)} in config.json; only {', '.join(_FAMILIES)} can be read."
        )
    said = {name: x for name, x in config.items() if x is not None or name in _NULLABLE}
    fields = Fields({**_FAMILIES[family].implied, **said}, "config.json")
    for name in ("use_bidirectional_attention", "use_mrope"):
        fields.only([False], name, False)
    dim, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads", most=MOST)
    layers = fields.count("num_hidden_layers", most=MOST)
    window, windowed = _windows(fields, layers)
    shape = {
        "vocab_size": fields.count("vocab_size"),
        "dim": dim,
        "num_layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.count("num_key_value_heads", num_heads, most=MOST),
        "head_dim": _head_dim(fields, "head_dim", dim, num_heads),
        "window": window,
        "windowed_layers": windowed,
        "norm_eps": fields.number("rms_norm_eps"),
        "biases": _biases(fields),
        "tied_head": fields.flag("tie_word_embeddings"),
        **_rope(fields),
        **_mlp(fields),
    }
    if family == "smollm3":
        shape["unrotated_layers"] = tuple(k for k in range(layers) if not _is_rotated(fields, k))
    if family in ("gemma2", "gemma3_text"):
        shape |= _gemma(fields)
    return DecoderConfig(**{**shape, **_FAMILIES[family].shape})


def _windows(fields: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it."""
    family = _FAMILIES[fields.get("model_type")]
    window = None if fields.get("sliding_window") is None else fields.count("sliding_window")
    if family.switched and not fields.flag("use_sliding_window"):
        window = None
    if not isinstance(types := fields.get("layer_types"), list | None):
        raise fields.wrong("layer_types", types, "a list")
    if types is None or not family.typed:
        windowed = [window is not None and family.windowed(fields, k) for k in range(layers)]
        for one in types or ():
            _refuse([_SLIDING if any(windowed) else _FULL], "layer_types", one)
    else:
        for one in types:
            _refuse([_FULL, _SLIDING], "layer_types", one)
        if len(types) != layers or (_SLIDING in types and window is None):
            raise fields.wrong(
                "layer_types",
                types,
                f"one of each of the {layers} layers, and a sliding_window for {_SLIDING!r}",
            )
        windowed = [one == _SLIDING for one in types]
    numbers = tuple(k for k in range(layers) if windowed[k])
    return (window if numbers else None), numbers


def _refuse(known: Collection[Any], name: str, value: Any) -> None:
    refuse_all_but(known, name, value, "config.json")


def _biases(fields: Fields) -> tuple[str, ...]:
    attention = ATTENTION_PROJECTIONS if fields.flag("attention_bias") else ()
    return attention + (MLP_PROJECTIONS if fields.flag("mlp_bias") else ())


def _rope(fields: Fields) -> dict[str, Any]:
    """Rotary positions; transformers 5 moved theta and scaling into `rope_parameters`."""
    whole = {"rope_theta": fields.number("rope_theta", 10_000.0)}
    given, scaling = fields.within("rope_parameters"), fields.within("rope_scaling")
    if fields.get("model_type") != "gemma3_text":
        for name in (*given, *scaling):
            if name in (_FULL, _SLIDING):
                raise ValueError(
                    f"rope_parameters has {name!r} in config.json; only one of all layers can be "
                    "read in this family."
                )
        every = Fields(whole | dict(scaling or given), fields.where)
        return {"rope_theta": every.number("rope_theta"), "rope_scaling": _scaling(every, fields)}
    for name in given:
        _refuse([_FULL, _SLIDING], "a name in rope_parameters", name)
    kinds = Fields(given, fields.where)
    every = Fields({**whole, **kinds.within(_FULL), **scaling}, fields.where)
    theta = {"rope_theta": fields.number("rope_local_base_freq")}
    local = Fields({**theta, **kinds.within(_SLIDING)}, fields.where)
    _refuse(["default"], f"rope_type of {_SLIDING}", _rope_type(local))
    return {
        "rope_theta": every.number("rope_theta"),
        "rope_scaling": _scaling(every, fields),
        "local_rope_theta": local.number("rope_theta"),
    }


def _rope_type(rope: Fields) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: Fields, fields: Fields) -> RopeScaling | None:
    kind, part = _rope_type(rope), "partial_rotary_factor"
    _refuse(["default", "linear", "llama3"], "rope_type", kind)
    _refuse([1.0], part, rope.get(part) or fields.get(part, 1.0))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope.number("factor"))
    length, longest = "original_max_position_embeddings", "max_position_embeddings"
    said = next((x for x in (fields, rope) if x.get(length)), None)
    return RopeScaling(
        rope.number("factor"),
        length=fields.count(longest, most=_LONGEST) if said is None else said.count(length),
        low=rope.number("low_freq_factor"),
        high=rope.number("high_freq_factor"),
    )


def _mlp(fields: Fields) -> dict[str, Any]:
    activation = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    value = fields.only(list(_ACTIVATIONS), activation, "silu")
    shape: dict[str, Any] = {"activation": _ACTIVATIONS[value]}
    if fields.get("model_type") != "qwen3_moe":
        return shape | {"mlp_dim": fields.count("intermediate_size")}
    # Layers of both kinds could not be scanned as one.
    fields.only([[]], "mlp_only_layers", [])
    fields.only([1], "decoder_sparse_step", 1)
    experts = "num_experts" if fields.get("num_local_experts") is None else "num_local_experts"
    return shape | {
        "mlp_dim": fields.count("moe_intermediate_size"),
        "num_experts": fields.count(experts, most=MOST),
        "experts_per_token": fields.count("num_experts_per_tok", most=MOST),
        "normalized_routing": fields.flag("norm_topk_prob"),
    }


def _gemma(fields: Fields) -> dict[str, Any]:
    cap = _cap(fields, "attn_logit_softcapping")
    if fields.get("model_type") == "gemma3_text":
        _refuse([None], "attn_logit_softcapping", cap)
    return {
        "embedding_scale": fields.count("hidden_size") ** 0.5,
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        "attention_cap": cap,
        "logit_cap": _cap(fields, "final_logit_softcapping"),
    }


def _cap(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)
