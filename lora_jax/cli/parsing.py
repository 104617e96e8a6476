"""From arguments and config files to a command's `Config`, and back to JSON.

A config is a frozen dataclass of groups, each a frozen dataclass of options. A file has the options
side by side, under the names that they have on the command line::

    {"model": "smollm2-135m-instruct", "rank": 8, "steps": 120, ...}
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from lora_jax import files
from lora_jax.cli.failures import CliError, sentences

ConfigT = TypeVar("ConfigT")

# Where a run is and how it reports is not what it is: a config file does not say it.
UNSAVED = ("out", "config", "resume", "log")
_WIDTH = 80  # characters of a value that is shown


def given(argv: Sequence[str], name: str) -> str | None:
    """The value of an option as it was typed, before anything else is known about the arguments."""
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        for number, word in enumerate(argv):
            if word == flag and number + 1 < len(argv):
                return argv[number + 1]
            if word.startswith(f"{flag}="):
                return word.removeprefix(f"{flag}=")
    return None


def parse(
    kind: type[ConfigT], argv: Sequence[str], *, prog: str, default: ConfigT | None
) -> ConfigT:
    """A config from arguments.

    Args:
      kind: of the config.
      argv: the arguments.
      prog: what is before them.
      default: what options have that are not given; if None, some must be.

    Returns:
      The config. For `--help`, tyro prints it and raises SystemExit.

    Raises:
      CliError: for an argument that is none.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=prog,
                args=list(argv),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise CliError(f"{_unboxed(said.getvalue())} (see {prog} --help).") from None


def _unboxed(text: str) -> str:
    """What tyro says in a box, as a sentence: without its advice, and without the options' help."""
    kept: list[str] = []
    for line in text.splitlines()[1:]:
        words = line[2:].rstrip(" │╯")  # a border and a space come first
        if words.startswith(("Argument helptext", "For full helptext")):
            break
        is_help = words.startswith(" " * 5)
        kept += [words.strip()] if words.strip("─- ") and not is_help else []
    sentence = re.sub(r"^Error parsing (?:[\w.-]+: (?=--))?", "", " ".join(kept))
    return sentence[:1].lower() + sentence[1:].rstrip(". ")


def to_json(config: Any) -> dict[str, Any]:
    """The options of a config as a file has them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values.update(to_json(value))
        elif field.name not in UNSAVED:
            values[field.name] = str(value) if isinstance(value, Path) else value
    return values


def from_file(kind: type[ConfigT], path: Path, *, part: bool = False) -> ConfigT:
    """Reads a config file.

    Args:
      kind: of the config.
      path: the file.
      part: whether the file may have options of other groups, too.

    Returns:
      The config; options that the file does not have are at their defaults.

    Raises:
      CliError: if there is no such file, it is no JSON object, an option is none of this command's,
        has a value that it cannot have, or is missing.
    """
    return from_values(kind, read_object(path), path, part=part)


def from_values(
    kind: type[ConfigT], values: Mapping[str, Any], path: Path, *, part: bool = False
) -> ConfigT:
    """A config from values as JSON has them, which stand in a file.

    Args:
      kind: of the config.
      values: the options by their names.
      path: where they stand.
      part: whether there may be options of other groups, too.

    Raises:
      CliError: as `from_file`.
    """
    fields = _options(typing.cast(type, kind))
    for name in values:
        if name not in fields and not part:
            near = difflib.get_close_matches(name, fields, 1)
            raise CliError(
                f"{path} has an option {files.shown(name)}, and there is none; "
                + (f"write {near[0]!r}." if near else "take it out.")
            )
    for name, hint in fields.items():
        if name in values and not _fits(values[name], hint):
            raise CliError(
                f"{path} has {json.dumps(values[name])[:_WIDTH]} for {name!r}, "
                f"expected {_described(hint)}."
            )
    with sentences(ValueError):
        try:
            return _build(kind, values)
        except TypeError as error:  # a required option is not there
            raise CliError(f"{path} is not a whole config: {error}.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CliError: if there is no such file, or no object in it.
    """
    with sentences(OSError, ValueError):
        return files.read_object(path)


def from_run(kind: type[ConfigT], folder: str | None) -> ConfigT | None:
    """A group of options as a run had them; None for a folder that is no run's, or no folder."""
    path = None if folder is None else Path(folder) / "config.json"
    return None if path is None or not path.is_file() else from_file(kind, path, part=True)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _options(kind: type) -> dict[str, Any]:
    """Every option of a config and its type."""
    found: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found.update(_options(typing.cast(type, hint)))
        else:
            found[name] = hint
    return found


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(hint, values)
        elif name in values:
            arguments[name] = _converted(values[name], hint)
    return kind(**arguments)


def _converted(value: Any, hint: Any) -> Any:
    """A value of JSON as Python has it."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in typing.get_args(hint):
        return Path(value)
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be an option's."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) < 1e300
    return isinstance(value, str) if hint is Path else isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(json.dumps, arguments))
    if origin is tuple:
        return f"a list, each {_described(arguments[0])}"
    names = {str: "a text", Path: "a path", int: "a whole number", float: "a number"}
    return {**names, bool: "true or false", type(None): "null"}.get(hint, str(hint))
