"""Makes generation.json: what transformers' generate writes with the weights of tiny_llama.npz.

    python tests/golden/make_generation.py

Needs the `interop` extra; made with transformers 5.23.0 and torch 2.13.0, computing in float64.
Each prompt was continued alone, greedily; the margin is the least distance between the two highest
logits of a step, so that no difference in rounding can decide for another token.

    prompts, continuations    lists of token ids
    margin                    one for each prompt
"""

import json
from pathlib import Path

import numpy as np
import torch
from make_tiny_llama import build

LENGTHS = (1, 3, 8, 13, 70)
TOKENS = 24


def main() -> None:
    here = Path(__file__).parent
    golden = np.load(here / "tiny_llama.npz")
    weights = {
        name.removeprefix("weight/"): values
        for name, values in golden.items()
        if name.startswith("weight/")
    }
    model = build(tied=False, weights=weights)
    rng = np.random.default_rng(2)
    found = {"prompts": [], "continuations": [], "margin": []}
    for length in LENGTHS:
        prompt = rng.integers(0, model.config.vocab_size, length)
        output = model.generate(
            torch.from_numpy(prompt)[None],
            attention_mask=torch.ones((1, length), dtype=torch.int64),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        two = torch.stack(output.logits).topk(2).values
        found["prompts"].append(prompt.tolist())
        found["continuations"].append(output.sequences[0, length:].tolist())
        found["margin"].append(float((two[..., 0] - two[..., 1]).min()))
    (here / "generation.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
