"""`lora-jax inspect`: what a model, a run or an adapter holds, and what a rule would match."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import Positional, arg

from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.options import LogOptions, ModelOptions, at_least
from lora_jax.cli.parsing import read_object
from lora_jax.cli.problem import KERNELS, LAYOUT
from lora_jax.cli.report import Reporter, mebibytes
from lora_jax.cli.run_folder import RunFolder
from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import init_adapters, named_leaves, quantize
from lora_jax.formats import read_model
from lora_jax.formats.sources import SourceError, fetch


@dataclasses.dataclass(frozen=True)
class Subject:
    """What to look at, and what to try on it."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]] = ModelOptions.model
    """A model, as for finetune --model, or the folder of a run or of an adapter, ours or PEFT's."""
    base: Literal["nf4", "fp4", "int4", "af4", "float32"] = "float32"
    """How to store a model's kernels, as for finetune --base."""
    targets: str | None = None
    """Weights of a model to adapt: a regular expression, as for finetune --targets."""
    rank: int = 16
    """Rank of each adapter."""
    whole: tuple[str, ...] = ()
    """Weights to train whole: regular expressions."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints what there is: weights, shapes, how they are stored, counts and bytes.

        lora-jax inspect smollm2-135m-instruct --base nf4 --targets "attn/.*/kernel" --rank 8
        lora-jax inspect runs/mine

    Of a model the weights are listed as they would be stored and adapted; of a run its options, its
    outcome and its adapter.
    """

    subject: Subject
    output: LogOptions


def start(argv: Sequence[str]) -> Config:
    """Everything has a default."""
    return Config(Subject(), LogOptions())


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if there is no such thing, or it cannot be read.
    """
    reporter, path = Reporter(config.output.log), Path(config.subject.source)
    with sentences(SourceError, ValueError, OSError):
        if (path / "adapters.json").is_file():
            saved_adapter(path, reporter)
        elif (path / "adapter_config.json").is_file():
            peft_adapter(path, reporter)
        # A model's folder, too, has a config.json.
        elif RunFolder(path, "finetune").is_run and not any(path.glob("*.safetensors")):
            run_folder(path, reporter)
        else:
            model(config.subject, reporter)
    return 0


def model(subject: Subject, reporter: Reporter) -> None:
    """Prints a model's shape and weights, as they would be stored, with their adapters."""
    checkpoint = read_model(fetch(subject.source))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    params, special = jax.tree.map(like, checkpoint.params), checkpoint.special
    shape = {
        field.name: getattr(checkpoint.config, field.name)
        for field in dataclasses.fields(checkpoint.config)
        if field.name.startswith(("vocab", "dim", "mlp", "num", "head", "rope", "norm", "tied"))
    }
    facts = {"name": checkpoint.name, "sha256": checkpoint.digest, **shape}
    facts |= {"bos": special.bos, "eos": special.eos, "stop": checkpoint.stop}
    facts |= {"chat template": "yes" if checkpoint.chat_template else "no"}
    reporter.facts("model", facts.items())
    reporter.event("model", **facts)
    rules = (
        [] if subject.targets is None else [LoraRule(subject.targets, subject.rank, layout=LAYOUT)]
    )

    def trees(params: Any) -> tuple[Any, Any]:
        base = params
        packed = any(isinstance(leaf, QuantizedArray) for _, leaf in named_leaves(params))
        if subject.base != "float32" and not packed:
            base = quantize(params, KERNELS, kind=subject.base, layout=LAYOUT, flat=True)
        return base, init_adapters(jax.random.key(0), base, rules, train=subject.whole)

    reporter.plan(*jax.eval_shape(trees, params))  # shapes alone: nothing is computed


def run_folder(path: Path, reporter: Reporter) -> None:
    """Prints the options of a run, how far it came, and the adapter that it left."""
    folder = RunFolder(path, "finetune")
    options = read_object(path / "config.json")
    reporter.facts("options", ((name, json.dumps(value)) for name, value in options.items()))
    reporter.event("config", **options)
    records = folder.records()
    steps = [record for record in records if "loss" in record]
    if folder.is_finished:
        result = read_object(path / "result.json")
        reporter.facts("result", _flat(result))
        reporter.event("result", **result)
    else:
        done = steps[-1]["step"] if steps else 0
        reporter.say()
        reporter.say(f"It came to step {done} of {options['steps']}; {folder.resume} goes on.")
        reporter.event("unfinished", step=done)
    if (path / "checkpoint").is_dir():
        reporter.say()
        saved_adapter(path / "checkpoint", reporter)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values within values, one below the other."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def saved_adapter(path: Path, reporter: Reporter) -> None:
    """Prints what a folder of `lj.save_adapters` holds."""
    import orbax.checkpoint as ocp

    static = read_object(path / "adapters.json")["leaves"]
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.metadata((path / "arrays").absolute()).item_metadata.tree
    rows = []
    for name, fields in arrays.items():
        a = fields.get("a")
        kind = "whole" if a is None else f"r={a.shape[-2]}, scale {static[name]['scale']:g}"
        shapes = " ".join("x".join(map(str, x.shape)) for x in fields.values())
        dtype = next(iter(fields.values())).dtype
        rows.append((name, kind, shapes, np.dtype(dtype), [x.shape for x in fields.values()]))
    _arrays("weight", rows, reporter)


def peft_adapter(path: Path, reporter: Reporter) -> None:
    """Prints what a folder of PEFT holds; only the head of its weights is read."""
    import safetensors

    options = read_object(path / "adapter_config.json")
    reporter.facts("options", ((name, json.dumps(value)) for name, value in options.items()))
    reporter.event("config", **options)
    file, rows = path / "adapter_model.safetensors", []
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in sorted(tensors.keys()):
                one = tensors.get_slice(name)
                shape, kind = one.get_shape(), one.get_dtype()
                bits = int("".join(filter(str.isdigit, kind)) or 8)
                dtype = np.dtype(f"V{bits // 8}")
                rows.append((name, kind, "x".join(map(str, shape)), dtype, [shape]))
    except safetensors.SafetensorError as error:
        raise CliError(f"{file} is no safetensors file: {error}.") from None
    reporter.say()
    _arrays("tensor", rows, reporter)


def _arrays(what: str, rows: Sequence[tuple], reporter: Reporter) -> None:
    """A table of arrays: name, kind, shapes in words, dtype, shapes."""
    sizes = [sum(map(math.prod, shapes)) for *_, shapes in rows]
    table, total = [], 0
    for (name, kind, shown, dtype, _), size in zip(rows, sizes, strict=True):
        table.append((name, kind, shown, f"{size:,}", mebibytes(size * dtype.itemsize)))
        total += size * dtype.itemsize
        reporter.event(what, name=name, kind=kind, shapes=shown, parameters=size)
    reporter.table((what, "kind", "shapes", "parameters", "MiB"), table)
    reporter.say(f"{sum(sizes):,} parameters, {mebibytes(total)} MiB.")
    reporter.event("total", parameters=sum(sizes), bytes=total)
