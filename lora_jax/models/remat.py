"""What the backward pass finds saved of each layer, and what it computes again.

A policy names values of a layer. Elementwise passes (norms, rotations, the gated unit) are always
repeated: they cost less than reading back what they wrote. For a token and a layer of Llama 3 8B in
bfloat16:

    policy       saved                                                 KiB    products repeated
    "layer"      the layer's input                                       8    all but down_proj
    "stream"     and the residual stream between attention and MLP      16    the same less o_proj
    "attention"  and queries, keys, values, what attention made of them  36    gate_proj, up_proj
    "products"   and outputs of gate_proj and up_proj                   92    none

Two more keep most of it in the host's pinned memory, while they leave on the device:

    "attention-offloaded"  the stream, which backward needs first        8    as "attention"
    "layer-offloaded"      nothing                                       0    as "layer"

The older names of `jax.checkpoint_policies` are taken as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_ATTENTION = ("queries", "keys", "values", "attended", "heads")
_PRODUCTS = ("gate", "up", "routed", "update")


@dataclasses.dataclass(frozen=True)
class Saved:
    """Names of what a policy saves.

    Attributes:
      device: of what stays on the device.
      host: of what goes to the host. A layer's input is saved on the device unless it is here.
    """

    device: tuple[str, ...] = ()
    host: tuple[str, ...] = ()


NAMED: dict[str, Saved] = {
    "layer-offloaded": Saved(host=("input",)),
    "layer": Saved(),
    "stream": Saved(("stream",)),
    "attention-offloaded": Saved(("stream",), host=("input", *_ATTENTION)),
    "attention": Saved(("stream", *_ATTENTION)),
    "products": Saved(("stream", *_ATTENTION, *_PRODUCTS)),
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
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=NAMED[name].device,
        names_which_can_be_offloaded=NAMED[name].host,
        offload_src="device",
        offload_dst="pinned_host",
    )

    def saves(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name in _FUSED_ATTENTION:
            named, params = _named_attended()
            return by_name(named, **params)
        return by_name(primitive, *args, **params)

    return saves


@functools.cache
def _named_attended() -> tuple[Any, dict[str, Any]]:
    """The primitive by which JAX names a value "attended", and its parameters."""
    (equation,) = jax.make_jaxpr(lambda x: saved(x, "attended"))(0.0).eqns
    return equation.primitive, equation.params
