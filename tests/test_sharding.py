"""A 4-bit base on eight devices: the same training as on one, and what crosses between them."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder, parameter_shapes

KERNELS = r"layers/.*kernel"
CONFIG = DecoderConfig(
    vocab_size=96, dim=128, mlp_dim=512, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=32
)
COLUMNS = r"(q|k|v|gate|up)_proj/kernel"
ROWS = r"(o|down)_proj/kernel"

# name: mesh shape, mesh axes, rules for the base
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...], list]] = {
    "data parallel": ((8,), ("data",), []),
    "fsdp over out": ((8,), ("data",), [(KERNELS, P(None, None, "data"))]),
    "fsdp over in": ((4,), ("fsdp",), [(KERNELS, P(None, "fsdp", None))]),
    "tensor parallel": (
        (2, 4),
        ("data", "model"),
        [(COLUMNS, P(None, None, "model")), (ROWS, P(None, "model", None))],
    ),
    "fsdp and tensor parallel": (
        (4, 2),
        ("fsdp", "model"),
        [(COLUMNS, P(None, "fsdp", "model")), (ROWS, P(None, "model", "fsdp"))],
    ),
}


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    # Numbers are NumPy's: to draw them takes JAX as long to compile as a step does.
    rng = np.random.default_rng(0)
    model = Decoder(CONFIG)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (8, 17)))
    params = parameter_shapes(CONFIG)
    params = jax.tree_util.tree_map_with_path(lambda path, x: drawn(rng, path, x), params)
    base = lj.quantize(params, KERNELS, layout="b i o", block_size=32)
    rules = [lj.LoraRule(KERNELS, rank=4)]
    adapters = jax.eval_shape(lambda: lj.init_adapters(jax.random.key(0), base, rules))
    adapters = jax.tree_util.tree_map_with_path(lambda path, x: drawn(rng, path, x), adapters)
    setting = {"model": model, "tokens": tokens, "base": base, "adapters": adapters}
    results = {name: train(model, *placed(setting, name)) for name in MESHES}
    return {**setting, "alone": train(model, adapters, base, tokens), **results}


def drawn(rng: np.random.Generator, path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """As initialized: norms are ones, B is zero, and all else is random."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name in ("scale", "b"):
        return jnp.asarray(np.full(shape.shape, float(name == "scale"), shape.dtype))
    return jnp.asarray(rng.normal(size=shape.shape, scale=0.09).astype(shape.dtype))


def train(model: Decoder, adapters: Any, base: Any, tokens: jax.Array) -> tuple[list, Any, str]:
    """Three steps: the losses, the adapters, and the optimized program."""
    apply, tx = lj.adapt(model.apply), optax.adamw(1e-2)

    def step(adapters: Any, opt_state: Any, base: Any, tokens: jax.Array) -> Any:
        def loss_fn(adapters: Any) -> jax.Array:
            logits = apply({"params": lj.combine(base, adapters)}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    # Compiled for these shardings, which the results keep: a step's output is the next one's input.
    opt_state, losses = tx.init(adapters), []
    mesh = getattr(tokens.sharding, "mesh", None)
    scalar = tokens.sharding if mesh is None else NamedSharding(mesh, P())
    placement = jax.tree.map(lambda x: x.sharding if x.ndim else scalar, (adapters, opt_state))
    opt_state = jax.device_put(opt_state, placement[1])
    step = jax.jit(step, out_shardings=(*placement, None))
    program = step.lower(adapters, opt_state, base, tokens).compile()
    for _ in range(3):
        adapters, opt_state, loss = program(adapters, opt_state, base, tokens)
        losses.append(float(loss))
    return losses, adapters, program.as_text()


def placed(setting: dict[str, Any], name: str) -> tuple[Any, Any, jax.Array]:
    shape, axes, rules = MESHES[name]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)
    # From the host, where a slice is no program.
    base = lj.shard(jax.device_get(setting["base"]), mesh, rules)
    adapters = lj.shard(jax.device_get(setting["adapters"]), mesh, rules)
    tokens = jax.device_put(np.asarray(setting["tokens"]), NamedSharding(mesh, P(axes[0])))
    return adapters, base, tokens


def all_gathers(program: str) -> set[str]:
    """The dtype and shape of every all-gather's results."""
    lines = [
        line for line in program.splitlines() if re.search(r"= .* all-gather(-start)?\(", line)
    ]
    return {
        x for line in lines for x in re.findall(r"\b[a-z]+\d+\[[\d,]*\]", line.split(" all-g")[0])
    }


@pytest.mark.parametrize("name", MESHES)
def test_trains_as_one_device_does(setting: dict[str, Any], name: str) -> None:
    losses, adapters, _ = setting["alone"]
    sharded_losses, sharded_adapters, _ = setting[name]
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(sharded_adapters), jax.tree.leaves(adapters), strict=True
    ):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp over out", "fsdp over in", "fsdp and tensor parallel"])
def test_fsdp_gathers_codes_not_weights(setting: dict[str, Any], name: str) -> None:
    *_, program = setting[name]
    gathered = all_gathers(program)
    assert any(x.startswith("u8") for x in gathered)
    # What else is gathered is no weight: nothing of floats has the axes of a kernel, decoded.
    sizes = {CONFIG.dim, CONFIG.mlp_dim, CONFIG.num_heads * CONFIG.head_dim}
    halves = sizes | {n // 2 for n in sizes}
    floats = [x for x in gathered if x.startswith(("f32", "bf16"))]
    shapes = [[int(n) for n in x[x.index("[") + 1 : -1].split(",") if n] for x in floats]
    assert not [s for s in shapes if len(s) >= 2 and s[-1] in halves and s[-2] in halves]


def test_tensor_parallel_moves_no_weights(setting: dict[str, Any]) -> None:
    *_, program = setting["tensor parallel"]
    assert not any(x.startswith("u8") for x in all_gathers(program))


def test_each_device_holds_its_share(setting: dict[str, Any]) -> None:
    _, base, _ = placed(setting, "fsdp over out")
    for _, leaf in lj.core.tree.named_leaves(base):
        if isinstance(leaf, lj.QuantizedArray):
            assert leaf.codes.addressable_shards[0].data.nbytes * 8 == leaf.codes.nbytes
            assert leaf.scales.addressable_shards[0].data.nbytes * 8 == leaf.scales.nbytes


def test_layouts_decide_which_axis_is_which() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    key = jax.random.key(0)
    cases = {
        # layout: parameter shape, spec, expected specs of codes, a, b
        "i o": ((64, 32), P("x", "y"), P("y", "x"), P(None, "x"), P("y", None)),
        "o i": ((32, 64), P("y", "x"), P("y", "x"), P(None, "x"), P("y", None)),
        "b i o": (
            (2, 64, 32),
            P("x", None, "y"),
            P("x", "y", None),
            P("x", None, None),
            P("x", "y", None),
        ),
        "i o o": ((64, 4, 8), P("x", "y"), P("y", "x"), P(None, "x"), P("y", None)),
        "i i o": ((4, 16, 32), P("x", None, "y"), P("y", "x"), P(None, "x"), P("y", None)),
    }
    for layout, (shape, spec, codes, a, b) in cases.items():
        base = {"w": lj.quantize_array(np.ones(shape, "f"), layout=layout, block_size=32)}
        rules = [lj.LoraRule("w", rank=2)]
        adapters = jax.eval_shape(lambda: lj.init_adapters(key, base, rules))  # noqa: B023
        ours = lj.shardings((base, adapters), mesh, [("w", spec)])
        assert ours[0]["w"].codes.spec == codes, layout
        assert ours[0]["w"].scales.spec == codes, layout
        assert ours[1]["w"].a.spec == a, layout
        assert ours[1]["w"].b.spec == b, layout


def test_combined_trees_are_placed_like_their_parts(setting: dict[str, Any]) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    rules = [(KERNELS, P(None, None, "model"))]
    combined = lj.combine(setting["base"], setting["adapters"], dropout_key=jax.random.key(3))
    base, adapters = lj.split(lj.shard(combined, mesh, rules))
    for whole, part in ((base, setting["base"]), (adapters, setting["adapters"])):
        expected = lj.shardings(part, mesh, rules)
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True)
        assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in pairs)


def test_explicit_meshes_are_refused_with_what_to_write(setting: dict[str, Any]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    base = lj.shard(setting["base"], mesh, [(KERNELS, P(None, None, "data"))])
    with pytest.raises(ValueError, match=r"Explicit axes.*AxisType\.Auto"):
        lj.adapt(setting["model"].apply)({"params": base}, setting["tokens"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("nothing", P("data"))], r"pattern 'nothing' matches no leaf"),
        (
            [(KERNELS, P(None, None, "expert"))],
            r"names the mesh axis 'expert'; the mesh has 'data'",
        ),
        ([(KERNELS, P(None, None, None, "data"))], r"has 4 entries, but the parameter has 3 axes"),
        ([("final_norm", P(None, "data"))], r"has 2 entries, but its shape is \(128,\)"),
        ([(r"layers/.*norm", P("data"))], r"whose axis of 2 .* among 8 devices"),
        ([(KERNELS, P(None, "data", None))], r"whose axis of 4 .* among 8 devices"),
    ],
)
def test_bad_rules_say_what_is_wrong(setting: dict[str, Any], rules: Any, message: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=message):
        lj.shardings(setting["base"], mesh, rules)


def test_minor_axes_of_a_group_cannot_be_sharded() -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    base = {"w": lj.quantize_array(jnp.ones((64, 4, 8)), layout="i o o")}
    with pytest.raises(ValueError, match=r"minor 'o' axis of layout 'i o o'.*shard the first"):
        lj.shardings(base, mesh, [("w", P(None, None, "model"))])


def test_abstract_trees_have_shardings(setting: dict[str, Any]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rules = [(KERNELS, P(None, None, "data"))]
    abstract = jax.eval_shape(lambda: setting["base"])
    concrete = lj.shardings(setting["base"], mesh, rules)
    assert jax.tree.leaves(lj.shardings(abstract, mesh, rules)) == jax.tree.leaves(concrete)
