"""What the core should give, in NumPy: written from the papers and formats, never from the library.

Leaves are read through their documented fields alone (see `QuantizedArray` and `Adapter`). Shapes
as there: `[b..., out, in]`, G elements a block.
"""

import math

import jax
import numpy as np

import lora_jax as lj

# QLoRA, appendix E.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# A sign, two bits of exponent, one of mantissa; 12 is the largest; as bitsandbytes numbers them.
FP4 = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
LEVELS = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.array([*FP4, *(-x for x in FP4)], np.float32),
    "int4": np.array([(code - 8) / 7 for code in range(16)], np.float32),
}
LEVELS["fp4"][8] = 0.0


def permutation(layout: str, batch: int) -> list[int]:
    """The transposition of a parameter `[b..., axes...]` that puts its o axes before its i axes."""
    letters = layout.split()
    outer = [batch + k for k, letter in enumerate(letters) if letter == "o"]
    inner = [batch + k for k, letter in enumerate(letters) if letter == "i"]
    return [*range(batch), *outer, *inner]


def matrix(w: np.ndarray, layout: str) -> np.ndarray:
    """A parameter `[b..., axes...]` as `[b..., out, in]`; `layout` without its b's."""
    letters = layout.split()
    batch = w.ndim - len(letters)
    sizes = dict.fromkeys("oi", 1)
    for n, letter in zip(w.shape[batch:], letters, strict=True):
        sizes[letter] *= n
    return w.transpose(permutation(layout, batch)).reshape(*w.shape[:batch], sizes["o"], sizes["i"])


def parameter(m: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix `[b..., out, in]` as the parameter of `shape`."""
    order = permutation(layout, len(shape) - len(layout.split()))
    return m.reshape([shape[k] for k in order]).transpose(np.argsort(order))


def unpack(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the earlier one in the high nibble: `[..., n]` to `[..., 2n]`."""
    codes = np.asarray(codes)
    return np.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)


def scales(q: lj.QuantizedArray, dynamic_map: np.ndarray | None = None) -> np.ndarray:
    """float32 scales `[b..., out, in/G]`, rounded after the product and again after the sum."""
    if q.group_scales is None:
        return np.asarray(q.scales)
    codes = np.asarray(q.scales)
    flat = codes.reshape(*codes.shape[:-2], -1)
    group = np.arange(flat.shape[-1]) // 256
    product = dynamic_map[flat] * np.asarray(q.group_scales)[..., group]
    return (product + np.asarray(q.offset)[..., None]).astype(np.float32).reshape(codes.shape)


def decode(q: lj.QuantizedArray, dynamic_map: np.ndarray | None = None) -> np.ndarray:
    """The dense parameter in float32, before the cast to the weight's own dtype."""
    codes = unpack(q.codes)
    per_value = np.repeat(scales(q, dynamic_map), q.block_size, -1)
    return parameter(LEVELS[q.kind][codes] * per_value, q.layout, q.shape)


def update(adapter: lj.Adapter, shape: tuple[int, ...]) -> np.ndarray:
    """`scale · b @ a` in float64, in the parameter's axes."""
    a, b = (np.asarray(x).astype(np.float64) for x in (adapter.a, adapter.b))
    return parameter(adapter.scale * (b @ a), adapter.layout, shape)


def dense(base: lj.QuantizedArray | jax.Array, adapter: lj.Adapter | None) -> np.ndarray:
    """`W + scale · B A` in float64, where the library decodes W: test_quantize.py sees to that."""
    if isinstance(base, lj.QuantizedArray):
        base = lj.dequantize(base)
    w = np.asarray(base).astype(np.float64)
    return w if adapter is None else w + update(adapter, w.shape)


def dense_tree(base, adapters):
    """Every weight of a tree with its update, in float64; other leaves as they are."""

    def is_leaf(x):
        return x is None or isinstance(x, lj.QuantizedArray | lj.Adapter)

    def one(leaf, adapter):
        if isinstance(leaf, lj.QuantizedArray) or isinstance(adapter, lj.Adapter):
            return dense(leaf, adapter)
        return leaf if adapter is None else np.asarray(adapter)

    return jax.tree.map(one, base, adapters, is_leaf=is_leaf)


def randomized(adapters, seed: int = 0, size: float = 0.3):
    """Adapters, or the shapes of some, as after some training: nothing in them is zero."""
    leaves, treedef = jax.tree.flatten(adapters)
    rng = np.random.default_rng(seed)
    moved = [(size * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, [jax.numpy.asarray(x) for x in moved])


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A Gaussian float32 weight."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) / math.sqrt(shape[-1])).astype(np.float32)
