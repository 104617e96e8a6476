"""What fuzzing found, read again: each input that crashed, or leads to a refusal of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.targets import TARGETS, refusal

CORPUS = Path(__file__).parent / "fuzz" / "corpus"


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda x: f"{x.parent.name}-{x.name}"
)
def test_is_read_or_refused_in_a_sentence(path):
    refused = refusal(TARGETS[path.parent.name].read, path.read_bytes())
    # What crashed may be read by now; what was refused is no better since.
    assert refused is not None or path.name.startswith("crash-")


@pytest.mark.parametrize("name", TARGETS)
def test_what_fuzzing_begins_with_is_read(name):
    """Some of it at least, or nothing behind the first refusal would be reached."""
    target = TARGETS[name]
    assert any(refusal(target.read, data) is None for data in target.seeds())
