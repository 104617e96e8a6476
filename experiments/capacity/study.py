"""How much a rank holds: random pairs that an adapter memorizes, N pairs × rank.

    python experiments/capacity/study.py h200       # the study: minutes of one H200
    python experiments/capacity/study.py cpu        # a smaller one: minutes of one CPU core
    python experiments/capacity/report.py           # the table and the picture, of the former
    python experiments/capacity/report.py runs/capacity_cpu/results experiments/capacity/cpu

A frozen decoder with random weights is shown a key of a few random tokens, and its adapters are
trained until they give the key's value, a random token as well. Nothing but the adapters can know
it: a value has log2(V) bits, and what the adapters hold of N of them is

    bits = N · (log2(V) - NLL / ln(2))

So low ranks must fail at some N, which a data set whose sentences are all alike does not show.
Every N × rank × seed is a run of one sweep, and each learns pairs of its own; a rank's learning
rate is chosen by the mean NLL over some N, and an optimum at the edge of the grid is not taken.
A stage that was killed goes on from its folder in `--out`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax as lj
from lora_jax import sweep, train
from lora_jax.cli.environment import environment
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.sweep.fields import with_fields
from lora_jax.sweep.tuning import chosen, tune

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
    """What differs between runs.

    Attributes:
      rank: of the adapters.
      pairs: N, how many there are to memorize.
      learning_rate: its highest value.
      seed: of the pairs, their order and the adapters' start.
    """

    rank: int
    pairs: int
    learning_rate: float
    seed: int


FIELDS = [field.name for field in dataclasses.fields(Run)]
# Options that say what a run is.
IDENTIFYING = (
    "vocabulary",
    "key_length",
    "width",
    "layers",
    "sharpness",
    "targets",
    "alpha",
    "batch",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The study."""

    vocabulary: int = 1024
    """V, tokens: a value has 10 bits."""
    key_length: int = 2
    """Tokens of a key: a million keys are possible."""
    width: int = 128
    """Of the residual stream; that of the MLP is twice as much."""
    layers: int = 2
    """Of the decoder."""
    targets: str = r"layers_\d+/.*/kernel"
    """The weights to adapt: all seven kernels of each layer."""
    sharpness: float = 4.0
    """Factor on logits: those of a random head are so small that the best NLL would not be 0."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """To compare."""
    pairs: tuple[int, ...] = tuple(2**k for k in range(5, 16))
    """N: 32 to 32,768."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the result."""
    tune_pairs: tuple[int, ...] = (1024, 8192)
    """N at which learning rates are compared, by their mean NLL."""
    tune_seed: int = 10
    """None of the result's."""
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    """To begin with, for each rank."""

    batch: int = 2048
    """Pairs of a step; each comes as often as any other."""
    steps: int = 6000
    """Updates, so that of the largest N each pair comes 375 times."""
    at_once: int = 77
    """Runs of a program, side by side."""
    save_every: int | None = 2000
    """Steps."""
    out: Path = Path("runs/capacity")
    """Where runs are kept."""
    results: Path = HERE / "results"
    """Where numbers are written."""


CPU = Config(
    vocabulary=64,
    width=32,
    layers=1,
    ranks=(1, 2, 4, 8, 16),
    pairs=tuple(2**k for k in range(3, 11)),  # 8 to 1,024
    tune_pairs=(64, 512),
    learning_rates=(5e-3, 1e-2, 2e-2),
    batch=128,
    steps=600,
    at_once=40,
    save_every=None,
    out=Path("runs/capacity_cpu"),
    results=Path("runs/capacity_cpu/results"),
)
PRESETS = {"h200": ("The study.", Config()), "cpu": ("A smaller one.", CPU)}


# Pairs.


class Pairs(NamedTuple):
    """Keys int32 [N, key_length] and their values int32 [N]."""

    keys: Any
    values: Any


def draw_pairs(config: Config, run: Run) -> Pairs:
    """The pairs of a run: keys are all different, values independent and uniform."""
    rng = np.random.default_rng((run.seed, run.pairs))
    shape = (config.vocabulary,) * config.key_length
    places = rng.choice(math.prod(shape), size=run.pairs, replace=False)
    keys = np.stack(np.unravel_index(places, shape), axis=-1)
    values = rng.integers(0, config.vocabulary, run.pairs)
    return Pairs(keys.astype(np.int32), values.astype(np.int32))


def batches(config: Config, run: Run) -> Iterator[Pairs]:
    """Batches of epoch after epoch, each in an order of its own; one may begin within a batch."""
    pairs, rng = draw_pairs(config, run), np.random.default_rng((run.seed, run.pairs, 1))
    queue = np.empty(0, np.int64)
    while True:
        while len(queue) < config.batch:
            queue = np.concatenate([queue, rng.permutation(run.pairs)])
        now, queue = queue[: config.batch], queue[config.batch :]
        yield Pairs(pairs.keys[now], pairs.values[now])


# The model.


def decoder(config: Config) -> Decoder:
    """A transformer of the usual kind."""
    heads = max(1, config.width // 32)
    return Decoder(
        DecoderConfig(
            vocab_size=config.vocabulary,
            dim=config.width,
            mlp_dim=2 * config.width,
            num_layers=config.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config.width // heads,
            scan_layers=False,
        )
    )


def scorer(model: Decoder, sharpness: float) -> Any:
    """From a tree and pairs to log-probabilities of the values [N], and whether each is right."""

    def scores(tree: Any, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        hidden = model.apply({"params": tree}, pairs.keys, method="hidden")  # [N, key_length, D]
        logits = model.apply({"params": tree}, hidden[:, -1:], method="unembed")[:, 0]  # [N, V]
        logits = sharpness * logits
        of_value = jnp.take_along_axis(logits, pairs.values[:, None], axis=-1)[:, 0]
        is_right = logits.argmax(-1) == pairs.values
        return of_value - jax.nn.logsumexp(logits, axis=-1), is_right

    return lj.adapt(scores)


# The study.


@dataclasses.dataclass(frozen=True)
class Study:
    """All that is fixed before training.

    Attributes:
      config: the options.
      model: the decoder.
      base: its frozen random weights.
    """

    config: Config
    model: Decoder
    base: Any

    @classmethod
    def make(cls, config: Config) -> Study:
        """Draws the base."""
        model = decoder(config)
        key, tokens = jax.random.key(0), jnp.zeros((1, config.key_length), jnp.int32)
        return cls(config, model, jax.jit(model.init)(key, tokens)["params"])

    def adapters(self, run: Run) -> Any:
        """What a run starts from."""
        rule = lj.LoraRule(
            self.config.targets, rank=run.rank, alpha=self.config.alpha, layout="i o"
        )
        return lj.init_adapters(jax.random.key(run.seed), self.base, rule)

    def optimizer(self, run: Run) -> Any:
        """Adam, with a learning rate that may be traced."""
        config = train.OptimizerConfig(self.config.steps, 1.0, schedule="linear", warmup=0.05)
        return train.make_optimizer(with_fields(config, {"learning_rate": run.learning_rate}))

    def fit(self, name: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Trains runs side by side, and measures what they hold: a row for each."""
        config, scores = self.config, scorer(self.model, self.config.sharpness)

        def loss_fn(adapters: Any, base: Any, pairs: Pairs, key: Any) -> jax.Array:
            return -scores(lj.combine(base, adapters), pairs)[0].mean()

        at_once = min(config.at_once, len(runs))
        plan = sweep.plan(runs, self.adapters, self.optimizer, at_once=at_once)
        print(f"{name}: {len(runs)} runs of {config.steps:,} steps\n{plan}", flush=True)
        began = time.perf_counter()
        fitted = sweep.fit(
            loss_fn,
            self.base,
            plan,
            functools.partial(batches, config),
            make_key=lambda run: jax.random.key(run.seed),
            steps=config.steps,
            folder=config.out / name,
            save_every=config.save_every,
            identity={
                "vocabulary": config.vocabulary,
                "batch": config.batch,
                "width": config.width,
            },
        )
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return self.measured(fitted)

    def measured(self, fitted: Sequence[sweep.Fitted]) -> list[dict[str, Any]]:
        """What runs hold of all their pairs, by what they arrived at."""
        found: dict[Run, dict[str, float]] = {}
        for pairs in {one.run.pairs for one in fitted}:
            # Those of one N are measured side by side.
            alike = [one for one in fitted if one.run.pairs == pairs and one.last is not None]
            nlls, recalls = self.recalled(alike)
            for one, nll, recall in zip(alike, nlls, recalls, strict=True):
                bits = pairs * (math.log2(self.config.vocabulary) - nll / math.log(2))
                found[one.run] = {"nll": nll, "recall": recall, "bits": bits}
        return [
            {
                **dataclasses.asdict(one.run),
                "stopped": one.stopped,
                "parameters": self.parameters(one.run),
                **found.get(one.run, {}),
            }
            for one in fitted
        ]

    def parameters(self, run: Run) -> int:
        """How many a run trains."""
        shapes = jax.eval_shape(lambda: self.adapters(run))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    def recalled(self, alike: Sequence[sweep.Fitted]) -> tuple[list[float], list[float]]:
        """Of runs of one N: the mean NLL of their pairs in nats, and the share that is right."""
        if not alike:
            return [], []
        adapters, scales = sweep.stack([one.last for one in alike])
        drawn = [draw_pairs(self.config, one.run) for one in alike]
        pairs = jax.tree.map(lambda *x: np.stack(x), *drawn)  # [runs, N, ...]
        parts = []
        for start in range(0, alike[0].run.pairs, self.config.batch):
            part = jax.tree.map(lambda x, k=start: x[:, k : k + self.config.batch], pairs)
            scored = _scores_of_runs(self.config, self.model, self.base, adapters, scales, part)
            parts.append(scored)
        likelihoods, is_right = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        return (-likelihoods.astype(np.float64).mean(1)).tolist(), is_right.mean(1).tolist()

    def run(self) -> None:
        """All of it."""
        config = self.config
        grid = [
            Run(rank, pairs, rate, config.tune_seed)
            for rank in config.ranks
            for rate in config.learning_rates
            for pairs in config.tune_pairs
        ]
        # Runs of one rank and learning rate count together, whatever their N.
        fits = lambda runs, number: self.fit(f"tune_{number}", runs)  # noqa: E731
        tuning = tune(fits, grid, metric="nll", seed="pairs")
        found = chosen(tuning, FIELDS, metric="nll", over="learning_rate", seed="pairs")
        best = {x.cell.rows[0]["rank"]: x.cell.rows[0]["learning_rate"] for x in found}
        print(f"learning rates by rank: {best}", flush=True)
        runs = [
            Run(rank, pairs, best[rank], seed)
            for rank in config.ranks
            for pairs in config.pairs
            for seed in config.seeds
        ]
        rows = self.fit("main", runs)
        config.results.mkdir(parents=True, exist_ok=True)
        shared = {"config": described(config), "environment": environment()}
        text = json.dumps({**shared, "tuning": tuning, "rows": rows}, indent=1)
        (config.results / "capacity.json").write_text(text + "\n")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores_of_runs(
    config: Config, model: Decoder, base: Any, adapters: Any, scales: Any, pairs: Pairs
) -> Any:
    scores = scorer(model, config.sharpness)

    def of_run(adapters: Any, scales: Any, pairs: Pairs) -> Any:
        return scores(lj.combine(base, adapters, scales=scales), pairs)

    return jax.vmap(of_run)(adapters, scales, pairs)


def described(config: Config) -> dict[str, Any]:
    """The options that numbers depend on, as JSON has them."""
    values = dataclasses.asdict(config)
    return {name: x for name, x in values.items() if name not in ("out", "results")}


def options(arguments: Sequence[str] | None = None) -> Config:
    """A preset, and what differs from it."""
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


if __name__ == "__main__":
    Study.make(options()).run()
