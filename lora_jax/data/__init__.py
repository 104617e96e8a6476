r"""Data: from a file of records to batches, in steps that can each be used alone.

    records = read_records("train.jsonl")                             what the file says
    task = Completion("{question}\nAnswer:", " {answer}")             what is asked of the model
    splits = split_records(records, task.key_of)                      by hash, for good
    train = encode_all(task, splits.train, tokenizer, special, max_length=512)
    batches = training_batches(train.sequences, rows=16, length=512, seed=0)

NumPy alone, until something else is called for: nothing here knows of JAX or of models.
"""

from lora_jax.data.batches import Batch, evaluation_batches
from lora_jax.data.chat import Chat
from lora_jax.data.encoding import Encoded, SpecialTokens, Tokenizer
from lora_jax.data.loader import training_batches
from lora_jax.data.records import Record, read_records
from lora_jax.data.sets import EncodedSet, encode_all, encode_prompts
from lora_jax.data.splits import Splits, split_records
from lora_jax.data.tasks import Classification, Completion, Task, Text

__all__ = [
    "Batch",
    "Chat",
    "Classification",
    "Completion",
    "Encoded",
    "EncodedSet",
    "Record",
    "SpecialTokens",
    "Splits",
    "Task",
    "Text",
    "Tokenizer",
    "encode_all",
    "encode_prompts",
    "evaluation_batches",
    "read_records",
    "split_records",
    "training_batches",
]
