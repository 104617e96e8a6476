"""LoRA's Table 18 on a real model: what a higher rank buys, when each has its own learning rate.

    python experiments/rank_ablation/study.py h200 --data e2e-dataset.zip    # all, in this order:
      --stages tune     a learning rate for each rank, on validation; for full fine-tuning as well
      --stages main     8 ranks × 3 seeds over one bfloat16 base, 5 epochs, as one program
      --stages serial   some steps of each rank alone: what the 24 runs take one after another
      --stages bases    the same 24 on NF4, and on the file's own Q4_1
      --stages full     all weights instead, 3 seeds
      --stages test     BLEU and ROUGE-L of what each kept adapter writes for the 630 test sets
    python experiments/rank_ablation/study.py cpu --data e2e-dataset.zip     # small, in minutes
    python experiments/rank_ablation/report.py                               # tables and pictures

A stage that was killed goes on from its folder in `--out` when it is called again. What it found is
in results/<stage>.json. README.md says what came of it.

Of a seed all ranks see the same batches, so that what differs between them is the rank; between
seeds both the start and the order differ.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import tyro
from scores import Text, scores

import lora_jax as lj
from lora_jax import data, generate, sweep, train
from lora_jax.cli.environment import environment
from lora_jax.cli.options import Base, ModelOptions
from lora_jax.cli.problem import Model, load_model, rules_for
from lora_jax.data.batches import PackedBatches
from lora_jax.sweep import padding, results
from lora_jax.sweep.fields import with_fields
from lora_jax.sweep.tuning import chosen, tune

HERE = Path(__file__).parent
Stage = Literal["tune", "main", "serial", "bases", "full", "test"]
BASES: tuple[Base, ...] = ("nf4", "q4_1")
FULL = 0  # as a rank: all weights are trained
TOLD_EVERY = 250  # steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What differs between runs.

    Attributes:
      rank: of the adapters, or `FULL`.
      learning_rate: its highest value.
      seed: of start and order.
    """

    rank: int
    learning_rate: float
    seed: int


FIELDS = [field.name for field in dataclasses.fields(Run)]
# Options that say what is trained on what.
IDENTIFYING = ("targets", "alpha", "rows", "length", "warmup", "weight_decay", "clip", "dtype")


@dataclasses.dataclass(frozen=True)
class Config:
    """The study. Where it is not said otherwise, values are those of LoRA's for E2E."""

    data: Path
    """The E2E dataset, as its zip or as a folder with the CSV files."""
    model: str = ModelOptions.model
    """As for lora-jax finetune."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """What to do."""
    out: Path = Path("runs/rank_ablation")
    """Where runs are kept."""
    results: Path = HERE / "results"
    """Where numbers are written."""

    # What is learned.
    targets: str = r"attn/[qv]_proj/kernel"
    """The weights to adapt: queries and values."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank, with the same alpha for all ranks."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """To compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the main table."""
    epochs: float = 5.0
    """Of all stages but tune."""
    rows: int = 8
    """Of a batch: some 32 packed examples. LoRA's had 8."""
    length: int = 256
    """Tokens of a row; 93 % of a batch is no padding."""
    warmup: float = 0.05
    """Share of the steps; the learning rate falls linearly then. LoRA's was 500 steps."""
    weight_decay: float = 0.01
    """Of AdamW. There is neither dropout nor label smoothing, so that losses can be compared."""
    clip: float = 1.0
    """Largest norm of a gradient."""

    # How learning rates are chosen.
    tune_epochs: tuple[float, ...] = (1.0, 5.0)
    """First all learning rates for few epochs; then the best and its neighbours for longer."""
    tune_seeds: tuple[int, ...] = (10,)
    """None of the main table's."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """To begin with, for each rank. Where the best is at the edge, the grid grows there."""
    full_learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4)
    """The same of full fine-tuning."""

    # How it is run.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations. What is trained is float32."""
    at_once: int = 24
    """Runs of a program, side by side."""
    full_at_once: int = 4
    """The same of full fine-tuning."""
    chunk: int | None = 256
    """Positions of a run whose logits are held at once; None for all, which takes 10 GiB."""
    save_every: int | None = 1000
    """Steps."""
    serial_steps: int = 200
    """Of each rank alone."""
    max_tokens: int = 96
    """Of a generated text; the longest reference has 93 tokens."""
    generation_rows: int = 630
    """Texts that are written at once."""
    train_examples: int | None = None
    """None for all; of validation and test likewise."""
    validation_examples: int | None = None
    test_sets: int | None = None


# Minutes on a CPU. It shows that everything works, and says nothing about ranks.
CPU = Config(
    data=tyro.MISSING,
    out=Path("runs/rank_ablation_cpu"),
    results=Path("runs/rank_ablation_cpu/results"),
    ranks=(1, 8),
    seeds=(0, 1),
    epochs=1.0,
    rows=2,
    length=128,
    tune_epochs=(1.0,),
    learning_rates=(2e-3, 4e-3, 8e-3),
    full_learning_rates=(5e-5, 1e-4, 2e-4),
    dtype="float32",
    at_once=4,
    full_at_once=1,
    save_every=None,
    serial_steps=6,
    max_tokens=48,
    generation_rows=12,
    train_examples=32,
    validation_examples=16,
    test_sets=12,
)
PRESETS = {
    "h200": ("The study, on one H200.", Config(data=tyro.MISSING)),
    "cpu": ("A small one.", CPU),
}


# The data.


def read_split(source: Path, name: str) -> list[data.Record]:
    """A split of the E2E dataset.

    Args:
      source: the dataset's zip, or a folder with its CSV files.
      name: `trainset`, `devset` or `testset_w_refs`.

    Raises:
      ValueError: if there is no such file.
    """
    file = f"{name}.csv"
    if source.is_dir():
        return data.read_records(source / file)
    with zipfile.ZipFile(source) as archive:
        found = [member for member in archive.namelist() if Path(member).name == file]
        if not found:
            raise ValueError(f"{source} has no {file}; expected the E2E dataset, as README.md says")
        text = io.TextIOWrapper(archive.open(found[0]), "utf-8", newline="")
        rows = enumerate(csv.DictReader(text), 1)
        return [data.Record(row, f"{file}, record {number}") for number, row in rows]


def first_sets(records: Sequence[data.Record], number: int | None) -> list[data.Record]:
    """All records of the first sets of facts."""
    kept = list(dict.fromkeys(record.fields["mr"] for record in records))[:number]
    return [record for record in records if record.fields["mr"] in set(kept)]


# How long it takes.


class Clock:
    """Seconds of a step while runs are trained, without compiling, evaluating and saving.

    It is told what `fit` tells. A step is timed from one to the next of the same run, and what
    interrupts the training interrupts the clock; of saves, which are few and not told of, the
    median knows nothing.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._timed: Any = None  # the run by which steps are told
        self._last: Any = None  # the run that was told of last
        self._began: float | None = None

    def __call__(self, run: Any, step: int, metrics: dict[str, float]) -> None:
        """Takes note of a step."""
        # One run twice in a row: these are the steps of an earlier call, all told at once.
        is_new = self._last != run
        self._last = run
        if "loss" not in metrics:
            self._began = None
        elif self._timed in (None, run):
            self._timed, now = run, time.perf_counter()
            if is_new and self._began is not None:
                self.seconds.append(now - self._began)
            self._began = now if is_new else None

    def alone(self, step: int, metrics: dict[str, float]) -> None:
        """The same for a run that is alone, whose every step is news."""
        self._last = None
        self("it", step, metrics)

    def summary(self) -> dict[str, float] | None:
        """Median and mean; None if too few steps were timed."""
        steady = self.seconds[2:]  # the first may wait for what was compiled
        if len(steady) < 3:
            return None
        return {
            "steps_timed": len(steady),
            "seconds_a_step": statistics.median(steady),
            "seconds_a_step_mean": statistics.fmean(steady),
        }


# The study.


@dataclasses.dataclass(frozen=True)
class Study:
    """All that is fixed before a stage.

    Attributes:
      config: the options.
      models: from how kernels are stored to the model.
      task: what is asked of it.
      training: sequences.
      validation: batches.
      test: records; those of one set of facts have it in common.
    """

    config: Config
    models: Callable[[Base], Model]
    task: data.Task
    training: Sequence[data.Encoded]
    validation: Sequence[data.Batch]
    test: Sequence[data.Record]

    @classmethod
    def load(cls, config: Config, models: Callable[[Base], Model]) -> Study:
        """Reads and encodes the data."""
        task = data.Completion("{mr}\n", "{ref}")
        model = models("bfloat16")

        def encoded(name: str, number: int | None) -> list[data.Encoded]:
            records = read_split(config.data, name)[:number]
            return data.encode_all(
                task, records, model.tokenizer, model.special, max_length=config.length
            ).sequences

        training = encoded("trainset", config.train_examples)
        validation = data.evaluation_batches(
            encoded("devset", config.validation_examples), rows=config.rows, length=config.length
        )
        test = first_sets(read_split(config.data, "testset_w_refs"), config.test_sets)
        return cls(config, models, task, training, validation, test)

    def steps(self, epochs: float) -> int:
        """Batches that hold so many epochs in the order of seed 0; other orders differ by few."""
        shape = {"rows": self.config.rows, "length": self.config.length}
        whole = PackedBatches(self.training, **shape, seed=0, epochs=math.ceil(epochs))
        return max(1, round(len(whole) * epochs / math.ceil(epochs)))

    def adapters(self, run: Run, base: Any) -> Any:
        """What a run starts from."""
        key = jax.random.key(run.seed)
        if run.rank == FULL:
            return lj.init_adapters(key, base, [], train=".")
        rule = lj.LoraRule(self.config.targets, rank=run.rank, alpha=self.config.alpha)
        return lj.init_adapters(key, base, rules_for(rule, base))

    def parameters(self, run: Run, base: Any) -> int:
        """How many a run trains."""
        shapes = jax.eval_shape(lambda: self.adapters(run, base))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    def optimizer(self, run: Run, steps: int) -> Any:
        """AdamW, with a learning rate that may be traced."""
        config = train.OptimizerConfig(
            steps,
            learning_rate=1.0,
            schedule="linear",
            warmup=self.config.warmup,
            weight_decay=self.config.weight_decay,
            clip=self.config.clip,
        )
        return train.make_optimizer(with_fields(config, {"learning_rate": run.learning_rate}))

    def batches(self, run: Run) -> Any:
        """Those of a run's seed."""
        shape = {"rows": self.config.rows, "length": self.config.length}
        return data.training_batches(self.training, **shape, seed=run.seed)

    def loss_fn(self, model: Model) -> train.LossFn:
        """Of the next token of a description."""
        return train.next_token_loss(model.decoder, chunk=self.config.chunk)

    def fit(
        self,
        name: str,
        runs: Sequence[Run],
        *,
        epochs: float,
        base: Base = "bfloat16",
        evaluations: int = 1,
        on_metrics: Callable[..., None] | None = None,
    ) -> list[sweep.Fitted]:
        """Trains runs side by side; from where they are, if their folder has them."""
        config, model, steps = self.config, self.models(base), self.steps(epochs)
        most = config.full_at_once if runs[0].rank == FULL else config.at_once
        plan = sweep.plan(
            runs,
            lambda run: self.adapters(run, model.base),
            lambda run: self.optimizer(run, steps),
            at_once=min(most, len(runs)),
        )
        print(f"{name}: {len(runs)} runs of {steps:,} steps\n{plan}", flush=True)

        def tell(run: Run, step: int, metrics: dict[str, float]) -> None:
            if on_metrics is not None:
                on_metrics(run, step, metrics)
            if run == runs[0] and step % TOLD_EVERY == 0 and "loss" in metrics:
                print(f"{name}: step {step:,} at {time.perf_counter() - began:.0f} s", flush=True)

        began = time.perf_counter()
        return sweep.fit(
            self.loss_fn(model),
            model.base,
            plan,
            self.batches,
            make_key=lambda run: jax.random.key(run.seed),
            steps=steps,
            validation=self.validation,
            evaluate_every=math.ceil(steps / evaluations),
            on_metrics=tell,
            folder=config.out / name,
            save_every=config.save_every,
            identity={
                "base": base,
                "model": model.checkpoint.digest,
                "data": digest(self.training),
                **{option: getattr(config, option) for option in IDENTIFYING},
            },
        )

    # The stages.

    def tune(self) -> None:
        """Writes the best learning rate of each rank, and of full fine-tuning."""
        config = self.config
        grids = {
            "tune": (config.ranks, config.learning_rates),
            "tune_full": ((FULL,), config.full_learning_rates),
        }
        for name, (ranks, rates) in grids.items():
            runs = [Run(r, rate, s) for r in ranks for rate in rates for s in config.tune_seeds]
            for epochs in config.tune_epochs:
                best = self._tuned(f"{name}_{epochs:g}", runs, epochs)
                print(f"{name}, {epochs:g} epochs: {best}", flush=True)
                runs = [
                    Run(rank, rate * factor, seed)
                    for rank, rate in best.items()
                    for factor in (0.5, 1.0, 2.0)
                    for seed in config.tune_seeds
                ]

    def _tuned(self, name: str, runs: Sequence[Run], epochs: float) -> dict[int, float]:
        """The best learning rate of each rank, from a file if this was found out before."""
        config = described(self.config)
        found = self._read(name)
        if found is None or any(found["config"][x] != config[x] for x in IDENTIFYING):
            rows = tune(
                functools.partial(self._tuning_rows, name, epochs), runs, metric="validation_loss"
            )
            best = chosen(rows, FIELDS, metric="validation_loss", over="learning_rate")
            of_rank = {x.cell.rows[0]["rank"]: x.cell.rows[0]["learning_rate"] for x in best}
            self._write(name, rows=rows, best=of_rank, epochs=epochs)
            found = self._read(name)
        assert found is not None
        return {int(rank): rate for rank, rate in found["best"].items()}

    def _tuning_rows(
        self, name: str, epochs: float, runs: Sequence[Run], number: int
    ) -> list[dict]:
        return results.result_rows(self.fit(f"{name}_{number}", runs, epochs=epochs))

    def tuned(self, *, full: bool = False) -> list[Run]:
        """The runs of a table, at the learning rates that `tune` wrote."""
        name = f"{'tune_full' if full else 'tune'}_{self.config.tune_epochs[-1]:g}"
        found = self._read(name)
        if found is None:
            raise SystemExit(f"{self.config.results} has no {name}.json; run --stages tune before")
        ranks = (FULL,) if full else self.config.ranks
        return [
            Run(rank, found["best"][str(rank)], seed)
            for rank in ranks
            for seed in self.config.seeds
        ]

    def table(self, name: str, on_metrics: Any = None) -> list[sweep.Fitted]:
        """The runs of `main`, of `full`, or on a base of `BASES`."""
        return self.fit(
            name,
            self.tuned(full=name == "full"),
            epochs=self.config.epochs,
            base=base_of(name),
            evaluations=math.ceil(self.config.epochs),
            on_metrics=on_metrics,
        )

    def train_table(self, name: str) -> None:
        """Trains them, and writes what they arrived at and how long it took."""
        clock, began = Clock(), time.perf_counter()
        fitted = self.table(name, clock)
        base = self.models(base_of(name)).base
        rows = [
            {**row, "parameters": self.parameters(one.run, base)}
            for row, one in zip(results.result_rows(fitted), fitted, strict=True)
        ]
        self._write(name, rows=rows, curves=curves(fitted), epochs=self.config.epochs)
        if (summary := clock.summary()) is not None:
            whole = {"seconds_of_this_call": time.perf_counter() - began, **peak_memory()}
            work = {
                "runs": len(rows),
                "at_once": min(len(rows), self.config.at_once),
                "steps": max(row["steps"] for row in rows),
                "tokens": sum(row["tokens"] for row in rows),
            }
            self._write(f"speed_{name}", **summary, **work, **whole)
            print(f"{name}: {summary['seconds_a_step'] * work['steps']:.0f} s of training alone")

    def bases(self) -> None:
        """The main table on 4-bit bases."""
        for base in BASES:
            self.train_table(base)

    def serial(self) -> None:
        """Times each rank alone."""
        model, config = self.models("bfloat16"), self.config
        steps = self.steps(config.epochs)
        rows = []
        for run in self.tuned():
            if run.seed != config.seeds[0]:
                continue
            clock = Clock()
            train.fit(
                self.loss_fn(model),
                model.base,
                self.adapters(run, model.base),
                self.optimizer(run, steps),
                self.batches(run),
                key=jax.random.key(run.seed),
                steps=config.serial_steps,
                on_metrics=clock.alone,
            )
            rows.append({**dataclasses.asdict(run), **(clock.summary() or {})})
            print("serial", json.dumps(rows[-1]), flush=True)
        self._write("speed_serial", rows=rows, steps=steps, seeds=len(config.seeds))

    def score_tables(self) -> None:
        """Scores what each kept adapter writes, and what the model wrote before.

        Tables whose runs are not here keep the scores that they have.
        """
        rows = []
        for name in ("main", *BASES, "full"):
            if not (self.config.out / name).exists():
                print(f"test: {self.config.out / name} is not there, and is left as it is")
                before = self._read("test") or {"rows": []}
                rows += [row for row in before["rows"] if row["table"] == name]
                continue
            fitted = [x for x in self.table(name) if x.adapters is not None]
            like = padding.union([x.adapters for x in fitted])
            base = base_of(name)
            if name != "full":
                rows.append({"table": name, **self.score(base, None)})
            for arrived in fitted:
                # Of one shape, and with the scale as an array: all share a compiled program.
                own = padding.numbers_of(arrived.adapters, like)
                adapters = padding.of_run(padding.pad(arrived.adapters, like), own, drops=False)
                found = self.score(base, adapters)
                rows.append({"table": name, **dataclasses.asdict(arrived.run), **found})
                print("test", json.dumps(rows[-1]), flush=True)
        self._write("test", rows=rows)

    def score(self, base: Base, adapters: Any) -> dict[str, float]:
        """The scores of a model on the test."""
        model = self.models(base)
        references: dict[str, list[str]] = {}
        for record in self.test:
            references.setdefault(self.task.prompt_of(record), []).append(record.fields["ref"])
        prompts = data.encoding.token_ids(model.tokenizer, references)
        written = generate.generate(
            model.decoder,
            model.base,
            adapters,
            prompts,
            max_tokens=self.config.max_tokens,
            eos=model.checkpoint.stop,
            rows=min(self.config.generation_rows, len(prompts)),
        )
        decode = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
        pairs = zip(map(decode, written), references.values(), strict=True)
        cut = sum(tokens[-1] not in model.checkpoint.stop for tokens in written)
        return {**scores([Text(*pair) for pair in pairs]), "texts": len(prompts), "cut": cut}

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.config.results / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def _write(self, name: str, **found: Any) -> None:
        folder = self.config.results
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"config": described(self.config), "environment": environment()}
        (folder / f"{name}.json").write_text(json.dumps({**shared, **found}, indent=1) + "\n")


def base_of(table: str) -> Base:
    """On which the runs of a table train."""
    return next((base for base in BASES if base == table), "bfloat16")


# What is written.


def curves(fitted: Sequence[sweep.Fitted], points: int = 50) -> list[dict[str, Any]]:
    """Losses of each run: those of steps as means over stretches, those on validation as they are.

    Returns:
      For each run `steps` and `losses`, `validation_steps` and `validation_losses`.
    """
    rows = []
    for one in fitted:
        steps = [(step, x["loss"]) for step, x in one.history if "loss" in x]
        checks = [(step, x["validation/loss"]) for step, x in one.history if "loss" not in x]
        width = max(1, len(steps) // points)
        parts = [steps[k : k + width] for k in range(0, len(steps), width)]
        rows.append(
            {
                "steps": [part[-1][0] for part in parts],
                "losses": [round(statistics.fmean(x for _, x in part), 5) for part in parts],
                "validation_steps": [step for step, _ in checks],
                "validation_losses": [round(x, 5) for _, x in checks],
            }
        )
    return rows


def described(config: Config) -> dict[str, Any]:
    """The options that numbers depend on, as JSON has them."""
    unsaid = ("data", "out", "results", "stages", "model")
    values = {name: x for name, x in dataclasses.asdict(config).items() if name not in unsaid}
    return {**values, "model": Path(config.model).name}


def digest(sequences: Sequence[data.Encoded]) -> str:
    """SHA-256 of tokens and weights."""
    found = hashlib.sha256()
    for one in sequences:
        found.update(one.tokens.tobytes() + one.weights.tobytes())
    return found.hexdigest()


def peak_memory() -> dict[str, float]:
    """GiB of the device, if it tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_gib": round(peak / 2**30, 2)}


def main(config: Config) -> None:
    """Runs the stages that are asked for."""

    @functools.lru_cache(maxsize=1)  # one is needed at a time
    def models(base: Base) -> Model:
        return load_model(ModelOptions(model=config.model, base=base, dtype=config.dtype))

    study = Study.load(config, models)
    actions: dict[Stage, Callable[[], None]] = {
        "tune": study.tune,
        "main": lambda: study.train_table("main"),
        "serial": study.serial,
        "bases": study.bases,
        "full": lambda: study.train_table("full"),
        "test": study.score_tables,
    }
    for stage in config.stages:
        actions[stage]()


def options(arguments: Sequence[str] | None = None) -> Config:
    """A preset, and what differs from it."""
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


if __name__ == "__main__":
    main(options())
