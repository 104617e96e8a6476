"""`lora-jax memory`: what a training step takes, and whether it fits, before it is compiled."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.options import LogOptions, Policy, at_least
from lora_jax.cli.parsing import read_object
from lora_jax.cli.report import Reporter
from lora_jax.memory import (
    POLICIES,
    QUOTED,
    Memory,
    Setup,
    auto_remat,
    device_bytes,
    predict,
    refusal,
)
from lora_jax.memory.prediction import CATEGORIES
from lora_jax.models.config import DecoderConfig
from lora_jax.models.families import from_hf
from lora_jax.models.shapes import SHAPES


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The step."""

    model: Annotated[str, arg(metavar="NAME")] = "llama-3-8b"
    """The name of a published shape, such as llama-3-8b or gpt-3-175b, or a folder with a
    config.json."""
    method: Literal["qlora", "lora", "full"] = "qlora"
    """Adapters on a base in 4 bits, adapters on a dense one, or all weights trained."""
    rank: int = 16
    """Rank of each adapter."""
    targets: Annotated[str, arg(metavar="REGEX")] = "_proj/kernel"
    """The weights to adapt, as for finetune --targets."""
    batch: int = 1
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    accumulate: int = 1
    """Parts in which a batch is computed, one after the other."""
    optimizer: Literal["adamw", "adamw-bfloat16", "momentum", "sgd"] = "adamw"
    """What keeps a state: two moments of each gradient, the first one in bfloat16, one, or none."""
    remat: Policy | None = None
    """What is saved for the backward pass; auto for the most that fits. All of them are listed,
    if not given."""
    scan: bool = True
    """Whether layers are scanned."""
    chunk: int = 512
    """Positions whose logits are held at once; 0 for all."""
    attention: Literal["cudnn", "xla"] = "cudnn"
    """The fused kernel of NVIDIA GPUs, or products of queries and keys that are held."""
    base: Literal["nf4", "fp4", "int4", "af4", "q4_0", "q4_1"] = "nf4"
    """How a 4-bit base is stored."""
    block_size: int = 64
    """Weights that share a scale."""
    double_quant: bool = True
    """Whether scales are stored in 8 bits."""
    keep: int | None = None
    """Layers whose 4-bit kernels stay on the device; the others wait in the host's memory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations, and of weights that are not in 4 bits."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank", "batch", "length", "accumulate", "block_size")
        at_least(self, 0, "chunk")

    def setup(self) -> Setup:
        """The same for `lj.memory`, with the policy that repeats least if none is given.

        Raises:
          CliError: if there is no such model, or an option makes no sense.
        """
        shape = model_shape(self.model)
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Setup)
            if field.name != "shape" and hasattr(self, field.name)
        }
        policy = {"none": None, "auto": POLICIES[0]}.get(self.remat or "auto", self.remat)
        values |= {"chunk": self.chunk or None, "kind": self.base, "remat": policy}
        with sentences(ValueError):
            return Setup(shape, **values, param_dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """What it has to fit in."""

    device_memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Such as 80GB or 23.5GiB; the GPU's own, if there is one and this is not given."""
    quoted: bool = False
    """Print what texts on LoRA quote of memory, and what is counted in it, and nothing else."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tells the memory of a training step, by category, before anything is lowered.

        lora-jax memory --model llama-3-8b --rank 16 --batch 4 --device-memory 24GB
        lora-jax memory --model llama-65b --remat layer
        lora-jax memory --quoted

    Weights, adapters and the optimizer's state are counted to the byte. What is alive beside them
    is what XLA keeps on an NVIDIA GPU. What does not fit is said with the nearest step that does.
    """

    step: StepOptions
    device: DeviceOptions
    output: LogOptions


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if there is no such model, or the step does not fit.
    """
    reporter = Reporter(config.output.log)
    if config.device.quoted:
        quoted(reporter)
        return 0
    setup, limit = config.step.setup(), _limit(config.device.device_memory)
    with sentences(ValueError):
        if config.step.remat == "auto":
            setup = dataclasses.replace(setup, remat=auto_remat(setup, limit))
        if config.step.remat is not None:
            one_policy(setup, reporter)
        else:
            all_policies(setup, reporter, limit)
            setup = dataclasses.replace(setup, remat=POLICIES[-1])
        if limit is not None and predict(setup).needed > limit:
            raise CliError(f"{_as_options(refusal(setup, limit))}.")
    return 0


def model_shape(name: str) -> DecoderConfig:
    """The shape of a published model, or of the one in a folder.

    Raises:
      CliError: if there is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise CliError(
            f"there is no shape {name!r}, nor a folder of that name with a config.json; "
            f"write one of {', '.join(SHAPES)}."
        )
    with sentences(ValueError, OSError):
        return from_hf(read_object(path))


def bytes_of(text: str) -> int:
    """A size as people write it: 80GB are 80 * 10^9 bytes, 80GiB are 80 * 2^30.

    Raises:
      ValueError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"--device-memory is {text!r}, expected a size such as 80GB or 23.5GiB")
    number, unit, binary = match.groups()
    power = 0 if not unit else "KMGT".index(unit.upper()) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)


def _limit(text: str | None) -> int | None:
    if text is None:
        return device_bytes()
    with sentences(ValueError):
        return bytes_of(text)


def one_policy(setup: Setup, reporter: Reporter) -> None:
    """Prints the memory of a step."""
    memory = predict(setup)
    _event(setup, memory, reporter)
    rows = [(CATEGORIES[name], *_cells(size)) for name, size in memory.categories().items()]
    rows += [(name, *_cells(size)) for name, size in _sums(memory).items()]
    reporter.table(("memory", "bytes", "GiB"), rows)
    reporter.say(
        f"With remat {setup.remat or 'none'} most is alive at the {memory.peak.name} of a step."
    )


def all_policies(setup: Setup, reporter: Reporter, limit: int | None) -> None:
    """Prints the memory of a step with each policy side by side, in GiB."""
    setups = [dataclasses.replace(setup, remat=policy) for policy in (None, *POLICIES)]
    memories = list(map(predict, setups))
    for one, memory in zip(setups, memories, strict=True):
        _event(one, memory, reporter)
    rows = [
        (CATEGORIES[name], *(_cells(memory.categories()[name])[1] for memory in memories))
        for name in CATEGORIES
    ]
    rows += [
        (name, *(_cells(_sums(memory)[name])[1] for memory in memories))
        for name in _sums(memories[0])
    ]
    if limit is not None:
        fits = ("yes" if memory.needed <= limit else "no" for memory in memories)
        rows.append((f"fits in {limit / 2**30:.2f}", *fits))
    reporter.table(("GiB, by --remat", *(one.remat or "none" for one in setups)), rows)


def _sums(memory: Memory) -> dict[str, int]:
    return {"in all": memory.total, "in all, with compiling": memory.needed}


def _cells(size: int) -> tuple[str, str]:
    return f"{size:,}", f"{size / 2**30:.3f}"


def _event(setup: Setup, memory: Memory, reporter: Reporter) -> None:
    sizes = {**memory.categories(), "total": memory.total, "needed": memory.needed}
    reporter.event("memory", remat=setup.remat or "none", peak=memory.peak.name, **sizes)


def _as_options(sentence: str) -> str:
    """A sentence of the library in which what to write is written as on the command line."""
    return re.sub(r"\b(remat|accumulate|length)=(\w+)", r"--\1 \2", sentence)


def quoted(reporter: Reporter) -> None:
    """Prints what texts on LoRA quote, and what is counted in it."""
    rows = []
    for case in QUOTED:
        gigabytes = f"{case.bytes / 1e9:,.1f}" if case.bytes >= 1e9 else f"{case.bytes / 1e9:.4f}"
        rows.append((case.case, case.claim, gigabytes))
        reporter.event("quoted", **dataclasses.asdict(case), bytes=case.bytes)
    reporter.table(("case", "quoted", "GB"), rows)
    for case in QUOTED:
        reporter.say()
        reporter.say(f"{case.case}: bytes a parameter are {case.counted}.")
        reporter.say(f"  {case.remark[0].upper()}{case.remark[1:]}.")
