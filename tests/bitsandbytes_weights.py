"""Random weights of bitsandbytes: kinds, dtypes, block sizes and shapes of every sort."""

from __future__ import annotations

import bitsandbytes.functional as functional
import jax.numpy as jnp
import numpy as np
import torch

BLOCK_SIZES = (32, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096)


def in_numpy(values: torch.Tensor) -> np.ndarray:
    values = values.cpu()
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy().view(jnp.bfloat16)
    return values.numpy()


def bits(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    return values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def random_state(
    seed: int, device: str = "cpu"
) -> tuple[torch.Tensor, functional.QuantState, dict[str, np.ndarray]]:
    """A random weight of a random kind, quantized on a device.

    Of four, one has rows that the block size divides, one odd ones, one rows that 16 divides.
    A fifth of the rows are zeros.

    Returns:
      Its codes, its state, and its state dict.
    """
    rng = np.random.default_rng(seed)
    kind, dtype = rng.choice(["nf4", "fp4"]), rng.choice(["float32", "bfloat16", "float16"])
    nested, block_size = bool(rng.integers(2)), int(rng.choice(BLOCK_SIZES))
    storage = rng.choice(["uint8", "bfloat16"]) if seed % 4 == 0 else "uint8"
    out, inn = (int(n) for n in rng.integers(1, 200, 2))
    match seed % 4:
        case 0:
            inn = block_size * int(rng.integers(1, 4))
        case 1:
            inn += 1 - inn % 2  # odd
        case 2:
            inn = 16 * (1 + inn % 12)
    weight = rng.normal(size=(out, inn)).astype(np.float32)
    weight[rng.random(out) < 0.2] = 0
    weight *= np.float32(10.0 ** rng.integers(-4, 3))
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weight).to(device, getattr(torch, str(dtype))),
        blocksize=block_size,
        quant_type=str(kind),
        compress_statistics=nested,
        quant_storage=getattr(torch, str(storage)),
    )
    tensors = {"weight": in_numpy(codes)}
    for name, values in state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = in_numpy(values)
    return codes, state, tensors
