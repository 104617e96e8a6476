"""Tasks: what is shown, what is learned, and what becomes of that which does not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer, learned_text, text_of

from lora_jax.data import (
    Classification,
    Completion,
    Record,
    SpecialTokens,
    Text,
    encode_all,
    encode_prompts,
)

TOKENIZER = byte_tokenizer("<s>", "</s>")
BOS, EOS = (TOKENIZER.token_to_id(name) for name in ("<s>", "</s>"))
BOTH, NONE = SpecialTokens(BOS, EOS), SpecialTokens(None, None)


def record(**fields):
    return Record(fields, "train.jsonl:17")


COMPLETION = Completion("Q: {q}\nA:", " {a}")
SUM = record(q="2+2?", a="4")
SATIRE = Classification("{text}?", labels=(" No", " Yes"))
INTENTS = Classification("{text}:", labels={"pay_bill": " pay", "pay_back": " pay back"})


# The text of a sequence, and what of it is learned.
SEQUENCES = {
    "completion": (COMPLETION, SUM, BOTH, "<s>Q: 2+2?\nA: 4</s>", " 4</s>"),
    "completion, bare": (COMPLETION, SUM, NONE, "Q: 2+2?\nA: 4", " 4"),
    "completion of nothing": (Completion("", "{a}"), SUM, BOTH, "<s>4</s>", "4</s>"),
    "nothing precedes it": (Completion("", "{a}b"), SUM, NONE, "4b", "b"),
    "braces": (Completion("{{{q}}}", "{{}}"), SUM, NONE, "{2+2?}{}", "{}"),
    "no number": (Completion("{n:.1f}", "{n}"), record(n=0.25), NONE, "0.20.25", "0.25"),
    "nested": (Completion("{m[k][0]}", "b"), record(m={"k": "xy"}), NONE, "xb", "b"),
    "label": (SATIRE, record(text="Cat", label=1), BOTH, "<s>Cat? Yes", " Yes"),
    "label, as text": (SATIRE, record(text="Cat", label="0"), NONE, "Cat? No", " No"),
    "label, by its words": (SATIRE, record(text="Cat", label="Yes"), NONE, "Cat? Yes", " Yes"),
    "labels that begin alike": (
        Classification("{text}:", {"a": " pay", "b": " pay back"}),
        record(text="x", label="a"),
        BOTH,
        "<s>x: pay</s>",
        " pay</s>",
    ),
    "text": (Text(), record(text="One two"), BOTH, "<s>One two</s>", "One two</s>"),
    "text, bare": (Text("{a}, {b}"), record(a="One", b=2), NONE, "One, 2", "ne, 2"),
}


@pytest.mark.parametrize(
    ("task", "row", "special", "text", "learned"), SEQUENCES.values(), ids=SEQUENCES
)
def test_what_is_shown_and_what_is_learned(task, row, special, text, learned):
    encoded = task.encode(row, TOKENIZER, special)
    assert text_of(TOKENIZER, encoded.tokens) == text
    assert learned_text(TOKENIZER, encoded) == learned
    assert text_of(TOKENIZER, encoded.prompt) == text.removesuffix(learned)
    assert (encoded.tokens.dtype, encoded.weights.dtype) == (np.int32, np.float32)
    assert encoded.weights[0] == 0


def test_a_prompt_is_tokenized_as_when_it_is_alone():
    """Merges over the seam would train on tokens that generation never meets."""
    for task, row in ((COMPLETION, SUM), (SATIRE, record(text="Cat", label=1))):
        (prompt,) = encode_prompts(task, [row], TOKENIZER, BOTH, max_length=99)
        assert prompt == task.encode(row, TOKENIZER, BOTH).prompt
        assert text_of(TOKENIZER, prompt) == "<s>" + task.prompt_of(row)


def test_prompts_need_no_answer():
    unanswered = [record(q="2+2?"), record(q="long " * 9)]
    prompts = encode_prompts(COMPLETION, unanswered, TOKENIZER, BOTH, max_length=12)
    assert [text_of(TOKENIZER, ids) for ids in prompts] == ["<s>Q: 2+2?\nA:", "<s>ng long \nA:"]
    bare = encode_prompts(COMPLETION, unanswered[1:], TOKENIZER, NONE, max_length=12)
    assert text_of(TOKENIZER, bare[0]) == "ong long \nA:"
    with pytest.raises(ValueError, match="max_length is 1, expected 2 tokens or more"):
        encode_prompts(COMPLETION, unanswered, TOKENIZER, BOTH, max_length=1)


ROWS = [record(q="abcdefgh", a="xyz"), SUM, record(q="a", a="0123456789abc")]
TEXTS = [record(text="abcdef"), record(text="ab"), record(text="")]
# What is encoded and how; the sequences kept; how many are truncated, dropped and empty.
FITTED = {
    "the front of a prompt": (
        (COMPLETION, ROWS, BOTH, 13, "truncate"),
        ["<s>efgh\nA: xyz</s>", "<s>: 2+2?\nA: 4</s>", "<s> 0123456789a"],
        (3, 0, 0),
    ),
    "the front of a prompt, bare": (
        (COMPLETION, ROWS[:2], NONE, 10, "truncate"),
        ["fgh\nA: xyz", " 2+2?\nA: 4"],
        (2, 0, 0),
    ),
    "the front of what is classified": (
        (SATIRE, [record(text="abcdef", label=1)], BOTH, 8, "truncate"),
        ["<s>ef? Yes"],
        (1, 0, 0),
    ),
    "the end of a text": (
        (Text(), TEXTS, BOTH, 4, "truncate"),
        ["<s>abc", "<s>ab</s>", "<s></s>"],
        (1, 0, 0),
    ),
    "pieces that meet in a token": (
        (Text(), TEXTS, BOTH, 4, "split"),
        ["<s>abc", "cdef", "f</s>", "<s>ab</s>", "<s></s>"],
        (1, 0, 0),
    ),
    "pieces without a rest": (
        (Text(), [record(text="abcdefg")], NONE, 4, "split"),
        ["abcd", "defg"],
        (1, 0, 0),
    ),
    "nothing to learn": (
        (Text(), TEXTS[1:], SpecialTokens(None, EOS), 4, "drop"),
        ["ab</s>"],
        (0, 0, 1),
    ),
    "dropped": ((COMPLETION, ROWS, BOTH, 17, "drop"), ["<s>Q: 2+2?\nA: 4</s>"], (0, 2, 0)),
}


@pytest.mark.parametrize(("given", "texts", "counts"), FITTED.values(), ids=FITTED)
def test_what_becomes_of_that_which_is_too_long(given, texts, counts):
    task, rows, special, length, too_long = given
    encoded = encode_all(task, rows, TOKENIZER, special, max_length=length, too_long=too_long)
    assert [text_of(TOKENIZER, x.tokens) for x in encoded.sequences] == texts
    assert (encoded.truncated, encoded.dropped, encoded.empty) == counts
    assert max(len(x.tokens) for x in encoded.sequences) <= length
    assert encoded.tokens == sum(len(x.tokens) for x in encoded.sequences)
    assert encoded.learned == sum((x.weights > 0).sum() for x in encoded.sequences)


def test_every_token_of_a_split_text_is_learned_once():
    rows = [record(text="x" * n) for n in range(1, 40)]
    whole = encode_all(Text(), rows, TOKENIZER, BOTH, max_length=99)
    for length in (2, 3, 8):
        pieces = encode_all(Text(), rows, TOKENIZER, BOTH, max_length=length, too_long="split")
        assert pieces.learned == whole.learned
        assert {x.record for x in pieces.sequences} == set(range(39))


def test_sequences_know_their_record():
    rows = [record(q="x" * (n % 3 * 20), a="y") for n in range(10_000)]
    encoded = encode_all(COMPLETION, rows, TOKENIZER, BOTH, max_length=30, too_long="drop")
    assert [x.record for x in encoded.sequences] == [n for n in range(10_000) if n % 3 != 2]
    one = COMPLETION.encode(rows[1], TOKENIZER, BOTH)
    assert encoded.sequences[1].tokens.tolist() == one.tokens.tolist()


def test_the_report_counts():
    rows = [*ROWS[:2], record(q="x" * 3_000, a="y")]
    encoded = encode_all(COMPLETION, rows, TOKENIZER, BOTH, max_length=1_000)
    assert str(encoded) == "3 sequences of 1,034 tokens, 11 learned; 1 cut to 1,000 tokens"
    encoded = encode_all(COMPLETION, rows, TOKENIZER, BOTH, max_length=1_000, too_long="drop")
    assert str(encoded) == (
        "2 sequences of 34 tokens, 8 learned; 1 longer than 1,000 tokens left out"
    )
    encoded = encode_all(Text(), TEXTS, TOKENIZER, NONE, max_length=9)
    assert str(encoded) == ("2 sequences of 8 tokens, 6 learned; 1 with nothing to learn left out")


def test_labels_are_told_apart():
    assert [text_of(TOKENIZER, x) for x in SATIRE.label_tokens(TOKENIZER, BOTH)] == [" No", " Yes"]
    assert [text_of(TOKENIZER, x) for x in INTENTS.label_tokens(TOKENIZER, BOTH)] == [
        " pay</s>",
        " pay back</s>",
    ]
    assert (SATIRE.names, INTENTS.names) == (("No", "Yes"), ("pay_bill", "pay_back"))


WRONG = {
    "missing column": (
        lambda: COMPLETION.encode(record(question="x", a="y"), TOKENIZER, BOTH),
        "train.jsonl:17: no column 'q'; the columns are question, a",
    ),
    "missing answer": (
        lambda: encode_all(COMPLETION, [SUM, record(q="x")], TOKENIZER, BOTH, max_length=9),
        "train.jsonl:17: no column 'a'; the columns are q",
    ),
    "missing key": (
        lambda: COMPLETION.key_of(record(a="x")),
        "train.jsonl:17: no column 'q'; the columns are a",
    ),
    "null": (
        lambda: COMPLETION.encode(record(q=None, a="y"), TOKENIZER, BOTH),
        "train.jsonl:17: the column 'q' is null, expected a value",
    ),
    "no such item": (
        lambda: Text("{m[k]}").encode(record(m={"l": 1}), TOKENIZER, BOTH),
        "train.jsonl:17: '{m[k]}' cannot be filled (KeyError: 'k')",
    ),
    "no such form": (
        lambda: Text("{m:.2f}").encode(record(m="x"), TOKENIZER, BOTH),
        "train.jsonl:17: '{m:.2f}' cannot be filled (ValueError: ",
    ),
    "an open brace": (
        lambda: Text("{a"),
        "the template '{a' is malformed (expected '}' before end of string); write {{ and }}",
    ),
    "no name": (lambda: Completion("{}", "b"), "the template '{}' has {}, expected the name of"),
    "a number": (lambda: Completion("a", "{0}"), "the template '{0}' has {0}, expected the name"),
    "not a label": (
        lambda: SATIRE.encode(record(text="a", label=2), TOKENIZER, BOTH),
        "train.jsonl:17: the column 'label' is 2, expected one of 'No', 'Yes'",
    ),
    "no index in a mapping": (
        lambda: INTENTS.label_of(record(text="a", label=0)),
        "train.jsonl:17: the column 'label' is 0, expected one of 'pay_bill', 'pay_back'",
    ),
    "one label": (lambda: Classification("a", (" x",)), "expected at least two, all different"),
    "equal labels": (
        lambda: Classification("a", {"x": " same", "y": " same"}),
        "expected at least two, all different",
    ),
    "labels that begin alike": (
        lambda: INTENTS.label_tokens(TOKENIZER, NONE),
        "the labels (' pay', ' pay back') cannot be told apart: their tokens are [[",
    ),
    "too long": (
        lambda: encode_all(COMPLETION, [SUM], TOKENIZER, BOTH, max_length=9, too_long="error"),
        "train.jsonl:17: 14 tokens, expected at most 9; raise max_length, or choose to truncate or",
    ),
    "a row for nothing": (
        lambda: encode_all(COMPLETION, [SUM], TOKENIZER, BOTH, max_length=1),
        "max_length is 1, expected 2 tokens or more",
    ),
    "split answers": (
        lambda: encode_all(COMPLETION, [SUM], TOKENIZER, BOTH, max_length=9, too_long="split"),
        "too_long='split' with Completion: only the pieces of a Text are texts",
    ),
}


@pytest.mark.parametrize(("wrong", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cuts_texts_by_itself_is_refused():
    cutting = byte_tokenizer()
    cutting.enable_truncation(4)
    with pytest.raises(ValueError, match=r"call tokenizer.no_truncation\(\) first"):
        COMPLETION.encode(SUM, cutting, NONE)
