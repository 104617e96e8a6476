"""The stream of training batches, through `grain`: shuffled, endless, and resumed anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_jax.data.batches import Batch, PackedBatches
from lora_jax.data.encoding import Encoded

if TYPE_CHECKING:
    import grain


def training_batches(
    sequences: Sequence[Encoded],
    *,
    rows: int,
    length: int,
    seed: int,
    pack: bool = True,
    epochs: int | None = None,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches for training, in a new order each epoch.

        batches = iter(training_batches(sequences, rows=16, length=512, seed=0))
        batch = next(batches)
        state = batches.get_state()     # a small dictionary of integers, to be saved
        batches.set_state(state)        # on a new iterator: goes on with the same batches

    A batch is a function of the arguments and its number: the same on every machine, with any
    number of workers.

    Args:
      sequences: at most `length` tokens each.
      rows: B.
      length: T.
      seed: of the order, 0 or more.
      pack: whether sequences share rows; otherwise each has its own.
      epochs: how often each sequence comes; None is for ever.
      workers: processes that gather batches. Sequences are in memory and a batch of 16 × 512 takes
        0.24 ms to gather (sentences of 60 tokens, one CPU core), so 0, this process alone, is right
        unless batches are a hundred times larger. Workers take seconds to start, a state belongs to
        the number of workers it was saved with, and an iterator is to be closed
        (`batches.close()`).

    Returns:
      An iterable of `Batch`, all of one shape [B, T]. Each `iter` of it starts from the beginning.

    Raises:
      ValueError: if a sequence is longer than a row, or there is none.
    """
    import grain

    source = PackedBatches(sequences, rows=rows, length=length, seed=seed, pack=pack, epochs=epochs)
    # No threads: they would compete with the training loop for the interpreter, and have little to
    # save it.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        _settle_flags()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        batches = batches.map(_owned)
    return batches


def _owned(batch: Batch) -> Batch:
    """A batch in memory of its own, which a worker's is not: that is gone when the worker is."""
    arrays = {name: x for name, x in batch._asdict().items() if x is not None}
    return batch._replace(**{name: np.array(x) for name, x in arrays.items()})


def _settle_flags() -> None:
    """Lets grain's workers read their command-line flags, which absl keeps shut until parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
