"""Adapters on disk, through Orbax: the arrays, and what is static about them in one JSON file.

path/arrays/        Orbax: {leaf path: {"a": ..., "b": ...}} or {leaf path: array}
path/adapters.json  {leaf path: {"scale", "dropout", "layout"} or null}, rules, format version
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.leaves import Adapter, parse_layout
from lora_jax.core.rules import LoraRule
from lora_jax.core.tree import combine, map_leaves, named_leaves
from lora_jax.files import file_in, is_name, listed, read_object, shown

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
        if not is_name(name):
            raise ValueError(f"a leaf is called {shown(name)}, which is no line; rename it")
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
      ValueError: if it belongs to another base: the leaves that do not fit are listed; or if it is
        damaged. Values are not judged: one that is NaN is loaded as it is.
    """
    folder = Path(path).absolute()
    static = read_static(folder)
    known = dict(named_leaves(base))
    if missing := sorted(static.keys() - known.keys()):
        raise ValueError(
            f"{folder} holds adapters for {listed(missing)}, which this base does not have; "
            "load them with the base they were trained on"
        )
    for name, fields in static.items():
        shape = tuple(getattr(known[name], "shape", ()))
        if fields is not None:
            batch = "b " * (len(shape) - len(fields["layout"].split()))
            parse_layout(batch + fields["layout"], shape, name)
    # Shapes first: what does not fit is not read, however large it would be.
    combine(base, _adapters(base, static, read_shapes(folder, static)))
    return _adapters(base, static, _read_arrays(folder))


def _adapters(base: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The tree of a base's structure with these arrays, or their shapes."""

    def one(name: str, leaf: Any) -> Any:
        if name not in static:
            return None
        values, fields = arrays[name], static[name]
        return values["value"] if fields is None else Adapter(values["a"], values["b"], **fields)

    return map_leaves(one, base)


def read_static(folder: Path) -> dict[str, dict[str, Any] | None]:
    """What is static about each leaf of a checkpoint, by its path; None for arrays.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if its record is damaged, or of another version.
    """
    file = file_in(folder, "adapters.json")
    if file is None:
        raise FileNotFoundError(
            f"{folder} holds no adapters.json; expected a folder that save_adapters wrote"
        )
    try:
        record = read_object(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if (version := record.get("format")) != FORMAT:
        raise ValueError(
            f"{folder} has format {shown(version)}, this version reads {FORMAT}; load it "
            "with the version of lora_jax that wrote it"
        )
    leaves = record.get("leaves")
    if not isinstance(leaves, dict) or not all(map(is_name, leaves)):
        raise ValueError(f"{file} is damaged: its leaves are {shown(leaves)}, expected names")
    for name, fields in leaves.items():
        if not (fields is None or _are_static(fields)):
            raise ValueError(
                f"{file} is damaged: {name} has {shown(fields)}, expected a scale, a dropout and a "
                "layout"
            )
    return leaves


def _are_static(fields: Any) -> bool:
    return (
        isinstance(fields, dict)
        and fields.keys() == set(STATIC)
        and type(fields["scale"]) in (int, float)
        and abs(fields["scale"]) <= float(jnp.finfo(jnp.float32).max)
        and type(fields["dropout"]) in (int, float)
        and 0 <= fields["dropout"] < 1
        and is_name(fields["layout"])
    )


def read_shapes(
    folder: Path, static: Mapping[str, Any]
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The arrays of each leaf of a checkpoint, by its path: `a` and `b`, or `value`.

    Args:
      folder: the checkpoint.
      static: what `read_static` says of it.

    Raises:
      ValueError: if the arrays are not those of its leaves.
    """
    found = _from_orbax(folder, lambda orbax, at: orbax.metadata(at).item_metadata.tree)
    shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, fields in static.items():
        parts, expected = found.get(name), {"value"} if fields is None else {"a", "b"}
        if not isinstance(parts, dict) or parts.keys() != expected:
            raise ValueError(f"{folder} is damaged: {name} lacks {listed(sorted(expected))}")
        try:
            shapes[name] = {
                key: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for key, x in parts.items()
            }
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder} is damaged: {name} is no array of numbers") from error
        if fields is not None and any(len(x.shape) < 2 for x in shapes[name].values()):
            raise ValueError(f"{folder} is damaged: {name} has factors that are no matrices")
    return shapes


def _read_arrays(folder: Path) -> Any:
    """The arrays themselves, in the place that `read_shapes` has their shapes."""
    import orbax.checkpoint as ocp

    def restore(orbax: Any, at: Path) -> Any:
        # As NumPy arrays, placed here: a checkpoint from eight devices must load on one.
        like = orbax.metadata(at).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        return jax.tree.map(jnp.asarray, orbax.restore(at, restore_args=as_numpy))

    return _from_orbax(folder, restore)


def _from_orbax(folder: Path, read: Callable[[Any, Path], Any]) -> Any:
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as orbax:
            return read(orbax, folder / "arrays")
    except Exception as error:  # of several libraries below, each with errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the arrays of {folder} are damaged or not there: {shown(reason)}; save the adapters "
            "again"
        ) from error
