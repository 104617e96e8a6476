"""Trees of one's own as PEFT folders: experts, other models' names, tied heads, and sizes."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_folder import CONFIG, WEIGHTS, same_bytes, save, set_to, tensors

import lora_jax as lj
from lora_jax.formats.peft import read_peft, write_peft

pytestmark = pytest.mark.compiled_quickly


def expert_tree():
    """Two layers, three experts, and a router; `in` 4 and `out` 5."""
    kernel = np.zeros((2, 3, 4, 5), np.float32)
    experts = {"up_proj": {"kernel": kernel}, "down_proj": {"kernel": kernel.swapaxes(2, 3)}}
    return {"layers": {"mlp": {"router": {"kernel": np.zeros((2, 4, 3))}, "experts": experts}}}


def random_adapters(base, rules):
    adapters = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, rules))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), adapters)


def test_experts_are_modules_of_their_own(tmp_path):
    base = expert_tree()
    adapters = random_adapters(base, [lj.LoraRule("experts", rank=2, alpha=3, layout="b b i o")])
    write_peft(tmp_path, adapters, base_model="x")
    written = tensors(tmp_path)
    leaf = adapters["layers"]["mlp"]["experts"]["down_proj"]["kernel"]
    name = "model.layers.1.mlp.experts.2.down_proj"
    np.testing.assert_array_equal(written[f"{name}.lora_A.weight"], leaf.a[1, 2])
    np.testing.assert_array_equal(written[f"{name}.lora_B.weight"], leaf.b[1, 2])
    assert len(written) == 2 * 2 * 2 * 3
    described = json.loads((tmp_path / CONFIG).read_text())
    assert described["target_modules"] == ["down_proj", "up_proj"]
    unrolled = {"layers_0": None, "layers_1": None}
    for layer in (0, 1):
        unrolled[f"layers_{layer}"] = jax.tree.map(lambda x, k=layer: x[k], adapters["layers"])
    write_peft(tmp_path / "unrolled", unrolled, base_model="x")
    assert same_bytes(tmp_path, tmp_path / "unrolled")
    again = read_peft(tmp_path, base)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert all(
        (x == y).all()
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True)
    )


@pytest.mark.parametrize(
    ("scales", "modules"),
    [
        (
            ["attn_norm", "mlp_norm"],
            ["input_layernorm", "post_attention_layernorm"],
        ),
        (  # Gemma 2's, where the second of these names says another thing
            ["attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"],
            [
                *("input_layernorm", "post_attention_layernorm"),
                *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            ],
        ),
    ],
)
def test_norms_are_called_what_their_family_calls_them(tmp_path, scales, modules):
    layers = {n: {"scale": np.full((2, 3), k, np.float32)} for k, n in enumerate(scales)}
    base = {"layers": {**layers, "attn": {"q_proj": {"kernel": np.zeros((2, 3, 4))}}}}
    base = jax.tree.map(lambda x: x.astype(np.float32), base)
    adapters = random_adapters(base, [lj.LoraRule("q_proj", rank=2, layout="b i o")])
    adapters["layers"] |= layers
    write_peft(tmp_path, adapters, base_model="x")
    written = tensors(tmp_path)
    for value, module in enumerate(modules):
        assert (written[f"model.layers.1.{module}.weight"] == value).all()
    again = read_peft(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, again["layers"], adapters["layers"])


def test_a_router_is_called_a_gate(tmp_path):
    base = expert_tree()
    write_peft(
        tmp_path, random_adapters(base, [lj.LoraRule("router", 2, layout="b i o")]), base_model="x"
    )
    assert "model.layers.1.mlp.gate.lora_A.weight" in tensors(tmp_path)


@pytest.mark.parametrize(
    "targets", [["down_proj"], ["experts.gate_up_proj", "mlp.experts.down_proj"]]
)
def test_experts_in_one_parameter(tmp_path, targets):
    """Of width 4 and 5: rows of A lie expert by expert, B's columns rank by rank."""
    rng, rank, experts = np.random.default_rng(0), 2, 3
    base = {"layers": {"mlp": {"experts": {}}}}
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (2, experts, 5, 4) if name == "down_proj" else (2, experts, 4, 5)
        base["layers"]["mlp"]["experts"][name] = {"kernel": np.zeros(shape, np.float32)}
    sizes = {"down_proj": (5, 4), "gate_up_proj": (4, 10)}
    named, factors = {}, {}
    for layer in (0, 1):
        for depth, target in enumerate(reversed(targets)):
            inn, out = sizes[kind := target.rpartition(".")[2]]
            a, b = rng.normal(size=(rank * experts, inn)), rng.normal(size=(out, rank * experts))
            factors[layer, kind] = a, b
            module = f"model.layers.{layer}.mlp.experts{'.base_layer' * depth}"
            named |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save(tmp_path, {name: x.astype(np.float32) for name, x in named.items()})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": ["down_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_parameters": targets}))
    leaves = read_peft(tmp_path, base)["layers"]["mlp"]["experts"]
    for (layer, kind), (a, b) in factors.items():
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        leaf = [leaves[part]["kernel"] for part in parts]
        for expert in range(experts):
            expected = 0
            for k in range(rank):
                expected += 1.5 * np.outer(b[:, k * experts + expert], a[expert * rank + k])
            found = [x.scale * x.b[layer, expert] @ x.a[layer, expert] for x in leaf]
            np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5, atol=1e-5)
    assert (leaves["gate_proj"]["kernel"] is None) == (len(targets) == 1)
    config["target_parameters"] = ["router.weight"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapts the parameters router\.weight, and the base has"):
        read_peft(tmp_path, base)


EXPERT_LAYERS = expert_tree()["layers"]
NAMED = {
    "h/attn/c_attn/kernel": "transformer.h.{}.attn.c_attn",
    "h/mlp/c_proj/kernel": "transformer.h.{}.mlp.c_proj",
    "h/attn/out/kernel": "transformer.h.{}.attn.c_proj",
    "score/kernel": "score",
    "score/bias": "score",
}


def named_tree():
    return {
        "h": {
            "attn": {
                "c_attn": {"kernel": np.zeros((2, 4, 12), np.float32)},
                "out": {"kernel": np.zeros((2, 2, 2, 4), np.float32)},
            },
            "mlp": {"c_proj": {"kernel": np.zeros((2, 16, 4), np.float32)}},
        },
        "score": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)},
    }


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [(), "score/kernel", ["score", "c_attn"]])
def test_names_of_ones_own(tmp_path, as_function, fan_in_fan_out):
    base, names = named_tree(), NAMED.get if as_function else NAMED
    rules = [lj.LoraRule("c_attn", 2, layout="b i o"), lj.LoraRule("out", 2, layout="b i i o")]
    adapters = random_adapters(base, rules)
    rng = np.random.default_rng(1)
    adapters["score"] = jax.tree.map(lambda x: rng.normal(size=x.shape), base["score"])
    options = {"names": names, "base_model": "x", "fan_in_fan_out": fan_in_fan_out}
    write_peft(tmp_path / "first", adapters, dtype=np.float32, **options)
    written, leaf = tensors(tmp_path / "first"), adapters["h"]["attn"]["out"]["kernel"]
    name = "transformer.h.1.attn.c_proj"
    np.testing.assert_array_equal(written[f"{name}.lora_A.weight"], leaf.a[1])
    head = adapters["score"]["kernel"].astype(np.float32)
    head = head if fan_in_fan_out else head.T  # as GPT-2's Conv1D, or as a Linear
    np.testing.assert_array_equal(written["score.weight"], head)
    described = json.loads((tmp_path / "first" / CONFIG).read_text())
    # The short name of `c_proj` would reach that of the mlp, which has no adapter.
    names_written = ["c_attn", "transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert described["target_modules"] == names_written
    assert described["modules_to_save"] == ["score"]
    assert described["fan_in_fan_out"] == (len(fan_in_fan_out) == 2)  # of an adapted one

    layouts = {"out/kernel": "b i i o"}
    options_read = {"names": names, "layouts": layouts, "fan_in_fan_out": fan_in_fan_out}
    again = read_peft(tmp_path / "first", base, **options_read)
    assert again["h"]["attn"]["out"]["kernel"].layout == "i i o"
    write_peft(tmp_path / "second", again, **options)
    assert same_bytes(tmp_path / "first", tmp_path / "second")
    with pytest.raises(ValueError, match=r"h/attn/out/kernel has axes \(2, 2, 4\).*layouts="):
        read_peft(tmp_path / "first", base, names=names)


def test_targets_are_spelled_out_where_some_leaves_have_no_name(tmp_path):
    adapters = random_adapters(named_tree(), [lj.LoraRule("c_attn", 2, layout="b i o")])
    write_peft(tmp_path, adapters, base_model="x", names={"h/attn/c_attn/kernel": "h.{}.c_attn"})
    described = json.loads((tmp_path / CONFIG).read_text())
    assert described["target_modules"] == ["h.0.c_attn", "h.1.c_attn"]


def test_a_tied_head_is_written_and_read_with_its_embedding(tmp_path):
    base = {"embed": {"embedding": np.zeros((7, 4), np.float32)}}
    adapters = random_adapters(base, [lj.LoraRule("embed", 2, 5.0, layout="o i")])
    write_peft(tmp_path, adapters, base_model="x")
    described, written = json.loads((tmp_path / CONFIG).read_text()), tensors(tmp_path)
    assert described["ensure_weight_tying"]
    assert described["target_modules"] == ["embed_tokens"]
    embedding = adapters["embed"]["embedding"]
    np.testing.assert_array_equal(written["lm_head.lora_A.weight"], embedding.a)
    np.testing.assert_array_equal(written["lm_head.lora_B.weight"], embedding.b)
    again = read_peft(tmp_path, base)["embed"]["embedding"]
    np.testing.assert_array_equal(again.a, embedding.a)

    written["lm_head.lora_B.weight"] *= 2
    save(tmp_path, written)
    with pytest.raises(ValueError, match=r"lm_head\.lora_B\.weight is not what it should repeat"):
        read_peft(tmp_path, base)
    set_to(alpha_pattern={"embed_tokens": 3})(tmp_path)
    with pytest.raises(ValueError, match="or their scales differ"):
        read_peft(tmp_path, base)


def test_a_tied_head_with_an_embedding_trained_whole(tmp_path):
    base = {"embed": {"embedding": np.zeros((7, 4), np.float32)}, "layers": EXPERT_LAYERS}
    adapters = random_adapters(base, [lj.LoraRule("router", 2, layout="b i o")])
    adapters["embed"]["embedding"] = np.ones((7, 4), np.float32)
    write_peft(tmp_path, adapters, base_model="x")
    written = tensors(tmp_path)
    np.testing.assert_array_equal(written["lm_head.weight"], np.ones((7, 4)))
    read_peft(tmp_path, base)
    written["lm_head.weight"][3] = 2
    save(tmp_path, written)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not what it should repeat"):
        read_peft(tmp_path, base)
    set_to(ensure_weight_tying=False)(tmp_path)
    with pytest.raises(ValueError, match="ensure_weight_tying is not set"):
        read_peft(tmp_path, base)


def test_the_size_of_a_7b_adapter(tmp_path):
    """r = 16 on q, k, v and o of 32 layers of width 4096, in bfloat16."""
    leaf = lj.Adapter(
        np.zeros((32, 16, 4096), jnp.bfloat16), np.zeros((32, 4096, 16), jnp.bfloat16), 1.0
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapters = {"layers": {"attn": {name: {"kernel": leaf} for name in names}}}
    write_peft(tmp_path, adapters, base_model="meta-llama/Llama-2-7b-hf")
    parameters = 32 * 4 * 16 * (4096 + 4096)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert 2 * parameters < size <= 34e6


def fused_tree():
    """Two layers, three experts; D 4, F 5."""
    sizes = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    experts = {
        name: {"kernel": np.zeros((2, 3, *size), np.float32)} for name, size in sizes.items()
    }
    router = {"kernel": np.zeros((2, 4, 3), np.float32)}
    attn = {"q_proj": {"kernel": np.zeros((2, 4, 4), np.float32)}}
    return {"layers": {"mlp": {"experts": experts, "router": router}, "attn": attn}}


@pytest.mark.parametrize("shared", [False, True], ids=["ranks add up", "one A for both"])
def test_experts_are_fused_as_their_class_has_them(tmp_path, shared):
    """Rank 2 and scale 3 / 2 of gates, 1 and 5 of ups; the formula is that of the format."""
    rules = [
        lj.LoraRule("gate_proj", rank=2, alpha=3, layout="b b i o", dropout=0.1),
        lj.LoraRule("up_proj", rank=2 if shared else 1, alpha=5, layout="b b i o", dropout=0.1),
        lj.LoraRule("router|q_proj", rank=2, alpha=3, layout="b i o", dropout=0.1),
    ]
    adapters = random_adapters(fused_tree(), rules)
    experts = adapters["layers"]["mlp"]["experts"]
    if shared:
        up = experts["up_proj"]["kernel"]
        experts["up_proj"]["kernel"] = dataclasses.replace(up, a=experts["gate_proj"]["kernel"].a)
    write_peft(tmp_path / "first", adapters, base_model="x")
    written = tensors(tmp_path / "first")
    described = json.loads((tmp_path / "first" / CONFIG).read_text())
    assert described["target_modules"] == ["q_proj"]
    assert described["target_parameters"] == ["experts.gate_up_proj", "gate.weight"]
    assert described["lora_dropout"] == 0  # which peft has not for parameters
    rank = 2 if shared else 3
    assert described["rank_pattern"].get("experts.gate_up_proj", described["r"]) == rank
    alpha = described["alpha_pattern"].get("experts.gate_up_proj", described["lora_alpha"])
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        a, b = (written[f"{name}.lora_{x}.weight"] for x in "AB")
        assert (a.shape, b.shape) == ((3 * rank, 4), (10, 3 * rank))
        for expert in range(3):
            found = sum(
                np.outer(b[:, k * 3 + expert], a[expert * rank + k]) * alpha / rank
                for k in range(rank)
            )
            parts = (experts[part]["kernel"] for part in ("gate_proj", "up_proj"))
            expected = [x.scale * x.b[layer, expert] @ x.a[layer, expert] for x in parts]
            np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
    router = adapters["layers"]["mlp"]["router"]["kernel"]
    np.testing.assert_array_equal(written["model.layers.1.mlp.gate.lora_B.weight"], router.b[1])

    again = read_peft(tmp_path / "first", fused_tree())
    write_peft(tmp_path / "second", again, base_model="x")
    assert same_bytes(tmp_path / "first", tmp_path / "second")


def test_experts_some_of_which_have_no_adapter(tmp_path):
    """Of three experts two, of two layers one; a folder of modules becomes one of parameters."""
    adapters = random_adapters(
        fused_tree(), [lj.LoraRule("(up|gate)_proj", rank=2, layout="b b i o")]
    )
    for leaf in jax.tree.leaves(adapters):
        leaf[0] = leaf[1, 2] = 0
    options = {"base_model": "x", "fused_experts": False}
    write_peft(tmp_path / "modules", adapters, **options)
    assert len(tensors(tmp_path / "modules")) == 2 * 2 * 2
    found = read_peft(tmp_path / "modules", fused_tree())
    write_peft(tmp_path / "fused", found, base_model="x")
    described = json.loads((tmp_path / "fused" / CONFIG).read_text())
    assert described["target_parameters"] == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert described["target_modules"] == []
    again = read_peft(tmp_path / "fused", fused_tree())
    write_peft(tmp_path / "again", again, base_model="x")
    assert same_bytes(tmp_path / "fused", tmp_path / "again")
    merged = [lj.merge(fused_tree(), tree)["layers"]["mlp"]["experts"] for tree in (found, again)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *merged)


def test_fused_experts_cannot_be_trained_whole(tmp_path):
    tree = random_adapters(fused_tree(), [lj.LoraRule("q_proj", rank=2, layout="b i o")])
    tree["layers"]["mlp"]["experts"]["up_proj"]["kernel"] = np.ones((2, 3, 4, 5), np.float32)
    with pytest.raises(ValueError, match="up_proj/kernel is trained whole, and peft has no place"):
        write_peft(tmp_path, tree, base_model="x")
