"""The cases that texts on LoRA quote, each with what is counted in it.

A number of gigabytes says little without its terms: weights alone, or gradients and optimizer as
well; two bytes of each, or four; and hardly ever activations. Here the terms are spelled out, and
the bytes follow. GB are 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# Bits a parameter in NF4 with doubly quantized scales: a code, its share of an 8-bit scale for 64
# of them, and of a float32 for 256 scales.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

GPT_3 = 175e9
LLAMA_13B = 13_015_864_320
LLAMA_65B = 65_285_660_672
# Rank 16 on the four projections of attention, of width 4,096 in each of 32 layers.
ADAPTER_7B = 32 * 4 * 16 * (4_096 + 4_096)


@dataclasses.dataclass(frozen=True)
class Quoted:
    """A case.

    Attributes:
      case: what is trained, and how.
      claim: what is quoted of it.
      parameters: numbers that each term counts.
      terms: bytes a parameter, by what they hold.
      remark: what the number leaves out, or what was measured.
    """

    case: str
    claim: str
    parameters: float
    terms: Mapping[str, float]
    remark: str

    @property
    def bytes(self) -> float:
        """What the terms come to."""
        return self.parameters * sum(self.terms.values())

    @property
    def counted(self) -> str:
        """The terms in words."""
        return ", ".join(f"{size:.4g} {what}" for what, size in self.terms.items())


QUOTED = (
    Quoted(
        "GPT-3 175B, all of it trained",
        "2.8 TB",
        GPT_3,
        {"weights": 2, "gradients": 2, "float32 weights": 4, "Adam's moments": 8},
        "mixed precision; without activations",
    ),
    Quoted(
        "GPT-3 175B, LoRA on 16-bit weights",
        "350 GB",
        GPT_3,
        {"weights": 2},
        "weights alone; the adapters of the paper (r=4 on q and v) are 38 MB",
    ),
    Quoted(
        "GPT-3 175B, QLoRA",
        "one GPU",
        GPT_3,
        {"NF4 weights": NF4_BITS / 8},
        "weights alone; a step of 1x2048 took 100.2 GiB of an H200",
    ),
    Quoted(
        "LLaMA-13B, all of it trained in 16 bits",
        "104 GB",
        LLAMA_13B,
        {"weights": 2, "gradients": 2, "Adam's moments": 4},
        "moments in 16 bits and no float32 weights; with both it is 208 GB",
    ),
    Quoted(
        "LLaMA-13B, QLoRA",
        "about 7 GB",
        LLAMA_13B,
        {"NF4 weights": NF4_BITS / 8},
        "weights alone; embedding and head stay in 16 bits",
    ),
    Quoted(
        "LLaMA-65B, all of it trained",
        "over 780 GB",
        LLAMA_65B,
        {"weights": 2, "gradients": 2, "Adam's moments": 8},
        "no float32 weights; without activations",
    ),
    Quoted(
        "LLaMA-65B, QLoRA",
        "one GPU of 48 GB",
        LLAMA_65B,
        {"NF4 weights": NF4_BITS / 8},
        "weights alone; a step of 1x2048 took 39.8 GiB of an H200",
    ),
    Quoted(
        "7B, an adapter of r=16 on attention",
        "about 30 MB",
        ADAPTER_7B,
        {"adapters": 2},
        "in 16 bits; twice that in float32, in which they are trained",
    ),
    Quoted(
        "7B, NF4 against bfloat16",
        "8x smaller",
        6_738_415_616,
        {"NF4 weights": NF4_BITS / 8},
        "3.9x smaller than in bfloat16; 8x holds against float32",
    ),
)
