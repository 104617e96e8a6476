"""Files that were made to hurt, and the sentence that each is refused with.

    python tests/hostile_cases.py FOLDER

makes them in a folder, reads them one after the other, and prints for each what came of it: the
error, the seconds of the processor, and how far the memory of the process has grown.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow.parquet
import safetensors.numpy
from fuzz.mutations import text, with_length
from hf_folder import GOLDEN, tensors, write_folder
from peft_folder import CONFIG as ADAPTER_CONFIG
from peft_folder import copy as copy_adapter
from peft_folder import edited, set_to
from tiny_model import write_model

import lora_jax as lj
from lora_jax.cli.found import look
from lora_jax.cli.report import Reporter
from lora_jax.data import Chat
from lora_jax.data.records import read_records
from lora_jax.formats import read_model, wheels
from lora_jax.formats.gguf_file import read_head
from lora_jax.formats.hf import INDEX, WEIGHTS
from lora_jax.formats.peft import read_peft
from lora_jax.formats.tensor_file import stored_tensors
from lora_jax.models.decoder import parameter_shapes
from lora_jax.models.families import from_gguf, from_hf


class Case(NamedTuple):
    """A file, or a folder.

    Attributes:
      make: makes it in an empty folder, and returns what reads it.
      kind: of the error.
      sentence: what it says, among other things.
    """

    make: Callable[[Path], Callable[[], Any]]
    kind: str
    sentence: str


CASES: dict[str, Case] = {}


def case(name: str, make: Any, sentence: str, kind: str = "ValueError") -> None:
    CASES[name] = Case(make, kind, sentence)


def sparse(path: Path, size: int, head: bytes = b"") -> Path:
    """A file of zeros, which take no room on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


# safetensors: a header that is not true of the file.


def stored(content: bytes, size: int | None = None) -> Any:
    def make(folder: Path) -> Any:
        path = sparse(folder / WEIGHTS, len(content) if size is None else size, content)
        return lambda: stored_tensors(path)

    return make


def described(values: int = 8, **tensors: Any) -> bytes:
    """A file whose header says this, and so many bytes."""
    entries = {}
    for name, (dtype, shape, offsets) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return with_length(json.dumps(entries).encode(), bytes(values))


_TWICE = with_length(
    b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": '
    b'{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}',
    bytes(8),
)
for name, content, sentence in (
    ("cut in its length", b"\x05\x00", "broken or ends too early (2 bytes)"),
    ("cut in its header", described(0, a=("U8", [], [0, 1]))[:-20], "header would have 59 bytes"),
    ("longer than the file", (100).to_bytes(8, "little") + b"{}", "its header would have 100 byt"),
    ("header of 2^63", (2**63).to_bytes(8, "little"), "have 9,223,372,036,854,775,808 bytes"),
    ("empty header", with_length(b"", b""), "its header is no JSON"),
    ("no tensors of values", with_length(b"{}", bytes(8)), "its header tells of 10 bytes"),
    ("header that is a list", with_length(b"[]", b""), "its header holds a list, expected an obj"),
    ("levels", with_length(b'{"a":' * 100_000, b""), "its header is no JSON: maximum recursion"),
    ("fewer levels", with_length(b'{"a":' * 99 + b"1" + b"}" * 99, b""), "has lists within lists"),
    ("long number", with_length(b'{"a": ' + b"1" * 10**6 + b"}", b""), "is no JSON: Exceeds the"),
    (
        "overlap",
        described(8, a=("U8", [8], [0, 8]), b=("U8", [4], [4, 8])),
        "b begins at byte 4 of",
    ),
    (
        "gap",
        described(8, a=("U8", [2], [0, 2]), b=("U8", [4], [4, 8])),
        "what is before it ends at 2",
    ),
    ("decreasing", described(8, a=("U8", [8], [8, 0])), "a has -8 bytes for U8 of the shape [8]"),
    ("negative", described(8, a=("U8", [8], [-8, 0])), "data_offsets [-8, 0], expected sizes"),
    ("negative shape", described(8, a=("U8", [-8], [0, 8])), "a has the shape [-8]"),
    ("outside", described(8, a=("U8", [2**40], [0, 2**40])), "its header tells of 1,099,511,627"),
    ("2^124 bytes", described(8, a=("U8", [2**62, 2**62], [0, 8])), "a has 8 bytes for U8 of the"),
    (
        "values too few",
        described(8, a=("F32", [3], [0, 8])),
        "a has 8 bytes for F32 of",
    ),
    ("half a byte", described(1, a=("F4", [3], [0, 1])), "a has 1 bytes for F4 of the shape [3]"),
    (
        "sizes of floats",
        described(8, a=("U8", [8.0], [0, 8])),
        "a has the shape [8.0]",
    ),
    ("sizes of bools", described(1, a=("U8", [True], [0, 1])), "a has the shape [True]"),
    (
        "33 axes",
        described(1, a=("U8", [1] * 33, [0, 1])),
        "a has the shape [1, 1, 1",
    ),
    ("unknown dtype", described(8, a=("F7", [8], [0, 8])), "a has the dtype 'F7', expected one of"),
    ("dtype that is a list", described(8, a=(["U8"], [8], [0, 8])), "a has the dtype ['U8']"),
    ("name with a line", described(8, **{"a\nb": ("U8", [8], [0, 8])}), r"'a\nb' is no name of a"),
    ("name of 10^6", described(8, **{"a" * 10**6: ("U8", [8], [0, 8])}), "aaa' is no name of a te"),
    ("tensor twice", _TWICE, "its header is no JSON: 'a' is there more than once"),
    ("no tensor", with_length(b'{"a": 1}', b""), "a is 1, expected a dtype, a shape and data_offs"),
    ("half a character", with_length(b'{"\\ud800": 1}', b""), r"has '\ud800' in it, half a charac"),
    ("pickle", b"\x80\x02}q\x00(X\x06\x00\x00\x00weight", "is a pickle, whatever its name says"),
    ("torch's zip", b"PK\x03\x04archive/data.pkl", "write it with safetensors.torch.save_file"),
):
    case(f"safetensors: {name}", stored(content), sentence)
case(
    "safetensors: header of 300 MB",
    stored((3 * 10**8).to_bytes(8, "little") + b"{", 4 * 10**8),
    "its header would have 300,000,000 bytes, expected 16,777,216 at most",
)
# As much as is parsed, and then is nothing.
case(
    "safetensors: 3 million numbers",
    stored(with_length(b'{"a":[' + b"0.5," * 3_000_000 + b"0]}", b"")),
    "has 3,000,000 values, expected at most 1,500,000",
)
case(
    "safetensors: 1.5 million numbers",
    stored(with_length(b'{"a":[' + b"0.5," * 1_500_000 + b"0]}", b"")),
    "a is [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...], expected a dtype",
)
case(
    "safetensors: 490,000 objects",
    stored(with_length(b'{"a":[' + b'{"":0},' * 490_000 + b"0]}", b"")),
    "a is [{'': 0}, {'': 0}, {'': 0}",
)
case(
    "safetensors: 5 million objects",
    stored(with_length(b'{"a":[' + b"{}," * 5_000_000 + b"0]}", b"")),
    "has 5,000,002 lists and objects, expected at most 500,000",
)


# GGUF: numbers that are not true of the file.


def gguf(*pairs: bytes, tensors: tuple[bytes, ...] = (), counts: Any = None, rest: int = 64) -> Any:
    number, many = (len(tensors), len(pairs)) if counts is None else counts
    head = b"GGUF" + struct.pack("<IQQ", 3, number, many) + b"".join(pairs + tensors)

    def make(folder: Path) -> Any:
        path = sparse(folder / "model.gguf", -(-len(head) // 32) * 32 + rest, head)
        return lambda: read_head(path)

    return make


def tensor(
    name: str = "a", axes: tuple[int, ...] = (16,), kind: int = 0, at: int = 0, number: Any = None
) -> bytes:
    many = len(axes) if number is None else number
    sizes = struct.pack(f"<I{len(axes)}Q", many, *axes)
    return text(name) + sizes + struct.pack("<IQ", kind, at)


def aligned(number: int) -> bytes:
    return text("general.alignment") + struct.pack("<II", 4, number)


for name, make, sentence in (
    ("2^60 tensors", gguf(counts=(2**60, 0)), "it would have 1,152,921,504,606,846,976 tensors"),
    ("2^60 pairs", gguf(counts=(0, 2**60)), "1,152,921,504,606,846,976 pairs of metadata"),
    ("more pairs than there are", gguf(counts=(0, 9)), "the key '' is no name"),
    ("name of 2^60", gguf(struct.pack("<Q", 2**60)), "asks for 1,152,921,504,606,846,976 more"),
    (
        "text of 2^63",
        gguf(text("a") + struct.pack("<IQ", 8, 2**63)),
        "asks for 9,223,372,036,854,775,808 more, where the file ends",
    ),
    (
        "list of 2^60",
        gguf(text("a") + struct.pack("<IIQ", 9, 4, 2**60)),
        "a list of 1,152,921,504,606,846,976 values, expected at most 2,097,152 in all",
    ),
    (
        "list of 2^60 empty texts",
        gguf(text("a") + struct.pack("<IIQ", 9, 8, 2**60)),
        "a list of 1,152,921,504,606,846,976 values",
    ),
    (
        "2 million empty texts",
        gguf(text("a") + struct.pack("<IIQ", 9, 8, 2**21), counts=(0, 2), rest=2**25),
        "the key '' is no name",
    ),
    (
        "lists in lists",
        gguf(text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000),
        "a value of the unknown type 9",
    ),
    ("unknown type", gguf(text("a") + struct.pack("<I", 99)), "a value of the unknown type 99"),
    ("key twice", gguf(*[text("a") + struct.pack("<IB", 7, 1)] * 2), "or there more than once"),
    ("no UTF-8", gguf(struct.pack("<Q", 1) + b"\xff"), "can't decode byte 0xff"),
    ("tensor twice", gguf(tensors=(tensor(), tensor(at=64))), "a is there twice"),
    ("2^31 axes", gguf(tensors=(tensor(number=2**31),)), "a has 2,147,483,648 axes, expected 1 to"),
    ("no axes", gguf(tensors=(tensor(axes=()),)), "a has 0 axes"),
    ("empty axis", gguf(tensors=(tensor(axes=(0, 4)),)), "a has the shape (4, 0), expected rows"),
    (
        "axes of 2^63",  # whose product is zero in 64 bits
        gguf(tensors=(tensor(axes=(2**63, 2)),)),
        "a would be 73,786,976,294,838,206,464 bytes",
    ),
    ("half a block", gguf(tensors=(tensor(axes=(16,), kind=2),)), "whole blocks of 32 values"),
    ("unknown kind", gguf(tensors=(tensor(kind=999),)), "a is stored in the unknown type 999"),
    ("beyond the end", gguf(tensors=(tensor(at=2**40),)), "which is beyond the end, within anoth"),
    ("near 2^64", gguf(tensors=(tensor(at=2**64 - 32),)), "which is beyond the end"),
    ("within another", gguf(tensors=(tensor(), tensor("b", at=32))), "b would be 64 bytes from"),
    ("not aligned", gguf(tensors=(tensor(at=3),)), "or no multiple of 32"),
    ("alignment 0", gguf(aligned(0)), "general.alignment is 0, expected a power of two up to 65,"),
    ("alignment 3", gguf(aligned(3)), "general.alignment is 3, expected a power of two"),
    ("alignment 2^31", gguf(aligned(2**31)), "general.alignment is 2147483648, expected"),
    (
        "64 MiB of head",
        gguf(text("a") + struct.pack("<IQ", 8, 2**27), rest=2**28),
        "asks for 134,217,728 more, where 67,108,864 bytes are over",
    ),
):
    case(f"GGUF: {name}", make, sentence)


def other_version(folder: Path) -> Any:
    path = sparse(folder / "model.gguf", 64, b"GGUF" + struct.pack(">I", 3))
    return lambda: read_head(path)


case("GGUF: of big-endian bytes", other_version, "its version is 50,331,648, expected 2 or 3")


def spoilt_scale(kind: str, *, packed: bool) -> Any:
    def make(folder: Path) -> Any:
        path = write_model(folder / "model.gguf", kind=kind)
        found = next(x for x in read_head(path).tensors if x.name == "blk.1.ffn_up.weight")
        content = bytearray(path.read_bytes())
        content[found.start : found.start + 2] = np.float16(np.nan).tobytes()
        path.write_bytes(content)
        return lambda: read_model(path, packed=packed)

    return make


for kind, packed in (("Q4_0", True), ("Q4_1", False)):
    case(
        f"GGUF: a scale of {kind} that is NaN",
        spoilt_scale(kind, packed=packed),
        "the scales of blk.1.ffn_up.weight are NaN or infinite",
    )


def described_gguf(**changes: Any) -> Any:
    """Metadata that are not those of a model."""
    said = {
        "vocab_size": 96,
        "embedding_length": 24,
        "feed_forward_length": 40,
        "block_count": 3,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata = {f"llama.{name}": x for name, x in (said | changes).items()}
    metadata["general.architecture"] = "llama"
    return lambda _: lambda: from_gguf(metadata, tied_head=True)


for name, value, sentence in (
    (
        "block_count",
        2**32 - 1,
        "is 4294967295 in the GGUF metadata; expected a whole number",
    ),
    ("attention.head_count", 0, "head_count is 0 in the GGUF metadata"),
    ("attention.head_count", [4, 4], "head_count is [4, 4] in the GGUF metadata"),
    ("embedding_length", -24, "llama.embedding_length is -24 in the GGUF metadata"),
    ("rope.freq_base", float("nan"), "llama.rope.freq_base is nan in the GGUF metadata"),
    ("rope.dimension_count", 10**9, "llama.rope.dimension_count is 1000000000 and heads are 6 wi"),
):
    case(f"GGUF: {name} of {value}", described_gguf(**{name: value}), sentence)


# Folders: files that are not what they should be, or not there.


def folder_with(change: Callable[[Path], Any], **config: Any) -> Any:
    def make(folder: Path) -> Any:
        change(write_folder(folder / "model", **config))
        return lambda: read_model(folder / "model")

    return make


def unchanged(folder: Path) -> None:
    return


def written(name: str, content: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(json.dumps(content))

    return change


def indexed(name: Any) -> Callable[[Path], None]:
    return written(INDEX, {"weight_map": {"a": name}})


def linked(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).replace(folder.parent / name)
        (folder / name).symlink_to(target)

    return change


def piped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def a_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def grown(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: sparse(folder / name, size, b'{"a": ')


for name, change, sentence in (
    ("index to a file above", indexed("../../etc/passwd"), "cannot be in its folder: '../../etc"),
    (
        "index to an absolute path",
        indexed("/etc/passwd"),
        "cannot be in its folder: '/etc",
    ),
    ("index to ..", indexed(".."), "cannot be in its folder: '..'"),
    ("index to 300 letters", indexed("a" * 300), "cannot be in its folder: 'aaaaaa"),
    ("index to a number", indexed(5), "names a file 5, which is no name of one"),
    ("index to a line", indexed("a\nb"), r"names a file 'a\nb', which is no name"),
    ("index to a pickle", indexed(WEIGHTS), f"{WEIGHTS} is a pickle, whatever its name says"),
    ("index of 300 MB", grown(INDEX, 3 * 10**8), "has 300,000,000 bytes, expected at most"),
    ("config of 300 MB", grown("config.json", 3 * 10**8), "has 300,000,000 bytes, expect"),
    ("config of levels", written("config.json", b"[" * 100_000), "config.json is no JSON: maximum"),
    ("config twice", written("config.json", b'{"a": 1, "a": 2}'), "'a' is there more than once"),
    (
        "long number",
        written("config.json", b'{"a": ' + b"9" * 10**7 + b"}"),
        "no JSON: Exceeds",
    ),
    (
        "tokenizer of 300 MB",
        grown("tokenizer.json", 3 * 10**8),
        "tokenizer.json has 300,000,000",
    ),
    ("tokenizer of levels", written("tokenizer.json", b"[" * 10**6), "is no tokenizer that can be"),
    ("template of 300 MB", grown("chat_template.jinja", 3 * 10**8), "jinja has 300,000,000 bytes"),
    ("template of no text", written("chat_template.jinja", b"\xff"), "is no text in UTF-8"),
    ("weights linked out", linked(WEIGHTS, f"../{WEIGHTS}"), f"{WEIGHTS} is a link to "),
    ("config linked out", linked("config.json", "../config.json"), "config.json is a link to "),
    ("tokenizer linked out", linked("tokenizer.json", "../tokenizer.json"), "out of its folder"),
):
    before = written(WEIGHTS, b"PK\x03\x04") if name.endswith("pickle") else unchanged
    both = lambda folder, first=before, second=change: (first(folder), second(folder))  # noqa: E731
    case(f"folder: {name}", folder_with(both), sentence)
for name, change, sentence in (
    ("weights that are a folder", a_folder(WEIGHTS), f"lacks {WEIGHTS}; it has config.json"),
    ("weights that are a pipe", piped(WEIGHTS), f"lacks {WEIGHTS}; it has config.json"),
    ("config that is a pipe", piped("config.json"), "has no config.json"),
    ("index to a pipe", lambda x: (indexed("p")(x), piped("p")(x)), "lacks p; it has config.json"),
):
    case(f"folder: {name}", folder_with(change), sentence, "FileNotFoundError")
for field, value, sentence in (
    ("num_hidden_layers", 10**9, "is 1000000000 in config.json; expected a whole number from 1"),
    ("num_hidden_layers", 4_000, "describe 4,000 layers of 0 experts each, but there are 30 tens"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0 in config.json"),
    ("num_attention_heads", 0, "num_attention_heads is 0 in config.json"),
    ("num_key_value_heads", 0, "num_key_value_heads is 0 in config.json"),
    ("num_attention_heads", True, "num_attention_heads is True in config.json"),
    ("hidden_size", 10**9, "hidden_size is 1000000000 in config.json"),
    ("hidden_size", -24, "hidden_size is -24 in config.json; expected a whole number from 1"),
    ("hidden_size", 24.0, "hidden_size is 24.0 in config.json"),
    ("hidden_size", "24", "hidden_size is '24' in config.json"),
    ("vocab_size", 10**12, "vocab_size is 1000000000000 in config.json; expected a whole number"),
    ("vocab_size", 2**22, "model.embed_tokens.weight ((96, 24), expected (4194304, 24))"),
    ("intermediate_size", [], "intermediate_size is [] in config.json"),
    ("head_dim", 10**400, "head_dim is 100000000000000000000000000000000000"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5' in config.json; expected a positive number"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is nan in config.json"),
    ("rope_theta", -1.0, "rope_theta is -1.0 in config.json; expected a positive number"),
    ("rope_scaling", [1], "rope_scaling is [1] in config.json; expected an object"),
    ("tie_word_embeddings", 1, "tie_word_embeddings is 1 in config.json; expected true or false"),
    ("layer_types", {"a": 1}, "layer_types is {'a': 1} in config.json; expected a list"),
    ("model_type", ["llama"], "model_type ['llama'] in config.json; only llama, "),
    ("quantization_config", {"quant_method": {"a": [0] * 10**5}}, "quantized by {'a': [0, 0, 0"),
):
    make = folder_with(unchanged, **{field: value})
    case(f"config: {field} {value!r:.30}", make, sentence)


def pipe(folder: Path) -> Any:
    os.mkfifo(folder / "pipe")
    return lambda: read_model(folder / "pipe")


case("a pipe", pipe, "is a pipe or device; write the path of a file", "SourceError")
case(
    "a device",
    lambda _: lambda: look("/dev/zero", Reporter("quiet")),
    "/dev/zero is a pipe or device",
    "CliError",
)


def large_state(folder: Path) -> Any:
    name = "model.layers.0.mlp.up_proj.weight"
    more = {f"{name}.quant_state.bitsandbytes__nf4": np.full(2**17, ord("["), np.uint8)}
    write_folder(folder / "model")
    safetensors.numpy.save_file(tensors() | more, folder / "model" / WEIGHTS)
    return lambda: read_model(folder / "model")


case("bitsandbytes: state of 128 KiB", large_state, "has 131,072 bytes, expected a few fields of J")


# Adapters.


def adapter(change: Callable[[Path], Any]) -> Any:
    def make(folder: Path) -> Any:
        change(copy_adapter(folder))
        return lambda: read_peft(folder, base())

    return make


def base() -> Any:
    return parameter_shapes(from_hf(json.loads(str(GOLDEN["config"]))))


def pickled_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04")


NO_PLACE = "is without a place in the base or the config"
for name, change, sentence in (
    ("r of -1", set_to(r=-1), "r is -1, expected a whole number of at least 1"),
    ("r of 10^9", set_to(r=10**9, rank_pattern={}), "expected (1000000000, "),
    ("r of 10^400", set_to(r=10**400), "r is 100000000000000"),
    ("alpha that is NaN", set_to(lora_alpha=float("nan")), "lora_alpha is nan, expected a number"),
    ("alpha of 10^400", set_to(lora_alpha=10**400), "lora_alpha is 10000"),
    ("backtracking", set_to(target_modules=r"(\w+|\.)+!"), "without a place in the base or the"),
    ("backtracking in ranks", set_to(rank_pattern={r"(.*.*)*x": 3, "(a|a)*b": 2}), "expected ("),
    (
        "repetitions in repetitions",
        set_to(target_modules="((.*){500}){500}"),
        "expected a list of names or a regular expression of few repetitions",
    ),
    ("10^5 names", set_to(modules_to_save=["a"] * 10**5), "expected a list of at most 1,024 names"),
    ("10^5 targets", set_to(target_modules=["a"] * 10**5), "without a place in the base or the"),
    ("pattern of 10^6", set_to(target_modules="a" * 10**6), "expected a list of names or a regu"),
    ("brackets of 10^5", set_to(exclude_modules="(" * 10**5), "expected a list of names or a reg"),
    ("repeated 10^20 times", set_to(target_modules="a{99999999999999999999}"), "expected a list"),
    ("10^5 patterns", set_to(rank_pattern={f"a{k}": 1 for k in range(10**5)}), "expected ranks by"),
    (
        "list of layers",
        set_to(layers_pattern="(a+)+"),
        "layers_pattern is '(a+)+'",
    ),
    ("linked out", linked(ADAPTER_CONFIG, f"../{ADAPTER_CONFIG}"), "is a link to"),
    ("config of 300 MB", grown(ADAPTER_CONFIG, 3 * 10**8), "has 300,000,000 bytes, expec"),
    ("pickle by another name", pickled_weights, "is a pickle, whatever its name says"),
):
    case(f"PEFT: {name}", adapter(change), sentence)


def ours(change: Callable[[Path], Any]) -> Any:
    def make(folder: Path) -> Any:
        params = {"w": np.ones((4, 3), np.float32)}
        adapters = lj.init_adapters(jax.random.key(0), params, [lj.LoraRule("w", rank=2)])
        lj.save_adapters(folder / "saved", adapters)
        change(folder / "saved")
        return lambda: lj.load_adapters(folder / "saved", params)

    return make


def said(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "adapters.json").read_text())
        record["leaves"]["w"] |= fields
        (folder / "adapters.json").write_text(json.dumps(record))

    return change


def overwritten(folder: Path) -> None:
    for path in (folder / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff" * 100)


for name, change, sentence in (
    ("scale that is NaN", said(scale=float("nan")), "w has {'dropout': 0.0, 'layout': 'i o', 'sc"),
    ("scale that is a text", said(scale="2"), "expected a scale, a dropout and a layout"),
    ("dropout of 2", said(dropout=2), "expected a scale, a dropout and a layout"),
    ("another layout", said(layout="i i o"), "names 3 axes, but w has 2, shape (4, 3)"),
    ("more fields", said(a=1), "expected a scale, a dropout and a layout"),
    ("leaves that are a list", written("adapters.json", {"format": 1, "leaves": []}), "leaves are"),
    ("arrays of anything", overwritten, "are damaged or not there"),
    ("record of 300 MB", grown("adapters.json", 3 * 10**8), "adapters.json is damaged: "),
):
    case(f"adapters: {name}", ours(change), sentence)


# Records, and members of wheels.


def records(name: str, content: bytes) -> Any:
    def make(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return lambda: read_records(folder / name)

    return make


def record_pipe(folder: Path) -> Any:
    os.mkfifo(folder / "a.jsonl")
    return lambda: read_records(folder / "a.jsonl")


def packed_table(folder: Path) -> Any:
    table = pyarrow.table({"a": np.zeros(2**25, np.int8)})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return lambda: read_records(folder / "a.parquet")


ZEROS = bytes(2**27)
for name, make, sentence in (
    ("levels", records("a.jsonl", b'{"a": ' + b"[" * 10**5), "a.jsonl:1: JSON that is no record"),
    ("fewer levels", records("a.json", b"[" * 99 + b"]" * 99), "or than 64 levels of them"),
    ("long number", records("a.jsonl", b'{"a": ' + b"9" * 10**6 + b"}"), "no record: Exceeds the"),
    ("line of 17 MB", records("a.jsonl", b'{"a": "' + b"a" * 17_000_000), "expected lines below"),
    ("list of 40 MB", records("a.json", b"[\n" + b"1,\n" * 14_000_000), "an object a line to a"),
    ("objects", records("a.jsonl", b'{"a": [' + b"{}," * 600_000), "more than 500,000 lists and"),
    ("zeros packed", records("a.jsonl.gz", gzip.compress(ZEROS)), "expected lines below 16,777"),
    (
        "lines packed",
        records("a.txt.gz", gzip.compress((b"a" * 10**6 + b"\n\n") * 128)),
        "out of a file of ",
    ),
    ("rows packed", packed_table, "to 33,554,432 values, as no records do"),
    ("pipe", record_pipe, "a.jsonl is a folder, pipe or device; write the path of a file"),
):
    case(f"records: {name}", make, sentence)


for name, template, sentence in (
    ("brackets", "{{ " + "(" * 5_000, "the chat template cannot be compiled: 'maximum recursion"),
    ("blocks", "{% if x %}" * 2_000, "the chat template cannot be compiled: 'maximum recursion"),
    ("long number", "{{ 9" + "9" * 5_000 + " }}", "the chat template cannot be compiled: 'Exceeds"),
    ("constant of 1 GB", "{{ 'a' * 10**9 }}{{ 1|foo }}", "No filter named 'foo'"),
):
    compiled = lambda _, template=template: lambda: Chat(template)  # noqa: E731
    case(f"chat template: {name}", compiled, sentence)


def wheel(change: Callable[[bytearray], Any], content: bytes = b"some content") -> Any:
    def make(folder: Path) -> Any:
        path, member = folder / "a-1.0-py3-none-any.whl", wheels._Member.parse("pypi:a==1.0/a/b")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../a/b", "outside")
            archive.writestr("/a/b", "outside")
            archive.writestr("a/b", content)
        packed = bytearray(path.read_bytes())
        change(packed)
        path.write_bytes(packed)
        return lambda: wheels._extract(path, member, folder, "0" * 64)

    return make


def smaller(packed: bytearray) -> None:
    """The list of members says of the last that it has 5 bytes."""
    at = packed.rindex(b"PK\x01\x02")
    packed[at + 24 : at + 28] = (5).to_bytes(4, "little")


def encrypted(packed: bytearray) -> None:
    packed[packed.rindex(b"PK\x01\x02") + 8] |= 1
    packed[packed.rindex(b"PK\x03\x04") + 6] |= 1


def packed_otherwise(packed: bytearray) -> None:
    packed[packed.rindex(b"PK\x01\x02") + 10] = 77


for name, make, sentence in (
    ("names outside", wheel(lambda _: None), "a/b in a-1.0-py3-none-any.whl has sha256"),
    ("bomb", wheel(lambda _: None, ZEROS), "to 134,217,728, as no model or data do; nothing was"),
    ("bomb that lies", wheel(smaller, ZEROS), "is broken or ended too early"),
    ("encrypted", wheel(encrypted), "is broken or ended too early"),
    ("packed otherwise", wheel(packed_otherwise), "is broken or ended too early"),
    ("no zip", wheel(lambda packed: packed.clear()), "is broken or ended too early"),
):
    case(f"wheel: {name}", make, sentence, "SourceError")
for member in ("../b", "/etc/passwd", "a\nb", "\0", "a" * 300, "a/" * 5_000 + "b"):
    source = f"pypi:a==1.0/{member}"
    parse = lambda _, source=source: lambda: wheels._Member.parse(source)  # noqa: E731
    case(f"source: {source!r:.30}", parse, "names no member of a wheel", "SourceError")


def warm(folder: Path) -> None:
    """Reads one of each kind, so that what is imported and compiled on the way is there."""
    (folder / "adapter").mkdir()
    read_model(write_folder(folder / "model"))
    read_model(write_model(folder / "a.gguf"))
    read_peft(copy_adapter(folder / "adapter"), base())
    params = {"w": np.ones((4, 3), np.float32)}
    lj.save_adapters(
        folder / "saved", lj.init_adapters(jax.random.key(0), params, [lj.LoraRule("w", rank=2)])
    )
    lj.load_adapters(folder / "saved", params)
    edited(lambda _: None)(folder / "adapter")


def forget_peak() -> None:
    """Lets the largest memory so far be what it is now, where the system can do so: Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MiB that the process had at most."""
    if (status := Path("/proc/self/status")).is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def main(root: Path) -> None:
    (root / "warm").mkdir()
    warm(root / "warm")
    for number, (name, one) in enumerate(CASES.items()):
        folder = root / str(number)
        folder.mkdir()
        read, error = one.make(folder), None
        forget_peak()
        before, started = peak(), time.process_time()
        try:
            read()
        except Exception as raised:
            error = raised
        seconds, grown = time.process_time() - started, peak() - before
        found = {"name": name, "kind": type(error).__name__, "sentence": str(error)}
        print(json.dumps(found | {"seconds": seconds, "mebibytes": grown}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
