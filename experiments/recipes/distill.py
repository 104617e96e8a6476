"""Distillation (Hinton et al., arXiv:1503.02531): LoRA wins back what 4 bits cost.

The teacher is the dense model, the student the same weights in NF4 with adapters beside them; the
loss is KL(teacher || student) in every position, on text that nobody had to label. The frozen tree
that `fit` hands to the loss may be any pytree: here it holds both. A larger teacher only needs a
model function of its own and the same vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.models.decoder import Decoder, DecoderConfig

VOCAB, LENGTH = 16, 32
SHAPE = {"dim": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
MODEL = Decoder(DecoderConfig(vocab_size=VOCAB, head_dim=32, **SHAPE))
apply = lj.adapt(MODEL.apply)


def distillation_loss(adapters, base, batch, key):
    """The divergence a token, and how often the likeliest token is the same."""
    taught = jax.nn.log_softmax(MODEL.apply({"params": base["teacher"]}, batch))  # [B, T, V]
    tree = lj.combine(base["student"], adapters)
    learned = jax.nn.log_softmax(apply({"params": tree}, batch))
    loss = (jnp.exp(taught) * (taught - learned)).sum(-1).mean()
    return loss, {"agreement": (taught.argmax(-1) == learned.argmax(-1)).mean()}


def main(steps=150):
    """Trains, and returns the divergence on tokens never trained on."""
    teacher = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    student = lj.quantize(teacher, "layers/.*/kernel", layout="b i o")
    student = lj.quantize(student, "lm_head/kernel")
    adapters = lj.init_adapters(jax.random.key(1), student, lj.LoraRule("kernel", rank=8))
    base = {"teacher": teacher, "student": student}
    rng = np.random.default_rng(0)
    held_out = np.random.default_rng(1).integers(VOCAB, size=(64, LENGTH))
    divergence = jax.jit(lambda adapters: distillation_loss(adapters, base, held_out, None)[0])
    batches = (rng.integers(VOCAB, size=(16, LENGTH)) for _ in range(steps))
    tx, key = optax.adam(3e-3), jax.random.key(2)
    fitted = lj.train.fit(distillation_loss, base, adapters, tx, batches, key=key, steps=steps)
    before, after = divergence(adapters), divergence(fitted.adapters)
    print(f"KL(teacher || student) on held-out tokens, in nats: {before:.4f} -> {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
