"""What the tests against torch, transformers, peft and bitsandbytes share."""

import os

# Hub look-ups would make a test depend on the network; every model here is built or read from disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# bitsandbytes compiles what it falls back to for odd shapes, once for each of them.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
