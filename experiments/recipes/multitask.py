"""Several tasks in one batch: one 4-bit base, a stack of adapters, and each row its own task's.

The leaves of adapters may have leading axes. Stacked over tasks they are still one tree that any
optimizer takes; a row picks its task's adapter by an index, `vmap` runs the rows side by side, and
the gradient of the look-up returns to each task only what its own rows have said.

Toy: task k counts in steps of k + 1. No row says which task it is: its adapter knows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.models.decoder import Decoder, DecoderConfig

VOCAB, LENGTH, TASKS = 16, 8, 3
SHAPE = {"dim": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
MODEL = Decoder(DecoderConfig(vocab_size=VOCAB, head_dim=32, **SHAPE))
apply = lj.adapt(MODEL.apply)


def next_token_loss(adapters, base, batch, key):
    """The loss over all tasks, and the share of tokens that are right."""
    task, tokens = batch  # [B], [B, T]

    def one_row(task, tokens):
        adapter = jax.tree.map(lambda leaf: leaf[task], adapters)
        return apply({"params": lj.combine(base, adapter)}, tokens[None, :-1])[0]  # [T-1, V]

    logits = jax.vmap(one_row)(task, tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    right = (logits.argmax(-1) == tokens[:, 1:]).mean(-1)  # [B]
    return losses.mean(), {"accuracy": right.mean()}


def rows_of_all_tasks(rng, rows=48):
    """Task numbers [B], and tokens [B, LENGTH] that count in the step of their task."""
    task, start = rng.integers(TASKS, size=rows), rng.integers(VOCAB, size=rows)
    return task, (start[:, None] + np.outer(task + 1, np.arange(LENGTH))) % VOCAB


def main(steps=60):
    """Trains, and returns the share of right tokens, also with the wrong task's adapter."""
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    base = lj.quantize(params, "layers/.*/kernel", layout="b i o")
    keys = jax.random.split(jax.random.key(1), TASKS)
    rule = lj.LoraRule("kernel", rank=4)
    adapters = jax.vmap(lambda key: lj.init_adapters(key, base, rule))(keys)
    rng, (task, tokens) = np.random.default_rng(0), rows_of_all_tasks(np.random.default_rng(1))
    batches, tx = (rows_of_all_tasks(rng) for _ in range(steps)), optax.adam(1e-2)
    key = jax.random.key(2)
    fitted = lj.train.fit(next_token_loss, base, adapters, tx, batches, key=key, steps=steps)
    accuracy = jax.jit(lambda a, t: next_token_loss(a, base, (t, tokens), None)[1]["accuracy"])
    before, after = accuracy(adapters, task), accuracy(fitted.adapters, task)
    swapped = accuracy(fitted.adapters, (task + 1) % TASKS)
    print(f"tokens right: {before:.1%} -> {after:.1%}, with another task's adapter {swapped:.1%}")
    return before, after, swapped


if __name__ == "__main__":
    main()
