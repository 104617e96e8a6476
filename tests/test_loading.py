"""Models that are quantized, placed and checked while they are read, tensor by tensor."""

from __future__ import annotations

import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import tensors, write_folder, write_json
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.cli import main
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import load_model
from lora_jax.core.tree import named_leaves
from lora_jax.formats import Quantization, quantization, read_model
from lora_jax.formats.bitsandbytes import to_tensors
from lora_jax.formats.bitsandbytes_folder import write_bitsandbytes

ONE = "model.layers.1.mlp.up_proj.weight"


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Quantization on arrival.


@pytest.mark.parametrize(
    ("scan_layers", "dtype", "options", "part"),
    [
        (True, np.float32, {"kind": "nf4"}, 2**21),
        (True, ml_dtypes.bfloat16, {"kind": "nf4"}, 64),  # tensors come in several parts
        (False, np.float32, {"kind": "fp4", "double_quant": False}, 128),
        (True, np.float32, {"kind": "int4", "block_size": 128}, 256),
    ],
)
def test_is_what_quantize_makes_of_the_whole(
    tmp_path, monkeypatch, scan_layers, dtype, options, part
):
    """Codes and scales bit for bit: of kernels that blocks run over, in layers and beside them."""
    monkeypatch.setattr(quantization, "_PART", part)
    folder = write_folder(tmp_path, dtype=np.float32, shards=2)
    pattern = ["mlp/.*/kernel", "lm_head"]
    whole = read_model(folder, dtype=dtype, scan_layers=scan_layers)
    layout = "b i o" if scan_layers else "i o"
    expected = lj.quantize(whole.params, pattern[:1], layout=layout, flat=True, **options)
    expected = lj.quantize(expected, pattern[1:], flat=True, **options)
    quantize = Quantization(pattern, flat=True, **options)
    actual = read_model(folder, dtype=dtype, scan_layers=scan_layers, quantize=quantize)
    assert_same(actual.params, expected)
    assert actual.config == whole.config


def test_rows_of_an_embedding_stay_rows(tmp_path):
    folder = write_folder(tmp_path)
    options = {"block_size": 32, "flat": True}
    params = read_model(folder, quantize=Quantization("embed", **options)).params
    expected = lj.quantize(read_model(folder).params, "embed", layout="o i", **options)
    assert_same(params, expected)


@pytest.mark.parametrize(
    ("quantize", "sentence"),
    [
        (Quantization("mpl"), "pattern 'mpl' matches no leaf; the paths are embed/embedding"),
        (Quantization(["mlp", "none"]), "pattern 'none' matches no leaf"),
        (Quantization("lm_head"), "lm_head/kernel contracts 24 inputs (shape (96, 24)"),
        (Quantization("norm"), "only a matrix can be adapted or quantized"),
        (Quantization("mlp", kind="nf5"), "kind 'nf5' is unknown"),
        (Quantization("mlp", block_size=48), "block_size is 48"),
    ],
)
def test_what_cannot_be_quantized(tmp_path, quantize, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_model(write_folder(tmp_path), quantize=quantize)


def test_values_that_are_nan(tmp_path):
    folder = write_folder(tmp_path)
    rewrite(folder, {ONE: np.full((40, 24), np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"layers/mlp/up_proj/kernel holds values that are NaN"):
        read_model(folder, quantize=Quantization("mlp/.*/kernel", flat=True))


# Placement and progress.


@pytest.mark.parametrize("quantize", [None, Quantization("mlp/", flat=True)], ids=["dense", "nf4"])
def test_leaves_are_placed_once_each_when_they_are_whole(tmp_path, quantize):
    folder, seen, counts = write_folder(tmp_path), {}, []

    def place(path, leaf):
        assert path not in seen
        seen[path] = leaf
        return jax.device_put(leaf)

    checkpoint = read_model(
        folder, quantize=quantize, place=place, progress=lambda *count: counts.append(count)
    )
    plain = read_model(folder, quantize=quantize)
    placed = dict(named_leaves(checkpoint.params))
    assert set(seen) == set(placed)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(checkpoint.params))
    for path, leaf in named_leaves(plain.params):
        assert_same(placed[path], leaf)
    assert counts == [(number, 30) for number in range(1, 31)]


def test_on_a_mesh(tmp_path):
    """As `read_model` says: the rules of `lj.shard`, one leaf at a time."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    rules = [(r"mlp/(gate|up)_proj/kernel", P(None, None, "model")), ("embed", P("model"))]

    def place(path, leaf):
        here = [rule for rule in rules if re.search(rule[0], path)]
        return lj.shard({path: leaf}, mesh, here)[path]

    folder, quantize = write_folder(tmp_path), Quantization(r"o_proj/kernel", block_size=32)
    params = read_model(folder, quantize=quantize, place=place).params
    expected = lj.shard(read_model(folder, quantize=quantize).params, mesh, rules)
    assert_same(params, expected)
    where = [jax.tree.map(lambda x: x.sharding, tree) for tree in (params, expected)]
    assert jax.tree.leaves(where[0]) == jax.tree.leaves(where[1])
    embedding = params["embed"]["embedding"]
    assert embedding.sharding == NamedSharding(mesh, P("model"))


# Folders in 4 bits.


def rewrite(folder, changes, without=()):
    weights = tensors() | changes
    for name in without:
        weights.pop(name)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")


def packed(name: str, **options) -> dict[str, np.ndarray]:
    """A weight of the golden model, as bitsandbytes keeps it."""
    options = {"layout": "o i", "flat": True} | options
    return to_tensors(lj.quantize_array(jnp.asarray(tensors()[name]), **options), name)


CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_a_weight_in_parts_of_the_files(tmp_path):
    """What belongs to a weight may be in another file than its codes."""
    folder = write_folder(tmp_path, shards=2, quantization_config=CONFIG)
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    weights = tensors()
    for name in names:
        weights |= packed(name)
    index = {}
    for part, file in enumerate(sorted(folder.glob("model-*.safetensors"))):
        half = dict(sorted(weights.items())[part::2])
        safetensors.numpy.save_file(half, file)
        index |= dict.fromkeys(half, file.name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    params = read_model(folder, dtype=ml_dtypes.bfloat16).params
    stacked = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert (stacked.shape, stacked.dtype) == ((3, 24, 40), np.float32)  # not what was asked for
    for layer, name in enumerate(names):
        one = lj.quantize_array(tensors()[name], layout="o i", flat=True)
        np.testing.assert_array_equal(stacked.codes[layer], one.codes)
        np.testing.assert_array_equal(lj.dequantize(stacked)[layer], lj.dequantize(one).T)
    assert params["lm_head"]["kernel"].dtype == ml_dtypes.bfloat16


def test_layers_stored_in_different_ways(tmp_path):
    folder = write_folder(tmp_path, quantization_config=CONFIG)
    rewrite(folder, packed(ONE))
    with pytest.raises(ValueError, match=r"up_proj/kernel is stored in one way at \[1\] \(Quant"):
        read_model(folder)
    params = read_model(folder, scan_layers=False).params
    assert isinstance(params["layers_1"]["mlp"]["up_proj"]["kernel"], lj.QuantizedArray)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'; only those in floating point"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "by 'bitsandbytes' in 8 bits"),
        ("awq", "quantized by 'awq'"),
    ],
)
def test_other_quantizations(tmp_path, config, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_model(write_folder(tmp_path, quantization_config=config))


def test_broken_weights_in_4_bits(tmp_path):
    folder = write_folder(tmp_path, quantization_config=CONFIG)
    spoilt = packed(ONE)
    spoilt[f"{ONE}.nested_absmax"] = spoilt[f"{ONE}.nested_absmax"] * np.nan
    rewrite(folder, spoilt)
    with pytest.raises(ValueError, match=r"the scales of model.*up_proj\.weight are NaN"):
        read_model(folder, scan_layers=False)
    rewrite(folder, {ONE: packed(ONE)[ONE]})
    with pytest.raises(ValueError, match=r"up_proj\.weight' of model\.safetensors is stored as U8"):
        read_model(folder)
    second = {f"{ONE}.absmax": packed(ONE)[f"{ONE}.absmax"]}
    rewrite(folder, packed(ONE))
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    safetensors.numpy.save_file(second, folder / "b.safetensors")
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=r"up_proj\.weight\.absmax is more than once in the files"):
        read_model(folder)
    (folder / "model.safetensors.index.json").unlink()
    lying = packed("model.layers.1.mlp.down_proj.weight")
    rewrite(folder, {name.replace("down", "up"): x for name, x in lying.items()})
    with pytest.raises(ValueError, match=r"\(24, 40\), expected \(40, 24\)\) is of another"):
        read_model(folder)


def test_the_command_line_takes_them_as_they_are(tmp_path, capsys):
    """Whatever `--base` says: to quantize once more would lose more."""
    every = Quantization(block_size=32, flat=True)
    checkpoint = read_model(write_folder(tmp_path / "dense"), quantize=every)
    write_bitsandbytes(tmp_path / "packed", checkpoint)
    model = load_model(ModelOptions(model=str(tmp_path / "packed"), base="nf4"))
    assert_same(jax.tree.map(np.asarray, model.base), checkpoint.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.base))
    assert main(["inspect", str(tmp_path / "packed"), "--base", "nf4"]) == 0
    assert "layers/mlp/up_proj/kernel" in capsys.readouterr().out
    dense = load_model(ModelOptions(model=str(tmp_path / "dense"), base="nf4"))
    expected = read_model(tmp_path / "dense", quantize=Quantization(flat=True))
    assert_same(jax.tree.map(np.asarray, dense.base), expected.params)


# Strictness.


def test_all_that_is_wrong_is_one_error(tmp_path):
    folder = write_folder(tmp_path)
    changes = {"extra.weight": np.ones(3, np.float32), ONE: np.ones((40, 23), np.float32)}
    rewrite(folder, changes, without=["model.norm.weight", "lm_head.weight"])
    for strict in (True, False):
        with pytest.raises(ValueError, match="tensors are not those") as caught:
            read_model(folder, strict=strict)
        message = str(caught.value)
        assert "model.norm.weight, lm_head.weight are missing" in message
        assert f"{ONE} ((40, 23), expected (40, 24)) is of another shape" in message
        assert ("extra.weight is without a place in this decoder" in message) == strict


def test_what_has_no_place_can_be_left_out(tmp_path):
    folder = write_folder(tmp_path)
    plain = read_model(folder).params
    rewrite(folder, {f"extra.{n}": np.ones(3, np.float32) for n in range(5)})
    with pytest.raises(ValueError, match=r"extra\.2 and 2 more are without a place"):
        read_model(folder)
    with pytest.warns(UserWarning, match=r"extra\.2 and 2 more are without a place .* left out"):
        params = read_model(folder, strict=False).params
    assert_same(params, plain)
