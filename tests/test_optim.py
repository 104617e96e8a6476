"""Optimizers move adapters and nothing else; LoRA+ moves B faster."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

KEY = jax.random.key(0)


def combined(quantized: bool = False) -> Any:
    params = {"w": jax.random.normal(KEY, (64, 32)), "norm": jnp.ones(32), "other": jnp.ones(3)}
    base = lj.quantize(params, "w") if quantized else params
    adapters = lj.init_adapters(KEY, base, [lj.LoraRule("w", rank=4)], train="norm")
    return lj.combine(base, adapters)


def ones(tree: Any) -> Any:
    return jax.tree.map(jnp.ones_like, tree)


def test_mask_is_true_where_something_is_trained() -> None:
    base, adapters = lj.split(lj.adapter_mask(combined()))
    assert base == {"w": False, "norm": False, "other": False}
    assert (adapters["w"].a, adapters["w"].b, adapters["norm"]) == (True, True, True)
    assert adapters["other"] is None


def test_frozen_leaves_stay_where_they_are_to_the_bit() -> None:
    tree = combined()
    tx = optax.chain(optax.clip_by_global_norm(1.0), lj.freeze_base(optax.adamw(0.1)))
    state = tx.init(tree)
    moved = tree
    for _ in range(3):
        updates, state = tx.update(ones(moved), state, moved)
        moved = optax.apply_updates(moved, updates)
    (base, adapters), (new_base, new_adapters) = lj.split(tree), lj.split(moved)
    for old, new in zip(jax.tree.leaves(base), jax.tree.leaves(new_base), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(adapters), jax.tree.leaves(new_adapters), strict=True):
        assert float(jnp.abs(old - new).min()) > 0.05


def test_what_goes_wrong_without_freeze_base() -> None:
    """optax.masked passes the raw gradients of everything else through."""
    tree = combined()
    tx = optax.masked(optax.sgd(0.1), lj.adapter_mask(tree))
    updates, _ = tx.update(ones(tree), tx.init(tree), tree)
    base, _ = lj.split(optax.apply_updates(tree, updates))
    assert float(base["other"][0]) == 2.0


def test_no_optimizer_state_is_kept_for_the_base() -> None:
    tree = combined()
    state = lj.freeze_base(optax.adam(0.1)).init(tree)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == sorted([4 * 64, 4 * 32, 32] * 2)


def test_a_quantized_base_is_refused_naming_split() -> None:
    tree = combined(quantized=True)
    for call in (lj.adapter_mask, lj.freeze_base(optax.sgd(0.1)).init):
        with pytest.raises(
            ValueError, match=r"^w is quantized.*base, adapters = lj\.split\(tree\)"
        ):
            call(tree)


@pytest.mark.parametrize("learning_rate", [0.5, optax.linear_schedule(0.5, 0.1, 4)])
def test_lora_plus(learning_rate: Any) -> None:
    _, adapters = lj.split(combined())
    tx = lj.lora_plus(optax.sgd, learning_rate, ratio=16)
    state = tx.init(adapters)
    for step in range(3):
        updates, state = tx.update(ones(adapters), state, adapters)
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        np.testing.assert_allclose(updates["w"].a, -rate, rtol=1e-6)
        np.testing.assert_allclose(updates["w"].b, -16 * rate, rtol=1e-6)
        np.testing.assert_allclose(updates["norm"], -rate, rtol=1e-6)


@pytest.mark.parametrize("ratio", [0, -1, float("nan")])
def test_lora_plus_needs_a_positive_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio is .*, expected a positive number"):
        lj.lora_plus(optax.sgd, 0.1, ratio=ratio)


def test_weight_decay_leaves_the_scale_alone() -> None:
    _, adapters = lj.split(combined())
    tx = optax.adamw(1e-2, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = tx.update(zero, tx.init(adapters), adapters)
    assert optax.apply_updates(adapters, updates)["w"].scale == adapters["w"].scale
