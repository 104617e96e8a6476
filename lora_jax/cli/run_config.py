"""What a run is: all its options, and those of the default run."""

from __future__ import annotations

import dataclasses

from lora_jax import train
from lora_jax.cli.options import (
    AdapterOptions,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
)
from lora_jax.core.rules import LoraRule


@dataclasses.dataclass(frozen=True)
class Config:
    r"""Trains LoRA adapters on a language model, 4-bit by default, and keeps those that did best.

    Without --data it is the default run: is this headline satire? Its options are then the defaults
    shown here. With data of your own:

        lora-jax finetune --data mine.jsonl --task completion
            --prompt "{question}\n" --completion "{answer}"

    The run's folder has everything: its options (run it again with --config), every number, the
    adapter, a picture, and the state from which --resume goes on, to the bit, if it was stopped.
    """

    model: ModelOptions
    data: DataOptions
    adapter: AdapterOptions
    training: TrainingOptions
    evaluation: EvaluationOptions
    run: RunOptions

    @property
    def rule(self) -> LoraRule:
        """What is adapted; the layouts of that are the model's to say."""
        options = dataclasses.asdict(self.adapter)
        pattern, _, _ = (options.pop(name) for name in ("targets", "whole", "init_scale"))
        return LoraRule(pattern, **options)

    @property
    def optimizer(self) -> train.OptimizerConfig:
        """How it is trained."""
        names = {field.name for field in dataclasses.fields(train.OptimizerConfig)}
        options = dataclasses.asdict(self.training)
        return train.OptimizerConfig(**{k: v for k, v in options.items() if k in names})


# experiments/satire says how these were chosen, and what they reach.
SATIRE = Config(
    ModelOptions(),
    DataOptions(
        data="satire-headlines",
        task="classification",
        prompt="Satire? {text}\nAnswer:",
        labels=(" No", " Yes"),
        length=128,
    ),
    AdapterOptions(targets=r"attn/.*/kernel", rank=8, alpha=16.0),
    TrainingOptions(steps=120, rows=3, learning_rate=3e-3),
    EvaluationOptions(evaluate_every=40, validation_examples=256, test_examples=512),
    RunOptions(save_every=30),
)
