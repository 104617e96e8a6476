"""Optimizers for adapters: which leaves move, and LoRA+'s two learning rates.

The usual way needs nothing from here: differentiate the adapters tree alone and give it to any
optax optimizer. `adapter_mask` and `freeze_base` serve those who keep one combined tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax.core.leaves import AdaptedArray, Adapter, QuantizedArray, is_leaf
from lora_jax.core.tree import map_leaves

if TYPE_CHECKING:
    import optax


def adapter_mask(tree: Any) -> Any:
    """Which leaves of a combined tree are trained.

    Args:
      tree: from `combine`, over a float base.

    Returns:
      A tree of the same structure with True at the arrays of adapters and at leaves trained whole,
      False elsewhere. With `optax.masked` alone the *other* leaves would receive their raw
      gradients as updates: use `freeze_base`, or pair the mask with `optax.set_to_zero`.

    Raises:
      ValueError: if the base is quantized: codes are integers, and have no gradients to mask.
    """

    def one(path: str, leaf: Any) -> Any:
        base = leaf.base if isinstance(leaf, AdaptedArray) else leaf
        if isinstance(base, QuantizedArray):
            raise ValueError(
                f"{path} is quantized, and 4-bit codes cannot be in a tree that is differentiated; "
                "write base, adapters = lj.split(tree) and optimize the adapters alone"
            )
        if not isinstance(leaf, AdaptedArray):
            return jax.tree.map(lambda _: False, leaf)
        frozen = jax.tree.map(lambda _: False, leaf)
        trained = jax.tree.map(lambda _: True, leaf.adapter)
        return AdaptedArray(frozen.base, trained, frozen.scale, frozen.dropout_key)

    return map_leaves(one, tree)


def freeze_base(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer `tx` for a combined tree over a float base: only adapters move.

    Args:
      tx: any optax optimizer; it sees, and keeps state for, the adapters alone.

    Returns:
      An optimizer whose updates for the base are zero.

    Raises:
      ValueError: on `init`, if the base is quantized.
    """
    import optax

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda train: "train" if train else "freeze", adapter_mask(tree))

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def lora_plus(
    make_tx: Callable[[Any], optax.GradientTransformation],
    learning_rate: Any,
    *,
    ratio: float = 16,
) -> optax.GradientTransformation:
    """LoRA+ (arXiv:2402.12354): the factor B learns `ratio` times as fast as everything else.

    Args:
      make_tx: from a learning rate to an optimizer, such as `optax.adamw`.
      learning_rate: a number, or an optax schedule, for A and for leaves trained whole.
      ratio: how many times larger B's learning rate is.

    Returns:
      An optimizer for a tree of adapters.

    Example:
      >>> tx = lj.lora_plus(optax.adamw, 2e-4, ratio=16)
    """
    import optax

    if not ratio > 0:
        raise ValueError(f"ratio is {ratio!r}, expected a positive number, such as 16")
    if callable(learning_rate):
        faster = lambda step: ratio * learning_rate(step)  # noqa: E731
    else:
        faster = ratio * learning_rate

    def labels(tree: Any) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Adapter):
                return jax.tree.map(lambda _: "slow", leaf)
            return Adapter("slow", "fast", leaf.scale, leaf.dropout, leaf.layout)

        return jax.tree.map(one, tree, is_leaf=is_leaf)

    return optax.partition({"slow": make_tx(learning_rate), "fast": make_tx(faster)}, labels)
