"""Small models in Flax Linen, Flax NNX and Equinox: every kind of layer that has weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

X = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
SEQUENCE = np.random.default_rng(1).normal(size=(2, 7, 32)).astype(np.float32)
IDS = np.array([[0, 5, 1], [1, 1, 3]])
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of parameters, and which of them to adapt.

    Attributes:
      apply: `apply(params)`, a pytree of results.
      params: as initialized, float32.
      weights: patterns of weights, and the layout of each.
      loops: whether weights are used within a scan or remat.
      narrow: whether it computes in bfloat16.
    """

    apply: Callable[[Any], Any]
    params: Any
    weights: dict[str, str]
    loops: bool = False
    narrow: bool = False


def of_linen(module: linen.Module, x: Any, weights: dict[str, str], **options: Any) -> Model:
    variables = module.init(KEY, x, **options)
    return Model(lambda params: module.apply(params, x, **options), variables, weights)


def of_nnx(module: nnx.Module, call: Callable, weights: dict[str, str]) -> Model:
    """The parameters alone are the tree; what else there is of state stays with the function."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return Model(lambda params: call(nnx.merge(graph, params, rest, copy=True)), params, weights)


class Block(linen.Module):
    """Attention and a normalized, dropped-out layer: everything that Linen passes around."""

    train: bool = True

    @linen.compact
    def __call__(self, x):
        attended = linen.MultiHeadDotProductAttention(num_heads=4)(x)
        x = linen.BatchNorm(use_running_average=not self.train)(x + attended)
        return linen.Dropout(0.5, deterministic=not self.train)(linen.Dense(32)(x))


class Layer(linen.Module):
    """One step of a scan."""

    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(32)(linen.LayerNorm()(x))), None


def scanned_linen(layer: type[linen.Module]) -> linen.Module:
    scan = linen.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={},
    )

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            return scan(name="layers")(x, None)[0]

    return Stack()


class TiedLinen(linen.Module):
    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(24, 32)
        return embed.attend(jnp.tanh(embed(ids)))


class Autoencoder(linen.Module):
    """Two methods, `encode` and `decode`, of which either may be called alone."""

    def setup(self):
        self.encoder = linen.Dense(32)
        self.decoder = linen.Dense(32, use_bias=False)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


def linen_block() -> Model:
    module = Block()
    variables = module.init({"params": KEY, "dropout": KEY}, SEQUENCE)

    def apply(params):
        variables_ = {**variables, "params": params}
        return module.apply(variables_, SEQUENCE, rngs={"dropout": KEY}, mutable=["batch_stats"])

    attention = {"(query|key|value)/kernel": "i o o", "out/kernel": "i i o"}
    return Model(apply, variables["params"], {**attention, "Dense_0/kernel": "i o"})


def linen_partitioned() -> Model:
    """Kernels in boxes that name their axes."""
    init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
    return of_linen(linen.Dense(32, kernel_init=init), X, {"kernel": "i o"})


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.norm(x + self.attention(x))
        for layer in self.layers:
            x = self.dropout(jnp.tanh(layer(x)))
        return x


def nnx_block() -> Model:
    """Statistics and the dropout's count of keys come back as state."""
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))

    def apply(state):
        module = nnx.merge(graph, state, copy=True)
        y = module(SEQUENCE)
        return y, nnx.split(module, nnx.Param, ...)[2]

    attention = {"(query|key|value)/kernel": "i o o", "out/kernel": "i i o"}
    return Model(apply, state, {**attention, r"layers/\d/kernel": "i o"})


def nnx_scanned() -> Model:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(32, 32, rngs=rngs)

    layers = stack(nnx.Rngs(0).split(3))
    scan = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return of_nnx(layers, lambda layers: scan(jnp.asarray(X), layers), {"kernel": "b i o"})


def nnx_vmapped() -> Model:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(32, 32, rngs=rngs)

    layers = stack(nnx.Rngs(0).split(3))
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)
    return of_nnx(layers, lambda layers: each(layers, X), {"kernel": "b i o"})


def nnx_embed() -> Model:
    module = nnx.Embed(24, 32, rngs=nnx.Rngs(0))
    tied = lambda module: module.attend(jnp.tanh(module(IDS)))  # noqa: E731
    return of_nnx(module, tied, {"embedding": "o i"})


def equinox_attention() -> Model:
    module = eqx.nn.MultiheadAttention(4, 32, use_output_bias=True, key=KEY)
    x = SEQUENCE[0]
    return Model(lambda m: m(x, x, x), module, {r"_proj/weight": "o i"})


def equinox_mlp() -> Model:
    module = eqx.nn.MLP(32, 32, 32, 2, activation=jnp.tanh, key=KEY)
    return Model(lambda m: jax.vmap(m)(X), module, {r"layers/\d/weight": "o i"})


def equinox_embedding() -> Model:
    module = eqx.nn.Embedding(24, 32, key=KEY)
    return Model(lambda m: jax.vmap(jax.vmap(m))(IDS), module, {"weight": "o i"})


def equinox_stacked() -> Model:
    """Layers made under vmap, run under scan, as Equinox recommends."""
    make = lambda key: eqx.nn.Linear(32, 32, key=key)  # noqa: E731
    layers = eqx.filter_vmap(make)(jax.random.split(KEY, 3))

    def apply(layers):
        arrays, static = eqx.partition(layers, eqx.is_array)
        step = lambda x, one: (jnp.tanh(jax.vmap(eqx.combine(one, static))(x)), None)  # noqa: E731
        return jax.lax.scan(step, X, arrays)[0]

    return Model(apply, layers, {"weight": "b o i"})


MODELS = {
    "linen: Dense": lambda: of_linen(linen.Dense(32), X, {"kernel": "i o"}),
    "linen: Dense in bfloat16": lambda: of_linen(
        linen.Dense(32, dtype=jnp.bfloat16), X, {"kernel": "i o"}
    ),
    "linen: Dense, boxed": linen_partitioned,
    "linen: DenseGeneral, heads": lambda: of_linen(
        linen.DenseGeneral((4, 8)), X, {"kernel": "i o o"}
    ),
    "linen: DenseGeneral, from heads": lambda: of_linen(
        linen.DenseGeneral(32, axis=(-2, -1)), X.reshape(5, 4, 8), {"kernel": "i i o"}
    ),
    "linen: DenseGeneral, batch": lambda: of_linen(
        linen.DenseGeneral(32, axis=-1, batch_dims=(0,)), SEQUENCE, {"kernel": "b i o"}
    ),
    "linen: Einsum": lambda: of_linen(
        linen.Einsum((32, 4, 8), "bti,ihk->bhtk"), SEQUENCE, {"kernel": "i o o"}
    ),
    "linen: Embed, tied": lambda: of_linen(TiedLinen(), IDS, {"embedding": "o i"}),
    "linen: attention, statistics, dropout": linen_block,
    "linen: scan": lambda: of_linen(scanned_linen(Layer), X, {"kernel": "b i o"}),
    "linen: remat": lambda: of_linen(
        linen.Sequential([linen.remat(linen.Dense)(32), jnp.tanh, linen.remat(linen.Dense)(32)]),
        X,
        {"kernel": "i o"},
    ),
    "linen: scan of remat": lambda: of_linen(
        scanned_linen(linen.remat(Layer, prevent_cse=False)), X, {"kernel": "b i o"}
    ),
    "linen: one method": lambda: of_linen(
        Autoencoder(), X, {"decoder/kernel": "i o"}, method="decode"
    ),
    "nnx: attention, statistics, dropout": nnx_block,
    "nnx: Embed, tied": nnx_embed,
    "nnx: LinearGeneral": lambda: of_nnx(
        nnx.LinearGeneral(32, (4, 8), rngs=nnx.Rngs(0)), lambda m: m(X), {"kernel": "i o o"}
    ),
    "nnx: Einsum": lambda: of_nnx(
        nnx.Einsum("bti,ihk->bhtk", (32, 4, 8), rngs=nnx.Rngs(0)),
        lambda m: m(SEQUENCE),
        {"kernel": "i o o"},
    ),
    "nnx: scan": nnx_scanned,
    "nnx: vmap": nnx_vmapped,
    "equinox: MLP": equinox_mlp,
    "equinox: MultiheadAttention": equinox_attention,
    "equinox: Embedding": equinox_embedding,
    "equinox: scan": equinox_stacked,
}
