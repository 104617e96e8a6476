"""The same step by other libraries, beside ours: who to run, each in its own process, and a table.

Used by `train_step.py --against`, before JAX takes the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_step import VARIANTS, outcome

STEP = Path(__file__).with_name("peer_step.py")
LOG = 4000  # last characters of what a peer that failed has printed
# What has to be equal for two steps to be compared.
SAME = ("shape", "layers", "batch", "length", "rank", "kind")


def chosen(text: str) -> list[tuple[str, str]]:
    """Peers and variants of `peft,unsloth:false`; a peer alone stands for all its variants."""
    known = [(peer, variant) for peer, variants in VARIANTS.items() for variant in variants]
    pairs = []
    for word in text.split(","):
        meant = [pair for pair in known if word in (pair[0], ":".join(pair))]
        if not meant:
            names = [*VARIANTS, *map(":".join, known)]
            raise SystemExit(f"--against: {word!r} is no peer; write some of {', '.join(names)}")
        pairs += meant
    return list(dict.fromkeys(pairs))


def run(
    pairs: Sequence[tuple[str, str]], fields: Mapping[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures them one after the other.

    Args:
      pairs: Peers and their variants.
      fields: Of a Llama's config.json.
      args: Of train_step.py.

    Returns:
      What peer_step.py printed of each, or in its place an `error` and the end of its `log`.
    """
    options = ["--fields", json.dumps(fields)]
    for name in ("batch", "length", "rank", "kind", "steps"):
        options += [f"--{name}", str(getattr(args, name))]
    found = []
    # A model that is saved, and what Unsloth writes where it is started, are gone afterwards.
    with tempfile.TemporaryDirectory() as folder:
        for peer, variant in pairs:
            command = [sys.executable, str(STEP), peer, variant, *options, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            row = {"peer": peer, "variant": variant, **outcome(done)}
            if "error" in row:
                row["log"] = (done.stdout + done.stderr)[-LOG:]
            print(f"  {line(row)}", flush=True)
            found.append(row)
    return found


def line(row: Mapping[str, Any]) -> str:
    """One peer's numbers, or why there are none, on a line."""
    name = f"{row['peer']}:{row['variant']}"
    if "error" in row:
        return f"{name}: {' '.join(row['error'].split())[:200]}"
    return (
        f"{name}: {row['milliseconds']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, peak "
        f"{row['peak_gib']:.2f} GiB ({row['reserved_gib']:.2f} reserved)"
    )


def earlier(path: Path, setting: Mapping[str, str]) -> list[dict[str, Any]]:
    """The peers in what an earlier call of train_step.py wrote, if their step is the same."""
    written = json.loads(path.read_text())
    if not written.get("peers"):
        raise SystemExit(f"{path} has no peers; write --against peft,unsloth to measure them")
    if different := [name for name in SAME if written["setting"][name] != setting[name]]:
        name = different[0]
        raise SystemExit(
            f"{path} has peers of {name} {written['setting'][name]}, and this is "
            f"{name} {setting[name]}; write --against peft,unsloth to measure them"
        )
    return written["peers"]


def compared(ours: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The peers with our tokens/s and peak as ratios to theirs, and their share of the ceiling."""
    rows = []
    for peer in peers:
        row = dict(peer)
        if "error" not in row:
            row["tokens_ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]
            row["memory_ratio"] = ours["peak_gib"] / (row["peak_gib"] or float("nan"))
            # The step's products are the same, and so is the limit of products.
            row["utilization"] = ours["utilization"] / row["tokens_ratio"]
        rows.append(row)
    return rows


def table(ours: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """All of them as a table; those without numbers under it, a line each."""
    head = ("", "ms", "tokens/s", "peak GiB", "of the ceiling", "our tokens/s", "our memory")
    cells = [head, (f"lora_jax:{ours['setting']['remat']}", *_numbers(ours), "", "")]
    for row in rows:
        if "error" not in row:
            ratios = f"{row['tokens_ratio']:.2f}x", f"{row['memory_ratio']:.2f}x"
            cells.append((f"{row['peer']}:{row['variant']}", *_numbers(row), *ratios))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]).rstrip()
        for name, *numbers in cells
    ]
    return "\n".join(lines + [line(row) for row in rows if "error" in row])


def _numbers(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['milliseconds']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_gib']:.2f}",
        f"{row['utilization']:.1%}",
    )
