"""Where the trees lie on a mesh, said once in terms of the dense parameters.

A rule gives the `PartitionSpec` of the parameter as the model sees it. Codes, scales and factors
follow from the layout: what shards an `o` axis shards the rows of the codes and of B, what shards
an `i` axis their columns and those of A. The rank and the group scales (one float32 for 256 blocks)
are replicated.

Some mesh axes divide the batch as well as the weights ("data", "fsdp"). A quantized weight that is
sharded over those is gathered when it is used, and so while it is still four bits a value; left to
itself the compiler gathers decoded weights, or activations. Adapters are some tenths of a percent
of the model and used by every device, hence replicated over those axes.

What a device has no room for may wait in its host's memory (core/placement.py); where it lies on a
mesh is another matter and stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.core.leaves import AdaptedArray, Adapter, QuantizedArray, is_array
from lora_jax.core.placement import Stack, in_host_memory
from lora_jax.core.rules import first_matches
from lora_jax.core.tree import map_leaves, named_leaves

Rules = Sequence[tuple[str, PartitionSpec]]
GATHERED = ("data", "fsdp")


def shardings(tree: Any, mesh: Mesh, rules: Rules, *, gather: Sequence[str] = GATHERED) -> Any:
    """A `NamedSharding` for each array of a tree.

    Args:
      tree: base, adapters, both in a tuple, or a combined tree; abstract trees work as well.
      mesh: the devices.
      rules: pairs of a path pattern and the `PartitionSpec` of the dense parameter; the first
        match wins, and leaves without one are replicated.
      gather: mesh axes that divide the batch as well; adapters are replicated over them.

    Returns:
      A tree of the same structure, for `jax.device_put`, `in_shardings` and the like.

    Raises:
      ValueError: if a pattern matches nothing, a spec names an unknown mesh axis or more axes than
        the parameter has, or a size is not divisible by the devices that would share it.
    """
    paths = [path for path, leaf in named_leaves(tree) if is_array(leaf) or _is_ours(leaf)]
    matches = first_matches([pattern for pattern, _ in rules], paths)

    def one(path: str, leaf: Any) -> Any:
        if not (is_array(leaf) or _is_ours(leaf)):
            return leaf
        spec = rules[matches[path]][1] if path in matches else PartitionSpec()
        specs = _leaf_specs(path, leaf, spec, gather)
        return jax.tree.map(lambda x, s: _checked(path, x, mesh, s), leaf, specs)

    return map_leaves(one, tree)


def shard(tree: Any, mesh: Mesh, rules: Rules, *, gather: Sequence[str] = ("data", "fsdp")) -> Any:
    """The tree with every array placed on the mesh as `shardings` says.

    Args:
      tree: as for `shardings`.
      mesh: the devices.
      rules: as for `shardings`.
      gather: mesh axes over which quantized weights are gathered when used (FSDP). Over all other
        axes they stay divided while they are used (tensor parallelism).

    Returns:
      The placed tree; quantized leaves remember how they lie when used.

    Raises:
      ValueError: as for `shardings`.
    """
    placed = shardings(tree, mesh, rules, gather=gather)
    tree = jax.tree.map(lambda x, s: jax.device_put(x, s) if is_array(x) else x, tree, placed)

    def one(_: str, leaf: Any) -> Any:
        if isinstance(leaf, AdaptedArray):
            return dataclasses.replace(leaf, base=one(_, leaf.base))
        if not isinstance(leaf, QuantizedArray):
            return leaf
        spec = leaf.codes.sharding.spec[len(leaf.batch_shape) :]
        at_use = [_without(entry, gather) for entry in (*spec, None, None)[:2]]
        if tuple(at_use) == (*spec, None, None)[:2]:
            return dataclasses.replace(leaf, sharding_at_use=None)
        sharding = NamedSharding(mesh, PartitionSpec(*at_use))
        return dataclasses.replace(leaf, sharding_at_use=sharding)

    return map_leaves(one, tree)


def offload(base: Any, pattern: str | Sequence[str], *, keep: int = 0) -> Any:
    """The base with the leaves that match in the host's pinned memory.

    `adapt` copies such a weight to the device where it uses it, and again in the backward pass, so
    that the device never holds more of them than are in use. With scanned layers that is one layer;
    layers that are rematerialized keep no copy. Dense leaves that are not adapted come to the
    device when the function begins.

    Args:
      base: the frozen tree, also an abstract one; on a mesh it is sharded before.
      pattern: regular expression searched in each leaf's path (or several of them).
      keep: how many of a stack's first layers stay on the device, of the 4-bit leaves that match.

    Returns:
      The tree, with the sharding of every array as it was but for its memory.

    Raises:
      ValueError: if a pattern matches nothing, `keep` is asked of a leaf that is no stack in 4
        bits, or the device knows no pinned host memory.
      MemoryError: if the host, or what JAX may take of it, has too little.

    Example:
      >>> base = lj.offload(base, "layers/.*kernel", keep=20)
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}, expected a number of layers")
    leaves = dict(named_leaves(base))
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    chosen = first_matches(patterns, [path for path, x in leaves.items() if _is_placed(x)])
    for path in chosen if keep else ():
        leaf = leaves[path]
        if not isinstance(leaf, QuantizedArray) or not leaf.batch_shape:
            raise ValueError(
                f"keep={keep} asks for a part of {path}, {leaf.dtype} {tuple(leaf.shape)}; only of "
                "a stack in 4 bits the first layers can stay: write a pattern of such, or keep=0"
            )

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        return jax.tree.map(lambda x: _split_between_memories(path, x, keep), leaf)

    return map_leaves(one, base)


def _is_placed(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, QuantizedArray)


def _split_between_memories(path: str, x: Any, keep: int) -> Any:
    """The first `keep` along the leading axis on the device, the others on the host."""
    if not keep:
        return in_host_memory(path, x)
    if keep >= x.shape[0]:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        head, tail = (
            jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for n in (keep, x.shape[0] - keep)
        )
    else:
        head, tail = x[:keep], x[keep:]
    return Stack((head, in_host_memory(path, tail)))


def _without(entry: Any, names: Sequence[str]) -> Any:
    """One axis' entry in a spec, less some mesh axes."""
    kept = [x for x in (entry if isinstance(entry, tuple) else (entry,)) if x not in names]
    return None if kept in ([], [None]) else kept[0] if len(kept) == 1 else tuple(kept)


def _is_ours(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray | Adapter | AdaptedArray)


def _leaf_specs(path: str, leaf: Any, spec: PartitionSpec, gather: Sequence[str]) -> Any:
    """The leaf with a `PartitionSpec` in place of each of its arrays."""
    if isinstance(leaf, AdaptedArray):
        base = _leaf_specs(path, leaf.base, spec, gather)
        adapter = _leaf_specs(path, leaf.adapter, spec, gather)
        batch = PartitionSpec(*adapter.a[:-2]) if isinstance(adapter, Adapter) else None
        scale = None if leaf.scale is None else batch
        keys = None if leaf.dropout_key is None else batch
        return AdaptedArray(base, adapter, scale, keys)
    if isinstance(leaf, QuantizedArray):
        batch, out, inn = _matrix_axes(path, spec, leaf.layout, len(leaf.batch_shape))
        if leaf.is_flat and (out or inn):
            raise ValueError(
                f"{path} is stored in blocks of {leaf.block_size} that run over the ends of rows "
                f"of {leaf.matrix_shape[1]}, so the spec {spec} cannot divide its matrix; "
                "replicate it, or quantize with a block_size that divides the rows"
            )
        matrix, per_matrix = PartitionSpec(*batch, out, inn), PartitionSpec(*batch)
        optional = lambda x, s: None if x is None else s  # noqa: E731
        return dataclasses.replace(
            leaf,
            codes=matrix,
            scales=matrix,
            group_scales=optional(leaf.group_scales, per_matrix),
            offset=optional(leaf.offset, per_matrix),
            minimum=optional(leaf.minimum, matrix),
        )
    if isinstance(leaf, Adapter):
        spec = PartitionSpec(*(_without(entry, gather) for entry in spec))
        batch, out, inn = _matrix_axes(path, spec, leaf.layout, len(leaf.batch_shape))
        a, b = PartitionSpec(*batch, None, inn), PartitionSpec(*batch, out, None)
        return dataclasses.replace(leaf, a=a, b=b)
    return spec


def _matrix_axes(path: str, spec: PartitionSpec, layout: str, batch: int) -> tuple:
    """The mesh axes of the batch axes, of `out` and of `in`."""
    letters = layout.split()
    if len(spec) > batch + len(letters):
        raise ValueError(
            f"the spec {spec} of {path} has {len(spec)} entries, but the parameter has "
            f"{batch + len(letters)} axes ({'b ' * batch}{layout})"
        )
    entries = [*spec, *(None,) * (batch + len(letters) - len(spec))]
    merged = []
    for letter in "oi":
        group = [e for e, x in zip(entries[batch:], letters, strict=True) if x == letter]
        if any(entry is not None for entry in group[1:]):
            raise ValueError(
                f"the spec {spec} of {path} shards a minor {letter!r} axis of layout {layout!r}; "
                f"its {letter!r} axes are stored as one, so shard the first of them"
            )
        merged.append(group[0])
    return (entries[:batch], *merged)


def _checked(path: str, x: Any, mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    if len(spec) > len(x.shape):
        raise ValueError(
            f"the spec {spec} of {path} has {len(spec)} entries, but its shape is {tuple(x.shape)}"
        )
    for size, entry in zip(x.shape, spec, strict=False):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"the spec {spec} of {path} names the mesh axis {name!r}; the mesh has "
                    f"{', '.join(map(repr, mesh.shape))}"
                )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"{path} stores an array of shape {tuple(x.shape)} whose axis of {size} the spec "
                f"{spec} would divide among {parts} devices; shard another axis, or use fewer"
            )
    return NamedSharding(mesh, spec)
