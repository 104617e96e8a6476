"""Makes tiny_llama.npz: a random Llama's weights, logits and gradients, by transformers.

    python tests/golden/make_tiny_llama.py

Needs the `interop` extra; made with transformers 5.23.0 and torch 2.13.0, computing in float64. The
widths are all different, and neither theta nor epsilon is a default, so that no mix-up goes unseen.

    config                the model's config.json
    weight/<name>         float16 (the model is rounded to it), by the names of transformers
    tokens                [2, 12]
    logits, tied_logits   [2, 12, V], with the model's own head and with its embedding
    padded_tokens         [2, 12], the second row beginning with 5 tokens of padding
    padded_logits         [2, 12, V], zero where there is padding; the model never saw any
    gradient/<name>       of the mean next-token loss on `tokens`, for some of the weights
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PADDING = 5
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
DIFFERENTIATED = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.2.post_attention_layernorm.weight",
    "lm_head.weight",
)


def build(*, tied: bool, weights: dict[str, np.ndarray] | None = None) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied)).double().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights is None:
                values = rng.normal(size=parameter.shape) * (0.5 if parameter.ndim == 2 else 0.2)
                values = (values + (parameter.ndim == 1)).astype(np.float16)
            else:
                values = weights[name]
            parameter.copy_(torch.from_numpy(values))
    return model


def main() -> None:
    model = build(tied=False)
    weights = {name: p.detach().numpy().astype(np.float16) for name, p in model.named_parameters()}
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG["vocab_size"], (2, 12))
    padded_tokens = rng.integers(0, CONFIG["vocab_size"], (2, 12))

    output = model(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    output.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    with torch.no_grad():
        tied_logits = build(tied=True, weights=weights)(input_ids=torch.from_numpy(tokens)).logits
        padded_logits = model(input_ids=torch.from_numpy(padded_tokens)).logits
        padded_logits[1, :PADDING] = 0
        rest = torch.from_numpy(padded_tokens[1:, PADDING:])
        padded_logits[1:, PADDING:] = model(input_ids=rest).logits

    single = lambda values: np.asarray(values, np.float32)  # noqa: E731
    np.savez_compressed(
        Path(__file__).with_name("tiny_llama.npz"),
        config=json.dumps(model.config.to_dict(), sort_keys=True),
        tokens=tokens,
        logits=single(output.logits.detach()),
        tied_logits=single(tied_logits),
        padded_tokens=padded_tokens,
        padded_logits=single(padded_logits),
        loss=single(output.loss.detach()),
        **{f"weight/{name}": values for name, values in weights.items()},
        **{f"gradient/{name}": single(gradients[name]) for name in DIFFERENTIATED},
    )


if __name__ == "__main__":
    main()
