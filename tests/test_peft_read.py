"""Reading PEFT folders: those that peft itself saved, and those that cannot be read faithfully."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import GOLDEN, write_folder
from safetensors import safe_open

import lora_jax as lj
from lora_jax.formats.hf import read_hf
from lora_jax.formats.peft import read_peft, write_peft
from lora_jax.models.decoder import Decoder, unstack_layers

FOLDER = Path(__file__).parent / "golden" / "peft"
LOGITS = np.load(FOLDER / "logits.npz")
FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG, WEIGHTS = FILES
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The Llama that the golden adapters are for; its layers are scanned."""
    return read_hf(write_folder(tmp_path_factory.mktemp("model")))


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def tensors(folder):
    with safe_open(folder / WEIGHTS, "numpy") as file:
        return {name.removeprefix(PREFIX): file.get_tensor(name) for name in list(file.keys())}


def same_bytes(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def copy(folder, variant="patterns"):
    for name in FILES:
        shutil.copyfile(FOLDER / variant / name, folder / name)
    return folder


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("variant", ["patterns", "embedding"])
def test_logits_are_those_of_peft(checkpoint, tmp_path, variant, scan_layers):
    base = checkpoint.params if scan_layers else unstack_layers(checkpoint.params)
    adapters = read_peft(FOLDER / variant, base)
    config = dataclasses.replace(checkpoint.config, scan_layers=scan_layers)
    tree = {"params": lj.combine(base, adapters)}
    logits = lj.adapt(Decoder(config).apply)(tree, GOLDEN["tokens"][:1])
    np.testing.assert_allclose(logits[0], LOGITS[variant], atol=1e-4, rtol=1e-4)

    write_peft(tmp_path / "first", adapters, base_model="tiny")
    write_peft(tmp_path / "second", read_peft(tmp_path / "first", base), base_model="tiny")
    assert same_bytes(tmp_path / "first", tmp_path / "second")
    original, written = tensors(FOLDER / variant), tensors(tmp_path / "first")
    assert original.keys() - written.keys() <= {"model.embed_tokens.base_layer.weight"}
    for name, values in written.items():
        np.testing.assert_array_equal(values, original[name], strict=True)


def test_what_the_config_says_of_each_module(checkpoint):
    adapters = read_peft(FOLDER / "patterns", checkpoint.params)["layers"]
    theirs = tensors(FOLDER / "patterns")
    expected = {  # r = 2 but for v_proj, alpha 3 but for the mlp, divided by sqrt(r)
        ("attn", "q_proj"): (2, 3 / np.sqrt(2)),
        ("attn", "v_proj"): (1, 3.0),
        ("mlp", "down_proj"): (2, 5 / np.sqrt(2)),
    }
    for (part, name), (rank, scale) in expected.items():
        adapter = adapters[part][name]["kernel"]
        assert (adapter.rank, adapter.scale, adapter.layout) == (rank, scale, "i o")
        assert not adapter.a[1].any()  # layers_to_transform leaves out the second
        assert not adapter.b[1].any()
        module = f"model.layers.2.{'self_attn' if part == 'attn' else part}.{name}"
        np.testing.assert_array_equal(adapter.a[2], theirs[f"{module}.lora_A.weight"])
        np.testing.assert_array_equal(adapter.b[2], theirs[f"{module}.lora_B.weight"])
    assert adapters["attn"]["o_proj"]["kernel"] is None


def test_an_embedding_is_turned(checkpoint):
    adapters = read_peft(FOLDER / "embedding", checkpoint.params)
    theirs = tensors(FOLDER / "embedding")
    adapter = adapters["embed"]["embedding"]
    assert (adapter.dropout, adapter.layout) == (0.125, "o i")
    update = theirs["model.embed_tokens.lora_embedding_B"].astype(np.float64)
    update = (update @ theirs["model.embed_tokens.lora_embedding_A"]).T  # as peft adds it
    ours = np.asarray(adapter.b, np.float64) @ np.asarray(adapter.a, np.float64)
    np.testing.assert_allclose(ours, update, rtol=1e-12)
    norm = adapters["layers"]["mlp_norm"]["scale"][1]  # "norm" is the end of each norm's name
    np.testing.assert_array_equal(norm, theirs["model.layers.1.post_attention_layernorm.weight"])


def test_a_base_of_shapes_or_of_4_bits(checkpoint):
    params = checkpoint.params
    expected = read_peft(FOLDER / "embedding", params)
    base = lj.quantize(params, "o_proj", layout="b i o", block_size=32)
    for other in (shapes(params), base, shapes(base)):
        adapters = read_peft(FOLDER / "embedding", other)
        assert jax.tree.structure(adapters) == jax.tree.structure(expected)
        equal = jax.tree.map(lambda x, y: (x == y).all(), adapters, expected)
        assert all(jax.tree.leaves(equal))


def test_another_dtype(checkpoint):
    adapters = read_peft(FOLDER / "embedding", checkpoint.params, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"bfloat16"}


# Trees of one's own.


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


# What is refused.


def save(folder, named):
    prefixed = {PREFIX + name: np.ascontiguousarray(x) for name, x in named.items()}
    safetensors.numpy.save_file(prefixed, folder / WEIGHTS)


def edited(change):
    """Edits the tensors of a folder."""

    def edit(folder):
        named = tensors(folder)
        change(named)
        save(folder, named)

    return edit


def set_to(**options):
    """Edits the config of a folder."""

    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | options))

    return edit


def doubled(folder):
    """Writes a header that names its first tensor twice."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    entry = re.search(r'"base_model[^{]*\{[^}]*\}', header)[0]
    header = (header[:-1] + "," + entry + "}").encode()
    (folder / WEIGHTS).write_bytes(
        len(header).to_bytes(8, "little") + header + content[8 + length :]
    )


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


Q = "model.layers.0.self_attn.q_proj.lora_A.weight"
Q2 = "model.layers.2.self_attn.q_proj.lora_{}.weight"


def zeros_in_layer_2(named):
    for factor in "AB":
        named[Q2.format(factor)] = np.zeros_like(named[Q2.format(factor)])


SCAN = "separate layers (scan_layers=False)"
REFUSED = [
    (without(CONFIG), FileNotFoundError, "has no adapter_config.json"),
    (without(WEIGHTS), FileNotFoundError, "lacks adapter_model.safetensors; it has adapter_config"),
    (pickled, ValueError, "in a pickle (adapter_model.bin) and not in safetensors"),
    (cut, ValueError, "adapter_model.safetensors is broken or ends too early"),
    (written(CONFIG, "{,}"), ValueError, "is not valid JSON"),
    (written(CONFIG, "[]"), ValueError, "holds a JSON list, expected an object"),
    (set_to(peft_type="LOHA"), ValueError, "peft_type is 'LOHA'; only 'LORA' can be read"),
    (set_to(r=0), ValueError, "r is 0, expected a whole number of at least 1"),
    (set_to(r=True), ValueError, "r is True, expected a whole number"),
    (set_to(lora_alpha="8"), ValueError, "lora_alpha is '8', expected a number"),
    (set_to(lora_dropout=1), ValueError, "lora_dropout is 1, expected a probability below 1"),
    (set_to(target_modules="("), ValueError, "target_modules is '(', expected a list of names or"),
    (set_to(rank_pattern={"a": 0}), ValueError, "rank_pattern is {'a': 0}, expected ranks by"),
    (set_to(bias="all"), ValueError, 'bias = "all" cannot be honoured'),
    (set_to(use_dora=True), ValueError, "use_dora = true cannot be honoured"),
    (
        set_to(lora_bias=True, layer_replication=[[0, 2]]),
        ValueError,
        "layer_replication = [[0, 2]], lora_bias = true cannot be honoured",
    ),
    (set_to(some_method={"a": 1}), ValueError, 'some_method = {"a": 1} is not known here'),
    (set_to(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights is 'pissa_niter_4'"),
    (edited(lambda t: t.pop(Q)), ValueError, f"{Q} is missing"),
    (
        edited(lambda t: t.update({Q.replace("0", "1"): t[Q]})),
        ValueError,
        f"{Q.replace('0', '1')} is without a place in the base or the config",
    ),
    (
        edited(lambda t: t.update({Q: t[Q][:1]})),
        ValueError,
        f"{Q} ((1, 24), expected (2, 24)) is of another shape",
    ),
    (edited(lambda t: t.update({Q: t[Q].astype(np.int32)})), ValueError, "is stored as I32; only"),
    (
        edited(lambda t: t.update({Q: t[Q].astype(np.float16)})),
        ValueError,
        "layers/attn/q_proj/kernel are stored as float16, float32; write dtype=",
    ),
    (doubled, ValueError, "is more than once in the file"),
    (
        lambda folder: (
            save(folder, {})
            or safetensors.numpy.save_file(
                {"q_proj.lora_A.weight": np.ones((2, 2))}, folder / WEIGHTS
            )
        ),
        ValueError,
        "'q_proj.lora_A.weight' does not begin with 'base_model.model.'",
    ),
    (set_to(alpha_pattern={r"layers\.2.*": 5}), ValueError, SCAN),
    (edited(zeros_in_layer_2), ValueError, "some adapters of layers/attn/q_proj/kernel are zeros"),
]


@pytest.mark.parametrize(("break_it", "error", "sentence"), REFUSED)
def test_folders_that_cannot_be_read_faithfully(checkpoint, tmp_path, break_it, error, sentence):
    break_it(copy(tmp_path))
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        read_peft(tmp_path, checkpoint.params)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_is_no_folder(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_peft(tmp_path / "nowhere", checkpoint.params)


def test_what_says_nothing_is_passed_over(checkpoint, tmp_path):
    edit = set_to(
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        some_new_method=None,
        trainable_token_indices=[],
        loftq_config={"loftq_bits": 4},
    )
    edit(copy(tmp_path))
    read_peft(tmp_path, checkpoint.params)


def test_a_weight_that_is_not_the_bases_own(checkpoint, tmp_path):
    name = "model.embed_tokens.base_layer.weight"
    edited(lambda t: t.update({name: 2 * t[name]}))(copy(tmp_path, "embedding"))
    with pytest.raises(ValueError, match=f"{name} is not what it should repeat"):
        read_peft(tmp_path, checkpoint.params)
    read_peft(tmp_path, shapes(checkpoint.params))  # of which nothing is known


def test_an_embedding_without_its_tied_head(checkpoint):
    tied = {name: leaf for name, leaf in checkpoint.params.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="is trained without the head that is tied to it"):
        read_peft(FOLDER / "embedding", tied)


def test_one_norm_of_scanned_layers(checkpoint, tmp_path):
    saved = ["layers.1.input_layernorm", "model.norm"]
    edit = edited(lambda t: [t.pop(k) for k in list(t) if "norm" in k and not k.startswith(keep)])
    keep = tuple(f"model.{name.removeprefix('model.')}" for name in saved)
    edit(copy(tmp_path, "embedding"))
    set_to(modules_to_save=saved)(tmp_path)
    with pytest.raises(ValueError, match=r"1 of the 3 modules .* layers/attn_norm/scale"):
        read_peft(tmp_path, checkpoint.params)
    adapters = read_peft(tmp_path, unstack_layers(checkpoint.params))
    assert adapters["layers_1"]["attn_norm"]["scale"].shape == (24,)
    assert adapters["layers_0"]["attn_norm"]["scale"] is None


def test_going_on_without_what_does_not_fit(checkpoint, tmp_path):
    def change(named):
        del named[Q]  # its B alone is no adapter
        named["model.layers.2.extra"] = np.ones(3)
        named[Q2.format("B")] = named[Q2.format("B")][:5]
        named["model.layers.0.self_attn.v_proj.lora_B.weight"] *= 2

    edited(change)(copy(tmp_path))
    set_to(some_method=True)(tmp_path)
    adapters = read_peft(tmp_path, checkpoint.params, strict=False)
    assert adapters["layers"]["attn"]["q_proj"]["kernel"] is None
    expected = 2 * tensors(FOLDER / "patterns")["model.layers.0.self_attn.v_proj.lora_B.weight"]
    np.testing.assert_array_equal(adapters["layers"]["attn"]["v_proj"]["kernel"].b[0], expected)


def test_unrolled_layers_hold_what_differs(checkpoint, tmp_path):
    base = unstack_layers(checkpoint.params)
    copy(tmp_path)
    set_to(alpha_pattern={r"layers\.2.*": 5})(tmp_path)
    edited(zeros_in_layer_2)(tmp_path)
    adapters = read_peft(tmp_path, base)
    scales = [adapters[f"layers_{k}"]["attn"]["v_proj"]["kernel"].scale for k in (0, 2)]
    assert scales == [3.0, 5.0]
    assert adapters["layers_1"]["attn"]["v_proj"]["kernel"] is None
    write_peft(tmp_path / "ours", adapters, base_model="x")
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path).keys()
