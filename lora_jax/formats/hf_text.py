"""What a model folder says about text: its tokenizer, its special tokens and its chat template.

tokenizer.json           the tokenizer, whole
tokenizer_config.json    which tokens are special, and perhaps the chat template
generation_config.json   which tokens end a text
chat_template.jinja      how a conversation becomes a prompt
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors

from lora_jax.files import file_in, read_small, shown
from lora_jax.formats.checkpoint import Checkpoint, SpecialTokens

_LONGEST_TOKENIZER = 2**26  # bytes; that of a vocabulary of 262,144 tokens has 33 MB
_LONGEST_TEMPLATE = 2**20  # bytes
_MOST_TOKENS = 2**31
# What of a folder is about text alone, other programs' files included.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    "merges.txt",
)


class Text(NamedTuple):
    """What a `Checkpoint` says about text, under the same names."""

    tokenizer: Tokenizer
    special: SpecialTokens
    stop: tuple[int, ...]
    chat_template: str | None


def read_text(path: Path, described: Mapping[str, Any]) -> Text:
    """Reads it.

    Args:
      path: The folder.
      described: The content of its JSON files, by their names.

    Raises:
      FileNotFoundError: If there is no tokenizer.
      ValueError: If the tokenizer cannot be read.
    """
    tokenizer = _read_tokenizer(path)
    special = _special_tokens(tokenizer, described)
    template = _chat_template(path, described.get("tokenizer_config.json", {}))
    return Text(tokenizer, special, _stop_tokens(special, described), template)


def text_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a folder that say what a checkpoint says, by their names.

    Where the checkpoint says what its own folder does, they are that folder's, byte for byte.
    """
    folder = checkpoint.folder
    if folder is not None and (folder / "tokenizer.json").is_file():
        there = read_text(folder, checkpoint.metadata)
        if _content(there) == _content(checkpoint):
            found = [folder / name for name in FILES if (folder / name).is_file()]
            return {file.name: file.read_bytes() for file in found}
    ids = special_ids(checkpoint)
    name = checkpoint.tokenizer.id_to_token
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": checkpoint.special.bos is not None,
        "clean_up_tokenization_spaces": False,
        **{key.removesuffix("_id"): name(id) for key, id in ids.items() if id is not None},
    }
    if checkpoint.chat_template is not None:
        settings["chat_template"] = checkpoint.chat_template
    generation = ids | {"eos_token_id": list(checkpoint.stop) or None}
    return {
        "tokenizer.json": _with_bos(checkpoint).to_str(pretty=True).encode(),
        "tokenizer_config.json": as_json(settings),
        "generation_config.json": as_json(generation),
    }


def special_ids(checkpoint: Checkpoint) -> dict[str, int | None]:
    """The special tokens by the names that transformers has for their ids."""
    special, metadata = checkpoint.special, checkpoint.metadata
    ids: dict[str, int | None] = {"bos_token_id": special.bos, "eos_token_id": special.eos}
    # These two are nothing to the decoder, and a GGUF file has names of its own for them.
    for name, key in (("pad_token_id", "padding"), ("unk_token_id", "unknown")):
        if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[name] = int(index)
    return ids


def as_json(content: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _content(text: Text | Checkpoint) -> tuple[Any, ...]:
    """What can be compared."""
    return text.tokenizer.to_str(), text.special, text.stop, text.chat_template


def _with_bos(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer, which also puts the first token in front if there is one."""
    tokenizer, bos = checkpoint.tokenizer, checkpoint.special.bos
    if bos is None or tokenizer.encode("").ids[:1] == [bos]:
        return tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the checkpoint's stays as it is
    name = tokenizer.id_to_token(bos)
    begin = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = begin if before is None else processors.Sequence([before, begin])
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    file = file_in(path, "tokenizer.json")
    if file is None:
        raise FileNotFoundError(
            f"{path} has no tokenizer.json; write one with transformers: "
            'AutoTokenizer.from_pretrained("...").save_pretrained("folder").'
        )
    content = read_small(file, _LONGEST_TOKENIZER)
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{file} is no tokenizer that can be read: {shown(str(error))}."
        ) from error
    # Lengths are the business of whoever makes batches; a file may ask for either.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_tokens(tokenizer: Tokenizer, described: Mapping[str, Any]) -> SpecialTokens:
    settings = described.get("tokenizer_config.json", {})

    def token(name: str) -> int | None:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        if isinstance(text, str) and (index := tokenizer.token_to_id(text)) is not None:
            return index
        ids = _ids(described["config.json"].get(f"{name}_id"))
        return ids[0] if ids else None

    # A model may name a token that begins texts and not use it; the tokenizer knows which.
    added = tokenizer.encode("").ids
    begins = settings.get("add_bos_token")
    bos = token("bos_token")
    if begins is None:
        begins = bos is not None and added[:1] == [bos]
    return SpecialTokens(bos if begins else None, token("eos_token"))


def _stop_tokens(special: SpecialTokens, described: Mapping[str, Any]) -> tuple[int, ...]:
    """The end of a text, and whatever else generation is said to end at, such as that of a turn."""
    ids = [] if special.eos is None else [special.eos]
    ids += _ids(described.get("generation_config.json", {}).get("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _ids(value: Any) -> list[int]:
    """Token ids of a field that may hold one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if type(index) is int and 0 <= index < _MOST_TOKENS]


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    if (file := file_in(path, "chat_template.jinja")) is not None:
        content = read_small(file, _LONGEST_TEMPLATE)
        try:
            return io.StringIO(content.decode(), newline=None).read()  # lines end as in any text
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error}.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [entry for entry in template if isinstance(entry, Mapping)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise ValueError(
            f"{path / 'tokenizer_config.json'} has the chat_template {shown(template)}, expected a "
            "text, or a list of them with names."
        )
    return template
