"""Weights that wait in the host's memory, and come to the device while they are used.

Where an array lies is part of its type, so a program is told by its arguments: what is in host
memory is copied where it is decoded, a layer at a time under a scan, and is not kept. The backward
pass copies it again.

A scan needs one array for all layers. `Stack` is such an array of which the first layers lie on the
device and the others on the host; `adapt` runs the scan over one part after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

T = TypeVar("T")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Stack:
    """An array `[n, ...]` in parts along its leading axis, each in a memory of its own.

    Attributes:
      parts: arrays `[n_k, ...]`, in order.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the whole array."""
        return (sum(x.shape[0] for x in self.parts), *self.parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.parts[0].ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the elements."""
        return self.parts[0].dtype

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where a part begins and another one ends."""
        bounds, end = [], 0
        for part in self.parts[:-1]:
            end += part.shape[0]
            bounds.append(end)
        return tuple(bounds)

    def cut(self, start: int, stop: int) -> jax.Array:
        """What lies between two bounds, all of it in one part."""
        begins = (0, *self.bounds)
        k = max(k for k, begin in enumerate(begins) if begin <= start)
        return _cut(self.parts[k], start - begins[k], stop - begins[k])


def _is_stack(x: Any) -> bool:
    return isinstance(x, Stack)


def _cut(x: jax.Array, start: int, stop: int) -> jax.Array:
    return x if (start, stop) == (0, x.shape[0]) else lax.slice_in_dim(x, start, stop)


def bounds(tree: Any) -> set[int]:
    """Where the stacks of a tree are cut."""
    stacks = filter(_is_stack, jax.tree.leaves(tree, is_leaf=_is_stack))
    return {bound for stack in stacks for bound in stack.bounds}


def cut(tree: T, start: int, stop: int) -> T:
    """Every array of a tree between two bounds of its leading axis."""

    def one(x: Any) -> jax.Array:
        return x.cut(start, stop) if _is_stack(x) else _cut(x, start, stop)

    return jax.tree.map(one, tree, is_leaf=_is_stack)


def joined(tree: T) -> T:
    """The tree with every stack as one array, on the device."""

    def one(x: Any) -> Any:
        return jnp.concatenate([on_device(part) for part in x.parts]) if _is_stack(x) else x

    return jax.tree.map(one, tree, is_leaf=_is_stack)


def on_device(tree: T) -> T:
    """The tree with what lies in host memory copied to the device."""

    def one(x: Any) -> Any:
        on_host = isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if on_host else x

    return jax.tree.map(one, tree)


def in_host_memory(path: str, x: Any) -> Any:
    """An array in the pinned memory of its devices' host; an abstract one says that it is.

    Raises:
      ValueError: if the devices know no such memory; the path is for the message.
      MemoryError: if there is too little of it.
    """
    sharding = getattr(x, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    (device, *_) = sharding.device_set
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"{path} cannot lie in pinned host memory, of which {device.platform} devices know "
            "nothing; leave it where it is"
        )
    host = sharding.with_memory_kind("pinned_host")
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
    try:
        return jax.block_until_ready(jax.device_put(x, host))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"no host memory for {path}, {x.nbytes / 2**30:.2f} GiB; JAX takes 64 GiB of it unless "
            "the variable XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says another number: set that, or keep "
            "more layers on the device"
        ) from None
