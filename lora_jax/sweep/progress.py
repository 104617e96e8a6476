"""What a sweep keeps on the disk: each group of each stage in a folder of its own.

    folder/sweep.json                       what makes this sweep the one it is
    folder/until-200/group-0/progress.npz   the runs in places, and which have left theirs
    folder/until-200/group-0/run-12.npz     a run that left its place, written before that is said

A file is replaced whole or not at all, and `progress.npz` is what counts: a run that left after it
was written is in its place there, and will leave again. In each, `record` is JSON; all else is an
array, named for the run and where it belongs. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.files import parse_object, shown
from lora_jax.formats.whole import written_whole
from lora_jax.sweep.fields import fields_of
from lora_jax.sweep.groups import Plan
from lora_jax.sweep.places import Entry, Saved
from lora_jax.train.checkpoints import as_json, differences

FORMAT = 1
IDENTITY = "sweep.json"
FIELDS = (
    "step",
    "stopped",
    "history",
    "position",
    "best_step",
    "best_metrics",
    "validation_loss",
    "waited",
)
TREES = ("state", "last", "best")


def begin(folder: Path, plan: Plan, options: Mapping[str, Any]) -> None:
    """Makes a folder that of a sweep, which it may be already.

    Args:
      folder: it is made where there is none.
      plan: of the sweep.
      options: all else that the result depends on, as far as JSON can tell it.

    Raises:
      ValueError: if it is another sweep's; each difference is spelled out.
      OSError: if it cannot be read or written.
      TypeError: if the options are not for JSON.
    """
    here = as_json("identity", {"format": FORMAT, **_described(plan), **options})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / IDENTITY
    if not file.exists():
        with written_whole(file) as (partial,):
            partial.write_text(json.dumps(here, indent=1))
        return
    there = parse_object(file.read_bytes(), str(file))
    if found := list(differences(there, here)):
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise ValueError(
            f"{folder} holds another sweep: {'; '.join(found[:8])}{more}. Write the options it "
            "was begun with, or another folder"
        )


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "runs": [{name: _text(x) for name, x in fields_of(run).items()} for run in plan.runs],
        "traced": plan.traced,
        "groups": [
            {
                "runs": group.runs,
                "at_once": group.at_once,
                "adapters": {name: f"{x.dtype}{list(x.shape)}" for name, x in _named(group.like)},
            }
            for group in plan.groups
        ],
    }


def _text(value: Any) -> str:
    """A value of a config, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Progress:
    """The folder of a group in a stage.

    Attributes:
      folder: where.
      entries: the runs, as they came to this stage.
      like: a run's state and adapters, abstract, by the names of `TREES`; called if it is needed.
    """

    def __init__(
        self, folder: Path, entries: Iterable[Entry], like: Callable[[], Mapping[str, Any]]
    ):
        self.folder, self.like = folder, like
        self.runs = {entry.number: entry.run for entry in entries}
        self.written: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(".*.partial"):  # of a process that was killed
            partial.unlink(missing_ok=True)

    def find(self) -> Saved | None:
        """Where the group is; None if it was not begun.

        Raises:
          ValueError: if a file is damaged.
          OSError: if one cannot be read.
        """
        file = self.folder / "progress.npz"
        if not file.exists():
            return None
        record, placed = self._read(file)
        left = [self._read(self._file_of(number))[1][0] for number in record["left"]]
        self.written.update(record["left"])
        places = record["places"]
        return Saved(record["clock"], dict(zip(places, placed, strict=True)), left)

    def save(self, saved: Saved) -> None:
        """Writes where the group is.

        Raises:
          OSError: if that is not possible; what was there before still is.
        """
        for entry in saved.left:
            if entry.number not in self.written:
                self._write(self._file_of(entry.number), [entry], {})
                self.written.add(entry.number)
        record = {
            "clock": saved.clock,
            "places": list(saved.placed),
            "left": [entry.number for entry in saved.left],
        }
        self._write(self.folder / "progress.npz", saved.placed.values(), record)

    def _file_of(self, run: int) -> Path:
        return self.folder / f"run-{run}.npz"

    def _write(self, file: Path, entries: Iterable[Entry], record: dict[str, Any]) -> None:
        arrays, described = {}, []
        for entry in entries:
            trees = [name for name in TREES if getattr(entry, name) is not None]
            fields = {name: getattr(entry, name) for name in FIELDS}
            described.append({"number": entry.number, "trees": trees, **fields})
            for tree in trees:
                for name, leaf in _named(getattr(entry, tree)):
                    arrays[f"{entry.number}.{tree}{name}"] = leaf
        text = json.dumps({**record, "entries": described})
        arrays["record"] = np.frombuffer(text.encode(), np.uint8)
        with written_whole(file) as (partial,), partial.open("wb") as stream:
            np.savez(stream, **arrays)

    def _read(self, file: Path) -> tuple[dict[str, Any], list[Entry]]:
        """The record of a file, and its runs."""
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                record = json.loads(arrays["record"].tobytes())
                return record, [self._entry(x, arrays) for x in record["entries"]]
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} is damaged or of another sweep: {shown(str(error))}; remove "
                f"{self.folder}, and its runs are trained again"
            ) from error

    def _entry(self, record: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Entry:
        number = record["number"]
        entry = Entry(number, self.runs[number], **{name: record[name] for name in FIELDS})
        entry.history = [(step, metrics) for step, metrics in entry.history]
        for tree in record["trees"]:
            like = self.like()[tree]
            leaves = [_as(arrays[f"{number}.{tree}{name}"], x, name) for name, x in _named(like)]
            setattr(entry, tree, jax.tree.unflatten(jax.tree.structure(like), leaves))
        return entry


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of a tree, each by its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def _as(array: np.ndarray, like: Any, name: str) -> np.ndarray:
    """An array in the dtype that it had: of those that NumPy does not know, it keeps the bytes."""
    if array.dtype.kind == "V":
        array = array.view(like.dtype)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
        found, expected = (f"{x.dtype}{list(x.shape)}" for x in (array, like))
        raise ValueError(f"its {name} is {found}, and this sweep's is {expected}")
    return array
