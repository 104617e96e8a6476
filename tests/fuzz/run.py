"""Runs the fuzzers, guided by what a reader's code does with each input.

    python tests/fuzz/run.py                        all, a million inputs each
    python tests/fuzz/run.py gguf --runs 10000      one

A crash does not end the run. The shortest input of each is kept in tests/fuzz/corpus, where
`make test` reads them all again, and the exit status is 1. The shortest that leads to each refusal
is kept as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
CORPUS = Path(__file__).parent / "corpus"
LONGEST = 4_096  # bytes of an input
KEPT = 2_048  # bytes of an input that is kept
MEMORY = 512  # MiB beyond what is needed to import everything
SHARE = 0.2  # of the changes that are libFuzzer's own, which know what the code compares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", help="a reader; all of them, if none is named")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    if options.worker:
        work(options.target, options.runs, options.seed)
    if options.target is not None:
        return watch(options.target, options.runs, options.seed)
    from fuzz.targets import TARGETS

    return max([watch(name, options.runs, options.seed) for name in TARGETS])


def watch(target: str, runs: int, seed: int) -> int:
    """Runs a fuzzer in a process of its own, which libFuzzer ends, and sums up what it said."""
    command = [sys.executable, __file__, target, f"--runs={runs}", f"--seed={seed}", "--worker"]
    said: dict[str, Any] = {"target": target, "crashes": 0}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr is not None
        for line in worker.stderr:
            if found := re.search(r"cov: (\d+) ft: (\d+) corp: (\d+)", line):
                edges, features, inputs = map(int, found.groups())
                said |= {"edges": edges, "features": features, "inputs": inputs}
            elif found := re.match(r"stat::(\w+):\s+(\d+)", line):
                said[found[1]] = int(found[2])
            elif not line.startswith(("INFO", "WARNING", "#", "Done", '"')):
                said["crashes"] += line.startswith("CRASH")
                print(line, end="", flush=True)
    print(json.dumps(said), flush=True)
    return 1 if worker.returncode or said["crashes"] else 0


def work(name: str, runs: int, seed: int) -> None:
    """Is the fuzzer."""
    import atheris

    sys.modules.pop("zipfile", None)  # whatever imported it, it is not instrumented yet
    with atheris.instrument_imports(include=["lora_jax", "zipfile"]):
        from fuzz.targets import TARGETS, refusal

    warnings.simplefilter("error")  # as in all tests
    target, corpus = TARGETS[name], CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    shortest: dict[str, tuple[int, Path]] = {}

    def once(data: bytes) -> None:
        try:
            if (refused := refusal(target.read, data)) is not None:
                note("refused", refused, data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Rust's panics are no Exception
            note("crash", error, data)

    def note(kind: str, error: BaseException, data: bytes) -> None:
        where = f"{kind}-{place(error)}"
        if kind == "crash" and where not in shortest:
            print(f"CRASH at {where}: {type(error).__name__}: {error!s:.300}", file=sys.stderr)
        size, older = shortest.get(where, (KEPT, None))
        if len(data) < size:
            # Without the line's number, which changes with every line above.
            name = f"{where.rpartition('-')[0]}-{hashlib.sha256(data).hexdigest()[:8]}"
            (corpus / name).write_bytes(data)
            shortest[where] = len(data), corpus / name
            if older is not None and older.name != name:
                older.unlink(missing_ok=True)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if random.Random(seed).random() < SHARE:
            return atheris.Mutate(data, most)
        return target.mutation(data, most, seed)

    inputs = tempfile.mkdtemp(prefix="fuzz-inputs-")
    before = {path: path.read_bytes() for path in sorted(corpus.iterdir())}
    for number, data in enumerate([*target.seeds(), *before.values()]):
        (Path(inputs) / str(number)).write_bytes(data)
    for path, data in before.items():
        if path.name.startswith("refused"):  # kept again if it still is the shortest
            path.unlink()
        once(data)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB
    arguments = [f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", "-timeout=5"]
    arguments += [f"-rss_limit_mb={used + MEMORY}", f"-artifact_prefix={corpus}/"]
    atheris.Setup(
        [sys.argv[0], *arguments, "-print_final_stats=1", inputs], once, custom_mutator=mutate
    )
    atheris.Fuzz()


def place(error: BaseException) -> str:
    """Where in this library an error, or what caused it, was raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    found, frame = "nowhere", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if "lora_jax" in code.co_filename or found == "nowhere":
            name = os.path.basename(code.co_filename).removesuffix(".py")
            found = f"{name}-{code.co_name.strip('<>')}-{frame.tb_lineno}"
        frame = frame.tb_next
    return found


if __name__ == "__main__":
    sys.exit(main())
