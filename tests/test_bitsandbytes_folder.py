"""Model folders written: read again, they hold the same leaves; and the files are as others ask."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import GOLDEN, tensors, write_folder

import lora_jax as lj
from lora_jax.formats import Quantization, bitsandbytes_folder, read_model
from lora_jax.formats.bitsandbytes_folder import write_bitsandbytes
from lora_jax.models.decoder import Decoder

pytestmark = pytest.mark.compiled_quickly

MIXED = Quantization("mlp/.*/kernel|o_proj/kernel", block_size=32, flat=True)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_read_again(tmp_path, monkeypatch, scan_layers):
    """4-bit leaves bit for bit, flat ones among them, in one file or in several."""
    folder = write_folder(tmp_path / "tiny", dtype=np.float16)
    checkpoint = read_model(folder, quantize=MIXED, scan_layers=scan_layers)
    monkeypatch.setattr(bitsandbytes_folder, "_PART", 2**31 if scan_layers else 10_000)
    write_bitsandbytes(tmp_path / "written", checkpoint)
    assert (tmp_path / "written" / "model.safetensors").is_file() == scan_layers
    again = read_model(tmp_path / "written", scan_layers=scan_layers)
    assert jax.tree.structure(again.params) == jax.tree.structure(checkpoint.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, checkpoint.params)
    assert again.config == checkpoint.config
    for name in ("special", "stop", "chat_template"):
        assert getattr(again, name) == getattr(checkpoint, name)
    assert again.tokenizer.to_str() == checkpoint.tokenizer.to_str()
    apply = lj.adapt(Decoder(checkpoint.config).apply)
    logits = [apply({"params": x.params}, GOLDEN["tokens"]) for x in (checkpoint, again)]
    np.testing.assert_array_equal(*logits)


def test_what_the_files_say(tmp_path):
    checkpoint = read_model(write_folder(tmp_path / "tiny", torch_dtype="float16"), quantize=MIXED)
    write_bitsandbytes(tmp_path / "written", checkpoint)
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert (config["torch_dtype"], config["hidden_size"]) == ("float32", 24)
    skipped = config["quantization_config"].pop("llm_int8_skip_modules")
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
    parts = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qkv"]
    assert sorted(skipped) == sorted([*parts, "lm_head"])
    written = safetensors.numpy.load_file(tmp_path / "written" / "model.safetensors")
    down = "model.layers.2.mlp.down_proj.weight"
    assert written[down].shape == (24 * 40 // 2, 1)
    assert f"{down}.quant_state.bitsandbytes__nf4" in written
    query = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(written[query], tensors()[query])


def test_what_cannot_be_written(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    checkpoint = read_model(folder)
    with pytest.raises(ValueError, match="tiny has no leaf in 4 bits; quantize it, or write it"):
        write_bitsandbytes(tmp_path / "new", checkpoint)
    base = lj.quantize(checkpoint.params, "o_proj", kind="int4", block_size=32, layout="b i o")
    packed = dataclasses.replace(checkpoint, params=base)
    with pytest.raises(ValueError, match=r"0\.self_attn\.o_proj\.weight is stored as int4, which"):
        write_bitsandbytes(tmp_path / "new", packed)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="tiny holds something else already"):
        write_bitsandbytes(folder, packed)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
