"""`lora-jax convert`: a model or an adapter in the form that another program reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from lora_jax.checkpoint import save_adapters
from lora_jax.cli.failures import CliError, on_interrupt, sentences, writing
from lora_jax.cli.found import KINDS, Found, look
from lora_jax.cli.options import Base, LogOptions, ModelOptions, at_least
from lora_jax.cli.parsing import read_object
from lora_jax.cli.problem import HUB_NAMES, load_adapter, read_for
from lora_jax.cli.report import Reporter, Rounds, mebibytes
from lora_jax.formats import read_model
from lora_jax.formats.folder import require_replaceable
from lora_jax.formats.hf import read_descriptions
from lora_jax.formats.hf_write import DTYPES, check_target, write_hf
from lora_jax.formats.outline import Outline, read_outline
from lora_jax.formats.peft import read_peft, write_peft
from lora_jax.formats.sources import SourceError, fetch
from lora_jax.models.decoder import parameter_shapes

GIGABYTE = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Subject:
    """What to convert, and into what."""

    source: Positional[Annotated[str, arg(metavar="SRC")]]
    """The folder of a run or of an adapter, ours or PEFT's, or a model, as for finetune --model."""
    destination: Positional[Annotated[Path, arg(metavar="DST")]]
    """A new folder, or an older one of the same kind, which is replaced; of a GGUF adapter a new
    file."""
    to: Literal["hf", "peft", "gguf-adapter", "lora-jax"] = "hf"
    """hf: a whole model for transformers, into which an adapter is merged. The others write the
    adapter alone: peft for peft, gguf-adapter for llama.cpp, lora-jax for lj.load_adapters."""
    model: Annotated[str | None, arg(metavar="SOURCE")] = None
    """The model of an adapter, as for finetune --model; if not given, that of its run, or the one
    that PEFT's config names."""
    base: Base | None = None
    """How the model's kernels are stored before that, as for finetune --base: of a run as it was
    trained, if not given, else float32. For hf."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of what is written; if not given, a model's as its own config.json says, else float32, and
    an adapter's as it is."""
    shard_size: float = 5.0
    """The most gigabytes of a file of weights. For hf."""

    def __post_init__(self) -> None:
        at_least(self, 1e-3, "shard_size")


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes a model or an adapter for other programs. What SRC is, is found by looking.

        lora-jax convert runs/mine merged
        lora-jax convert runs/mine adapter --to peft
        lora-jax convert model.gguf folder --dtype bfloat16

    The first gives a folder that transformers loads, with the adapter merged into the model that
    the run was on, the second one that peft loads. DST appears whole or not at all.
    """

    subject: Subject
    output: LogOptions


# How the adapter of a folder is read, given the parameters, or their shapes, that it belongs to.
ADAPTERS: Mapping[str, Callable[[Path, Any], Any]] = {
    "run": load_adapter,
    "adapter": load_adapter,
    "peft": read_peft,
}
MODELS = ("hf", "gguf")
# What llama.cpp calls a family of transformers, where that is another name.
ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}


class Form(NamedTuple):
    """What can be written.

    Attributes:
      what: it is, in words.
      use: how others load it, with a place for its name.
      check: raises the `FileExistsError` of a place that is taken.
      write: writes it, of what was found and for the options that say how.
    """

    what: str
    use: str
    check: Callable[[Path], None]
    write: Callable[[Found, Subject, Reporter], None]


def run(config: Config) -> int:
    """Runs the command.

    Args:
      config: its options.

    Returns:
      The exit status.

    Raises:
      CliError: if something asked for cannot be had.
      Interrupted: on Ctrl-C or SIGTERM.
    """
    options, reporter = config.subject, Reporter(config.output.log)
    found, form = look(options.source, reporter), FORMS[options.to]
    _require_convertible(found, options)
    with sentences(OSError):
        form.check(options.destination)
    with (
        on_interrupt(lambda: f"{options.destination} is as it was."),
        sentences(SourceError, ValueError, OSError),
    ):
        form.write(found, options, reporter)
    path = options.destination
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    reporter.say(f"{path} is {form.what}, {mebibytes(size)} MiB; {form.use.format(path)}.")
    reporter.event("converted", to=options.to, path=path, bytes=size)
    return 0


def _require_convertible(found: Found, options: Subject) -> None:
    """Whether what was found can become what is asked for.

    Raises:
      CliError: if not.
    """
    if found.kind in MODELS:
        if options.to != "hf":
            raise CliError(
                f"{found.path} is a whole model, and --to {options.to} writes an adapter; write "
                "--to hf, or the folder of a run or of an adapter."
            )
        if options.model is not None:
            raise CliError(f"{found.path} is a model itself; leave out --model {options.model}.")
    elif found.kind in ADAPTERS:
        if options.to != "hf" and options.base is not None:
            raise CliError(
                f"--base {options.base} is about a model, and --to {options.to} writes none; leave "
                "it out, or write --to hf."
            )
    else:
        known = ", ".join(KINDS[kind] for kind in (*ADAPTERS, *MODELS))
        raise CliError(f"{found}, which cannot be converted; expected {known}.")


# The model of what was found.


def _model_options(found: Found, options: Subject) -> ModelOptions:
    """The model, and how it is stored, as the adapter met it."""
    if found.kind in MODELS:
        model = ModelOptions(str(found.path), base="float32")
    elif found.kind == "run":
        model = ModelOptions.of_run(str(found.path))
    elif (name := options.model or _named_model(found)) is not None:
        model = ModelOptions(name, base="float32")
    else:
        raise CliError(f"{found}, which does not say what model it is for; write --model SOURCE.")
    return dataclasses.replace(
        model, model=options.model or model.model, base=options.base or model.base
    )


def _may_differ(found: Found) -> bool:
    """Whether ranks and scales may be others in each layer, so that layers cannot be stacked."""
    return found.kind == "peft"


def _peft_name(found: Found) -> str | None:
    """What PEFT's config calls the model of an adapter, if that is what was found."""
    if found.kind != "peft":
        return None
    return read_object(found.path / "adapter_config.json").get("base_model_name_or_path")


def _named_model(found: Found) -> str | None:
    """The same as `fetch` takes it."""
    if not (name := _peft_name(found)):
        return None
    known = {hub: own for own, hub in HUB_NAMES.items()}
    return known.get(name) or (name if Path(name).exists() else f"hf:{name}")


# What is written.


def _write_model(found: Found, options: Subject, reporter: Reporter) -> None:
    """A whole model, with the adapter if there is one.

    Every tensor goes from the source's files into the new ones before the next is read.
    """
    described, adapters = _model_options(found, options), None
    dtype = np.dtype(options.dtype or _own_dtype(described.model))
    if found.kind in MODELS and options.base is None:
        reporter.say(f"It is written in {dtype}.")
        checkpoint = read_model(found.path, dtype=dtype, lazy=True)
    else:
        reporter.say(
            f"{described.model} is read, its kernels are stored in {described.base}, "
            f"{'the adapter is merged, ' * (found.kind in ADAPTERS)}and it is written in {dtype}."
        )
        scanned = not _may_differ(found)
        checkpoint = read_for(described.base, described.model, scan_layers=scanned, lazy=True)
        if found.kind in ADAPTERS:
            shapes = parameter_shapes(checkpoint.config)
            adapters = ADAPTERS[found.kind](found.path, shapes)
    with _into(options.destination), _progress(reporter) as progress:
        write_hf(
            options.destination,
            checkpoint,
            adapters,
            dtype=dtype,
            shard_size=round(options.shard_size * GIGABYTE),
            progress=progress,
        )


def _own_dtype(source: str) -> str:
    """The dtype that a model folder says it has; of everything else the widest."""
    path = fetch(source)
    if not path.is_dir():
        return "float32"
    fields = read_descriptions(path)["config.json"]
    own = fields.get("dtype") or fields.get("torch_dtype")
    return own if own in DTYPES else "float32"


class Adapted(NamedTuple):
    """An adapter, and what is known of its model, of which no weight is read.

    Attributes:
      adapters: the tree.
      model: the heads of the model's files.
      name: what others call it.
    """

    adapters: Any
    model: Outline
    name: str

    @classmethod
    def read(cls, found: Found, options: Subject) -> Adapted:
        """Reads the adapter for the shapes of its model."""
        source = _model_options(found, options).model
        outline = read_outline(fetch(source))
        # Our own adapters are for scanned layers wherever a command reads them.
        scanned = options.to == "lora-jax" or not _may_differ(found)
        config = dataclasses.replace(outline.config(), scan_layers=scanned)
        adapters = ADAPTERS[found.kind](found.path, parameter_shapes(config))
        name = None if options.model else _peft_name(found)
        return cls(adapters, outline, name or HUB_NAMES.get(source, outline.name))

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the model's family."""
        metadata = self.model.metadata
        if "general.architecture" in metadata:
            return metadata["general.architecture"]
        family = metadata["config.json"]["model_type"]
        return ARCHITECTURES.get(family, family)


def _write_peft(found: Found, options: Subject, reporter: Reporter) -> None:
    adapters, _, name = Adapted.read(found, options)
    with _into(options.destination):
        write_peft(options.destination, adapters, base_model=name, dtype=_dtype(options))


def _write_own(found: Found, options: Subject, reporter: Reporter) -> None:
    adapters, _, _ = Adapted.read(found, options)
    with _into(options.destination):
        save_adapters(options.destination, adapters, dtype=_dtype(options))


def _write_gguf(found: Found, options: Subject, reporter: Reporter) -> None:
    from lora_jax.formats.gguf_adapter import write_gguf_adapter

    adapted = Adapted.read(found, options)
    with _into(options.destination):
        write_gguf_adapter(
            options.destination,
            adapted.adapters,
            adapted.model.config(),
            architecture=adapted.architecture,
            base_model=adapted.name,
            dtype=_dtype(options) or np.float32,
        )


def _require_free(path: Path) -> None:
    """A file is never written over: it might be the model's own."""
    if path.exists():
        raise FileExistsError(f"{path} is there already; write the name of a new file.")


def _dtype(options: Subject) -> Any:
    return None if options.dtype is None else np.dtype(options.dtype)


def _into(path: Path) -> Any:
    """Turns what goes wrong on the disk into a sentence about what to do."""
    return writing(path, "make room, or write a DST on another disk; what was there is as it was.")


@contextlib.contextmanager
def _progress(reporter: Reporter) -> Iterator[Callable[[int, int], None]]:
    """Shows how many tensors are written, once it is known how many there are."""
    with contextlib.ExitStack() as stack:
        rounds: list[Rounds] = []

        def advance(done: int, total: int) -> None:
            if not rounds:
                rounds.append(stack.enter_context(reporter.progress("writing", total, lines=4)))
            rounds[0].advance()

        yield advance


FORMS: Mapping[str, Form] = {
    "hf": Form(
        "a model folder for transformers",
        'AutoModelForCausalLM.from_pretrained("{}") loads it',
        check_target,
        _write_model,
    ),
    "peft": Form(
        "an adapter for peft",
        'PeftModel.from_pretrained(model, "{}") loads it',
        functools.partial(
            require_replaceable, own=r"adapter_config\.json|adapter_model\.safetensors"
        ),
        _write_peft,
    ),
    "gguf-adapter": Form(
        "an adapter for llama.cpp",
        "llama-server --model MODEL.gguf --lora {} loads it",
        _require_free,
        _write_gguf,
    ),
    "lora-jax": Form(
        "an adapter of lora_jax",
        'lj.load_adapters("{}", base) loads it',
        functools.partial(require_replaceable, own=r"adapters\.json|arrays"),
        _write_own,
    ),
}
