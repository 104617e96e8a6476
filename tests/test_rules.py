"""Paths, patterns and rules: what matches what, and what is refused in which words."""

import math
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.core.leaves import parse_layout
from lora_jax.core.rules import first_matches, fold_path
from lora_jax.core.tree import named_leaves


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def paths(tree: Any) -> set[str]:
    return {path for path, _ in named_leaves(tree)}


def test_paths_of_each_library() -> None:
    assert paths({"a": [np.ones(1), {"b": np.ones(1)}]}) == {"a/0", "a/1/b"}
    state = nnx.split(Net(nnx.Rngs(0)))[1]
    assert {"layers/0/kernel", "layers/1/bias"} <= paths(state)  # no `.value`, integers bare
    assert {"layers/0/weight", "layers/1/bias"} <= paths(
        eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    )


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert lj.LoraRule("w", rank=16, alpha=32).scale == 2
    assert lj.LoraRule("w", rank=16, alpha=32, rslora=True).scale == 32 / math.sqrt(16)


def test_first_match_wins() -> None:
    assert first_matches(["a/.*", "w"], ["a/w", "b/w"]) == {"a/w": 0, "b/w": 1}


def test_numbers_of_numpy_become_python_numbers() -> None:
    rule = lj.LoraRule("w", rank=np.int64(4), alpha=np.float32(8), dropout=np.float64(0.5))
    assert [type(x) for x in (rule.rank, rule.alpha, rule.dropout)] == [int, float, float]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1"),
        ({"rank": 2.5}, "rank is 2.5, expected a whole number"),
        ({"rank": True}, "rank is True, expected a whole number"),
        ({"rank": "8"}, "rank is '8', expected a whole number"),
        ({"alpha": math.inf}, "alpha is inf, expected a finite number"),
        ({"alpha": "16"}, "alpha is '16', expected a finite number"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a probability below 1"),
        ({"dropout": -0.1}, "dropout is -0.1, expected a probability"),
        ({"pattern": "("}, r"pattern '\(' is no regular expression"),
    ],
)
def test_bad_rules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lj.LoraRule(**{"pattern": "w", **arguments})


def test_a_pattern_that_matches_nothing_lists_the_paths() -> None:
    tree = {"q": {"kernel": np.ones((64, 64), np.float32)}}
    with pytest.raises(ValueError, match=r"pattern 'v/' matches no leaf; the paths are q/kernel"):
        lj.quantize(tree, "v/")
    with pytest.raises(ValueError, match=r"pattern 'v/' matches no leaf"):
        lj.init_adapters(jax.random.key(0), tree, [lj.LoraRule("v/")])
    with pytest.raises(ValueError, match=r"pattern 'head' matches no leaf"):
        lj.init_adapters(jax.random.key(0), tree, [lj.LoraRule("q")], train="head")


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two leaves are both called 'a/b'"):
        first_matches(["a"], ["a/b", "a/b"])


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (None, (4, 6), "i o"),
        ("o i", (4, 6), "o i"),
        ("b i o", (2, 4, 6), "i o"),
        ("b b i o o", (2, 3, 4, 6, 5), "i o o"),
        ("i i o", (2, 4, 6), "i i o"),
    ],
)
def test_layouts_are_kept_without_their_batch_axes(
    layout: str | None, shape: tuple[int, ...], expected: str
) -> None:
    assert parse_layout(layout, shape, "w") == expected


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (None, (4,), "only a matrix can be adapted"),
        (None, (2, 4, 6), 'has 3 axes.*its layout is unknown; write layout="b i o"'),
        ("i b o", (2, 4, 6), "is not understood"),
        ("x o", (4, 6), "is not understood"),
        ("io", (4, 6), "is not understood"),
        ("i o i", (2, 4, 6), "i axes together and its o axes together"),
        ("i i", (4, 6), "at least one of each"),
        ("i o", (2, 4, 6), "names 2 axes, but w has 3"),
    ],
)
def test_bad_layouts(layout: str | None, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(layout, shape, "w")


def test_keys_depend_on_the_path_alone() -> None:
    key = jax.random.key(0)
    data = [jax.random.key_data(fold_path(key, path)) for path in ("a", "b", "a")]
    assert np.array_equal(data[0], data[2])
    assert not np.array_equal(data[0], data[1])
    # The hash is part of what makes a run repeatable: it may not change between versions.
    assert np.asarray(jax.random.key_data(fold_path(key, "layers/0/kernel"))).tolist() == KNOWN_KEY


KNOWN_KEY = [3464408319, 1765853117]
