"""Patterns of adapter_config.json: what matches is what `re` says, in a time that it cannot."""

from __future__ import annotations

import random
import re

import pytest

from lora_jax.formats.peft.patterns import is_pattern, matches, matches_ending

SEEN = [
    r".*\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj).*",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp|ffn).*?(?:q_proj|up_proj))"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"layers\.[0-3]\.mlp",
    r".*(?<=self_attn)\.q_proj",
    r"(\w+\.)*q_proj$",
    r"\Amodel.*\B_proj\Z",
    r"[^.\s]+|",
]
NAMES = [
    *("model.layers.0.self_attn.q_proj", "model.layers.12.mlp.up_proj", "lm_head", ""),
    *("model.visual.layers.3.self_attn.k_proj", "layers.3.mlp", "q_proj", "embed_tokens"),
]


def expected(pattern: str, name: str) -> tuple[bool, bool]:
    """As peft has it, of one pattern for all modules and of those for ranks."""
    ending = re.match(rf"(.*\.)?({pattern})$", name)
    return re.fullmatch(pattern, name) is not None, ending is not None


@pytest.mark.parametrize("pattern", SEEN)
def test_patterns_that_were_seen(pattern):
    for name in NAMES:
        assert (matches(pattern, name), matches_ending(pattern, name)) == expected(pattern, name)


ATOMS = (
    *("a", "b", ".", r"\.", "[ab]", "[^a]", r"[.\d]", r"\w", r"\W", r"\S", "^", "$", r"\b", r"\B"),
    *("(?=a)", "(?!b)", "(?<=a)", "(?<!b)"),
)
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}")


def drawn(rng: random.Random, depth: int) -> str:
    what = rng.random() if depth else 0
    if what < 0.3:
        return rng.choice(ATOMS)
    if what < 0.6:
        return drawn(rng, depth - 1) + drawn(rng, depth - 1)
    if what < 0.75:
        return f"(?:{drawn(rng, depth - 1)}|{drawn(rng, depth - 1)})"
    return f"({drawn(rng, depth - 1)}){rng.choice(REPEATS)}"


def test_drawn_patterns():
    rng, found = random.Random(0), [0, 0]
    for _ in range(4_000):
        pattern = drawn(rng, 4)
        name = "".join(rng.choices("ab.1", k=rng.randrange(1, 7)))
        if not is_pattern(pattern):  # three repetitions in each other
            continue
        answer = matches(pattern, name), matches_ending(pattern, name)
        assert answer == expected(pattern, name), (pattern, name)
        found[answer[1]] += 1
    assert min(found) > 500  # neither answer is a matter of course


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a?){30}a{30}", "((.*)*)*x"])
def test_what_takes_forever_to_be_tried(pattern):
    assert not matches(pattern, "model.layers.31." + "a" * 40)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "a{99999999999999999999}", r"(a)\1", "(?>a)b", "a++", "(?i)a", "((((.*)*)*)*)*x"),
        *("a" * 3_000, "(" * 999, ".*" * 200, 5),
    ],
)
def test_what_is_no_pattern(pattern):
    assert not is_pattern(pattern)
