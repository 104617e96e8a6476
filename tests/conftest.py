"""What all tests share: JAX on eight simulated CPU devices.

The devices are for sharding tests; everything else lands on device 0, as it would on a laptop.
"""

import os

# Set before JAX is imported, so that a machine with a GPU tests the same thing.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)
