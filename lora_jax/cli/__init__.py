"""The command line: `lora-jax COMMAND --option value ...`.

A command is a module of this package with a frozen dataclass `Config`, whose fields are its options
and whose docstring is its help, and a function `run(config)` that returns the exit status:

    0    done
    1    the run itself failed, as by a loss that is not finite
    2    something asked for cannot be had: one sentence says what, and what to write instead
    130  Ctrl-C, and 143 SIGTERM: what was done is saved

Where what is not given follows from what is, as from `--adapter` the model that it was trained on,
there is a function `start(argv)`, too: it gives the config to begin from, or None.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "finetune": "LoRA and QLoRA of a language model, on your data or on headlines",
    "sweep": "many fine-tuning runs in one program, compared: ranks, learning rates, seeds",
    "generate": "text from a model and an adapter: a prompt, a file, a chat",
    "evaluate": "likelihood, accuracy and generations of a model and an adapter on data",
    "convert": "a run, an adapter or a model in the form that other programs read",
    "memory": "what a training step takes, and whether it fits, before it is compiled",
    "inspect": "what a model, a run or an adapter holds, and what a rule would match",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; those of the process, if None.

    Returns:
      The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: lora-jax COMMAND [--help] [--option value ...]\n")
        print("\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        return 0 if arguments else 2
    command = arguments.pop(0)
    if command not in COMMANDS:
        print(
            f"lora-jax: there is no command {command!r}; write one of {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2

    from lora_jax.cli.failures import CliError, Interrupted, interruptible
    from lora_jax.cli.parsing import parse

    # Orbax logs what an interrupted run has left behind, and what it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    prog = f"lora-jax {command}"
    try:
        with interruptible():
            module = importlib.import_module(f"lora_jax.cli.{command}")
            default = module.start(arguments) if hasattr(module, "start") else None
            return module.run(parse(module.Config, arguments, prog=prog, default=default))
    except CliError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
    except Interrupted as interrupted:
        print(f"{prog}: {interrupted}", file=sys.stderr)
        return interrupted.status
    except KeyboardInterrupt as interrupted:  # while fetching, which says so itself
        print(f"{prog}: {str(interrupted) or 'interrupted.'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has had enough, as `head` does
        sys.stderr.close()
        return 0
