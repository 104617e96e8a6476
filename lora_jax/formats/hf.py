"""Model folders as Hugging Face's transformers write them, and as the hub holds them.

    config.json                        the architecture
    model.safetensors                  the weights, by the names of torch modules; or, of a large
    model-00001-of-0000N.safetensors   model, parts of it and model.safetensors.index.json
    tokenizer.json                     the tokenizer, whole
    tokenizer_config.json              which tokens are special; optional, like those below
    generation_config.json             which tokens end a text
    chat_template.jinja                how a conversation becomes a prompt

Weights in pickles (`pytorch_model.bin`) are not read: opening one runs whatever code it holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from lora_jax.core.leaves import QuantizedArray
from lora_jax.formats import bitsandbytes
from lora_jax.formats.checkpoint import (
    Checkpoint,
    Naming,
    Place,
    Reading,
    SpecialTokens,
    Tensor,
    assemble,
    digest,
)
from lora_jax.formats.tensor_file import FLOATS, StoredTensor, stored_tensors
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import from_hf

_NAMING = Naming(
    whole={
        "model.embed_tokens.weight": "embed/embedding",
        "model.norm.weight": "final_norm/scale",
        "lm_head.weight": "lm_head/kernel",
    },
    layered={
        "model.layers.{}.input_layernorm.weight": "layers/attn_norm/scale",
        "model.layers.{}.self_attn.q_proj.weight": "layers/attn/q_proj/kernel",
        "model.layers.{}.self_attn.k_proj.weight": "layers/attn/k_proj/kernel",
        "model.layers.{}.self_attn.v_proj.weight": "layers/attn/v_proj/kernel",
        "model.layers.{}.self_attn.o_proj.weight": "layers/attn/o_proj/kernel",
        "model.layers.{}.post_attention_layernorm.weight": "layers/mlp_norm/scale",
        "model.layers.{}.mlp.gate_proj.weight": "layers/mlp/gate_proj/kernel",
        "model.layers.{}.mlp.up_proj.weight": "layers/mlp/up_proj/kernel",
        "model.layers.{}.mlp.down_proj.weight": "layers/mlp/down_proj/kernel",
    },
)
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_hf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    reading: Reading = Reading(),  # noqa: B008 frozen, and the same for all
) -> Checkpoint:
    """Reads a model folder of the Llama family.

    One tensor at a time is read and cast, so that memory holds the result and little else. Weights
    that bitsandbytes quantized stay in 4 bits, and decode to the dtype that they had.

    Args:
      path: The folder.
      dtype: Of the parameters in floating point.
      scan_layers: Whether the parameters are those of scanned layers (stacked) or of separate ones.
      reading: How tensors are taken in.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: If there is no folder, or a file is missing in it.
      ValueError: If the weights are pickled, a file is broken, or the model cannot be read
        faithfully.
    """
    path = Path(path)
    weights = weight_files(path)
    described = {name: _read_json(path / name) for name in _DESCRIPTIONS if (path / name).is_file()}
    if "config.json" not in described:
        raise FileNotFoundError(f"{path} has no config.json, without which no model is defined.")
    _check_quantization(path / "config.json", described["config.json"].get("quantization_config"))
    try:
        config = from_hf(described["config.json"])
        config = dataclasses.replace(config, param_dtype=dtype)
        tensors = [
            tensor
            for tensor in _tensors(weights)
            if not _is_derived(tensor.name, tied_head=config.tied_head)
        ]
        config, params = assemble(
            config, _NAMING, tensors, scan_layers=scan_layers, reading=reading
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tokenizer = _read_tokenizer(path)
    special = _special_tokens(tokenizer, described)
    return Checkpoint(
        config=config,
        params=params,
        tokenizer=tokenizer,
        special=special,
        stop=_stop_tokens(special, described),
        chat_template=_chat_template(path, described.get("tokenizer_config.json", {})),
        name=_name(path),
        digest=digest(weights),
        metadata=described,
    )


def _check_quantization(file: Path, said: Any) -> None:
    """Only what the tensors themselves say how to decode is read."""
    if not said:
        return
    said = said if isinstance(said, Mapping) else {"quant_method": said}
    method, four = said.get("quant_method"), said.get("load_in_4bit")
    if method != "bitsandbytes" or not four:
        how = f"{method!r}" + (" in 8 bits" if said.get("load_in_8bit") else "")
        raise ValueError(
            f"{file} says that the weights are quantized by {how}; only those in floating point, "
            "and in 4 bits of bitsandbytes, can be read. Take the original model, and quantize it "
            "here."
        )


def places(config: DecoderConfig) -> dict[str, Place]:
    """Every tensor of a decoder's folder by its name, and where it belongs."""
    return _NAMING.places(config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, in the order of their names.

    Raises:
      FileNotFoundError: If there is no folder, no weights, or not all of their parts.
      ValueError: If the weights are pickled, or the index of the parts is broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    if (folder / INDEX).is_file():
        parts = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(parts, Mapping) or not parts:
            raise ValueError(f"{folder / INDEX} has no weight_map that names the weights' files.")
        names = sorted({str(name) for name in parts.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX} points out of its folder: {outside[0]!r}.")
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    present = sorted(file.name for file in folder.iterdir())
    if pickled := [name for name in present if name.endswith(PICKLES)]:
        raise ValueError(pickle_error(str(folder), pickled[0]))
    if "adapter_config.json" in present:
        raise FileNotFoundError(f"{folder} holds a PEFT adapter, not the model that it is for.")
    raise FileNotFoundError(
        f"{folder} lacks {', '.join(missing)}; it has {', '.join(present) or 'nothing'}."
    )


def pickle_error(place: str, name: str) -> str:
    """What is said of a model that comes in pickles only."""
    return (
        f"{place} has its weights in a pickle ({name}) and not in safetensors; opening a pickle "
        "runs whatever code it holds, so it is not read. Where you trust it, convert it with "
        'transformers: AutoModelForCausalLM.from_pretrained("...").save_pretrained("folder"), '
        'and AutoTokenizer.from_pretrained("...").save_pretrained("folder").'
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def _tensors(files: Sequence[Path]) -> list[Tensor]:
    """The tensors of some files as the decoder has them; none is read yet.

    Those that a weight in 4 bits consists of are one, wherever they are.
    """
    stored = [tensor for file in files for tensor in stored_tensors(file)]
    packed = {bitsandbytes.weight_of(tensor.name) for tensor in stored if _is_state(tensor.name)}
    parts: dict[str, dict[str, StoredTensor]] = {name: {} for name in packed if name}
    for tensor in stored:
        weight = bitsandbytes.weight_of(tensor.name)
        if weight is None or weight not in parts:
            continue
        if tensor.name in parts[weight]:
            raise ValueError(f"{tensor.name} is more than once in the files")
        parts[weight][tensor.name] = tensor
    tensors = []
    for tensor in stored:
        if bitsandbytes.weight_of(tensor.name) in parts:
            continue
        if tensor.name in parts:
            tensors.append(_packed(tensor, parts[tensor.name]))
        elif tensor.dtype in FLOATS:
            tensors.append(Tensor(tensor.name, tensor.shape, tensor.read))
        else:
            raise ValueError(
                f"the tensor {tensor.name!r} of {tensor.file.name} is stored as {tensor.dtype}; "
                f"only {', '.join(FLOATS)} can be read."
            )
    return tensors


def _is_state(name: str) -> bool:
    return bitsandbytes.STATE in name


def _packed(codes: StoredTensor, parts: Mapping[str, StoredTensor]) -> Tensor:
    """A weight of bitsandbytes, to be read with all that belongs to it."""
    states = {name: part.read() for name, part in parts.items() if _is_state(name)}

    def read() -> QuantizedArray:
        tensors = {name: part.read() for name, part in parts.items()}
        return bitsandbytes.from_tensors(tensors | {codes.name: codes.read()}, codes.name)

    return Tensor(codes.name, bitsandbytes.State.of(states, codes.name).shape, read)


def _is_derived(name: str, *, tied_head: bool) -> bool:
    """Whether a tensor only repeats what others say, as transformers too takes it."""
    return name.endswith("rotary_emb.inv_freq") or (tied_head and name == "lm_head.weight")


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no tokenizer.json; write one with transformers: "
            'AutoTokenizer.from_pretrained("...").save_pretrained("folder").'
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that can be read: {error}.") from error
    # Lengths are the business of whoever makes batches; a file may ask for either.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_tokens(tokenizer: Tokenizer, described: Mapping[str, Any]) -> SpecialTokens:
    settings = described.get("tokenizer_config.json", {})

    def token(name: str) -> int | None:
        text = settings.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        if text is not None and (index := tokenizer.token_to_id(text)) is not None:
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
    return [index for index in values if isinstance(index, int)]


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        templates = {entry.get("name"): entry.get("template") for entry in template}
        return templates.get("default")
    return template


def _name(path: Path) -> str:
    """`owner/name` for a folder of the hub's cache, else the folder's own name."""
    repository = path.absolute().parent.parent.name
    if path.absolute().parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.resolve().name
