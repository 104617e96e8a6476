"""A sweep: what its runs are made of, how many fit side by side, their training and their test.

A run is what `lora-jax finetune` would train, and comes from the same functions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import data, memory, sweep, train
from lora_jax.cli.environment import free_bytes
from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.memory import bytes_of
from lora_jax.cli.problem import Model, rules_for
from lora_jax.cli.report import Reporter
from lora_jax.cli.run_folder import RunFolder
from lora_jax.cli.sweep_board import Board
from lora_jax.cli.sweep_config import Config, Run
from lora_jax.cli.training import Problem, memory_setup, starting_adapters
from lora_jax.core.rules import LoraRule
from lora_jax.sweep import padding
from lora_jax.sweep.fields import with_fields

MOST_ON_CPU = 8  # runs at once
CHUNK = 512  # positions whose logits are held at once, those of all runs together
# Fields of a run that are its optimizer's, and which of these have a program for each value.
RATES = ("learning_rate", "schedule", "warmup", "weight_decay", "clip", "lora_plus_ratio")
UNTRACED = ("lora_plus_ratio",)


@dataclasses.dataclass(frozen=True)
class SweepProblem:
    """All that is fixed before training.

    Attributes:
      config: the options, with the labels that were found.
      runs: the runs.
      one: the largest of them, with model, data and scorers.
      model: the model as the runs train on it.
    """

    config: Config
    runs: Sequence[Run]
    one: Problem
    model: Model

    @classmethod
    def load(cls, config: Config, runs: Sequence[Run], reporter: Reporter) -> SweepProblem:
        """Fetches, reads, quantizes, splits and tokenizes, and says what came of it."""
        largest = config.of_run(max(runs, key=lambda run: run.rank))
        automatic = config.model.remat == "auto"
        if automatic:  # "products" repeats least, and more of the others at once is no faster
            options = dataclasses.replace(config.model, remat="products")
            largest = dataclasses.replace(largest, model=options)
        one = Problem.load(largest, reporter)
        config, model = dataclasses.replace(config, data=one.config.data), one.model
        problem = cls(config, runs, one, model)
        if automatic and config.sweep.at_once is not None:
            with sentences(ValueError):
                setup = problem.setup(runs[0], config.sweep.at_once)
                policy = memory.auto_remat(setup, problem.limit())
            reporter.say(f"--remat auto is {policy} here.")
            return dataclasses.replace(problem, model=model.running(remat=policy))
        return problem

    def setup(self, run: Run, at_once: int) -> memory.Setup:
        """A step of several runs like this one, as far as its memory depends on it."""
        shape, rows = self.model.decoder.config, self.config.training.rows
        own = self.config.of_run(run)
        return memory_setup(own, shape, batch=rows * at_once, remat=shape.remat, chunk=CHUNK)

    def limit(self) -> int | None:
        """Bytes that there are; None where nobody can tell."""
        if self.config.sweep.device_memory is not None:
            with sentences(ValueError):
                return bytes_of(self.config.sweep.device_memory)
        on_cpu = jax.default_backend() == "cpu"
        return free_bytes() if on_cpu else memory.device_bytes()

    # The plan.

    def plan(self) -> sweep.Plan:
        """Programs of all their runs at once.

        Raises:
          CliError: if there are no runs, two are the same, or one cannot be.
        """
        steps = self.config.training.steps
        # A share that is a whole number of steps is one after it was traced in float32, too.
        runs = [
            dataclasses.replace(run, warmup=round(run.warmup * steps) / steps) for run in self.runs
        ]
        optimizer = self.config.of_run(runs[0]).optimizer

        def make_adapters(run: Run) -> Any:
            return starting_adapters(self.config.of_run(run), self.model.base, self.rules(run))

        def make_tx(run: Run) -> Any:
            rates = {name: getattr(run, name) for name in RATES}
            return train.make_optimizer(with_fields(optimizer, rates))

        with sentences(ValueError, TypeError):
            return sweep.plan(runs, make_adapters, make_tx, static=UNTRACED)

    def rules(self, run: Run) -> list[LoraRule]:
        """What is adapted in a run."""
        return rules_for(self.config.of_run(run).rule, self.model.base)

    def bytes_of(self, group: sweep.Group, at_once: int) -> int | None:
        """What a program takes, base included; None if that is not foretold for its policy."""
        largest = max((self.runs[k] for k in group.runs), key=lambda run: run.rank)
        try:
            alone = memory.predict(self.setup(largest, at_once)).needed
        except ValueError:
            return None
        return alone + (at_once - 1) * group.run_bytes

    def fitting(self, plan: sweep.Plan) -> sweep.Plan:
        """The plan with as many runs at once as asked for, or as fit.

        Raises:
          CliError: if those asked for do not fit, or not even one does.
        """
        wanted, limit = self.config.sweep.at_once, self.limit()
        on_cpu = jax.default_backend() == "cpu"
        groups = []
        for number, group in enumerate(plan.groups):
            runs = len(group.runs)
            first = most = min(runs, wanted or (MOST_ON_CPU if on_cpu else runs))
            while most > 1 and not self._fits(group, most, limit):
                most -= 1
            if not self._fits(group, most, limit) or (wanted and most < first):
                needed = self.bytes_of(group, first) or 0
                raise CliError(
                    f"program {number} needs about {needed / 2**30:.3g} GiB for {first} runs at "
                    f"once, and there are {(limit or 0) / 2**30:.3g}; "
                    + (
                        f"write --at-once {most}."
                        if self._fits(group, most, limit)
                        else "write fewer --rows, a shorter --length or --remat layer."
                    )
                )
            # Evenly, where a program is run several times.
            groups.append(
                dataclasses.replace(group, at_once=math.ceil(runs / math.ceil(runs / most)))
            )
        return dataclasses.replace(plan, groups=tuple(groups))

    def _fits(self, group: sweep.Group, at_once: int, limit: int | None) -> bool:
        needed = self.bytes_of(group, at_once)
        return limit is None or needed is None or needed <= limit

    def show(self, plan: sweep.Plan, reporter: Reporter) -> None:
        """Prints the plan."""
        rows = []
        for number, group in enumerate(plan.groups):
            needed = self.bytes_of(group, group.at_once)
            gib = "-" if needed is None else f"{needed / 2**30:.2f}"
            sizes = (len(group.runs), group.at_once, self.config.training.steps, group.rank)
            own = f"{group.run_bytes / 2**20:.1f}"
            rows.append((str(number), *map(str, sizes), own, gib))
            reporter.event(
                "program",
                number=number,
                runs=group.runs,
                at_once=group.at_once,
                rank=group.rank,
                run_bytes=group.run_bytes,
                bytes=needed,
            )
        columns = ("program", "runs", "at once", "steps", "largest rank", "MiB a run", "GiB in all")
        reporter.table(columns, rows)
        steps = len(self.runs) * self.config.training.steps
        rows_seen = steps * self.config.training.rows
        names = ", ".join(name.replace("_", " ") for name in plan.traced) or "nothing"
        reporter.say(
            f"{len(self.runs)} runs, {steps:,} steps, {rows_seen:,} rows of "
            f"{self.config.data.length} tokens; within a program differ: {names}."
        )
        reporter.say(
            "MiB are adapters, optimizer and gradient; GiB are foretold as for an NVIDIA GPU. The "
            "time that it takes is told as soon as the first steps are timed."
        )

    # The training.

    def fit(self, plan: sweep.Plan, folder: RunFolder, board: Board) -> list[sweep.Fitted]:
        """Trains all runs, and goes on where it was stopped.

        Raises:
          CliError: if the folder is of another sweep, or cannot be written.
        """
        config, evaluation = self.config, self.config.evaluation
        at_once = max(group.at_once for group in plan.groups)
        validation: dict[str, Any] = {}
        if self.one.validation is not None:
            validation = {
                "validation": self._validation_batches(
                    max(1, evaluation.evaluation_rows // at_once)
                ),
                "evaluate_every": evaluation.evaluate_every,
                "patience": evaluation.patience,
            }
        numbers = {run: number for number, run in enumerate(plan.runs)}
        with folder.writing(), sentences(ValueError), board.shown() as on_metrics:
            fitted = sweep.fit(
                self._loss_fn(max(1, CHUNK // at_once)),
                self.model.base,
                plan,
                self._batches(),
                make_key=lambda run: jax.random.key(run.seed),
                steps=config.training.steps,
                accumulate=config.training.accumulate,
                halving=halving(config),
                on_metrics=lambda run, *row: on_metrics(numbers[run], *row),
                folder=folder.path / "state",
                save_every=config.sweep.save_every,
                identity=self.identity(),
                **validation,
            )
        board.end([one.stopped for one in fitted])
        return [one._replace(run=run) for one, run in zip(fitted, self.runs, strict=True)]

    def identity(self) -> dict[str, Any]:
        """What a saved state must agree with, beside the plan: model and data by content."""
        found = self.one.identity()
        names = ("model", "training data", "validation data")
        return {name: found[name] for name in names if name in found}

    def _loss_fn(self, chunk: int) -> train.LossFn:
        options, among = self.config.training, self.one.among
        loss = functools.partial(
            train.next_token_loss, self.model.decoder, chunk=chunk, among=among
        )
        perturb = train.neftune(options.neftune) if options.neftune else None
        trained = loss(label_smoothing=options.label_smoothing, perturb=perturb)
        scored = loss()

        def loss_fn(adapters: Any, base: Any, batch: Any, key: Any) -> Any:
            # There is no key in evaluation, where nothing is smoothed either.
            return (scored if key is None else trained)(adapters, base, batch, key)

        return loss_fn

    def _batches(self) -> sweep.Batches:
        """Each run's own, in the order of its seed, as if it was alone."""
        options = self.config.training

        @functools.cache
        def of_seed(seed: int) -> Any:
            return data.training_batches(
                self.one.training.sequences,
                rows=options.rows,
                length=self.config.data.length,
                seed=seed,
                pack=self.config.data.pack,
                workers=options.workers,
            )

        return lambda run: of_seed(run.seed)

    def _validation_batches(self, rows: int) -> list[Any]:
        assert self.one.validation is not None
        sequences, length = self.one.validation.split.sequences, self.config.data.length
        return list(
            data.evaluation_batches(sequences, rows=rows, length=length, pack=self.config.data.pack)
        )

    # The test.

    def test(
        self, fitted: Sequence[sweep.Fitted], reporter: Reporter
    ) -> dict[int, dict[str, float]]:
        """Reads the test, once: scores every run that was not ended early, by its number."""
        scorer = self.one.test
        ended = ("diverged", "halved")
        trees = {k: x.adapters for k, x in enumerate(fitted) if x.stopped not in ended}
        if scorer is None or not trees:
            return {}
        like = padding.union(list(trees.values()))
        scores = {}
        with reporter.progress("testing", len(trees) * scorer.rounds()) as rounds:
            for number, tree in trees.items():
                # Of one shape, and with the scale as an array: all share a compiled program.
                own = padding.numbers_of(tree, like)
                alike = padding.of_run(padding.pad(tree, like), own, drops=False)
                scores[number] = scorer(alike, rounds.advance).metrics
        return scores


def halving(config: Config) -> sweep.Halving | None:
    """The option, if it is given.

    Raises:
      CliError: if it makes no sense.
    """
    if not config.sweep.halving:
        return None
    with sentences(ValueError):
        return sweep.Halving(config.sweep.halving, config.sweep.halving_keep)
