"""Policy gradient with advantages within a group (GRPO, Shao et al., arXiv:2402.03300).

    advantage = (reward - mean of its group) / standard deviation of its group
    loss = -advantage * log p(token) + beta * KL(policy || reference), mean over tokens

Each step samples a group of replies to every prompt from the policy as it is then, so that the
ratio of new to old policy is one and needs no clipping. The reference is the policy with its
adapters switched off. A reward is any function; here, the share of a reply's tokens that are even
if its prompt is even, and odd if it is odd.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.generate import generate
from lora_jax.models.decoder import Decoder, DecoderConfig

VOCAB, PROMPTS, GROUP, BETA = 16, 8, 8, 0.02
SHAPE = {"dim": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
MODEL = Decoder(DecoderConfig(vocab_size=VOCAB, head_dim=32, **SHAPE))


def reward(prompts, replies):
    """From tokens [B, 1] and [B, T] to [B], on the host: it need not be differentiable."""
    return (replies % 2 == prompts % 2).mean(-1)


def token_log_likelihoods(adapters, base, tokens):
    """Of each token after the prompt's one, [B, T]."""
    logits = lj.adapt(MODEL.apply)({"params": lj.combine(base, adapters)}, tokens[:, :-1])
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def grpo_loss(adapters, base, batch, key):
    """The loss, and how far the policy has moved, in nats a token."""
    tokens, advantages = batch  # [B, 1 + T], [B]
    policy = token_log_likelihoods(adapters, base, tokens)
    log_ratio = token_log_likelihoods(None, base, tokens) - policy
    kl = jnp.exp(log_ratio) - log_ratio - 1  # unbiased, and never negative
    return (BETA * kl - advantages[:, None] * policy).mean(), {"kl": kl.mean()}


def main(steps=40):
    """Trains, and returns the mean reward of the first replies and of the last."""
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    base = lj.quantize(params, "layers/.*/kernel", layout="b i o")
    adapters = lj.init_adapters(jax.random.key(1), base, lj.LoraRule("kernel", rank=8))
    tx, rng, rewards = optax.adam(3e-3), np.random.default_rng(0), []
    step = lj.train.make_step(grpo_loss, tx)
    state = lj.train.init_state(jax.random.key(2), adapters, tx)
    for number in range(steps):
        prompts = np.tile(rng.integers(VOCAB, size=(PROMPTS, 1)), (GROUP, 1))
        sampling = {"max_tokens": 8, "temperature": 1.0, "key": jax.random.key(number)}
        replies = np.array(generate(MODEL, base, state.adapters, prompts.tolist(), **sampling))
        groups = reward(prompts, replies).reshape(GROUP, PROMPTS)  # a column has one prompt
        advantages = ((groups - groups.mean(0)) / (groups.std(0) + 1e-4)).reshape(-1)
        state, metrics = step(state, base, (np.hstack([prompts, replies]), advantages))
        rewards.append(groups.mean())
        print(f"step {number}: reward {rewards[-1]:.3f}, KL {metrics['kl']:.3f}")
    return rewards[0], np.mean(rewards[-5:])


if __name__ == "__main__":
    main()
