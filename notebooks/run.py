"""Executes the notebooks in place and keeps their outputs; stops at the first error.

`python notebooks/run.py` takes all of them, `python notebooks/run.py one.ipynb` those named.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
# What a run leaves behind beside its outputs; dropped, so that a diff shows results alone.
VOLATILE = ("execution", "widgets")


def execute(path: Path) -> None:
    """Runs one notebook from top to bottom in a fresh kernel and writes it back."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": path.parent}}, record_timing=False
    )
    client.execute()
    for holder in (notebook, *notebook.cells):
        for name in VOLATILE:
            holder.metadata.pop(name, None)
    notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        execute(path)


if __name__ == "__main__":
    main()
