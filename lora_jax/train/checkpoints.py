"""Checkpoints of a run, through Orbax: written beside the training, complete or not at all.

folder/<step>/arrays/   {path: array} of whatever tree is saved
folder/<step>/record/   JSON: the run's identity, and what else belongs to the step
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.rules import path_string

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints of a run are kept, and when they are written.

    A folder belongs to one run: `fit` continues from the newest checkpoint that it finds there.

    Attributes:
      folder: for checkpoints alone; it is made when it is needed.
      every: steps between two of them. Another is written at the end, whatever the end is.
      keep: how many of the newest stay.
      identity: what makes this run the one it is (model, rules, data, options), as JSON has it. A
        checkpoint of a run with another identity is refused.
    """

    folder: str | os.PathLike[str]
    every: int
    keep: int = 2
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        as_json("identity", self.identity)

    def latest_step(self) -> int | None:
        """Steps done in the newest complete checkpoint; None if there is none."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return None
        # A folder that is still being written has more in its name than a number.
        return max((int(x.name) for x in folder.iterdir() if x.name.isdecimal()), default=None)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Store]:
        """The folder, open; on leaving, what is being written is completed, whatever happened.

        Raises:
          OSError: if something could not be written.
        """
        store = Store(Path(self.folder).absolute(), self.keep, as_json("identity", self.identity))
        try:
            yield store
            store.wait()
        finally:
            store.close()


def _work(tasks: queue.SimpleQueue) -> None:
    """Does one task after the other, until there is None."""
    while _done(tasks.get()):
        pass


def _done(task: tuple[Callable, tuple, queue.SimpleQueue] | None) -> bool:
    """Does a task, of which nothing is held afterwards."""
    if task is None:
        return False
    fn, arguments, outcome = task
    try:
        outcome.put((fn(*arguments), None))
    except BaseException as error:  # which is the caller's to handle
        outcome.put((None, error))
    return True


class Found(NamedTuple):
    """The newest checkpoint: the steps done when it was written, and its record."""

    step: int
    record: dict[str, Any]


class Store:
    """An open folder of checkpoints; `fit` needs no other, and a loop of your own may use it.

    Everything that Orbax does is done by one thread, one after the other. So the caller goes on
    while a checkpoint is written; and a signal handler that raises, which happens in the main
    thread alone, never finds Orbax in the middle of something.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        self._folder, self._identity = folder, identity
        self._errors: list[BaseException] = []
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._tasks,), name="checkpoints", daemon=True
        )
        self._thread.start()
        self._manager: Any = None
        try:
            self._call(self._open, keep)
        except BaseException:
            self._tasks.put(None)
            raise

    def _open(self, keep: int) -> None:
        import orbax.checkpoint as ocp

        # Asynchronous is this class; what a killed process left behind is in nobody's use.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handlers = {
            "arrays": ocp.PyTreeCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def _call(self, fn: Callable, *arguments: Any) -> Any:
        """The result of a function, run by the thread after all that it has been given before."""
        with _disk_errors(self._folder):
            value, error = self._submit(fn, *arguments).get()
            if error is not None:
                raise error
            return value

    def _submit(self, fn: Callable, *arguments: Any) -> queue.SimpleQueue:
        """Gives the thread something to do; what comes of it, value and error, will be in here."""
        # These queues are written in C. An executor's locks are Python's, and one of them stays
        # locked for good if a signal handler raises right after it was taken.
        outcome: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((fn, arguments, outcome))
        return outcome

    def save(self, step: int, tree: Any, record: Mapping[str, Any]) -> None:
        """Writes a checkpoint while the caller goes on; the one before it is waited for.

        Args:
          step: steps done; nothing is done if there is a checkpoint of that step.
          tree: arrays. They are copied, and may be given away to the next step.
          record: anything that JSON can hold.

        Raises:
          OSError: if the one before could not be written. Of this one `wait` tells.
          TypeError: if the record is not for JSON.
        """
        whole = {"format": FORMAT, "identity": self._identity, "record": record}
        whole = as_json("record", whole)
        arrays = {name: jnp.copy(_plain(leaf)) for name, leaf in _named(tree).items()}
        self.wait()
        self._submit(self._save, step, arrays, whole)

    def _save(self, step: int, arrays: dict[str, jax.Array], record: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        try:
            if step not in self._manager.all_steps():
                arguments = ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record)
                )
                self._manager.save(step, args=arguments)
        except BaseException as error:
            self._errors.append(error)

    def wait(self) -> None:
        """Returns when what was saved is on the disk.

        Raises:
          OSError: if it could not be written.
        """
        self._call(lambda: None)
        if self._errors:
            with _disk_errors(self._folder):
                raise self._errors.pop(0)

    def close(self) -> None:
        """Completes what is being written; nothing can be saved after that."""
        self._submit(self._manager.close)
        self._tasks.put(None)
        self._thread.join()

    def find(self) -> Found | None:
        """The newest checkpoint, or None.

        Raises:
          ValueError: if it is of a run with another identity; each difference is spelled out.
        """
        step = self._call(self._manager.latest_step)
        if step is None:
            return None
        whole = self._call(self._read_record, step)
        if whole.get("format") != FORMAT:
            raise ValueError(
                f"{self._name(step)} has format {whole.get('format')!r}, this version reads "
                f"{FORMAT}; continue with the version of lora_jax that wrote it"
            )
        self._refuse(step, list(differences(whole["identity"], self._identity)))
        return Found(step, whole["record"])

    def read(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint.

        Args:
          step: from `find`.
          like: a tree of arrays like the one that was saved: in structure, shapes and dtypes.

        Returns:
          The tree, on the devices that `like` is on.

        Raises:
          ValueError: if its arrays are others; each difference is spelled out.
        """
        arrays = self._call(self._read_arrays, step)
        wanted = _named(like)
        there, here = (
            {name: f"{x.dtype}{list(x.shape)}" for name, x in tree.items()}
            for tree in (arrays, {name: _plain(x) for name, x in wanted.items()})
        )
        self._refuse(step, list(differences(there, here)))
        placed = [_placed(arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), placed)

    def _read_record(self, step: int) -> Any:
        import orbax.checkpoint as ocp

        arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments).record

    def _read_arrays(self, step: int) -> dict[str, np.ndarray]:
        import orbax.checkpoint as ocp

        # As NumPy arrays, to be placed by `read`: what eight devices wrote must load on one.
        metadata = self._manager.item_metadata(step).arrays.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        arguments = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return self._manager.restore(step, args=arguments).arrays

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self._folder}"

    def _refuse(self, step: int, differing: list[str]) -> None:
        if differing:
            more = f"; and {len(differing) - 12} more" if len(differing) > 12 else ""
            raise ValueError(
                f"{self._name(step)} is of another run: {'; '.join(differing[:12])}{more}. Write "
                "the options it was begun with, or another folder"
            )


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Each place where two JSON values differ, as a clause of a sentence."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*there, *(name for name in here if name not in there)]:
            inner = f"{path}.{name}" if path else name
            if name not in here:
                yield f"{inner} is {_short(there[name])} there and missing here"
            elif name not in there:
                yield f"{inner} is missing there and {_short(here[name])} here"
            else:
                yield from differences(there[name], here[name], inner)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif type(there) is not type(here) or there != here:
        yield f"{path} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def as_json(name: str, value: Any) -> Any:
    """A value as it comes back from JSON: tuples become lists.

    Raises:
      TypeError: if it cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(value, default=_as_dict))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} cannot be kept in a checkpoint: {error}; write numbers, strings, lists and "
            "dicts of them"
        ) from None


def _as_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is in it")


def _named(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {path_string(path): leaf for path, leaf in flat}
    if len(named) != len(flat):
        names = [path_string(path) for path, _ in flat]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves are both called {twice!r}; rename one")
    return named


def is_key(x: Any) -> bool:
    """Whether an array holds typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: jax.Array) -> jax.Array:
    """An array that can be written: of a PRNG key, its data."""
    return jax.random.key_data(x) if is_key(x) else x


def _placed(value: np.ndarray, like: jax.Array) -> jax.Array:
    """`value` as an array of JAX's own memory, which may be donated, where `like` is."""
    sharding = like.sharding if like.committed else None
    if is_key(like):
        keys = jax.random.wrap_key_data(jnp.array(value), impl=jax.random.key_impl(like))
        return keys if sharding is None else jax.device_put(keys, sharding)
    return jnp.copy(jnp.asarray(value) if sharding is None else jax.device_put(value, sharding))


@contextlib.contextmanager
def _disk_errors(folder: Any) -> Iterator[None]:
    """Lets what the file system refuses arrive as an `OSError`, whichever library met it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reasons = {
            "no space left": errno.ENOSPC,
            "resource_exhausted": errno.ENOSPC,
            "quota": errno.EDQUOT,
            "permission": errno.EACCES,
            "read-only": errno.EROFS,
        }
        number = next((n for words, n in reasons.items() if words in str(error).lower()), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error
