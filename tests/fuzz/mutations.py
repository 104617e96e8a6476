"""Changes to files that leave most of them in order, so that what is read gets past the beginning.

Random bytes never are JSON, nor have the length that stands before them. So a file is taken apart,
one thing in it is changed, and it is put together again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

# From bytes, the most that may come out, and a seed to other bytes.
Mutation = Callable[[bytes, int, int], bytes]

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 31, 64, 127, 255, 256, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**48, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
DEEP = 0
for _ in range(90):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 8, 2**31, 2**63, 2**64, 10**9, -(10**9), 10**400),
    *(0.0, -0.5, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "a",
        "1",
        "a\nb",
        "\ud800",
        "\x00",
        "../a",
        "/etc/passwd",
        ".",
        "..",
        "(a+)+b",
        "(",
        "a" * 600,
    ),
    *([], {}, [0], [""], [None], {"a": 0}, {"": {}}, [[]], [1, 2], [-1, 0], [2**62, 4], DEEP),
)


def change_json(text: bytes, rng: random.Random, words: tuple[str, ...]) -> bytes:
    """JSON with one thing in it changed; `words` are names that mean something to the reader."""
    try:
        root = [json.loads(text)]
    except (ValueError, RecursionError):
        return text
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [root]
    while stack and len(places) < 2_000:
        node = stack.pop()
        for key in range(len(node)) if isinstance(node, list) else list(node):
            places.append((node, key))
            if isinstance(node[key], list | dict):
                stack.append(node[key])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = rng.choice(places)
        _change(node, key, places, rng, words)
    try:
        changed = json.dumps(root[0])
    except (RecursionError, ValueError):
        return text
    if rng.random() < 0.05:  # a name twice
        name = json.dumps(rng.choice([str(key) for _, key in places]))
        changed = changed.replace("{", f"{{{name}: 0, ", 1)
    return changed.encode("utf-8", "surrogatepass")


def _change(
    node: Any, key: Any, places: list[Any], rng: random.Random, words: tuple[str, ...]
) -> None:
    if (isinstance(node, list) and key >= len(node)) or (
        isinstance(node, dict) and key not in node
    ):
        return
    what = rng.random()
    if what < 0.4:
        node[key] = rng.choice(VALUES)
    elif what < 0.5 and words:
        node[key] = rng.choice(words)
    elif what < 0.6:
        other, where = rng.choice(places)
        try:
            node[key] = json.loads(json.dumps(other[where]))
        except (LookupError, TypeError, ValueError, RecursionError):
            node[key] = None
    elif what < 0.7 and isinstance(node[key], int | float):
        try:
            node[key] = rng.choice((node[key] + 1, node[key] - 1, -node[key], node[key] * 2.0))
        except OverflowError:
            node[key] = -1
    elif what < 0.8:
        node[key] = [node[key]]
    elif what < 0.9 and isinstance(node, dict):
        node[rng.choice([*words, "a", "", "a\nb"])] = rng.choice((node[key], rng.choice(VALUES)))
    elif isinstance(node, dict) or len(node) > 1:
        del node[key]


def json_mutation(words: tuple[str, ...] = (), *, share: float = 0.9) -> Mutation:
    """Changes of a JSON file; at times of its bytes."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < share and len(found := change_json(data, rng, words)) <= most:
            return found
        return change_bytes(data, most, rng)

    return mutate


def change_bytes(data: bytes, most: int, rng: random.Random) -> bytes:
    """Some bytes overwritten, cut out, put in, or a number among them set to a peculiar one."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        what = rng.random()
        if what < 0.4:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % 256**size
            found[at : at + size] = number.to_bytes(size, "little")
        elif what < 0.55:
            del found[at : at + rng.choice((1, 2, 8, 64, 1 << 12))]
        elif what < 0.7:
            found[at:at] = found[: rng.randrange(64)] if rng.random() < 0.5 else rng.randbytes(4)
        else:
            found[at : at + 1] = rng.randbytes(1)
    return bytes(found[:most])


def with_length(header: bytes, values: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + values


def safetensors_mutation(words: tuple[str, ...] = ()) -> Mutation:
    """Changes of a safetensors file: its header, or a tensor, to which the header is fitted."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        length = int.from_bytes(data[:8], "little")
        header, values = data[8 : 8 + length], data[8 + length :]
        what = rng.random()
        if what < 0.5 and length < len(data):
            found = with_length(change_json(header, rng, words), values)
        elif what < 0.9 and length < len(data):
            found = _fitted(header, values, rng, words) or change_bytes(data, most, rng)
        else:
            found = change_bytes(data, most, rng)
        return found if len(found) <= most else data

    return mutate


def _fitted(
    header: bytes, values: bytes, rng: random.Random, words: tuple[str, ...]
) -> bytes | None:
    """The tensors with one of them changed, in a header that is true of them."""
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        parts = {
            name: [about["dtype"], about["shape"], values[slice(*about["data_offsets"])]]
            for name, about in described.items()
        }
        name = rng.choice(list(parts))
        part = parts[name]
        what = rng.random()
        if what < 0.6 and part[2][:1] == b"{":
            part[2] = change_json(part[2], rng, words)
            part[1] = [len(part[2])]
        elif what < 0.7:
            part[2] = change_bytes(part[2], len(part[2]), rng).ljust(len(part[2]), b"\xff")
        elif what < 0.8:
            parts[rng.choice([*words, name + "a", name[1:]])] = parts.pop(name)
        elif what < 0.9:
            del parts[name]
        else:
            part[0] = rng.choice(("F32", "F16", "BF16", "U8", "F64", "I8"))
        described, content = {}, b""
        for name, (dtype, shape, values) in parts.items():
            offsets = [len(content), len(content) + len(values)]
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            content += values
        return with_length(json.dumps(described).encode(), content)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def gguf_mutation(keys: tuple[str, ...]) -> Mutation:
    """Changes of a GGUF file: its bytes, or one of its pairs, or one more in front of them."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        what = rng.random()
        if what < 0.7 and len(data) > 24:
            try:
                begin, end = rng.choice(_pairs(data)) if what < 0.5 else (24, 24)
            except (struct.error, LookupError, OverflowError):
                return change_bytes(data, most, rng)
            pairs = int.from_bytes(data[16:24], "little")
            pairs += rng.choice((1, 1, 1, 0, 2)) if begin == end else 0
            key = data[begin : begin + 8 + int.from_bytes(data[begin : begin + 8], "little")]
            pair = b"" if rng.random() < 0.1 else _pair(key if begin < end else b"", keys, rng)
            pairs -= begin < end and not pair
            head = data[:16] + struct.pack("<Q", pairs % 2**64) + data[24:begin]
            return (head + pair + data[end:])[:most]
        return change_bytes(data, most, rng)

    return mutate


def _pair(key: bytes, keys: tuple[str, ...], rng: random.Random) -> bytes:
    return (key or text(rng.choice(keys))) + _value(rng)


def _pairs(data: bytes) -> list[tuple[int, int]]:
    """From where to where each pair of a GGUF file reaches."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at, found = 24, []
    for _ in range(min(100, struct.unpack_from("<Q", data, 16)[0])):
        begin = at
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        (kind,) = struct.unpack_from("<I", data, at)
        at, count = at + 4, 1
        if kind == 9:
            kind, count = struct.unpack_from("<IQ", data, at)
            at += 12
        for _ in range(min(count, 100)):
            at += 8 + struct.unpack_from("<Q", data, at)[0] if kind == 8 else sizes[kind]
        found.append((begin, at))
    return found


def text(value: str) -> bytes:
    """A text as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(rng: random.Random) -> bytes:
    """Some value as GGUF has it, with its type."""
    what = rng.randrange(8)
    if what == 0:
        return struct.pack("<I", 8) + text(rng.choice(("llama", "gpt2", "smollm", "none", "a\nb")))
    if what == 1:
        return struct.pack("<If", 6, rng.choice((0.0, -1.0, 1e-5, float("nan"), float("inf"))))
    if what == 2:
        return struct.pack("<IB", 7, rng.randrange(3))
    if what == 3:
        number = rng.choice((0, 1, 2, 3, rng.choice(NUMBERS)))
        return struct.pack("<IIQ", 9, rng.choice((4, 5, 8, 9)), number)
    if what == 4:
        return struct.pack("<IQ", 10, rng.choice(NUMBERS))
    if what == 5:
        texts = [rng.choice(("a", "b", "ab", "a b", "ab c", "", "abc", "c a b")) for _ in range(4)]
        return struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(map(text, texts))
    if what == 6:
        return struct.pack("<IIQ4i", 9, 5, 4, *rng.choices((-1, 0, 1, 3), k=4))
    return struct.pack("<Ii", 5, rng.choice((-1, 0, 1, 2, 4, 8, 32, 2**31 - 1)))


def first_byte_mutation(kinds: int, mutations: dict[int, Mutation]) -> Mutation:
    """Changes of what follows a first byte, which says what it is; at times of that byte."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        kind = rng.randrange(kinds) if not data or rng.random() < 0.02 else data[0] % kinds
        rest = data[1:]
        if kind in mutations:
            return bytes([kind]) + mutations[kind](rest, most - 1, seed)
        return bytes([kind]) + change_bytes(rest, most - 1, rng)

    return mutate
