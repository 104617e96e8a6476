"""Splits: fixed by a hash of the key, so that nothing moves and nothing is on both sides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lora_jax.data import Classification, Completion, Record, split_records

TASK = Classification("Headline: {text}\nSatire:", labels=(" No", " Yes"))


def records(texts, labels="01" * 2_000):
    return [
        Record({"text": text, "label": label}, f"a.jsonl:{line}")
        for line, (text, label) in enumerate(zip(texts, labels, strict=False), 1)
    ]


RECORDS = records([f"sentence number {n}" for n in range(4_000)])


def numbers(split):
    return [int(record.fields["text"].split()[-1]) for record in split]


def test_the_splits_are_those_of_the_first_release():
    """As its `split_examples` made them: a run of today is tested on what a run of then was."""
    splits = split_records(RECORDS, TASK.key_of, one_per_key=True)
    assert [len(split) for split in splits] == [3608, 204, 188]
    assert numbers(splits.train)[:6] == [1226, 1352, 3286, 978, 710, 388]
    assert numbers(splits.validation)[:6] == [1393, 1320, 753, 1042, 1962, 3782]
    assert numbers(splits.test)[:6] == [3250, 3432, 1580, 1219, 3438, 2023]


def test_splits_share_nothing_and_lose_nothing():
    splits = split_records(RECORDS, TASK.key_of, validation=0.2, test=0.1)
    assert sorted(numbers(itertools.chain(*splits))) == [*range(4_000)]
    # Binomial(4000, 0.2) and (4000, 0.1) have standard deviations of 25.3 and 19.0.
    assert abs(len(splits.validation) - 800) < 100
    assert abs(len(splits.test) - 400) < 76


def test_a_record_keeps_its_split_whatever_the_others_are():
    splits = split_records(RECORDS, TASK.key_of)
    fewer = split_records(RECORDS[::-3], TASK.key_of)
    for some, all_ in zip(fewer, splits, strict=True):
        kept = set(numbers(some))
        assert numbers(some) == [n for n in numbers(all_) if n in kept]  # and its order


def test_case_white_space_and_the_words_of_the_prompt_move_nothing():
    splits = split_records(RECORDS, TASK.key_of)
    shouted = records([f"  {record.fields['text'].upper()}\n" for record in RECORDS])
    asked_otherwise = Classification("{text} Really?", labels=(" No", " Yes"))
    for others in (
        split_records(shouted, TASK.key_of),
        split_records(RECORDS, asked_otherwise.key_of),
    ):
        assert [numbers(split) for split in others] == [numbers(split) for split in splits]


def test_the_order_of_a_split_says_nothing_of_its_labels():
    labels = [int(record.fields["label"]) for record in split_records(RECORDS, TASK.key_of).train]
    assert abs(np.mean(labels[:1_000]) - 0.5) < 0.06  # four standard deviations


def test_the_same_prompt_is_in_one_split_with_all_its_answers():
    task = Completion("{mr}", "{ref}")
    several = [
        Record({"mr": f"number {n}", "ref": f"answer {m}"}, f"a.csv:{n * 5 + m}")
        for n in range(200)
        for m in (0, 1, 2, 1, 0)  # two of them are there twice
    ]
    splits = split_records(several, task.key_of, validation=0.3, test=0.3)
    assert all(splits)
    prompts = [{record.fields["mr"] for record in split} for split in splits]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 200
    for split in splits:
        for prompt, answers in itertools.groupby(split, key=lambda r: r.fields["mr"]):
            assert [r.fields["ref"][-1] for r in answers] == ["0", "1", "2"], prompt


@pytest.mark.parametrize(("one_per_key", "kept"), [(True, [1, 3]), (False, [1, 3, 4])])
def test_of_what_is_there_twice_the_first_is_kept(one_per_key, kept):
    twice = records(["Cat  sat", "Cat  sat", "dog ran", " cat SAT\n"], "0011")
    splits = split_records(twice, TASK.key_of, validation=0, test=0, one_per_key=one_per_key)
    lines = sorted(int(record.where.split(":")[1]) for record in splits.train)
    assert lines == kept


@pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (5, 5)])
def test_shares_that_leave_nothing_to_train_on(shares):
    with pytest.raises(ValueError, match="expected shares from 0 that leave something to train"):
        split_records(RECORDS, TASK.key_of, validation=shares[0], test=shares[1])
