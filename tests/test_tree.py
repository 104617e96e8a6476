"""The functions between the trees, against NumPy in float64."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params() -> dict[str, Any]:
    return {
        "embed": {"embedding": normal(96, 64, seed=1)},
        "layers": {
            "q": {"kernel": normal(3, 64, 96, seed=2)},
            "norm": {"scale": jnp.ones((3, 64))},
        },
        "name": "net",
        "activation": jax.nn.relu,
        "nothing": None,
    }


def base_and_adapters(quantized: bool = True, **options: Any) -> tuple[Any, Any]:
    tree = params()
    if quantized:
        tree = lj.quantize(tree, "kernel", layout="b i o")
    rule = lj.LoraRule("kernel", rank=4, alpha=8, layout=None if quantized else "b i o", **options)
    adapters = lj.init_adapters(KEY, tree, [rule], train="norm")
    adapters["layers"]["q"]["kernel"] = jax.tree.map(
        lambda x: normal(*x.shape, seed=x.shape[-1]), adapters["layers"]["q"]["kernel"]
    )
    return tree, adapters


def test_quantize_changes_what_matches_and_nothing_else() -> None:
    tree = params()
    base = lj.quantize(tree, "kernel", layout="b i o")
    assert isinstance(base["layers"]["q"]["kernel"], lj.QuantizedArray)
    assert base["layers"]["q"]["kernel"].shape == (3, 64, 96)
    for path in ("name", "activation", "nothing"):
        assert base[path] is tree[path]
    assert base["embed"]["embedding"] is tree["embed"]["embedding"]
    assert base["layers"]["norm"]["scale"] is tree["layers"]["norm"]["scale"]


def test_adapters_start_as_nothing_and_at_their_path_s_own_key() -> None:
    tree = params()
    few = lj.init_adapters(KEY, tree, [lj.LoraRule("kernel", rank=4, layout="b i o")])
    rules = [lj.LoraRule("kernel", rank=4, layout="b i o"), lj.LoraRule("embed", layout="o i")]
    more = lj.init_adapters(KEY, tree, rules)
    ours = few["layers"]["q"]["kernel"]
    assert ours.a.shape == (3, 4, 64)
    assert ours.b.shape == (3, 96, 4)
    assert not ours.b.any()
    assert ours.a.dtype == jnp.float32
    np.testing.assert_array_equal(ours.a, more["layers"]["q"]["kernel"].a)
    assert few["embed"]["embedding"] is None
    wide = lj.init_adapters(KEY, {"w": normal(4096, 64)}, [lj.LoraRule("w", rank=32)])["w"]
    assert float(wide.a.std()) == pytest.approx(4096**-0.5, rel=0.02)


def test_leaves_trained_whole_are_copies_in_the_training_dtype() -> None:
    tree = {"norm": jnp.ones(4, jnp.bfloat16), "w": normal(64, 64)}
    adapters = lj.init_adapters(KEY, tree, [lj.LoraRule("w")], train=["norm"])
    assert adapters["norm"].dtype == jnp.float32
    combined = lj.combine(tree, adapters)
    assert (
        lj.adapt(lambda p: p["norm"] + 0 * (p["w"] @ jnp.ones(64))[:4].astype(jnp.bfloat16))(
            combined
        ).dtype
        == jnp.bfloat16
    )
    donated = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(
        lj.init_adapters(KEY, {"norm": (base := jnp.ones(4))}, [], train="norm")
    )
    assert float(donated["norm"][0]) == 2
    assert float(base[0]) == 1  # still there


def test_no_adapters_are_the_base_alone() -> None:
    base, _ = base_and_adapters()
    assert lj.combine(base, None, dropout_key=KEY, scales=2.0) is base
    assert lj.count_params(base, None).trainable == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_is_w_plus_scale_b_a(quantized: bool) -> None:
    base, adapters = base_and_adapters(quantized)
    adapter = adapters["layers"]["q"]["kernel"]
    kernel = base["layers"]["q"]["kernel"]
    dense = np.asarray(lj.dequantize(kernel) if quantized else kernel, np.float64)
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    expected = dense + 2 * np.einsum("lor,lri->lio", b, a)
    merged = lj.merge(base, adapters)
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(
        merged["layers"]["norm"]["scale"], adapters["layers"]["norm"]["scale"]
    )
    assert merged["name"] == "net"
    half = lj.merge(base, adapters, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half) if hasattr(x, "dtype")} == {
        jnp.dtype("bfloat16")
    }


def test_unmerge_undoes_merge() -> None:
    base, adapters = base_and_adapters(quantized=False)
    adapters["layers"]["norm"]["scale"] = None
    back = lj.unmerge(lj.merge(base, adapters), adapters)
    np.testing.assert_allclose(
        back["layers"]["q"]["kernel"], base["layers"]["q"]["kernel"], atol=1e-5
    )


def test_counts() -> None:
    base, adapters = base_and_adapters()
    count = lj.count_params(base, adapters)
    assert count.trainable == 3 * 4 * (64 + 96) + 3 * 64
    assert count.frozen == 3 * 64 * 96 + 96 * 64
    assert count.trainable_bytes == 4 * count.trainable
    quantized = base["layers"]["q"]["kernel"]
    assert count.frozen_bytes == quantized.nbytes + 4 * 96 * 64
    assert str(count).startswith("2,112 trainable of 26,688 parameters (7.91 %); 8.2 KiB trained")
    abstract = lj.count_params(*jax.eval_shape(lambda: arrays_only(base, adapters)))
    assert abstract == count


def arrays_only(*trees: Any) -> Any:
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, trees)


def test_every_function_works_on_abstract_trees() -> None:
    tree = arrays_only(params())[0]

    def all_of_them(tree: Any) -> Any:
        base = lj.quantize(tree, "kernel", layout="b i o")
        adapters = lj.init_adapters(KEY, base, [lj.LoraRule("kernel", dropout=0.1)])
        combined = lj.combine(base, adapters, dropout_key=KEY)
        return lj.split(combined), lj.unmerge(lj.merge(base, adapters), adapters)

    (base, adapters), merged = jax.eval_shape(all_of_them, tree)
    assert base["layers"]["q"]["kernel"].shape == (3, 64, 96)
    assert adapters["layers"]["q"]["kernel"].b.shape == (3, 96, 8)
    assert merged["layers"]["q"]["kernel"].shape == (3, 64, 96)


def test_trees_of_nnx_and_equinox_keep_their_types() -> None:
    graph, state = nnx.split(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    base = lj.quantize(state, "kernel")
    adapters = lj.init_adapters(KEY, base, [lj.LoraRule("kernel")])
    merged = nnx.merge(graph, lj.merge(base, adapters))
    assert merged(jnp.ones((1, 64))).shape == (1, 32)

    mlp = eqx.nn.MLP(64, 32, 64, 1, key=KEY)
    base = lj.quantize(mlp, "weight", layout="o i")
    adapters = lj.init_adapters(KEY, base, [lj.LoraRule("weight")])
    assert isinstance(adapters, eqx.nn.MLP)
    assert lj.merge(base, adapters)(jnp.ones(64)).shape == (32,)


def test_scales_are_per_run_factors() -> None:
    base, adapters = base_and_adapters(quantized=False)
    adapters["layers"]["norm"]["scale"] = None
    one = lj.combine(base, adapters)
    for scales in (3.0, {**jax.tree.map(lambda _: None, adapters), **per_leaf(3.0)}):
        tripled = lj.combine(base, adapters, scales=scales)
        apply = lj.adapt(lambda p, x: jnp.einsum("bi,lio->lbo", x, p["layers"]["q"]["kernel"]))
        x = normal(2, 64)
        dense = jnp.einsum("bi,lio->lbo", x, base["layers"]["q"]["kernel"])
        update = apply(one, x) - dense
        np.testing.assert_allclose(apply(tripled, x) - dense, 3 * update, rtol=1e-3, atol=1e-3)


def per_leaf(scale: float) -> Any:
    return {"layers": {"q": {"kernel": scale}, "norm": {"scale": None}}}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "bias under a rule": (
        lambda: lj.init_adapters(KEY, params(), [lj.LoraRule("norm")]),
        ValueError,
        "layers/norm/scale",
    ),
    "three axes without a layout": (
        lambda: lj.quantize(params(), "kernel"),
        ValueError,
        r'layers/q/kernel has 3 axes.*write layout="b i o"',
    ),
    "rank above the smaller axis": (
        lambda: lj.init_adapters(KEY, {"w": normal(64, 8)}, [lj.LoraRule("w", rank=9)]),
        ValueError,
        r"rank 9 .* is above min\(in, out\) = 8 of w",
    ),
    "integers under a rule": (
        lambda: lj.init_adapters(KEY, {"w": jnp.ones((8, 8), int)}, [lj.LoraRule("w", rank=2)]),
        ValueError,
        "matches w of dtype int32",
    ),
    "adapted and trained whole": (
        lambda: lj.init_adapters(KEY, {"w": normal(8, 8)}, [lj.LoraRule("w", rank=2)], train="w"),
        ValueError,
        "adapted or trained whole, not both",
    ),
    "a quantized leaf trained whole": (
        lambda: lj.init_adapters(KEY, {"w": lj.quantize_array(normal(64, 8))}, [], train="w"),
        ValueError,
        "only float leaves can be trained whole",
    ),
    "another layout than the quantized one": (
        lambda: lj.init_adapters(
            KEY, {"w": lj.quantize_array(normal(64, 64))}, [lj.LoraRule("w", layout="o i")]
        ),
        ValueError,
        "was quantized as 'i o'; leave the rule's layout out",
    ),
    "quantized twice": (
        lambda: lj.quantize(lj.quantize({"w": normal(64, 8)}, "w"), "w"),
        ValueError,
        r"w is QuantizedArray\(nf4.* already",
    ),
    "a rule that is none": (
        lambda: lj.init_adapters(KEY, {"w": normal(8, 8)}, ["w"]),
        TypeError,
        r"rules holds 'w', expected LoraRule",
    ),
    "trees of other structures": (
        lambda: lj.combine({"w": normal(8, 8)}, {"v": None}),
        ValueError,
        "adapters and base differ in structure",
    ),
    "an adapter of another weight": (
        lambda: lj.combine(
            {"w": normal(8, 8)},
            lj.init_adapters(KEY, {"w": normal(8, 6)}, [lj.LoraRule("w", rank=2)]),
        ),
        ValueError,
        r"the adapter of w has a \(2, 8\) and b \(6, 2\), but a weight of shape \(8, 8\)",
    ),
    "a replacement of another shape": (
        lambda: lj.combine({"w": normal(8)}, {"w": normal(6)}),
        ValueError,
        r"expected an Adapter, None, or an array of the base's shape \(8,\)",
    ),
    "unmerging a leaf trained whole": (
        lambda: lj.unmerge({"w": normal(8)}, {"w": normal(8)}),
        ValueError,
        "w was trained whole and cannot be unmerged",
    ),
    "a dropout key that is none": (
        lambda: lj.combine({"w": normal(8, 8)}, {"w": None}, dropout_key=0),
        TypeError,
        "dropout_key is 0, expected a JAX key",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
