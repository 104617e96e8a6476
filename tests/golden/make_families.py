"""Makes families.npz: logits of a tiny model of each family, by transformers.

    PYTHONPATH=tests python tests/golden/make_families.py

Needs the `interop` extra; made with transformers 5.23.0 and torch 2.13.0, computing in float64 but
for the norms. The models are those of tests/family_cases.py, weights and all.

    <case>/logits    [2, 16, V], of the tokens there
    <case>/shorter   [11, V], of the second text without its first 5 tokens
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from family_cases import CASES, GOLDEN_FILE, SHORT, TOKENS, write_family
from transformers import AutoModelForCausalLM


def main() -> None:
    found = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_family(Path(folder), config)
            model, read = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        assert not any(read.values()), (name, read)
        with torch.no_grad():
            logits = model(torch.from_numpy(TOKENS)).logits
            shorter = model(torch.from_numpy(TOKENS[1:, SHORT:])).logits[0]
        found[f"{name}/logits"] = np.asarray(logits, np.float32)
        found[f"{name}/shorter"] = np.asarray(shorter, np.float32)
    np.savez_compressed(GOLDEN_FILE, **found)


if __name__ == "__main__":
    main()
