"""Which path decodes: the XLA one, or a kernel of `lora_jax.kernels.gpu`.

Each operation is a primitive of its own, so that the choice falls when a program is lowered: only
then are its platform and its number of devices known. The kernel is taken where all of this holds,
and the XLA path elsewhere:

  - The platform is CUDA, and this process sees a GPU of compute capability 8.0 (Ampere) or above.
    So a program exported on a machine without a GPU has the XLA path for every platform.
  - The program runs on one device, or is the body of a `shard_map` over all axes of its mesh. XLA
    cannot divide a kernel among devices and would gather the codes on each; the XLA path it can.
  - The kernel takes the shape and the dtype.
  - JAX still has Pallas' lowering through Triton, which 0.11 deprecates. It is imported when it is
    needed, so that a JAX without it decodes by the XLA path.

`with use("xla")` or `use("pallas")` forces one of the two. The latter interprets the kernel on a
CPU, which is slow and meant for tests, and is an error wherever the kernel cannot run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.placement import on_device
from lora_jax.kernels import xla

PATHS = ("auto", "xla", "pallas")
_path = jax.make_user_context("auto")  # a part of jit's keys: programs of another path are others

MAX_ROWS = 64  # of x, for which a product is bound by the codes it reads


def use(path: str) -> AbstractContextManager:
    """Makes what is traced inside a `with` take one path.

    Args:
      path: `"auto"`, the default; `"xla"`; or `"pallas"`.

    Returns:
      A context manager.

    Raises:
      ValueError: for another path.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r} is unknown; write one of {', '.join(map(repr, PATHS))}")
    return _path(path)


@jax.jit
def decode(q: QuantizedArray) -> jax.Array:
    """The values of a quantized weight, as the matrix `[b..., out, in]` of its dtype.

    Both paths give the same bits.
    """
    return _DECODE(on_device(q))


@jax.jit
def decode_parameter(q: QuantizedArray) -> jax.Array:
    """The values of a quantized weight, in the axes of the parameter it stands for."""
    return xla.as_parameter(q, decode(q))


@functools.partial(jax.jit, static_argnames="dtype")
def decode_folded(
    q: QuantizedArray, a: jax.Array, b: jax.Array, scale: Any, dtype: Any = None
) -> jax.Array:
    """The values of a quantized weight with a low-rank update: `W + scale · b @ a`.

    The sum is taken in float32 and rounded once. The product is as accurate as TF32 makes it on a
    GPU, a relative error of some 3e-4. Where it is zero the values are those of `decode`, to the
    last bit.

    Args:
      q: a quantized weight, `[b..., out, in]`.
      a: `[b..., r, in]`.
      b: `[b..., out, r]`.
      scale: a number, or `[b...]`.
      dtype: of the result, or None for the weight's.

    Returns:
      `[b..., out, in]`.
    """
    # Where the update is zero, +0 is subtracted, which leaves even the sign of a zero as it is.
    minus_b = jnp.asarray(-scale, jnp.float32)[..., None, None] * b.astype(jnp.float32)
    return _FOLD(on_device(q), a.astype(jnp.float32), minus_b, dtype=np.dtype(dtype or q.dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def matmul(x: jax.Array, q: QuantizedArray, dtype: Any = None) -> jax.Array:
    """The product `x @ Wᵀ` with a quantized weight.

    A kernel multiplies up to 64 rows of 16 bits by the levels and the sums of each block by its
    scale, so that scales are never rounded to 16 bits. Otherwise the weight is decoded first.

    Args:
      x: `[b..., rows..., in]`; b... are the weight's batch axes.
      q: a quantized weight, `[b..., out, in]`.
      dtype: of the result, or None for the wider of x's and the weight's.

    Returns:
      `[b..., rows..., out]`, accumulated in float32.
    """
    batch, common = q.batch_shape, jnp.promote_types(x.dtype, q.dtype)
    rows = x.shape[len(batch) : -1]
    y = _MATMUL(
        x.astype(common).reshape(*batch, -1, x.shape[-1]),
        on_device(q),
        dtype=np.dtype(dtype or common),
    )
    return y.reshape(*batch, *rows, y.shape[-1])


# What the operations are: on the XLA path, and as a kernel of one matrix.


def _xla_folded(q: QuantizedArray, a: jax.Array, minus_b: jax.Array, dtype: Any) -> jax.Array:
    values = xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32)))
    return (values - jnp.matmul(minus_b, a)).astype(dtype)


def _xla_matmul(x: jax.Array, q: QuantizedArray, dtype: Any) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)

    @jax.checkpoint  # the residual is the codes, not the decoded weight
    def product(x: jax.Array, q: QuantizedArray) -> jax.Array:
        w = decode(q).astype(x.dtype)
        return jnp.einsum("...mi,...oi->...mo", x, w, preferred_element_type=wide)

    return product(x, q).astype(dtype)


def _decode_obstacle(q: QuantizedArray) -> str | None:
    g = q.block_size
    if q.is_flat:
        return f"rows of {q.matrix_shape[1]} that blocks of {g} do not divide"
    if g & (g - 1) or not 32 <= g <= 4096:
        return f"blocks of {g}, and not of a power of two from 32 to 4096"
    if q.codes.size >= 2**31:
        return f"{q.codes.size} bytes of codes at once, and not less than 2^31"
    if q.sharding_at_use is not None:
        return "a weight that is gathered at each use"
    if np.dtype(q.dtype).itemsize > 4:
        return f"values of {q.dtype}"
    return None


def _fold_obstacle(q: QuantizedArray, a: jax.Array, minus_b: jax.Array) -> str | None:
    if not 32 <= q.block_size <= 256:
        return f"blocks of {q.block_size}, and not of 32 to 256"
    if a.shape[-2] > 256:
        return f"rank {a.shape[-2]}, and not up to 256"
    return _decode_obstacle(q)


def _matmul_obstacle(x: jax.Array, q: QuantizedArray) -> str | None:
    if x.shape[-2] > MAX_ROWS:
        return f"{x.shape[-2]} rows of x, and not up to {MAX_ROWS}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x in {x.dtype}, and not in 16 bits"
    if q.minimum is not None:
        return f"{q.kind}, whose blocks have a minimum"
    if not 32 <= q.block_size <= 256:
        return f"blocks of {q.block_size}, and not of 32 to 256"
    return _decode_obstacle(q)


# The primitives.


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A function of arrays and a quantized weight that has two implementations.

    Attributes:
      primitive: carries it through JAX's transforms.
      reference: the implementation for XLA, of any number of batch axes.
      kernel: the implementation for one matrix; also takes `interpret`.
      obstacle: says in a few words why the kernel does not take some arguments, or None.
    """

    primitive: Any
    reference: Callable
    kernel: Callable
    obstacle: Callable

    def __call__(self, *args: Any, **static: Any) -> jax.Array:
        path = _path.value
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        if path == "xla" or explicit:
            return self.reference(*args, **static)
        leaves, tree = jax.tree.flatten(args)
        return self.primitive.bind(
            *leaves, tree=tree, static=tuple(static.items()), forced=path == "pallas"
        )

    def chosen(self, platform: str, one_device: bool, args: Any, forced: bool) -> Callable:
        """The implementation to lower for a platform."""
        obstacle = self.obstacle(*args)
        if platform == "cuda" and obstacle is None and not _has_kernels():
            obstacle = None if forced else "this machine's GPUs, or its JAX"
        if forced and obstacle is not None:
            raise ValueError(
                f"the Pallas kernel of {self.primitive.name} does not take {obstacle}; "
                'write kernels.use("auto")'
            )
        if forced and platform not in ("cuda", "cpu"):
            raise ValueError(
                f"{self.primitive.name} has no Pallas kernel for {platform}; write "
                'kernels.use("auto")'
            )
        if forced or (platform == "cuda" and obstacle is None and one_device):
            return functools.partial(self.batched_kernel, interpret=platform == "cpu")
        return self.reference

    def batched_kernel(self, *args: Any, **static: Any) -> jax.Array:
        """The kernel over the batch axes of its arguments."""
        fn = functools.partial(self.kernel, **static)
        (q,) = (x for x in args if isinstance(x, QuantizedArray))
        for _ in q.batch_shape:
            fn = jax.vmap(fn)
        return fn(*args)


def _operation(name: str, reference: Callable, kernel: Callable, obstacle: Callable) -> _Operation:
    primitive = jex.Primitive(name)
    operation = _Operation(primitive, reference, kernel, obstacle)

    def restored(leaves: Sequence, tree: Any, static: tuple, fn: Callable = reference) -> Any:
        return fn(*jax.tree.unflatten(tree, leaves), **dict(static))

    @primitive.def_impl
    def _(*leaves: Any, tree: Any, static: tuple, forced: bool) -> jax.Array:
        return restored(leaves, tree, static)

    @primitive.def_abstract_eval
    def _(*avals: Any, tree: Any, static: tuple, forced: bool) -> Any:
        leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
        result = jax.eval_shape(lambda leaves: restored(leaves, tree, static), leaves)
        return jax.core.ShapedArray(result.shape, result.dtype)

    def jvp(primals: Any, tangents: Any, *, tree: Any, static: tuple, forced: bool) -> Any:
        fn = lambda *leaves: restored(leaves, tree, static)  # noqa: E731
        out = primitive.bind(*primals, tree=tree, static=static, forced=forced)
        return out, jax.jvp(fn, primals, tuple(map(ad.instantiate_zeros, tangents)))[1]

    def lower(ctx: Any, *leaves: Any, platform: str, tree: Any, static: tuple, forced: bool) -> Any:
        args = jax.tree.unflatten(tree, ctx.avals_in)
        fn = operation.chosen(platform, _on_one_device(ctx), args, forced)
        rule = mlir.lower_fun(
            lambda *leaves: restored(leaves, tree, static, fn), multiple_results=False
        )
        with warnings.catch_warnings():
            # Nothing that a user of this library could do about it.
            warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
            return rule(ctx, *leaves)

    ad.primitive_jvps[primitive] = jvp
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(_batch, operation)
    return operation


def _batch(operation: _Operation, leaves: Any, axes: Any, *, tree: Any, **params: Any) -> Any:
    """A new first axis of everything; if x alone has one, more rows."""
    (size,) = {x.shape[k] for x, k in zip(leaves, axes, strict=True) if k is not None}
    first = jax.tree.unflatten(tree, range(len(leaves)))[0]
    if isinstance(first, int) and all(k is None for k in axes[1:]):
        x, others = leaves[first], leaves[1:]
        x = jnp.moveaxis(x, axes[first], -3)  # [b..., n, rows, in]
        merged = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        y = operation.primitive.bind(merged, *others, tree=tree, **params)
        return y.reshape(*x.shape[:-1], y.shape[-1]), y.ndim - 2

    def led(x: Any, k: int | None) -> Any:
        return jnp.broadcast_to(x, (size, *x.shape)) if k is None else jnp.moveaxis(x, k, 0)

    leaves = [led(x, k) for x, k in zip(leaves, axes, strict=True)]
    return operation.primitive.bind(*leaves, tree=tree, **params), 0


def _on_one_device(ctx: Any) -> bool:
    """Whether what is being lowered runs on one device, or is one device's share of the work."""
    context = ctx.module_context.axis_context
    if (mesh := getattr(context, "mesh", None)) is not None:
        return set(context.manual_axes) == set(mesh.axis_names)
    return getattr(context, "num_devices", None) == 1


def _has_kernels() -> bool:
    """Whether the kernels compile here: JAX can lower them, and all its GPUs can run them."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None and sees_ampere()


def sees_ampere() -> bool:
    """Whether this process sees NVIDIA GPUs, all of compute capability 8.0 (Ampere) or above."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    return all(float(device.compute_capability) >= 8 for device in devices)


def _kernel_decode(q: QuantizedArray, interpret: bool) -> jax.Array:
    from lora_jax.kernels import gpu

    return gpu.decode(q, gpu.decode_tiling(q), interpret=interpret)


def _kernel_folded(
    q: QuantizedArray, a: jax.Array, minus_b: jax.Array, dtype: Any, interpret: bool
) -> jax.Array:
    from lora_jax.kernels import gpu

    return gpu.decode_folded(q, a, minus_b, dtype, gpu.FOLD, interpret=interpret)


def _kernel_matmul(x: jax.Array, q: QuantizedArray, dtype: Any, interpret: bool) -> jax.Array:
    from lora_jax.kernels import gpu

    product = gpu.matvec if x.shape[0] <= 2 else gpu.matmul
    return product(x, q, dtype, gpu.matmul_tiling(x.shape[0]), interpret=interpret)


_DECODE = _operation("decode", xla.decode, _kernel_decode, _decode_obstacle)
_FOLD = _operation("decode_folded", _xla_folded, _kernel_folded, _fold_obstacle)
_MATMUL = _operation("decode_matmul", _xla_matmul, _kernel_matmul, _matmul_obstacle)
