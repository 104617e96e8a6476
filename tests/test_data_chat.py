"""Chat: the model's own template, and the assistant's turns alone are learned."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from byte_tokenizer import byte_tokenizer, learned_text, text_of
from chat_templates import TEMPLATES, Template

from lora_jax.data import Chat, Record, SpecialTokens, encode_all, encode_prompts

HI = {"role": "user", "content": "Hi 🙂"}
HELLO = {"role": "assistant", "content": "<think>a</think>Hé!"}
MORE = {"role": "user", "content": " <b>\n"}
NO = {"role": "assistant", "content": "no 🙂"}
SYSTEM = {"role": "system", "content": "Be brief."}


def record(*messages):
    return Record({"messages": list(messages)}, "chat.jsonl:3")


def tools(template: Template):
    """A task, a tokenizer and its special tokens."""
    tokenizer = byte_tokenizer(*template.tokens)
    bos, eos = (name and tokenizer.token_to_id(name) for name in (template.bos, template.eos))
    return Chat(template.source), tokenizer, SpecialTokens(bos, eos)


# The whole text of two turns each, by hand. What is learned stands between « and ».
GOLDEN = {
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi 🙂<|im_end|>\n"
    "<|im_start|>assistant\n«<think>a</think>Hé!<|im_end|>»\n"
    "<|im_start|>user\n <b>\n<|im_end|>\n"
    "<|im_start|>assistant\n«no 🙂<|im_end|>»\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi 🙂<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«<think>a</think>Hé!<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\n<b><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«no 🙂<|eot_id|>»",
    "gemma": "<bos><start_of_turn>user\nHi 🙂<end_of_turn>\n"
    "<start_of_turn>model\n«<think>a</think>Hé!<end_of_turn>»\n"
    "<start_of_turn>user\n<b><end_of_turn>\n"
    "<start_of_turn>model\n«no 🙂<end_of_turn>»\n",
    "mistral": "<s>[INST] Hi 🙂[/INST]« <think>a</think>Hé!</s>»[INST]  <b>\n[/INST]« no 🙂</s>»",
    "thinking": "<|begin|><|User|>Hi 🙂<|Assistant|>«Hé!<|end|>»"
    "<|User|> <b>\n<|Assistant|>«no 🙂<|end|>»",
    "marked": "<|user|>Hi 🙂<|end|><|assistant|>«Hé!<|end|>»"
    "<|user|> <b>\n<|end|><|assistant|>«no 🙂<|end|>»",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_only_the_assistant_is_learned(name):
    task, tokenizer, special = tools(TEMPLATES[name])
    encoded = task.encode(record(HI, HELLO, MORE, NO), tokenizer, special)
    assert text_of(tokenizer, encoded.tokens) == re.sub("[«»]", "", GOLDEN[name])
    turns = re.findall("«(.*?)»", GOLDEN[name], re.DOTALL)
    assert learned_text(tokenizer, encoded) == "".join(turns)
    # What follows the last turn teaches nothing and is not even there.
    longer = task.encode(record(HI, HELLO, MORE, NO, MORE), tokenizer, special)
    assert [x.tolist() for x in longer[:2]] == [x.tolist() for x in encoded[:2]]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_ends_where_the_last_turn_begins(name):
    task, tokenizer, special = tools(TEMPLATES[name])
    (prompt,) = encode_prompts(
        task, [record(HI, HELLO, MORE, NO)], tokenizer, special, max_length=999
    )
    before = re.sub("[«»]", "", GOLDEN[name].rpartition("«")[0])
    opened = "<think>\n" if name == "thinking" else ""
    assert text_of(tokenizer, prompt) == before + opened
    unanswered = encode_prompts(task, [record(HI, HELLO, MORE)], tokenizer, special, max_length=999)
    assert unanswered == [prompt]


def test_a_prompt_as_text_leaves_the_tokenizers_names_out():
    assert tools(TEMPLATES["chatml"])[0].prompt_of(record(SYSTEM, HI, NO)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 🙂<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    mistral = tools(TEMPLATES["mistral"])[0]
    assert (
        mistral.prompt_of(record(HI, NO, MORE)) == "[INST] Hi 🙂[/INST] no 🙂[INST]  <b>\n[/INST]"
    )


def test_a_template_that_rewrites_earlier_turns_learns_one_at_a_time():
    task, tokenizer, special = tools(TEMPLATES["forgetful"])
    encoded = task.encode(record(HI, HELLO), tokenizer, special)
    assert learned_text(tokenizer, encoded) == "<think>a</think>Hé!<|end|>"
    sentence = "chat.jsonl:3: the chat template writes message 1 differently once others follow"
    with pytest.raises(ValueError, match=sentence):
        task.encode(record(HI, HELLO, MORE, NO), tokenizer, special)


def test_what_a_template_may_ask_for():
    template = TEMPLATES["everything"]
    tokenizer = byte_tokenizer(*template.tokens)
    task = Chat(template.source.replace("%Y", "%d %b"), now=datetime.datetime(2024, 7, 26))
    special = SpecialTokens(*map(tokenizer.token_to_id, ("<s>", "</s>")))
    message = {"role": "user", "content": "<é>"}
    encoded = task.encode(record(message, {"role": "tool"}, NO), tokenizer, special)
    assert text_of(tokenizer, encoded.tokens) == (
        '<s>    [user]\n{"role": "user", "content": "<é>"}|"<é>"6</s>\n'
        '    [assistant]\n{"role": "assistant", "content": "no 🙂"}|"no 🙂"6</s>\n'
    )


def test_the_present_is_the_default_of_now():
    task = Chat("{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.date.today()
    text = task.prompt_of(record(HI))
    assert before <= datetime.date.fromisoformat(text) <= datetime.date.today()


def test_messages_may_be_json():
    task, tokenizer, special = tools(TEMPLATES["chatml"])
    as_text = Record({"messages": json.dumps([HI, NO])}, "chat.csv:2")
    one, other = (task.encode(x, tokenizer, special) for x in (as_text, record(HI, NO)))
    assert one.tokens.tolist() == other.tokens.tolist()


def test_a_conversation_loses_its_end():
    task, tokenizer, special = tools(TEMPLATES["mistral"])
    rows = [record(HI, NO), record({"role": "user", "content": "long " * 9}, NO)]
    encoded = encode_all(task, rows, tokenizer, special, max_length=20)
    assert [text_of(tokenizer, x.tokens) for x in encoded.sequences] == [
        "<s>[INST] Hi 🙂[/INST] no 🙂</s>"
    ]
    assert (encoded.truncated, encoded.dropped, encoded.empty) == (1, 0, 1)


def test_the_key_is_what_is_said_before_the_assistant_speaks():
    task, *_ = tools(TEMPLATES["chatml"])
    key = task.key_of(record(SYSTEM, HI, HELLO, MORE, NO))
    assert key == task.key_of(record(SYSTEM, HI, NO)) == task.key_of(record(SYSTEM, HI))
    assert key != task.key_of(record(HI, HELLO))


def test_a_template_is_anybodys_code():
    task = Chat("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match=r"chat.jsonl:3: the chat template refuses"):
        task.prompt_of(record(HI))


NOT_MESSAGES = "chat.jsonl:3: the column 'messages' holds no list of messages, expected"
WRONG = {
    "no messages": ({}, "chat.jsonl:3: no column 'messages'; the columns are"),
    "a text": ({"messages": "Hi"}, NOT_MESSAGES),
    "texts": ({"messages": ["Hi"]}, NOT_MESSAGES),
    "other names": ({"messages": [{"from": "human", "value": "Hi"}]}, NOT_MESSAGES),
    "no assistant": ({"messages": [HI]}, "chat.jsonl:3: the assistant says nothing in this"),
    "refused": (
        {"messages": [SYSTEM, HI, NO]},
        "chat.jsonl:3: the chat template refuses these messages (System role not supported)",
    ),
}


@pytest.mark.parametrize(("fields", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_messages_is_said(fields, sentence):
    task, tokenizer, special = tools(TEMPLATES["gemma"])
    with pytest.raises(ValueError, match="^" + re.escape(sentence)) as caught:
        task.encode(Record(fields, "chat.jsonl:3"), tokenizer, special)
    assert "\n" not in str(caught.value)


def test_a_message_that_lacks_what_the_template_writes():
    task, tokenizer, special = tools(TEMPLATES["chatml"])
    sentence = (
        "chat.jsonl:3: the chat template refuses these messages \\('dict object' has no attrib"
    )
    with pytest.raises(ValueError, match=sentence):
        task.encode(record(HI, {"role": "assistant"}), tokenizer, special)


def test_a_malformed_template_is_said_before_any_data():
    with pytest.raises(ValueError, match="the chat template is malformed in line 2: "):
        Chat("{% for message in messages %}\n{{ message }")
