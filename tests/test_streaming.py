"""Models that go from one set of files into another without ever being in memory."""

from __future__ import annotations

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from family_cases import CASES, write_family
from hf_folder import GOLDEN, build_tokenizer, tensors, write_folder
from tiny_model import write_model

import lora_jax as lj
from lora_jax.cli import convert, main
from lora_jax.core.tree import map_leaves
from lora_jax.formats import Checkpoint, Quantization, SpecialTokens, read_model, tensor_file
from lora_jax.formats.bitsandbytes_folder import write_bitsandbytes
from lora_jax.formats.checkpoint import Reading, Tensor, assemble
from lora_jax.formats.hf import naming
from lora_jax.formats.hf_write import write_hf
from lora_jax.formats.peft import write_peft
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import by_layout, parameter_shapes

pytestmark = pytest.mark.compiled_quickly

KERNELS = "(q|down)_proj/kernel"


class Held:
    """Counts the bytes of arrays that somebody still holds.

    Attributes:
      most: at a time.
      handed: how many arrays there were.
    """

    def __init__(self):
        self.now = self.most = self.handed = 0

    def out(self, values: np.ndarray) -> np.ndarray:
        """The values in an array that is counted until it is gone, as are all views of it."""
        values = np.array(values)
        assert values.base is None
        self.now += values.nbytes
        self.handed += 1
        self.most = max(self.most, self.now)
        weakref.finalize(values, self._gone, values.nbytes)
        return values

    def _gone(self, size: int) -> None:
        self.now -= size


def adapters_of(shapes):
    """Of some kernels, as after some training."""
    rules = [
        lj.LoraRule(pattern, rank=2, layout=layout)
        for layout, pattern in by_layout(KERNELS, shapes).items()
    ]
    return reference.randomized(lj.init_adapters(jax.random.key(0), shapes, rules))


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "scan_layers", "quantize"),
    [
        ("qwen3_moe", True, None),
        ("qwen3_moe", False, Quantization(KERNELS, block_size=32, flat=True)),
        ("gguf", True, None),
        ("bitsandbytes", True, None),
    ],
    ids=["folder", "folder, unrolled, in 4 bits", "file", "folder of 4 bits"],
)
def test_what_is_written_is_the_same(tmp_path, source, scan_layers, quantize):
    """Byte for byte, with adapters merged and without, of bfloat16 and of 4 bits."""
    if source == "gguf":
        path = write_model(tmp_path / "model.gguf", kind="Q4_1")
    elif source == "bitsandbytes":
        dense = write_folder(tmp_path / "dense")
        checkpoint = read_model(dense, quantize=Quantization("down_proj/kernel", flat=True))
        write_bitsandbytes(path := tmp_path / "model", checkpoint)
    else:
        path = write_family(tmp_path / "model", CASES[source] | {"num_hidden_layers": 2})
    options = {"scan_layers": scan_layers, "quantize": quantize, "dtype": jnp.bfloat16}
    models = {lazy: read_model(path, lazy=lazy, **options) for lazy in (True, False)}
    adapters = adapters_of(parameter_shapes(models[True].config))
    for given, shard_size in ((None, 10**9), (adapters, 20_000)):
        written = []
        for lazy, checkpoint in models.items():
            folder = tmp_path / f"{lazy}"
            write_hf(folder, checkpoint, given, dtype=np.float32, shard_size=shard_size)
            written.append(files_of(folder))
        assert written[0] == written[1]


@pytest.mark.parametrize("adapted", [False, True], ids=["as it is", "merged"])
def test_one_tensor_is_held_at_a_time(tmp_path, adapted):
    config = DecoderConfig(
        vocab_size=96, dim=16, mlp_dim=24, num_layers=5, num_heads=2, num_kv_heads=2, head_dim=8
    )
    held, names = Held(), naming(config)
    shapes = parameter_shapes(config)
    sizes = {name: place.shape(shapes) for name, place in names.places(config, shapes).items()}
    found = [
        Tensor(name, size, lambda size=size: held.out(np.ones(size, np.float32)))
        for name, size in sizes.items()
    ]
    config, params = assemble(config, names, found, scan_layers=True, reading=Reading(lazy=True))
    assert held.handed == 0
    checkpoint = Checkpoint(
        config,
        params,
        build_tokenizer(adds_bos=False),
        SpecialTokens(None, 1),
        (1,),
        None,
        "",
        "",
        {},
    )
    write_hf(tmp_path / "written", checkpoint, adapters_of(shapes) if adapted else None)
    assert held.handed == len(sizes)
    assert held.most == 4 * 96 * 16  # the embedding; all of them are nine times as much


def test_convert_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Of a folder, and with an adapter for it: nothing is read before something is written."""
    source = write_folder(tmp_path / "source", shards=2)
    adapters = adapters_of(parameter_shapes(read_model(source, lazy=True).config))
    write_peft(tmp_path / "adapter", adapters, base_model=str(source))
    read = tensor_file.StoredTensor.read
    for argv in ([str(source)], [str(tmp_path / "adapter"), "--base", "nf4"]):
        held = Held()

        def write(*args, **options):
            assert held.handed == 0  # noqa: B023
            write_hf(*args, **options)

        def counted(tensor):
            of_model = tensor.file.parent == source
            return held.out(read(tensor)) if of_model else read(tensor)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(convert, "write_hf", write)
            patch.setattr(tensor_file.StoredTensor, "read", counted)
            out = [*argv[:1], str(tmp_path / "out"), *argv[1:], "--log", "quiet"]
            assert main(["convert", *out]) == 0
        assert held.handed == len(tensors())
        assert held.most == max(x.nbytes for x in tensors().values())


def test_files_that_are_gone_when_their_turn_comes(tmp_path):
    source = write_folder(tmp_path / "source", shards=2)
    checkpoint = read_model(source, lazy=True)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read any more: .*model-00002"):
        write_hf(tmp_path / "written", checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_model_takes_its_own_place(tmp_path):
    """Nothing is replaced before all of it has been read."""
    source = write_folder(tmp_path / "source")
    assert main(["convert", str(source), str(source), "--dtype", "bfloat16", "--log", "quiet"]) == 0
    found = read_model(source).params["embed"]["embedding"]
    embedding = GOLDEN["weight/model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, embedding.astype(jnp.bfloat16).astype(np.float32))


def test_one_part_tells_the_shapes_of_all(tmp_path):
    path = write_model(tmp_path / "model.gguf", kind="Q4_1")
    there, here = (read_model(path, packed=True, lazy=lazy).params for lazy in (False, True))
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), there)
    assert map_leaves(lambda _, leaf: leaf.abstract(), here) == expected
