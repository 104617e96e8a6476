r"""Templates: text with the names of a record's columns in braces, as `str.format` writes it.

    template   {question}\nAnswer:
    record     {"question": "2+2?", "level": 1}
    text       2+2?\nAnswer:

A name is that of a column, and may go on into it: `{meta[year]}`.
"""

from __future__ import annotations

import re
import string
from typing import Any

from lora_jax.data.records import Record


def columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once, in the order of the text.

    Raises:
      ValueError: if it is no template.
    """
    try:
        parsed = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} is malformed ({error}); "
            "write {{ and }} for braces that are part of the text"
        ) from None
    names = [re.split(r"[.\[]", name)[0] for name in parsed]
    for name in names:
        if not name or name.isdigit():
            raise ValueError(
                f"the template {template!r} has {{{name}}}, expected the name of a column between "
                "braces; write {{ and }} for braces that are part of the text"
            )
    return tuple(dict.fromkeys(names))


def value(record: Record, column: str) -> Any:
    """What a record has in a column.

    Raises:
      ValueError: if it has no such column, or nothing in it.
    """
    if column not in record.fields:
        raise ValueError(
            f"{record.where}: no column {column!r}; the columns are {', '.join(record.fields)}"
        )
    if record.fields[column] is None:
        raise ValueError(f"{record.where}: the column {column!r} is null, expected a value")
    return record.fields[column]


def fill(template: str, record: Record) -> str:
    """The text that a template makes of a record.

    Raises:
      ValueError: if a column is missing or null, or cannot be written as the template wants it.
    """
    values = {column: value(record, column) for column in columns(template)}
    try:
        return template.format_map(values)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{record.where}: {template!r} cannot be filled ({type(error).__name__}: {error})"
        ) from None
