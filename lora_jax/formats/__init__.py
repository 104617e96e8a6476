"""Files that others write and read: checkpoints, adapters, and where to get them."""
