"""Generation: against transformers' words, repeated forward passes and NumPy's distributions."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folder import write_folder

import lora_jax as lj
from lora_jax import generate as module
from lora_jax.formats.hf import read_hf
from lora_jax.generate import generate, log_distribution, stream
from lora_jax.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.compiled_quickly
GOLDEN = json.loads((Path(__file__).parent / "golden" / "generation.json").read_text())
PROMPTS, EXPECTED = GOLDEN["prompts"], GOLDEN["continuations"]
TOKENS = len(EXPECTED[0])
RULE = lj.LoraRule("layers.*kernel", rank=4, alpha=8.0, layout="b i o")


def make_adapters(base):
    """Adapters that say something: neither factor is zero."""
    tree = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, [RULE]))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), tree)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The golden model, its layers scanned or not."""
    folder = write_folder(tmp_path_factory.mktemp("tiny"))
    return functools.cache(lambda scan_layers=True: read_hf(folder, scan_layers=scan_layers))


@pytest.fixture(scope="module")
def model(read):
    return Decoder(read().config)


@pytest.fixture(scope="module")
def base(read):
    return jax.device_put(read().params)


@pytest.fixture(scope="module")
def adapters(base):
    return make_adapters(base)


def test_the_golden_tokens_are_decided_by_more_than_rounding():
    assert min(GOLDEN["margin"]) > 1e-2  # logits agree to 1e-4


@pytest.mark.parametrize(("scan_layers", "rows"), [(True, None), (False, None), (True, 2)])
def test_greedy_tokens_are_those_of_transformers(read, scan_layers, rows):
    checkpoint = read(scan_layers)
    model = Decoder(checkpoint.config)
    found = generate(model, checkpoint.params, None, PROMPTS, max_tokens=TOKENS, rows=rows)
    assert found == EXPECTED


WIDE = DecoderConfig(  # blocks of 32 divide every width
    vocab_size=96, dim=64, mlp_dim=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32
)


@functools.cache
def whole_pass():
    """Logits of a whole row of tokens, compiled once for all rows of a length."""
    model = Decoder(WIDE)
    return jax.jit(lj.adapt(lambda tree, tokens: model.apply({"params": tree}, tokens)))


@pytest.mark.parametrize(("kind", "adapted"), [(None, True), ("nf4", True), ("nf4", False)])
def test_greedy_tokens_are_those_of_whole_passes(kind, adapted):
    model, number = Decoder(WIDE), 8
    base = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    base = jax.tree.map(lambda x: 4 * x, base)
    if kind is not None:
        base = lj.quantize(base, RULE.pattern, kind=kind, block_size=32, layout=RULE.layout)
    adapters = make_adapters(base) if adapted else None
    tree = lj.combine(base, adapters)
    expected = []
    for prompt in PROMPTS[:4]:
        tokens = np.zeros((1, 32), np.int32)  # what comes later changes nothing
        tokens[0, : len(prompt)] = prompt
        for length in range(len(prompt), len(prompt) + number):
            tokens[0, length] = np.argmax(whole_pass()(tree, tokens)[0, length - 1])
        expected.append(tokens[0, len(prompt) : len(prompt) + number].tolist())
    assert len({token for row in expected for token in row}) > 4
    assert generate(model, base, adapters, PROMPTS[:4], max_tokens=number) == expected


def test_a_merged_base_writes_the_same(model, base, adapters):
    found = generate(model, base, adapters, PROMPTS, max_tokens=TOKENS)
    assert found != EXPECTED
    assert generate(model, lj.merge(base, adapters), None, PROMPTS, max_tokens=TOKENS) == found


def ended(tokens, eos):
    """Up to the first token that ends them, which is kept."""
    ends = [index for index, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("eos", [[95, 9], [53, 16], [70, 70], [0, 2], []], ids=str)
def test_a_continuation_ends_with_the_first_eos(model, base, eos):
    expected = [ended(tokens, eos) for tokens in EXPECTED]
    assert generate(model, base, None, PROMPTS, max_tokens=TOKENS, eos=eos) == expected


def test_rows_that_have_ended_wait_for_others_only(model, base):
    """Rows that fill up the last batch are never waited for."""
    found = generate(model, base, None, PROMPTS, max_tokens=TOKENS, eos=[95, 9], rows=3)
    assert found == [ended(tokens, [95, 9]) for tokens in EXPECTED]


def test_eos_may_be_one_token(model, base):
    found = generate(model, base, None, PROMPTS[:1], max_tokens=TOKENS, eos=81)
    assert found == [EXPECTED[0][:3]]


def test_one_token_needs_no_step(model, base):
    expected = [tokens[:1] for tokens in EXPECTED]
    assert generate(model, base, None, PROMPTS, max_tokens=1) == expected


def test_no_prompts_no_continuations(model, base):
    assert generate(model, base, None, [], max_tokens=4) == []


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_a_stream_has_the_same_tokens(model, base, adapters, options):
    options = dict(options, max_tokens=TOKENS, eos=95, key=jax.random.key(3))
    for prompt in PROMPTS[:3]:
        [expected] = generate(model, base, adapters, [prompt], **options)
        assert list(stream(model, base, adapters, prompt, **options)) == expected


def test_a_stream_may_be_left(model, base):
    tokens = stream(model, base, None, PROMPTS[1], max_tokens=TOKENS)
    assert [next(tokens) for _ in range(3)] == EXPECTED[1][:3]
    tokens.close()


def draw(model, base, prompts, *, seed=0, rows=5):
    return generate(
        model,
        base,
        None,
        prompts,
        max_tokens=12,
        temperature=1.5,
        top_p=0.9,
        key=jax.random.key(seed),
        rows=rows,
    )


def test_draws_depend_on_no_neighbour(model, base):
    expected = draw(model, base, PROMPTS)
    assert expected != draw(model, base, PROMPTS, seed=1)
    assert draw(model, base, PROMPTS) == expected
    assert draw(model, base, PROMPTS, rows=2) == expected
    assert draw(model, base, PROMPTS[:3]) == expected[:3]
    others = [[7, 7, 7], PROMPTS[1], [1] * 20]
    assert draw(model, base, others)[1] == expected[1]
    # Though not by the prompt alone: ten answers to one question are ten answers.
    assert len({tuple(tokens) for tokens in draw(model, base, PROMPTS[:1] * 10)}) == 10


def in_numpy(logits, temperature, top_p):
    """The nucleus by its definition, in float64: probabilities."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # probability of all that are likelier
    nucleus = order[before < top_p] if top_p < 1 else order
    kept = np.zeros_like(p)
    kept[nucleus] = p[nucleus]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_distribution_is_that_of_numpy(temperature, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 3, 500)).astype(np.float32) * 4
    found = jax.jit(log_distribution)(logits, temperature, top_p)
    assert found.dtype == jnp.float32
    for row, expected in zip(
        np.exp(np.asarray(found, np.float64)).reshape(-1, 500),
        [in_numpy(row, temperature, top_p) for row in logits.reshape(-1, 500)],
        strict=True,
    ):
        np.testing.assert_array_equal(row > 1e-30, expected > 1e-30)
        np.testing.assert_allclose(row, expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("logits", "temperature", "top_p", "expected"),
    [
        ([0.0, 0.0, -1e9], 1.0, 0.5, [0.5, 0.5, 0]),  # of equals, all
        ([0.0, 0.0, 0.0, 0.0], 1.0, 1e-9, [0.25] * 4),
        ([1e30, 0.0, -1e30], 1.0, 1.0, [1, 0, 0]),
        ([2.0, 1.0, 0.0], 1e-30, 1.0, [1, 0, 0]),
        ([2.0, 1.0, -np.inf], 1.0, 1.0, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0]),
        ([5.0, 5.0, 1.0], 1e30, 1.0, [1 / 3] * 3),
    ],
)
def test_distributions_at_the_limits(logits, temperature, top_p, expected):
    found = np.exp(log_distribution(jnp.asarray(logits), temperature, top_p))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.8)])
def test_tokens_are_drawn_as_often_as_they_are_likely(model, base, temperature, top_p):
    draws, prompt = 2_048, PROMPTS[2]
    logits = model.apply({"params": base}, np.asarray([prompt]))[0, -1]
    expected = in_numpy(logits, temperature, top_p)
    found = generate(
        model,
        base,
        None,
        [prompt] * draws,
        max_tokens=1,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(0),
        rows=512,
    )
    counts = np.bincount(np.ravel(found), minlength=len(expected))
    assert not counts[expected == 0].any()
    # Five standard deviations of each count.
    allowed = 5 * np.sqrt(draws * expected * (1 - expected)) + 1
    assert (np.abs(counts - draws * expected) <= allowed).all()


def test_one_program_serves_all_prompts_of_a_length(model, base):
    options = {"max_tokens": TOKENS, "eos": 95}
    generate(model, base, None, PROMPTS[:1], **options)
    list(stream(model, base, None, PROMPTS[0], **options))
    programs = (module._continue, module._compiled_read_prompts, module._compiled_step)
    before = [program._cache_size() for program in programs]
    again = Decoder(model.config)
    generate(again, base, None, [[1] * 40, [2]], eos=9, max_tokens=TOKENS, rows=1)
    list(stream(again, base, None, [1] * 64, eos=9, max_tokens=TOKENS))
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("length", "width"),
    [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (193, 256), (3_000, 3_072)],
)
def test_widths_are_few_and_close(length, width):
    assert module._width(length) == width


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 96]], {}, "prompt 0 has tokens from 1 to 96; the model knows 0 to 95"),
        ([[-1, 5]], {}, "prompt 0 has tokens from -1 to 5"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ([[1]], {"rows": 0}, "rows is 0, expected at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5, expected 0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": 1.0}, "key is None; write key=jax.random.key"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0, expected a probability"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_what_cannot_be_asked_for(model, base, prompts, options, sentence):
    options = {"max_tokens": 4} | options
    with pytest.raises(ValueError, match=sentence):
        generate(model, base, None, prompts, **options)
    if options.pop("rows", None) is None and len(prompts) == 1:
        with pytest.raises(ValueError, match=sentence):  # at once, before a token is asked for
            stream(model, base, None, prompts[0], **options)
