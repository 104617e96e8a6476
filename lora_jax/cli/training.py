"""A run: what it is made of, its training, its test.

The loop is `lj.train.fit`, and what goes into it comes from the same functions that a loop of your
own would call. All that is added here is where things go.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import data, memory, train
from lora_jax.cli.attention import with_attention
from lora_jax.cli.failures import CliError, Stop, sentences, stoppable
from lora_jax.cli.parsing import to_json
from lora_jax.cli.problem import KERNELS, Model, Split, load_data, load_model, rules_for
from lora_jax.cli.report import Reporter, Rounds, shown
from lora_jax.cli.run_config import Config
from lora_jax.cli.run_folder import RunFolder
from lora_jax.cli.scoring import LabelScorer, Scorer, Scores, make_scorer
from lora_jax.core.leaves import Adapter
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import init_adapters
from lora_jax.models.config import DecoderConfig

# Options that say where things are, or how they are computed or kept, and not what is learned.
UNIDENTIFYING = (
    *("model", "data", "validation_data", "test_data", "test", "test_examples", "compare"),
    *("attention", "evaluation_rows", "save_every", "keep"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is fixed before training.

    Attributes:
      config: the options.
      model: the model.
      rules: what is adapted.
      adapters: to start from.
      among: the tokens to choose from in training; None for all.
      training: what is learned from.
      validation, test: what it is measured on; None for what is not to be.
    """

    config: Config
    model: Model
    rules: Sequence[LoraRule]
    adapters: Any
    among: list[int] | None
    training: Split
    validation: Scorer | None
    test: Scorer | None

    @classmethod
    def load(cls, config: Config, reporter: Reporter) -> Problem:
        """Fetches, reads, quantizes, splits and tokenizes, and says what came of it."""
        reporter.say(f"Reading {config.model.model} and {config.data.data} ...")
        model = load_model(config.model)
        options = config.evaluation
        found = load_data(
            config.data, model, most=(options.validation_examples, options.test_examples)
        )
        config = dataclasses.replace(config, data=found.options)
        with sentences(ValueError):
            rules = rules_for(config.rule, model.base)
            adapters = starting_adapters(config, model.base, rules)
        splits = {"train": found.train, "validation": found.validation, "test": found.test}
        for name, split in splits.items():
            if split is not None:
                reporter.say(f"{name:<10}  {split.encoded}.")
                reporter.event("data", split=name, **split.numbers())
        reporter.plan(model.base, adapters)
        model = with_attention(model, config.model, config.data, reporter)
        if config.model.remat == "auto":
            model = _with_policy_that_fits(model, config, reporter)

        def scorer(split: Split | None) -> Scorer | None:
            if split is None:
                return None
            rows, length, pack = options.evaluation_rows, config.data.length, config.data.pack
            return make_scorer(model, found.task, split, rows=rows, length=length, pack=pack)

        among = None
        if isinstance(found.task, data.Classification) and config.training.among_labels:
            labels = found.task.label_tokens(model.tokenizer, model.special)
            if all(len(label) == 1 for label in labels):
                among = [token for [token] in labels]
            else:
                reporter.say("Labels have several tokens, so they are learned as any text is.")
        validation, test = scorer(found.validation), scorer(found.test)
        return cls(config, model, rules, adapters, among, found.train, validation, test)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the options that matter, model and data by content."""
        options = to_json(self.config)
        splits = {"training data": self.training}
        if self.validation is not None:
            splits["validation data"] = self.validation.split
        return {
            **{name: value for name, value in options.items() if name not in UNIDENTIFYING},
            "model": self.model.checkpoint.digest,
            **{name: split.digest() for name, split in splits.items()},
        }


def starting_adapters(config: Config, base: Any, rules: Sequence[LoraRule]) -> Any:
    """The adapters of a run before its first step.

    Raises:
      ValueError: as `init_adapters`; or if their scale is no positive number.
    """
    options = config.adapter
    if not 0 < options.init_scale < math.inf:
        raise ValueError(f"init_scale is {options.init_scale}, expected a positive number")
    key = jax.random.key(config.training.seed)
    adapters = init_adapters(key, base, rules, train=options.whole)
    if options.init_scale == 1:
        return adapters

    def scaled(leaf: Any) -> Any:
        # What is trained whole stays what it is.
        is_adapter = isinstance(leaf, Adapter)
        return dataclasses.replace(leaf, a=options.init_scale * leaf.a) if is_adapter else leaf

    return jax.tree.map(scaled, adapters, is_leaf=lambda x: isinstance(x, Adapter))


def memory_setup(config: Config, shape: DecoderConfig, **options: Any) -> memory.Setup:
    """A step of a run, as far as its memory depends on it.

    Raises:
      ValueError: if no memory is foretold for it.
    """
    dense = config.model.base in ("float32", "bfloat16")
    setup = memory.Setup(
        shape,
        method="lora" if dense else "qlora",
        rank=config.adapter.rank,
        targets=config.adapter.targets,
        batch=config.training.rows,
        length=config.data.length,
        accumulate=config.training.accumulate,
        scan=shape.scan_layers,
        chunk=512,
        attention=shape.attention,
        kind="nf4" if dense else config.model.base,
        quantized=KERNELS,
        dtype=shape.dtype,
        param_dtype=config.model.base if dense else "float32",
        fold=jax.default_backend() == "gpu",
    )
    return dataclasses.replace(setup, **options)


def _with_policy_that_fits(model: Model, config: Config, reporter: Reporter) -> Model:
    """The model with the policy that repeats least and still fits the device.

    Raises:
      CliError: if none fits.
    """
    with sentences(ValueError):
        policy = memory.auto_remat(memory_setup(config, model.decoder.config))
    reporter.say(f"--remat auto is {policy} here.")
    reporter.event("remat", policy=policy)
    return model.running(remat=policy)


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Tells the run's folder and whoever watches how the training goes.

    Attributes:
      folder: where every number is kept.
      reporter: to whom it is told.
      rounds: how far it has come.
      validation: what an evaluation scores on; None if there is none.
      stop: whether somebody has asked to stop.
    """

    folder: RunFolder
    reporter: Reporter
    rounds: Rounds
    validation: Scorer | None
    stop: Stop

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps the numbers of a step, or of an evaluation."""
        if "loss" in metrics:
            seconds = self.rounds.advance(metrics["tokens"], loss=metrics["loss"])
            record = {"step": step, **metrics, "seconds": round(seconds, 3)}
        else:
            self.rounds.pause()
            record = {"step": step, **metrics}
            numbers = (f"{name} {shown(name, value)}" for name, value in metrics.items())
            self.reporter.say(f"step {step}: {', '.join(numbers)}")
        self.folder.record(**record)
        self.reporter.event("step" if "loss" in metrics else "validation", **record)

    def evaluate(self, adapters: Any) -> dict[str, float]:
        """The numbers of an evaluation, which ends early if somebody asks to stop."""
        assert self.validation is not None
        return self.validation(adapters, lambda tokens: self.stop.check()).metrics


def fit(problem: Problem, folder: RunFolder, reporter: Reporter) -> train.Fitted:
    """Trains, goes on where it was stopped, and saves the adapter.

    Raises:
      CliError: if the folder's checkpoint is of another run, nothing can be written to the disk, or
        the training diverges.
      Interrupted: if somebody asked to stop; everything is saved then.
    """
    config, model, options = problem.config, problem.model, problem.config.training
    checkpoints = folder.checkpoints(config.run.save_every, config.run.keep, problem.identity())
    with folder.writing(), sentences(ValueError), checkpoints.opened() as store:
        found = store.find()
    done = 0 if found is None else found.step
    folder.rewind(done)
    if not done:
        folder.write_config(config)  # with the labels that were found
    batches = data.training_batches(
        problem.training.sequences,
        rows=options.rows,
        length=config.data.length,
        seed=options.seed,
        pack=config.data.pack,
        workers=options.workers,
    )
    loss_fn = train.next_token_loss(
        model.decoder,
        label_smoothing=options.label_smoothing,
        perturb=train.neftune(options.neftune) if options.neftune else None,
        among=problem.among,
    )
    evaluation: dict[str, Any] = {}
    with stoppable() as stop, reporter.progress("training", options.steps, done=done) as rounds:
        watcher = Watcher(folder, reporter, rounds, problem.validation, stop)
        if problem.validation is not None:
            monitor = config.evaluation.monitor
            evaluation = {
                "evaluate_every": config.evaluation.evaluate_every,
                "eval_fn": watcher.evaluate,
                "monitor": monitor,
                "mode": "min" if monitor == "nll" else "max",
                "patience": config.evaluation.patience,
            }
        try:
            with folder.writing():
                fitted = train.fit(
                    loss_fn,
                    model.base,
                    problem.adapters,
                    train.make_optimizer(config.optimizer),
                    batches,
                    key=jax.random.key(options.seed),
                    steps=options.steps,
                    accumulate=options.accumulate,
                    on_metrics=watcher.on_metrics,
                    checkpoints=checkpoints,
                    stop=stop,
                    **evaluation,
                )
        except train.Diverged as diverged:
            kept = "nothing was saved"
            if diverged.adapters is not None:
                folder.save(diverged.adapters, problem.rules, model.hub_name)
                kept = f"the last good adapter is saved in {folder.path}"
            raise CliError(f"{diverged}; {kept}.", status=1) from None
        folder.complete(fitted.history)
        folder.save(fitted.adapters, problem.rules, model.hub_name)
        stop.check()
    return fitted


def summary(problem: Problem, folder: RunFolder, fitted: train.Fitted) -> dict[str, Any]:
    """The training in a few numbers."""
    steps = [record for record in folder.records() if "loss" in record]
    return {
        "steps": fitted.step,
        "stopped": fitted.stopped,
        "best_step": fitted.best_step,
        "validation": fitted.best_metrics,
        "training": {
            "records": len(problem.training.records),
            "tokens": int(sum(record["tokens"] for record in steps)),
            "seconds": round(sum(record.get("seconds", 0.0) for record in steps), 1),
        },
    }


def test(
    problem: Problem, folder: RunFolder, reporter: Reporter, adapters: Any
) -> dict[str, Any] | None:
    """Reads the test, once: scores the trained adapters, and the model as it was."""
    scorer = problem.test
    if scorer is None:
        return None
    trees = {"before": None, "after": adapters}
    if not problem.config.evaluation.compare:
        del trees["before"]
    scores: dict[str, Scores] = {}
    for when, tree in trees.items():
        with reporter.progress(f"testing, {when}", scorer.rounds()) as rounds:
            scores[when] = scorer(tree, rounds.advance)
        folder.record(test=when, **scores[when].metrics)
        reporter.event("test", when=when, **scores[when].metrics)
    majority = {"majority": scorer.majority()} if isinstance(scorer, LabelScorer) else {}
    number = len(scorer.split.sequences)
    reporter.scores(number, {when: one.metrics for when, one in scores.items()}, **majority)
    if isinstance(scorer, LabelScorer):
        rows = scorer.answers(list(scores.values()), 5)
        reporter.say()
        reporter.table((f"the first {len(rows)} of them", "truth", *scores), rows)
    metrics = {when: one.metrics for when, one in scores.items()}
    return {"records": number, **majority, **metrics}
