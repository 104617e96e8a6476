"""Which attention a run computes: what was asked for, or the fastest that it can have."""

from __future__ import annotations

import jax

from lora_jax.cli.failures import CliError
from lora_jax.cli.options import DataOptions, ModelOptions
from lora_jax.cli.problem import Model
from lora_jax.cli.report import Reporter
from lora_jax.models.attention import fused_obstacles


def with_attention(
    model: Model, options: ModelOptions, rows: DataOptions, reporter: Reporter
) -> Model:
    """The model with the attention for rows of a batch; what `auto` is on a GPU is said.

    Raises:
      CliError: if it is to be cuDNN's, and cannot be.
    """
    asked, config = options.attention, model.decoder.config
    if asked == "xla" or (asked == "auto" and jax.default_backend() != "gpu"):
        return model
    obstacles = fused_obstacles(config, rows.length)
    if rows.pack:
        obstacles.append("sequences share rows")
    why = " and ".join(obstacles)
    if asked == "cudnn" and obstacles:
        raise CliError(f"--attention is cudnn, and {why}; write --attention auto.")
    chosen = "xla" if obstacles else "cudnn"
    if asked == "auto":
        reporter.say(f"--attention auto is {chosen} here{f', for {why}' if why else ''}.")
        reporter.event("attention", attention=chosen, obstacles=obstacles)
    return model.running(attention=chosen)
