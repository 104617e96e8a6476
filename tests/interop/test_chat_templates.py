"""Chat templates say what transformers makes of them, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from chat_templates import TEMPLATES
from transformers import PreTrainedTokenizerFast

from lora_jax.data import Chat, Record, SpecialTokens, encode_prompts

USER = {"role": "user", "content": " Hi <b>é🙂\n"}
THOUGHT = {"role": "assistant", "content": "<think>x\ny</think>\n{{ no }} {% code %} "}
PLAIN = {"role": "assistant", "content": "Good-bye."}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [USER, PLAIN],
    "one thought": [USER, THOUGHT],
    "three turns": [USER, THOUGHT, USER, PLAIN, USER, THOUGHT],
    "system": [SYSTEM, USER, PLAIN, USER, PLAIN],
}


def theirs(template):
    """The same tokenizer as transformers wraps it, and ours with its special tokens."""
    tokenizer = byte_tokenizer(*template.tokens)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*template.tokens),
        chat_template=template.source,
        bos_token=template.bos,
        eos_token=template.eos,
    )
    ids = (name and tokenizer.token_to_id(name) for name in (template.bos, template.eos))
    return wrapped, tokenizer, SpecialTokens(*ids)


CASES = [
    (name, messages)
    for name in TEMPLATES
    for messages in CONVERSATIONS
    if not (name == "gemma" and messages == "system")  # refused, as tests/test_data_chat.py sees
]


@pytest.mark.parametrize(("name", "messages"), CASES)
def test_tokens_are_those_of_transformers(name, messages):
    template, conversation = TEMPLATES[name], CONVERSATIONS[messages]
    wrapped, tokenizer, special = theirs(template)
    task, record = Chat(template.source), Record({"messages": conversation}, "a.jsonl:1")
    if not (name == "forgetful" and messages == "three turns"):  # refused as well
        encoded = task.encode(record, tokenizer, special)
        expected = wrapped.apply_chat_template(conversation, return_dict=False)
        assert encoded.tokens.tolist() == expected
    (prompt,) = encode_prompts(task, [record], tokenizer, special, max_length=10_000)
    expected = wrapped.apply_chat_template(
        conversation[:-1], add_generation_prompt=True, return_dict=False
    )
    assert prompt == expected


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_marked_turns_are_those_of_transformers(messages):
    template, conversation = TEMPLATES["marked"], CONVERSATIONS[messages]
    wrapped, tokenizer, special = theirs(template)
    encoded = Chat(template.source).encode(
        Record({"messages": conversation}, "a.jsonl:1"), tokenizer, special
    )
    expected = wrapped.apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.tokens.tolist() == expected["input_ids"]
    np.testing.assert_array_equal(encoded.weights, expected["assistant_masks"])


def test_turns_found_by_rendering_are_those_marked():
    """Of a template without marks, against the same one with marks."""
    source = TEMPLATES["marked"].source
    bare = source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    _, tokenizer, special = theirs(TEMPLATES["marked"])
    record = Record({"messages": CONVERSATIONS["system"]}, "a.jsonl:1")
    marked, found = (Chat(x).encode(record, tokenizer, special) for x in (source, bare))
    assert found.tokens.tolist() == marked.tokens.tolist()
    np.testing.assert_array_equal(found.weights, marked.weights)
