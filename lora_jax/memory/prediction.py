"""The memory of a step: what stays, and what is alive beside it at the peak."""

from __future__ import annotations

import dataclasses

from lora_jax.memory.setup import Setup
from lora_jax.memory.step import Moment, compiling_bytes, inputs_on_host, moments
from lora_jax.memory.trees import state

CATEGORIES = {
    "base": "base",
    "scales": "scales of its blocks",
    "adapters": "adapters",
    "optimizer": "optimizer's state",
    "gradients": "gradients",
    "activations": "saved activations",
    "logits": "logits and their gradient",
    "temporaries": "temporaries",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a training step; printed, a table.

    Attributes:
      base: of the frozen weights, codes and dense ones, without scales; of all that is trained, in
        full fine-tuning.
      scales: of 4-bit weights.
      adapters: of all adapters.
      optimizer: of its state.
      all_gradients: of the gradient by everything that is trained. It need not all be there at
        once: `gradients` is what of it is alive at the peak.
      moments: what is alive beside the state, at each moment that may be the peak.
      compiling: what the compiler takes beside the state while it tries out products.
      host: in the host's pinned memory: kernels that wait there, and layers' inputs.
    """

    base: int
    scales: int
    adapters: int
    optimizer: int
    all_gradients: int
    moments: tuple[Moment, ...]
    compiling: int
    host: int = 0

    @property
    def peak(self) -> Moment:
        """The moment at which most is alive."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def gradients(self) -> int:
        """Of those, what is alive at the peak."""
        return self.peak.gradients

    @property
    def activations(self) -> int:
        """What the layers saved for the backward pass."""
        return self.peak.activations

    @property
    def logits(self) -> int:
        """A chunk of logits and their gradient, if that is the peak."""
        return self.peak.logits

    @property
    def temporaries(self) -> int:
        """Everything else that is alive at the peak."""
        return self.peak.temporaries

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        return self.base + self.scales + self.adapters + self.optimizer

    @property
    def total(self) -> int:
        """The most that a compiled step takes."""
        return self.resident + self.peak.total

    @property
    def needed(self) -> int:
        """The most that compiling and running it takes: what a device's peak counter shows."""
        return self.resident + max(self.peak.total, self.compiling)

    def categories(self) -> dict[str, int]:
        """Bytes by category; they add up to `total`."""
        return {name: getattr(self, name) for name in CATEGORIES}

    def __str__(self) -> str:
        rows = [(CATEGORIES[name], size) for name, size in self.categories().items()]
        rows.append((f"in all, at the {self.peak.name}", self.total))
        if self.compiling > self.peak.total:
            rows.append(("in all, while compiling", self.needed))
        if self.host:
            rows.append(("beside it, on the host", self.host))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {size / 2**30:10.3f} GiB" for name, size in rows)


def predict(setup: Setup) -> Memory:
    """The memory of a step, from its description alone.

    State is exact. What is alive at the peak holds for a program that XLA compiles for one NVIDIA
    GPU, and for `lora_jax.models.Decoder` with the chunked cross-entropy of `lora_jax.train`, whose
    sequences need no mask. The state of `lj.train.fit` has the adapters once more, as they were
    when the loss was last finite.

    Args:
      setup: the step.

    Raises:
      ValueError: if a pattern of the setup matches no weight.
    """
    parts = state(setup)
    return Memory(
        base=parts.base,
        scales=parts.scales,
        adapters=parts.adapters,
        optimizer=parts.optimizer,
        all_gradients=parts.gradients,
        moments=moments(setup, parts.gradients),
        compiling=compiling_bytes(setup),
        host=parts.host + inputs_on_host(setup),
    )
