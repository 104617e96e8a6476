"""`lora-jax inspect`: what there is in a file or folder, and what a rule would match in a model."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import Positional, arg

from lora_jax.checkpoint import read_shapes, read_static
from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.found import look
from lora_jax.cli.options import Base, LogOptions, ModelOptions, at_least
from lora_jax.cli.parsing import read_object
from lora_jax.cli.problem import read_for, rules_for, stored_as
from lora_jax.cli.report import Reporter, mebibytes
from lora_jax.cli.run_folder import RunFolder
from lora_jax.core.codebooks import GGUF_KINDS
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import init_adapters, map_leaves
from lora_jax.data.records import read_records
from lora_jax.files import plain
from lora_jax.formats.outline import Header, Outline, read_outline, safetensors_headers
from lora_jax.models.decoder import parameter_shapes

_WIDTH = 60  # characters of a value that is shown
_MODELS = ("hf", "gguf")
_ADAPTER = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What to look at, and what to try on it."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]] = ModelOptions.model
    """A model, as for finetune --model; the folder of a run or of an adapter, ours or PEFT's; a
    safetensors file; or a file of records."""
    base: Base = "float32"
    """How a model's kernels are stored, as for finetune --base."""
    targets: str | None = None
    """Weights of a model to adapt: a regular expression, as for finetune --targets."""
    rank: int = 16
    """Rank of each adapter."""
    whole: tuple[str, ...] = ()
    """Weights to train whole: regular expressions."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")

    @property
    def is_a_trial(self) -> bool:
        """Whether something is to be tried on a model."""
        return self.base != "float32" or self.targets is not None or bool(self.whole)


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints what there is: weights, shapes, how they are stored, counts and bytes.

        lora-jax inspect smollm2-135m-instruct --base nf4 --targets "attn/.*/kernel" --rank 8
        lora-jax inspect runs/mine
        lora-jax inspect adapter

    Of a model the weights are listed as they would be stored and adapted; of a run its options, its
    outcome and its adapter; of a file of records its columns. What it is, is found by looking, and
    no weights are read: files say in their heads what they hold.
    """

    subject: Subject
    output: LogOptions


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if there is no such thing, or it cannot be read.
    """
    reporter = Reporter(config.output.log)
    found = look(config.subject.source, reporter)
    if config.subject.is_a_trial and found.kind not in _MODELS:
        raise CliError(
            f"{found}, and --base, --targets and --whole are about models; leave them out."
        )
    with sentences(ValueError, OSError):
        if found.kind in _MODELS:
            model(found.path, config.subject, reporter)
        else:
            INSPECTED[found.kind](found.path, reporter)
    return 0


# Models.


def model(path: Path, subject: Subject, reporter: Reporter) -> None:
    """Prints a model's shape, how it is stored, and its weights as they would be, with adapters."""
    outline = read_outline(path)
    if path.is_file():
        reporter.facts("metadata", _examples(outline.metadata))
        reporter.event("metadata", **outline.metadata)
    if outline.metadata.get("general.type") == "adapter" and not subject.is_a_trial:
        _stored(outline.headers, reporter)
        _tensors(outline.headers, reporter)
        return
    try:
        facts = _model_facts(outline)
    except (ValueError, FileNotFoundError) as error:
        if subject.is_a_trial:
            raise
        _stored(outline.headers, reporter)
        _tensors(outline.headers, reporter)
        reporter.say(f"It cannot be run here: {error}")
        return
    reporter.facts("model", facts.items())
    reporter.event("model", **facts)
    _stored(outline.headers, reporter)
    rule = None if subject.targets is None else LoraRule(subject.targets, subject.rank)

    def trees(params: Any) -> tuple[Any, Any]:
        base = stored_as(subject.base, params)
        rules = [] if rule is None else rules_for(rule, base)
        return base, init_adapters(jax.random.key(0), base, rules, train=subject.whole)

    shapes = parameter_shapes(outline.config())
    if subject.base in GGUF_KINDS:  # which kernels are in them is seen by reading one of a stack
        params = read_for(subject.base, subject.source, lazy=True).params
        shapes = map_leaves(lambda _, leaf: leaf.abstract(), params)
    reporter.plan(*jax.eval_shape(trees, shapes))  # shapes alone: nothing is computed


def _model_facts(outline: Outline) -> dict[str, Any]:
    """What the decoder is, and what is said about text."""
    config, words = outline.config(), outline.words()
    run = ("scan_layers", "remat", "attention", "dtype", "param_dtype")  # not what it is
    names = [field.name for field in dataclasses.fields(config) if field.name not in run]
    facts = {"name": outline.name} | {name: getattr(config, name) for name in names}
    facts |= {"bos": words.special.bos, "eos": words.special.eos, "stop": words.stop}
    return facts | {"chat template": "yes" if words.chat_template else "no"}


def _stored(headers: Sequence[Header], reporter: Reporter) -> None:
    """Prints how many tensors are stored in which way, and what that takes."""
    kinds: dict[str, list[Header]] = collections.defaultdict(list)
    for header in headers:
        kinds[header.kind].append(header)
    rows = []
    for kind, group in sorted(kinds.items(), key=lambda pair: -sum(x.nbytes for x in pair[1])):
        counts = {
            "tensors": len(group),
            "parameters": sum(math.prod(header.shape) for header in group),
            "bytes": sum(header.nbytes for header in group),
        }
        reporter.event("stored", kind=kind, **counts)
        sizes = f"{counts['parameters']:,}", mebibytes(counts["bytes"])
        rows.append((kind, str(counts["tensors"]), *sizes))
    reporter.say()
    reporter.table(("stored as", "tensors", "parameters", "MiB"), rows)


# Runs and adapters.


def run_folder(path: Path, reporter: Reporter) -> None:
    """Prints the options of a run, how far it came, and the adapter that it left."""
    folder = RunFolder(path, "finetune")
    options = read_object(path / "config.json")
    reporter.facts("options", _examples(options, most=None))
    reporter.event("config", **options)
    records = folder.records()
    steps = [record for record in records if "loss" in record]
    if folder.is_finished:
        result = read_object(path / "result.json")
        reporter.facts("result", _flat(result))
        reporter.event("result", **result)
    else:
        done = steps[-1].get("step") if steps else 0
        reporter.say()
        reporter.say(f"It came to step {done} of {options.get('steps')}; {folder.resume} goes on.")
        reporter.event("unfinished", step=done)
    if (path / "checkpoint").is_dir():
        saved_adapter(path / "checkpoint", reporter)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values within values, one below the other."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield plain(f"{prefix}{name}"), value if not isinstance(value, str) else plain(value)


def saved_adapter(path: Path, reporter: Reporter) -> None:
    """Prints what a folder of `lj.save_adapters` holds."""
    if "leaves" not in read_object(path / "adapters.json") or not (path / "arrays").is_dir():
        raise CliError(f"{path} is not whole; expected a folder that lj.save_adapters wrote.")
    rows, static = [], read_static(path)
    for name, shapes in read_shapes(path.absolute(), static).items():
        fields = static[name]
        kind = (
            "whole" if fields is None else f"r={shapes['a'].shape[-2]}, scale {fields['scale']:g}"
        )
        shown = " ".join("x".join(map(str, x.shape)) for x in shapes.values())
        size = sum(math.prod(x.shape) for x in shapes.values())
        itemsize = np.dtype(next(iter(shapes.values())).dtype).itemsize
        rows.append((name, kind, shown, size, size * itemsize))
    _arrays("weight", rows, reporter)


def peft_adapter(path: Path, reporter: Reporter) -> None:
    """Prints what a folder of PEFT holds; only the head of its weights is read."""
    options = read_object(path / "adapter_config.json")
    if not (path / _ADAPTER).is_file():
        names = sorted(file.name for file in path.iterdir())
        raise CliError(
            f"{path} lacks {_ADAPTER}; it has {', '.join(names)}. Pickles are not read, for "
            "opening one runs whatever code it holds: save the adapter again with peft."
        )
    headers = safetensors_headers(path / _ADAPTER)
    reporter.facts("options", _examples(options, most=None))
    reporter.event("config", **options)
    _modules(headers, reporter)
    _tensors(headers, reporter)


def _modules(headers: Sequence[Header], reporter: Reporter) -> None:
    """Prints the modules that have an adapter, by the last part of their names.

    Two parameters of one module have an adapter inside the other's. Of experts in one parameter, a
    factor has the rows of all.
    """
    ranks: dict[str, list[int]] = collections.defaultdict(list)
    module = r"(?:.*\.)?((?!base_layer\.)\w+)(?:\.base_layer)*"
    first = module + r"\.lora_(?:embedding_)?A(?:\.\w+)*"
    for header in headers:
        match = re.fullmatch(first, header.name)
        if match and header.shape:
            ranks[match[1]].append(header.shape[0])
    rows = []
    for name, found in sorted(ranks.items()):
        shown = ", ".join(map(str, sorted(set(found))))
        together = " (of all experts together)" if name == "experts" else ""
        rows.append((name, str(len(found)), shown + together))
        reporter.event("module", name=name, number=len(found), ranks=sorted(set(found)))
    if rows:
        reporter.say()
        reporter.table(("module", "adapted", "rank"), rows)


# Files.


def safetensors_file(path: Path, reporter: Reporter) -> None:
    """Prints the tensors of one file."""
    headers = safetensors_headers(path)
    _stored(headers, reporter)
    _tensors(headers, reporter)


def _tensors(headers: Sequence[Header], reporter: Reporter) -> None:
    rows = [
        (x.name, x.kind, "x".join(map(str, x.shape)), math.prod(x.shape), x.nbytes)
        for x in sorted(headers)
    ]
    _arrays("tensor", rows, reporter)


def _arrays(what: str, rows: Sequence[tuple], reporter: Reporter) -> None:
    """A table of arrays: name, kind, shapes in words, parameters, bytes."""
    for name, kind, shown, parameters, _ in rows:
        reporter.event(what, name=name, kind=kind, shapes=shown, parameters=parameters)
    reporter.say()
    table = [(*words, f"{number:,}", mebibytes(size)) for *words, number, size in rows]
    reporter.table((what, "kind", "shapes", "parameters", "MiB"), table)
    parameters, size = (sum(column) for column in zip((0, 0), *(x[3:] for x in rows), strict=True))
    reporter.say(f"{parameters:,} parameters, {mebibytes(size)} MiB.")
    reporter.event("total", parameters=parameters, bytes=size)


def records(path: Path, reporter: Reporter) -> None:
    """Prints how many records a file has, and the columns and values of the first."""
    found = read_records(path)
    first = found[0].fields
    reporter.facts(f"{len(found):,} records, of which the first is", _examples(first))
    reporter.event("records", number=len(found), columns=list(first), first=dict(first))


def _examples(fields: Mapping[str, Any], most: int | None = _WIDTH) -> Iterable[tuple[str, str]]:
    """Names and values, each on one line, and values cut where they are longer than most."""
    for name, value in fields.items():
        text = json.dumps(value, ensure_ascii=most is None, default=str)
        text = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
        yield plain(name), text if text.isprintable() else ascii(text)


INSPECTED: Mapping[str, Callable[[Path, Reporter], None]] = {
    "run": run_folder,
    "adapter": saved_adapter,
    "peft": peft_adapter,
    "safetensors": safetensors_file,
    "data": records,
}
