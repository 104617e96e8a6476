"""Perplexity of a GGUF model on its own 4 bits, on the same decoded, and on those stored as NF4.

    python experiments/packed_base/perplexity.py wiki.test.txt     # minutes on two CPU cores

The text is cut into windows of 512 tokens, each read from its beginning; all but a window's first
token are predicted. Writes results/perplexity.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax import data, train
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import Model, load_model
from lora_jax.core.tree import named_leaves

HERE = Path(__file__).parent
LENGTH, ROWS = 512, 4
BASES = ("q4_1", "float32", "nf4")


def main() -> None:
    """Scores one base after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="a text file, which may be gzipped")
    parser.add_argument("--model", default=ModelOptions.model, help="as for lora-jax finetune")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()

    open_text: Any = gzip.open if args.text.suffix == ".gz" else open
    with open_text(args.text, "rt", encoding="utf-8") as file:
        text = file.read()
    results: dict[str, Any] = {
        "model": args.model,
        "text": args.text.name,
        "windows": args.windows,
        "length": LENGTH,
        "jax": jax.__version__,
    }
    kernels = {}
    for base in BASES:
        model = load_model(ModelOptions(model=args.model, base=base))
        batches = windows(model, text, args.windows)
        scores = train.evaluate_nll(model.decoder, model.base, None, batches)
        count = lj.count_params(model.base, None)
        kernels[base] = {p: x for p, x in named_leaves(model.base) if p.endswith("/kernel")}
        of_kernels = lj.count_params(kernels[base], None)
        results[base] = {
            "nll": scores.nll,
            "perplexity": scores.perplexity,
            "tokens": scores.tokens,
            "bits_of_a_kernel_parameter": 8 * of_kernels.frozen_bytes / of_kernels.frozen,
            "bits_of_a_parameter": 8 * count.frozen_bytes / count.frozen,
        }
        print(base, json.dumps(results[base], indent=2), flush=True)
    results["kernels_of_other_values_than_decoded"] = [
        path
        for path, leaf in kernels["q4_1"].items()
        if np.asarray(lj.dequantize(leaf)).tobytes()
        != np.asarray(kernels["float32"][path]).tobytes()
    ]
    (HERE / "results" / "perplexity.json").write_text(json.dumps(results, indent=2) + "\n")
    print("kernels that differ:", results["kernels_of_other_values_than_decoded"])


def windows(model: Model, text: str, number: int) -> list[data.Batch]:
    """The beginning of the text in rows of one window each."""
    tokens = model.tokenizer.encode(text, add_special_tokens=False).ids[: number * LENGTH]
    rows = np.array(tokens, np.int32).reshape(number, LENGTH)
    weights = np.ones(LENGTH, np.float32)
    weights[0] = 0
    sequences = [data.Encoded(row, weights, record=0) for row in rows]
    return data.evaluation_batches(sequences, rows=ROWS, length=LENGTH)


if __name__ == "__main__":
    main()
