"""Losses: optax's in float64, the logits that are never held, and every way to transform them."""

from __future__ import annotations

import functools
import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_batches import VOCAB, adapted, batch, decoder, equations_in

import lora_jax as lj
from lora_jax import train

pytestmark = pytest.mark.compiled_quickly

ROWS, LENGTH, DIM = 3, 20, 5
WEIGHTS = {
    "all": np.ones((ROWS, LENGTH)),
    "none": np.zeros((ROWS, LENGTH)),
    "some": np.random.default_rng(1).random((ROWS, LENGTH)) < 0.3,
    "one": np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) == 37,
    "one row": np.arange(ROWS)[:, None] + np.zeros((1, LENGTH)) == 1,
    "signed": np.random.default_rng(2).normal(size=(ROWS, LENGTH)),
}


def problem(weights: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, DIM))
    head = rng.normal(size=(DIM, VOCAB))
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    targets[0] = np.argmax(hidden[0] @ head, axis=-1)  # that some be right
    return hidden, head, targets, np.asarray(WEIGHTS[weights], np.float64)


def in_chunks(hidden, head, targets, weights, **options):
    unembed = lambda x: x @ head  # noqa: E731
    return train.chunked_cross_entropy(hidden, targets, weights, unembed, **options)


def dense(hidden, head, targets, weights, label_smoothing):
    logits = hidden @ head
    labels = optax.smooth_labels(
        jax.nn.one_hot(targets, VOCAB, dtype=hidden.dtype), label_smoothing
    )
    losses = optax.softmax_cross_entropy(logits, labels)
    right = (jnp.argmax(logits, -1) == targets) * weights
    return (losses * weights).sum(), weights.sum(), right.sum()


@functools.cache
def compiled(chunk: int | None, smoothing: float) -> tuple[Any, Any]:
    """Values and gradients, in chunks and dense."""
    options = {"chunk": chunk, "label_smoothing": smoothing}

    def with_aux(fn):
        return lambda *xs: (lambda loss, *rest: (loss, rest))(*fn(*xs))

    fns = (functools.partial(in_chunks, **options), lambda *xs: dense(*xs, smoothing))
    return tuple(jax.jit(jax.value_and_grad(with_aux(fn), (0, 1), has_aux=True)) for fn in fns)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("chunk", "smoothing"), [(None, 0.1), (1, 0.0), (25, 0.1), (512, 0.0)])
def test_equal_to_the_dense_loss_in_float64(weights, chunk, smoothing):
    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, problem(weights)))
        actual, wanted = (jax.tree.leaves(fn(*arrays)) for fn in compiled(chunk, smoothing))
        for one, other in zip(actual, wanted, strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_losses_stand_where_their_tokens_do():
    hidden, head, targets, weights = problem("some")
    logits = hidden @ head
    wanted = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    losses, correct = train.token_losses(
        *map(jnp.asarray, (hidden, targets, weights)), lambda x: x @ head, chunk=7
    )
    np.testing.assert_allclose(losses, np.where(weights, wanted, 0), rtol=1e-5, atol=1e-5)
    right = (logits.argmax(-1) == targets) & (weights != 0)
    np.testing.assert_array_equal(correct, right)
    assert 0 < right.sum() < weights.sum()


def test_not_finite_where_nothing_is_to_be_predicted():
    hidden, head, targets, weights = problem("some")
    hidden[weights == 0] = np.nan
    loss, _, _ = in_chunks(*map(jnp.asarray, (hidden, head, targets, weights)), chunk=7)
    assert math.isfinite(loss)


@pytest.mark.parametrize(("supervised", "at_most"), [(20, 60), (10, 30), (5, 18), (1, 6), (0, 6)])
def test_what_is_not_supervised_is_not_computed(supervised, at_most):
    hidden, head, targets, _ = problem("all")
    weights = np.zeros((ROWS, LENGTH), np.float32)
    weights[:, LENGTH - supervised :] = 1
    seen = []

    def unembed(x):
        jax.debug.callback(lambda x: seen.append(x.shape[0] * x.shape[1]), x)
        return x @ head

    loss = jax.jit(lambda *xs: train.token_losses(*xs, unembed, chunk=6)[0].sum())
    loss(*map(jnp.asarray, (hidden, targets, weights))).block_until_ready()
    jax.effects_barrier()
    assert 0 < sum(seen) <= at_most
    assert max(seen) <= 6


# The decoder, with a head that is adapted.

KINDS = {"tied, 4 bits": (True, True), "head, float32": (False, False)}


@pytest.fixture
def fewer_programs(monkeypatch):
    """Compiles for T and T/2 positions alone; the tests above have seen the others."""
    monkeypatch.setattr(train.cross_entropy, "HALVINGS", 1)


def make(tied_head: bool, quantized: bool) -> Any:
    base, adapters = adapted(tied_head, quantized)
    return SimpleNamespace(model=decoder(tied_head=tied_head), base=base, adapters=adapters)


def dense_loss(case, adapters, batch):
    """The same with the update written out: W + scale * B A, and all logits."""

    def written_out(leaf, adapter):
        if not isinstance(adapter, lj.Adapter):
            return leaf
        w = lj.dequantize(leaf) if isinstance(leaf, lj.QuantizedArray) else leaf
        update = adapter.scale * adapter.b @ adapter.a  # [..., out, in]
        return w + (update if adapter.layout == "o i" else jnp.swapaxes(update, -1, -2))

    is_leaf = lambda x: x is None or isinstance(x, lj.QuantizedArray | lj.Adapter)  # noqa: E731
    params = jax.tree.map(written_out, case.base, adapters, is_leaf=is_leaf)
    logits = case.model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.tokens[:, 1:])
    return (losses * batch.weights[:, 1:]).sum() / batch.weights[:, 1:].sum(), logits


def assert_near(actual: Any, wanted: Any, tolerance: float = 3e-5) -> None:
    """Each leaf within `tolerance` of its largest value."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize(("tied_head", "quantized"), KINDS.values(), ids=KINDS)
def test_the_decoders_loss_and_gradient(tied_head, quantized):
    case, data = make(tied_head, quantized), batch()
    loss_fn = train.next_token_loss(case.model, chunk=20)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), grads = gradient(case.adapters, case.base, data, None)
    (wanted, logits), wanted_grads = jax.jit(
        jax.value_and_grad(lambda a: dense_loss(case, a, data), has_aux=True)
    )(case.adapters)
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert_near(grads, wanted_grads)
    weights = data.weights[:, 1:]
    right = np.argmax(logits, -1)[:, :-1] == data.tokens[:, 1:]
    assert metrics["weight"] == weights.sum()
    assert metrics["accuracy"] == pytest.approx((right * weights).sum() / weights.sum())
    assert metrics["tokens"] == (data.segment_ids > 0).sum()


@pytest.mark.usefixtures("fewer_programs")
def test_transforms_change_nothing():
    case, data = make(tied_head=True, quantized=True), batch()
    loss_fn = train.next_token_loss(case.model, chunk=20)
    value = lambda adapters: loss_fn(adapters, case.base, data, None)[0]  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(value))
    one, two = case.adapters, jax.tree.map(lambda x: 2 * x, case.adapters)
    wanted = gradient(one), gradient(two)
    assert_near(jax.jit(jax.value_and_grad(jax.checkpoint(value)))(one), wanted[0])
    both = jax.tree.map(lambda *xs: jnp.stack(xs), one, two)
    batched = jax.jit(jax.vmap(jax.value_and_grad(value)))(both)
    assert_near(batched, jax.tree.map(lambda *xs: jnp.stack(xs), *wanted))
    direction = jax.tree.map(jnp.ones_like, one)
    slope = jax.jit(lambda x: jax.jvp(value, (x,), (direction,))[1])(one)
    assert slope == pytest.approx(float(optax.tree.vdot(wanted[0][1], direction)), rel=1e-4)


@pytest.mark.usefixtures("fewer_programs")
def test_vmap_over_batches():
    base, adapters = adapted(tied_head=True, quantized=False)
    loss_fn = train.next_token_loss(decoder(tied_head=True), chunk=20)
    batches = [batch(seed=0, supervised=0.9), batch(seed=1, supervised=0.1)]
    both = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    value = lambda data: loss_fn(adapters, base, data, None)[0]  # noqa: E731
    wanted = [float(jax.jit(value)(data)) for data in batches]
    vmapped = jax.jit(jax.vmap(value)).trace(both)
    np.testing.assert_allclose(vmapped.lower().compile()(both), wanted, rtol=1e-5)
    # What one batch has to predict decides nothing for the other: no branch is chosen by it, which
    # would also run all of them, with a copy of the head for each batch.
    values = [x.aval for e in equations_in(vmapped.jaxpr.jaxpr) for x in e.outvars]
    shapes = {x.shape for x in values if VOCAB in x.shape and x.shape[0] == 2}
    assert any(len(shape) == 4 for shape in shapes)  # the test can see logits
    assert not any(32 in shape for shape in shapes)


@pytest.mark.compiled_quickly(False)
@pytest.mark.usefixtures("fewer_programs")
def test_without_adapters_it_is_the_base():
    base, _ = adapted(tied_head=False, quantized=True)
    zero = lj.init_adapters(jax.random.key(0), base, [lj.LoraRule("q_proj", 2)])
    loss_fn = jax.jit(train.next_token_loss(decoder(), chunk=20))
    assert loss_fn(None, base, batch(), None)[0] == loss_fn(zero, base, batch(), None)[0]


@pytest.mark.compiled_quickly(False)
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4 bits"])
def test_logits_of_a_whole_batch_are_never_held(quantized):
    """Forward and backward; sizes are such that the vocabulary is in no other product."""
    base, adapters = adapted(tied_head=True, quantized=quantized)
    data = batch(rows=6, length=37, supervised=0.9)
    chunk, positions = 24, 6 * 37
    gradient = jax.jit(
        jax.value_and_grad(
            train.next_token_loss(decoder(tied_head=True), chunk=chunk), has_aux=True
        )
    )
    arguments = (adapters, base, data, None)
    largest = VOCAB * 32  # the weight itself, decoded
    traced = gradient.trace(*arguments)
    shapes = [x.aval.shape for e in equations_in(traced.jaxpr.jaxpr) for x in e.outvars]
    # XLA's own, after all of its rewriting
    program = traced.lower().compile().as_text()
    compiled = {tuple(map(int, m.split(","))) for m in re.findall(r"\w\d+\[([\d,]+)\]", program)}
    for found in (shapes, compiled):
        held = [shape for shape in found if any(n and n % VOCAB == 0 for n in shape)]
        assert held  # the test can see logits
        assert max(math.prod(shape) for shape in held) <= largest < VOCAB * positions
        # XLA may or may not keep a chunk's two axes apart.
        assert {chunk} & {math.prod(s) // VOCAB for s in held}
    whole = jax.jit(
        jax.value_and_grad(train.next_token_loss(decoder(tied_head=True), chunk=None), has_aux=True)
    )
    all_at_once = [
        x.aval.shape for e in equations_in(whole.trace(*arguments).jaxpr.jaxpr) for x in e.outvars
    ]
    assert (6, 37, VOCAB) in all_at_once


def test_positions_are_chosen_by_a_branch_in_both_directions():
    base, adapters = adapted(tied_head=True, quantized=True)
    gradient = jax.value_and_grad(
        train.next_token_loss(decoder(tied_head=True), chunk=20), has_aux=True
    )
    traced = jax.make_jaxpr(gradient)(adapters, base, batch(), None)
    branches = [e for e in equations_in(traced.jaxpr) if e.primitive.name == "cond"]
    with_logits = [
        e
        for e in branches
        for branch in e.params["branches"][:1]
        if any(VOCAB in x.aval.shape for i in equations_in(branch.jaxpr) for x in i.outvars)
    ]
    assert len(with_logits) >= 2
    # No branch hands logits on: that is what making them again in the backward pass is for.
    assert not any(
        x.aval.shape[-1] == VOCAB for e in branches for x in e.outvars if x.aval.ndim > 2
    )


@pytest.mark.compiled_quickly(False)
@pytest.mark.usefixtures("fewer_programs")
def test_on_eight_devices():
    base, adapters = adapted(tied_head=True, quantized=True)
    data = batch(rows=8)
    gradient = jax.jit(
        jax.value_and_grad(train.next_token_loss(decoder(tied_head=True), chunk=48), has_aux=True)
    )
    wanted = gradient(adapters, base, data, None)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = lj.shard(base, mesh, [("attn/q_proj", P(None, None, "model"))])
    rows = jax.device_put(data, NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(adapters, NamedSharding(mesh, P()))
    program = gradient.lower(everywhere, placed, rows, None).compile()
    assert_near(program(everywhere, placed, rows, None), wanted)
    # Logits are made where their rows are: for two of eight rows here, half of 24 positions.
    of_logits = re.findall(rf"f32\[(\d+),(\d+),{VOCAB}\]", program.as_text())
    assert of_logits
    assert {int(rows) for rows, _ in of_logits} == {2}


@pytest.mark.usefixtures("fewer_programs")
def test_mixed_precision():
    base, adapters = adapted(tied_head=True, quantized=False)
    half = train.next_token_loss(decoder(tied_head=True, dtype=jnp.bfloat16), chunk=20)
    full = train.next_token_loss(decoder(tied_head=True), chunk=20)
    value, data = (lambda a: half(a, base, data, None)[0]), batch()
    loss, grads = jax.jit(jax.value_and_grad(value))(adapters)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(jax.jit(full)(adapters, base, data, None)[0]), rel=2e-2)


# Noise, and what else depends on the key


def test_neftune_is_uniform_and_of_the_papers_size():
    data = batch(rows=2, length=40)
    embeddings = jnp.zeros((2, 40, 512))
    noise = train.neftune(5.0)(jax.random.key(0), embeddings, data)
    for row, (ids, values) in enumerate(zip(data.segment_ids, np.asarray(noise), strict=True)):
        for number in np.unique(ids[ids > 0]):
            part = values[ids == number]
            size = 5.0 / math.sqrt(len(part) * 512)
            assert 0.99 * size < np.abs(part).max() <= size, (row, number)
            assert np.std(part) == pytest.approx(size / math.sqrt(3), rel=0.05)


@pytest.mark.usefixtures("fewer_programs")
def test_the_key_decides_noise_and_dropout():
    base, adapters = adapted(tied_head=True, quantized=False, dropout=0.3)
    model, data = decoder(tied_head=True), batch()
    key, other = jax.random.split(jax.random.key(0))
    noisy = jax.jit(train.next_token_loss(model, chunk=20, perturb=train.neftune(30.0)))
    plain = jax.jit(train.next_token_loss(model, chunk=20))
    losses = [float(fn(adapters, base, data, k)[0]) for fn in (noisy, plain) for k in (key, other)]
    assert len(set(losses)) == 4
    assert losses[0] == noisy(adapters, base, data, key)[0]
    assert noisy(adapters, base, data, None)[0] not in losses


X = jnp.ones((2, 3, 4))
ERRORS = {
    "shapes": ({"targets": jnp.ones((2, 4), int)}, r"\(2, 3, 4\), \(2, 4\) and \(2, 3\), expected"),
    "no chunk": ({"chunk": 0}, "chunk is 0, expected at least 1, or None"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a share"),
}


@pytest.mark.parametrize(("changed", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(changed, sentence):
    good = {"hidden": X, "targets": jnp.ones((2, 3), int), "weights": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=sentence):
        train.token_losses(**{**good, "unembed": lambda x: x, **changed})


def test_neftune_of_less_than_nothing():
    with pytest.raises(ValueError, match="alpha is -1"):
        train.neftune(-1)


@pytest.mark.usefixtures("fewer_programs")
@pytest.mark.parametrize(("tied_head", "quantized"), KINDS.values(), ids=KINDS)
def test_a_choice_among_few_tokens(tied_head, quantized):
    base, adapters = adapted(tied_head=tied_head, quantized=quantized)
    model, data, among = decoder(tied_head=tied_head), batch(), [17, 5, 200]
    rng = np.random.default_rng(3)
    data = data._replace(
        tokens=np.where(data.weights > 0, rng.choice(among, data.tokens.shape), data.tokens)
    )
    loss_fn = jax.jit(train.next_token_loss(model, chunk=20, among=among))
    traced = loss_fn.trace(adapters, base, data, None)
    values = [x.aval.shape for e in equations_in(traced.jaxpr.jaxpr) for x in e.outvars]
    assert not any(VOCAB in shape and len(shape) > 2 for shape in values)  # no other logits
    loss, metrics = loss_fn(adapters, base, data, None)
    apply = jax.jit(lj.adapt(model.apply))
    inputs = (data.tokens, data.positions, data.segment_ids)
    logits = apply({"params": lj.combine(base, adapters)}, *inputs)
    logits = np.asarray(logits, np.float64)[:, :-1, among]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    is_target = data.tokens[:, 1:, None] == np.array(among)
    weights = data.weights[:, 1:]
    of_target = np.where(is_target.any(-1), (probabilities * is_target).sum(-1), 1)
    assert loss == pytest.approx(-(np.log(of_target) * weights).sum() / weights.sum(), rel=1e-5)
    right = is_target[np.arange(4)[:, None], np.arange(23), logits.argmax(-1)]
    assert metrics["accuracy"] == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-5)
    data.tokens[np.nonzero(data.weights)] = 6
    assert loss_fn(adapters, base, data, None)[0] == math.inf
