"""Which modules a config means, and of which rank and alpha: peft's own functions, name by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_jax.formats.peft import config
from lora_jax.formats.peft.config import read_config

MODULES = [
    "model.embed_tokens",
    "lm_head",
    "score",
    *(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1, 2, 10, 11, 21)
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.c_proj", "attn.c_proj"),
            *("mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.experts.11.up_proj"),
        )
    ),
    *(f"h.{layer}.attn.c_proj" for layer in (0, 1, 2)),
    "transformer.h.1.attn.c_proj",
    "encoder.layer.1.q_proj",
    "q_proj",
    "qq_proj",
]
TARGETS = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj", "h.1.attn.c_proj"]},
    {"target_modules": ["c_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    {
        "target_modules": ["c_proj", "q_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h", "layer"],
    },
    {"target_modules": ["model.layers.2.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*\.(mlp|self_attn)\.\w+"},
    {"target_modules": r"up_proj|model\.layers\.1.*"},
    {"target_modules": ["q_proj", "score", "lm_head"], "modules_to_save": ["score", "layers.1"]},
]
PATTERNS = [
    {},
    {"q_proj": 1},
    {"k_proj": 2, "q_proj": 3, r"model\.layers\.1\.self_attn\.q_proj": 4},
    {r"layers\.1\..*": 2, ".*c_proj": 3},
    {"up": 2, "proj": 3, "layers.1": 4},
    {r"^model\.layers\.1\.mlp\.up_proj": 5, "^mlp.up_proj": 6},
    {"self_attn.*|c_proj": 7, r"[02]\.mlp\.up_proj": 8},
]


def both(folder, **options):
    """What peft and we read of the file that it saves, which has its patterns sorted."""
    LoraConfig(**options).save_pretrained(folder)
    return LoraConfig.from_pretrained(folder), read_config(folder)


@pytest.mark.parametrize("options", TARGETS, ids=lambda x: json.dumps(x))
def test_targets(tmp_path, options):
    theirs, ours = both(tmp_path, **options)
    expected = {name: bool(check_target_module_exists(theirs, name)) for name in MODULES}
    assert len(set(expected.values())) == 2
    assert {name: ours.is_adapted(name) for name in MODULES} == expected


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda x: json.dumps(x))
def test_patterns(tmp_path, pattern, use_rslora):
    alphas = {name: value + 0.5 for name, value in reversed(pattern.items())}
    options = {"rank_pattern": pattern, "alpha_pattern": alphas, "use_rslora": use_rslora}
    theirs, ours = both(tmp_path, target_modules=["q_proj"], r=9, lora_alpha=10, **options)
    for name in MODULES:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
        key = get_pattern_key(theirs.alpha_pattern, name)
        alpha = theirs.alpha_pattern.get(key, theirs.lora_alpha)
        assert ours.rank(name) == rank
        assert ours.scale(name) == alpha / (math.sqrt(rank) if use_rslora else rank)


def test_every_field_is_understood_or_known_to_be_silent_or_refused(tmp_path):
    """A field that peft gains must be looked at: none of them is passed over unseen."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= config.KNOWN
    both(tmp_path, target_modules=["q_proj"])
