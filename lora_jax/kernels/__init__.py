"""Decoding 4-bit weights, and products by group. The XLA path is the default and the reference."""

from lora_jax.kernels.grouped import grouped_dot
from lora_jax.kernels.xla import decode, decode_parameter, decode_rows, decode_scales

__all__ = ["decode", "decode_parameter", "decode_rows", "decode_scales", "grouped_dot"]
