"""Makes smollm2.npz: some logits of SmolLM2-135M-Instruct, by transformers from the same GGUF file.

    python tests/golden/make_smollm2.py

Needs the `interop` extra; made with transformers 5.23.0 and torch 2.13.0, in float32.

    vocabulary        [64] token ids, drawn at random
    tokens_{i}        [T] token ids of the i-th text
    logits_{i}        [T, 64], of the tokens in `vocabulary`
    normalizer_{i}    [T], the logarithm of the sum of all exponentiated logits
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import fetch

TEXTS = (
    "The capital of France is Paris.",
    "<|im_start|>user\nIs this headline satire? area man passionate defender of what he imagines "
    "constitution to be<|im_end|>\n<|im_start|>assistant\nYes",
    "The history of the city goes back more than two thousand years. It was founded as a small "
    "trading post on the banks of the river, and it grew quickly because merchants from the north "
    "and the south met there to exchange grain, salt, wool and metal. In the Middle Ages the city "
    "was surrounded by a high stone wall with seven gates, three of which still stand today. A "
    "great fire destroyed most of the wooden houses in 1542, and after that the council ordered "
    "that all new buildings should be made of brick.",
)


def main() -> None:
    path = fetch("smollm2-135m-instruct")
    tokenizer = read_gguf(path).tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    vocabulary = np.random.default_rng(0).choice(model.config.vocab_size, 64, replace=False)
    arrays = {"vocabulary": vocabulary}
    for index, text in enumerate(TEXTS):
        tokens = np.asarray(tokenizer.encode(text).ids)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
        arrays[f"tokens_{index}"] = tokens
        arrays[f"logits_{index}"] = logits[:, vocabulary].numpy()
        arrays[f"normalizer_{index}"] = logits.logsumexp(-1).numpy()
    np.savez_compressed(Path(__file__).with_name("smollm2.npz"), **arrays)


if __name__ == "__main__":
    main()
