"""A decoder that is given embeddings in place of the tokens' own, or a mask of its caller's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.decoder import Decoder, DecoderConfig, init_cache

pytestmark = pytest.mark.compiled_quickly

TOKENS = np.asarray([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
SEGMENTS = np.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
CONFIG = DecoderConfig(
    vocab_size=11, dim=12, mlp_dim=20, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    decoder = Decoder(dataclasses.replace(CONFIG, tied_head=request.param))
    return decoder, decoder.init(jax.random.key(0), TOKENS)


def test_embeddings_are_the_rows_of_the_matrix(model):
    decoder, variables = model
    rows = decoder.apply(variables, TOKENS, method="embeddings")
    np.testing.assert_array_equal(rows, variables["params"]["embed"]["embedding"][TOKENS])


def test_the_tokens_own_change_nothing(model):
    decoder, variables = model
    embeddings = decoder.apply(variables, TOKENS, method="embeddings")
    arguments = variables, TOKENS, None, SEGMENTS
    expected = decoder.apply(*arguments, method="hidden")
    got = decoder.apply(*arguments, embeddings=embeddings, method="hidden")
    np.testing.assert_array_equal(got, expected)


def test_others_are_read_in_their_place(model):
    decoder, variables = model
    expected = decoder.apply(variables, TOKENS[::-1], method="hidden")
    embeddings = decoder.apply(variables, TOKENS[::-1], method="embeddings")
    got = decoder.apply(variables, TOKENS, embeddings=embeddings, method="hidden")
    np.testing.assert_array_equal(got, expected)


def test_embeddings_of_another_shape_are_an_error(model):
    decoder, variables = model
    with pytest.raises(ValueError, match=r"embeddings are \(2, 5, 8\) .* expected \(2, 5, 12\)"):
        decoder.apply(variables, TOKENS, embeddings=jnp.ones((2, 5, 8)), method="hidden")


def test_a_tree_of_tokens_is_read_at_once(model):
    """Two continuations of a prompt share it, and do not see each other."""
    decoder, variables = model
    prompt, left, right = [3, 1, 4], [1, 5, 9], [2, 6]
    states = []
    for tail in (left, right):
        whole = np.asarray([prompt + tail])
        states.append(decoder.apply(variables, whole, method="hidden")[0, len(prompt) :])

    cache = init_cache(CONFIG, batch=1, length=10)
    _, cache = decoder.apply(variables, np.asarray([prompt]), cache, method="extend")
    branch = np.asarray([0, 0, 0, 1, 1])
    own = (branch[:, None] == branch) & np.tri(5, dtype=bool)
    mask = np.zeros((1, 5, 10), bool)
    mask[0, :, :3], mask[0, :, 3:8] = True, own
    tree, positions = np.asarray([left + right]), np.asarray([[3, 4, 5, 3, 4]])
    got, cache = decoder.apply(
        variables, tree, cache, jnp.asarray(positions), mask=mask, method="extend"
    )
    np.testing.assert_allclose(got[0], np.concatenate(states), atol=1e-5, rtol=1e-5)
    assert cache.length == 8


def test_a_mask_of_another_shape_is_an_error(model):
    decoder, variables = model
    cache = init_cache(CONFIG, batch=2, length=8)
    with pytest.raises(ValueError, match=r"the mask is \(2, 5, 5\); expected \(2, 5, 8\)"):
        decoder.apply(variables, TOKENS, cache, mask=np.ones((2, 5, 5), bool), method="extend")
