"""How good generated texts are, against several references each: BLEU and ROUGE-L of E2E.

BLEU is counted by `experiments/recipes/e2e_bleu.py`. ROUGE-L (Lin, 2004) is the one of the
challenge's script: of a text and its references, precision and recall are each the largest that a
reference gives, and F weighs recall β = 1.2 times as much; texts count alike. That script cuts
texts into words by the Penn Treebank's rules and drops punctuation; here a word is what stands
between spaces and punctuation, so that the third digit may differ from its own.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

# A folder beside this one, and of no package.
sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from e2e_bleu import Text, bleu

__all__ = ["Text", "bleu", "rouge_l", "scores"]

BETA = 1.2


def scores(texts: Sequence[Text]) -> dict[str, float]:
    """All scores of a corpus, from 0 to 100."""
    return {
        "bleu": bleu(list(texts), lowercase=True),
        "bleu_cased": bleu(list(texts), lowercase=False),
        "rouge_l": rouge_l(texts),
    }


def rouge_l(texts: Sequence[Text]) -> float:
    """Mean ROUGE-L of texts, from 0 to 100."""
    return 100 * statistics.fmean(_of_one(text) for text in texts)


def _of_one(text: Text) -> float:
    written = words(text.generated)
    precision = recall = 0.0
    for reference in map(words, text.references):
        common = common_length(written, reference)
        precision = max(precision, common / max(1, len(written)))
        recall = max(recall, common / max(1, len(reference)))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def words(text: str) -> list[str]:
    """Words and numbers in lower case; `£20-25` and `family-friendly` are one each."""
    return re.findall(r"£?\w+(?:[-'.,’]\w+)*", text.lower())


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)  # row[k]: of what was read of `first` and k words of `second`
    for word in first:
        before = row[:]
        for k, other in enumerate(second):
            row[k + 1] = before[k] + 1 if word == other else max(before[k + 1], row[k])
    return row[-1]
