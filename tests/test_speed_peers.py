"""Peers beside our step: who is meant, what is compared, what is said of those that fail."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "speed"
OURS = {
    "setting": {"remat": "layer"},
    "milliseconds": 500.0,
    "tokens_per_second": 16_384.0,
    "peak_gib": 30.0,
    "utilization": 0.6,
}
SLOWER = {"peer": "unsloth", "variant": "false", "milliseconds": 750.0, "peak_gib": 40.0}
SLOWER |= {"tokens_per_second": 8_192 / 0.75}
FAILED = {"peer": "peft", "variant": "none", "error": "OutOfMemoryError: no\n memory"}


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(FOLDER))
    try:
        yield runpy.run_path(str(FOLDER / "peers.py"))
    finally:
        sys.path.remove(str(FOLDER))


def test_a_peer_stands_for_its_variants(peers):
    unsloth = [("unsloth", variant) for variant in ("false", "true", "unsloth")]
    assert peers["chosen"]("peft:none,unsloth") == [("peft", "none"), *unsloth]
    with pytest.raises(SystemExit, match=r"'axolotl' is no peer; write some of peft, unsloth, "):
        peers["chosen"]("peft,axolotl")


def test_the_table_has_ratios_and_failures(peers):
    rows = peers["compared"](OURS, [FAILED, SLOWER])
    lines = peers["table"](OURS, rows).splitlines()
    assert lines[1].split() == ["lora_jax:layer", "500.0", "16,384", "30.00", "60.0%"]
    numbers = ["750.0", "10,923", "40.00", "40.0%", "1.50x", "0.75x"]
    assert lines[2].split() == ["unsloth:false", *numbers]
    assert lines[3:] == ["peft:none: OutOfMemoryError: no memory"]


def test_peers_of_another_step_are_refused(peers, tmp_path):
    path = tmp_path / "both.json"
    names = ("shape", "layers", "batch", "length", "rank", "kind")
    setting = dict.fromkeys(names, "1")
    path.write_text(json.dumps({"setting": setting, "peers": [SLOWER]}))
    assert peers["earlier"](path, setting | {"remat": "none"}) == [SLOWER]
    with pytest.raises(SystemExit, match="has peers of length 1, and this is length 2"):
        peers["earlier"](path, setting | {"length": "2"})
