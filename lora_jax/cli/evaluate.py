"""`lora-jax evaluate`: likelihood, accuracy and generations of a model and an adapter on data."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from lora_jax import data
from lora_jax.cli.attention import with_attention
from lora_jax.cli.failures import CliError, sentences, writing
from lora_jax.cli.generate import SamplingOptions
from lora_jax.cli.options import DataOptions, LogOptions, ModelOptions, at_least
from lora_jax.cli.parsing import from_run, given
from lora_jax.cli.problem import Model, Split, load_adapted, load_data
from lora_jax.cli.report import Reporter, peak_gib
from lora_jax.cli.scoring import LabelScorer, make_scorer
from lora_jax.generate import generate


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and how much of it."""

    adapter: Path | None = None
    """The folder of a run, whose model, data and task are then the defaults, or a saved adapter."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Which records: those that a run split off --data, or all that are in it."""
    examples: int | None = None
    """The most records; all, if not given."""
    evaluation_rows: int = 16
    """Rows of a batch."""
    generations: Path | None = None
    """A new JSONL file: of each record the prompt, the reference and what the model writes."""
    out: Path | None = None
    """A JSON file for the numbers."""

    def __post_init__(self) -> None:
        at_least(self, 1, "examples", "evaluation_rows")


@dataclasses.dataclass(frozen=True)
class Config:
    """Scores a model, with or without an adapter, on data: NLL, perplexity and accuracy.

        lora-jax evaluate --adapter runs/mine
        lora-jax evaluate --adapter runs/mine --data other.jsonl --generations written.jsonl
        lora-jax evaluate --data book.txt --task text

    NLL is in nats, the mean over the tokens that training would learn. In a classification it is
    that of the right label among the labels, the likeliest of which is the answer.
    """

    evaluation: EvaluateOptions
    model: ModelOptions
    data: DataOptions
    sampling: SamplingOptions
    output: LogOptions


def start(argv: Sequence[str]) -> Config:
    """The options of the adapter's run, if it has one."""
    folder = given(argv, "adapter")
    model, records = ModelOptions.of_run(folder), from_run(DataOptions, folder)
    # A run's own records have been split already; those of another file are all new.
    own = records is not None and given(argv, "data") in (None, records.data)
    return Config(
        EvaluateOptions(split="test" if own else "all"),
        model,
        records or DataOptions(data=tyro.MISSING, task=tyro.MISSING),
        SamplingOptions(),
        LogOptions(),
    )


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had.
      Interrupted: on Ctrl-C or SIGTERM.
    """
    started, options = time.perf_counter(), config.evaluation
    reporter = Reporter(config.output.log)
    if options.generations is not None:
        if config.data.task == "text":
            raise CliError("a text has no prompt to write on from; leave out --generations.")
        if options.generations.exists():
            raise CliError(f"{options.generations} exists; write --generations with a new file.")
    reporter.say(f"Reading {config.model.model} and {config.data.data} ...")
    model, adapters = load_adapted(config.model, options.adapter)
    task, split = load_records(config, model)
    reporter.say(f"{options.split}  {split.encoded}")
    rows, length, pack = options.evaluation_rows, config.data.length, config.data.pack
    scored = model
    if not isinstance(task, data.Classification):  # whose labels are read behind a cache
        scored = with_attention(model, config.model, config.data, reporter)
    scorer = make_scorer(scored, task, split, rows=rows, length=length, pack=pack)
    with reporter.progress("evaluating", scorer.rounds()) as rounds:
        metrics = scorer(adapters, rounds.advance).metrics
    result = {
        "split": options.split,
        "records": len(split.sequences),
        **({"majority": scorer.majority()} if isinstance(scorer, LabelScorer) else {}),
        **metrics,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": peak_gib(),
    }
    reporter.say()
    numbers = [name for name in result if name not in ("split", "seconds", "peak_gib")]
    shown = [f"{result[n]:,}" if n == "records" else f"{result[n]:.4g}" for n in numbers]
    reporter.table(("split", *numbers), [(options.split, *shown)])
    reporter.event("evaluated", **result)
    if options.out is not None:
        with writing(options.out, "write another --out."):
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.generations is not None:
        write_generations(config, model, adapters, task, split, reporter)
    return 0


def load_records(config: Config, model: Model) -> tuple[data.Task, Split]:
    """The task, and the records to evaluate."""
    options, most = config.evaluation, config.evaluation.examples
    if options.split == "all":
        whole = dataclasses.replace(
            config.data, validation=0.0, test=0.0, validation_data=None, test_data=None
        )
        loaded = load_data(whole, model)
        return loaded.task, loaded.train.first(most)
    loaded = load_data(config.data, model)
    split = getattr(loaded, options.split)
    if split is None:
        raise CliError(
            f"there are no records for {options.split}; write --{options.split} with a share of "
            f"--data, --{options.split}-data with a file, or --split all."
        )
    return loaded.task, split.first(most)


def write_generations(
    config: Config,
    model: Model,
    adapters: Any,
    task: data.Task,
    split: Split,
    reporter: Reporter,
) -> None:
    """Lets the model write on from each prompt, and puts it into a file, line by line."""
    path, options, rows = config.evaluation.generations, config.sampling, config.evaluation
    assert path is not None
    records = [split.records[one.record] for one in split.sequences]
    with sentences(ValueError):
        prompts = data.encode_prompts(
            task, records, model.tokenizer, model.special, max_length=config.data.length
        )
    # Where nothing is drawn, the same prompt is continued in the same way: once is enough.
    keys = [(place if options.temperature else 0, tuple(p)) for place, p in enumerate(prompts)]
    distinct: list[tuple[int, tuple[int, ...]]] = list(dict.fromkeys(keys))
    found: dict[tuple[int, tuple[int, ...]], str] = {}
    decode = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
    number, key = rows.evaluation_rows, jax.random.key(options.seed)
    with reporter.progress("writing", -(-len(distinct) // number)) as rounds:
        for index in range(0, len(distinct), number):
            part = distinct[index : index + number]
            with sentences(ValueError):
                written = generate(
                    model.decoder,
                    model.base,
                    adapters,
                    [prompt for _, prompt in part],
                    max_tokens=options.max_tokens,
                    eos=model.checkpoint.stop,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    key=jax.random.fold_in(key, index),
                    rows=number,
                )
            found.update(zip(part, map(decode, written), strict=True))
            rounds.advance(sum(map(len, written)))
    with writing(path, "write another --generations."), path.open("x", encoding="utf-8") as file:
        for record, asked in zip(records, keys, strict=True):
            line = {
                "prompt": task.prompt_of(record),
                "reference": reference(task, record),
                "generated": found[asked],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    reporter.say(f"{path} has {len(records):,} generations.")


def reference(task: data.Task, record: data.Record) -> str:
    """What the record says that the model should write."""
    match task:
        case data.Classification():
            return task.texts[task.label_of(record)]
        case data.Completion():
            return task.completion_of(record)
        case data.Chat():
            said = [m for m in task.messages_of(record) if m["role"] == "assistant"]
            return str(said[-1].get("content", ""))
    raise TypeError(f"{type(task).__name__} has no reference")
