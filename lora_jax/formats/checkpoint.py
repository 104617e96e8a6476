"""A published model, whatever the files it came in, and the way its tensors find their places.

Formats agree on more than they admit: a model is a list of named tensors, kernels are `[out, in]`,
and every layer calls its own by the same names. A reader therefore says how its format calls them
(`Naming`) and hands them over unread (`Tensor`); `assemble` compares the names and shapes with
those that the decoder asks for, and then reads one tensor at a time. A kernel may arrive in 4 bits,
because the file has it so or because it is stored so as it arrives; it stays as it is. The way back
is in `disassembly`: the tensors that a format asks for, each computed when it is read. Between the
two nothing need be in memory: a leaf may stay in its files (`Unread`).

Shapes: V vocabulary, D model width, L layers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.leaves import QuantizedArray
from lora_jax.core.rules import path_string
from lora_jax.formats.quantization import Quantization, Store
from lora_jax.models.decoder import DecoderConfig, parameter_shapes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LISTED = 3  # names that an error lists of those that are wrong
_ALIGNMENT = 64  # bytes


class SpecialTokens(NamedTuple):
    """The tokens around a text, which no text contains; None for one that the model does without.

    Attributes:
      bos: Begins every sequence.
      eos: Ends what the model writes.
    """

    bos: int | None
    eos: int | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it was published.

    Attributes:
      config: The decoder to run it with.
      params: Its parameters in the tree of `lora_jax.models.decoder`: NumPy arrays, and
        `QuantizedArray`s of them; or `Unread` leaves.
      tokenizer: Text to token ids and back. What it adds by itself is left to its caller: write
        `encode(text, add_special_tokens=False)`, and `special.bos` in front.
      special: The tokens that begin and end a sequence.
      stop: Every token that ends what the model writes, `special.eos` among them.
      chat_template: A Jinja template that makes a prompt of messages, if the model has one.
      name: What the model is called: `owner/name` on the hub, else its file or folder.
      digest: SHA-256 of the weights' file in hexadecimal; of several, that of their digests.
      metadata: What else the files say: a GGUF file's pairs by their keys (`general.license`, ...),
        or the content of a folder's JSON files by their names (`config.json`, ...).
      folder: Where those files lie, of a model that came in a folder.
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    special: SpecialTokens
    stop: tuple[int, ...]
    chat_template: str | None
    name: str
    digest: str
    metadata: Mapping[str, Any]
    folder: Path | None = None


class Place(NamedTuple):
    """Where a tensor belongs in the tree of the scanned decoder.

    Attributes:
      path: Of the leaf, such as `layers/attn/q_proj/kernel`.
      leading: Index on the leaf's leading axes: of the layer and expert, if it belongs to one.
    """

    path: str
    leading: tuple[int, ...] = ()

    def shape(self, params: Any) -> tuple[int, ...]:
        """The shape that the tensor is stored in: kernels as [out, in], all else as it is."""
        shape = leaf_at(params, self.path).shape[len(self.leading) :]
        return shape[::-1] if self.path.endswith("/kernel") else shape

    def home(self, *, scan_layers: bool) -> Place:
        """Where it belongs in the tree of scanned layers, or in that of separate ones."""
        if not self.leading or scan_layers:
            return self
        layer, *leading = self.leading
        return Place(self.path.replace("layers/", f"layers_{layer}/", 1), tuple(leading))


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a format calls the tensors of a decoder, whether or not a decoder has all of them.

    Attributes:
      whole: A path for each name.
      layered: The same for the tensors of a layer, whose number stands in the name as `{}`.
      expert: The same for the tensors of a layer's expert, whose number follows as a second `{}`.
    """

    whole: Mapping[str, str]
    layered: Mapping[str, str]
    expert: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def places(self, config: DecoderConfig, params: Any) -> dict[str, Place]:
        """Every tensor that the decoder of these parameters needs, and where it belongs."""
        found = {name: Place(path) for name, path in self.whole.items()}
        for layer in range(config.num_layers):
            found |= {name.format(layer): Place(p, (layer,)) for name, p in self.layered.items()}
            for expert in range(config.num_experts):
                index = (layer, expert)
                found |= {name.format(*index): Place(p, index) for name, p in self.expert.items()}
        leaves = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        found = {name: place for name, place in found.items() if place.path in leaves}
        assert leaves == {place.path for place in found.values()}
        return found


class Tensor(NamedTuple):
    """A tensor of a file, not read yet.

    Attributes:
      name: By the file's own naming.
      shape: In which it is stored: a kernel is [out, in], an embedding [V, D], a norm [D].
      read: Returns its values in that shape, in any dtype that casts to the parameters'; or, of a
        kernel that the file keeps in 4 bits, a `QuantizedArray` of layout "o i".
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray | QuantizedArray]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How tensors are taken in.

    Attributes:
      quantize: What to store in 4 bits as it arrives; nothing if None.
      place: Called with the path and the value of each leaf as soon as it is whole; what it returns
        stands in the tree, such as the leaf on its devices.
      progress: Called after each tensor with the numbers of those read, and of all.
      strict: Whether tensors that have no place are an error. Missing ones always are.
      lazy: Whether leaves stay in their files, as `Unread`; then nothing is placed or counted.
    """

    quantize: Quantization | None = None
    place: Callable[[str, Any], Any] | None = None
    progress: Callable[[int, int], None] | None = None
    strict: bool = True
    lazy: bool = False


@dataclasses.dataclass(frozen=True)
class Unread:
    """A leaf that is still in its files: a part of it is read whenever somebody asks for it.

    >>> kernel = leaf[3, 17]  # of layer 3 and its expert 17

    Attributes:
      shape: Of the leaf.
      dtype: Of the parameters; a part in 4 bits may decode to another.
      parts: What reads a part, by its index on the leading axes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: dict[tuple[int, ...], Callable[[], np.ndarray | QuantizedArray]]

    def __getitem__(self, leading: tuple[int, ...]) -> np.ndarray | QuantizedArray:
        """Reads a part; raises as `stored`."""
        part = self.stored(leading)
        return part.astype(self.dtype, copy=False) if isinstance(part, np.ndarray) else part

    def stored(self, leading: tuple[int, ...]) -> np.ndarray | QuantizedArray:
        """Reads a part, of whatever dtype the file has it.

        Raises:
          ValueError: If it is no longer there, or cannot be quantized.
        """
        try:
            return self.parts[leading]()
        except OSError as error:
            raise ValueError(f"a tensor cannot be read any more: {error}") from error

    def abstract(self) -> Any:
        """The shapes of the leaf, by reading one part of it; the others are taken to be alike."""
        leading = next(iter(self.parts))
        sizes = self.shape[: len(leading)]
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*sizes, *np.shape(x)), x.dtype), self[leading]
        )


def assemble(
    config: DecoderConfig,
    naming: Naming,
    tensors: Sequence[Tensor],
    *,
    scan_layers: bool,
    reading: Reading = Reading(),
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads the tensors one by one, each into its place.

    So memory holds the parameters and one tensor, which may be of any size on disk.

    Args:
      config: The decoder that the files describe; `param_dtype` is what is read into.
      naming: What the tensors are called.
      tensors: All of them, in the order of the file.
      scan_layers: Whether the parameters are to be those of scanned layers.
      reading: How they are taken in.

    Returns:
      The config with `scan_layers`, and the parameters, of NumPy arrays.

    Raises:
      ValueError: If tensors are missing, doubled, of another shape, or not the decoder's, and
        nothing is read then; if layers that are to be stacked are stored in different ways; or if a
        pattern of `quantize` matches nothing.
    """
    config = dataclasses.replace(config, scan_layers=True)
    parts = config.num_layers * max(1, config.num_experts)
    if parts > len(tensors):  # before all that they would be called is listed
        raise ValueError(
            f"the metadata describe {config.num_layers:,} layers of {config.num_experts:,} experts "
            f"each, but there are {len(tensors):,} tensors in all"
        )
    shapes = parameter_shapes(config)
    places = naming.places(config, shapes)
    expected = {name: place.shape(shapes) for name, place in places.items()}
    tensors = _compared(expected, tensors, strict=reading.strict)
    homes = {name: place.home(scan_layers=scan_layers) for name, place in places.items()}
    lacking = collections.Counter(home.path for home in homes.values())  # what leaves wait for
    store = None
    if reading.quantize is not None:
        store = reading.quantize.store(list(lacking), config.param_dtype)
    leaves: dict[str, Any] = {}
    for number, tensor in enumerate(tensors, 1):
        place, (path, leading) = places[tensor.name], homes[tensor.name]
        shape = leaf_at(shapes, place.path).shape[len(place.leading) - len(leading) :]
        if reading.lazy:
            leaf = leaves.setdefault(path, Unread(shape, np.dtype(config.param_dtype), {}))
            leaf.parts[leading] = functools.partial(_taken_in, tensor, path, store)
            continue
        values = _taken_in(tensor, path, store)
        if path not in leaves:
            leaves[path] = _room_for(values, shape[: len(leading)], config.param_dtype)
        _put(leaves[path], leading, values, path)
        del values  # or it would still be there while the next one is read
        lacking[path] -= 1
        if reading.place is not None and not lacking[path]:
            leaves[path] = reading.place(path, leaves[path])
        if reading.progress is not None:
            reading.progress(number, len(tensors))
    return dataclasses.replace(config, scan_layers=scan_layers), _nested(leaves)


def _taken_in(tensor: Tensor, path: str, store: Store | None) -> np.ndarray | QuantizedArray:
    """What is kept of a tensor, in the axes of the parameter."""
    values = tensor.read()
    if store is not None and not isinstance(values, QuantizedArray):
        values = store(path, values)
    return _as_parameter(values, path)


def _as_parameter(values: np.ndarray | QuantizedArray, path: str) -> Any:
    """A tensor with the axes that the decoder's parameter has; kernels are [in, out] there."""
    if not path.endswith("/kernel"):
        return values
    if isinstance(values, QuantizedArray):
        out, width = values.axis_sizes
        return dataclasses.replace(values, layout="i o", axis_sizes=(width, out))
    return values.T


def _room_for(leaf: Any, sizes: tuple[int, ...], dtype: DTypeLike) -> Any:
    """A leaf with leading axes of these sizes, not filled yet; dense ones of `dtype`."""
    if not isinstance(leaf, QuantizedArray):
        return _empty((*sizes, *leaf.shape), np.dtype(dtype))
    return jax.tree.map(lambda x: _empty((*sizes, *np.shape(x)), x.dtype), leaf)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that begins where XLA wants it, so that placing it on a CPU copies nothing."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _structure(leaf: Any) -> Any:
    return jax.tree.structure(leaf)


def _put(room: Any, leading: tuple[int, ...], leaf: Any, path: str) -> None:
    there, here = map(_structure, (room, leaf))
    if there != here:
        ways = [repr(x) if isinstance(x, QuantizedArray) else "dense" for x in (leaf, room)]
        raise ValueError(
            f"{path} is stored in one way at {list(leading)} ({ways[0]}) and in another before it "
            f"({ways[1]}), so that they cannot be stacked; layers need not be: scan_layers=False"
        )
    for there, x in zip(jax.tree.leaves(room), jax.tree.leaves(leaf), strict=True):
        there[leading] = x


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree whose leaves have these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[name] = leaf
    return tree


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of a file in hexadecimal; of several, that of a list of their names and digests."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def leaf_at(tree: Any, path: str) -> Any:
    """The leaf, or the part of a tree, that a path leads to."""
    return functools.reduce(operator.getitem, path.split("/"), tree)


def _compared(
    expected: Mapping[str, tuple[int, ...]], tensors: Sequence[Tensor], *, strict: bool
) -> list[Tensor]:
    """Every tensor once, in the shape that the decoder asks for, and no other."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = [tensor.name for tensor in tensors]
    homeless = [name for name in shapes if name not in expected]
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "without a place in this decoder": homeless if strict else [],
        "more than once in the files": [name for name in shapes if names.count(name) > 1]
        if len(shapes) < len(names)
        else [],
        "of another shape": [
            f"{name} ({shape}, expected {expected[name]})"
            for name, shape in shapes.items()
            if shape != expected.get(name, shape)
        ],
    }
    if found := [f"{some(names)} {what}" for what, names in wrong.items() if names]:
        raise ValueError(
            f"the tensors are not those of the model that the metadata describe: {'; '.join(found)}"
        )
    if homeless:
        warnings.warn(
            f"{some(homeless)} without a place in this decoder, and left out", stacklevel=2
        )
    return [tensor for tensor in tensors if tensor.name in expected]


def some(names: Collection[str]) -> str:
    """Up to three names, and how many more there are."""
    listed = ", ".join(list(names)[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{listed}{more} {'is' if len(names) == 1 else 'are'}"
