"""Where fetched files are kept, and what is said when one cannot be had."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


class SourceError(RuntimeError):
    """A source that could not be fetched; says what happened and what to do, in a sentence."""


def cache_dir() -> Path:
    """The folder of fetched files: `$LORA_JAX_CACHE`, or `lora_jax` in the user's cache folder."""
    if chosen := os.environ.get("LORA_JAX_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        user = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user / "lora_jax"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
