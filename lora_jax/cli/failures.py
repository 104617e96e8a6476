"""How a command ends when it does not reach its end: one sentence, and a status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CliError(Exception):
    """What came, what was expected, what to write; shown as it is, without a traceback."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


class Interrupted(KeyboardInterrupt):
    """Somebody asked the command to stop, by Ctrl-C or SIGTERM.

    Attributes:
      number: of the signal.
      outcome: what it leaves behind, and what to do about it; None as long as nobody has said.
    """

    def __init__(self, number: int, outcome: str | None = None):
        super().__init__("interrupted." if outcome is None else f"interrupted; {outcome}")
        self.number = number
        self.outcome = outcome

    @property
    def status(self) -> int:
        """What a shell reports for a process that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Both signals go to a handler in here, and to those from before afterwards."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Interrupted`, wherever the program then is."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    with _handled(interrupt):
        yield


class Stop:
    """Whether somebody has asked to stop, for code that can do so in good order.

    Attributes:
      number: of the first signal that came; None as long as none has.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """True as soon as a signal has come."""
        return self.number is not None

    def check(self) -> None:
        """Raises `Interrupted`, if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Collects the first signal instead of raising it; a second one interrupts at once.

    An exception could come between a step, which consumes the state before it, and the moment in
    which its result gets a name: then neither state could be saved.
    """
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        stop.check()
        stop.number = number

    with _handled(note):
        yield stop


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Leaves signals aside, for the moment in which the last thing is saved."""
    with _handled(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def on_interrupt(outcome: Callable[[], str]) -> Iterator[None]:
    """Says what an interruption in here leaves behind, where nothing further in has said it."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.outcome is not None:
            raise
        raise Interrupted(interrupted.number, outcome()) from None


@contextlib.contextmanager
def sentences(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors whose message is meant for the user into `CliError`."""
    try:
        yield
    except kinds as error:
        raise CliError(_one_sentence(error)) from error


def _one_sentence(error: Exception) -> str:
    """The message of an error; that of the system has the number of its error and quotes."""
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        return f"{error.filename} cannot be read: {os.strerror(error.errno)}."
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    return text if text.endswith(".") else f"{text}."


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turns a disk that is full, or a folder that cannot be written, into `CliError`.

    Args:
      path: what is written.
      remedy: what to do about it, a clause.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CliError(f"{path} could not be written: {reason}; {remedy}") from error
