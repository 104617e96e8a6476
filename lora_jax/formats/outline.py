"""A model as the heads of its files describe it: which tensors, how stored; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.formats.checkpoint import SpecialTokens
from lora_jax.formats.tensor_file import stored_tensors
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import from_gguf, from_hf


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
    from lora_jax.formats.gguf import TOKENIZER_LISTS, chat_template, special_tokens
    from lora_jax.formats.gguf_file import read_head

    said, tensors = read_head(path)
    metadata = {name: value for name, value in said.items() if name not in TOKENIZER_LISTS}
    headers = [Header(x.name, x.kind.name, x.shape, x.nbytes) for x in tensors]
    tied_head = all(header.name != "output.weight" for header in headers)

    def words() -> Words:
        special = special_tokens(said)
        stop = () if special.eos is None else (special.eos,)
        return Words(special, stop, chat_template(said))

    return Outline(
        path.stem, headers, metadata, lambda: from_gguf(metadata, tied_head=tied_head), words
    )


def safetensors_headers(path: Path) -> list[Header]:
    """The tensors of a safetensors file, whatever their dtypes; raises as `stored_tensors`."""
    return [Header(x.name, x.dtype, x.shape, x.nbytes) for x in stored_tensors(path)]
