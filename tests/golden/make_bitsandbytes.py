"""Writes bitsandbytes.npz: what bitsandbytes 0.50.2 makes of a few weights.

    python tests/golden/make_bitsandbytes.py

Needs the `interop` extra.

weight                       float32 [out, in], Gaussian, with one block of zeros
{dtype}_{kind}_{G}/codes     uint8 [out, in/2], codes at block size G
{dtype}_{kind}_{G}/absmax    float32 [out, in/G], without double quantization
{dtype}_{kind}_{G}/scales    uint8 [out, in/G], double-quantized
{dtype}_{kind}_{G}/nested    float32 [groups]; /offset float32 []
{dtype}_{kind}_{G}/decoded   of the double-quantized weight: float32, or bfloat16 as uint16
dynamic_map                  float32 [256]
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

PATH = Path(__file__).parent / "bitsandbytes.npz"
CASES = [
    *(("float32", kind, 64) for kind in ("nf4", "fp4")),
    *(("bfloat16", kind, 64) for kind in ("nf4", "fp4")),
    ("float32", "nf4", 32),
    ("float32", "nf4", 256),
]


def case(weight: torch.Tensor, kind: str, block_size: int) -> dict[str, np.ndarray]:
    out, inn = weight.shape
    options = {"blocksize": block_size, "quant_type": kind}
    codes, nested = bnb.quantize_4bit(weight, compress_statistics=True, **options)
    _, plain = bnb.quantize_4bit(weight, compress_statistics=False, **options)
    decoded = bnb.dequantize_4bit(codes, nested)
    if decoded.dtype == torch.bfloat16:
        decoded = decoded.view(torch.uint16)
    return {
        "codes": codes.numpy().reshape(out, inn // 2),
        "absmax": plain.absmax.numpy().reshape(out, -1),
        "scales": nested.absmax.numpy().reshape(out, -1),
        "nested": nested.state2.absmax.numpy(),
        "offset": nested.offset.numpy(),
        "decoded": decoded.numpy(),
    }


def main() -> None:
    weight = np.random.default_rng(0).normal(size=(36, 512)).astype(np.float32)
    weight[3, 64:128] = 0
    arrays = {"weight": weight, "dynamic_map": bnb.create_dynamic_map().numpy()}
    for dtype, kind, block_size in CASES:
        made = case(torch.from_numpy(weight).to(getattr(torch, dtype)), kind, block_size)
        arrays |= {f"{dtype}_{kind}_{block_size}/{name}": x for name, x in made.items()}
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
