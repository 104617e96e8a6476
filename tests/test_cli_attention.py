"""Which attention a run computes: what stands in the way of the fused kernel, and what is said."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import finetune, one_sentence, write_files

from lora_jax.cli import main
from lora_jax.cli.attention import with_attention
from lora_jax.cli.failures import CliError
from lora_jax.cli.finetune import Config, start
from lora_jax.cli.options import DataOptions, ModelOptions
from lora_jax.cli.parsing import parse
from lora_jax.cli.problem import Model
from lora_jax.cli.report import Reporter
from lora_jax.cli.scoring import LabelScorer, make_scorer
from lora_jax.cli.training import Problem
from lora_jax.data import Classification
from lora_jax.models.attention import fused_obstacles
from lora_jax.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.compiled_quickly

CONFIG = DecoderConfig(
    vocab_size=64,
    dim=32,
    mlp_dim=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    dtype=jnp.bfloat16,
)
ROWS = DataOptions(data="book.txt", task="text", length=64, pack=False)


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with an H200, on which nothing is run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("lora_jax.models.attention.sees_ampere", lambda: True)


def chosen(asked, config=CONFIG, rows=ROWS, log="quiet"):
    model = Model(Decoder(config), None, None, "tiny")
    model = with_attention(model, ModelOptions(attention=asked), rows, Reporter(log))
    return model.decoder.config.attention


@pytest.mark.usefixtures("gpu")
def test_the_fused_kernel_where_nothing_is_in_its_way(capsys):
    assert chosen("auto", log="json") == "cudnn"
    event = json.loads(capsys.readouterr().out)
    assert event == {"event": "attention", "attention": "cudnn", "obstacles": []}
    assert chosen("auto", log="progress") == "cudnn"
    assert capsys.readouterr().out == "--attention auto is cudnn here.\n"
    assert chosen("cudnn", log="progress") == "cudnn"
    assert chosen("xla", log="progress") == "xla"
    assert not capsys.readouterr().out


OBSTACLES = {
    "activations are float32": {"dtype": jnp.float32},
    "heads are 136 wide": {"head_dim": 136},
    "heads are 12 wide": {"head_dim": 12},
    "products of queries and keys are capped": {"attention_cap": 50.0},
    "some layers see 63 tokens": {"window": 63, "windowed_layers": (1,)},
    "rows are of 63 tokens, an odd number": {"length": 63},
    "sequences share rows": {"pack": True},
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("sentence", "changes"), OBSTACLES.items(), ids=OBSTACLES)
def test_what_is_in_its_way(sentence, changes, capsys):
    of_rows = {name: changes[name] for name in ("length", "pack") if name in changes}
    rows = dataclasses.replace(ROWS, **of_rows)
    config = dataclasses.replace(CONFIG, **{k: x for k, x in changes.items() if k not in of_rows})
    assert chosen("auto", config, rows, "progress") == "xla"
    assert capsys.readouterr().out == f"--attention auto is xla here, for {sentence}.\n"
    with pytest.raises(CliError, match=f"--attention is cudnn, and {sentence}; write --attention"):
        chosen("cudnn", config, rows)


@pytest.mark.usefixtures("gpu")
def test_all_that_is_in_its_way_is_said(capsys):
    config = dataclasses.replace(CONFIG, dtype=jnp.float32)
    rows = dataclasses.replace(ROWS, pack=True)
    assert chosen("auto", config, rows, "progress") == "xla"
    assert "for activations are float32 and sequences share rows." in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_a_window_that_hides_nothing():
    config = dataclasses.replace(CONFIG, window=64, windowed_layers=(0,))
    assert fused_obstacles(config, 64) == []


def test_without_a_gpu_nothing_is_said(capsys):
    assert chosen("auto", log="progress") == "xla"
    assert not capsys.readouterr().out
    with pytest.raises(CliError, match="there is no NVIDIA GPU of compute capability 8"):
        chosen("cudnn")


def test_labels_are_read_without_it():
    """Behind a prompt in the cache, where no mask is causal."""
    model = Model(Decoder(dataclasses.replace(CONFIG, attention="cudnn")), None, None, "tiny")
    task = Classification("{text}", (" no", " yes"), "label")
    scorer = make_scorer(model, task, None, rows=2, length=8, pack=False)
    assert isinstance(scorer, LabelScorer)
    assert scorer.model.decoder.config.attention == "xla"


def test_a_run_is_the_same_whatever_computes_it(tmp_path, capsys):
    """So that a checkpoint of a run without the option goes on with it."""
    argv = finetune(**write_files(tmp_path), out=tmp_path / "run")
    config = parse(Config, argv[1:], prog="lora-jax finetune", default=start(argv[1:]))
    problem = Problem.load(config, Reporter("quiet"))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    identity = problem.identity()
    assert identity == dataclasses.replace(problem, config=other).identity()
    assert "attention" not in identity
    assert main([*argv, "--attention", "cudnn", "--log", "quiet"]) == 2
    assert "--attention is cudnn, and there is no NVIDIA GPU" in one_sentence(capsys.readouterr())
