"""How a command ends when it does not reach its end: one sentence, and a status."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CliError(Exception):
    """What came, what was expected, what to write; shown as it is, without a traceback."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


class Interrupted(KeyboardInterrupt):
    """Somebody asked the command to stop, by Ctrl-C or SIGTERM."""

    def __init__(self, number: int, sentence: str = "interrupted."):
        super().__init__(sentence)
        self.number = number

    @property
    def status(self) -> int:
        """What a shell reports for a process that a signal ended."""
        return 128 + self.number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Interrupted`, wherever the program then is."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def on_interrupt(outcome: str) -> Iterator[None]:
    """Says what an interruption in here leaves behind."""
    try:
        yield
    except Interrupted as interrupted:
        raise Interrupted(interrupted.number, f"interrupted; {outcome}.") from None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Leaves signals aside, for the moment in which the last thing is saved."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sentences(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors whose message is meant for the user into `CliError`."""
    try:
        yield
    except kinds as error:
        raise CliError(str(error)) from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a disk that is full, or a folder that cannot be written, into `CliError`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CliError(
            f"{folder} could not be written: {reason}; what was saved there before is still "
            "there. Make room, or write --out with a folder on another disk."
        ) from error
