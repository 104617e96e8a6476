"""The command line: `lora-jax COMMAND --option value ...`.

A command is a module of this package with a frozen dataclass `Config`, whose fields are its options
and whose docstring is its help, and a function `run(config)` that returns the exit status:

    0    done
    1    the run itself failed, as by a loss that is not finite
    2    something asked for cannot be had: one sentence says what, and what to write instead
    130  Ctrl-C, and 143 SIGTERM: what was done is saved
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

COMMANDS = {"finetune": "QLoRA of a language model on labelled sentences"}


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

    import tyro

    from lora_jax.cli.failures import CliError, Interrupted, interruptible

    module = importlib.import_module(f"lora_jax.cli.{command}")
    config = tyro.cli(module.Config, prog=f"lora-jax {command}", args=arguments)
    try:
        with interruptible():
            return module.run(config)
    except CliError as error:
        print(f"lora-jax {command}: {error}", file=sys.stderr)
        return error.status
    except Interrupted as interrupted:
        print(f"lora-jax {command}: {interrupted}", file=sys.stderr)
        return interrupted.status
    except KeyboardInterrupt as interrupted:  # while fetching, which says so itself
        print(f"lora-jax {command}: {str(interrupted) or 'interrupted.'}", file=sys.stderr)
        return 128 + signal.SIGINT
