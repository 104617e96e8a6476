"""`hf:` sources, with the hub's real client and a small server in place of the hub."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hf_folder import GOLDEN, write_folder
from hub_server import COMMIT, serve
from huggingface_hub import constants

from lora_jax.formats import read_model
from lora_jax.formats.sources import SourceError, fetch
from lora_jax.models.decoder import Decoder

pytestmark = pytest.mark.compiled_quickly

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("tiny"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def point_client_at(url, monkeypatch):
    """What HF_ENDPOINT does where it is set before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(files, monkeypatch):
    """The only hub that the client knows; it has one model, of 60 kB."""
    extras = {
        "README.md": b"#",
        "pytorch_model.bin": b"\x80",
        "onnx/model.onnx": b"1",
        "consolidated.safetensors": b"2",
    }
    with serve({"some/tiny": files | extras}) as hub:
        point_client_at(hub.url, monkeypatch)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return path


def test_a_model_is_fetched_once_and_read(hub, files, cache):
    folder = fetch("hf:some/tiny", progress=False)
    assert cache in folder.parents
    assert {path.name for path in folder.iterdir()} == set(files)  # and no pickle
    checkpoint = read_model("hf:some/tiny")
    assert checkpoint.name == "some/tiny"
    logits = Decoder(checkpoint.config).apply({"params": checkpoint.params}, GOLDEN["tokens"])
    np.testing.assert_allclose(logits, GOLDEN["logits"], atol=1e-4, rtol=1e-4)
    assert sorted(name for name, _, _ in hub.sent) == sorted(files)


def test_a_revision_may_be_named(hub):
    by_commit = fetch(f"hf:some/tiny@{COMMIT}", progress=False)
    assert by_commit.name == COMMIT
    assert fetch("hf:some/tiny@main", progress=False) == by_commit
    assert sum(name == WEIGHTS for name, _, _ in hub.sent) == 1


def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch):
    folder = fetch("hf:some/tiny", progress=False)
    point_client_at("http://127.0.0.1:9", monkeypatch)
    assert fetch("hf:some/tiny", progress=False) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf:some/tiny", progress=False) == folder


def test_a_connection_that_breaks_goes_on_from_there(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4_096)
    hub.cut[WEIGHTS] = 30_000
    folder = fetch("hf:some/tiny", progress=False)
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    starts = [start for name, start, _ in hub.sent if name == WEIGHTS]
    assert len(starts) > 2
    assert starts == sorted(set(starts))


def test_files_that_have_arrived_are_not_fetched_again(hub, monkeypatch):
    hub.cut[WEIGHTS] = 0
    with pytest.raises(SourceError, match="could not fetch hf:some/tiny"):
        fetch("hf:some/tiny", progress=False)
    del hub.cut[WEIGHTS]
    fetch("hf:some/tiny", progress=False)
    assert sum(name == "config.json" for name, _, _ in hub.sent) == 1


def test_a_damaged_download_is_removed(hub, files):
    hub.damaged = (WEIGHTS,)
    with pytest.raises(SourceError, match=f"{WEIGHTS} of hf:some/tiny arrived broken: its sha256"):
        fetch("hf:some/tiny", progress=False)
    hub.damaged = ()
    assert (fetch("hf:some/tiny", progress=False) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_pickles_are_refused_with_what_to_do(hub, files):
    pickled = {name: body for name, body in files.items() if name != WEIGHTS}
    hub.repositories["some/pickle"] = pickled | {"pytorch_model.bin": b"\x80"}
    with pytest.raises(SourceError, match=r"hf:some/pickle has its weights in a pickle") as caught:
        fetch("hf:some/pickle", progress=False)
    assert "save_pretrained" in str(caught.value)
    assert "pytorch_model.bin" not in [name for name, _, _ in hub.sent]


def gated(hub, monkeypatch):
    hub.gated = True


def unreachable(hub, monkeypatch):
    point_client_at("http://127.0.0.1:9", monkeypatch)


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def full(hub, monkeypatch):
    def write(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", write)


@pytest.mark.parametrize(
    ("source", "change", "sentence"),
    [
        ("hf:some/other", None, "has no model 'some/other', or shows it to others only"),
        ("hf:some/tiny@v2", None, "some/tiny has no revision 'v2'; see http://127.0.0.1"),
        ("hf:some/tiny", gated, "is given only to those who have accepted its terms"),
        ("hf:some/tiny", unreachable, "could not fetch hf:some/tiny: http://127.0.0.1:9 cannot be"),
        ("hf:some/tiny", offline, "HF_HUB_OFFLINE must not be set"),
        ("hf:some/tiny", full, "No space left on device; make room there, or set HF_HOME"),
        ("hf:some/ti--ny", None, "is no name that the hub could have"),
        ("hf:some/empty", None, "holds no model in safetensors; it has README.md"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(hub, monkeypatch, source, change, sentence):
    hub.repositories["some/empty"] = {"README.md": b"#"}
    if change is not None:
        change(hub, monkeypatch)
    with pytest.raises(SourceError, match=re.escape(sentence)) as caught:
        fetch(source, progress=False)
    assert "\n" not in str(caught.value)


def test_ctrl_c_says_that_it_can_go_on(hub, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt, match="hf:some/tiny; files that are whole are kept"):
        fetch("hf:some/tiny")


def test_progress_is_shown_on_stderr_alone_and_only_if_wanted(hub, capfd):
    fetch("hf:some/tiny", progress=False)
    assert capfd.readouterr() == ("", "")
    hub.repositories["some/twin"] = hub.repositories["some/tiny"]
    fetch("hf:some/twin")
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err != ""


def test_the_settings_of_the_environment_are_honoured(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    code = "from lora_jax.formats.sources import fetch; print(fetch('hf:some/tiny'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / WEIGHTS).is_file()
