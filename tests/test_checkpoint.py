"""Adapters on disk: bit for bit, whole or not at all, and for the base they belong to."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

KEY = jax.random.key(0)
RULES = [lj.LoraRule("kernel", rank=4, alpha=32, rslora=True, dropout=0.1)]


def base() -> Any:
    kernel = jnp.asarray(reference.weight((3, 64, 96)))
    params = {
        "layers": {"kernel": kernel, "scale": jnp.ones((3, 64))},
        "head": [jnp.ones((8, 4), jnp.bfloat16), None, "tanh"],
    }
    return lj.quantize(params, "kernel", layout="b i o")


def adapters(seed: int = 0) -> Any:
    start = lj.init_adapters(jax.random.key(seed), base(), RULES, train=["scale", "head/0"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), start)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # static fields included
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    saved = adapters()
    lj.save_adapters(tmp_path / "run", saved, rules=RULES)
    assert_equal(lj.load_adapters(tmp_path / "run", base()), saved)
    rules = json.loads((tmp_path / "run" / "adapters.json").read_text())["rules"]
    assert (rules[0]["pattern"], rules[0]["rank"], rules[0]["rslora"]) == ("kernel", 4, True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing else is left behind


def test_dtype_on_disk(tmp_path: Path) -> None:
    lj.save_adapters(tmp_path / "run", adapters(), dtype=jnp.bfloat16)
    loaded = lj.load_adapters(str(tmp_path / "run"), base())
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters()))


def test_a_sharded_tree_loads_on_one_device(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "x")
    saved = lj.shard(adapters(), mesh, [("kernel", spec)])
    lj.save_adapters(tmp_path / "run", saved)
    loaded = lj.load_adapters(tmp_path / "run", base())
    assert_equal(loaded, adapters())
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(loaded))


def test_saving_again_replaces(tmp_path: Path) -> None:
    lj.save_adapters(tmp_path / "run", adapters(0))
    lj.save_adapters(tmp_path / "run", adapters(1))
    assert_equal(lj.load_adapters(tmp_path / "run", base()), adapters(1))


@pytest.mark.parametrize("when", ["arrays", "record", "move"])
def test_an_interrupted_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    lj.save_adapters(tmp_path / "run", adapters(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if when == "arrays":
            import orbax.checkpoint as ocp

            broken.setattr(ocp.PyTreeCheckpointer, "save", full)
        elif when == "record":
            broken.setattr(Path, "write_text", full)
        else:
            original = Path.rename
            moved = lambda self, to: full() if "partial" in self.name else original(self, to)  # noqa: E731
            broken.setattr(Path, "rename", moved)
        with pytest.raises(OSError, match="No space left"):
            lj.save_adapters(tmp_path / "run", adapters(1))
    assert_equal(lj.load_adapters(tmp_path / "run", base()), adapters(0))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_base_is_refused(tmp_path: Path) -> None:
    lj.save_adapters(tmp_path / "run", adapters())
    other = base()
    other["layers"]["weight"] = other["layers"].pop("kernel")
    with pytest.raises(ValueError, match=r"holds adapters for layers/kernel, which this base"):
        lj.load_adapters(tmp_path / "run", other)
    narrow = base()
    narrow["layers"]["kernel"] = lj.quantize_array(jnp.ones((3, 64, 32)), layout="b i o")
    with pytest.raises(
        ValueError, match=r"the adapter of layers/kernel has .* but a weight of shape"
    ):
        lj.load_adapters(tmp_path / "run", narrow)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapters\.json; expected a folder"):
        lj.load_adapters(tmp_path / "nothing", base())
    with pytest.raises(ValueError, match="the tree holds no adapters"):
        lj.save_adapters(tmp_path / "run", {"w": None})
    lj.save_adapters(tmp_path / "run", adapters())
    record = tmp_path / "run" / "adapters.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        lj.load_adapters(tmp_path / "run", base())
    record.write_text(record.read_text()[:40])
    with pytest.raises(ValueError, match=r"adapters\.json is damaged"):
        lj.load_adapters(tmp_path / "run", base())


def test_two_leaves_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two leaves are both called 'a/b'"):
        lj.save_adapters(tmp_path / "run", {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
