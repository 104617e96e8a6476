r"""Regular expressions of adapter_config.json, matched in a time that the pattern cannot stretch.

`re` looks for a way through a pattern by trying one after the other, of which `(a+)+b` has 2^n.
Whether there is one needs no trying: from the set of positions where a part of the pattern may
begin follows that of those where it may end, and a set of positions is the bits of a number.

    pattern  .*q        text  aqbq
    begin    00001      at 0
    .*       11111      at any
    q        10100      behind either q; that behind the last is the end of the text

What has no such answer (references back to a group, possessive and atomic groups, flags) is no
pattern here; no adapter that was seen has any.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 2_000  # characters of a pattern
MOST_STEPS = 5_000  # of a match, at most; patterns that were seen take some hundred
_WIDTH = 40  # characters of a name, by which steps are counted beforehand

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda x: not x.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda x: not x.isspace(),
    op.CATEGORY_WORD: lambda x: x.isalnum() or x == "_",
    op.CATEGORY_NOT_WORD: lambda x: not (x.isalnum() or x == "_"),
}
_CHARACTERS = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_PLACES = (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING)
_BOUNDARIES = (op.AT_BOUNDARY, op.AT_NON_BOUNDARY)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_ASSERTIONS = (op.ASSERT, op.ASSERT_NOT)


def is_pattern(pattern: Any) -> bool:
    """Whether a value is a regular expression that can be matched here, in a moment."""
    return isinstance(pattern, str) and steps(pattern) <= MOST_STEPS


def steps(pattern: str) -> int:
    """How many steps it takes at most to compare a pattern with a name; too many, if it is none."""
    if _plain(pattern) is not None:
        return 1
    parsed = _parsed(pattern)
    return MOST_STEPS + 1 if parsed is None else _steps(parsed)


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern matches all of a text, as `re.fullmatch` has it."""
    return bool(_Match(text).ends(_parsed(pattern), 1) >> len(text))


def matches_ending(pattern: str, text: str) -> bool:
    """Whether a pattern matches all of a text, or all that is behind one of its dots."""
    if (plain := _plain(pattern)) is not None:
        return plain.match(text) is not None
    begins = 1 | _where(text, lambda x: x == ".") << 1
    return bool(_Match(text).ends(_parsed(pattern), begins) >> len(text))


@functools.lru_cache(1_200)  # as many as a config may have, and some
def _plain(pattern: str) -> re.Pattern[str] | None:
    """A pattern without repetitions, for which there is nothing to try."""
    if len(pattern) > _LONGEST or not re.fullmatch(r"[\w.]+", pattern):
        return None
    return re.compile(rf"(.*\.)?({pattern})$")


@functools.lru_cache(1_200)
def _parsed(pattern: str) -> Any:
    """The parts of a pattern; None if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about what may mean another thing one day
            parsed = parser.parse(pattern) if len(pattern) <= _LONGEST else None
        known = parsed is not None and parsed.state.flags == re.UNICODE and _are_known(parsed)
    except (re.error, RecursionError, OverflowError):
        return None
    return parsed if known else None


def _steps(parts: Iterable[Any]) -> int:
    """How many parts are looked at, for each position where that is done one by one."""
    count = 0
    for kind, about in parts:
        count += 1
        if kind is op.BRANCH:
            count += sum(map(_steps, about[1]))
        elif kind is op.SUBPATTERN:
            count += _steps(about[3])
        elif kind in _REPEATS:
            count += min(int(about[1]), _WIDTH) * _steps(about[2])
        elif kind in _ASSERTIONS:
            count += _WIDTH * _steps(about[1])
    return count


def _are_known(parts: Iterable[Any]) -> bool:
    """Whether all parts are of kinds that can be followed."""
    for kind, about in parts:
        if kind in _CHARACTERS:
            known = True
        elif kind is op.AT:
            known = about in _PLACES + _BOUNDARIES
        elif kind is op.BRANCH:
            known = all(map(_are_known, about[1]))
        elif kind is op.SUBPATTERN:
            known = not about[1] and not about[2] and _are_known(about[3])
        elif kind in _REPEATS:
            known = _are_known(about[2])
        elif kind in _ASSERTIONS:
            shortest, longest = about[1].getwidth()
            known = (about[0] > 0 or shortest == longest) and _are_known(about[1])
        else:
            known = False
        if not known:
            return False
    return True


def _where(text: str, fits: Callable[[str], bool]) -> int:
    """The positions of the characters that fit."""
    return sum(1 << k for k, character in enumerate(text) if fits(character))


def _bits(positions: int) -> Iterator[int]:
    while positions:
        lowest = positions & -positions
        yield lowest
        positions ^= lowest


def _fits(items: Iterable[Any], character: str) -> bool:
    """Whether a character is in brackets, which begin with NEGATE if it must not be."""
    negated = found = False
    for kind, about in items:
        if kind is op.NEGATE:
            negated = True
        elif kind is op.LITERAL:
            found |= ord(character) == about
        elif kind is op.RANGE:
            found |= about[0] <= ord(character) <= about[1]
        else:
            found |= _CATEGORIES[about](character)
    return found != negated


class _Match:
    """A text, and from where to where parts of a pattern match in it."""

    def __init__(self, text: str):
        self.text = text
        self.characters: dict[Any, int] = {}

    def ends(self, parts: Iterable[Any], begins: int) -> int:
        """Where a sequence of parts can end that begins at one of some positions."""
        for kind, about in parts:
            if not begins:
                return 0
            begins = self._end(kind, about, begins)
        return begins

    def _end(self, kind: Any, about: Any, begins: int) -> int:
        if kind in _CHARACTERS:
            return (begins & self._of(kind, about)) << 1
        if kind is op.SUBPATTERN:
            return self.ends(about[3], begins)
        if kind is op.BRANCH:
            ends = 0
            for branch in about[1]:
                ends |= self.ends(branch, begins)
            return ends
        if kind in _REPEATS:
            return self._repeated(begins, *about)
        if kind is op.AT:
            return begins & self._at(about)
        return self._asserted(begins, kind is op.ASSERT, *about)

    def _of(self, kind: Any, about: Any) -> int:
        """The positions of the characters that a part stands for."""
        key = kind, tuple(about) if kind is op.IN else about
        if key not in self.characters:
            fits: dict[Any, Callable[[str], bool]] = {
                op.LITERAL: lambda x: ord(x) == about,
                op.NOT_LITERAL: lambda x: ord(x) != about,
                op.ANY: lambda x: x != "\n",
                op.IN: lambda x: _fits(about, x),
            }
            self.characters[key] = _where(self.text, fits[kind])
        return self.characters[key]

    def _repeated(self, begins: int, least: int, most: int, parts: Any) -> int:
        # A way through more repetitions than there are characters goes nowhere in one of them.
        for _ in range(min(least, len(self.text) + 1)):
            begins = self.ends(parts, begins)
        ends = new = begins
        for _ in range(min(most - least, len(self.text) + 1)):
            new = self.ends(parts, new) & ~ends
            if not new:
                break
            ends |= new
        return ends

    def _at(self, place: Any) -> int:
        size = len(self.text)
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return 1
        if place is op.AT_END_STRING:
            return 1 << size
        if place is op.AT_END:
            return 1 << size | (1 << size - 1 if self.text.endswith("\n") else 0)
        words = _where(self.text, _CATEGORIES[op.CATEGORY_WORD])
        boundaries = words ^ words << 1
        return boundaries if place is op.AT_BOUNDARY else (2 << size) - 1 & ~boundaries

    def _asserted(self, begins: int, wanted: bool, direction: int, parts: Any) -> int:
        kept = 0
        for position in _bits(begins):
            if direction > 0:
                found = bool(self.ends(parts, position))
            else:
                before = position >> parts.getwidth()[0]
                found = bool(self.ends(parts, before) & position)
            kept |= position if found == wanted else 0
        return kept
