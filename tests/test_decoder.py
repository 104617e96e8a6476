"""The decoder against logits and gradients that transformers computed (golden/tiny_llama.npz)."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lora_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    init_cache,
    parameter_shapes,
    stack_layers,
    unstack_layers,
)
from lora_jax.models.families import SHAPES, from_gguf, from_hf

pytestmark = pytest.mark.compiled_quickly
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "tiny_llama.npz"))
HF_CONFIG = json.loads(str(GOLDEN["config"]))
CONFIG = from_hf(HF_CONFIG)
TOKENS = GOLDEN["tokens"]
PADDING = 5  # tokens, at the start of the second padded row
CLOSE = {"atol": 5e-5, "rtol": 1e-5}  # float32 rounding, on logits of up to 8

BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm/scale",
    "self_attn.q_proj.weight": "attn/q_proj/kernel",
    "self_attn.k_proj.weight": "attn/k_proj/kernel",
    "self_attn.v_proj.weight": "attn/v_proj/kernel",
    "self_attn.o_proj.weight": "attn/o_proj/kernel",
    "post_attention_layernorm.weight": "mlp_norm/scale",
    "mlp.gate_proj.weight": "mlp/gate_proj/kernel",
    "mlp.up_proj.weight": "mlp/up_proj/kernel",
    "mlp.down_proj.weight": "mlp/down_proj/kernel",
}
NAMES = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "final_norm/scale",
    "lm_head.weight": "lm_head/kernel",
    **{
        f"model.layers.{i}.{name}": f"layers_{i}/{path}"
        for i in range(CONFIG.num_layers)
        for name, path in BLOCK_NAMES.items()
    },
}


def golden(kind: str) -> dict[str, np.ndarray]:
    """Weights or gradients of the golden file, by their paths in the unrolled decoder."""
    found = {}
    for key, value in GOLDEN.items():
        if key.startswith(f"{kind}/"):
            path = NAMES[key.removeprefix(f"{kind}/")]
            found[path] = (value.T if path.endswith("kernel") else value).astype(np.float32)
    return found


def parameters(config: DecoderConfig):
    flat = golden("weight")
    if config.tied_head:
        del flat["lm_head/kernel"]
    params = traverse_util.unflatten_dict(flat, sep="/")
    return stack_layers(params) if config.scan_layers else params


@functools.cache  # so that tests share compiled programs
def variant(**changes):
    """A config, `apply` of its decoder, and the golden weights."""
    config = dataclasses.replace(CONFIG, **changes)
    apply = jax.jit(Decoder(config).apply, static_argnames="method")
    return config, apply, {"params": parameters(config)}


every_way = pytest.mark.parametrize(
    "way",
    [
        {"scan_layers": True},
        {"scan_layers": False},
        {"scan_layers": True, "remat": "nothing_saveable"},
        {"scan_layers": False, "remat": "dots_with_no_batch_dims_saveable"},
    ],
    ids=["scanned", "unrolled", "scanned-remat", "unrolled-remat"],
)
scanned_and_unrolled = pytest.mark.parametrize(
    "way", [{"scan_layers": True}, {"scan_layers": False}], ids=["scanned", "unrolled"]
)


@every_way
@pytest.mark.parametrize(("tied", "expected"), [(False, "logits"), (True, "tied_logits")])
def test_logits_are_those_of_transformers(way, tied, expected):
    _, apply, variables = variant(**way, tied_head=tied)
    logits = apply(variables, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, GOLDEN[expected], **CLOSE)


@every_way
def test_gradients_are_those_of_torch(way):
    config, apply, variables = variant(**way)

    def loss(params):
        logits = jax.nn.log_softmax(apply({"params": params}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(logits, TOKENS[:, 1:, None], axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(value, GOLDEN["loss"], **CLOSE)
    gradients = unstack_layers(gradients) if config.scan_layers else gradients
    gradients = traverse_util.flatten_dict(gradients, sep="/")
    for path, expected in golden("gradient").items():
        np.testing.assert_allclose(gradients[path], expected, atol=1e-5, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_and_unembed_make_logits(tied):
    _, apply, variables = variant(tied_head=tied)
    hidden = apply(variables, TOKENS, method="hidden")
    assert hidden.shape == (*TOKENS.shape, CONFIG.dim)
    logits = apply(variables, hidden[:, -1], method="unembed")
    expected = GOLDEN["tied_logits" if tied else "logits"][:, -1]
    np.testing.assert_allclose(logits, expected, **CLOSE)


def padded_ids() -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids of the golden file's padded rows."""
    segment_ids = np.ones_like(GOLDEN["padded_tokens"])
    segment_ids[1, :PADDING] = 0
    return np.clip(np.cumsum(segment_ids, axis=1) - 1, 0, None), segment_ids


@scanned_and_unrolled
def test_padding_is_hidden_by_its_segment(way):
    _, apply, variables = variant(**way)
    positions, segment_ids = padded_ids()
    logits = apply(variables, GOLDEN["padded_tokens"], positions, segment_ids)
    real = segment_ids == 1
    np.testing.assert_allclose(logits[real], GOLDEN["padded_logits"][real], **CLOSE)
    assert np.isfinite(logits).all()  # padding sees itself, so that its gradients are finite too


def test_padding_after_a_sequence_needs_no_segment():
    _, apply, variables = variant()
    longer = np.concatenate([TOKENS, TOKENS[:, :4]], axis=1)
    logits = apply(variables, longer)[:, : TOKENS.shape[1]]
    np.testing.assert_allclose(logits, GOLDEN["logits"], **CLOSE)


def test_packed_sequences_do_not_see_each_other():
    _, apply, variables = variant()
    rows, length = TOKENS.shape
    packed = TOKENS.reshape(1, -1)
    positions = np.tile(np.arange(length), rows)[None]
    segment_ids = np.repeat([7, 3], length)[None]
    logits = apply(variables, packed, positions, segment_ids)
    np.testing.assert_allclose(logits[0], GOLDEN["logits"].reshape(rows * length, -1), **CLOSE)
    # Rotary positions are relative: counting on through the row changes nothing but rounding.
    logits = apply(variables, packed, segment_ids=segment_ids)
    np.testing.assert_allclose(
        logits[0], GOLDEN["logits"].reshape(rows * length, -1), atol=1e-4, rtol=1e-4
    )


@scanned_and_unrolled
@pytest.mark.parametrize("split", [(12,), (7, 1, 1, 3)], ids=str)
def test_decoding_with_a_cache_is_the_forward_pass(way, split):
    config, apply, variables = variant(**way)
    cache, start, logits = init_cache(config, batch=2, length=16), 0, []
    for length in split:
        tokens = TOKENS[:, start : start + length]
        hidden, cache = apply(variables, tokens, cache, method="extend")
        logits.append(apply(variables, hidden, method="unembed"))
        start += length
    np.testing.assert_allclose(np.concatenate(logits, axis=1), GOLDEN["logits"], **CLOSE)
    assert cache.length == TOKENS.shape[1]


@scanned_and_unrolled
def test_decoding_continues_padded_rows(way):
    prompt = PADDING + 1
    config, apply, variables = variant(**way)
    tokens, (positions, segment_ids) = GOLDEN["padded_tokens"], padded_ids()
    cache, hidden = init_cache(config, batch=2, length=tokens.shape[1]), []
    for part in (slice(prompt), *(slice(i, i + 1) for i in range(prompt, tokens.shape[1]))):
        arguments = tokens[:, part], cache, positions[:, part], segment_ids[:, part]
        states, cache = apply(variables, *arguments, method="extend")
        hidden.append(states)
    logits = apply(variables, jnp.concatenate(hidden, axis=1), method="unembed")
    real = segment_ids == 1
    np.testing.assert_allclose(logits[real], GOLDEN["padded_logits"][real], **CLOSE)


def test_a_cache_in_half_precision_stays_so_and_is_close():
    config, apply, variables = variant()
    cache = init_cache(config, batch=2, length=12, dtype=jnp.bfloat16)
    hidden, filled = apply(variables, TOKENS, cache, method="extend")
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, cache)
    assert filled.k.dtype == filled.v.dtype == jnp.bfloat16
    assert hidden.dtype == jnp.float32
    logits = apply(variables, hidden, method="unembed")
    # A key or value is off by at most 2^-9 of itself; logits have a standard deviation of 2.4.
    np.testing.assert_allclose(logits, GOLDEN["logits"], atol=0.2)


def test_a_prompt_longer_than_the_cache_is_an_error():
    config, apply, variables = variant()
    cache = init_cache(config, batch=2, length=8)
    with pytest.raises(ValueError, match="12 tokens do not fit into a cache of 8 slots"):
        apply(variables, TOKENS, cache, method="extend")


@scanned_and_unrolled
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_activations(way, tied):
    _, apply, variables = variant(**way, tied_head=tied, dtype=jnp.bfloat16)
    hidden = apply(variables, TOKENS, method="hidden")
    logits = apply(variables, TOKENS)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    expected = GOLDEN["tied_logits" if tied else "logits"]
    # bfloat16 keeps 8 bits, of which three layers lose about three.
    assert np.std(logits - expected) < 2**-5 * np.std(expected)


LAYER_SHAPES = {
    "attn_norm/scale": (24,),
    "attn/q_proj/kernel": (24, 32),
    "attn/k_proj/kernel": (24, 16),
    "attn/v_proj/kernel": (24, 16),
    "attn/o_proj/kernel": (32, 24),
    "mlp_norm/scale": (24,),
    "mlp/gate_proj/kernel": (24, 40),
    "mlp/up_proj/kernel": (24, 40),
    "mlp/down_proj/kernel": (40, 24),
}


@every_way
@pytest.mark.parametrize("tied", [False, True])
def test_tree_of_parameters(way, tied):
    config = dataclasses.replace(CONFIG, **way, tied_head=tied, param_dtype=jnp.bfloat16)
    leaves = traverse_util.flatten_dict(parameter_shapes(config), sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    expected = {"embed/embedding": (96, 24), "final_norm/scale": (24,)}
    if not tied:
        expected["lm_head/kernel"] = (24, 96)
    for path, shape in LAYER_SHAPES.items():
        if config.scan_layers:
            expected[f"layers/{path}"] = (3, *shape)
        else:
            expected.update({f"layers_{i}/{path}": shape for i in range(3)})
    assert shapes == expected
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}


def test_layers_of_a_new_model_differ():
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).min() > 0


def test_stacking_and_unstacking_layers():
    unrolled = parameters(dataclasses.replace(CONFIG, scan_layers=False))
    stacked = stack_layers(unrolled)
    np.testing.assert_array_equal(
        stacked["layers"]["mlp"]["up_proj"]["kernel"][2],
        unrolled["layers_2"]["mlp"]["up_proj"]["kernel"],
    )
    again = unstack_layers(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(unrolled)
    jax.tree.map(np.testing.assert_array_equal, again, unrolled)
    abstract = jax.eval_shape(unstack_layers, stacked)
    assert jax.tree.map(jnp.shape, jax.eval_shape(stack_layers, abstract)) == jax.tree.map(
        jnp.shape, stacked
    )


@pytest.mark.parametrize(
    ("function", "tree", "sentence"),
    [
        (stack_layers, {"layers": {}}, "expected layers_0, layers_1, ... without a gap"),
        (stack_layers, {"layers_0": {}, "layers_2": {}}, r"got \['layers_0', 'layers_2'\]"),
        (unstack_layers, {"layers_0": {}}, "expected a tree with 'layers'"),
    ],
)
def test_trees_without_such_layers_are_errors(function, tree, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(tree)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"remat": "everything"}, "remat='everything' is no policy; write None or one of layer, "),
    ],
)
def test_impossible_shapes_are_errors(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As their model cards count them.
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-65b", 65_285_660_672),
    ],
)
def test_published_shapes_have_the_published_size(name, parameters):
    shapes = parameter_shapes(SHAPES[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_config_of_hugging_face():
    assert from_hf(HF_CONFIG) == DecoderConfig(
        vocab_size=96,
        dim=24,
        mlp_dim=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=500.0,
        norm_eps=1e-3,
        tied_head=False,
    )
    # As it was before transformers 5, and with what older files leave out.
    older = {k: v for k, v in HF_CONFIG.items() if k not in ("rope_parameters", "head_dim")}
    older |= {"rope_theta": 500.0, "rope_scaling": None, "num_key_value_heads": None}
    assert from_hf(older) == dataclasses.replace(CONFIG, head_dim=6, num_kv_heads=4)


GGUF_METADATA = {
    "general.architecture": "llama",
    "llama.vocab_size": 96,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 40,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-3,
}


def test_config_of_gguf():
    config = from_gguf(GGUF_METADATA, tied_head=True)
    assert config == DecoderConfig(
        vocab_size=96,
        dim=32,
        mlp_dim=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        norm_eps=1e-3,
        tied_head=True,
    )
    optional = {
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
    }
    assert from_gguf({**GGUF_METADATA, **optional}, tied_head=False) == dataclasses.replace(
        config, num_kv_heads=2, head_dim=16, rope_theta=500.0, tied_head=False
    )


@pytest.mark.parametrize(
    ("read", "fields", "changes", "sentence"),
    [
        (from_hf, HF_CONFIG, {"model_type": "mamba"}, "'mamba' in config.json; only llama, mis"),
        (from_hf, HF_CONFIG, {"hidden_size": None}, "config.json lacks 'hidden_size'"),
        (from_hf, HF_CONFIG, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (from_gguf, GGUF_METADATA, {"general.architecture": "qwen2"}, "architecture 'qwen2'"),
        (from_gguf, GGUF_METADATA, {"llama.block_count": None}, "lacks 'llama.block_count'"),
        (from_gguf, GGUF_METADATA, {"llama.vocab_size": None}, "lacks 'llama.vocab_size'"),
        (from_gguf, GGUF_METADATA, {"llama.expert_count": 8}, "llama.expert_count is 8"),
        (from_gguf, GGUF_METADATA, {"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'"),
        (from_gguf, GGUF_METADATA, {"llama.rope.dimension_count": 4}, "heads are 8 wide"),
    ],
)
def test_configs_that_cannot_be_honoured_are_errors(read, fields, changes, sentence):
    fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
    options = {"tied_head": True} if read is from_gguf else {}
    with pytest.raises(ValueError, match=sentence):
        read(fields, **options)
