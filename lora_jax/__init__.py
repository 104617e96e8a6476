"""LoRA and QLoRA for any JAX model."""
