"""PEFT adapter folders: what `peft` and everything built on it reads and writes.

    adapter_config.json          rank, alpha, target modules
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight ...

A tensor is named after the torch module that it belongs to (`naming`); the config says which
modules those are, by patterns of their names (`config`).
"""

from lora_jax.formats.peft.read import read_peft
from lora_jax.formats.peft.write import write_peft

__all__ = ["read_peft", "write_peft"]
