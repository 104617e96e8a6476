"""Records, the rows of a file, whatever the format: JSON lines, JSON, CSV, Parquet, plain text.

A record remembers where it stood, so that whoever finds fault with it later can name the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_jax.files import DEEPEST, MOST, is_bomb, is_flat, plain, shown

_LONGEST_LINE = 2**24  # bytes
_LONGEST_LIST = 2**25  # bytes of a .json file, which is parsed as one value
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


class Record(NamedTuple):
    """One row of a file.

    Attributes:
      fields: the values by the names of their columns.
      where: file and line, `train.jsonl:17`; in files without lines the number from 0,
        `train.parquet[16]`. For messages.
    """

    fields: Mapping[str, Any]
    where: str


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a file of records; the suffix says the format, and `.gz` may follow it.

    `.jsonl`    an object a line.
    `.json`     a list of objects, or an object a line.
    `.csv`      a header and rows, comma-separated; `.tsv` likewise with tabs. Values are texts.
    `.parquet`  a row a record.
    `.txt`      a document a paragraph, as the field `text`; blank lines stand between paragraphs.

    A sample of OpenAI's evals (`input`, a list of messages, and `ideal`) gets the fields `text`,
    its last message, and `label` as well.

    Args:
      path: the file.

    Returns:
      The records in the order of the file; at least one.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if the format is not one of these, a line is malformed (named by its number), or
        there is no record at all.
    """
    path = Path(path)
    kind = format_of(path)
    if kind not in _READERS:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected one of {', '.join(_READERS)}, "
            "or one of these and .gz; convert the file or give it the name of what it is"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder, pipe or device; write the path of a file")
    records = list(_READERS[kind](path))
    if not records:
        raise ValueError(f"{path} holds no records, expected at least one")
    return records


def format_of(path: Path) -> str:
    """The suffix that says what a file is, such as `.csv`; of records it is one of `FORMATS`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1; a file that is not text is an error here."""
    number = unpacked = 0
    with _opened(path) as file:
        packed = path.stat().st_size
        try:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                unpacked += len(line)
                if len(line) == _LONGEST_LINE or is_bomb(packed, unpacked):
                    raise ValueError(
                        f"{path}:{number}: {len(line):,} bytes in a line and {unpacked:,} in all, "
                        f"out of a file of {packed:,}; expected lines below {_LONGEST_LINE:,} bytes"
                    )
                # Spreadsheets put a mark in front of the first line that is no part of the text.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _no_text(path, number, error.start) from None
        except _DAMAGED as error:
            raise _damaged(path, number, error) from None


def _whole(path: Path) -> str:
    """All of a file at once, which is not that long."""
    with _opened(path) as file:
        try:
            content = file.read(_LONGEST_LIST + 1)
        except _DAMAGED as error:
            raise _damaged(path, 0, error) from None
    if len(content) > _LONGEST_LIST:
        raise ValueError(
            f"{path} has more than {_LONGEST_LIST:,} bytes, all of which would be read as one "
            "value; write an object a line to a .jsonl file, for instance with jq -c '.[]'"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        begin = content.rfind(b"\n", 0, error.start) + 1
        raise _no_text(path, line + 1, error.start - begin) from None


def _no_text(path: Path, number: int, byte: int) -> ValueError:
    return ValueError(
        f"{path}:{number}: byte {byte} is not UTF-8; convert the file, for instance "
        "with iconv -f latin1 -t utf-8"
    )


def _damaged(path: Path, number: int, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is a damaged gzip file behind line {number} ({error}); fetch it again"
    )


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = _value(line, where)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); "
                    'expected an object a line, {"column": value, ...}'
                ) from None
            yield _record(value, where, line)


def _read_json(path: Path) -> Iterator[Record]:
    text = _whole(path)
    try:
        values = _value(text, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a whole value and then another one
            yield from _read_json_lines(path)
            return
        raise ValueError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})"
        ) from None
    if not isinstance(values, list):
        keys = f" with the keys {_listed(values)}" if isinstance(values, dict) else ""
        raise ValueError(
            f"{path} holds {_kind(values)}{keys}, expected a list of objects; "
            "write one object a line to a .jsonl file"
        )
    for index, value in enumerate(values):
        yield _record(value, f"{path}[{index}]", text)


def _value(text: str, where: str) -> Any:
    """A value of JSON.

    Raises:
      JSONDecodeError: if it is none.
      ValueError: if it is more than can be looked through.
    """
    problem = f"more than {MOST:,} lists and objects, or than {DEEPEST} levels of them"
    lists = text.count("[") + text.count("{")
    try:
        if lists <= MOST:
            value = json.loads(text)
            if lists < DEEPEST or is_flat(value):
                return value
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # an enormous number, or lists without an end
        problem = str(error)
    raise ValueError(f"{where}: JSON that is no record: {problem}")


def _record(value: Any, where: str, source: str) -> Record:
    """A record of a JSON value, `source` being the text that it is from."""
    if not isinstance(value, dict):
        raise ValueError(f'{where}: {_kind(value)}, expected an object, {{"column": value, ...}}')
    if "\\u" in source:  # texts cut in the middle of an emoji are common, and no text to others
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{where}: {half!r} is half a character; remove it or write the whole one"
            ) from None
    match value:
        case {"input": [*_, {"content": text}], "ideal": label} if "text" not in value:
            value = {**value, "text": text, "label": label}
    return Record(value, where)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return kinds.get(type(value), f"the value {shown(value)}")


def _listed(names: Mapping[str, Any], most: int = 5) -> str:
    return ", ".join([*map(plain, list(names)[:most]), *(["..."] if len(names) > most else [])])


def _read_separated(path: Path, delimiter: str) -> Iterator[Record]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1  # a quoted value may run over several lines: a row is called by its first
    try:
        for row in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not row:  # a blank line
                continue
            if header is None:
                header = row
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: two columns have the same name, in {shown(header)}")
            elif len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} values, expected {len(header)}, one for each column of "
                    f"the header ({_listed(dict.fromkeys(header))}); put quotes around values with "
                    f"a {delimiter!r} in them"
                )
            else:
                yield Record(dict(zip(header, row, strict=True)), where)
    except csv.Error as error:
        raise ValueError(f"{path}:{start}: malformed row ({plain(str(error))})") from None


def _read_csv(path: Path) -> Iterator[Record]:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_separated(path, "\t")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            cells, size = file.metadata.num_rows * file.metadata.num_columns, path.stat().st_size
            if is_bomb(size, 8 * cells):  # at least a pointer each
                raise ValueError(
                    f"{path} would unpack from {size:,} bytes to {cells:,} values, as no records do"
                )
            # In one go: the encoded texts are held in memory later on anyhow.
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a Parquet file ({reason[:200]})") from None
    for index, row in enumerate(rows):
        yield Record(row, f"{path}[{index}]")


def _read_paragraphs(path: Path) -> Iterator[Record]:
    paragraph: list[str] = []
    start = 0
    for number, line in _lines(path):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Record({"text": "".join(paragraph).strip()}, f"{path}:{start}")
            paragraph = []
    if paragraph:
        yield Record({"text": "".join(paragraph).strip()}, f"{path}:{start}")


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
FORMATS = tuple(_READERS)
