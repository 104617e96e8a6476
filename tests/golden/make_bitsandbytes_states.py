"""Writes bitsandbytes_states.npz: state dicts of Linear4bit weights, and what they decode to.

    python tests/golden/make_bitsandbytes_states.py

Needs the `interop` extra; made with bitsandbytes 0.50.2.

{case}/{tensor}   the tensors of a state dict; bfloat16 ones as uint16, by names ending in "!bf16"
{case}!decoded    float32 [out, in], what bitsandbytes decodes them to (exact, if of a half dtype)

A case is {kind}_{dtype}_{out}x{in}_{G}[_nested][_{storage}].
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

PATH = Path(__file__).parent / "bitsandbytes_states.npz"
CASES = [
    ("nf4", "float32", (6, 128), 64, True, "uint8"),
    ("nf4", "bfloat16", (5, 640), 64, True, "bfloat16"),
    ("nf4", "float16", (9, 65), 64, False, "uint8"),  # odd
    ("fp4", "float32", (7, 101), 64, True, "uint8"),  # blocks run over row ends
    ("fp4", "bfloat16", (4, 128), 128, False, "uint8"),
    ("nf4", "float32", (3, 7), 32, False, "uint8"),  # less than a block
]


def state_dict(weight: torch.Tensor, kind: str, block_size: int, nested: bool, storage: str):
    codes, state = bnb.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
    )
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": codes, **parts}, bnb.dequantize_4bit(codes, state)


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for kind, dtype, shape, block_size, nested, storage in CASES:
        weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        weight[1, :] = 0
        tensors, decoded = state_dict(
            weight.to(getattr(torch, dtype)), kind, block_size, nested, storage
        )
        case = f"{kind}_{dtype}_{shape[0]}x{shape[1]}_{block_size}"
        case += "_nested" * nested + f"_{storage}" * (storage != "uint8")
        for name, values in tensors.items():
            if values.dtype == torch.bfloat16:
                name, values = f"{name}!bf16", values.view(torch.uint16)
            arrays[f"{case}/{name}"] = values.numpy()
        arrays[f"{case}!decoded"] = decoded.float().numpy()
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
