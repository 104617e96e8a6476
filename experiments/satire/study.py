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
from lora_jax.data import Prompt
from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import fetch
from lora_jax.models.decoder import Decoder

SEEDS = (0, 1, 2)
POOL = 5_200  # training headlines to draw from; a run sees at most 4,900 of them, once each
LENGTH = 128  # tokens of a row
EVALUATION_ROWS = 32

PROMPTS = {
    "satire?": Prompt("", "\nSatire?", (" no", " yes")),
    "im_start": Prompt("<|im_start|>", "\nSatire?", (" no", " yes")),
    "onion": Prompt("", " The Onion?", (" No", " Yes")),
    "digits": Prompt("", "\n", ("0", "1")),
    "this is": Prompt("", "\nThis is", (" real", " satire")),
    "headline": Prompt("Headline: ", "\nThis is", (" real", " satire")),
    "question first": Prompt("Is this headline satire? ", "\nAnswer:", (" No", " Yes")),
    "short question first": Prompt("Satire? ", "\nAnswer:", (" No", " Yes")),
    "lower case": Prompt("Is this satire? ", "\nAnswer:", (" no", " yes")),
    "from the onion": Prompt("Is this from The Onion? ", "\nAnswer:", (" No", " Yes")),
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
        rise = max(1, round(self.warmup * self.steps))
        shape = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": rise}
        schedule = optax.warmup_cosine_decay_schedule(decay_steps=self.steps + 1, **shape)
        if self.linear:
            fall = optax.linear_schedule(1.0, 0.0, self.steps + 1 - rise)
            schedule = optax.join_schedules([optax.linear_schedule(0.0, 1.0, rise), fall], [rise])
        adamw = functools.partial(optax.adamw, b2=self.b2, weight_decay=0.0)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            lj.lora_plus(adamw, schedule, ratio=self.lora_plus_ratio),
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

    model: Decoder
    base: Any
    tokenizer: Any
    training: list[data.Example]
    validation: list[data.Example]

    @classmethod
    def load(cls) -> Study:
        """Reads the default model and data."""
        checkpoint = read_gguf(fetch("smollm2-135m-instruct"))
        splits = data.split_examples(data.read_examples(fetch("satire-headlines")))
        base = lj.quantize(checkpoint.params, r"layers/.*/kernel", layout="b i o")
        return cls(
            Decoder(checkpoint.config),
            jax.device_put(base),
            checkpoint.tokenizer,
            splits.train[:POOL],
            splits.validation,
        )

    def run(self, trial: Trial) -> dict[str, Any]:
        """Trains every learning rate from every seed at once; validation accuracy and NLL."""
        prompt = PROMPTS[trial.prompt]
        answers = prompt.answer_tokens(self.tokenizer)
        loss = lj.adapt(train.answer_loss(self.model, answers))
        tx = trial.optimizer()
        runs = list(itertools.product(trial.learning_rates, SEEDS))
        rule = lj.LoraRule(trial.targets, rank=8, alpha=16.0)
        starts = [
            lj.init_adapters(jax.random.key(seed), self.base, [rule], train=trial.whole)
            for _, seed in runs
        ]
        adapters = jax.tree.map(lambda *x: jnp.stack(x), *starts)  # [runs, ...]
        batches, seen = self.batches(trial, prompt)  # [steps, seeds, ...]
        rates = jnp.array([rate for rate, _ in runs])
        seeds = jnp.array([SEEDS.index(seed) for _, seed in runs])

        @jax.jit
        def fit(adapters: Any, opt_state: Any, base: Any, batches: Any) -> Any:
            def one(adapters: Any, opt_state: Any, rate: Any, seed: Any, of_seeds: Any) -> Any:
                batch = jax.tree.map(lambda x: x[seed], of_seeds)
                grads, _ = jax.grad(
                    lambda adapters: loss(lj.combine(base, adapters), batch), has_aux=True
                )(adapters)
                updates, opt_state = tx.update(grads, opt_state, adapters)
                updates = jax.tree.map(lambda u: rate * u, updates)
                return optax.apply_updates(adapters, updates), opt_state

            def step(carry: Any, of_seeds: Any) -> Any:
                each = jax.vmap(functools.partial(one, of_seeds=of_seeds))
                return each(*carry, rates, seeds), None

            return jax.lax.scan(step, (adapters, opt_state), batches)[0][0]

        adapters = fit(adapters, jax.vmap(tx.init)(adapters), self.base, batches)
        accuracy, nll = self.score(adapters, prompt, answers)
        each = zip(
            trial.learning_rates, *(x.reshape(-1, len(SEEDS)) for x in (accuracy, nll)), strict=True
        )
        return {
            **dataclasses.asdict(trial),
            "headlines": seen,
            "runs": [
                {"learning_rate": rate, "accuracy": a.round(4).tolist(), "nll": n.round(4).tolist()}
                for rate, a, n in each
            ],
        }

    def batches(self, trial: Trial, prompt: Prompt) -> tuple[Any, float]:
        """Batches [steps, seeds, ...], and the number of headlines in a run."""
        sequences = prompt.encode(self.tokenizer, self.training, LENGTH)
        labels = [example.label for example in self.training]
        stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)  # noqa: E731
        of_seeds = []
        for seed in SEEDS:
            order = data.shuffled(len(sequences), seed)
            packed = data.pack(sequences, labels, order, rows=trial.rows, length=LENGTH)
            of_seeds.append(stack(itertools.islice(packed, trial.steps)))
        batches = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), stack(of_seeds))
        return jax.device_put(batches), float(batches.weight.sum() / len(SEEDS))

    def score(self, adapters: Any, prompt: Prompt, answers: np.ndarray) -> Any:
        """Accuracy and NLL on validation, [runs] each."""
        logits_of = lj.adapt(train.answer_logits(self.model, answers))

        @jax.jit
        def score(adapters: Any, base: Any, batch: Any) -> Any:
            one = lambda adapters: logits_of(lj.combine(base, adapters), batch)  # noqa: E731
            return jax.nn.log_softmax(jax.vmap(one)(adapters))  # [runs, N, C]

        sequences = prompt.encode(self.tokenizer, self.validation, LENGTH)
        labels = [example.label for example in self.validation]
        order = range(len(sequences))
        right, nll = 0.0, 0.0
        for batch in data.pack(sequences, labels, order, rows=EVALUATION_ROWS, length=LENGTH):
            table = np.asarray(score(adapters, self.base, batch))[:, batch.weight > 0]
            label = batch.label[batch.weight > 0]
            right += (table.argmax(-1) == label).sum(-1)
            nll -= np.take_along_axis(table, label[None, :, None], -1).sum((1, 2))
        return right / len(labels), nll / len(labels)


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
