"""`lora-jax generate`: text from a model and an adapter, as it comes."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import Positional, arg

from lora_jax import data
from lora_jax.cli.failures import CliError, Interrupted, sentences
from lora_jax.cli.options import Escaped, LogOptions, ModelOptions, at_least
from lora_jax.cli.parsing import given
from lora_jax.cli.problem import Model, load_adapted
from lora_jax.cli.report import Reporter
from lora_jax.generate import stream

QUESTION = "> "


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What to write on from, and with which adapter."""

    prompt: Positional[Annotated[Escaped | None, arg(metavar="PROMPT")]] = None
    """The beginning of the text; the standard input, if not given, or a chat on a terminal."""
    adapter: Path | None = None
    """The folder of a run, whose model it is then by default, or of a saved adapter."""
    chat: bool = False
    """Whether the prompt is what a user says, in the model's own template, and not plain text."""
    system: Escaped | None = None
    """What the model is told before a chat."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How each token is chosen."""

    max_tokens: int = 256
    """The most tokens to write, each time."""
    temperature: float = 0.0
    """0 for the likeliest token always; at 1 tokens are drawn as the model weighs them."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_tokens")
        at_least(self, 0, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}, expected a probability above 0, at most 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes on from a prompt, and shows the text as it comes; or holds a conversation.

        lora-jax generate "The capital of France is"
        lora-jax generate --adapter runs/mine --temperature 0.7 --top-p 0.9 < prompt.txt
        lora-jax generate --adapter runs/mine

    A conversation ends with an empty line; Ctrl-C ends an answer.
    """

    text: PromptOptions
    model: ModelOptions
    sampling: SamplingOptions
    output: LogOptions


def start(argv: Sequence[str]) -> Config:
    """The model of the adapter's run, if it has one."""
    model = ModelOptions.of_run(given(argv, "adapter"))
    return Config(PromptOptions(), model, SamplingOptions(), LogOptions())


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had.
      Interrupted: on Ctrl-C or SIGTERM.
    """
    options, reporter = config.text, Reporter(config.output.log)
    talking = options.prompt is None and sys.stdin.isatty()
    prompt = options.prompt
    if prompt is None and not talking:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt:
        raise CliError('the prompt is empty; write one, such as lora-jax generate "Once upon".')
    writer = Writer.load(config)
    if talking:
        writer.converse(options.system)
        return 0
    assert prompt is not None
    if options.chat or options.system is not None:
        tokens = writer.turn([*_system(options.system), _message("user", prompt)])
    else:
        tokens = writer.encode(prompt)
    pieces = []
    for piece in writer.write(tokens):
        pieces.append(piece)
        if not reporter.json:
            print(piece, end="", flush=True)
    if not reporter.json:
        print()
    reporter.event("generated", prompt=prompt, text="".join(pieces))
    return 0


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _system(content: str | None) -> list[dict[str, str]]:
    return [] if content is None else [_message("system", content)]


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes.

    Attributes:
      model: the model.
      adapters: its adapters, or None.
      sampling: how each token is chosen.
    """

    model: Model
    adapters: Any
    sampling: SamplingOptions

    @classmethod
    def load(cls, config: Config) -> Writer:
        """Reads the model and the adapter."""
        return cls(*load_adapted(config.model, config.text.adapter), config.sampling)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that begins a document."""
        bos = self.model.special.bos
        tokens = self.model.tokenizer.encode(text, add_special_tokens=False).ids
        return tokens if bos is None else [bos, *tokens]

    def turn(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant is to speak."""
        template = self.model.checkpoint.chat_template
        if template is None:
            raise CliError(
                "the model has no chat template; write a prompt without --chat and --system."
            )
        # A prompt is what comes before the assistant's last turn: here, the one to be written.
        record = data.Record({"messages": [*messages, _message("assistant", "")]}, "the chat")
        with sentences(ValueError):
            [tokens] = data.Chat(template).encode_prompts(
                [record], self.model.tokenizer, self.model.special
            )
        return tokens

    def write(self, tokens: Sequence[int], turn: int = 0) -> Iterator[str]:
        """What follows, in pieces of whole characters.

        Args:
          tokens: what it follows.
          turn: of a conversation; each is drawn for itself.
        """
        options, decode = self.sampling, self.model.tokenizer.decode
        with sentences(ValueError):
            found = stream(
                self.model.decoder,
                self.model.base,
                self.adapters,
                tokens,
                max_tokens=options.max_tokens,
                eos=self.model.checkpoint.stop,
                temperature=options.temperature,
                top_p=options.top_p,
                key=jax.random.fold_in(jax.random.key(options.seed), turn),
            )
        written: list[int] = []
        shown = 0
        for token in found:
            written.append(token)
            text = decode(written, skip_special_tokens=True)
            # A character of several tokens is replaced by a sign until its last one is there.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[shown:]
                shown = len(text)
        yield decode(written, skip_special_tokens=True)[shown:]

    def converse(self, system: str | None) -> None:
        """A conversation on the terminal: each answer is to all that was said before."""
        print("Write something; an empty line or Ctrl-D ends the conversation.")
        messages = _system(system)
        while True:
            try:
                question = input(QUESTION)
            except EOFError:
                print()
                return
            if not question.strip():
                return
            messages.append(_message("user", question))
            pieces: list[str] = []
            try:
                for piece in self.write(self.turn(messages), len(messages)):
                    pieces.append(piece)
                    print(piece, end="", flush=True)
            except Interrupted as interrupted:  # enough of this answer, not of the conversation
                if interrupted.number != signal.SIGINT:
                    raise
            print()
            messages.append(_message("assistant", "".join(pieces)))
