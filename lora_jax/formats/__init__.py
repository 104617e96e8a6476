"""Files that others write and read: models, adapters, and where to get them."""

from lora_jax.formats.checkpoint import Checkpoint, SpecialTokens
from lora_jax.formats.model import read_model

__all__ = ["Checkpoint", "SpecialTokens", "read_model"]
