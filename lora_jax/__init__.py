"""LoRA and QLoRA as a transform of trees: `import lora_jax as lj`.

The public names are listed below; everything else is reached through a submodule, such as
`lj.models` or `lj.formats`, which is imported when it is first named.
"""

import importlib as _importlib
from typing import Any as _Any

from lora_jax.checkpoint import load_adapters, save_adapters
from lora_jax.core.adapt import adapt, explain
from lora_jax.core.leaves import AdaptedArray, Adapter, QuantizedArray
from lora_jax.core.merge import merge, unmerge
from lora_jax.core.quantize import dequantize, quantize_array
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import (
    ParamCount,
    combine,
    count_params,
    init_adapters,
    quantize,
    split,
)
from lora_jax.optim import adapter_mask, freeze_base, lora_plus
from lora_jax.sharding import offload, shard, shardings

__version__ = "0.1.0"

__all__ = [
    "AdaptedArray",
    "Adapter",
    "LoraRule",
    "ParamCount",
    "QuantizedArray",
    "adapt",
    "adapter_mask",
    "combine",
    "count_params",
    "dequantize",
    "explain",
    "freeze_base",
    "init_adapters",
    "load_adapters",
    "lora_plus",
    "merge",
    "offload",
    "quantize",
    "quantize_array",
    "save_adapters",
    "shard",
    "shardings",
    "split",
    "unmerge",
]

_SUBMODULES = ("data", "formats", "generate", "kernels", "memory", "models", "sweep", "train")


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _importlib.import_module(f"lora_jax.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
