"""Adapters on disk, through Orbax: the arrays, and what is static about them in one JSON file.

path/arrays/        Orbax: {leaf path: {"a": ..., "b": ...}} or {leaf path: array}
path/adapters.json  {leaf path: {"scale", "dropout", "layout"} or null}, rules, format version
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.leaves import Adapter
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import combine, map_leaves, named_leaves

FORMAT = 1
STATIC = ("scale", "dropout", "layout")


def save_adapters(
    path: str | os.PathLike,
    adapters: Any,
    *,
    rules: Sequence[LoraRule] | None = None,
    dtype: Any = None,
) -> None:
    """Writes adapters to a folder, which appears whole or not at all.

    Args:
      path: the folder; an older checkpoint there is replaced once the new one is complete.
      adapters: the tree of adapters.
      rules: kept beside them for the record.
      dtype: of the arrays on disk, such as `jnp.bfloat16`; their own, if None.

    Raises:
      ValueError: if the tree holds no adapter.
      OSError: if the folder cannot be written; what was there before is still there.
    """
    import orbax.checkpoint as ocp

    arrays, static = {}, {}
    for name, leaf in named_leaves(adapters):
        if name in arrays:
            raise ValueError(f"two leaves are both called {name!r}; rename one")
        fields = {"a": leaf.a, "b": leaf.b} if isinstance(leaf, Adapter) else {"value": leaf}
        if dtype is not None:
            fields = {key: value.astype(dtype) for key, value in fields.items()}
        arrays[name] = fields
        described = isinstance(leaf, Adapter)
        static[name] = {key: getattr(leaf, key) for key in STATIC} if described else None
    if not arrays:
        raise ValueError("the tree holds no adapters, expected what init_adapters returns")
    record = {
        "format": FORMAT,
        "leaves": static,
        "rules": None if rules is None else [dataclasses.asdict(rule) for rule in rules],
    }
    target = Path(path).absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(partial / "arrays", arrays)
        (partial / "adapters.json").write_text(json.dumps(record, indent=1))
        _replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(target: Path, complete: Path) -> None:
    """Moves a complete folder into place; folders cannot be renamed over one another."""
    if not target.exists():
        complete.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        complete.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_adapters(path: str | os.PathLike, base: Any) -> Any:
    """Reads adapters back, as a tree of the base's structure.

    Args:
      path: a folder that `save_adapters` wrote.
      base: the tree that they belong to; only its structure and shapes are used.

    Returns:
      The adapters tree, in the dtype on disk.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it belongs to another base: the leaves that do not fit are listed.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    if not (folder / "adapters.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapters.json; expected a folder that save_adapters wrote"
        )
    try:
        record = json.loads((folder / "adapters.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'adapters.json'} is damaged: {error}") from None
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {record.get('format')!r}, this version reads {FORMAT}; load it "
            "with the version of lora_jax that wrote it"
        )
    static = record["leaves"]
    known = {name for name, leaf in named_leaves(base)}
    if missing := sorted(set(static) - known):
        raise ValueError(
            f"{folder} holds adapters for {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}, which this base does not have; "
            "load them with the base they were trained on"
        )
    # Restored as NumPy arrays and placed here: a checkpoint from eight devices must load on one.
    with ocp.PyTreeCheckpointer() as checkpointer:
        like = checkpointer.metadata(folder / "arrays").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=_numpy()), like)
        arrays = checkpointer.restore(folder / "arrays", restore_args=as_numpy)

    def one(name: str, leaf: Any) -> Any:
        if name not in static:
            return None
        fields = {key: jnp.asarray(value) for key, value in arrays[name].items()}
        if static[name] is None:
            return fields["value"]
        return Adapter(fields["a"], fields["b"], **static[name])

    adapters = map_leaves(one, base)
    combine(base, adapters)  # checks the shapes
    return adapters


def _numpy() -> Any:
    import numpy as np

    return np.ndarray
