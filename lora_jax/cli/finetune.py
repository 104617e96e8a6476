"""`lora-jax finetune`: QLoRA of a language model on labelled sentences, from model to picture."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax import data, train
from lora_jax.cli.failures import CliError, Interrupted, on_interrupt, sentences, writing
from lora_jax.cli.plot import plot_curves
from lora_jax.cli.report import Reporter
from lora_jax.cli.run_folder import RunFolder
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import init_adapters, quantize
from lora_jax.data import Batch, Example, Prompt
from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import SourceError, fetch
from lora_jax.models.decoder import Decoder
from lora_jax.train import Scores

KERNELS = r"layers/.*/kernel"  # what is stored in 4 bits
LAYOUT = "b i o"  # theirs: layers are scanned, and come first
EVALUATION_ROWS = 16  # more than in training, for no activations are kept

# What the published models are called where PEFT looks for them.
HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclasses.dataclass(frozen=True)
class Config:
    """QLoRA of a language model on labelled sentences; by default: is this headline satire?

    Sentences are split into training, validation and test by a hash of their text. What is learned
    is the answer to a question about each of them, one token long.
    """

    model: str = "smollm2-135m-instruct"
    """A name, pypi:NAME==VERSION/path/of/member, or the path of a GGUF file."""
    data: str = "satire-headlines"
    """The same for JSON lines such as {"text": "...", "label": 0}."""
    base: Literal["nf4", "fp4", "int4", "af4", "float32"] = "nf4"
    """How the layers' kernels are stored; 4-bit kinds are double-quantized."""
    targets: str = r"attn/.*/kernel"
    """The weights to adapt: a regular expression searched in their paths."""
    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    learning_rate: float = 3e-3
    """At its highest: it rises for a tenth of the steps, then falls to zero."""
    steps: int = 120
    """Updates in all."""
    rows: int = 3
    """Rows of a batch, each packed with several sentences."""
    length: int = 128
    """Tokens of a row."""
    before: str = "Satire? "
    """Text in front of each sentence."""
    after: str = "\nAnswer:"
    """Text behind it."""
    answers: tuple[str, ...] = (" No", " Yes")
    """What should follow for label 0, 1, ...; a single token each."""
    held_out: Literal["test", "validation"] = "test"
    """The split to evaluate on; options are to be chosen on validation."""
    examples: int = 512
    """How many examples of that split, at most."""
    save_every: int = 25
    """Steps between saves of the adapter."""
    seed: int = 0
    """Of the adapter's start and of the order of the examples."""
    out: Path | None = None
    """A new folder for the results; runs/finetune-<time>, if not given."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "length", "examples", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")

    @property
    def prompt(self) -> Prompt:
        """How the question is asked."""
        return Prompt(self.before, self.after, self.answers)

    @property
    def rule(self) -> LoraRule:
        """What is adapted."""
        return LoraRule(self.targets, self.rank, self.alpha, layout=LAYOUT)

    @property
    def optimizer(self) -> train.OptimizerConfig:
        """How it is trained."""
        return train.OptimizerConfig(self.steps, self.learning_rate)


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had, or the training diverges.
      Interrupted: on Ctrl-C or SIGTERM; the sentence says what was saved.
    """
    started = time.perf_counter()
    reporter = Reporter()
    with sentences(ValueError):
        rule, tx = config.rule, train.make_optimizer(config.optimizer)
    folder = RunFolder.create(
        config.out, "finetune", config, HUB_NAMES.get(config.model, config.model), (rule,)
    )
    with on_interrupt("nothing was trained yet"):
        reporter.say(f"Reading {config.model} and {config.data} ...")
        with sentences(SourceError, ValueError, OSError):
            problem = load(config)
            adapters = init_adapters(jax.random.key(config.seed), problem.base, [rule])
        reporter.say(
            f"{len(problem.training.examples):,} sentences to train on, "
            f"{len(problem.held_out.examples)} held out."
        )
        reporter.plan(problem.base, adapters, rule)
        score = train.scorer(train.answer_logits(problem.model, problem.answers))
        before = evaluate(reporter, folder, problem, score, adapters, "before")
    adapters, steps = fit(reporter, folder, problem, tx, adapters, config)
    with on_interrupt(f"the trained adapter is saved in {folder.path}"):
        after = evaluate(reporter, folder, problem, score, adapters, "after")
        majority = problem.held_out.majority
        reporter.scores(majority, before, after, len(problem.held_out.examples))
        reporter.examples(problem.held_out.examples[:5], config.answers, before, after)
        with writing(folder.path):
            plot_curves(
                folder.path / "curves.png",
                steps,
                title=f"{config.model}, {config.base} base, LoRA r={config.rank}",
                majority=majority,
                before=(before.accuracy, before.nll),
                after=(after.accuracy, after.nll),
            )
        seconds = time.perf_counter() - started
        result = {
            "accuracy": {"before": before.accuracy, "after": after.accuracy, "majority": majority},
            "nll": {"before": before.nll, "after": after.nll},
            "held_out_examples": len(problem.held_out.examples),
            "training_examples": steps[-1]["examples"],
            "training_tokens": sum(step["tokens"] for step in steps),
            "seconds": round(seconds, 1),
            "training_seconds": round(sum(step["seconds"] for step in steps), 1),
            "peak_rss_gib": peak_rss_gib(),
        }
        folder.write_json("result.json", result)
        memory = result["peak_rss_gib"]
        reporter.say()
        reporter.say(
            f"Done in {seconds // 60:.0f} min {seconds % 60:.0f} s"
            + (f" with at most {memory:.1f} GiB of memory" if memory else "")
            + f"; {folder.path} holds:"
        )
        reporter.say(folder.contents())
    return 0


class Task(NamedTuple):
    """Labelled sentences, as text and as a model reads them."""

    examples: list[Example]
    sequences: list[list[int]]
    labels: list[int]

    @classmethod
    def of(cls, examples: list[Example], tokenizer: data.Tokenizer, config: Config) -> Task:
        """Asks the config's question about each example."""
        labels = [example.label for example in examples]
        if not examples or not set(labels) <= set(range(len(config.answers))):
            raise ValueError(
                f"{config.data} gives {len(examples)} examples with labels {sorted(set(labels))} "
                f"for one of its splits; expected some, with labels below {len(config.answers)}"
            )
        return cls(examples, config.prompt.encode(tokenizer, examples, config.length), labels)

    @property
    def majority(self) -> float:
        """Share of the most frequent label."""
        return max(collections.Counter(self.labels).values()) / len(self.labels)

    def batches(self, order: Iterable[int], rows: int, length: int) -> Iterator[Batch]:
        """Packed batches of the examples in an order."""
        return data.pack(self.sequences, self.labels, order, rows=rows, length=length)


class Problem(NamedTuple):
    """All that is fixed before training.

    Attributes:
      model: the decoder.
      base: its frozen parameters.
      answers: the token of each label, int32 [C].
      training, held_out: the examples.
      length: tokens of a row.
    """

    model: Decoder
    base: Any
    answers: np.ndarray
    training: Task
    held_out: Task
    length: int


def load(config: Config) -> Problem:
    """Fetches, reads, quantizes and tokenizes."""
    model_path, data_path = fetch(config.model), fetch(config.data)
    checkpoint = read_gguf(model_path)
    splits = data.split_examples(data.read_examples(data_path))
    held_out = splits.test if config.held_out == "test" else splits.validation
    base = checkpoint.params
    if config.base != "float32":
        base = quantize(base, KERNELS, kind=config.base, layout=LAYOUT)
    return Problem(
        Decoder(checkpoint.config),
        jax.device_put(base),
        config.prompt.answer_tokens(checkpoint.tokenizer),
        Task.of(splits.train, checkpoint.tokenizer, config),
        Task.of(held_out[: config.examples], checkpoint.tokenizer, config),
        config.length,
    )


def evaluate(
    reporter: Reporter, folder: RunFolder, problem: Problem, score: Any, adapters: Any, when: str
) -> Scores:
    """Scores adapters on the held-out examples, and records it."""
    task = problem.held_out
    batches = list(task.batches(range(len(task.examples)), EVALUATION_ROWS, problem.length))
    with reporter.progress(f"evaluating, {when}", len(batches)) as advance:

        def watched() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                advance(int((batch.segment_ids > 0).sum()))

        scores = train.evaluate(score, problem.base, adapters, watched())
    folder.record(event=when, accuracy=scores.accuracy, nll=scores.nll)
    return scores


def fit(
    reporter: Reporter,
    folder: RunFolder,
    problem: Problem,
    tx: Any,
    adapters: Any,
    config: Config,
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains and saves, whatever ends it.

    Returns:
      The trained adapters, and one record a step.
    """
    task = problem.training
    order = data.shuffled(len(task.examples), config.seed)
    batches = list(itertools.islice(task.batches(order, config.rows, config.length), config.steps))
    loss_fn = train.answer_loss(problem.model, problem.answers)
    records: list[dict[str, Any]] = []
    seen, moment = 0, time.perf_counter()
    try:
        with reporter.progress("training", len(batches)) as advance:
            steps = train.train(loss_fn, problem.base, adapters, tx, batches)
            for batch, step in zip(batches, steps, strict=True):
                adapters, seen = step.adapters, seen + int(batch.weight.sum())
                tokens = int((batch.segment_ids > 0).sum())
                last, moment = moment, time.perf_counter()
                records.append(
                    {
                        "step": step.number,
                        "loss": step.loss,
                        **step.metrics,
                        "examples": seen,
                        "tokens": tokens,
                        "seconds": round(moment - last, 3),
                    }
                )
                folder.record(**records[-1])
                advance(tokens, loss=step.loss)
                if step.number % config.save_every == 0:
                    folder.save(adapters)
        folder.save(adapters)
    except train.Diverged as diverged:
        saved = "nothing was saved"
        if diverged.adapters is not None:
            folder.save(diverged.adapters)
            saved = f"the last good adapter is saved in {folder.path}"
        raise CliError(f"{diverged}; {saved}.", status=1) from None
    except Interrupted as interrupted:
        outcome = "nothing was trained yet"
        if records:
            folder.save(adapters)
            outcome = f"the adapter of step {len(records)} is saved in {folder.path}"
        raise Interrupted(interrupted.number, f"interrupted; {outcome}.") from None
    return adapters, records


def peak_rss_gib() -> float | None:
    """The most memory that the process has occupied, where the system says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
