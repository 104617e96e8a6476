"""A small language model for the laws: on every kind of base, with every variant of adapters.

An embedding that is its own head, and layers of two matrices, scanned or unrolled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax import lax

import lora_jax as lj

# Sizes that no other array has, by which law 8 knows a decoded weight.
VOCAB, DIM, HIDDEN, LAYERS = 40, 96, 160, 3
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)
LAYOUTS = {"embed": "o i", "layers/up": "b i o", "layers/down": "b i o"}


def model(params: Any, ids: Any, *, scan: bool = True, remat: Any = False, dtype: Any = None):
    """Logits `[..., VOCAB]`; `remat` is whether to rematerialize layers, or by which policy."""
    cast = lambda w: w if dtype is None else w.astype(dtype)  # noqa: E731

    def layer(x, weights):
        hidden = jnp.tanh(x @ cast(weights["up"]))
        return x + hidden @ cast(weights["down"]) * cast(weights["gain"]), None

    if remat:
        layer = jax.checkpoint(layer, policy=None if remat is True else remat)
    x, layers = cast(params["embed"])[ids], params["layers"]
    if scan:
        x, _ = lax.scan(layer, x, layers)
    else:
        for k in range(layers["gain"].shape[0]):
            x, _ = layer(x, jax.tree.map(lambda w: w[k], layers))  # noqa: B023
    return (x * cast(params["norm"])) @ cast(params["embed"]).T


def in_numpy(params: Any, ids: np.ndarray) -> np.ndarray:
    x, layers = params["embed"][ids], params["layers"]
    for up, down, gain in zip(layers["up"], layers["down"], layers["gain"], strict=True):
        x = x + np.tanh(x @ up) @ down * gain
    return (x * params["norm"]) @ params["embed"].T


def make_params(layers: int = LAYERS) -> Any:
    weight = lambda *shape: jnp.asarray(reference.weight(shape, len(shape)))  # noqa: E731
    stacked = {"up": weight(layers, DIM, HIDDEN), "down": weight(layers, HIDDEN, DIM)}
    stacked["gain"] = jnp.full((layers, DIM), 0.5)
    return {"embed": weight(VOCAB, DIM), "layers": stacked, "norm": jnp.full(DIM, 1.5)}


BASES = {
    "float32": None,
    "bfloat16": None,
    "nf4": {"kind": "nf4"},
    "nf4, plain scales": {"kind": "nf4", "double_quant": False},
    "fp4": {"kind": "fp4"},
    "int4": {"kind": "int4"},
    "af4": {"kind": "af4"},
    "q4_1": {"kind": "q4_1"},
}
# What `LoraRule` and `init_adapters` are given.
VARIANTS = {
    "lora": ({"rank": 4, "alpha": 8}, ()),
    "rslora": ({"rank": 4, "alpha": 4, "rslora": True}, ()),
    "lora, norms trained": ({"rank": 3, "alpha": 6, "dropout": 0.1}, ["norm", "gain"]),
    "lora of rank one": ({"rank": 1, "alpha": 2}, ()),
}


@dataclasses.dataclass(frozen=True)
class Trees:
    """A base, adapters at their start, and adapters as after some training."""

    base: Any
    start: Any
    moved: Any

    @property
    def tolerance(self) -> float:
        """Of products in the base's dtype, relative to the largest value."""
        return 3e-2 if self.base["norm"].dtype == jnp.bfloat16 else 1e-5


@functools.cache
def make(base_kind: str, variant: str, layers: int = LAYERS) -> Trees:
    base, options = make_params(layers), BASES[base_kind]
    if base_kind == "bfloat16":
        base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    if options is not None:
        for pattern, layout in LAYOUTS.items():
            base = lj.quantize(base, pattern, block_size=32, layout=layout, **options)
    rule, train = VARIANTS[variant]
    rules = [
        lj.LoraRule(pattern, layout=None if options else layout, **rule)
        for pattern, layout in LAYOUTS.items()
    ]
    start = lj.init_adapters(jax.random.key(0), base, rules, train=train)
    return Trees(base, start, reference.randomized(start, size=0.1))


def logits(base: Any, adapters: Any, ids: Any = IDS, **options: Any) -> jax.Array:
    fn = functools.partial(model, **options)
    return lj.adapt(fn)(lj.combine(base, adapters), ids)


jitted = jax.jit(logits, static_argnames=("scan", "remat"))
apply = jax.jit(model, static_argnames=("scan", "remat"))


def is_quantized(x: Any) -> bool:
    return isinstance(x, lj.QuantizedArray)


def decoded(base: Any) -> Any:
    return jax.tree.map(
        lambda x: lj.dequantize(x) if is_quantized(x) else x, base, is_leaf=is_quantized
    )


def assert_near(actual: Any, wanted: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    actual, wanted = (np.asarray(x).astype(np.float64) for x in (actual, wanted))
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def assert_bits_equal(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
