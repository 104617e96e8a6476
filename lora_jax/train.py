"""The training loop: nothing in it that a loop of your own could not do with the same functions.

    for step in train(loss_fn, base, adapters, make_optimizer(config), batches):
        print(step.number, step.loss)

Shapes: N places for examples in a batch, C classes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.core.adapt import adapt
from lora_jax.core.tree import combine
from lora_jax.data import Batch
from lora_jax.optim import lora_plus

# From parameters and a batch to the loss, and to numbers worth recording beside it.
LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
# From parameters and a batch to logits [N, C].
LogitsFn = Callable[[Any, Batch], jax.Array]
# From base, adapters and a batch to log probabilities [N, C].
ScoreFn = Callable[[Any, Any, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warmup and cosine decay, for adapters.

    Attributes:
      steps: updates in all; the learning rate reaches zero with the last.
      learning_rate: its highest value.
      lora_plus_ratio: how many times as fast B learns (LoRA+); 1 for the same rate.
      warmup: share of the steps in which the learning rate rises from zero.
      weight_decay: decoupled, times the learning rate.
      clip: largest norm of the gradient of all adapters together.
    """

    steps: int
    learning_rate: float
    lora_plus_ratio: float = 1.0
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a positive number")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, expected a share of the steps below 1")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer that a config describes."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup * config.steps),
        decay_steps=config.steps + 1,
    )
    adamw = functools.partial(optax.adamw, weight_decay=config.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        lora_plus(adamw, schedule, ratio=config.lora_plus_ratio),
    )


class Step(NamedTuple):
    """One step of training, done.

    Attributes:
      number: 1 for the first.
      adapters: the adapters after it.
      loss: of its batch, before the update.
      metrics: what the loss function gave beside the loss, and the gradient's norm.
    """

    number: int
    adapters: Any
    loss: float
    metrics: dict[str, float]


class Diverged(ArithmeticError):  # noqa: N818 - says what happened, as StopIteration does
    """The loss or its gradient is no longer finite.

    Attributes:
      step: the step whose update was refused.
      adapters: the last ones whose loss and gradient were finite; None if it was the first step.
    """

    def __init__(self, step: int, adapters: Any, loss: float):
        super().__init__(
            f"the loss is {loss} at step {step}, or its gradient is not finite; "
            "write a smaller learning rate"
        )
        self.step = step
        self.adapters = adapters


def train(
    loss_fn: LossFn,
    base: Any,
    adapters: Any,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
) -> Iterator[Step]:
    """Trains adapters, one step for each batch.

    Args:
      loss_fn: a plain function of a model's parameters and a batch; it is adapted here.
      base: the frozen tree.
      adapters: the tree to start from; left as it is.
      tx: an optax optimizer for trees of adapters.
      batches: pytrees of arrays, all of the same shapes.

    Returns:
      The steps as they are done. Each waits for its loss, which is what stops a run at its first
      NaN: for a step of a second or more, waiting costs nothing.

    Raises:
      Diverged: at the first loss or gradient that is not finite.
    """
    adapted = adapt(loss_fn)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(adapters: Any, opt_state: Any, base: Any, batch: Any) -> tuple:
        def objective(adapters: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return adapted(combine(base, adapters), batch)

        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(adapters)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss, metrics

    opt_state, good = tx.init(adapters), None
    for number, batch in enumerate(batches, 1):
        updated, opt_state, loss, metrics = update(adapters, opt_state, base, batch)
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(loss):
            raise Diverged(number, good, float(loss))  # the step before led here
        if not math.isfinite(values["grad_norm"]):
            raise Diverged(number, adapters, float(loss))
        good, adapters = adapters, updated
        yield Step(number, adapters, float(loss), values)


def answer_logits(model: Any, answers: np.ndarray) -> LogitsFn:
    """Classification by a language model: the logits of the answers alone, where they are due.

    Args:
      model: an `lj.models` decoder.
      answers: the token of each class, int32 [C].

    Returns:
      A function of parameters and a batch, to logits float32 [N, C].
    """

    def fn(params: Any, batch: Batch) -> jax.Array:
        variables = {"params": params}
        hidden = model.apply(
            variables, batch.tokens, batch.positions, batch.segment_ids, method="hidden"
        )
        last = hidden[batch.row, batch.column]  # [N, D]
        return model.apply(variables, last, method="unembed")[:, answers]  # [N, V] -> [N, C]

    return fn


def answer_loss(model: Any, answers: np.ndarray) -> LossFn:
    """Mean cross-entropy over the answers, and the share of examples answered correctly."""
    logits_of = answer_logits(model, answers)

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = logits_of(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)  # [N]
        correct = (jnp.argmax(logits, -1) == batch.label).astype(jnp.float32)
        number = jnp.maximum(batch.weight.sum(), 1)
        loss, accuracy = ((x * batch.weight).sum() / number for x in (losses, correct))
        return loss, {"accuracy": accuracy}

    return loss_fn


class Scores(NamedTuple):
    """How a model does on labelled examples.

    Attributes:
      accuracy: share of examples whose most probable answer is right.
      nll: mean negative log-likelihood of the right answer among the answers, in nats.
      probabilities: of each class, float32 [examples, C], in the examples' order.
    """

    accuracy: float
    nll: float
    probabilities: np.ndarray


def scorer(logits_fn: LogitsFn) -> ScoreFn:
    """A function of base, adapters and batch, compiled once, to log probabilities [N, C].

    Args:
      logits_fn: a plain function, such as `answer_logits` gives; it is adapted here.
    """
    adapted = adapt(logits_fn)
    return jax.jit(
        lambda base, adapters, batch: jax.nn.log_softmax(adapted(combine(base, adapters), batch))
    )


def evaluate(score: ScoreFn, base: Any, adapters: Any, batches: Iterable[Batch]) -> Scores:
    """Scores adapters on labelled examples.

    Args:
      score: from `scorer`.
      base: the frozen tree.
      adapters: the adapters to score.
      batches: as `lj.data.pack` gives; each example is in them once.

    Returns:
      The scores over all examples.
    """
    log_probabilities, labels = {}, {}
    for batch in batches:
        rows = np.asarray(score(base, adapters, batch))  # [N, C]
        for place in np.flatnonzero(batch.weight):
            log_probabilities[int(batch.which[place])] = rows[place]
            labels[int(batch.which[place])] = int(batch.label[place])
    order = sorted(labels)
    table = np.stack([log_probabilities[k] for k in order])  # [examples, C]
    right = np.array([labels[k] for k in order])
    return Scores(
        accuracy=float(np.mean(table.argmax(-1) == right)),
        nll=float(-np.mean(table[np.arange(len(order)), right], dtype=np.float64)),
        probabilities=np.exp(table),
    )
