"""Models of one's own with peft: GPT-2's Conv1D, and experts that are modules each."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_jax as lj
from lora_jax.formats.peft import read_peft, write_peft

# peft 0.21.2 asks transformers 5.23 for a name that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

WIDTH, EXPERTS, LAYERS = 8, 3, 2
X = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)


class ConvBlocks(nn.Module):
    """Two layers of GPT-2's kind of linear module, whose weight is [in, out]."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(Conv1D(WIDTH, WIDTH) for _ in range(LAYERS))
        self.score = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.h:
            x = torch.tanh(layer(x))
        return self.score(x)


class Experts(nn.Module):
    """One layer: the mean over experts, each a module of its own."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList(nn.Module() for _ in range(EXPERTS))
        for expert in self.mlp.experts:
            expert.up_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return sum(torch.tanh(expert.up_proj(x)) for expert in self.mlp.experts) / EXPERTS


class ExpertLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Experts() for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


def conv_blocks(tree, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["kernel"] + w["bias"]), None), x, tree["h"])
    return x @ tree["score"]["kernel"] + tree["score"]["bias"]


def expert_layers(tree, x):
    def layer(x, kernels):
        return jnp.tanh(jnp.einsum("ti,eio->eto", x, kernels)).mean(0), None

    return jax.lax.scan(layer, x, tree["layers"]["mlp"]["experts"]["up_proj"]["kernel"])[0]


def conv_tree(model):
    layers = [dict(layer.named_parameters()) for layer in model.h]
    stacked = {
        ours: np.stack([layer[theirs].detach().numpy() for layer in layers])
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    score = model.score
    head = {"kernel": score.weight.detach().numpy().T, "bias": score.bias.detach().numpy()}
    return {"h": stacked, "score": head}


def expert_tree(model):
    weights = [
        [expert.up_proj.weight.detach().numpy().T for expert in layer.mlp.experts]
        for layer in model.model.layers
    ]
    return {"layers": {"mlp": {"experts": {"up_proj": {"kernel": np.stack(weights)}}}}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch model, the same function and tree here, and how one is named after the other."""

    build: type[nn.Module]
    apply: object
    tree: object
    names: object
    rule: lj.LoraRule
    peft: dict


CASES = {
    "conv1d": Case(
        ConvBlocks,
        conv_blocks,
        conv_tree,
        {"h/kernel": "h.{}", "h/bias": "h.{}"},
        lj.LoraRule("h/kernel", 2, 6.0, layout="b i o"),
        {"target_modules": ["h.0", "h.1"], "fan_in_fan_out": True},
    ),
    "experts": Case(
        ExpertLayers,
        expert_layers,
        expert_tree,
        None,
        lj.LoraRule("experts", 2, 6.0, layout="b b i o"),
        {"target_modules": ["up_proj"]},
    ),
}


def build(case):
    torch.manual_seed(0)
    model = case.build()
    for value in model.parameters():
        value.data = 0.5 * torch.randn(value.shape)
    return model


def output(model):
    with torch.no_grad():
        return model(torch.from_numpy(X)).numpy()


@pytest.mark.parametrize("name", CASES)
def test_both_ways(tmp_path, name):
    case = CASES[name]
    base, names = case.tree(build(case)), case.names
    apply = lj.adapt(case.apply)

    # What is written here.
    adapters = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, [case.rule]))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapters)
    conv1d = ["h/kernel"] if name == "conv1d" else []
    options = {"base_model": "x", "task_type": None, "names": names, "fan_in_fan_out": conv1d}
    write_peft(tmp_path / "ours", adapters, **options)
    loaded = output(PeftModel.from_pretrained(build(case), tmp_path / "ours").eval())
    assert np.abs(loaded - output(build(case))).max() > 0.1
    assert np.abs(apply(lj.combine(base, adapters), X) - loaded).max() <= 1e-4

    # What peft writes.
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **case.peft)
    model = get_peft_model(build(case), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapters = read_peft(tmp_path / "theirs", base, names=names)
    assert np.abs(apply(lj.combine(base, adapters), X) - output(model)).max() <= 1e-4
    write_peft(tmp_path / "again", adapters, **options)
    theirs, again = (
        safetensors.numpy.load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("theirs", "again")
    )
    assert theirs.keys() == again.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(again[key], values, strict=True)


@pytest.mark.parametrize("trained", ["score", "h.1"])
def test_modules_saved_whole(tmp_path, trained):
    """A head, which is a Linear, and a Conv1D with its bias."""
    case = CASES["conv1d"]
    base = case.tree(build(case))
    names = {"h/0/kernel": "h.0", "h/1/kernel": "h.1", "h/0/bias": "h.0", "h/1/bias": "h.1"}
    names |= {"score/kernel": "score", "score/bias": "score"}
    base["h"] = {str(k): {x: v[k] for x, v in base["h"].items()} for k in range(LAYERS)}
    config = LoraConfig(target_modules=["h.0"], modules_to_save=[trained], fan_in_fan_out=True)
    model = get_peft_model(build(case), config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and "modules_to_save" in key:
                value += torch.randn(value.shape)
    model.save_pretrained(tmp_path)
    adapters = read_peft(tmp_path, base, names=names, fan_in_fan_out="h/./kernel")
    tree = lj.combine(base, adapters)
    layers = [tree["h"][str(k)] for k in range(LAYERS)]

    def apply(tree, x):
        for layer in tree["layers"]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ tree["score"]["kernel"] + tree["score"]["bias"]

    ours = lj.adapt(apply)({"layers": layers, "score": tree["score"]}, X)
    assert np.abs(ours - output(model)).max() <= 1e-4
    # peft too takes a folder of ours with a whole module in it.
    options = {"base_model": "x", "task_type": None, "names": names}
    write_peft(tmp_path / "ours", adapters, fan_in_fan_out="h/./kernel", **options)
    loaded = output(PeftModel.from_pretrained(build(case), tmp_path / "ours").eval())
    np.testing.assert_array_equal(loaded, output(model))


def mixture():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=16,
        moe_intermediate_size=12,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own
def test_adapters_of_fused_experts(tmp_path):
    """What peft trained on such a parameter, and its adapter for each expert when it is written."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 2},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(mixture(), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    kernel = {"gate_proj": (16, 12), "up_proj": (16, 12), "down_proj": (12, 16)}
    experts = {
        name: {"kernel": np.zeros((LAYERS, 4, *size), np.float32)} for name, size in kernel.items()
    }
    attn = {"q_proj": {"kernel": np.zeros((LAYERS, 16, 16), np.float32)}}
    base = {"layers": {"mlp": {"experts": experts}, "attn": attn}}
    adapters = read_peft(tmp_path / "theirs", base)
    merged = lj.merge(base, adapters)["layers"]["mlp"]["experts"]
    for k, layer in enumerate(model.base_model.model.model.layers):
        down = layer.mlp.experts
        gate_up = down.base_layer
        with torch.no_grad():
            expected = down.get_delta_weight("default"), gate_up.get_delta_weight("default")
        ours = [np.swapaxes(merged[name]["kernel"][k], 1, 2) for name in kernel]
        np.testing.assert_allclose(ours[2], expected[0], atol=1e-5)
        np.testing.assert_allclose(np.concatenate(ours[:2], 1), expected[1], atol=1e-5)

    write_peft(tmp_path / "ours", adapters, base_model="x")
    theirs, ours = (
        safetensors.numpy.load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(ours[key], values) for key, values in theirs.items())
    for fused in (True, False):
        write_peft(tmp_path / str(fused), adapters, base_model="x", fused_experts=fused)
        loaded = PeftModel.from_pretrained(mixture(), tmp_path / str(fused)).eval()
        with torch.no_grad():
            assert (loaded(TEXT).logits - model(TEXT).logits).abs().max() <= 1e-4


TEXT = torch.arange(12)[None]
SIZES = {  # in and out
    "mlp/experts/gate_proj": (16, 12),
    "mlp/experts/up_proj": (16, 12),
    "mlp/experts/down_proj": (12, 16),
    "mlp/router": (16, 4),
    "attn/q_proj": (16, 16),
}


def mixture_adapters(scan_layers=True, **ranks_and_scales):
    """Of the kernels that are named, each of a rank, a scale, and some layers; None elsewhere."""
    rng, tree = np.random.default_rng(0), {}
    for path, (inn, out) in SIZES.items():
        *parents, name = path.split("/")
        group = tree
        for parent in parents:
            group = group.setdefault(parent, {})
        group[name] = {"kernel": None}
        if name in ranks_and_scales:
            rank, scale, layers = ranks_and_scales[name]
            batch = (LAYERS, 4) if "experts" in path else (LAYERS,)
            a, b = (rng.normal(size=x) for x in ((*batch, rank, inn), (*batch, out, rank)))
            for x in (a, b):
                x[[k for k in range(LAYERS) if k not in layers]] = 0
            factors = (x.astype(np.float32) for x in (a, b))
            group[name]["kernel"] = lj.Adapter(*factors, scale, 0.1)
    if scan_layers:
        return {"layers": tree}

    def one(leaf, k):
        if leaf is None or not leaf.a[k].any():
            return None
        return jax.tree.map(lambda x: x[k], leaf)

    is_leaf = lambda x: x is None or isinstance(x, lj.Adapter)  # noqa: E731
    return {
        f"layers_{k}": jax.tree.map(lambda x, k=k: one(x, k), tree, is_leaf=is_leaf)
        for k in range(LAYERS)
    }


def mixture_base():
    """Zeros of the same tree."""
    adapters = mixture_adapters(**{path.split("/")[-1]: (1, 1.0, BOTH) for path in SIZES})
    return jax.tree.map(
        lambda x: np.zeros((*x.batch_shape, x.a.shape[-1], x.b.shape[-2]), np.float32),
        adapters,
        is_leaf=lambda x: isinstance(x, lj.Adapter),
    )


def add_to(model, adapters):
    """W + scale · B A in torch, written out."""

    def update(group, name, layer):
        leaf = group[name]["kernel"]
        shape = {"router": (4, 16), "q_proj": (16, 16), "down_proj": (4, 16, 12)}
        if leaf is None:
            return torch.zeros(shape.get(name, (4, 12, 16)))
        return torch.from_numpy(leaf.scale * leaf.b[layer] @ leaf.a[layer])

    mlp, attn = adapters["layers"]["mlp"], adapters["layers"]["attn"]
    with torch.no_grad():
        for k, layer in enumerate(model.model.layers):
            gate, up, down = (
                update(mlp["experts"], name, k) for name in ("gate_proj", "up_proj", "down_proj")
            )
            layer.mlp.experts.gate_up_proj += torch.cat([gate, up], 1)
            layer.mlp.experts.down_proj += down
            layer.mlp.gate.weight += update(mlp, "router", k)
            layer.self_attn.q_proj.weight += update(attn, "q_proj", k)
    return model


BOTH = (0, 1)
EXPERTS_ADAPTED = {
    "all alike": {
        "gate_proj": (3, 0.5, BOTH),
        "up_proj": (3, 0.5, BOTH),
        "down_proj": (3, 0.5, BOTH),
        "q_proj": (3, 0.5, BOTH),
    },
    "each of its own rank and scale": {
        "gate_proj": (2, 0.5, BOTH),
        "up_proj": (3, -2.0, BOTH),
        "down_proj": (1, 0.25, BOTH),
        "router": (2, 1.0, BOTH),
        "q_proj": (4, 0.75, BOTH),
    },
    "ups alone": {"up_proj": (2, 0.5, BOTH)},
    "not in every layer": {
        "gate_proj": (2, 0.5, (1,)),
        "up_proj": (2, 0.5, (1,)),
        "down_proj": (2, 0.5, (0,)),
        "router": (2, 0.5, (0,)),
        "q_proj": (2, 0.5, BOTH),
    },
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("case", EXPERTS_ADAPTED)
def test_experts_that_transformers_has_fused(tmp_path, case, scan_layers):
    """One parameter for all gates and ups of a layer, one for its downs, one for its router."""
    adapters = mixture_adapters(**EXPERTS_ADAPTED[case])
    written = adapters
    if not scan_layers:
        written = mixture_adapters(scan_layers=False, **EXPERTS_ADAPTED[case])
    write_peft(tmp_path / "ours", written, base_model="x")
    loaded = PeftModel.from_pretrained(mixture(), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = add_to(mixture(), adapters)(TEXT).logits
        found, plain = loaded(TEXT).logits, mixture()(TEXT).logits
    assert (expected - plain).abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-4
    again = read_peft(tmp_path / "ours", mixture_base())
    write_peft(tmp_path / "again", again, base_model="x")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = (tmp_path / folder / name for folder in ("ours", "again"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own
def test_experts_as_modules_are_fused_by_peft(tmp_path):
    adapters = mixture_adapters(**EXPERTS_ADAPTED["all alike"])
    no_dropout = lambda x: dataclasses.replace(x, dropout=0.0) if x else None  # noqa: E731
    adapters = jax.tree.map(no_dropout, adapters, is_leaf=lambda x: isinstance(x, lj.Adapter))
    write_peft(tmp_path, adapters, base_model="x", fused_experts=False)
    loaded = PeftModel.from_pretrained(mixture(), tmp_path).eval()
    with torch.no_grad():
        expected = add_to(mixture(), adapters)(TEXT).logits
        assert (loaded(TEXT).logits - expected).abs().max() <= 1e-4
