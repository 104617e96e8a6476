"""AdamW for adapters: its learning rate over the steps, and LoRA+'s second one for B."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from lora_jax.optim import lora_plus

Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warmup and decay, for adapters.

    Attributes:
      steps: updates in all, after which the decay is complete.
      learning_rate: its highest value.
      schedule: how it falls after the warmup: along a cosine, along a line, or not at all.
      warmup: share of the steps in which the learning rate rises from zero.
      end: share of the highest learning rate that is left when the decay is complete.
      weight_decay: decoupled, times the learning rate.
      clip: largest norm of the gradient of all adapters together; None to leave it as it is.
      lora_plus_ratio: how many times as fast B learns (LoRA+); 1 for the same rate.
      b1: decay of the mean of gradients.
      b2: decay of the mean of their squares.
      eps: added to the root of that mean.
    """

    steps: int
    learning_rate: float
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    end: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    lora_plus_ratio: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        if self.schedule not in get_args(Schedule):
            names = ", ".join(get_args(Schedule))
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {names}")
        for name in ("learning_rate", "lora_plus_ratio", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, expected a share of the steps below 1")
        if not 0 <= self.end <= 1:
            raise ValueError(
                f"end is {self.end}, expected a share of the learning rate, from 0 to 1"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected at least 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, expected a positive number, or None for none")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0, below 1")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of each update, from 0 on, as a config describes it.

    It is computed from the config's numbers and branches on none: those of a sweep, where
    learning rate, warmup and end differ from run to run of one program, may be traced.
    """
    peak, end = config.learning_rate, config.end
    rise = jnp.round(jnp.asarray(config.warmup * config.steps))
    fall = config.steps + 1 - rise  # one step more than there are, so that the last one still moves

    def schedule(step: Any) -> jax.Array:
        risen = peak - peak * (1 - step / jnp.maximum(rise, 1))
        fallen = jnp.clip(step - rise, 0, fall)
        falling = {
            "cosine": peak * ((1 - end) * (0.5 * (1 + jnp.cos(jnp.pi * fallen / fall))) + end),
            "linear": (peak - end * peak) * (1 - fallen / fall) + end * peak,
            "constant": jnp.asarray(peak),
        }[config.schedule]
        return jnp.where(step < rise, risen, falling)

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer that a config describes, for a tree of adapters.

    Learning rate, warmup, end, weight decay and clip may be traced.
    """
    adamw = functools.partial(
        optax.adamw, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
    schedule = learning_rate_schedule(config)
    if config.lora_plus_ratio == 1:
        tx = adamw(schedule)
    else:
        tx = lora_plus(adamw, schedule, ratio=config.lora_plus_ratio)
    if config.clip is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(config.clip), tx)
