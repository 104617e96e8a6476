"""Model folders on Hugging Face's hub: `hf:owner/name`, or `hf:owner/name@revision`.

What a model folder consists of is downloaded, and nothing else: JSON, the chat template and
safetensors, never a pickle. The files lie where every other program of Hugging Face looks for them,
in the cache that `HF_HOME` names, so that a model is fetched once for all. A download that breaks
off is taken up where it ended, one that is stopped with the files that are whole, and a model in
the cache needs no network. The library's own settings are honoured: `HF_ENDPOINT` for a mirror,
`HF_TOKEN`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors, utils

from lora_jax.files import is_name, shown
from lora_jax.formats.cache import SourceError, sha256_of
from lora_jax.formats.hf import PICKLES, pickle_error, weight_files

# By name: a repository may hold the same weights once more in another format.
_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
]
_CLOCK = 2.0  # seconds by which a file system's time may lag behind the clock


class _Model(NamedTuple):
    """A model on the hub, in one of its revisions."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> _Model:
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^@]+))?", source, re.ASCII)
        if not match or not is_name(source):
            raise SourceError(
                f"{shown(source)} names no model on the hub; write hf:owner/name or "
                "hf:owner/name@revision, a revision being a branch, a tag or a commit."
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"hf:{self.repository}" + (f"@{self.revision}" if self.revision else "")


def fetch_model(source: str, *, progress: bool = True) -> Path:
    """The local folder of a model on the hub, downloaded as far as it is not in the cache.

    Args:
      source: `hf:owner/name` or `hf:owner/name@revision`.
      progress: Whether to show progress bars, on stderr.

    Returns:
      The folder, for `read_model`.

    Raises:
      SourceError: If the hub cannot be reached or does not give the model, it has no safetensors,
        or what arrived is not what the hub has. What arrived whole stays in the cache.
      KeyboardInterrupt: On Ctrl-C, with a sentence as its message.
    """
    model, started = _Model.parse(source), time.time()
    try:
        with _progress_bars(progress):
            path = huggingface_hub.snapshot_download(
                model.repository,
                revision=model.revision,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=constants.ENDPOINT,
                allow_patterns=_FILES,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted while fetching {model}; files that are whole are kept, run again "
            "for the rest."
        ) from None
    except Exception as error:  # of several libraries below, each with errors of its own
        raise _source_error(model, error) from error
    folder = Path(path)
    try:
        weights = weight_files(folder)
    except (OSError, ValueError) as error:
        raise SourceError(_without_weights(model, str(error))) from error
    _verify(model, weights, started)
    return folder


@contextlib.contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Switches the library's bars off, and on again if they were on."""
    if wanted or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _verify(model: _Model, weights: list[Path], started: float) -> None:
    """Compares what was downloaded just now with its hash, which names the file in the cache."""
    for file in weights:
        if not file.is_symlink():  # where the system has no links, no hash is kept
            continue
        blob = file.parent / os.readlink(file)
        downloaded = blob.stat().st_mtime >= started - _CLOCK
        if not downloaded or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            continue
        if (found := sha256_of(blob)) != blob.name:
            for path in (file, blob.resolve(), blob):  # a blob may be a link, to one of all models
                path.unlink(missing_ok=True)
            raise SourceError(
                f"{file.name} of {model} arrived broken: its sha256 is {found}, expected "
                f"{blob.name}; it was removed from the cache, run again."
            )


def _without_weights(model: _Model, reason: str) -> str:
    """Why a folder that was fetched has no weights: the hub's own list of files says more."""
    with contextlib.suppress(Exception):  # of no use without the network, and not needed
        api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
        names = sorted(api.list_repo_files(model.repository, revision=model.revision))
        if any(name in ("model.safetensors", "model.safetensors.index.json") for name in names):
            return f"{model} is incomplete in the cache: {reason}"
        if pickled := [name for name in names if name.endswith(PICKLES)]:
            return pickle_error(str(model), pickled[0])
        return f"{model} holds no model in safetensors; it has {', '.join(names) or 'nothing'}."
    return f"{model} is incomplete in the cache, and the hub cannot be reached: {reason}"


def _source_error(model: _Model, error: Exception) -> SourceError:
    """What an error of the library means to somebody who has never asked for it."""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    elsewhere = "or pass the local folder of the model itself"
    page = f"{hub}/{model.repository}"
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{model} is given only to those who have accepted its terms: do so at {page}, "
            f"then run `hf auth login` or set HF_TOKEN, {elsewhere}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{hub} has no model {model.repository!r}, or shows it to others only: check the name, "
            f"run `hf auth login` or set HF_TOKEN, {elsewhere}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{model.repository} has no revision {model.revision!r}; see {page}/tree/main for its "
            "branches, tags and commits."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return SourceError(
            f"{model} could not be written to {cache}: {error.strerror}; make room there, or set "
            "HF_HOME to a folder that can be written. What has arrived is kept."
        )
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{model} is no name that the hub could have: {_one_line(error)}.")
    return SourceError(
        f"could not fetch {model}: {hub} cannot be reached or gives no answer, and {cache} has not "
        "all of it. Connect to the network (HF_ENDPOINT may name a mirror, and HF_HUB_OFFLINE must "
        f"not be set), {elsewhere}. The hub's library says: {_one_line(error)}"
    )


def _one_line(error: Exception) -> str:
    """The first line of an error, which may have pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
