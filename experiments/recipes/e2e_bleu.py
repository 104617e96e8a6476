"""BLEU of generated texts of which several references exist, as the E2E challenge counts it.

    $ pip install sacrebleu
    $ python experiments/recipes/e2e_bleu.py generated.jsonl

A line of the file is {"prompt": ..., "reference": ..., "generated": ...}, one for each reference.
Lines of one prompt are one text with all their references: E2E's 4,693 test lines are 630 texts.
The challenge's own script (tuetschek/e2e-metrics) counts BLEU-4 of tokens by mteval-v13a without
regard to case, which is sacrebleu's `13a` with `lowercase`; both cases are printed.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sacrebleu


class Text(NamedTuple):
    """What was generated for a prompt, and what people wrote for it."""

    generated: str
    references: list[str]


def texts(rows: Iterable[dict[str, Any]]) -> list[Text]:
    """The rows, grouped by prompt in the order of their first appearance.

    Raises:
      ValueError: if the same prompt has two different outputs, as sampling would give.
    """
    groups: dict[str, Text] = {}
    for row in rows:
        text = groups.setdefault(row["prompt"], Text(row["generated"], []))
        if row["generated"] != text.generated:
            raise ValueError(
                f"{row['prompt']!r} has two outputs, {text.generated!r} and {row['generated']!r}; "
                "expected one for all its references, so generate greedily"
            )
        text.references.append(row["reference"])
    return list(groups.values())


def bleu(found: list[Text], *, lowercase: bool) -> float:
    """Corpus BLEU-4, 0 to 100; texts may have different numbers of references."""
    most = max(len(text.references) for text in found)
    # sacrebleu wants the k-th references of all texts side by side, None where there are fewer.
    streams = [
        [text.references[k].strip() if k < len(text.references) else None for text in found]
        for k in range(most)
    ]
    hypotheses = [text.generated.strip() for text in found]
    return sacrebleu.corpus_bleu(hypotheses, streams, lowercase=lowercase).score


def main(path: str) -> None:
    """Prints the scores of a file of generated texts."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line]
    found = texts(rows)
    print(f"{len(found)} texts, {len(rows)} references")
    print(f"BLEU, regardless of case  {bleu(found, lowercase=True):.2f}")
    print(f"BLEU, case-sensitive      {bleu(found, lowercase=False):.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
