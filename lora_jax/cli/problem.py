"""From options to what is computed with: a model, a task, and records as the model reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lora_jax import data
from lora_jax.checkpoint import load_adapters
from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.options import Base, DataOptions, ModelOptions
from lora_jax.core.codebooks import GGUF_KINDS
from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import named_leaves, quantize
from lora_jax.data import templates
from lora_jax.formats import Checkpoint, Quantization, read_model
from lora_jax.formats.checkpoint import Unread
from lora_jax.formats.sources import SourceError, fetch
from lora_jax.models.decoder import Decoder, by_layout

KERNELS = r"layers(_\d+)?/.*_proj/kernel"  # what is stored in 4 bits; a router is not

# What the published models are called where PEFT looks for them.
HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}


class Model(NamedTuple):
    """A model as it is run.

    Attributes:
      decoder: the module.
      base: its frozen parameters.
      checkpoint: where they came from; without its own parameters.
      hub_name: what others call it.
    """

    decoder: Decoder
    base: Any
    checkpoint: Checkpoint
    hub_name: str

    def running(self, **options: Any) -> Model:
        """The same model run in another way, by the options of its config."""
        return self._replace(decoder=Decoder(dataclasses.replace(self.decoder.config, **options)))

    @property
    def tokenizer(self) -> Any:
        """Text to token ids and back."""
        return self.checkpoint.tokenizer

    @property
    def special(self) -> data.SpecialTokens:
        """The tokens around a text."""
        return data.SpecialTokens(*self.checkpoint.special)


def load_model(options: ModelOptions) -> Model:
    """Fetches, reads and quantizes, one tensor at a time.

    What is in 4 bits already stays as it is.

    Raises:
      CliError: if there is no such model, or it cannot be read.
    """
    with sentences(SourceError, ValueError, OSError):
        checkpoint = read_for(options.base, options.model, place=lambda _, x: jax.device_put(x))
    config = dataclasses.replace(
        checkpoint.config,
        dtype=jnp.dtype(options.dtype),
        remat=None if options.remat in ("none", "auto") else options.remat,
    )
    return Model(
        Decoder(config),
        checkpoint.params,
        dataclasses.replace(checkpoint, params={}),
        HUB_NAMES.get(options.model, checkpoint.name),
    )


def read_for(
    base: Base,
    source: str,
    *,
    place: Callable[[str, Any], Any] | None = None,
    scan_layers: bool = True,
    lazy: bool = False,
) -> Checkpoint:
    """The model with its kernels as the base is to keep them: dense, in 4 bits, or still packed.

    Args:
      base: how.
      source: what `read_model` reads.
      place: where each leaf is to be, as for `read_model`.
      scan_layers: as for `read_model`.
      lazy: as for `read_model`.

    Raises:
      SourceError, ValueError, OSError: as `read_model`; or if the file keeps none in that kind.
    """
    packed = base in GGUF_KINDS
    dense = packed or base in ("float32", "bfloat16")
    with _progress(source) as progress:
        checkpoint = read_model(
            source,
            dtype=jnp.bfloat16 if base == "bfloat16" else jnp.float32,
            packed=packed,
            quantize=None if dense else Quantization(KERNELS, base, flat=True),
            place=place,
            progress=progress,
            scan_layers=scan_layers,
            lazy=lazy,
        )
    kinds = _kinds(checkpoint.params) if packed else []
    if packed and base not in kinds:
        raise ValueError(
            f"--base is {base}, and the kernels of {checkpoint.name} are in {' and '.join(kinds)}; "
            f"write --base {kinds[0]}"
        )
    return checkpoint


def _kinds(params: Any) -> list[str]:
    """The kinds of what is in 4 bits."""
    leaves = [leaf for _, leaf in named_leaves(params)]
    leaves = [leaf.abstract() if isinstance(leaf, Unread) else leaf for leaf in leaves]
    return sorted({leaf.kind for leaf in leaves if isinstance(leaf, QuantizedArray)})


def stored_as(base: Base, params: Any) -> Any:
    """Parameters, or the shapes of them, in the base's kind, as `read_for` would read them."""
    if base in ("float32", "bfloat16", *GGUF_KINDS):
        return params
    for layout, pattern in by_layout(KERNELS, params).items():
        params = quantize(params, pattern, kind=base, layout=layout, flat=True)
    return params


def rules_for(rule: LoraRule, params: Any) -> list[LoraRule]:
    """A rule without a layout, once for each layout among the decoder's leaves that it matches.

    Raises:
      ValueError: if it matches nothing, or a leaf that is no matrix.
    """
    return [
        dataclasses.replace(rule, pattern=pattern, layout=layout)
        for layout, pattern in by_layout(rule.pattern, params).items()
    ]


@contextlib.contextmanager
def _progress(source: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on a terminal how many tensors have been read, from the first one on."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task(f"Reading {source}", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # not before, for a download has a bar of its own
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


def load_adapted(options: ModelOptions, adapter: Path | None) -> tuple[Model, Any]:
    """The model, and what `load_adapter` reads for it; no adapters, if there is no folder.

    Raises:
      CliError: as `load_model` and `load_adapter`.
    """
    model = load_model(options)
    return model, None if adapter is None else load_adapter(adapter, model.base)


def load_adapter(path: Path, base: Any) -> Any:
    """The adapter of a run, or one that `lj.save_adapters` saved.

    Raises:
      CliError: if there is none, or it belongs to another model.
    """
    if (path / "results.csv").is_file():
        run = path / "runs" / "000"
        raise CliError(f"{path} is a sweep's folder; write that of one of its runs, as {run}.")
    folder = path / "checkpoint" if (path / "config.json").is_file() else path
    if folder != path and not folder.is_dir():
        raise CliError(
            f"{path} has no adapter yet; write lora-jax finetune --resume {path} to go on with it."
        )
    with sentences(ValueError, OSError):
        return load_adapters(folder, base)


def read(source: str) -> list[data.Record]:
    """The records of a source.

    Raises:
      CliError: if there is none, or a record cannot be read; the sentence names file and line.
    """
    with sentences(SourceError, ValueError, OSError):
        return data.read_records(fetch(source))


def with_labels(options: DataOptions, records: Sequence[data.Record]) -> DataOptions:
    """The options with the labels that occur, if they are of a classification and name none.

    Raises:
      CliError: if a record has no such column.
    """
    if options.task != "classification" or options.labels:
        return options
    with sentences(ValueError):
        values = {str(templates.value(record, options.label)) for record in records}
    labels = tuple(f"{value}= {value}" for value in sorted(values))
    return dataclasses.replace(options, labels=labels)


def make_task(options: DataOptions, template: str | None) -> data.Task:
    """The task that the options describe.

    Args:
      options: the data's, with labels.
      template: the model's own for chats.

    Raises:
      CliError: if it is a chat, and the model has no template; or a template is malformed.
    """
    with sentences(ValueError):
        match options.task:
            case "classification":
                pairs = [label.partition("=") for label in options.labels]
                named = all(equals for _, equals, _ in pairs)
                labels = {value: text for value, _, text in pairs} if named else options.labels
                return data.Classification(options.prompt, labels, options.label)
            case "completion":
                return data.Completion(options.prompt, options.completion)
            case "text":
                return data.Text(options.text)
    if template is None:
        raise CliError(
            "the model has no chat template, so no chat can be written for it; write "
            "--task completion, or take a model that was made for chats."
        )
    return data.Chat(template, options.messages)


class Split(NamedTuple):
    """Records, and those of them that a model reads.

    Attributes:
      records: all of them.
      encoded: as tokens; each knows the number of its record.
    """

    records: Sequence[data.Record]
    encoded: data.EncodedSet

    @property
    def sequences(self) -> Sequence[data.Encoded]:
        """The encoded ones."""
        return self.encoded.sequences

    def numbers(self) -> dict[str, int]:
        """What became of the records."""
        names = ("tokens", "learned", "truncated", "dropped", "empty")
        counts = {name: getattr(self.encoded, name) for name in names}
        return {"records": len(self.records), "sequences": len(self.sequences), **counts}

    def first(self, number: int | None) -> Split:
        """A prefix, which is a random sample if records are in the order of a hash."""
        return Split(
            self.records,
            dataclasses.replace(self.encoded, sequences=self.encoded.sequences[:number]),
        )

    def digest(self) -> str:
        """SHA-256 of tokens and weights: the same for what is the same to a model."""
        digest = hashlib.sha256()
        for one in self.sequences:
            digest.update(one.tokens.tobytes() + one.weights.tobytes())
        return digest.hexdigest()


class Data(NamedTuple):
    """Records by what they are for.

    Attributes:
      options: as given, with the labels that were found.
      task: what is learned.
      train: what is learned from.
      validation, test: what is held out; None if nothing is to be.
    """

    options: DataOptions
    task: data.Task
    train: Split
    validation: Split | None
    test: Split | None


def load_data(
    options: DataOptions,
    model: Model,
    *,
    most: tuple[int | None, int | None] = (None, None),
) -> Data:
    """Reads, splits and tokenizes.

    Args:
      options: the data's.
      model: that will read them.
      most: records of validation and of test.

    Raises:
      CliError: if something cannot be read, or there is nothing for one of the splits.
    """
    records = read(options.data)
    options = with_labels(options, records)
    task = make_task(options, model.checkpoint.chat_template)
    files = (options.validation_data, options.test_data)
    wanted = (options.validation, options.test)
    shares = [0.0 if file else share for file, share in zip(files, wanted, strict=True)]
    with sentences(ValueError):
        train, *parts = data.split_records(
            records,
            task.key_of,
            validation=shares[0],
            test=shares[1],
            one_per_key=options.task == "classification",
        )
    held_out: dict[str, Split | None] = {"validation": None, "test": None}
    for name, part, file, share, limit in zip(held_out, parts, files, shares, most, strict=True):
        if file or share:
            found = read(file) if file else part
            if not found:
                raise CliError(
                    f"{options.data} has {len(records):,} records, of which the {name} split would "
                    f"have none at a share of {share:g}; write a larger --{name}, --{name} 0 for "
                    f"none, or --{name}-data with a file."
                )
            held_out[name] = encode(options, task, found[:limit], model, name)
    if not train:
        raise CliError(
            f"{options.data} has {len(records):,} records, of which none is left to train on; "
            "write a file with more, or smaller shares for --validation and --test."
        )
    return Data(options, task, encode(options, task, train, model, "training"), **held_out)


def encode(
    options: DataOptions,
    task: data.Task,
    records: Sequence[data.Record],
    model: Model,
    what: str,
) -> Split:
    """Tokenizes records.

    Raises:
      CliError: if one has no such column, or is too long where that is an error, or none is left.
    """
    with sentences(ValueError):
        encoded = data.encode_all(
            task,
            records,
            model.tokenizer,
            model.special,
            max_length=options.length,
            too_long=options.too_long,
        )
    if not encoded.sequences:
        raise CliError(
            f"no record is left for {what} ({encoded}); write a longer --length, or "
            "--too-long truncate."
        )
    return Split(records, encoded)
