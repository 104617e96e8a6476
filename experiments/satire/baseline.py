"""TF-IDF and logistic regression on exactly the headlines that the default run sees.

    python -m pip install scikit-learn
    python experiments/satire/baseline.py     # seconds

Words and pairs of words, and the regularization that is best on validation. Writes
results/baseline.json.
"""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from lora_jax import data
from lora_jax.cli.finetune import Config, Task
from lora_jax.formats.gguf import read_gguf
from lora_jax.formats.sources import fetch

HERE = Path(__file__).parent
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)  # C of LogisticRegression


def texts_and_labels(examples: list[data.Example]) -> tuple[list[str], np.ndarray]:
    """What scikit-learn wants."""
    return [example.text for example in examples], np.array([e.label for e in examples])


def main() -> None:
    """Fits one model a seed, and one on all training examples."""
    config = Config()
    tokenizer = read_gguf(fetch(config.model)).tokenizer
    splits = data.split_examples(data.read_examples(fetch(config.data)))
    task = Task.of(splits.train, tokenizer, config)
    validation, y_validation = texts_and_labels(splits.validation)
    test, y_test = texts_and_labels(splits.test[: config.examples])

    def accuracy(examples: list[data.Example]) -> dict:
        texts, labels = texts_and_labels(examples)
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        features = vectorizer.fit_transform(texts)
        models = [LogisticRegression(C=c, max_iter=2_000).fit(features, labels) for c in STRENGTHS]
        chosen = max(models, key=lambda m: m.score(vectorizer.transform(validation), y_validation))
        score = chosen.score(vectorizer.transform(test), y_test)
        return {"training_examples": len(texts), "C": chosen.C, "accuracy": score}

    runs = []
    for seed in (0, 1, 2):
        order = data.shuffled(len(task.examples), seed)
        batches = itertools.islice(task.batches(order, config.rows, config.length), config.steps)
        seen = [k for batch in batches for k in batch.which if k >= 0]
        runs.append({"seed": seed, **accuracy([task.examples[k] for k in seen])})
    results = {"same_examples": runs, "all_examples": accuracy(splits.train)}
    (HERE / "results" / "baseline.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"mean of the seeds: {100 * statistics.mean(r['accuracy'] for r in runs):.1f} %")


if __name__ == "__main__":
    main()
