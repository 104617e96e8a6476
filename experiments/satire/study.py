"""The study that chose the default run's prompt, targets, batch and learning rate, on validation.

    python experiments/satire/study.py              # all of it: minutes on a large GPU
    python experiments/satire/study.py "targets"    # the trials whose name contains a word

A trial is trained at several learning rates and from three seeds at once, all over one frozen base:
the adapters have a leading axis of runs, and the loop is an ordinary `vmap`. Appends to
results/study.jsonl; NOTES.md tells what was seen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import data, train
from lora_jax.formats import Checkpoint, read_model
from lora_jax.formats.sources import fetch
from lora_jax.models.decoder import Decoder

SEEDS = (0, 1, 2)
POOL = 5_200  # training headlines to draw from; a run sees at most 4,900 of them, once each
LENGTH = 128  # tokens of a row
EVALUATION_ROWS = 32

PROMPTS = {
    "satire?": data.Classification("{text}\nSatire?", (" no", " yes")),
    "im_start": data.Classification("<|im_start|>{text}\nSatire?", (" no", " yes")),
    "onion": data.Classification("{text} The Onion?", (" No", " Yes")),
    "digits": data.Classification("{text}\n", ("0", "1")),
    "this is": data.Classification("{text}\nThis is", (" real", " satire")),
    "headline": data.Classification("Headline: {text}\nThis is", (" real", " satire")),
    "question first": data.Classification(
        "Is this headline satire? {text}\nAnswer:", (" No", " Yes")
    ),
    "short question first": data.Classification("Satire? {text}\nAnswer:", (" No", " Yes")),
    "lower case": data.Classification("Is this satire? {text}\nAnswer:", (" no", " yes")),
    "from the onion": data.Classification(
        "Is this from The Onion? {text}\nAnswer:", (" No", " Yes")
    ),
}
QV, ATTENTION, VO, QVO = (rf"attn/[{x}]_proj/kernel" for x in ("qv", "qkvo", "vo", "qvo"))
MLP, ALL = r"mlp/.*/kernel", r"layers/.*/kernel"
V_DOWN, O_DOWN = (rf"({x}|down)_proj/kernel" for x in ("v", "o"))


@dataclasses.dataclass(frozen=True)
class Trial:
    """One thing to try, at several learning rates.

    Attributes:
      name: what is varied.
      prompt: a name in `PROMPTS`.
      targets: pattern of the weights to adapt, rank 8 and alpha 16 throughout.
      whole: patterns of leaves to train whole.
      steps: updates; chosen so that trials cost about the same on a CPU.
      rows: of a batch.
      learning_rates: to try, side by side.
      lora_plus_ratio, warmup, clip: as in `OptimizerConfig`.
      linear: whether the learning rate falls linearly, not as a cosine.
      b2: of Adam.
    """

    name: str
    prompt: str = "satire?"
    targets: str = QV
    whole: tuple[str, ...] = ()
    steps: int = 100
    rows: int = 5
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    lora_plus_ratio: float = 1.0
    warmup: float = 0.1
    clip: float = 1.0
    linear: bool = False
    b2: float = 0.999

    def optimizer(self) -> optax.GradientTransformation:
        """At a learning rate of 1; Adam's updates are proportional to it."""
        return train.make_optimizer(
            train.OptimizerConfig(
                self.steps,
                learning_rate=1.0,
                schedule="linear" if self.linear else "cosine",
                warmup=self.warmup,
                clip=self.clip,
                lora_plus_ratio=self.lora_plus_ratio,
                b2=self.b2,
            )
        )


def question(name: str, **options: Any) -> Trial:
    """A trial of the second round: attention, and a question in front."""
    defaults = {"targets": ATTENTION, "steps": 85, "learning_rates": (2e-3, 3e-3, 4e-3, 6e-3)}
    return Trial(name, **{"prompt": "question first", **defaults, **options})


FIRST_ROUND = [
    *(
        Trial(f"prompt: {name}", prompt=name, learning_rates=(1e-3, 2e-3, 4e-3))
        for name in ("satire?", "im_start", "onion", "headline", "question first", "digits")
    ),
    Trial("targets: all", targets=ALL, steps=64),
    Trial("targets: attention", targets=ATTENTION, steps=85),
    Trial("targets: mlp", targets=MLP, steps=75),
    Trial("targets: v, o", targets=VO),
    Trial("targets: v, down", targets=V_DOWN, steps=95),
    Trial("targets: o, down", targets=O_DOWN, steps=95),
    Trial("targets: q, v and norms whole", whole=(r"layers/.*norm/scale",)),
    *(
        Trial(f"LoRA+ {r}: q, v", lora_plus_ratio=r, learning_rates=(3e-4, 1e-3, 2e-3))
        for r in (4, 16)
    ),
    *(
        Trial(
            f"LoRA+ {r}: all",
            targets=ALL,
            steps=64,
            lora_plus_ratio=r,
            learning_rates=(1e-4, 3e-4, 1e-3),
        )
        for r in (4, 16)
    ),
    *(Trial(f"rows: {r}", rows=r, steps=n) for r, n in ((2, 230), (3, 160), (10, 52))),
    *(Trial(f"steps: {n}", steps=n) for n in (70, 140)),
    Trial("b2: 0.95", b2=0.95),
    Trial("schedule: linear", linear=True),
    Trial("schedule: warmup 0.2", warmup=0.2),
    Trial("clip: 0.3", clip=0.3),
]
SECOND_ROUND = [
    question("second: attention"),
    *(
        question(f"second: {name}", prompt=name, learning_rates=(2e-3, 3e-3, 4e-3))
        for name in ("short question first", "lower case", "from the onion", "this is", "headline")
    ),
    question("second: linear, warmup 0.2", linear=True, warmup=0.2),
    question("second: rows 3", rows=3, steps=140),
    question("second: steps 60", steps=60),
    question("second: v, o", targets=VO, steps=100),
    question("second: q, v, o", targets=QVO, steps=90),
    question("second: q, v", targets=QV, steps=100),
    question("second: all", targets=ALL, steps=64, learning_rates=(1e-3, 2e-3, 3e-3)),
]


@dataclasses.dataclass(frozen=True)
class Study:
    """What all trials share."""

    checkpoint: Checkpoint
    base: Any
    training: list[data.Record]
    validation: list[data.Record]

    @classmethod
    def load(cls) -> Study:
        """Reads the default model and data."""
        checkpoint = read_model("smollm2-135m-instruct")
        splits = data.split_records(
            data.read_records(fetch("satire-headlines")),
            PROMPTS["satire?"].key_of,
            one_per_key=True,
        )
        base = lj.quantize(checkpoint.params, r"layers/.*/kernel", layout="b i o")
        return cls(checkpoint, jax.device_put(base), splits.train[:POOL], splits.validation)

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return Decoder(self.checkpoint.config)

    def run(self, trial: Trial) -> dict[str, Any]:
        """Trains every learning rate from every seed at once; validation accuracy and NLL."""
        task, tx = PROMPTS[trial.prompt], trial.optimizer()
        special = data.SpecialTokens(*self.checkpoint.special)
        labels = task.label_tokens(self.checkpoint.tokenizer, special)
        loss = train.next_token_loss(self.model, among=[token for [token] in labels])
        runs = list(itertools.product(trial.learning_rates, SEEDS))
        rule = lj.LoraRule(trial.targets, rank=8, alpha=16.0, layout="b i o")
        starts = [
            lj.init_adapters(jax.random.key(seed), self.base, [rule], train=trial.whole)
            for _, seed in runs
        ]
        adapters = jax.tree.map(lambda *x: jnp.stack(x), *starts)  # [runs, ...]
        batches, seen = self.batches(trial, task)  # [steps, seeds, ...]
        rates = jnp.array([rate for rate, _ in runs])
        seeds = jnp.array([SEEDS.index(seed) for _, seed in runs])

        @jax.jit
        def fit(adapters: Any, opt_state: Any, base: Any, batches: Any) -> Any:
            def one(adapters: Any, opt_state: Any, rate: Any, seed: Any, of_seeds: Any) -> Any:
                batch = jax.tree.map(lambda x: x[seed], of_seeds)
                grads, _ = jax.grad(loss, has_aux=True)(adapters, base, batch, None)
                updates, opt_state = tx.update(grads, opt_state, adapters)
                updates = jax.tree.map(lambda u: rate * u, updates)
                return optax.apply_updates(adapters, updates), opt_state

            def step(carry: Any, of_seeds: Any) -> Any:
                each = jax.vmap(functools.partial(one, of_seeds=of_seeds))
                return each(*carry, rates, seeds), None

            return jax.lax.scan(step, (adapters, opt_state), batches)[0][0]

        adapters = fit(adapters, jax.vmap(tx.init)(adapters), self.base, batches)
        scores = [
            self.score(jax.tree.map(lambda x: x[k], adapters), task)  # noqa: B023
            for k in range(len(runs))
        ]
        accuracy, nll = np.array(scores).T.reshape(2, -1, len(SEEDS))  # [rates, seeds] each
        each = zip(trial.learning_rates, accuracy, nll, strict=True)
        return {
            **dataclasses.asdict(trial),
            "headlines": seen,
            "runs": [
                {"learning_rate": rate, "accuracy": a.round(4).tolist(), "nll": n.round(4).tolist()}
                for rate, a, n in each
            ],
        }

    def encoded(self, task: data.Task, records: list[data.Record]) -> list[data.Encoded]:
        """Headlines as tokens."""
        special = data.SpecialTokens(*self.checkpoint.special)
        return data.encode_all(
            task, records, self.checkpoint.tokenizer, special, max_length=LENGTH
        ).sequences

    def batches(self, trial: Trial, task: data.Task) -> tuple[Any, float]:
        """Batches [steps, seeds, ...], and the number of headlines in a run."""
        sequences = self.encoded(task, self.training)
        stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)  # noqa: E731
        of_seeds = []
        for seed in SEEDS:
            packed = data.training_batches(sequences, rows=trial.rows, length=LENGTH, seed=seed)
            of_seeds.append(stack(itertools.islice(packed, trial.steps)))
        batches = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), stack(of_seeds))
        seen = batches.segment_ids.max(-1).sum() / len(SEEDS)
        return jax.device_put(batches), float(seen)

    def score(self, adapters: Any, task: data.Classification) -> tuple[float, float]:
        """Accuracy and NLL of one run on validation."""
        special = data.SpecialTokens(*self.checkpoint.special)
        sequences = self.encoded(task, self.validation)
        table = train.label_likelihoods(
            self.model,
            self.base,
            adapters,
            [one.prompt for one in sequences],
            task.label_tokens(self.checkpoint.tokenizer, special),
            rows=EVALUATION_ROWS,
        )  # [headlines, 2]
        table -= np.logaddexp.reduce(table, axis=-1, keepdims=True)
        truth = np.array([task.label_of(self.validation[one.record]) for one in sequences])
        nll = -table[np.arange(len(truth)), truth].mean()
        return float(np.mean(table.argmax(-1) == truth)), float(nll)


def main() -> None:
    """Runs the trials that were asked for."""
    study = Study.load()
    with (Path(__file__).parent / "results" / "study.jsonl").open("a") as file:
        for trial in (*FIRST_ROUND, *SECOND_ROUND):
            if not any(word in trial.name for word in sys.argv[1:] or [""]):
                continue
            started = time.perf_counter()
            record = study.run(trial)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{trial.name} ({time.perf_counter() - started:.0f} s)")
            for run in record["runs"]:
                mean, least = 100 * np.mean(run["accuracy"]), 100 * min(run["accuracy"])
                nll = np.mean(run["nll"])
                print(f"  {run['learning_rate']:g}: {mean:.1f} % ({least:.1f}), NLL {nll:.3f}")


if __name__ == "__main__":
    main()
