"""PEFT folders that peft saved, for the Llama of hf_folder.py, and how tests edit them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import safe_open

FOLDER = Path(__file__).parent / "golden" / "peft"
LOGITS = np.load(FOLDER / "logits.npz")
FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG, WEIGHTS = FILES
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj.lora_A.weight"
Q2 = "model.layers.2.self_attn.q_proj.lora_{}.weight"


def tensors(folder):
    with safe_open(folder / WEIGHTS, "numpy") as file:
        return {name.removeprefix(PREFIX): file.get_tensor(name) for name in list(file.keys())}


def same_bytes(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def copy(folder, variant="patterns"):
    for name in FILES:
        shutil.copyfile(FOLDER / variant / name, folder / name)
    return folder


def save(folder, named):
    prefixed = {PREFIX + name: np.ascontiguousarray(x) for name, x in named.items()}
    safetensors.numpy.save_file(prefixed, folder / WEIGHTS)


def edited(change):
    """Edits the tensors of a folder."""

    def edit(folder):
        named = tensors(folder)
        change(named)
        save(folder, named)

    return edit


def set_to(**options):
    """Edits the config of a folder."""

    def edit(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | options))

    return edit


def zeros_in_layer_2(named):
    for factor in "AB":
        named[Q2.format(factor)] = np.zeros_like(named[Q2.format(factor)])
