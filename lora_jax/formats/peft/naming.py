"""The torch modules that leaves stand for.

Scanned layers and experts are one leaf here and a module each there. So a leaf's name has a `{}`
for each of its batch axes:

    layers/attn/q_proj/kernel           [L, in, out]     model.layers.{}.self_attn.q_proj
    layers_3/attn/q_proj/kernel         [in, out]        model.layers.3.self_attn.q_proj
    layers/mlp/experts/up_proj/kernel   [L, E, in, out]  model.layers.{}.mlp.experts.{}.up_proj

Shapes: L layers, E experts, r rank, V vocabulary, D width, `in` contracted, `out` produced.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lora_jax.core.leaves import Adapter
from lora_jax.core.rules import first_matches

# A torch name for a leaf's path; None, or no entry, for a leaf that torch does not have.
Names: TypeAlias = Mapping[str, str] | Callable[[str], str | None]

EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"
ROUTER = "/router/kernel"  # of a layer
# The decoder's parts that transformers calls otherwise; `q_proj`, `mlp` and their like agree.
_PARTS = {
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "experts": "experts.{}",
    "router": "gate",
}
# Where norms follow attention and MLP as well, transformers' names say another thing.
_PARTS_OF_POST_NORMS = {
    **_PARTS,
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_WHOLE_MODELS = {
    EMBEDDING: "model.embed_tokens",
    "final_norm/scale": "model.norm",
    HEAD: "lm_head",
}


def decoder_module(path: str, *, post_norms: bool = False) -> str | None:
    """What transformers calls the module of a leaf of an `lj.models` decoder; None for others.

    Args:
      path: of the leaf.
      post_norms: whether the decoder norms what attention and MLP give, too.
    """
    layer = re.fullmatch(r"layers(?:_(\d+))?/(.+)/(kernel|scale|bias)", path)
    if layer is None:
        return _WHOLE_MODELS.get(path)
    number, parts, _ = layer.groups()
    known = _PARTS_OF_POST_NORMS if post_norms else _PARTS
    name = ".".join(known.get(part, part) for part in parts.split("/"))
    return f"model.layers.{'{}' if number is None else number}.{name}"


def naming(names: Names | None, paths: Collection[str]) -> Callable[[str], str | None]:
    """The function that names a leaf's module: of a decoder with these paths, if none is given."""
    if names is None:
        post_norms = any("/mlp_post_norm/" in path for path in paths)
        return functools.partial(decoder_module, post_norms=post_norms)
    return names.get if isinstance(names, Mapping) else names


def last(path: str) -> str:
    """`kernel` of `layers/attn/q_proj/kernel`."""
    return path.rpartition("/")[2]


def parameter(path: str) -> str:
    """What torch calls the parameter within its module."""
    return "bias" if last(path) == "bias" else "weight"


def is_embedding(path: str) -> bool:
    """Whether a leaf is a table of rows, for which PEFT has tensors of other names and axes."""
    return last(path) == "embedding"


def layout_of(path: str) -> str:
    """The layout of a matrix that nobody has stated: torch's own order, except in Flax kernels."""
    return "o i" if last(path) in ("embedding", "weight") else "i o"


def is_turned(path: str, axes: int, conv1d: Collection[str]) -> bool:
    """Whether torch has a leaf's axes the other way round: Flax kernels, but for Conv1D's.

    Args:
      path: of the leaf.
      axes: how many it has, batch axes aside.
      conv1d: paths of the kernels that torch has as [in, out], too.
    """
    return axes == 2 and layout_of(path) == "i o" and path not in conv1d


def conv1d_paths(patterns: str | Sequence[str], paths: Sequence[str]) -> set[str]:
    """The paths that `fan_in_fan_out` names: of kernels that torch has as [in, out]."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    return set(first_matches(listed, paths))


def indices(path: str, template: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All positions on the batch axes that a template numbers, of a leaf of this shape.

    Raises:
      ValueError: if the leaf has fewer axes than that.
    """
    numbered = template.count("{}")
    if numbered > len(shape):
        raise ValueError(
            f"{path} has shape {shape}, and its torch name {template!r} numbers {numbered} axes; "
            "write a {} for each batch axis (layers, experts)"
        )
    yield from np.ndindex(shape[:numbered])


def adapter_indices(path: str, template: str, adapter: Adapter) -> list[tuple[int, ...]]:
    """The positions on the batch axes of an adapter that have a module in the file.

    Where layers are scanned and not all of them are adapted, the others hold zeros in A and in B
    alike, which learn nothing and change nothing: these are left out. Untrained ones have a zero B
    alone. If nothing but zeros is there, it is meant.

    Args:
      path: of the leaf.
      template: its torch name.
      adapter: with NumPy arrays a [b..., r, in] and b [b..., out, r].

    Raises:
      ValueError: if the name does not number all batch axes.
    """
    if template.count("{}") != len(adapter.batch_shape):
        raise ValueError(
            f"the adapter of {path} has batch axes {adapter.batch_shape}, and its torch name "
            f"{template!r} numbers {template.count('{}')}; write a {{}} for each of them"
        )
    positions = list(indices(path, template, adapter.batch_shape))
    live = [k for k in positions if adapter.a[k].any() or adapter.b[k].any()]
    return live or positions


def factor_names(path: str, module: str) -> tuple[str, str]:
    """What PEFT calls the two factors of a module: those of a table of rows are parameters."""
    if is_embedding(path):
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def turned(path: str, layout: str, a: Any, b: Any) -> tuple[Any, Any]:
    """PEFT's factors of one module from ours, and ours from PEFT's.

    A linear module has lora_A [r, in] and lora_B [out, r], as here. A table of rows [V, D] has
    lora_embedding_A [r, V] and lora_embedding_B [D, r]; under the layout "o i" V is `out`, so that
    they are B and A transposed.

    Args:
      path: of the leaf.
      layout: of the leaf, without batch axes.
      a: the first factor, [r, ...].
      b: the second, [..., r].
    """
    return (b.T, a.T) if is_embedding(path) and layout == "o i" else (a, b)
