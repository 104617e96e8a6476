"""DPO (Rafailov et al., arXiv:2305.18290) whose reference is the same model, adapters switched off.

    loss = -log sigmoid(beta * (m - m_ref)),    m = log p(chosen) - log p(rejected)

The reference needs no second copy of the weights and no file of log-likelihoods: `adapters=None` is
the model that training started from. The toy preference: replies that count on from the prompt.

Yours: a model from `lj.formats.read_model`, and pairs of tokenized replies with their weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.models.decoder import Decoder, DecoderConfig

VOCAB, PROMPT, REPLY, BETA = 16, 2, 6, 0.1
SHAPE = {"dim": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
MODEL = Decoder(DecoderConfig(vocab_size=VOCAB, head_dim=32, **SHAPE))
apply = lj.adapt(MODEL.apply)


def reply_log_likelihood(adapters, base, tokens):
    """Of each row's reply, [B]; the prompt in front of it is given."""
    logits = apply({"params": lj.combine(base, adapters)}, tokens[:, :-1])  # [B, T-1, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])  # [B, T-1]
    return -losses[:, PROMPT - 1 :].sum(-1)


def dpo_loss(adapters, base, batch, key):
    """The loss, and the share of pairs whose chosen reply is likelier than the rejected one."""

    def margin(adapters):
        chosen, rejected = (reply_log_likelihood(adapters, base, tokens) for tokens in batch)
        return chosen - rejected

    learned, reference = margin(adapters), margin(None)
    loss = -jax.nn.log_sigmoid(BETA * (learned - reference)).mean()
    return loss, {"accuracy": (learned > 0).mean()}


def pairs(rng, rows=32):
    """Tokens [B, PROMPT + REPLY] with the chosen replies, and with the rejected ones."""
    prompt = rng.integers(VOCAB, size=(rows, PROMPT))
    chosen = (prompt[:, -1:] + np.arange(1, REPLY + 1)) % VOCAB
    rejected = rng.integers(VOCAB, size=(rows, REPLY))
    return np.hstack([prompt, chosen]), np.hstack([prompt, rejected])


def main(steps=60):
    """Trains, and returns the share of pairs never trained on that are in order."""
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    base = lj.quantize(params, "layers/.*/kernel", layout="b i o")
    adapters = lj.init_adapters(jax.random.key(1), base, lj.LoraRule("kernel", rank=8))
    rng, held_out = np.random.default_rng(0), pairs(np.random.default_rng(1), rows=512)
    preferred = jax.jit(lambda adapters: dpo_loss(adapters, base, held_out, None)[1]["accuracy"])
    batches, tx = (pairs(rng) for _ in range(steps)), optax.adam(3e-3)
    fitted = lj.train.fit(dpo_loss, base, adapters, tx, batches, key=jax.random.key(2), steps=steps)
    before, after = preferred(adapters), preferred(fitted.adapters)
    print(f"held-out pairs whose chosen reply is likelier: {before:.1%} -> {after:.1%}")
    return before, after


if __name__ == "__main__":
    main()
