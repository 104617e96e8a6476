"""A model as the heads of its files describe it: which tensors, how stored; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.formats.checkpoint import SpecialTokens
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import from_gguf, from_hf

_LONGEST = 100_000_000  # bytes of a safetensors file's head, by the format's own rule


class Header(NamedTuple):
    """What a file says of a tensor.

    Attributes:
      name: By the file's own naming.
      kind: How values are stored, as the format calls it: `BF16`, `Q4_1`.
      shape: In which they are stored.
      nbytes: What they take on the disk.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


class Words(NamedTuple):
    """What a model's files say about text; see `Checkpoint` for the names."""

    special: SpecialTokens
    stop: tuple[int, ...]
    chat_template: str | None


class Outline(NamedTuple):
    """A model in its files.

    Attributes:
      name: What it is called.
      headers: Its tensors, in the order of the files.
      metadata: What else the files say, as in `Checkpoint`.
      config: Returns the decoder to run it with.
      words: Returns what is said about text.
    """

    name: str
    headers: list[Header]
    metadata: Mapping[str, Any]
    config: Callable[[], DecoderConfig]
    words: Callable[[], Words]


def read_outline(path: Path) -> Outline:
    """Looks at a GGUF file or at a model folder.

    Raises:
      FileNotFoundError: If files are missing in a folder.
      ValueError: If it is neither, is broken, or ends too early. That the model cannot be run here
        is said by `config`.
    """
    return _folder(path) if path.is_dir() else _gguf(path)


def _folder(path: Path) -> Outline:
    from lora_jax.formats.hf import model_name, read_descriptions, weight_files
    from lora_jax.formats.hf_text import read_text

    headers = [one for file in weight_files(path) for one in safetensors_headers(file)]
    described = read_descriptions(path)

    def words() -> Words:
        text = read_text(path, described)
        return Words(text.special, text.stop, text.chat_template)

    config = described["config.json"]
    return Outline(model_name(path), headers, described, lambda: from_hf(config), words)


def _gguf(path: Path) -> Outline:
    # Imported here, so that a folder is read where the package for GGUF is not installed.
    from lora_jax.formats.gguf import TOKENIZER_LISTS, open_gguf, special_tokens

    reader = open_gguf(path)
    fields = {name: x for name, x in reader.fields.items() if name not in TOKENIZER_LISTS}
    metadata = {name: field.contents() for name, field in fields.items()}
    headers = [
        Header(x.name, x.tensor_type.name, tuple(int(n) for n in reversed(x.shape)), int(x.n_bytes))
        for x in reader.tensors
    ]
    tied_head = all(header.name != "output.weight" for header in headers)

    def words() -> Words:
        special = special_tokens(metadata)
        stop = () if special.eos is None else (special.eos,)
        return Words(special, stop, metadata.get("tokenizer.chat_template"))

    return Outline(
        path.stem, headers, metadata, lambda: from_gguf(metadata, tied_head=tied_head), words
    )


def safetensors_headers(path: Path) -> list[Header]:
    """The tensors of a safetensors file, whatever their dtypes.

    Raises:
      FileNotFoundError: If there is no file.
      ValueError: If it is none, or ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if length <= min(size, _LONGEST) else b""
    try:
        tensors = json.loads(head)
        tensors.pop("__metadata__", None)
        headers = [
            Header(name, x["dtype"], tuple(x["shape"]), x["data_offsets"][1] - x["data_offsets"][0])
            for name, x in tensors.items()
        ]
        end = max((x["data_offsets"][1] for x in tensors.values()), default=0)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no safetensors file: it has no head that can be read, or ends too early "
            f"({size:,} bytes). Fetch the file again."
        ) from error
    if size != (expected := 8 + length + end):
        raise ValueError(
            f"{path} is broken or ends too early: it has {size:,} bytes, and its head tells of "
            f"{expected:,}. Fetch the file again."
        )
    return headers
