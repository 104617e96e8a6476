"""Files that were made to hurt: a clear error within a second and 512 MiB.

All are read by one process, whose memory and time on the processor are measured: another load on
the machine makes neither larger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_folder import write_folder
from hostile_cases import CASES

from lora_jax.formats import read_model

TESTS = Path(__file__).parent
SECONDS, MEBIBYTES = 1.0, 512


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each case."""
    command = [sys.executable, str(TESTS / "hostile_cases.py"), str(tmp_path_factory.mktemp("all"))]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_a_sentence_at_once(outcomes, name):
    found, case = outcomes[name], CASES[name]
    assert found["kind"] == case.kind, found
    assert case.sentence in found["sentence"]
    assert found["sentence"].isprintable()
    assert len(found["sentence"]) < 2_000
    assert found["seconds"] < SECONDS
    assert found["mebibytes"] < MEBIBYTES


def test_links_within_a_folder_and_in_the_cache_of_the_hub_are_followed(tmp_path):
    folder = write_folder(tmp_path / "models--a--b" / "snapshots" / "1")
    for name in ("model.safetensors", "config.json"):
        (folder / name).replace(tmp_path / name)
        (folder / name).symlink_to(f"../../../{name}")
    (folder / "tokenizer.json").rename(folder / "tokens")
    (folder / "tokenizer.json").symlink_to("tokens")
    (tmp_path / "link").symlink_to(folder)
    assert read_model(folder).name == "a/b"
    read_model(tmp_path / "link")
