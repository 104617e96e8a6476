"""PEFT folders that cannot be read faithfully, and what says nothing and is passed over."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.numpy
from hf_folder import write_folder
from peft_folder import CONFIG, WEIGHTS, Q, copy, edited, save, set_to, zeros_in_layer_2

from lora_jax.formats.hf import read_hf
from lora_jax.formats.peft import read_peft


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The Llama that the golden adapters are for; its layers are scanned."""
    return read_hf(write_folder(tmp_path_factory.mktemp("model")))


def doubled(folder):
    """Writes a header that names its first tensor twice."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    entry = re.search(r'"base_model[^{]*\{[^}]*\}', header)[0]
    header = (header[:-1] + "," + entry + "}").encode()
    (folder / WEIGHTS).write_bytes(
        len(header).to_bytes(8, "little") + header + content[8 + length :]
    )


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


SCAN = "separate layers (scan_layers=False)"
REFUSED = [
    (without(CONFIG), FileNotFoundError, "has no adapter_config.json"),
    (without(WEIGHTS), FileNotFoundError, "lacks adapter_model.safetensors; it has adapter_config"),
    (pickled, ValueError, "in a pickle (adapter_model.bin) and not in safetensors"),
    (cut, ValueError, "adapter_model.safetensors is broken or ends too early"),
    (written(CONFIG, "{,}"), ValueError, "is no JSON"),
    (written(CONFIG, "[]"), ValueError, "holds a list, expected an object"),
    (set_to(peft_type="LOHA"), ValueError, "peft_type is 'LOHA'; only 'LORA' can be read"),
    (set_to(r=0), ValueError, "r is 0, expected a whole number of at least 1"),
    (set_to(r=True), ValueError, "r is True, expected a whole number"),
    (set_to(lora_alpha="8"), ValueError, "lora_alpha is '8', expected a number"),
    (set_to(lora_dropout=1), ValueError, "lora_dropout is 1, expected a probability below 1"),
    (set_to(target_modules="("), ValueError, "target_modules is '(', expected a list of names or"),
    (set_to(rank_pattern={"a": 0}), ValueError, "rank_pattern is {'a': 0}, expected ranks by"),
    (set_to(bias="all"), ValueError, 'bias = "all" cannot be honoured'),
    (set_to(use_dora=True), ValueError, "use_dora = true cannot be honoured"),
    (
        set_to(lora_bias=True, layer_replication=[[0, 2]]),
        ValueError,
        "layer_replication = [[0, 2]], lora_bias = true cannot be honoured",
    ),
    (set_to(some_method={"a": 1}), ValueError, 'some_method = {"a": 1} is not known here'),
    (set_to(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights is 'pissa_niter_4'"),
    (edited(lambda t: t.pop(Q)), ValueError, f"{Q} is missing"),
    (
        edited(lambda t: t.update({Q.replace("0", "1"): t[Q]})),
        ValueError,
        f"{Q.replace('0', '1')} is without a place in the base or the config",
    ),
    (
        edited(lambda t: t.update({Q: t[Q][:1]})),
        ValueError,
        f"{Q} ((1, 24), expected (2, 24)) is of another shape",
    ),
    (edited(lambda t: t.update({Q: t[Q].astype(np.int32)})), ValueError, "is stored as I32; only"),
    (
        edited(lambda t: t.update({Q: t[Q].astype(np.float16)})),
        ValueError,
        "layers/attn/q_proj/kernel are stored as float16, float32; write dtype=",
    ),
    (doubled, ValueError, "is there more than once"),
    (
        lambda folder: (
            save(folder, {})
            or safetensors.numpy.save_file(
                {"q_proj.lora_A.weight": np.ones((2, 2))}, folder / WEIGHTS
            )
        ),
        ValueError,
        "'q_proj.lora_A.weight' does not begin with 'base_model.model.'",
    ),
    (set_to(alpha_pattern={r"layers\.2.*": 5}), ValueError, SCAN),
    (edited(zeros_in_layer_2), ValueError, "some adapters of layers/attn/q_proj/kernel are zeros"),
]


@pytest.mark.parametrize(("break_it", "error", "sentence"), REFUSED)
def test_folders_that_cannot_be_read_faithfully(checkpoint, tmp_path, break_it, error, sentence):
    break_it(copy(tmp_path))
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        read_peft(tmp_path, checkpoint.params)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_is_no_folder(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_peft(tmp_path / "nowhere", checkpoint.params)


def test_what_says_nothing_is_passed_over(checkpoint, tmp_path):
    edit = set_to(
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        some_new_method=None,
        trainable_token_indices=[],
        loftq_config={"loftq_bits": 4},
    )
    edit(copy(tmp_path))
    read_peft(tmp_path, checkpoint.params)
