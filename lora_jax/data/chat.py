r"""Conversations in the form that a model was trained on: its own Jinja chat template.

    messages   system, user, assistant, user, assistant
    text       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
    learned                                                     ------------------

Learned are the assistant's turns, each through the token that ends it. Where a turn stands in the
text is found in one of two ways. A template may say so itself, with `{% generation %}` around the
assistant's words. Of any other, the conversation is rendered up to each turn, once without it and
with what asks the model for it, once with it: the turn is what was added.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data import templates
from lora_jax.data.encoding import Encoded, SpecialTokens, Tokenizer, encodings, make_encoded
from lora_jax.data.records import Record
from lora_jax.data.tasks import Task
from lora_jax.files import shown

Message = Mapping[str, Any]
Span = tuple[int, int]

# Noncharacters, which Unicode keeps for a program's own use: they mark turns while rendering.
_BEGIN, _END = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class Chat(Task):
    """A conversation, of which the assistant's turns are learned.

    Attributes:
      template: the model's Jinja chat template. It writes all special tokens itself.
      messages: the column with the messages, a list of `{"role": ..., "content": ...}`, or the
        same as JSON.
      now: the time for templates that mention it; by default the present, which makes the data of
        tomorrow other than those of today.
    """

    template: str
    messages: str = "messages"
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        """Compiles the template, so that its errors come before any data."""
        _ = self._render

    @functools.cached_property
    def _render(self) -> Callable[..., str]:
        return _compiled(self.template, self.now)

    def messages_of(self, record: Record) -> list[Message]:
        """The messages of a record.

        Raises:
          ValueError: if they are no list of messages; the record's file and line are named.
        """
        messages = templates.value(record, self.messages)
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except (ValueError, RecursionError):
                messages = None
        if not isinstance(messages, list) or not all(
            isinstance(message, Mapping) and "role" in message for message in messages
        ):
            raise ValueError(
                f"{record.where}: the column {self.messages!r} holds no list of messages, expected "
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
            )
        return messages

    def prompt_of(self, record: Record) -> str:
        """See `Task`; the conversation up to the assistant's last word, and what asks for that.

        The names of special tokens are left out, for they are the tokenizer's.
        """
        return self._prompt(record, {"bos_token": "", "eos_token": ""})

    def _prompt(self, record: Record, names: Mapping[str, str]) -> str:
        messages = self.messages_of(record)
        before = messages[:-1] if _assistant_turns(messages[-1:]) else messages
        return _unmarked(self._rendered(record, before, names, add_generation_prompt=True))[0]

    def key_of(self, record: Record) -> str:
        """See `Task`; what is said before the assistant first speaks."""
        messages = self.messages_of(record)
        before = messages[: next(iter(_assistant_turns(messages)), None)]
        return "\n".join(str(message.get("content", "")) for message in before)

    def encode_batch(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[Encoded]:
        """See `Task`.

        Raises:
          ValueError: also if a conversation has no turn of the assistant, the template refuses it,
            or the template rewrites earlier turns without saying where they are.
        """
        names = _names(tokenizer, special)
        rendered = [self._with_turns(record, names) for record in records]
        end_tokens = _special_ids(tokenizer)
        encoded = encodings(tokenizer, (text for text, _ in rendered))
        return [
            make_encoded(encoding.ids, _learned(encoding, text, spans, end_tokens), number)
            for number, (encoding, (text, spans)) in enumerate(zip(encoded, rendered, strict=True))
        ]

    def encode_prompts(
        self, records: Sequence[Record], tokenizer: Tokenizer, special: SpecialTokens
    ) -> list[list[int]]:
        """See `Task`."""
        names = _names(tokenizer, special)
        texts = (self._prompt(record, names) for record in records)
        return [encoding.ids for encoding in encodings(tokenizer, texts)]

    def shorten(self, encoded: Encoded, length: int, special: SpecialTokens) -> Encoded:
        """See `Task`; from the end."""
        return make_encoded(encoded.tokens[:length], encoded.weights[:length], encoded.record)

    def _with_turns(self, record: Record, names: Mapping[str, str]) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the assistant speaks."""
        messages = self.messages_of(record)
        turns = _assistant_turns(messages)
        if not turns:
            raise ValueError(
                f"{record.where}: the assistant says nothing in this conversation, expected a "
                'message with "role": "assistant"'
            )
        # Nothing is learned from what follows the last turn.
        messages = messages[: turns[-1] + 1]
        text, spans = _unmarked(self._rendered(record, messages, names))
        if not spans:
            spans = [self._span(record, messages, turn, text, names) for turn in turns]
        return text, spans

    def _span(
        self,
        record: Record,
        messages: list[Message],
        turn: int,
        text: str,
        names: Mapping[str, str],
    ) -> Span:
        before = self._rendered(record, messages[:turn], names)
        asked = self._rendered(record, messages[:turn], names, add_generation_prompt=True)
        after = self._rendered(record, messages[: turn + 1], names)
        if not (text.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"{record.where}: the chat template writes message {turn} differently once others "
                "follow, so that the assistant's turns cannot be found; put {% generation %} and "
                "{% endgeneration %} around what it writes for the assistant, or write records "
                "with a single turn of the assistant, at the end"
            )
        # What asks for a turn may end in more than every turn begins with, such as "<think>".
        return max(len(before), _common_length(asked, text)), len(after)

    def _rendered(
        self,
        record: Record,
        messages: list[Message],
        names: Mapping[str, str],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        import jinja2

        try:
            return self._render(
                messages=messages, add_generation_prompt=add_generation_prompt, **names
            )
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            raise ValueError(
                f"{record.where}: the chat template refuses these messages ({error})"
            ) from None


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _names(tokenizer: Tokenizer, special: SpecialTokens) -> dict[str, str]:
    """The special tokens as templates call them; one that the model does without is nothing."""
    bos, eos = ("" if id is None else tokenizer.id_to_token(id) or "" for id in special)
    return {"bos_token": bos, "eos_token": eos}


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    added = tokenizer.get_added_tokens_decoder()
    return [number for number, token in added.items() if token.special]


def _learned(encoding: Any, text: str, spans: list[Span], end_tokens: list[int]) -> np.ndarray:
    """Which tokens begin in one of the spans.

    Templates put white space between turns, behind the token that ends one. The model is never
    asked for it.
    """
    starts = np.array([start for start, _ in encoding.offsets])
    learned = np.zeros(len(starts), bool)
    for start, end in spans:
        inside = np.flatnonzero((starts >= start) & (starts < end))
        for last in inside[np.isin(np.asarray(encoding.ids)[inside], end_tokens)][-1:]:
            if not text[encoding.offsets[last][1] : end].strip():
                inside = inside[inside <= last]
        learned[inside] = True
    return learned


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """A rendered text without the marks of a template's turns, and the turns between them."""
    pieces = re.split(f"([{_BEGIN}{_END}])", text)
    spans: list[Span] = []
    length = begin = 0
    for piece in pieces:
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            spans.append((begin, length))
        else:
            length += len(piece)
    return "".join(piece for piece in pieces if piece not in (_BEGIN, _END)), spans


def _compiled(template: str, now: datetime.datetime | None) -> Callable[..., str]:
    """The template as a function; chat templates expect just this environment.

    It is a sandbox, for a template comes with a model and may be anybody's code.

    Raises:
      ValueError: if it is no Jinja template.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: the assistant's words."""

        tags = {"generation"}  # noqa: RUF012 (an immutable one is refused)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = self.call_method("_mark", [])
            return jinja2.nodes.CallBlock(mark, [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes characters that mean something in HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        # Both so that nothing is computed before it is asked for, such as {{ "a" * 10**10 }}.
        optimized=False,
        finalize=jinja2.pass_context(lambda _, value: value),
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: (now or datetime.datetime.now()).strftime(
        form
    )
    try:
        return environment.from_string(template).render
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is malformed in line {error.lineno}: {error.message}"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # as Python's own parser refuses it
        raise ValueError(f"the chat template cannot be compiled: {shown(str(error))}") from None
