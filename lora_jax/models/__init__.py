"""Models to adapt: ordinary Flax modules that know nothing of LoRA."""
