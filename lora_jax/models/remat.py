"""What the backward pass finds saved of each layer, and what it computes again.

A policy names values of a layer. Elementwise passes (norms, rotations, the gated unit) are always
repeated: they cost less than reading back what they wrote. For a token and a layer of Llama 3 8B in
bfloat16:

    policy       saved                                                 KiB    products repeated
    "layer"      the layer's input                                       8    all but down_proj
    "stream"     and the residual stream between attention and MLP      16    the same less o_proj
    "attended"   the input, and what attention made of it               16    those of "layer"
    "attention"  "stream", queries, keys, values, what they made         36    gate_proj, up_proj
    "products"   and outputs of gate_proj and up_proj                   92    none

Attention's own arithmetic, which grows with the square of the length, is repeated by "layer" and by
"stream". With "-offloaded" behind its name a policy has the input in the host's pinned memory.

The older names of `jax.checkpoint_policies` are taken as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_ATTENTION = ("queries", "keys", "values", "attended", "heads")
_PRODUCTS = ("gate", "up", "routed", "update")
NAMED: dict[str, tuple[str, ...]] = {
    "layer": (),
    "stream": ("stream",),
    "attended": ("attended",),
    "attention": ("stream", *_ATTENTION),
    "products": ("stream", *_ATTENTION, *_PRODUCTS),
    "layer-offloaded": (),
    "attended-offloaded": ("attended",),
}
# What `DecoderConfig.remat` may name.
POLICIES = (
    *NAMED,
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
# The fused attention of NVIDIA GPUs also returns the statistics that its backward pass needs, so
# that its results are saved by the primitive, and none of them by a name.
_FUSED_ATTENTION = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def saved(x: jax.Array, name: str) -> jax.Array:
    """The same array, under the name by which a policy saves it."""
    return checkpoint_name(x, name)


def policy(name: str) -> Callable[..., Any]:
    """The policy of this name, as `jax.checkpoint` takes it."""
    if name not in NAMED:
        return getattr(jax.checkpoint_policies, name)
    names = NAMED[name]
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=names,
        names_which_can_be_offloaded=("input",) if name.endswith("-offloaded") else (),
        offload_src="device",
        offload_dst="pinned_host",
    )

    def saves(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name in _FUSED_ATTENTION:
            return "attended" in names
        return by_name(primitive, *args, **params)

    return saves
