"""The 4-bit kernels on a GPU: how near to the memory's bandwidth, and are they right?

    python experiments/speed/kernels.py
    python experiments/speed/kernels.py --out 4096 --inn 4096 --seconds 60

One weight of Llama-3-8B's MLP by default, NF4 with double quantization and random codes. A program
goes through several distinct weights (and inputs), more than 200 MB of them, so that a weight has
left the 50 MB of second-level cache when its turn comes again. The first time of a line is what the
GPU's own profile says that the kernels of such a program take, those included that arrange x or add
up splits, and the second is the time that passes; both are a weight's share. "GB/s" counts bytes
read and written, in the first time. "empty" is such a program without the work: what passes there
is what dispatching costs.

Each line also says how far its result is from the reference: of decoding, how many values differ in
any bit from the XLA path's on the same device; of the rest, the norm of the difference from a
float32 result (products: at the highest precision) over the norm of the latter.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.core.leaves import QuantizedArray
from lora_jax.kernels import gpu, xla
from lora_jax.kernels.gpu import Tiling

BLOCK = 64
RANK = 16

# What to try, the most promising first.
DECODES = [Tiling(64), Tiling(32, warps=2)]
FOLDS = [
    Tiling(64, splits=8, stages=1),
    Tiling(32, splits=8, warps=2, stages=1),
    Tiling(64, splits=64, stages=1),
    Tiling(128, splits=8, stages=1),
]
# Products of so many rows of x: of up to two `matvec`, beyond `matmul`.
PRODUCTS = {
    1: [Tiling(32, 4, 8), Tiling(16, 8, 4), Tiling(16, 8, 8)],
    4: [Tiling(64, 4, 4), Tiling(64, 4, 8, stages=2)],
    16: [Tiling(64, 2, 4), Tiling(64, 2, 2), Tiling(64, 1, 2)],
    64: [Tiling(64, stages=4), Tiling(64, 1, 2), Tiling(128, 1, 2)],
}


def random_weight(key: jax.Array, out: int, inn: int) -> QuantizedArray:
    """A weight of random codes, with the scales of a normal distribution of deviation 0.02."""
    codes, scales, groups = jax.random.split(key, 3)
    blocks = out * inn // BLOCK
    return QuantizedArray(
        codes=jax.random.bits(codes, (out, inn // 2), jnp.uint8),
        scales=jax.random.bits(scales, (out, inn // BLOCK), jnp.uint8),
        group_scales=jax.random.uniform(groups, (-(-blocks // 256),), minval=0.01, maxval=0.02),
        offset=jnp.float32(0.05),
        kind="nf4",
        block_size=BLOCK,
        dtype=np.dtype(jnp.bfloat16),
        layout="o i",
        axis_sizes=(out, inn),
    )


def times(fn: Callable, sets: list[tuple], calls: int = 20) -> tuple[dict[str, float], float]:
    """Microseconds a set of arguments, when a program goes through all of them in turn.

    Returns:
      Those that each kernel takes on the GPU, by its name; and those that pass.
    """
    one = jax.jit(fn)  # lowered once, called for each set
    leaves, tree = jax.tree.flatten(sets)
    distinct = list({id(leaf): leaf for leaf in leaves}.values())  # each argument costs time
    order = [next(k for k, x in enumerate(distinct) if x is leaf) for leaf in leaves]

    @jax.jit
    def program(distinct: list[jax.Array]) -> list[jax.Array]:
        sets = jax.tree.unflatten(tree, [distinct[k] for k in order])
        return [one(*args) for args in sets]

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = program(distinct)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds()
    share = 1e6 / calls / len(sets)
    passed = statistics.median(seconds() for _ in range(3)) * share
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds()
        (path,) = Path(folder).glob("**/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    of_kernels: dict[str, float] = collections.defaultdict(float)
    for plane in profile.planes:
        for stream in plane.lines:
            if "gpu" in plane.name.lower() and "Stream" in stream.name:
                for event in stream.events:
                    name = re.sub(r"[._]*\d+", "", event.name)[:60]
                    of_kernels[name] += event.duration_ns * 1e-9 * share
    return dict(of_kernels), passed


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
      group: what is computed, such as `"decode"` or `"product, M=16"`.
      name: how.
      fn: the function, of one of `sets`.
      sets: distinct arguments.
      bytes: read and written.
      error: of the result for the first set; or None.
    """

    group: str
    name: str
    fn: Callable
    sets: list[tuple]
    bytes: int
    error: Callable | None = None


def described(tiling: Tiling) -> str:
    """A tiling in a few letters."""
    t = tiling
    return f"rows={t.rows} blocks={t.blocks} splits={t.splits} warps={t.warps} stages={t.stages}"


def bits_that_differ(got: jax.Array, want: jax.Array) -> str:
    """How many values are not the same, bit by bit."""
    bits = jnp.dtype(f"uint{8 * got.dtype.itemsize}")
    got, want = (jax.lax.bitcast_convert_type(x, bits) for x in (got, want))
    return f"{int((got != want).sum())} differ"


def relative(got: jax.Array, want: jax.Array) -> str:
    """Norm of the difference over the norm."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return f"{float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)):.2e}"


def copies(out: int, inn: int, key: jax.Array) -> Iterator[Case]:
    """What memory allows."""
    sets = [(jax.random.normal(k, (out, inn), jnp.bfloat16),) for k in jax.random.split(key, 3)]
    size = 2 * 2 * out * inn
    yield Case("copy", "device to device", lambda x: x.copy(), sets, size)


def decodes(weights: list[QuantizedArray]) -> Iterator[Case]:
    """Plain decoding."""
    q = weights[0]
    size = q.nbytes + 2 * q.size
    sets = [(q,) for q in weights[:4]]
    want = xla.decode(q)
    error = functools.partial(bits_that_differ, want=want)
    yield Case("decode", "XLA", xla.decode, [(q,) for q in weights[:4]], size, error)
    for tiling in DECODES:
        fn = functools.partial(gpu.decode, tiling=tiling)
        yield Case("decode", described(tiling), fn, sets, size, error)


def folds(weights: list[QuantizedArray], key: jax.Array) -> Iterator[Case]:
    """Decoding with an update folded in."""
    q = weights[0]
    (out, inn), keys = q.matrix_shape, jax.random.split(key)
    a = jax.random.normal(keys[0], (RANK, inn)) / inn**0.5
    b = jax.random.normal(keys[1], (out, RANK)) * 0.05
    sets = [(q, a, b) for q in weights[:4]]
    size = q.nbytes + 2 * q.size + 4 * RANK * (out + inn)
    plain = xla.decode(q)
    wide = xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32)))
    update = 2.0 * jnp.matmul(b, a, precision="highest")
    want = wide + update

    def by_xla(q: QuantizedArray, a: jax.Array, b: jax.Array) -> jax.Array:
        wide = xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32)))
        return (wide + 2.0 * (b @ a)).astype(jnp.bfloat16)

    yield Case("decode + fold", "XLA", by_xla, sets, size, functools.partial(relative, want=want))
    for tiling in FOLDS:

        def fn(q: Any, a: Any, b: Any, dtype: Any = jnp.bfloat16, tiling: Tiling = tiling) -> Any:
            return gpu.decode_folded(q, a, -2.0 * b, dtype, tiling)

        def error(got: jax.Array, fn: Callable = fn) -> str:
            zero = bits_that_differ(jax.jit(fn)(q, a, 0 * b), plain)
            small = jax.jit(functools.partial(fn, dtype=jnp.float32))(q, a, b) - wide
            return f"{relative(got, want)}; update {relative(small, update)}; b=0: {zero}"

        yield Case("decode + fold", described(tiling), fn, sets, size, error)


def products(weights: list[QuantizedArray], m: int, key: jax.Array) -> Iterator[Case]:
    """`x @ W.T` for few rows."""
    group, q, keys = f"product, M={m}", weights[0], jax.random.split(key, len(weights))
    out, inn = q.matrix_shape
    xs = [jax.random.normal(k, (m, inn), jnp.bfloat16) for k in keys]
    # Each weight with three of the inputs, so that dispatching takes less of a product's share.
    sets = [(xs[k - turn], q) for turn in range(3) for k, q in enumerate(weights)]
    size = q.nbytes + 2 * m * (inn + out)
    wide = xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32)))
    want = jnp.matmul(xs[0].astype(jnp.float32), wide.T, precision="highest")
    error = functools.partial(relative, want=want)
    dense = [(x, jax.jit(xla.decode)(q)) for x, q in sets[:4]]
    size_of_dense = 2 * out * inn + 2 * m * (inn + out)
    yield Case(group, "bf16 weight", lambda x, w: x @ w.T, dense, size_of_dense, error)
    if m > 64:
        fn = lambda x, q: x @ xla.decode(q).T  # noqa: E731
        yield Case(group, "XLA decode, product", fn, sets, size, error)
        fn = lambda x, q: x @ gpu.decode(q, Tiling(rows=64)).T  # noqa: E731
        yield Case(group, "Pallas decode, product", fn, sets, size, error)
        return
    kernel = gpu.matvec if m <= 2 else gpu.matmul
    for tiling in PRODUCTS[m]:
        fn = functools.partial(kernel, dtype=jnp.bfloat16, tiling=tiling)
        yield Case(group, f"{kernel.__name__} {described(tiling)}", fn, sets, size, error)


def checks() -> Iterator[str]:
    """Small shapes with incomplete tiles, and other kinds: how far from the XLA path?"""
    for kind, block, double, (out, inn), dtype in (
        ("nf4", 64, True, (100, 192), jnp.bfloat16),
        ("fp4", 32, True, (40, 96), jnp.float16),
        ("int4", 128, False, (200, 768), jnp.bfloat16),
        ("q4_1", 32, False, (65, 64), jnp.float32),
    ):
        w = jax.random.normal(jax.random.key(out), (out, inn), dtype)
        q = lj.quantize_array(w, kind, block_size=block, double_quant=double, layout="o i")
        keys = jax.random.split(jax.random.key(inn), 3)
        a, b = jax.random.normal(keys[0], (8, inn)), jax.random.normal(keys[1], (out, 8))
        x = jax.random.normal(keys[2], (3, inn), dtype)
        plain = jax.jit(xla.decode)(q)
        wide = xla.decode(dataclasses.replace(q, dtype=np.dtype(np.float32)))
        folded = wide + 0.5 * jnp.matmul(b, a, precision="highest")
        product = jnp.matmul(x.astype(jnp.float32), wide.T, precision="highest")
        one, two = Tiling(64), Tiling(32, blocks=2, splits=2)
        found = [
            bits_that_differ(jax.jit(gpu.decode, static_argnums=1)(q, one), plain),
            relative(
                jax.jit(gpu.decode_folded, static_argnums=(3, 4))(q, a, -0.5 * b, dtype, one),
                folded,
            ),
        ]
        if kind != "q4_1":
            for kernel, tiling in ((gpu.matmul, one), (gpu.matmul, two), (gpu.matvec, two)):
                y = jax.jit(kernel, static_argnums=(2, 3))(x, q, jnp.float32, tiling)
                found.append(relative(y, product))
        yield f"check {kind} {block} {out}x{inn}: " + ", ".join(found)


def main() -> None:
    """Times every case, prints a table as it goes, and JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=int, default=14336)
    parser.add_argument("--inn", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=100.0, help="stop starting cases then")
    parser.add_argument("--groups", default="", help="only groups that contain this")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON here")
    args = parser.parse_args()

    start, device = time.perf_counter(), jax.devices()[0]
    print(device.device_kind, "JAX", jax.__version__, flush=True)
    keys = jax.random.split(jax.random.key(0), 16)
    make = jax.jit(random_weight, static_argnums=(1, 2))
    count = max(8, -(-240_000_000 // (args.out * args.inn // 2)))
    weights = [make(k, args.out, args.inn) for k in jax.random.split(keys[0], count)]

    if not args.groups:
        for text in checks():
            print(text, flush=True)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    groups: list[Iterator[Case]] = [
        copies(args.out, args.inn, keys[1]),
        iter([Case("empty", "nothing", lambda q: q.offset + 1, [(q,) for q in weights], 0)]),
        decodes(weights),
        folds(weights, keys[2]),
        *(products(weights, m, k) for m, k in zip((1, 4, 16, 64, 256), keys[3:], strict=False)),
    ]
    rows, skipped = [], 0
    for cases in itertools.zip_longest(*groups):  # in turn, so that no group goes without
        for case in cases:
            if case is None or args.groups not in case.group:
                continue
            if time.perf_counter() - start > args.seconds:
                skipped += 1
                continue
            rows.append(run(case))
            print(line(rows[-1]), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s, {skipped} cases skipped\n")
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        for row in sorted(of_group, key=lambda row: row["us"] or 1e9):
            print(line(row))
        print()
    text = json.dumps(
        {"device": device.device_kind, "jax": jax.__version__, "shape": [args.out, args.inn]}
        | {"rows": rows}
    )
    print(text)
    if args.json:
        args.json.write_text(text)


def run(case: Case) -> dict[str, Any]:
    """One case's numbers, or what went wrong."""
    row: dict[str, Any] = {"group": case.group, "name": case.name, "us": None}
    try:
        row["kernels"], row["passed"] = times(case.fn, case.sets)
        row["us"] = sum(row["kernels"].values())
        row["gb_per_s"] = round(case.bytes / row["us"] * 1e-3)
        if case.error is not None:
            row["error"] = case.error(jax.jit(case.fn)(*case.sets[0]))
    except Exception as error:  # a tiling that does not compile is a result, too
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    numbers = "failed"
    if row["us"] is not None:
        numbers = f"{row['us']:7.2f} us ({row['passed']:7.2f}) {row['gb_per_s']:6d} GB/s"
    return f"{row['group']:<14} {numbers:>32}  {row['name']:<64} {row.get('error', '')}"


if __name__ == "__main__":
    main()
