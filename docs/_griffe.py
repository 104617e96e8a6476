"""Docstrings as Markdown: examples become code, which `>>>` would make quotations of."""

import itertools
import textwrap
from typing import Any

import griffe


def fenced(docstring: str) -> str:
    """The docstring with each block of lines that opens with `>>>` in a code fence."""
    lines: list[str] = []
    paragraphs = itertools.groupby(docstring.split("\n"), key=lambda line: bool(line.strip()))
    for _, paragraph in paragraphs:
        block = list(paragraph)
        if block[0].lstrip().startswith(">>> "):
            indent = block[0][: -len(block[0].lstrip())]
            block = [f"{indent}```pycon", *block, f"{indent}```"]
        lines += block
    return "\n".join(lines)


class Examples(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            cleaned = textwrap.dedent(obj.docstring.value)
            # "Example:" would be a box, "Examples:" is a section; "::" announces a figure,
            # which Markdown knows by its indentation.
            for old, new in (("\nExample:\n", "\nExamples:\n"), ("::\n\n", ":\n\n")):
                cleaned = cleaned.replace(old, new)
            obj.docstring.value = fenced(cleaned)
