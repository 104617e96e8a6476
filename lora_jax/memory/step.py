"""What a step needs beside its state: at which moment, and for what.

A step has two moments at which most is alive, and its peak is the larger of them:

    logits     every layer's saved values, and one chunk of logits with its gradient
    backward   the same, and the working set of the last layer's backward pass

The numbers of arrays below are those that XLA's buffer assignment for NVIDIA GPUs shows at these
moments (JAX 0.11.2, kernels of `lora_jax.kernels.gpu`). They follow from what the backward pass
reads, and from the order in which XLA's scheduler takes the products of a layer. No factor is
fitted: each term is an array, or a few of one size, that can be pointed at in the program.

Shapes: T tokens, D model width, F MLP width, Q = N * H width of all query heads, K of all key
heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from lora_jax.core.folded import least_rows
from lora_jax.memory.setup import Setup
from lora_jax.memory.trees import packed_bytes, weights

WORKSPACE = 32 * 2**20  # that cuBLAS is given on Hopper
REDZONE = 8 * 2**20  # on either side of an operand, by which the autotuner notices stray writes
REDUCED = 256  # logits whose sums and maxima XLA takes together before it adds those up


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is alive beside the state, in bytes.

    Attributes:
      name: `"logits"` or `"backward"`.
      activations: what the layers saved for the backward pass.
      logits: of a chunk, in float32, and their gradient.
      gradients: of adapters, or of all weights.
      temporaries: the working set of a layer, decoded weights, workspaces.
    """

    name: str
    activations: int
    logits: int
    gradients: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.activations + self.logits + self.gradients + self.temporaries


class _Widths(NamedTuple):
    """Bytes of one array of all tokens, by its width."""

    d: int
    f: int
    q: int
    k: int
    statistics: int  # float32 a query head, of cuDNN's softmax

    @classmethod
    def of(cls, setup: Setup) -> _Widths:
        shape, of_token = setup.shape, setup.tokens * setup.itemsize
        return cls(
            d=of_token * shape.dim,
            f=of_token * shape.mlp_dim * max(1, shape.experts_per_token),
            q=of_token * shape.num_heads * shape.head_dim,
            k=of_token * shape.num_kv_heads * shape.head_dim,
            statistics=4 * setup.tokens * shape.num_heads if setup.attention == "cudnn" else 0,
        )


def moments(setup: Setup, gradients: int) -> tuple[Moment, ...]:
    """The moments of a step, of which the largest is its peak.

    Args:
      setup: the step.
      gradients: bytes of all gradients together.
    """
    saved = setup.shape.num_layers * saved_bytes(setup)
    # Sums over the parts of a batch are there all the time. Else scanned layers have theirs
    # stacked from the start of the backward pass, and unrolled ones are applied as they come.
    sums = gradients if setup.accumulate > 1 else 0
    stacked = gradients if setup.scan or setup.method == "full" else 0
    widths = _Widths.of(setup)
    # The last layer's output; the positions to predict from, brought forward; their gradient.
    around = 3 * widths.d
    return (
        Moment("logits", saved, logits_bytes(setup), sums, around),
        Moment("backward", saved, 0, sums + stacked, _backward(setup, widths)),
    )


def saved_bytes(setup: Setup) -> int:
    """What a layer saves for the backward pass, its input included."""
    d, f, q, k, statistics = _Widths.of(setup)
    shape, routed = setup.shape, setup.shape.experts_per_token
    heads = (q + k) * shape.qk_norm
    if setup.remat is None:
        # Under a scan all is stacked that autodiff asks for: gate, up, the gated product and three
        # steps on the way to it; the stream and both normed inputs; four steps of the norms in
        # float32. In one program XLA sees what of that follows from the rest.
        arrays = 11 * d + 6 * f if setup.scan else 4 * d + 3 * f
        hidden = 7 * setup.tokens * setup.rank * setup.itemsize  # between the factors of adapters
        return arrays + 2 * q + 2 * k + 2 * heads + statistics + _score_bytes(setup) + hidden
    saved = 0 if setup.offloads else d
    if setup.remat in ("stream", "attention", "products"):
        saved += d  # between attention and MLP
    if setup.remat in ("attended", "attended-offloaded"):
        saved += q + statistics
    if setup.remat in ("attention", "products"):
        saved += 2 * q + 2 * k + statistics + heads  # what goes into attention, what comes out
    if setup.remat == "products":
        saved += 2 * f + routed * d + 2 * d * shape.post_norms
    return saved


def inputs_on_host(setup: Setup) -> int:
    """What the layers save of their inputs in the host's memory."""
    return setup.shape.num_layers * _Widths.of(setup).d if setup.offloads else 0


def _score_bytes(setup: Setup) -> int:
    """Products of queries and keys of a layer in float32, which the fused kernel never holds."""
    if setup.attention == "cudnn":
        return 0
    return 4 * setup.rows * setup.shape.num_heads * setup.length**2


def chunk_rows(setup: Setup) -> int:
    """Positions whose logits are held at once, all rows together."""
    if setup.chunk is None:
        return setup.tokens
    per_row = max(1, setup.chunk // setup.rows)
    number = math.ceil(setup.length / per_row)
    return setup.rows * math.ceil(setup.length / number)


def logits_bytes(setup: Setup) -> int:
    """A chunk of logits in float32, their gradient as activations are, and the sums in between."""
    vocabulary = setup.shape.vocab_size
    of_row = vocabulary * (4 + setup.itemsize) + 4 * math.ceil(vocabulary / REDUCED)
    return chunk_rows(setup) * of_row


def _backward(setup: Setup, widths: _Widths) -> int:
    """The working set of a layer's backward pass, beside what is saved."""
    work = max(_while_backward(setup, widths)) + _recomputed(setup, widths)
    # A kernel cannot read codes out of a stack: those of attention are copied from the start. All
    # of a layer are that come from the host.
    some_wait = setup.keep is not None and setup.keep < setup.shape.num_layers
    copied = "_proj" if some_wait else "attn/._proj"
    return work + WORKSPACE + (_codes_of(setup, copied) if setup.scan or some_wait else 0)


def _recomputed(setup: Setup, widths: _Widths) -> int:
    """What of a layer is there again for its backward pass, without the width of the MLP."""
    d, _, q, k, statistics = widths
    attention = 2 * q + 2 * k + statistics  # what goes into it, and what comes out
    again = {
        "layer": 3 * d + attention,  # the normed inputs of attention and MLP, the stream between
        "attended": 3 * d + attention,
        "stream": 2 * d + attention,
        "attention": d,
        "products": 0,
        None: 3 * d if setup.scan else 0,
    }[setup.remat.removesuffix("-offloaded") if setup.remat else None]
    if setup.offloads:
        again += d  # the input, that came back
    if setup.scan and setup.remat in ("attention", "products", None):
        # A kernel cannot read out of a stack what was saved for it, either: that is copied.
        again += attention
    return again


def _while_backward(setup: Setup, widths: _Widths) -> list[int]:
    """What else is alive while a layer is gone through backwards, at each point that may be most.

    Saved gates are read where they lie; those that are computed again are replaced by their
    gradients only when the last adapter of the MLP has had its own.
    """
    d, f, q, k, _ = widths
    of_mlp = 3 * f if setup.remat in ("products", None) else 4 * f
    decoded = 0
    if setup.method == "qlora":
        experts = max(1, setup.shape.num_experts)
        decoded = setup.shape.dim * setup.shape.mlp_dim * setup.itemsize * experts
    # Queries and keys and their products' gradients; the products in float32, where they are held,
    # and twice as many in 16 bits.
    at_attention = 2 * (d + q + k) + 3 * _score_bytes(setup)
    if setup.scan:
        # What comes from the layer above, and what gate_proj and up_proj hand down; or one of the
        # two and both weights; or both weights, and the codes of the second.
        codes = _codes_of(setup, "mlp/gate_proj|experts/gate_proj")
        points = [
            of_mlp + decoded + 3 * d,
            of_mlp + 2 * decoded + d + max(d, codes),
            4 * f + d,
            of_mlp + at_attention,
        ]
    elif setup.remat is None:
        # The gated product is saved as well, and its gradient becomes those of gate and up.
        points = [f + d, at_attention]
    else:
        points = [4 * f + d + (decoded if setup.remat != "products" else 0), at_attention]
    folds = setup.fold and setup.tokens >= least_rows(setup.shape.dim, setup.shape.mlp_dim)
    if setup.method == "lora" or (setup.method == "qlora" and not folds):
        # The update of each of the three products is an array of its own, before it is added. A
        # layer of a stack of dense weights is copied out of it.
        layer = _layer_bytes(setup) if setup.scan and setup.method == "lora" else 0
        points += [6 * f + d, 5 * f + d + layer]
    return points


def _codes_of(setup: Setup, pattern: str) -> int:
    """Bytes of a layer's kernels in 4 bits, of those whose path has the pattern."""
    if setup.method != "qlora":
        return 0
    found = [
        weight
        for weight in weights(setup.shape)
        if weight.inner is not None and re.search(pattern, weight.path)
    ]
    return sum(sum(packed_bytes(setup, weight)) for weight in found) // setup.shape.num_layers


def _layer_bytes(setup: Setup) -> int:
    """The dense kernels of one layer, of experts those of all."""
    itemsize = np.dtype(setup.param_dtype).itemsize
    kernels = [w for w in weights(setup.shape) if w.path.endswith("_proj/kernel")]
    return sum(w.parameters for w in kernels) * itemsize // setup.shape.num_layers


def compiling_bytes(setup: Setup) -> int:
    """What XLA's autotuner holds of the largest product while it tries the ways to take it.

    Two operands in guarded memory, two results to compare, and a workspace each.
    """
    shape, size, tokens = setup.shape, setup.itemsize, setup.tokens
    rows, expert_rows = chunk_rows(setup), tokens * max(1, shape.experts_per_token)
    products = [  # rows, contracted, produced, bytes of a result
        (rows, shape.dim, shape.vocab_size, 4),
        (rows, shape.vocab_size, shape.dim, size),
        (expert_rows, shape.dim, shape.mlp_dim, size),
        (expert_rows, shape.mlp_dim, shape.dim, size),
    ]
    largest = max(
        (rows * inner + inner * outer) * size + 2 * rows * outer * of_result
        for rows, inner, outer, of_result in products
    )
    return largest + 4 * REDZONE + 2 * WORKSPACE
