"""Folders that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def require_replaceable(target: Path, own: str) -> None:
    """Sees to it that nothing is lost when a folder takes a place.

    Args:
      target: the place.
      own: a regular expression of the names that such a folder has.

    Raises:
      FileExistsError: if there is a file, or a folder with anything else in it.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; write the name of a new folder.")
    others = sorted(x.name for x in target.iterdir() if not re.fullmatch(own, x.name))
    if others:
        raise FileExistsError(
            f"{target} holds something else already ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); write the name of a new folder."
        )


@contextlib.contextmanager
def written_folder(target: Path, own: str) -> Iterator[Path]:
    """A folder to write to, which takes its place once the block has come to its end.

    Args:
      target: the place; an older folder of the same kind there is replaced.
      own: a regular expression of the names that such a folder has.

    Yields:
      An empty folder beside the place.

    Raises:
      FileExistsError: if the place holds something else.
      OSError: if the folder cannot be written; what was there before is still there.
    """
    target = target.resolve()  # of a link, what it points to is replaced
    require_replaceable(target, own)
    partial, old = (
        target.with_name(f".{target.name}.{os.getpid()}.{x}") for x in ("partial", "old")
    )
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():  # folders cannot be renamed over one another
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk: a rename must not reach it before."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
