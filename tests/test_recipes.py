"""The recipes are short, run as they stand, and really learn; E2E's BLEU is what it should be."""

import ast
import collections
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax as lj

pytestmark = pytest.mark.compiled_quickly

FOLDER = Path(__file__).parents[1] / "experiments" / "recipes"

README = (FOLDER / "README.md").read_text("utf-8")

# What `main` returns: the held-out measure before training and after it, and what it shows besides.
LEARNED = {
    "dpo": lambda before, after: before < 0.6 and after > 0.97,
    "grpo": lambda before, after: before < 0.65 and after > 0.95,
    "distill": lambda before, after: after < before / 5,
    "multitask": lambda before, after, swapped: before < 0.2 and after > 0.97 and swapped < 0.1,
    "equinox_model": lambda before, after: before < 0.65 and after > 0.97,
}


def lines_of_code(path: Path) -> int:
    """Lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    source = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    blocks = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    strings = [node.body[0] for node in blocks if ast.get_docstring(node)]
    prose = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(number not in prose and not re.match(r"\s*(#|$)", line) for number, line in lines)


@pytest.mark.parametrize("name", LEARNED)
def test_recipe_learns(name, capsys):
    path = FOLDER / f"{name}.py"
    assert lines_of_code(path) <= 40
    result = runpy.run_path(str(path))["main"]()
    assert LEARNED[name](*map(float, result)), result
    assert capsys.readouterr().out


def test_every_recipe_is_tested_and_listed():
    recipes = {path.stem for path in FOLDER.glob("*.py")} - {"e2e_bleu"}
    assert recipes == set(LEARNED)
    assert all(f"]({name}.py)" in README for name in recipes)


def test_one_liners_of_the_readme(tmp_path):
    """They make the JSONL that the commands below them read, from files of the original form."""
    intents = {"train": [["book a flight", "book_flight"]], "val": [["hé", "greeting"]], "test": []}
    (tmp_path / "data_full.json").write_text(json.dumps({**intents, "oos_val": []}))
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / f"{name}.csv").write_text('mr,ref\n"name[A], area[B]","A, in B £"\n', "utf-8")
    for loop in re.findall(r"^\$ (for .*?; done)$", README, re.MULTILINE | re.DOTALL):
        script = re.sub(r"\n    curl.*", "", loop).replace("    python ", f"    {sys.executable} ")
        subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    read = lambda name: [tuple(r.fields.values()) for r in lj.data.read_records(tmp_path / name)]  # noqa: E731
    assert read("clinc_train.jsonl") == [("book a flight", "book_flight")]
    assert read("clinc_val.jsonl") == [("hé", "greeting")]
    assert read("e2e_testset_w_refs.jsonl") == [("name[A], area[B]", "A, in B £")]


# Every line of a prompt has the same output; the second prompt has one reference.
LINES = [
    ("a", "The cat sat on the mat .", "The cat is on the mat ."),
    ("b", "There is nothing here to eat .", "There is nothing to eat here ."),
    ("a", "The cat sat on the mat .", "there is a cat on the mat today ."),
]


@pytest.fixture(scope="module")
def e2e() -> dict:
    return runpy.run_path(str(FOLDER / "e2e_bleu.py"))


def rows() -> list[dict]:
    names = ("prompt", "generated", "reference")
    return [dict(zip(names, line, strict=True)) for line in LINES]


def bleu_by_hand(cased: bool) -> float:
    """BLEU-4 (Papineni et al., 2002) of LINES, whose tokens stand apart already."""
    read = lambda text: (text if cased else text.lower()).split()  # noqa: E731
    found: dict[str, tuple[list, list]] = {}
    for prompt, generated, reference in LINES:
        found.setdefault(prompt, (read(generated), []))[1].append(read(reference))

    def counts(tokens: list, n: int) -> collections.Counter:
        return collections.Counter(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))

    log_precision = 0.0
    for n in range(1, 5):
        right = total = 0
        for tokens, references in found.values():
            most = counts([], n)
            for reference in references:
                most |= counts(reference, n)
            right += (counts(tokens, n) & most).total()
            total += counts(tokens, n).total()
        log_precision += math.log(right / total) / 4
    length = sum(len(tokens) for tokens, _ in found.values())
    # Of the references, the one whose length is closest counts; the shorter of two.
    closest = sum(
        min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
        for tokens, references in found.values()
    )
    return 100 * math.exp(min(0, 1 - closest / length) + log_precision)


def test_references_are_grouped_by_prompt(e2e):
    assert e2e["texts"](rows()) == [
        (LINES[0][1], [LINES[0][2], LINES[2][2]]),
        (LINES[1][1], [LINES[1][2]]),
    ]


@pytest.mark.parametrize("cased", [True, False])
def test_bleu_is_that_of_the_paper(e2e, cased):
    actual = e2e["bleu"](e2e["texts"](rows()), lowercase=not cased)
    assert actual == pytest.approx(bleu_by_hand(cased), abs=1e-9)


def test_bleu_of_a_file(e2e, tmp_path, capsys):
    path = tmp_path / "generated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    e2e["main"](path)
    printed = capsys.readouterr().out
    assert "2 texts, 3 references" in printed
    assert f"{bleu_by_hand(cased=False):.2f}" in printed


def test_sampled_outputs_are_refused(e2e):
    row = {**rows()[0], "generated": "The cat ."}
    with pytest.raises(ValueError, match="two outputs"):
        e2e["texts"]([*rows(), row])
