"""Every family that can be read: logits of transformers, from rows and calls of every sort."""

from __future__ import annotations

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES, GOLDEN_FILE, LENGTH, SHORT, TOKENS, VOCAB, WINDOW, write_family

from lora_jax.formats.hf import read_hf
from lora_jax.models.decoder import Decoder, by_layout, init_cache, parameter_shapes
from lora_jax.models.families import from_hf

pytestmark = pytest.mark.compiled_quickly

GOLDEN = np.load(GOLDEN_FILE)
CLOSE = {"atol": 5e-5, "rtol": 1e-5}  # float32 rounding, on logits of up to 8


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """From the name of a case, and whether to scan its layers, to a decoder and its parameters."""

    @functools.cache
    def read(case, scan_layers=True):
        folder = write_family(tmp_path_factory.mktemp("family"), CASES[case])
        checkpoint = read_hf(folder, scan_layers=scan_layers)
        decoder = Decoder(checkpoint.config)
        # Compiled in half of the time: a program here runs once.
        options = {"xla_backend_optimization_level": 0}
        apply = jax.jit(decoder.apply, static_argnames="method", compiler_options=options)
        return checkpoint.config, apply, {"params": checkpoint.params}

    return read


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    # Of the unrolled ones, those whose layers differ, or have experts that are stacked even so.
    [
        *((case, True) for case in CASES),
        *((case, False) for case in ("smollm3, window", "gemma3_text", "qwen3_moe")),
    ],
)
def test_logits_of_rows_of_every_sort(read, case, scan_layers):
    """Packed, padded in front and counting from seven, padded behind."""
    _, apply, variables = read(case, scan_layers)
    short = LENGTH - SHORT
    tokens = np.zeros((3, LENGTH + short), int)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    tokens[0] = [*TOKENS[0], *TOKENS[1, SHORT:]]
    segment_ids[0] = [*[3] * LENGTH, *[2] * short]
    positions[0] = [*range(LENGTH), *range(short)]
    tokens[1, short:], tokens[2, :LENGTH] = TOKENS
    segment_ids[1, short:], segment_ids[2, :LENGTH] = 1, 1
    positions[1, short:], positions[2, :LENGTH] = np.arange(LENGTH) + 7, np.arange(LENGTH)
    logits = apply(variables, tokens, positions, segment_ids)
    expected = GOLDEN[f"{case}/logits"]
    np.testing.assert_allclose(logits[0, :LENGTH], expected[0], **CLOSE)
    np.testing.assert_allclose(logits[0, LENGTH:], GOLDEN[f"{case}/shorter"], **CLOSE)
    np.testing.assert_allclose(logits[1, short:], expected[0], **CLOSE)
    np.testing.assert_allclose(logits[2, :LENGTH], expected[1], **CLOSE)
    assert np.isfinite(logits).all()  # padding sees itself


@pytest.mark.parametrize(
    ("case", "length"),
    [("mistral", LENGTH), ("gemma3_text", LENGTH), ("gemma3_text", WINDOW), ("gemma2", WINDOW)],
)
def test_plain_rows_need_no_mask_up_to_the_window(read, case, length):
    _, apply, variables = read(case)
    logits = apply(variables, TOKENS[:, :length])
    np.testing.assert_allclose(logits, GOLDEN[f"{case}/logits"][:, :length], **CLOSE)


@pytest.mark.parametrize("case", ["qwen2", "gemma3_text", "qwen3_moe"])
def test_decoding_with_a_cache_goes_beyond_the_window(read, case):
    config, apply, variables = read(case)
    cache, hidden = init_cache(config, batch=2, length=LENGTH + 3), []
    for start in range(0, LENGTH, 4):
        tokens = TOKENS[:, start : start + 4]
        states, cache = apply(variables, tokens, cache, method="extend")
        hidden.append(states)
    logits = apply(variables, np.concatenate(hidden, axis=1), method="unembed")
    np.testing.assert_allclose(logits, GOLDEN[f"{case}/logits"], **CLOSE)


def test_a_window_narrows_the_mask_of_a_tree(read):
    """A mask that shows all slots up to a token's own is what `extend` makes by itself."""
    config, apply, variables = read("mistral")
    mask = np.broadcast_to(np.tri(LENGTH, dtype=bool), (2, LENGTH, LENGTH))
    cache = init_cache(config, batch=2, length=LENGTH)
    hidden, _ = apply(variables, TOKENS, cache, mask=mask, method="extend")
    logits = apply(variables, hidden, method="unembed")
    np.testing.assert_allclose(logits, GOLDEN["mistral/logits"], **CLOSE)


def test_embeddings_are_scaled_once(read):
    config, apply, variables = read("gemma2")
    rows = variables["params"]["embed"]["embedding"][TOKENS]
    embeddings = apply(variables, TOKENS, method="embeddings")
    np.testing.assert_allclose(embeddings, rows * np.sqrt(config.dim), rtol=1e-6)
    hidden = apply(variables, TOKENS, embeddings=embeddings, method="hidden")
    logits = apply(variables, hidden, method="unembed")
    assert logits.shape == (*TOKENS.shape, VOCAB)
    np.testing.assert_allclose(logits, GOLDEN["gemma2/logits"], **CLOSE)


def test_embeddings_are_scaled_in_the_dtype_of_activations(read):
    """By sqrt(32) = 5.6569 rounded to 5.65625 in bfloat16, and the product rounded again."""
    config, _, variables = read("gemma2")
    decoder = Decoder(dataclasses.replace(config, dtype=ml_dtypes.bfloat16))
    rows = variables["params"]["embed"]["embedding"][TOKENS].astype(ml_dtypes.bfloat16)
    expected = (rows.astype(np.float64) * 5.65625).astype(ml_dtypes.bfloat16)
    embeddings = decoder.apply(variables, TOKENS, method="embeddings")
    np.testing.assert_array_equal(embeddings, expected)


def test_layouts_of_what_a_pattern_matches():
    shapes = parameter_shapes(from_hf(CASES["qwen3_moe"]))
    assert by_layout("experts/", shapes) == {"b b i o": "experts/"}
    assert by_layout("embed|lm_head", shapes) == {
        "o i": "^(embed/embedding)$",
        "i o": "^(lm_head/kernel)$",
    }
    found = by_layout("q_proj/kernel|down_proj", shapes)
    assert found == {
        "b i o": "^(layers/attn/q_proj/kernel)$",
        "b b i o": "^(layers/mlp/experts/down_proj/kernel)$",
    }
    unrolled = dataclasses.replace(from_hf(CASES["qwen3_moe"]), scan_layers=False)
    assert list(by_layout("layers_1/.*_proj", parameter_shapes(unrolled))) == ["i o", "b i o"]
    with pytest.raises(ValueError, match="'k_norm' matches layers/attn/k_norm/scale, which is no"):
        by_layout("k_norm", shapes)
    with pytest.raises(ValueError, match="matches no leaf"):
        by_layout("nothing", shapes)
