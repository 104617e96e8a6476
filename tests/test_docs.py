"""The documentation is right: its code runs, its errors exist, its commands are understood.

A page's Python blocks are run in order, in one namespace and an empty folder; what stands after
`>>>` is compared with the output below it. What a block needs and no reader wants to see stands in
an HTML comment that opens with `<!-- python`.
"""

import ast
import doctest
import importlib
import re
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest

from lora_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"^(?P<indent> *)(?:```(?P<kind>python|pycon)[^\n]*\n(?P<shown>.*?)^ *```"
    r"|<!-- python\n(?P<hidden>.*?)^ *-->)",
    re.MULTILINE | re.DOTALL,
)
TRACKERS = ("tensorboardX", "wandb")  # shown, and not installed for tests
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(path: Path) -> int:
    """Runs a page's blocks; returns how many there were."""
    text, namespace = path.read_text(), {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        group = "hidden" if block["hidden"] is not None else "shown"
        line = text.count("\n", 0, block.start(group))
        code = textwrap.dedent(block[group])
        if block["kind"] == "pycon":
            example = doctest.DocTestParser().get_doctest(code, {}, path.name, str(path), line)
            example.globs = namespace
            failed, _ = doctest.DocTestRunner(optionflags=DOCTEST_OPTIONS).run(
                example, clear_globs=False
            )
            assert not failed, f"{path.name}:{line}"
        else:
            exec(compile("\n" * line + code, str(path), "exec"), namespace)
    return len(blocks)


@pytest.mark.compiled_quickly
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT / "docs").as_posix())
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    run_page(path)


def sentences() -> list[str]:
    """The errors that errors.md explains, as they stand there."""
    text = (ROOT / "docs" / "errors.md").read_text()
    terms = re.findall(r"^(`.*)\n:   ", text, re.MULTILINE)
    return [sentence for term in terms for sentence in re.findall(r"`([^`]+)`", term)]


def literal(node: ast.AST) -> str:
    """A string of the source, with … where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return "…"


def pattern(sentence: str) -> re.Pattern:
    return re.compile(".+?".join(map(re.escape, sentence.strip("…").split("…"))))


@pytest.fixture(scope="module")
def strings_of_the_source() -> str:
    files = sorted((ROOT / "lora_jax").rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return "\n".join(" ".join(literal(x).split()) for x in nodes if isinstance(x, kinds))


@pytest.mark.parametrize("sentence", sentences())
def test_errors_are_the_library_s(sentence, strings_of_the_source):
    assert pattern(sentence).search(strings_of_the_source)


# Rooms whose errors are all their own; those of files and commands often pass on somebody else's.
EXPLAINED = (
    "core",
    "data",
    "generate.py",
    "optim.py",
    "checkpoint.py",
    "sharding.py",
    "sweep",
    "train",
)


@pytest.mark.parametrize("room", EXPLAINED)
def test_every_error_is_explained(room):
    known = [pattern(sentence) for sentence in sentences()]
    path = ROOT / "lora_jax" / room
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name("ValueError"), args=[argument])):
                    message = " ".join(literal(argument).split())
                    explained = any(one.search(message) for one in known)
                    assert explained, f"explain in docs/errors.md: {message} ({file.name})"


PUBLIC = (
    "lora_jax",
    "lora_jax.data",
    "lora_jax.train",
    "lora_jax.sweep",
    "lora_jax.formats",
    "lora_jax.models.decoder",
)


@pytest.mark.parametrize("module", PUBLIC)
def test_api_lists_every_public_name(module):
    shown = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    names = importlib.import_module(module).__all__
    missing = [name for name in names if not re.search(rf"[.\[ ]{name}\b", shown)]
    assert not missing


WITH_COMMANDS = [*PAGES, ROOT / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]
COMMAND = re.compile(r"^\$ lora-jax (\w+)((?:.*\\\n)*.*)", re.MULTILINE)


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_understood(path, capsys):
    for command, arguments in COMMAND.findall(path.read_text()):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        options = set(re.findall(r"(?<=\s)--[a-z-]+", arguments))
        assert options <= known, f"lora-jax {command}"
