"""What is fuzzed: every reader of files that somebody else may have written.

A target takes bytes and reads them as its reader would. What is read may be anything; what is not
is refused in a sentence, and everything else that is raised is a crash.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from family_cases import CASES
from fuzz import mutations
from fuzz.mutations import Mutation, first_byte_mutation, json_mutation
from hf_folder import GOLDEN, build_tokenizer
from peft_folder import FOLDER as PEFT_FOLDER

from lora_jax import checkpoint, files
from lora_jax.cli import found, parsing
from lora_jax.cli.failures import CliError
from lora_jax.cli.report import Reporter
from lora_jax.cli.run_config import SATIRE, Config
from lora_jax.cli.run_folder import RunFolder
from lora_jax.data.records import read_records
from lora_jax.formats import (
    gguf,
    gguf_file,
    hf,
    hf_text,
    hub,
    outline,
    tensor_file,
    wheels,
)
from lora_jax.formats.cache import SourceError
from lora_jax.formats.peft import config as peft_config
from lora_jax.formats.peft import patterns, places, read, weights
from lora_jax.formats.peft.naming import naming
from lora_jax.formats.peft.repeats import Repeats
from lora_jax.models import families
from lora_jax.models.decoder import parameter_shapes

REFUSALS = (ValueError, FileNotFoundError, SourceError, CliError)
SECONDS = 1.0  # of the processor, for one input
LONGEST = 2_000  # characters of a sentence
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      read: reads bytes as it would.
      seeds: makes files that it reads, to begin with.
      mutation: makes other files of them.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutation: Mutation


def refusal(read: Callable[[bytes], None], data: bytes) -> Exception | None:
    """Reads, and returns the error by which it was refused.

    Raises:
      AssertionError: if the error is not the clear sentence that was promised, or came late.
      Exception: any other than `REFUSALS` is a crash.
    """
    started, refused = time.process_time(), None
    try:
        read(data)
    except REFUSALS as error:
        refused = error
        assert_clear(error)
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"it took {seconds:.2f} s"
    return refused


def assert_clear(error: Exception) -> None:
    """Whether an error is one of ours: exactly of these types, and one line of some length."""
    sentence = str(error)
    # Narrower ones, such as UnicodeDecodeError, and those of the system come from further below.
    assert type(error) in REFUSALS, f"{type(error).__name__} got out"
    assert getattr(error, "errno", None) is None, f"an error of the system got out: {error}"
    assert 20 <= len(sentence) <= LONGEST, f"a sentence of {len(sentence)} characters"
    assert sentence.isprintable(), f"no single line: {sentence!r}"


@functools.cache
def _home() -> Path:
    """A folder in memory, of this process alone."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def written(name: str, content: bytes) -> Path:
    """A file in it."""
    path = _path(name)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, content)
    os.close(descriptor)
    return path


@functools.cache
def _path(name: str) -> Path:
    path = _home() / name
    path.parent.mkdir(exist_ok=True)
    return path


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def words(*values: Any) -> tuple[str, ...]:
    """All names in some objects."""
    names: dict[str, None] = {}
    for value in values:
        if isinstance(value, dict):
            names |= dict.fromkeys(value) | dict.fromkeys(words(*value.values()))
        elif isinstance(value, str):
            names[value] = None
    return tuple(names)


# Tensors.


def read_safetensors(data: bytes) -> None:
    for tensor in hf.stored_tensors(written("model.safetensors", data))[:3]:
        if tensor.dtype in tensor_file.DTYPES:
            tensor.read()


def safetensors_files() -> list[bytes]:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 2), np.uint8)}
    return [
        safetensors.numpy.save(arrays, {"format": "pt"}),
        safetensors.numpy.save({"c": np.arange(4, dtype=np.float16)}),
        safetensors.numpy.save({}),
        b"\x80\x02}q\x00.",
    ]


def read_packed(data: bytes) -> None:
    """Weights of bitsandbytes among others."""
    for tensor in hf._tensors([written("packed.safetensors", data)])[:4]:
        tensor.read()


def packed_files() -> list[bytes]:
    states = dict(np.load(PEFT_FOLDER.parent / "bitsandbytes_states.npz"))
    made = []
    for case in ("nf4_float32_6x128_64_nested", "fp4_bfloat16_4x128_128"):
        tensors = {
            name.removeprefix(f"{case}/").partition("!")[0]: values
            for name, values in states.items()
            if name.startswith(f"{case}/")
        }
        made.append(safetensors.numpy.save({**tensors, "norm": np.ones(2, np.float32)}))
    return made


def read_gguf(data: bytes) -> None:
    metadata, stored = gguf_file.read_head(written("model.gguf", data))
    tied_head = all(tensor.name != "output.weight" for tensor in stored)
    for tensor in stored[:3]:
        rows = tensor.read()
        if tensor.kind.name in gguf._PACKED and rows.ndim == 2:
            kind = gguf._PACKED[tensor.kind.name]
            gguf._repack(tensor.name, rows, kind, kind, np.float32)
        gguf._decoded(tensor, rows)
    gguf.special_tokens(metadata), gguf.chat_template(metadata)
    config = families.from_gguf(metadata, tied_head=tied_head)
    assert len(config.attention_kinds) == config.num_layers
    gguf._build_tokenizer(metadata)


def gguf_files() -> list[bytes]:
    import gguf as package

    made = []
    for kind in (package.GGMLQuantizationType.Q4_0, package.GGMLQuantizationType.Q4_1, None):
        path = _home() / "seed.gguf"
        writer = package.GGUFWriter(path, "llama")
        for name, value in {
            "vocab_size": 6,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "block_count": 1,
            "head_count": 2,
            "head_count_kv": 1,
            "layer_norm_rms_eps": 1e-5,
            "rope_freq_base": 500.0,
            "tokenizer_model": "gpt2",
            "tokenizer_pre": "smollm",
            "token_list": ["<s>", "a", "b", "ab", "c", "abc"],
            "token_types": [3, 1, 1, 1, 1, 1],
            "token_merges": ["a b", "ab c"],
            "eos_token_id": 0,
            "chat_template": "{{ x }}",
        }.items():
            getattr(writer, f"add_{name}")(value)
        if kind is None:
            writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
        else:
            values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
            writer.add_tensor("blk.0.attn_q.weight", package.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made.append(path.read_bytes())
    return made


GGUF_KEYS = (
    *("general.architecture", "general.alignment", "llama.block_count", "llama.rope.freq_base"),
    *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.vocab_size"),
    *("llama.attention.key_length", "llama.embedding_length", "llama.rope.dimension_count"),
    *("llama.rope.scaling.type", "llama.expert_count", "tokenizer.ggml.add_bos_token"),
    *("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    *("tokenizer.ggml.bos_token_id", "tokenizer.chat_template", "a", "a\nb", ""),
)


# What a model's folder says.


def read_index(data: bytes) -> None:
    hf.weight_files(_indexed_folder(data))


@functools.cache
def _parts() -> Path:
    folder = _home() / "sharded"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "a.safetensors").touch()
    (folder / "b.safetensors").touch()
    (_home() / "outside").touch()
    (folder / "link.safetensors").symlink_to(_home() / "outside")
    os.mkfifo(folder / "pipe.safetensors")
    return folder


def _indexed_folder(data: bytes) -> Path:
    folder = _parts()
    written(f"sharded/{hf.INDEX}", data)
    return folder


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"a": "a.safetensors", "b": "b.safetensors"},
}
PARTS = (
    *("folder.safetensors", "link.safetensors", "pipe.safetensors", "../outside"),
    *("weight_map", "a\\b", "a.safetensors/", "c.safetensors"),
)


def read_config(data: bytes) -> None:
    described = files.parse_object(data, "config.json")
    hf._check_quantization(Path("config.json"), described.get("quantization_config"))
    config = families.from_hf(described)
    assert len(config.attention_kinds) == config.num_layers


def configs() -> list[bytes]:
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    fields = [{k: x for k, x in case.items() if x is not None} for case in CASES.values()]
    return [*map(as_json, fields), as_json({**fields[0], "quantization_config": said})]


@functools.cache
def _tokenizer() -> Any:
    return build_tokenizer(adds_bos=True)


def read_text_settings(data: bytes) -> None:
    """What the JSON files beside a tokenizer say of it: all of them in one."""
    said = files.parse_object(data, "settings")
    described = {name: x for name, x in said.items() if isinstance(x, dict)}
    described.setdefault("config.json", {})
    special = hf_text._special_tokens(_tokenizer(), described)
    hf_text._chat_template(_home(), described.get("tokenizer_config.json", {}))
    assert all(type(x) is int for x in hf_text._stop_tokens(special, described))


TEXT_SETTINGS = {
    "config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ a }}"}],
    },
}


def read_tokenizer(data: bytes) -> None:
    hf_text._read_tokenizer(written("text/tokenizer.json", data).parent)


# Adapters.

MODULES = (
    *("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head"),
    "model.layers.3.mlp.experts.7.gate_proj",
)


def read_peft_config(data: bytes) -> None:
    folder = written(f"adapter/{peft_config.CONFIG}", data).parent
    config = peft_config.read_config(folder, strict=len(data) % 2 == 0)
    for module in MODULES:
        config.is_adapted(module), config.is_parameter(module)
        assert np.isfinite(config.scale(module))


def peft_configs() -> list[bytes]:
    found = sorted(PEFT_FOLDER.glob("*/adapter_config.json"))
    more = {
        "peft_type": "LORA",
        "target_modules": r".*\.(q|k)_proj",
        "rank_pattern": {"q_proj": 4, r"layers\.[0-3]\.mlp": 2},
        "alpha_pattern": {"^model.*": 3.5},
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "exclude_modules": ["k_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "use_rslora": True,
    }
    return [*(path.read_bytes() for path in found), as_json(more)]


@functools.cache
def _peft() -> tuple[peft_config.PeftConfig, list[places.Place]]:
    described = json.loads(str(GOLDEN["config"])) | {"num_hidden_layers": 1}
    base = parameter_shapes(families.from_hf(described))
    names = [path for path, _ in read.named_leaves(base)]
    every = places.all_places(base, naming(None, names), {}, ())
    return peft_config.read_config(PEFT_FOLDER / "patterns"), every


def read_peft_tensors(data: bytes) -> None:
    opened = weights.open_weights(written(f"tensors/{weights.WEIGHTS}", data).parent)
    config, every = _peft()
    adapted, whole = read._wanted(config, every, opened)
    expected = read._expected(config, adapted, whole)
    for name, shape in list(opened.shapes.items())[:3]:
        if expected.get(name) == shape:
            opened.read(name)
    read._compare(expected, opened, Repeats(set(), set()))


def peft_tensors() -> list[bytes]:
    config, every = _peft()
    adapted, _ = read._wanted(config, every, weights.Weights({}, {}))
    expected = read._expected(config, adapted, [])
    whole = {weights.PREFIX + name: np.ones(shape, np.float16) for name, shape in expected.items()}
    small = {"base_model.model.lm_head.lora_A.weight": np.ones((2, 4), np.float32)}
    return [safetensors.numpy.save(whole), safetensors.numpy.save(small)]


def read_pattern(data: bytes) -> None:
    """A pattern, and a name on the next line; the answer is that of `re`, where that is quick."""
    pattern, _, name = data.decode("utf-8", "replace").partition("\n")
    name = name.replace("\n", "")[:60]
    if not patterns.is_pattern(pattern):
        return
    whole, ending = patterns.matches(pattern, name), patterns.matches_ending(pattern, name)
    if len(pattern) <= 16 and 1 <= len(name) <= 6:  # in no character, \B depends on Python
        with warnings.catch_warnings(action="ignore"):  # re's own, about [[
            theirs = re.fullmatch(pattern, name), re.match(rf"(.*\.)?({pattern})$", name)
        assert [whole, ending] == [found is not None for found in theirs], (pattern, name)


PATTERNS = (
    *(rb".*\.(q|k)_proj", rb"(a+)+b", rb"^(?!x).*[^a-c\d]$", rb"(a|ab)*?\b", rb"(?<=a)b{2,3}"),
    *(rb"\w+\.\d", rb"a?b??(?=c)", rb"(?:\s\S)|\W"),
)


def read_adapters(data: bytes) -> None:
    checkpoint.read_static(written("ours/adapters.json", data).parent)


OURS = {
    "format": 1,
    "leaves": {"layers/kernel": {"scale": 2.0, "dropout": 0.1, "layout": "b i o"}, "norm": None},
    "rules": None,
}


# Runs, records and what is found by looking.

QUIET = Reporter("quiet")


def read_run_config(data: bytes) -> None:
    parsing.from_file(Config, written("run/config.json", data))


def read_metrics(data: bytes) -> None:
    folder = written("metrics/metrics.jsonl", data[:256]).parent  # in lines of two bytes, many
    assert all(isinstance(record, dict) for record in RunFolder(folder, "finetune").records())


SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz")
RECORDS = (
    b'{"text": "a", "label": 1}\n{"input": [{"content": "b"}], "ideal": "0"}\n',
    b'[{"text": "a\\u00e9", "label": [1.5, null]}]',
    b'text,label\n"a,""b""",1\nc,2\n',
    b"text\tlabel\na\t1\n",
    b"one\ntwo\n\nthree\n",
)


def read_records_file(data: bytes) -> None:
    kind = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".jsonl"
    for record in read_records(written(f"records{kind}", data[1:])):
        assert isinstance(record.fields, dict)


def record_files() -> list[bytes]:
    packed = gzip.compress(RECORDS[0], mtime=0)
    return [bytes([k]) + content for k, content in enumerate((*RECORDS, packed))]


NAMES = ("x.safetensors", "x.gguf", "x", "x.bin", "x.csv", "config.json")


def read_anything(data: bytes) -> None:
    """What inspect finds by looking at a file, or at a folder of this config.json."""
    name = NAMES[data[0] % len(NAMES)] if data else "x"
    path = written(f"any/{name}", data[1:])
    if name == "config.json":
        described = found.look(str(path.parent), QUIET)
        (path.parent / name).unlink()
    else:
        described = found.look(str(path), QUIET)
        if described.kind == "gguf":
            outline.read_outline(path).words()
        if described.kind == "safetensors":
            outline.safetensors_headers(path)


def any_files() -> list[bytes]:
    contents = (safetensors_files()[0], gguf_files()[2], gguf_files()[2], b"PK\x03\x04", RECORDS[2])
    return [
        *(bytes([k]) + content for k, content in enumerate(contents)),
        bytes([5]) + as_json({"model_type": "llama"}),
        bytes([5]) + as_json(parsing.to_json(SATIRE)),
    ]


# Wheels and sources.

MEMBER = wheels._Member.parse("pypi:made-up==1.0/made_up/data.bin")


def read_wheel(data: bytes) -> None:
    wheel = written("wheel/made_up-1.0-py3-none-any.whl", data)
    wheels._extract(wheel, MEMBER, wheel.parent, None)


def wheel_files() -> list[bytes]:
    made = []
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", packing) as archive:
            for name in ("made_up/data.bin", "../made_up/data.bin", "/etc/passwd"):
                member = zipfile.ZipInfo(name)  # of 1980, so that a seed is the same every time
                member.compress_type = packing
                archive.writestr(member, b"some content " * 3)
        made.append(content.getvalue())
    return made


def read_source(data: bytes) -> None:
    source = data.decode("utf-8", "replace")
    if source.startswith("hf:"):
        hub._Model.parse(source)
    else:
        member = wheels._Member.parse(source)
        assert member.cached().resolve().is_relative_to(wheels.cache_dir().resolve())


SOURCES = (b"pypi:name==1.0/a/b.bin", b"pypi:name==1.0/../b", b"hf:owner/name@main", b"hf:a")


def _bytes(data: bytes, most: int, seed: int) -> bytes:
    return mutations.change_bytes(data, most, mutations.random.Random(seed))


_PEFT_WORDS = words(*map(json.loads, peft_configs()), "base_model.model.lm_head.lora_A.weight")
TARGETS = {
    "safetensors": Target(
        read_safetensors,
        safetensors_files,
        mutations.safetensors_mutation(("dtype", "shape", "data_offsets", "F32", "U8", "F4")),
    ),
    "bitsandbytes": Target(
        read_packed,
        packed_files,
        mutations.safetensors_mutation(
            ("weight", "weight.absmax", "weight.quant_map", "nf4", "fp4", "blocksize", "float32")
        ),
    ),
    "gguf": Target(read_gguf, gguf_files, mutations.gguf_mutation(GGUF_KEYS)),
    "index": Target(read_index, lambda: [as_json(INDEX)], json_mutation(PARTS)),
    "config": Target(read_config, configs, json_mutation(words(*CASES.values(), *CASES))),
    "text": Target(
        read_text_settings, lambda: [as_json(TEXT_SETTINGS)], json_mutation(words(TEXT_SETTINGS))
    ),
    "tokenizer": Target(
        read_tokenizer,
        lambda: [_tokenizer().to_str().encode()],
        json_mutation(words(json.loads(_tokenizer().to_str()))),
    ),
    "peft_config": Target(read_peft_config, peft_configs, json_mutation(_PEFT_WORDS)),
    "peft_tensors": Target(
        read_peft_tensors, peft_tensors, mutations.safetensors_mutation(_PEFT_WORDS)
    ),
    "pattern": Target(
        read_pattern, lambda: [pattern + b"\na.abbc" for pattern in PATTERNS], _bytes
    ),
    "adapters": Target(read_adapters, lambda: [as_json(OURS)], json_mutation(words(OURS))),
    "run_config": Target(
        read_run_config,
        lambda: [as_json(parsing.to_json(SATIRE))],
        json_mutation(words(parsing.to_json(SATIRE))),
    ),
    "metrics": Target(
        read_metrics, lambda: [b'{"step": 1, "loss": 0.5}\n{"step": 2', b"[1]\n"], _bytes
    ),
    "records": Target(
        read_records_file,
        record_files,
        first_byte_mutation(
            len(SUFFIXES), {0: json_mutation(("input", "ideal", "text")), 1: json_mutation()}
        ),
    ),
    "inspect": Target(
        read_anything,
        any_files,
        first_byte_mutation(
            len(NAMES),
            {
                0: mutations.safetensors_mutation(),
                1: mutations.gguf_mutation(GGUF_KEYS),
                2: mutations.gguf_mutation(GGUF_KEYS),
                5: json_mutation(("model_type", "model")),
            },
        ),
    ),
    "wheel": Target(read_wheel, wheel_files, _bytes),
    "source": Target(read_source, lambda: list(SOURCES), _bytes),
}
