"""Files that others write and read: models, adapters, and where to get them."""

from lora_jax.formats import bitsandbytes
from lora_jax.formats.checkpoint import Checkpoint, SpecialTokens
from lora_jax.formats.model import read_model
from lora_jax.formats.quantization import Quantization

__all__ = ["Checkpoint", "Quantization", "SpecialTokens", "bitsandbytes", "read_model"]
