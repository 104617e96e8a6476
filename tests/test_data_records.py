"""Records of every format are read alike, and what is wrong with a file is named by its line."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_jax.data import read_records

ROWS = [{"q": 'a "b",\nc', "n": "1"}, {"q": "é ö", "n": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'q,n\n"a ""b"",\nc",1\né ö,2\n'
TSV = 'q\tn\n"a ""b"",\nc"\t1\né ö\t2\n'


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", LINES, [":1", ":2"]),
        ("a.jsonl", LINES.replace("\n", "\n\n  \n"), [":1", ":4"]),
        ("a.jsonl", "\ufeff" + LINES, [":1", ":2"]),
        ("a.json", json.dumps(ROWS, indent=1), ["[0]", "[1]"]),
        ("a.json", LINES, [":1", ":2"]),
        ("a.csv", CSV, [":2", ":4"]),
        ("a.CSV", CSV, [":2", ":4"]),
        ("a.csv", CSV.replace("\n", "\r\n").replace(',\r\nc"', ',\nc"'), [":2", ":4"]),
        ("a.csv", "\ufeff" + CSV + "\n", [":2", ":4"]),
        ("a.tsv", TSV, [":2", ":4"]),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_format_reads_alike(tmp_path, name, content, where, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    records = read_records(path)
    assert [record.fields for record in records] == ROWS
    assert [record.where for record in records] == [f"{path}{place}" for place in where]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"q": "x", "n": 1, "list": [{"role": "user"}]}, {"q": None, "n": 2, "list": []}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [record.fields for record in read_records(path)] == rows
    assert [record.where for record in read_records(path)] == [f"{path}[0]", f"{path}[1]"]


def test_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\nOne\ntwo.\n \n\n  Three.")
    assert read_records(path) == [
        ({"text": "One\ntwo."}, f"{path}:3"),
        ({"text": "Three."}, f"{path}:7"),
    ]


def test_samples_of_openai_evals_get_a_text_and_a_label(tmp_path):
    path = tmp_path / "a.jsonl"
    sample = {"input": [{"role": "system", "content": "s"}, {"content": "Cat sat"}], "ideal": "1"}
    own = {"input": [{"content": "x"}], "ideal": "1", "text": "mine"}
    path.write_text(json.dumps(sample) + "\n" + json.dumps(own))
    first, second = read_records(path)
    assert first.fields == {**sample, "text": "Cat sat", "label": "1"}
    assert second.fields == own


DAMAGED = gzip.compress(LINES.encode() * 100)[:-9]
WRONG = {
    "not json": ("a.jsonl", '{"a": 1}\nnot json\n', ":2: not JSON (Expecting value at column 1)"),
    "cut off": ("a.jsonl", '{"a": 1}\n\n{"a": ', ":3: not JSON"),
    "a number": ("a.jsonl", "7\n", ":1: the value 7, expected an object"),
    "a list": ("a.jsonl", '{"a": 1}\n[1, 2]\n', ":2: a list, expected an object"),
    "latin-1": ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', ":2: byte 7 is not UTF-8"),
    "half an emoji": (
        "a.jsonl",
        '{"a": ""}\n{"a": "x\\ud83d"}',
        ":2: '\\ud83d' is half a character",
    ),
    "json in json": ("a.json", '[{"a": 1}, "b"]', "[1]: a string, expected an object"),
    "cut-off json": ("a.json", '[{"a": 1},\n {"a": ', ":2: not JSON"),
    "splits in one file": (
        "a.json",
        '{"train": [["a", "b"]], "test": []}',
        " holds an object with the keys train, test, expected a list of objects; "
        "write one object a line to a .jsonl file",
    ),
    "too few values": ("a.csv", "a,b\n1,2\n\n3\n", ":4: 1 values, expected 2"),
    "too many values": ("a.csv", 'a,b\n"1\n1",2\n3,4,5\n', ":4: 3 values, expected 2"),
    "an open quote": ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', ":3: malformed row"),
    "equal columns": ("a.csv", "a,b,a\n1,2,3\n", ":1: two columns have the same name"),
    "not parquet": ("a.parquet", "a,b\n1,2\n", " is not a Parquet file"),
    "damaged gzip": ("a.jsonl.gz", DAMAGED, " is a damaged gzip file behind line"),
    "no gzip": ("a.jsonl.gz", LINES, " is a damaged gzip file behind line 0"),
    "unknown": ("a.xlsx", "", " ends in '.xlsx', expected one of .jsonl, .json, .csv"),
    "no suffix": ("data", "", " ends in '', expected one of"),
    "empty": ("a.jsonl", "\n", " holds no records"),
    "only a header": ("a.csv", "a,b\n", " holds no records"),
    "an empty list": ("a.json", "[]", " holds no records"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}{sentence}')}") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_libraries_are_imported_when_they_are_used():
    code = "import sys, lora_jax.data; print({'grain', 'jinja2', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "a.jsonl")
