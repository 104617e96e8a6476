"""Model folders in 4 bits that transformers and bitsandbytes wrote, and ours: the same logits."""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from hf_folder import build_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lora_jax as lj
from lora_jax.formats import Quantization, read_model
from lora_jax.formats.bitsandbytes_folder import write_bitsandbytes
from lora_jax.models.decoder import Decoder

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer(adds_bos=True).save(str(folder / "tokenizer.json"))
    return folder


def loaded(folder, **options):
    """A model of theirs that computes in float32: on some CPUs it would do so in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()
    packed = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert packed
    for module in packed:
        module.support_avx512bf16_for_cpu = False
    return model


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(checkpoint) -> np.ndarray:
    apply = lj.adapt(Decoder(checkpoint.config).apply)
    return np.asarray(apply({"params": checkpoint.params}, TOKENS))


@pytest.mark.parametrize(
    ("kind", "nested", "skipped"), [("nf4", True, None), ("fp4", False, ["lm_head", "o_proj"])]
)
def test_folders_of_transformers(tmp_path, dense, kind, nested, skipped):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    model = loaded(dense, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    checkpoint = read_model(tmp_path)
    layers = checkpoint.params["layers"]
    up = layers["mlp"]["up_proj"]["kernel"]
    assert (up.kind, up.group_scales is not None, up.shape) == (kind, nested, (3, 64, 128))
    assert isinstance(layers["attn"]["o_proj"]["kernel"], np.ndarray) == (skipped is not None)
    assert np.abs(our_logits(checkpoint) - logits_of(model)).max() <= TOLERANCE


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_folders_of_ours(tmp_path, dense, kind, nested, scan_layers):
    """Some kernels in 4 bits and some dense, the head among these."""
    quantization = Quantization("mlp/.*/kernel|[qk]_proj/kernel", kind, double_quant=nested)
    checkpoint = read_model(dense, quantize=quantization, scan_layers=scan_layers)
    write_bitsandbytes(tmp_path / "ours", checkpoint)
    model = loaded(tmp_path / "ours")
    packed = [name for name, x in model.named_modules() if isinstance(x, bnb.nn.Linear4bit)]
    assert len(packed) == 3 * 5
    assert not any(name.endswith(("v_proj", "o_proj", "lm_head")) for name in packed)
    assert np.abs(our_logits(checkpoint) - logits_of(model)).max() <= TOLERANCE
