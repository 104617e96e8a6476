"""What a config.json says, in the words of transformers 4 and 5, and what of it is refused."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest
from family_cases import CASES

from lora_jax.models.config import AttentionKind, DecoderConfig, RopeScaling
from lora_jax.models.decoder import parameter_shapes
from lora_jax.models.families import SHAPES, from_hf

_LLAMA_3_2 = {
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
# As they were published, of transformers 4, without the fields that no model is made of.
PUBLISHED = {
    "llama-3.2-1b": _LLAMA_3_2,
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "smollm3-3b": {
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_describe_the_published_shapes(name):
    assert from_hf(PUBLISHED[name]) == SHAPES[name]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their model cards and safetensors files count them.
        ("smollm3-3b", 3_075_098_624),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_published_shapes_have_the_published_size(name, parameters):
    shapes = parameter_shapes(SHAPES[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


GEMMA_3 = CASES["gemma3_text"]
LOCAL, WHOLE = {"rope_theta": 500.0}, {"rope_theta": 9000.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    ("case", "older"),
    [
        (
            "llama",
            {
                "rope_theta": 500.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("llama, linear", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        (
            "gemma3_text",
            {"rope_theta": 9000.0, "rope_local_base_freq": 500.0, "rope_scaling": LINEAR},
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": WHOLE | LINEAR,
                    "sliding_attention": LOCAL,
                },
                "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
                "sliding_window_pattern": None,
            },
        ),
        (
            "qwen2",
            {
                "rope_theta": 500.0,
                "layer_types": ["full_attention", *["sliding_attention"] * 3],
                "max_window_layers": 9,
            },
        ),
        ("smollm3, window", {"rope_theta": 500.0, "no_rope_layers": [1, 1, 1, 0]}),
        ("qwen3_moe", {"rope_theta": 500.0, "num_local_experts": 5, "num_experts": None}),
    ],
)
def test_the_same_in_other_words(case, older):
    fields = {name: x for name, x in CASES[case].items() if name != "rope_parameters"}
    assert from_hf(fields | older) == from_hf(CASES[case])


def test_layers_differ_as_the_family_has_it():
    local, whole = AttentionKind(5, 500.0, None), AttentionKind(None, 9000.0, RopeScaling(3.0))
    assert from_hf(GEMMA_3).attention_kinds == (local, local, whole, local)
    local, whole = AttentionKind(5, 500.0, None), AttentionKind(None, 500.0, None)
    assert from_hf(CASES["gemma2"]).attention_kinds == (local, whole) * 2
    assert from_hf(CASES["qwen2"]).attention_kinds == (whole, local, local, local)
    nowhere = AttentionKind(None, None, None)
    assert from_hf(CASES["smollm3"]).attention_kinds == (whole, nowhere) * 2
    assert from_hf(CASES["smollm3, window"]).attention_kinds == (
        whole,
        whole,
        whole,
        AttentionKind(5, None, None),
    )
    assert set(from_hf(CASES["mistral"]).attention_kinds) == {local}
    assert set(from_hf(CASES["llama"]).attention_kinds) == {
        AttentionKind(None, 500.0, RopeScaling(4.0, 16))
    }


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn' in config.json"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "config.json lacks 'factor'"),
        (
            "qwen3",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5 in config.json; only 1.0 can be read",
        ),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": WHOLE}},
            "rope_parameters has 'full_attention' in config.json; only one of all layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": WHOLE},
            "a name in rope_parameters is 'rope_theta' in config.json; only 'full_attention' or",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": LOCAL | LINEAR}},
            "rope_type of sliding_attention is 'linear'",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional_attention is True"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu' in config.json"),
        ("gemma2", {"rms_norm_eps": None}, "config.json lacks 'rms_norm_eps'"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True in config.json; only False can be read"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types is 'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "expected one of each of the 4 layers"),
        (
            "qwen2, no window",
            {"layer_types": ["sliding_attention"] * 4},
            "and a sliding_window for 'sliding_attention'",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "only 'sliding_attention' can be"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "only 'full_attention' can be read"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            "no_rope_layers is [1, 0] in config.json;",
        ),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1] in config.json; only []"),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2},
            "decoder_sparse_step is 2 in config.json; only",
        ),
        ("qwen3_moe", {"num_experts_per_tok": None}, "config.json lacks 'num_experts_per_tok'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(case, changes, sentence):
    fields = {k: v for k, v in {**CASES[case], **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_hf(fields)


PLAIN = DecoderConfig(
    vocab_size=16, dim=8, mlp_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"windowed_layers": (0,)}, "window=None with windowed_layers=(0,); write both, or"),
        ({"window": 4}, "window=4 with windowed_layers=()"),
        ({"window": 4, "windowed_layers": (2,)}, "windowed_layers has 2; the layers are 0 to 1"),
        ({"window": 0, "windowed_layers": (1,)}, "window=0; a token sees at least itself"),
        ({"unrotated_layers": (-1,)}, "unrotated_layers has -1"),
        ({"biases": ("q_proj", "q")}, "biases has 'q'; expected some of q_proj, k_proj"),
        ({"activation": "relu"}, "activation='relu'; write 'silu' or 'gelu_tanh'"),
        ({"num_experts": 4}, "experts_per_token=0 of num_experts=4"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token=3 of num_experts=2"),
        ({"experts_per_token": 1}, "experts_per_token=1 of num_experts=0"),
        (
            {"num_experts": 2, "experts_per_token": 1, "biases": ("up_proj",)},
            "biases has 'up_proj'; expected some of q_proj, k_proj, v_proj, o_proj.",
        ),
        ({"attention_cap": 5.0, "attention": "cudnn"}, "attention_cap=5.0 with attention='cudnn'"),
    ],
)
def test_impossible_shapes_are_errors(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize("changes", [{"factor": 0.0}, {"factor": 2.0, "low": 4.0}])
def test_impossible_scalings_are_errors(changes):
    with pytest.raises(ValueError, match="expected a rope scaling of factor > 0 and low < high"):
        RopeScaling(**changes)
