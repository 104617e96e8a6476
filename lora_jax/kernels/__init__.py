"""4-bit weights: decoding, and products with them; products by group.

`lora_jax.kernels.xla` is the reference and what runs by default; on NVIDIA GPUs the kernels of
`lora_jax.kernels.gpu` take over where they can (see `lora_jax.kernels.dispatch`), and `use` forces
either.
"""

from lora_jax.kernels.dispatch import decode, decode_folded, decode_parameter, matmul, use
from lora_jax.kernels.grouped import grouped_dot
from lora_jax.kernels.xla import as_parameter, decode_rows, decode_scales

__all__ = [
    "as_parameter",
    "decode",
    "decode_folded",
    "decode_parameter",
    "decode_rows",
    "decode_scales",
    "grouped_dot",
    "matmul",
    "use",
]
