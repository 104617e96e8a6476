"""What there is at a path, found by looking into it: a name proves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_jax.cli.failures import CliError, sentences
from lora_jax.cli.parsing import read_object
from lora_jax.cli.report import Reporter
from lora_jax.data.records import FORMATS, format_of
from lora_jax.formats.hf import PICKLES, pickle_error
from lora_jax.formats.sources import SourceError, fetch

KINDS = {
    "run": "the folder of a run",
    "adapter": "an adapter of lora_jax",
    "peft": "a PEFT adapter",
    "hf": "a model folder of transformers",
    "gguf": "a GGUF file",
    "safetensors": "a safetensors file",
    "data": "a file of records",
}
_EXPECTED = (
    "expected a GGUF file, a safetensors file, records "
    f"({', '.join(FORMATS)}), or the folder of a model, of a run or of an adapter."
)


class Found(NamedTuple):
    """What there is.

    Attributes:
      kind: one of `KINDS`.
      path: where.
    """

    kind: str
    path: Path

    def __str__(self) -> str:
        return f"{self.path} is {KINDS[self.kind]}"


def look(source: str, reporter: Reporter) -> Found:
    """Looks at a source, which is fetched first if need be, and says what it is.

    Args:
      source: a path, or anything else that `sources.fetch` takes.
      reporter: is told.

    Raises:
      CliError: if there is nothing, or nothing that is known.
    """
    with sentences(SourceError, OSError):
        path = fetch(source)
        kind = _folder(path) if path.is_dir() else _file(path)
    found = Found(kind, path)
    reporter.say(f"{found}.")
    reporter.event("found", kind=kind, path=path)
    return found


def _folder(path: Path) -> str:
    for name, kind in (("adapters.json", "adapter"), ("adapter_config.json", "peft")):
        if (path / name).is_file():
            return kind
    if (path / "config.json").is_file():
        options = read_object(path / "config.json")
        if options.get("command") == "sweep":
            run = path / "runs" / "000"
            raise CliError(f"{path} is a sweep's folder; write that of one of its runs, as {run}.")
        for name, kind in (("model_type", "hf"), ("model", "run")):
            if name in options:
                return kind
        raise CliError(
            f"{path / 'config.json'} is neither that of a model, which has a 'model_type', nor "
            "that of a run, which has a 'model'."
        )
    names = sorted(file.name for file in path.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise CliError(
            f"{path} has no config.json, without which no model is defined; write the path of one "
            "of its safetensors files to look at that."
        )
    if pickled := [name for name in names if name.endswith(PICKLES)]:
        raise CliError(pickle_error(str(path), pickled[0]))
    listed = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "nothing"
    raise CliError(f"{path} is no folder that is known: it has {listed}; {_EXPECTED}")


def _file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"GGUF"):
        return "gguf"
    if path.suffix == ".safetensors" or _is_safetensors(head, path.stat().st_size):
        return "safetensors"
    if format_of(path) in FORMATS:
        return "data"
    if path.name.endswith(PICKLES):
        raise CliError(pickle_error(str(path.parent), path.name))
    raise CliError(f"{path} is no file that is known: it begins with {head[:4]!r}; {_EXPECTED}")


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with a length that it has, and an object."""
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size
