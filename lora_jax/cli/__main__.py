"""`python -m lora_jax.cli`, for where the `lora-jax` script is not on the path."""

import sys

from lora_jax.cli import main

sys.exit(main())
