"""Files that somebody else may have written: which of them are opened, and their JSON.

Whoever reads a file believes nothing that it says. So what could take a second or all memory is
refused by its size before it is parsed, and what is shown of a value in a sentence is short.
"""

from __future__ import annotations

import collections
import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST = 2**24  # bytes of JSON; the largest heads and indices of models that there are have 9 MB
MOST = 500_000  # objects and lists in it; a head has three for a tensor
MOST_VALUES = 1_500_000  # commas, really; a head has seven for a tensor
DEEPEST = 64  # lists within lists: all that walks through a value does so recursively
_LONGEST_NAME = 512  # characters
_MOST_PACKED = 200  # times smaller than what it unpacks to; text hardly comes to 20
_SMALL = 2**26  # bytes that may be unpacked from however few


def shown(value: Any) -> str:
    """A value in a sentence, on one line and cut where it is long."""
    words = reprlib.Repr()
    words.maxlevel, words.maxlist, words.maxtuple, words.maxdict = 3, 12, 12, 6
    words.maxstring = words.maxother = words.maxlong = 80
    return words.repr(value)


def is_name(text: Any) -> bool:
    """Whether something can be the name of a tensor, a field or a file: a short line of text."""
    return isinstance(text, str) and text.isprintable() and 0 < len(text) <= _LONGEST_NAME


def is_file_name(text: Any) -> bool:
    """Whether something can be the name of a file, in whatever folder."""
    return is_name(text) and "/" not in text and text != ".." and len(text.encode()) <= 255


def plain(text: str) -> str:
    """A name as it is, or quoted where it is none, for it could have lines or colour a terminal."""
    return text if is_name(text) else shown(text)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether so many bytes that unpack to so many are there to fill a memory or a disk."""
    return unpacked > _SMALL and unpacked > _MOST_PACKED * packed


def file_in(folder: Path, name: str) -> Path | None:
    """A file of a folder; None if there is none of that name, or it is a folder, pipe or device.

    Raises:
      ValueError: if it is a link out of the folder, which could point at anything. In the cache of
        Hugging Face's hub, where files are links to what several revisions share, they may point
        anywhere in that cache.
    """
    path = folder / name
    if not path.is_file():
        return None
    if path.is_symlink():
        home, target = folder.resolve(), path.resolve()
        if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
            home = home.parents[2]
        if not target.is_relative_to(home):
            raise ValueError(
                f"{path} is a link to {shown(str(target))}, out of its folder, and so may be "
                "anything; put the file itself there."
            )
    return path


def read_small(path: Path, most: int) -> bytes:
    """The content of a file.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it has more bytes than that.
    """
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise _too_large(str(path), f"{size:,} bytes", most)
        return file.read(most)


def _too_large(where: str, found: str, most: int) -> ValueError:
    return ValueError(
        f"{where} has {found}, expected at most {most:,}: it is not what its name says. Fetch the "
        "file again."
    )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      OSError: if it cannot be read.
      ValueError: as `parse_object`.
    """
    return parse_object(read_small(path, LONGEST), str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The object that some JSON describes.

    Args:
      content: UTF-8.
      where: it stood, for messages.

    Returns:
      The object, of at most `LONGEST` bytes and few levels, with each name once.

    Raises:
      ValueError: if it is none, or too large to be what it should.
    """
    if len(content) > LONGEST:
        raise _too_large(where, f"{len(content):,} bytes", LONGEST)
    if (number := content.count(b"{") + content.count(b"[")) > MOST:
        raise _too_large(where, f"{number:,} lists and objects", MOST)
    if (number := content.count(b",")) > MOST_VALUES:
        raise _too_large(where, f"{number:,} values", MOST_VALUES)
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, expected an object.")
    if not is_flat(value):
        raise _too_large(where, "lists within lists", DEEPEST)
    if b"\\u" in content:  # which can write half a character, and no text that has one can be kept
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{where} has {half!r} in it, half a character.") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which a name that stands twice is an error and not the last one's value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        doubled = [shown(name) for name, count in counts.items() if count > 1]
        verb = "is" if len(doubled) == 1 else "are"
        raise ValueError(f"{listed(doubled)} {verb} there more than once")
    return value


def is_flat(value: Any) -> bool:
    """Whether a value of JSON has few levels."""
    level = [value]
    for _ in range(DEEPEST):
        children = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for each in children for x in each if isinstance(x, dict | list)]
        if not level:
            return True
    return False
