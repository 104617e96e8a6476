"""The default run over three seeds, on the 4-bit base and on the unquantized one.

    python experiments/satire/seeds.py        # six runs, one after the other

Writes results/seeds.json. A run that has a folder in runs/satire already is not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/satire")
SEEDS = (0, 1, 2)
BASES = ("nf4", "float32")


def main() -> None:
    """Runs what has not been run, and gathers what came out."""
    results: dict[str, list[dict]] = {}
    for base in BASES:
        for seed in SEEDS:
            out = RUNS / f"{base}-{seed}"
            command = [sys.executable, "-m", "lora_jax.cli", "finetune"]
            command += ["--base", base, "--seed", str(seed), "--out", str(out)]
            if not (out / "result.json").exists():
                subprocess.run(command, check=True)
            result = json.loads((out / "result.json").read_text())
            results.setdefault(base, []).append({"seed": seed, **result})
    (HERE / "results" / "seeds.json").write_text(json.dumps(results, indent=2) + "\n")
    for base, runs in results.items():
        for when in ("before", "after"):
            scores = [run["test"][when] for run in runs]
            accuracies = [100 * score["accuracy"] for score in scores]
            print(
                f"{base} {when}: mean {statistics.mean(accuracies):.1f} %, "
                f"least {min(accuracies):.1f} %, all {[round(x, 1) for x in accuracies]}, "
                f"NLL {statistics.mean(score['nll'] for score in scores):.3f}"
            )


if __name__ == "__main__":
    main()
