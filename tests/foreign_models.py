"""Models that nobody wrote for us, unmodified and pinned in foreign_models.txt.

They lie in a folder of their own beside the environment (`make test` puts them there). Their
packages' `__init__` files import training stacks that the models do not need, so a package is
entered by its path, without running its `__init__`; every file that is run is as published.
"""

import contextlib
import dataclasses
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

FOLDER = Path(sys.prefix) / "foreign_models"


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """A small instance of someone's model.

    Attributes:
      apply: `apply(params, *inputs)`, calls the model.
      params: its tree of parameters, filled with small random numbers: running each model's own
        initialization would take longer than all tests of it.
      inputs: arrays for one call.
      weights: pattern of each kind of weight matrix, and its layout.
    """

    apply: Callable[..., jax.Array]
    params: Any
    inputs: tuple[jax.Array, ...]
    weights: dict[str, str]


def linen_scanned_encoder() -> ForeignModel:
    """The encoder of clip-jax: three layers under `nn.scan`, each under `nn.remat`."""
    with _foreign(
        "clip_jax", "wandb", "einshape", "transformers", "clip_jax.maxtext.layers.models"
    ):
        modeling = importlib.import_module("clip_jax.modeling")
    encoder = modeling.CLIPEncoder(
        num_layers=3,
        num_heads=4,
        mlp_dim=128,
        activations=("silu", "linear"),
        ln_type="preln",
        use_rmsnorm=True,
        position_embedding_type="rotary",
        use_causal_mask=True,
        float32_logits=True,
        remat_policy="full",
        unroll=1,
    )
    x = np.random.default_rng(1).normal(size=(2, 8, 64)).astype(np.float32)
    positions = jnp.tile(jnp.arange(8), (2, 1))
    variables = jax.eval_shape(encoder.init, jax.random.key(0), x, position_ids=positions)
    return ForeignModel(
        lambda params, x: encoder.apply({"params": params}, x, position_ids=positions)[
            "last_hidden_state"
        ],
        _random_like(linen.unbox(variables["params"])),
        (x,),
        {
            r"attention/(query|key|value)/kernel": "b i o o",
            r"attention/out/kernel": "b i i o",
            r"mlp/w./?.*kernel": "b i o",
        },
    )


def nnx_llama() -> ForeignModel:
    """Tunix's Llama 3: two layers under `nnx.remat`, einsum projections, head tied to embedding."""
    with _foreign("tunix"):
        llama3 = importlib.import_module("tunix.models.llama3.model")
    config = llama3.ModelConfig(
        num_layers=2,
        vocab_size=96,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
        remat_config=llama3.RematConfig.BLOCK,
    )
    with _old_jax_spellings():
        graph, params = nnx.split(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size)
    positions = jnp.tile(jnp.arange(8), (2, 1))
    causal = jnp.tril(jnp.ones((2, 8, 8), bool))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        with _old_jax_spellings():
            return nnx.merge(graph, params)(tokens, positions, None, causal)[0]

    return ForeignModel(
        apply,
        _random_like(params),
        (tokens,),
        {
            r"attn/[qkv]_proj/w": "i o o",
            r"attn/o_proj/w": "i i o",
            r"mlp/.*_proj/kernel": "i o",
            r"embedder/input_embedding": "o i",
        },
    )


def equinox_vision_transformer() -> ForeignModel:
    """Equimo's vision transformer: images in patches, registers, a class token; Equinox kernels."""
    with _foreign("equimo"):
        vit = importlib.import_module("equimo.models.vit")
    sizes = {"img_size": 16, "in_channels": 3, "dim": 64, "patch_size": 4, "num_classes": 10}
    model = eqx.filter_eval_shape(
        lambda key: vit.VisionTransformer(**sizes, num_heads=4, depths=[2], key=key),
        jax.random.key(0),
    )
    images = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)

    def apply(model: Any, images: jax.Array) -> jax.Array:
        # Every key is unused at inference, but the model asks for one.
        return jax.vmap(lambda x: model(x, key=jax.random.key(0), inference=True))(images)

    return ForeignModel(
        apply, _random_like(model), (images,), {r"blocks/.*/(qkv|proj|fc1|fc2)/weight": "o i"}
    )


def _random_like(tree: Any) -> Any:
    random = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(one, tree)


@contextlib.contextmanager
def _foreign(package: str, *unused: str) -> Iterator[None]:
    """Lets `package` be imported from FOLDER, with empty modules where it imports what is `unused`.

    Args:
      package: entered by its path alone.
      unused: modules that the model's file imports for the sake of other classes.
    """
    if not (FOLDER / package).is_dir():
        raise FileNotFoundError(
            f"{package} is not in {FOLDER}; write: python -m pip install --no-deps "
            f"--target {FOLDER} -r tests/foreign_models.txt"
        )
    bare = types.ModuleType(package)
    bare.__path__ = [str(FOLDER / package)]
    stand_ins = {package: bare} | {name: _Empty(name) for name in unused}
    kept = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules |= stand_ins
    sys.path.append(str(FOLDER))
    try:
        with _old_jax_spellings():
            yield
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _Empty(types.ModuleType):
    """A module in which every public name is a class without contents."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def _old_jax_spellings() -> Iterator[None]:
    """Tunix 0.1.7 uses names that JAX and Flax have deprecated; that is its business, not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"tunix\.")
        warnings.filterwarnings("ignore", r"'sharding' is deprecated", DeprecationWarning)
        yield
