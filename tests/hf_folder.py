"""A model folder as transformers would write it, around the weights of golden/tiny_llama.npz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

GOLDEN = np.load(Path(__file__).parent / "golden" / "tiny_llama.npz")
WORDS = ["<s>", "</s>", "<|turn|>", *(f"w{index}" for index in range(93))]  # 96 in all


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The golden weights by their names in a file."""
    return {
        name.removeprefix("weight/"): values.astype(dtype)
        for name, values in GOLDEN.items()
        if name.startswith("weight/")
    }


def build_tokenizer(*, adds_bos: bool) -> Tokenizer:
    """One word, one token; it pads and truncates, as saved tokenizers may."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    return tokenizer


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_folder(
    path: Path,
    *,
    dtype: Any = np.float32,
    shards: int = 1,
    adds_bos: bool = True,
    **config: Any,
) -> Path:
    """Writes the folder; `config` changes fields of its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", json.loads(str(GOLDEN["config"])) | config)
    weights = tensors(dtype)
    if shards == 1:
        safetensors.numpy.save_file(weights, path / "model.safetensors")
    else:
        places = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(weights.items())[index::shards])
            safetensors.numpy.save_file(part, path / file)
            places |= dict.fromkeys(part, file)
        write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    build_tokenizer(adds_bos=adds_bos).save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}},
    )
    return path
