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
from lora_jax.cli.options import ModelOptions
from lora_jax.cli.problem import load_data, load_model
from lora_jax.cli.run_config import SATIRE

HERE = Path(__file__).parent
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)  # C of LogisticRegression


def main() -> None:
    """Fits one model a seed, and one on all training examples."""
    model, training = load_model(ModelOptions(base="float32")), SATIRE.training
    found = load_data(SATIRE.data, model)

    def texts_and_labels(records: list[data.Record]) -> tuple[list[str], np.ndarray]:
        """What scikit-learn wants."""
        labels = [found.task.label_of(record) for record in records]
        return [record.fields["text"] for record in records], np.array(labels)

    validation, y_validation = texts_and_labels(found.validation.records)
    test, y_test = texts_and_labels(found.test.records[: SATIRE.evaluation.test_examples])

    def accuracy(records: list[data.Record]) -> dict:
        texts, labels = texts_and_labels(records)
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        features = vectorizer.fit_transform(texts)
        models = [LogisticRegression(C=c, max_iter=2_000).fit(features, labels) for c in STRENGTHS]
        chosen = max(models, key=lambda m: m.score(vectorizer.transform(validation), y_validation))
        score = chosen.score(vectorizer.transform(test), y_test)
        return {"training_examples": len(texts), "C": chosen.C, "accuracy": score}

    # A batch does not say which headlines it is made of, but no two of them are the same.
    known = {one.tokens.tobytes(): found.train.records[one.record] for one in found.train.sequences}
    runs = []
    for seed in (0, 1, 2):
        batches = data.training_batches(
            found.train.sequences, rows=training.rows, length=SATIRE.data.length, seed=seed
        )
        seen = [
            known[row[segments == segment].tobytes()]
            for batch in itertools.islice(batches, training.steps)
            for row, segments in zip(batch.tokens, batch.segment_ids, strict=True)
            for segment in range(1, segments.max() + 1)
        ]
        runs.append({"seed": seed, **accuracy(seen)})
    results = {"same_examples": runs, "all_examples": accuracy(found.train.records)}
    (HERE / "results" / "baseline.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    print(f"mean of the seeds: {100 * statistics.mean(r['accuracy'] for r in runs):.1f} %")


if __name__ == "__main__":
    main()
