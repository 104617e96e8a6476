"""Reading GGUF, on files whose every number was written down before it was packed."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf import GGMLQuantizationType as Kind

import lora_jax as lj
from lora_jax.formats import read_model
from lora_jax.formats.gguf import read_gguf
from lora_jax.models.decoder import Decoder, DecoderConfig, parameter_shapes

pytestmark = pytest.mark.compiled_quickly

CONFIG = DecoderConfig(
    vocab_size=268,
    dim=32,
    mlp_dim=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500.0,
    norm_eps=0.125,  # exact in float32, as the file stores it
    tied_head=True,
)
SHAPES = {
    "token_embd.weight": (268, 32),
    "output_norm.weight": (32,),
    "output.weight": (268, 32),
}
BLOCK_SHAPES = {
    "attn_norm.weight": (32,),
    "attn_q.weight": (64, 32),
    "attn_k.weight": (32, 32),
    "attn_v.weight": (32, 32),
    "attn_output.weight": (32, 64),
    "ffn_norm.weight": (32,),
    "ffn_gate.weight": (96, 32),
    "ffn_up.weight": (96, 32),
    "ffn_down.weight": (32, 96),
}
PATHS = {
    "token_embd.weight": "embed/embedding",
    "output_norm.weight": "final_norm/scale",
    "output.weight": "lm_head/kernel",
    "attn_norm.weight": "attn_norm/scale",
    "attn_q.weight": "attn/q_proj/kernel",
    "attn_k.weight": "attn/k_proj/kernel",
    "attn_v.weight": "attn/v_proj/kernel",
    "attn_output.weight": "attn/o_proj/kernel",
    "ffn_norm.weight": "mlp_norm/scale",
    "ffn_gate.weight": "mlp/gate_proj/kernel",
    "ffn_up.weight": "mlp/up_proj/kernel",
    "ffn_down.weight": "mlp/down_proj/kernel",
}


def pack_q4_1(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random Q4_1 rows and the values they stand for: 32 weights in fp16 d, fp16 m, 16 bytes."""
    blocks = int(np.prod(shape)) // 32
    d, m = rng.normal(size=(2, blocks, 1)).astype(np.float16)
    codes = rng.integers(0, 16, (blocks, 32), dtype=np.uint8)
    nibbles = codes[:, :16] | (codes[:, 16:] << 4)
    packed = np.concatenate([d.view(np.uint8), m.view(np.uint8), nibbles], axis=1)
    values = d.astype(np.float64) * codes + m
    return packed.reshape(*shape[:-1], -1), values.reshape(shape)


def pack_q8_0(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random Q8_0 rows and the values they stand for: 32 weights in fp16 d, 32 signed bytes."""
    blocks = int(np.prod(shape)) // 32
    d = rng.normal(size=(blocks, 1)).astype(np.float16)
    codes = rng.integers(-128, 128, (blocks, 32)).astype(np.int8)
    packed = np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=1)
    return packed.reshape(*shape[:-1], -1), (d.astype(np.float64) * codes).reshape(shape)


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection, one by one from where llama.cpp's conversion puts them."""
    width = len(weight) // heads
    ordered = np.empty_like(weight)
    for head in range(heads):
        for j in range(width // 2):
            ordered[head * width + j] = weight[head * width + 2 * j]
            ordered[head * width + j + width // 2] = weight[head * width + 2 * j + 1]
    return ordered


def byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ġ c", "a t", "Ġc at", "Ã ©", "1 Ġ"]  # ids 259 to 267
VOCABULARY = [*SPECIAL, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]


@dataclasses.dataclass(frozen=True)
class Written:
    path: Path
    params: dict[str, np.ndarray]  # float64, by their paths in the unrolled decoder


def write(path: Path, *, tied: bool = True, change=None, architecture: str = "llama") -> Written:
    """Writes a file of random weights; `change` edits the tensors and metadata before that."""
    rng = np.random.default_rng(0)
    names = {name: name for name in SHAPES if not (tied and name == "output.weight")} | {
        f"blk.{i}.{name}": name for i in range(CONFIG.num_layers) for name in BLOCK_SHAPES
    }
    tensors, params = {}, {}
    for name, kind in names.items():
        shape = SHAPES.get(kind) or BLOCK_SHAPES[kind]
        if len(shape) == 1:
            values = rng.normal(size=shape).astype(np.float32)
            tensors[name] = values, None
        elif kind == "ffn_up.weight":
            values = rng.normal(size=shape).astype(np.float16)
            tensors[name] = values, None
        elif kind == "token_embd.weight":
            packed, values = pack_q8_0(rng, shape)
            tensors[name] = packed, Kind.Q8_0
        else:
            packed, values = pack_q4_1(rng, shape)
            tensors[name] = packed, Kind.Q4_1
        if kind == "attn_q.weight":
            values = rotate_half_order(values, CONFIG.num_heads)
        if kind == "attn_k.weight":
            values = rotate_half_order(values, CONFIG.num_kv_heads)
        if len(shape) == 2 and kind != "token_embd.weight":
            values = values.T
        block = name.split(".")[1] if name.startswith("blk.") else None
        params[PATHS[kind] if block is None else f"layers_{block}/{PATHS[kind]}"] = values

    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "add_vocab_size": CONFIG.vocab_size,
        "add_embedding_length": CONFIG.dim,
        "add_feed_forward_length": CONFIG.mlp_dim,
        "add_block_count": CONFIG.num_layers,
        "add_head_count": CONFIG.num_heads,
        "add_head_count_kv": CONFIG.num_kv_heads,
        "add_key_length": CONFIG.head_dim,
        "add_rope_dimension_count": CONFIG.head_dim,
        "add_rope_freq_base": CONFIG.rope_theta,
        "add_layer_norm_rms_eps": CONFIG.norm_eps,
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": "smollm",
        "add_token_list": VOCABULARY,
        "add_token_types": [gguf.TokenType.CONTROL] * len(SPECIAL)
        + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - len(SPECIAL)),
        "add_token_merges": MERGES,
        "add_eos_token_id": 2,
    }
    if change is not None:
        change(tensors, settings)
    for method, value in settings.items():
        getattr(writer, method)(value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, params)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_what_was_written_is_read(tmp_path, tied, scan_layers):
    written = write(tmp_path / "model.gguf", tied=tied)
    checkpoint = read_gguf(written.path, scan_layers=scan_layers)
    assert checkpoint.config == dataclasses.replace(CONFIG, tied_head=tied, scan_layers=scan_layers)
    expected = written.params
    if scan_layers:
        for path in list(expected):
            if path.startswith("layers_0/"):
                leaves = [expected.pop(path.replace("layers_0", f"layers_{i}")) for i in (0, 1)]
                expected[path.replace("layers_0", "layers")] = np.stack(leaves)
    params = traverse_util.flatten_dict(checkpoint.params, sep="/")
    assert params.keys() == expected.keys()
    for path, values in expected.items():
        assert params[path].dtype == np.float32
        # Products of fp16 and small integers are exact in float32; the sum with m is rounded.
        np.testing.assert_allclose(params[path], values, rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_parameters_are_those_that_the_decoder_asks_for(tmp_path, scan_layers, dtype):
    written = write(tmp_path / "model.gguf")
    checkpoint = read_gguf(written.path, dtype=dtype, scan_layers=scan_layers)
    got = jax.eval_shape(lambda: checkpoint.params)
    expected = parameter_shapes(checkpoint.config)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, shape in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, np.dtype(dtype))


def of_q4_0(tensors, settings):
    """All that is Q4_1 becomes Q4_0, with scales of either sign and of any size."""
    rng = np.random.default_rng(1)
    for name, (data, kind) in tensors.items():
        if kind == Kind.Q4_1:
            d = rng.normal(size=(len(data), data.shape[1] // 20, 1)).astype(np.float16)
            d[::3] *= np.float16(1e-6)  # subnormal
            codes = rng.integers(0, 256, (*d.shape[:2], 16), dtype=np.uint8)
            blocks = np.concatenate([d.view(np.uint8), codes], axis=2)
            tensors[name] = blocks.reshape(len(data), -1), Kind.Q4_0


def of_mixed_kinds(tensors, settings):
    rest = {name: tensors[name] for name in tensors if name.startswith("blk.1.")}
    of_q4_0(rest, settings)
    tensors |= rest


def with_a_dense_layer(tensors, settings):
    data, kind = tensors["blk.1.ffn_down.weight"]
    tensors["blk.1.ffn_down.weight"] = gguf.dequantize(data, kind), None


def without_packed_kernels(tensors, settings):
    for name, (data, kind) in tensors.items():
        if kind == Kind.Q4_1:
            tensors[name] = gguf.dequantize(data, kind).astype(np.float16), None


@pytest.mark.parametrize(
    ("change", "dtype", "scan_layers"),
    [
        (None, np.float32, True),
        (None, jnp.bfloat16, False),
        (of_q4_0, np.float32, True),
        (of_mixed_kinds, np.float32, False),
        (of_mixed_kinds, np.float32, True),
    ],
)
def test_packed_kernels_are_those_that_are_read_otherwise(tmp_path, change, dtype, scan_layers):
    """Bit for bit; and the gguf package decodes what is read otherwise.

    Stacked layers of both kinds are all in Q4_1, and lose the sign of Q4_0's zeros.
    """
    path = write(tmp_path / "model.gguf", tied=False, change=change).path
    dense, packed = (
        read_gguf(path, dtype=dtype, scan_layers=scan_layers, packed=packed)
        for packed in (False, True)
    )
    assert packed.config == dense.config
    leaves = traverse_util.flatten_dict(packed.params, sep="/")
    for name, values in traverse_util.flatten_dict(dense.params, sep="/").items():
        leaf = leaves.pop(name)
        if not name.endswith("/kernel") or "up_proj" in name:  # which the file has in 16 bits
            assert isinstance(leaf, np.ndarray)
        else:
            in_q4_0 = change is of_q4_0 or (change is of_mixed_kinds and "layers_1" in name)
            assert leaf.kind == ("q4_0" if in_q4_0 else "q4_1")
            assert 8 * leaf.nbytes / leaf.size == (4.5 if in_q4_0 else 5.0)
            leaf = np.asarray(lj.dequantize(leaf))
        assert (leaf.dtype, leaf.shape) == (values.dtype, values.shape)
        if change is of_mixed_kinds and scan_layers:
            leaf, values = leaf + 0.0, values + 0.0  # -0 + 0 is 0
        assert leaf.tobytes() == values.tobytes(), name
    assert not leaves


def test_a_packed_model_is_the_dense_one(tmp_path):
    path = write(tmp_path / "model.gguf", tied=False).path
    dense, packed = (read_gguf(path, packed=packed) for packed in (False, True))
    apply = jax.jit(lj.adapt(Decoder(dense.config).apply))
    ids = np.arange(12).reshape(2, 6)
    logits = [apply({"params": one.params}, ids) for one in (dense, packed)]
    np.testing.assert_array_equal(*map(np.asarray, logits))
    report = lj.explain(Decoder(dense.config).apply)({"params": packed.params}, ids)
    kernels = {name for name in report.uses if name.endswith("kernel")}
    assert len(kernels) == 7  # six of a layer, and the head; one of a layer is in 16 bits
    assert {report.status(name) for name in kernels} == {"factored"}


def test_kernels_that_cannot_stay_packed(tmp_path):
    path = write(tmp_path / "model.gguf", change=without_packed_kernels).path
    sentence = (
        "no kernel is stored as Q4_0 or Q4_1, and so none can stay packed; they are stored as"
    )
    with pytest.raises(ValueError, match=rf"{sentence} F16 \(14\)\."):
        read_gguf(path, packed=True)
    path = write(tmp_path / "mixed.gguf", change=with_a_dense_layer).path
    with pytest.raises(ValueError, match=r"at \[1\] \(dense\) and in another before it \(Q.*q4_1"):
        read_gguf(path, packed=True)
    with pytest.raises(ValueError, match="is a folder of safetensors; only the kernels of a GGUF"):
        read_model(tmp_path, packed=True)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("the", [ord("t") + 3, 260]),  # "Ġ t" needs the space
        ("the the", [ord("t") + 3, 260, 261]),
        ("12 12", [52, 53, 35, 52, 53]),  # digits stand alone, in spite of the merge "1 2"
        ("1 the", [52, 261]),
        (" cat\n", [265, 13]),
        ("café", [102, 100, 105, 266]),
        ("<|im_start|>the cat<|im_end|>", [1, ord("t") + 3, 260, 265, 2]),
        ("<|im_", [ord(character) + 3 for character in "<|im_"]),
    ],
)
def test_the_tokenizer_is_that_of_the_file(tmp_path, text, ids):
    tokenizer = read_gguf(write(tmp_path / "model.gguf").path).tokenizer
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_metadata_are_kept_but_for_the_long_lists(tmp_path):
    metadata = read_gguf(write(tmp_path / "model.gguf").path).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.tokens" not in metadata


def with_a_first_token(tensors, settings):
    settings |= {"add_bos_token_id": 1, "add_add_bos_token": True, "add_chat_template": "{{ x }}"}


def with_an_unused_first_token(tensors, settings):
    settings |= {"add_bos_token_id": 1, "add_add_bos_token": False}


@pytest.mark.parametrize(
    ("change", "special", "template"),
    [
        (None, (None, 2), None),
        (with_a_first_token, (1, 2), "{{ x }}"),
        (with_an_unused_first_token, (None, 2), None),
    ],
)
def test_what_a_file_says_beside_its_weights(tmp_path, change, special, template):
    path = write(tmp_path / "model.gguf", change=change).path
    checkpoint = read_gguf(path)
    assert checkpoint.special == special
    assert checkpoint.stop == (2,)
    assert checkpoint.chat_template == template
    assert checkpoint.name == "model"
    assert checkpoint.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def without_a_tensor(tensors, settings):
    del tensors["blk.1.ffn_gate.weight"]


def with_frequencies(tensors, settings):
    tensors["rope_freqs.weight"] = np.ones(8, np.float32), None


def with_a_third_block(tensors, settings):
    tensors["blk.2.attn_norm.weight"] = np.ones(32, np.float32), None


def of_another_width(tensors, settings):
    settings["add_feed_forward_length"] = 128


def of_more_blocks(tensors, settings):
    settings["add_block_count"] = 3


def without_a_field(tensors, settings):
    del settings["add_embedding_length"]


def of_another_splitter(tensors, settings):
    settings["add_tokenizer_pre"] = "llama-bpe"


def without_merges(tensors, settings):
    del settings["add_token_merges"]


def with_a_foreign_merge(tensors, settings):
    settings["add_token_merges"] = [*MERGES, "z zz"]


def of_an_integer_kind(tensors, settings):
    tensors["blk.0.ffn_up.weight"] = np.ones((96, 32), np.int8), None


@pytest.mark.parametrize(
    ("change", "architecture", "sentence"),
    [
        (None, "qwen2", "architecture 'qwen2' in the GGUF metadata; only 'llama' can be read"),
        (without_a_tensor, "llama", "blk.1.ffn_gate.weight is missing"),
        (with_frequencies, "llama", "rope_freqs.weight is without a place in this"),
        (with_a_third_block, "llama", "blk.2.attn_norm.weight is without a place"),
        (of_another_width, "llama", "blk.0.ffn_gate.weight ((96, 32), expected (128, 32))"),
        (
            of_more_blocks,
            "llama",
            "blk.2.attn_q.weight, blk.2.attn_k.weight and 6 more are missing",
        ),
        (without_a_field, "llama", "the GGUF metadata lacks 'llama.embedding_length'"),
        (of_another_splitter, "llama", "pre-tokenizer 'llama-bpe'; only 'gpt2' with 'smollm'"),
        (without_merges, "llama", "the GGUF metadata lacks 'tokenizer.ggml.merges'"),
        (with_a_foreign_merge, "llama", "vocabulary and merges do not fit"),
        (of_an_integer_kind, "llama", "'blk.0.ffn_up.weight' is stored as I8"),
    ],
)
def test_models_that_cannot_be_read_faithfully(tmp_path, change, architecture, sentence):
    path = write(tmp_path / "model.gguf", change=change, architecture=architecture).path
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_foreign_files(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it begins with b'PK"):
        read_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it begins with b''"):
        read_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"other\.gguf"):
        read_gguf(tmp_path / "other.gguf")


def test_truncated_files(tmp_path):
    path = write(tmp_path / "model.gguf").path
    content = path.read_bytes()
    for length in [4, 10, 24, 30, 100, 3_000, 6_000, 8_000, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is broken or ends too early") as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value), length
