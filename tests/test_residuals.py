"""Law 8: what autodiff keeps of the forward pass is codes, never a decoded 4-bit weight."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import reference
from jax import lax
from small_lm import (
    DIM,
    HIDDEN,
    VOCAB,
    logits,
    make,
)

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

DEPTH = 8
MATRICES = {(VOCAB, DIM), (DIM, HIDDEN), (HIDDEN, DIM)}


def is_decoded(x: Any) -> bool:
    """Whether an array may be a weight, or all layers' weights, in more than four bits."""
    if x.size * x.dtype.itemsize <= x.size:  # codes: at most a byte for each entry
        return False
    sizes = {a * b for a, b in MATRICES} | {DEPTH * a * b for a, b in MATRICES}
    return x.size in sizes or {*x.shape[-2:]} in [set(m) for m in MATRICES]


def residuals(fn: Callable, adapters: Any) -> list[Any]:
    """What reverse mode would keep of the forward pass, abstractly."""

    def kept(adapters):
        _, linear = jax.linearize(fn, adapters)
        return jax.tree.leaves(jax.closure_convert(linear, adapters)[1])

    return jax.tree.leaves(jax.eval_shape(kept, adapters))


POLICIES = {
    "kept": False,
    "remat": True,
    "dots saveable": jax.checkpoint_policies.dots_saveable,
    "nothing saveable": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("remat", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_residuals_are_codes(scan, remat):
    """Of eight layers; a float base shows that the test can see weights at all."""
    kept = {}
    for kind in ("nf4", "float32"):
        trees = make(kind, "lora", DEPTH)
        of_base = functools.partial(logits, trees.base, scan=scan, remat=remat)
        kept[kind] = residuals(of_base, trees.moved)
    assert kept["nf4"]
    assert not [x for x in kept["nf4"] if is_decoded(x)]
    assert [x for x in kept["float32"] if is_decoded(x)]


X = jnp.ones((7, DIM))
USES = {
    "heads": ("i o o", (DIM, 4, 40), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w)),
    "experts": ("b i o", (3, DIM, HIDDEN), lambda w, x: jnp.einsum("bi,eio->ebo", x, w)),
    "grouped": (
        "b i o",
        (3, DIM, HIDDEN),
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 1, 4])),
    ),
    "an expert a row": (
        "b i o",
        (3, DIM, HIDDEN),
        lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.arange(7) % 3]),
    ),
    "rows and head": ("o i", (HIDDEN, DIM), lambda w, x: (w[jnp.arange(7)] + x) @ w.T),
    "columns": ("i o", (DIM, HIDDEN), lambda w, x: w[jnp.arange(7)] * x.sum()),
    "twice": ("i o", (DIM, HIDDEN), lambda w, x: x @ w @ w.T),
    "of two weights": ("i o", (DIM, HIDDEN), lambda w, x: x @ (w @ w.T)),
    "cond": (
        "i o",
        (DIM, HIDDEN),
        lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: -x @ w),
    ),
    "in bfloat16": (
        "i o",
        (DIM, HIDDEN),
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    ),
}


@pytest.mark.parametrize(("layout", "shape", "use"), USES.values(), ids=USES)
def test_residuals_of_every_use(layout, shape, use):
    """The activations before it are differentiated as well, so that the weight is needed again."""
    base = {"w": lj.quantize_array(reference.weight(shape), layout=layout, block_size=32)}
    adapters = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("w", 4)])

    def fn(trained):
        adapters, x = trained
        return lj.adapt(lambda tree, x: use(tree["w"], jnp.sin(x)))(lj.combine(base, adapters), x)

    assert not [x for x in residuals(fn, (adapters, X)) if is_decoded(x)]


@pytest.mark.compiled_quickly(False)
def test_memory_of_scanned_layers():
    """Each further layer costs its activations and codes' gradients none: no decoded weight."""

    def temporary(depth):
        trees = make("nf4", "lora", depth)
        gradient = jax.jit(jax.grad(lambda a, b: jnp.sin(logits(b, a)).sum()))
        memory = gradient.lower(trees.moved, trees.base).compile().memory_analysis()
        return memory.temp_size_in_bytes

    a_layer = (temporary(4 * DEPTH) - temporary(DEPTH)) / (3 * DEPTH)
    decoded_layer = 2 * DIM * HIDDEN * 4
    assert a_layer < decoded_layer / 4
