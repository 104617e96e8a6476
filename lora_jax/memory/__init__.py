"""Memory of a training step, by category, before anything is lowered.

>>> from lora_jax.models.shapes import SHAPES
>>> setup = lj.memory.Setup(SHAPES["llama-3-8b"], batch=4, remat="products")
>>> print(lj.memory.predict(setup))
>>> lj.memory.fitting(setup, 24 * 2**30)  # the same step as it fits in 24 GiB
"""

from lora_jax.memory.choice import auto_remat, device_bytes, fitting, refusal
from lora_jax.memory.prediction import Memory, predict
from lora_jax.memory.quoted import QUOTED, Quoted
from lora_jax.memory.setup import POLICIES, Setup, Shape
from lora_jax.memory.step import Moment
from lora_jax.memory.trees import State, Weight, state, weights

__all__ = [
    "POLICIES",
    "QUOTED",
    "Memory",
    "Moment",
    "Quoted",
    "Setup",
    "Shape",
    "State",
    "Weight",
    "auto_remat",
    "device_bytes",
    "fitting",
    "predict",
    "refusal",
    "state",
    "weights",
]
