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
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import QuantizedArray
from lora_jax.files import file_in, is_file_name, is_name, listed, read_object, shown
from lora_jax.formats import bitsandbytes
from lora_jax.formats.checkpoint import (
    Checkpoint,
    Naming,
    Reading,
    Tensor,
    assemble,
    digest,
)
from lora_jax.formats.hf_text import read_text
from lora_jax.formats.tensor_file import FLOATS, StoredTensor, stored_tensors
from lora_jax.models.config import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, DecoderConfig
from lora_jax.models.families import from_hf

_PROJECTIONS = {
    **{f"self_attn.{name}": f"attn/{name}" for name in ATTENTION_PROJECTIONS},
    **{f"mlp.{name}": f"mlp/{name}" for name in MLP_PROJECTIONS},
}
_SCALES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "attn/q_norm",
    "self_attn.k_norm": "attn/k_norm",
}
# Where norms follow attention and MLP as well, a name says another thing.
_SCALES_OF_POST_NORMS = {
    **_SCALES,
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def naming(config: DecoderConfig) -> Naming:
    """How transformers calls the tensors of a decoder."""
    scales = _SCALES_OF_POST_NORMS if config.post_norms else _SCALES
    layer, experts = "model.layers.{}", "model.layers.{}.mlp.experts.{}"
    return Naming(
        whole={
            "model.embed_tokens.weight": "embed/embedding",
            "model.norm.weight": "final_norm/scale",
            "lm_head.weight": "lm_head/kernel",
        },
        layered={
            **{f"{layer}.{name}.weight": f"layers/{path}/scale" for name, path in scales.items()},
            **{f"{layer}.{n}.weight": f"layers/{path}/kernel" for n, path in _PROJECTIONS.items()},
            **{f"{layer}.{n}.bias": f"layers/{path}/bias" for n, path in _PROJECTIONS.items()},
            f"{layer}.mlp.gate.weight": "layers/mlp/router/kernel",
        },
        expert={
            f"{experts}.{name}.weight": f"layers/mlp/experts/{name}/kernel"
            for name in MLP_PROJECTIONS
        },
    )


def read_hf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    scan_layers: bool = True,
    reading: Reading = Reading(),  # noqa: B008 frozen, and the same for all
) -> Checkpoint:
    """Reads a model folder of a family that `lora_jax.models.families` knows.

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
    described = read_descriptions(path)
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
            config, naming(config), tensors, scan_layers=scan_layers, reading=reading
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(
        config=config,
        params=params,
        **read_text(path, described)._asdict(),
        name=model_name(path),
        digest=digest(weights),
        metadata=described,
        folder=path,
    )


def read_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder says beside its weights, by the names of the files.

    Raises:
      FileNotFoundError: If it has no config.json.
      ValueError: If a file is no JSON object.
    """
    files = {name: file_in(folder, name) for name in _DESCRIPTIONS}
    described = {name: read_object(file) for name, file in files.items() if file is not None}
    if "config.json" not in described:
        raise FileNotFoundError(f"{folder} has no config.json, without which no model is defined.")
    return described


def _check_quantization(file: Path, said: Any) -> None:
    """Only what the tensors themselves say how to decode is read."""
    if not said:
        return
    said = said if isinstance(said, Mapping) else {"quant_method": said}
    method, four = said.get("quant_method"), said.get("load_in_4bit")
    if method != "bitsandbytes" or not four:
        how = shown(method) + (" in 8 bits" if said.get("load_in_8bit") else "")
        raise ValueError(
            f"{file} says that the weights are quantized by {how}; only those in floating point, "
            "and in 4 bits of bitsandbytes, can be read. Take the original model, and quantize it "
            "here."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, in the order of their names.

    Raises:
      FileNotFoundError: If there is no folder, no weights, or not all of their parts.
      ValueError: If the weights are pickled, or the index of the parts is broken.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    names = [WEIGHTS]
    if (index := file_in(folder, INDEX)) is not None:
        parts = read_object(index).get("weight_map")
        if not isinstance(parts, Mapping) or not parts:
            raise ValueError(f"{index} has no weight_map that names the weights' files.")
        if wrong := [name for name in parts.values() if not is_name(name)]:
            raise ValueError(f"{index} names a file {shown(wrong[0])}, which is no name of one.")
        names = sorted(set(parts.values()))
        if outside := [name for name in names if not is_file_name(name) or Path(name).name != name]:
            raise ValueError(
                f"{index} names a file that cannot be in its folder: {shown(outside[0])}."
            )
    files = {name: file_in(folder, name) for name in names}
    missing = [name for name, file in files.items() if file is None]
    if not missing:
        return [file for file in files.values() if file is not None]
    present = sorted(file.name for file in folder.iterdir())
    if pickled := [name for name in present if name.endswith(PICKLES)]:
        raise ValueError(pickle_error(str(folder), pickled[0]))
    if "adapter_config.json" in present:
        raise FileNotFoundError(f"{folder} holds a PEFT adapter, not the model that it is for.")
    raise FileNotFoundError(
        f"{folder} lacks {listed(missing)}; it has {listed(present) or 'nothing'}."
    )


def pickle_error(place: str, name: str) -> str:
    """What is said of a model that comes in pickles only."""
    return (
        f"{place} has its weights in a pickle ({name}) and not in safetensors; opening a pickle "
        "runs whatever code it holds, so it is not read. Where you trust it, convert it with "
        'transformers: AutoModelForCausalLM.from_pretrained("...").save_pretrained("folder"), '
        'and AutoTokenizer.from_pretrained("...").save_pretrained("folder").'
    )


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
    said = {name: part for name, part in parts.items() if _is_state(name)}
    if large := [name for name, part in said.items() if part.nbytes > bitsandbytes.LONGEST_STATE]:
        raise ValueError(
            f"{large[0]} has {said[large[0]].nbytes:,} bytes, expected a few fields of JSON"
        )
    states = {name: part.read() for name, part in said.items()}

    def read() -> QuantizedArray:
        tensors = {name: part.read() for name, part in parts.items()}
        return bitsandbytes.from_tensors(tensors | {codes.name: codes.read()}, codes.name)

    return Tensor(codes.name, bitsandbytes.State.of(states, codes.name).shape, read)


def _is_derived(name: str, *, tied_head: bool) -> bool:
    """Whether a tensor only repeats what others say, as transformers too takes it."""
    return name.endswith("rotary_emb.inv_freq") or (tied_head and name == "lm_head.weight")


def model_name(path: Path) -> str:
    """`owner/name` for a folder of the hub's cache, else the folder's own name."""
    repository = path.absolute().parent.parent.name
    if path.absolute().parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.resolve().name
