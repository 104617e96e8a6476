"""Makes peft/: adapters that peft saved for the Llama of tiny_llama.npz, and what they compute.

    python tests/golden/make_peft.py

Needs the `interop` extra; made with peft 0.21.2, transformers 5.23.0 and torch 2.13.0.

    peft/<variant>/adapter_config.json, adapter_model.safetensors    as save_pretrained left them
    peft/logits.npz: <variant>   float32 [12, V], of the first row of tiny_llama.npz's tokens
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "tiny_llama.npz")
VARIANTS = {
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 1},
        "alpha_pattern": {r"mlp\.\w+": 5},
    },
    "embedding": {
        "target_modules": r"model\.embed_tokens|.*\.o_proj",
        "modules_to_save": ["norm"],
        "lora_dropout": 0.125,
    },
}


def build() -> LlamaForCausalLM:
    config = json.loads(str(GOLDEN["config"]))
    model = LlamaForCausalLM(LlamaConfig(**config | {"dtype": "float32"})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(GOLDEN[f"weight/{name}"]))
    return model


def main() -> None:
    logits = {}
    for number, (variant, options) in enumerate(VARIANTS.items()):
        torch.manual_seed(number)
        config = LoraConfig(
            r=2, lora_alpha=3, init_lora_weights=False, task_type="CAUSAL_LM", **options
        )
        model = get_peft_model(build(), config).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad and "modules_to_save" in name:
                    value += 0.1 * torch.randn(value.shape)
            output = model(torch.from_numpy(GOLDEN["tokens"][:1])).logits
        logits[variant] = output[0].numpy()
        model.save_pretrained(HERE / "peft" / variant)
        (HERE / "peft" / variant / "README.md").unlink()
    np.savez_compressed(HERE / "peft" / "logits.npz", **logits)


if __name__ == "__main__":
    main()
