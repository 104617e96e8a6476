"""Memory of a step: its state to the byte, its peak against what GPUs took, and what is quoted.

State is compared with the arrays that `quantize`, `init_adapters` and optax make, abstractly; what
a layer saves with the residuals that JAX keeps; peaks with measurements.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import lora_jax as lj
from lora_jax import memory
from lora_jax.memory import Setup
from lora_jax.models.decoder import Decoder, parameter_shapes
from lora_jax.models.remat import NAMED
from lora_jax.models.shapes import SHAPES

pytestmark = pytest.mark.compiled_quickly

GIB = 2**30
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "adamw-bfloat16": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "momentum": optax.trace(0.9),
    "sgd": optax.sgd(1e-3),
}


def shape_of(name: str, **changes):
    """A published shape, of few layers."""
    windowed = {"windowed_layers": (), "window": None, "unrotated_layers": ()}
    return dataclasses.replace(SHAPES[name], num_layers=3, **windowed, **changes)


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trees(setup: Setup):
    """Base, adapters and optimizer's state, as shapes."""
    scan, config = setup.scan, dataclasses.replace(setup.shape, param_dtype=jnp.bfloat16)
    shapes = parameter_shapes(dataclasses.replace(config, scan_layers=scan))
    leading = "b " if scan else ""
    expert = rf"layers(_\d+)?/.*experts.*{setup.quantized}"
    plain = rf"layers(_\d+)?/(?!.*experts).*{setup.quantized}"
    patterns = {plain: f"{leading}i o"}
    if config.num_experts:
        patterns[expert] = f"{leading}b i o"
    options = {"kind": setup.kind, "block_size": setup.block_size}
    options["double_quant"] = setup.double_quant
    tx = OPTIMIZERS[setup.optimizer]

    def make(params):
        if setup.method == "full":
            return params, None, tx.init(params)
        if setup.method == "qlora":
            for pattern, layout in patterns.items():
                params = lj.quantize(params, pattern, layout=layout, flat=True, **options)
        rules = [
            lj.LoraRule(pattern, rank=setup.rank, layout=layout)
            for pattern, layout in patterns.items()
        ]
        adapters = lj.init_adapters(jax.random.key(0), params, rules)
        return params, adapters, tx.init(adapters)

    return jax.eval_shape(make, shapes)


LLAMA = shape_of("llama-3-8b")
ODD = dataclasses.replace(LLAMA, dim=100, mlp_dim=130, num_heads=3, num_kv_heads=1, head_dim=22)
STATES = {
    "llama": Setup(LLAMA),
    "unrolled": Setup(LLAMA, scan=False, optimizer="sgd"),
    "biases and a tied head": Setup(shape_of("qwen2.5-0.5b"), rank=5, optimizer="momentum"),
    "more norms": Setup(
        shape_of("gemma-3-1b", qk_norm=True),
        kind="int4",
        double_quant=False,
        block_size=128,
        optimizer="adamw-bfloat16",
    ),
    "experts": Setup(shape_of("qwen3-30b-a3b", num_experts=8), kind="fp4"),
    "flat": Setup(ODD, rank=3),
    "flat, in float32 scales": Setup(ODD, double_quant=False, scan=False),
    "GGUF": Setup(LLAMA, kind="q4_0", block_size=32),
    "GGUF with a minimum": Setup(LLAMA, kind="q4_1", block_size=32),
    "a dense base": Setup(LLAMA, method="lora", rank=64),
    "all weights": Setup(shape_of("llama-3.2-1b"), method="full"),
}


@pytest.mark.parametrize("setup", STATES.values(), ids=STATES)
def test_state_is_counted_to_the_byte(setup):
    base, adapters, opt_state = trees(setup)
    found = memory.predict(setup)
    assert found.base + found.scales == nbytes(base)
    assert found.adapters == nbytes(adapters)
    assert found.optimizer == nbytes(opt_state)
    trained = base if setup.method == "full" else adapters
    assert found.all_gradients == nbytes(trained)  # a gradient is of its parameter's dtype
    packed = [x for x in jax.tree.leaves(base, is_leaf=_is_packed) if _is_packed(x)]
    assert found.scales == nbytes(packed) - sum(x.codes.size for x in packed)


def _is_packed(x) -> bool:
    return isinstance(x, lj.QuantizedArray)


SMALL = dataclasses.replace(
    ODD, vocab_size=40, dim=24, mlp_dim=56, num_heads=4, num_kv_heads=2, head_dim=10
)


@pytest.mark.parametrize("policy", NAMED)
@pytest.mark.parametrize(("attention", "dtype"), [("xla", "float32"), ("cudnn", "bfloat16")])
def test_a_layer_saves_what_jax_keeps_of_it(policy, attention, dtype, monkeypatch):
    """Arrays with an axis for the tokens, among the residuals of a scanned decoder."""
    # cuDNN is not needed as long as nothing is lowered, but JAX asks for it before.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_100)
    tokens = jnp.zeros((2, 14), jnp.int32)
    shape = dataclasses.replace(SMALL, head_dim=8, scan_layers=True, remat=policy, dtype=dtype)
    params = parameter_shapes(shape)
    config = dataclasses.replace(shape, attention=attention)

    def pullback(embeddings, params):
        def hidden(embeddings, params):
            return Decoder(config).apply(
                {"params": params}, tokens, embeddings=embeddings, method="hidden"
            )

        return jax.vjp(hidden, embeddings, params)[1]

    embeddings = jax.ShapeDtypeStruct((*tokens.shape, config.dim), dtype)
    kept = jax.tree.leaves(jax.eval_shape(pullback, embeddings, params))
    of_tokens = (config.num_layers, *tokens.shape)
    statistics = (config.num_layers, 2, config.num_heads, 14)
    stacks = [x for x in kept if x.shape[:3] == of_tokens or x.shape == statistics]
    setup = Setup(
        config, method="lora", batch=2, length=14, remat=policy, attention=attention, dtype=dtype
    )
    found = memory.predict(setup)
    [logits, backward] = found.moments
    assert logits.activations == backward.activations
    assert found.activations + found.host == nbytes(stacks)


def test_policies_are_those_of_the_decoder():
    assert {*memory.POLICIES, "attended", "layer-offloaded", "attended-offloaded"} == set(NAMED)
    saved = [
        memory.predict(Setup(LLAMA, remat=policy)).moments[0].activations
        for policy in memory.POLICIES
    ]
    assert saved == sorted(saved, reverse=True), "the one that repeats least comes first"


# The measured programs stacked what cuDNN's attention made twice under a scan: by its name, and as
# the kernel's result. The second array of each layer is taken off here, and that of the layer that
# was copied out of its stack: bytes of one, of 4x2048 tokens of Llama 3 8B.
ONCE = 4 * 2048 * 4096 * 2

# GiB that a step of 4x2048 took of one NVIDIA H200: layers, policy, scanned, peak, and of it what
# the compiled program said it needs. JAX 0.11.2, the llama-3-8b shape, NF4, rank 16, chunks of
# 2048. Of the "layer" runs the peak is the compiler's own.
MEASURED = [
    (8, "products", False, 10.332, 2.9127 + 7.4182),
    (32, "products", False, 30.475, 5.7795 + 24.6919),
    (8, "products", True, 10.909 - 9 * ONCE / GIB, 2.9127 + 7.9956 - 9 * ONCE / GIB),
    (8, "layer", True, 5.959, None),
    (8, "layer", False, 5.959, None),
]


@pytest.mark.parametrize(("layers", "policy", "scan", "peak", "program"), MEASURED)
def test_measured_peaks(layers, policy, scan, peak, program):
    shape = dataclasses.replace(SHAPES["llama-3-8b"], num_layers=layers)
    found = memory.predict(Setup(shape, batch=4, remat=policy, scan=scan))
    assert found.needed / GIB == pytest.approx(peak, rel=0.02)
    if program is not None:
        assert found.total / GIB == pytest.approx(program, rel=0.02)


# The same, of whole models: a step, and the GiB that it took.
WHOLE = {
    "8B, inputs on the host": (
        Setup(SHAPES["llama-3-8b"], batch=4, chunk=512, remat="layer-offloaded"),
        7.71,
    ),
    "8B, 24 layers on the host": (Setup(SHAPES["llama-3-8b"], batch=4, chunk=1024, keep=8), 7.25),
    "13B": (Setup(SHAPES["llama-2-13b"], chunk=512), 9.11),
    "65B": (Setup(SHAPES["llama-65b"], chunk=512), 39.11),
    "175B": (Setup(SHAPES["gpt-3-175b"], chunk=512), 98.28),
    "405B, half of it on the host": (Setup(SHAPES["llama-3.1-405b"], chunk=512, keep=62), 125.33),
}


@pytest.mark.parametrize(("setup", "peak"), WHOLE.values(), ids=WHOLE)
def test_measured_peaks_of_whole_models(setup, peak):
    assert memory.predict(setup).needed / GIB == pytest.approx(peak, rel=0.03)


def test_what_waits_on_the_host_is_counted():
    shape, half = SHAPES["llama-3-8b"], SHAPES["llama-3-8b"].num_layers // 2
    here, split = (memory.predict(Setup(shape, keep=keep)) for keep in (None, half))
    packed = [w for w in memory.weights(shape) if w.path.endswith("_proj/kernel")]
    per_number = 0.5 + 1 / 64 + 4 / 16_384  # codes, scales of 64, and of 256 of those
    waiting = sum(w.parameters for w in packed) / 2 * per_number
    assert here.host == 0
    assert split.host == pytest.approx(waiting, rel=1e-4)
    assert here.resident - split.resident == pytest.approx(split.host, abs=32)
    offloaded = memory.predict(Setup(shape, remat="layer-offloaded", length=1024))
    assert offloaded.host == 32 * 1024 * 4096 * 2
    assert "on the host" in str(offloaded)


# Bytes of temporaries that XLA's buffer assignment gives programs compiled for an H200 (JAX 0.11.2)
# where nothing was run. What the logits take is small in most of these: the backward pass is what
# they are about.
ASSIGNED = {
    "layer": (Setup(LLAMA, batch=4, chunk=256), 1_872_443_384),
    "layer, unrolled": (Setup(LLAMA, batch=4, chunk=256, scan=False), 1_701_178_496),
    "stream": (Setup(LLAMA, batch=4, remat="stream", chunk=256), 1_990_328_576),
    "attention": (Setup(LLAMA, batch=4, remat="attention", chunk=256), 2_834_643_248 - 4 * ONCE),
    "products": (Setup(LLAMA, batch=4, remat="products", chunk=256), 3_937_976_128 - 4 * ONCE),
    "none": (Setup(LLAMA, batch=4, remat=None, chunk=256), 8_513_505_296),
    "a dense base": (
        Setup(LLAMA, method="lora", batch=4, remat="attention", chunk=256),
        3_110_726_280 - 4 * ONCE,
    ),
    "few tokens, large weights": (
        Setup(SHAPES["llama-65b"], rank=8, batch=4, length=512, chunk=512),
        4_764_794_104,
    ),
    "a model of 135M": (
        Setup(SHAPES["smollm2-135m"], batch=16, length=512, remat="products"),
        3_756_882_752 - 31 * (16 * 512 * 576 * 2),
    ),
    "attention that holds its scores": (
        Setup(dataclasses.replace(LLAMA, num_layers=2), chunk=256, attention="xla"),
        2_033_003_512,
    ),
}


@pytest.mark.parametrize(("setup", "temporaries"), ASSIGNED.values(), ids=ASSIGNED)
def test_what_a_compiler_assigns(setup, temporaries):
    found = memory.predict(setup)
    assert found.total == pytest.approx(found.resident + temporaries, rel=0.05)
    assert found.peak.total == pytest.approx(temporaries, rel=0.06)


def test_a_table_whose_rows_add_up():
    found = memory.predict(Setup(SHAPES["llama-3-8b"], batch=4))
    assert sum(found.categories().values()) == found.total
    assert found.gradients <= found.all_gradients
    lines = str(found).splitlines()
    sizes = [float(line.split()[-2]) for line in lines]
    assert sum(sizes[:8]) == pytest.approx(sizes[8], abs=0.01)
    assert f"{found.total / GIB:.3f} GiB" in lines[8]


def test_parts_of_a_batch_take_less():
    whole = memory.predict(Setup(LLAMA, batch=8, remat="products"))
    parts = memory.predict(Setup(LLAMA, batch=8, remat="products", accumulate=8))
    assert parts.resident == whole.resident
    assert parts.activations == whole.activations // 8


QUOTED_BYTES = {
    # 16 bytes of each parameter: 2 + 2 in 16 bits, a float32 copy, and Adam's two moments in
    # float32.
    "GPT-3 175B, all of it trained": 175e9 * 16,
    "GPT-3 175B, LoRA on 16-bit weights": 175e9 * 2,
    # 4.127 bits: half a byte, a byte for 64 of them, and four bytes for 256 of those.
    "GPT-3 175B, QLoRA": 175e9 * (0.5 + 1 / 64 + 4 / 16_384),
    # 104 GB are 13e9 parameters of 8 bytes: everything in 16 bits, weights, gradients, two moments.
    "LLaMA-13B, all of it trained in 16 bits": 13e9 * 8,
    "LLaMA-13B, QLoRA": 13e9 * (0.5 + 1 / 64 + 4 / 16_384),
    # 780 GB are 65e9 of 12: 16-bit weights and gradients, and moments in float32.
    "LLaMA-65B, all of it trained": 65e9 * 12,
    "LLaMA-65B, QLoRA": 65e9 * (0.5 + 1 / 64 + 4 / 16_384),
    # 32 layers of four projections, each with 16 rows and 16 columns of 4096 numbers of 2 bytes.
    "7B, an adapter of r=16 on attention": 32 * 4 * 16 * 2 * 4096 * 2,
    "7B, NF4 against bfloat16": 6.74e9 * 16 / 8 / 3.877,
}


def test_what_is_quoted():
    found = {case.case: case.bytes for case in memory.QUOTED}
    assert found.keys() == QUOTED_BYTES.keys()
    for name, size in QUOTED_BYTES.items():
        assert found[name] == pytest.approx(size, rel=0.005), name
    assert found["GPT-3 175B, all of it trained"] == 2.8e12
    assert found["7B, an adapter of r=16 on attention"] == 33_554_432


def test_quoted_parameters_are_those_of_the_shapes():
    names = {"LLaMA-13B": "llama-2-13b", "LLaMA-65B": "llama-65b", "7B, NF4": "llama-2-7b"}
    for start, name in names.items():
        number = sum(weight.parameters for weight in memory.weights(SHAPES[name]))
        cases = [case for case in memory.QUOTED if case.case.startswith(start)]
        assert {case.parameters for case in cases} == {number}
    setup = Setup(SHAPES["llama-2-7b"], targets="attn/._proj/kernel", adapter_dtype="bfloat16")
    assert memory.predict(setup).adapters == 33_554_432
    gpt = sum(weight.parameters for weight in memory.weights(SHAPES["gpt-3-175b"]))
    assert gpt == pytest.approx(175e9, rel=0.01)
    llama = sum(weight.parameters for weight in memory.weights(SHAPES["llama-3.1-405b"]))
    assert llama == pytest.approx(405.9e9, rel=0.001)


def test_a_65b_step_fits_in_48_gb():
    found = memory.predict(Setup(SHAPES["llama-65b"]))
    assert found.needed / GIB == pytest.approx(39.8, rel=0.05)  # an earlier program of the same
    assert found.needed < 48e9


EIGHT = Setup(SHAPES["llama-3-8b"], batch=4)


@pytest.mark.parametrize(
    ("limit", "policy"),
    [(80, "products"), (22, "attention"), (14, "stream"), (11, "layer")],
)
def test_the_policy_that_repeats_least_and_fits(limit, policy):
    assert memory.auto_remat(EIGHT, limit * GIB) == policy
    assert memory.fitting(dataclasses.replace(EIGHT, remat="products"), limit * GIB) == (
        dataclasses.replace(EIGHT, remat=policy)
    )


def test_without_a_limit_no_product_is_repeated():
    assert memory.device_bytes() is None  # as a CPU says
    assert memory.auto_remat(EIGHT) == "products"


def test_the_nearest_step_that_fits():
    wanted = dataclasses.replace(EIGHT, remat="products")
    fitting = functools.partial(memory.fitting, wanted)
    in_parts = fitting(9 * GIB)
    assert (in_parts.accumulate, in_parts.length, in_parts.batch) == (2, 2048, 4)
    shorter = fitting(8 * GIB)
    assert (shorter.accumulate, shorter.length, shorter.batch) == (4, 1024, 4)
    for one, limit in ((in_parts, 9), (shorter, 8)):
        assert memory.predict(one).needed <= limit * GIB
    assert fitting(5 * GIB) is None


def test_what_does_not_fit_is_said_with_what_does():
    sentence = (
        r"needs 9\.\d\d GiB and there are 9\.00 GiB; "
        r"write remat=layer and accumulate=2, which needs 8\.\d\d GiB"
    )
    with pytest.raises(ValueError, match=sentence):
        memory.auto_remat(EIGHT, 9 * GIB)
    dense = dataclasses.replace(EIGHT, method="lora")
    with pytest.raises(ValueError, match="write a smaller model, or its base in 4 bits"):
        memory.auto_remat(dense, 5 * GIB)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 0}, "rank is 0, expected at least 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"remat": "dots_saveable"}, "remat is 'dots_saveable', of which no memory is foretold"),
        ({"kind": "int8"}, "kind is 'int8'"),
        ({"batch": 4, "accumulate": 3}, "cannot be cut in 3 equal parts"),
        ({"targets": "("}, "is no regular expression"),
    ],
)
def test_steps_that_make_no_sense(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Setup(LLAMA, **changes)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="targets is 'conv', which matches none of embed"):
        memory.predict(Setup(LLAMA, targets="conv"))
