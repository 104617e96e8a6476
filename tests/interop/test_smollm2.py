"""SmolLM2-135M-Instruct against kept numbers (golden/smollm2.npz): needs its file, not torch."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.tree import named_leaves
from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import fetch
from lora_jax.models.decoder import Decoder

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "smollm2.npz")

# Ids that llama.cpp's llama-tokenize gives for the same file.
TOKENIZED = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "In 1542, 3.14159 × 2000 = don't  DON'T\n\n\ttabs  and   spaces ": [
        788,
        216,
        33,
        37,
        36,
        34,
        28,
        216,
        35,
        30,
        33,
        36,
        33,
        37,
        41,
        15493,
        216,
        34,
        32,
        32,
        32,
        446,
        1326,
        982,
        216,
        422,
        2154,
        23,
        68,
        1116,
        197,
        100,
        7366,
        216,
        284,
        256,
        5600,
        216,
    ],
    "naïve café — “quotes” 你好 🙂🙃 مرحبا": [
        3546,
        46494,
        37366,
        1841,
        619,
        385,
        2346,
        573,
        216,
        18645,
        250,
        48392,
        138,
        47526,
        10813,
        243,
        221,
        36395,
        20602,
        44626,
        31462,
        10805,
    ],
    "<|im_start|>user\nWhat is 12+345?<|im_end|>\n<|im_start|>assistant\n": [
        1,
        4093,
        198,
        1780,
        314,
        216,
        33,
        34,
        27,
        35,
        36,
        37,
        47,
        2,
        198,
        1,
        520,
        9531,
        198,
    ],
    "def f(x):\n    return x**2  # comment\n": [
        1604,
        275,
        24,
        104,
        727,
        472,
        1003,
        1792,
        828,
        34,
        216,
        907,
        5189,
        198,
    ],
    " leading": [2899],
    "thirtysomething scientists unveil doomsday clock of hair loss": [
        373,
        6746,
        672,
        18785,
        2907,
        22545,
        301,
        536,
        1388,
        1222,
        9191,
        282,
        4416,
        2184,
    ],
    "a1b22c333 ١٢٣ ²³ ½ Ⅷ": [
        81,
        33,
        82,
        34,
        34,
        83,
        35,
        35,
        35,
        216,
        164,
        111,
        164,
        112,
        164,
        113,
        216,
        19133,
        39050,
        216,
        16738,
        216,
        173,
        223,
        117,
    ],
}


@pytest.fixture(scope="module")
def checkpoint():
    return read_gguf(fetch("smollm2-135m-instruct"))


@pytest.mark.parametrize("index", range(3))
def test_logits(checkpoint, index):
    tokens = GOLDEN[f"tokens_{index}"]
    logits = jax.jit(Decoder(checkpoint.config).apply)({"params": checkpoint.params}, tokens[None])
    chosen = logits[0][:, GOLDEN["vocabulary"]]
    normalizer = jax.nn.logsumexp(logits[0], axis=-1)
    assert np.abs(chosen - GOLDEN[f"logits_{index}"]).max() <= 1e-3
    assert np.abs(normalizer - GOLDEN[f"normalizer_{index}"]).max() <= 1e-3


@pytest.mark.parametrize(("text", "ids"), TOKENIZED.items(), ids=range(len(TOKENIZED)))
def test_tokenizer(checkpoint, text, ids):
    assert checkpoint.tokenizer.encode(text).ids == ids
    assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_packed_kernels(checkpoint):
    """The file's own 4 bits: 5 for a parameter, and the very values that are read otherwise."""
    packed = read_gguf(fetch("smollm2-135m-instruct"), packed=True)
    leaves = dict(named_leaves(packed.params))
    assert leaves.keys() == dict(named_leaves(checkpoint.params)).keys()
    for path, values in named_leaves(checkpoint.params):
        leaf = leaves[path]
        if path.endswith("/kernel"):
            assert (leaf.kind, 8 * leaf.nbytes / leaf.size) == ("q4_1", 5.0)
            leaf = np.asarray(lj.dequantize(leaf))
        assert leaf.dtype == values.dtype
        assert leaf.tobytes() == values.tobytes(), path
