"""Files that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Paths to write to, which take the place of others once all of them are complete.

    Args:
      *paths: the files to write or replace, in folders that are there.

    Yields:
      A path beside each. What was there before is left as it is if the block, or the disk, fails.

    Raises:
      OSError: if a file cannot be written.
    """
    partials = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths]
    try:
        yield partials
        for partial in partials:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())  # a rename must not reach the disk before the content
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
