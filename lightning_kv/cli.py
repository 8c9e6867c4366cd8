"""The table of commands; errors in three parts. What a command needs waits in its own file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightning_kv import __version__
from lightning_kv.commands.options import Command
from lightning_kv.commands.parsing import parse as parse_words
from lightning_kv.commands.terminal import fail
from lightning_kv.utilities.errors import of_system, said_by
from lightning_kv.utilities.nearest import hint

COMMANDS = {
    "evaluate": "roll out the reference and every policy from the same prompts and noise",
    "compare": "the same metrics and statistics for videos that you already have",
    "check": "is a run worse than an earlier one: a gate for continuous integration",
    "recommend": "which policy to run, from a run's results: what it saves and costs",
    "budgets": "frames of each head from measured head curves, and what that gains",
    "report": "write report.html again, of one run or several, finished or not",
    "inspect": "the same in the terminal",
    "calibrate": "what each head loses with fewer frames, for budgets by head",
    "distill": "teach a small scorer, by hindsight, which frames will be looked at",
    "prove": "whether budgets by head, or a learned scorer, hold on held-out prompts",
    "generate": "one video from a prompt, and what its cache cost",
    "pretrain": "train the embedded panorama model",
    "pretrain-encoder": "train the encoder that its clips are compared with",
    "list": "policies, parts, models or metrics that are there",
    "doctor": "what works here: packages, devices, attention kernels, weights",
    "fetch": "download a published checkpoint",
    "convert": "a checkpoint under the names of the original or of diffusers",
    "shards": "pack prompts or videos into tars with an index, or check such a set",
    "encode": "text states of a set of prompts, computed once",
    "decode": "videos from latents that were kept",
    "export": "the same under the folders and names that VBench reads",
}
"""Every command, in the order of ``--help``; its file is ``commands/NAME.py``."""

USAGE = """\
usage: lightning-kv COMMAND [options]

Which KV-cache policy for an autoregressive video diffusion model, at what budget, and what does it
cost in quality?

commands:
{commands}

  lightning-kv help COMMAND      says more, as does lightning-kv COMMAND --help
  lightning-kv --version

example:
  lightning-kv evaluate -c configs/quickstart.yaml
  lightning-kv recommend runs/quickstart
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error is said in words and gives exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:17} {about}" for name, about in COMMANDS.items())
        sys.stdout.write(USAGE.format(commands="\n".join(lines)))
        return
    if words[0] == "--version":
        sys.stdout.write(f"lightning-kv {__version__}\n")
        return
    try:
        options = parse(words[0], words[1:])
        code = command(words[0]).run(options)
    except ValueError as error:
        fail(said_by(error))
    except OSError as error:
        if (text := of_system(error)) is None:
            raise
        fail(text)
    if code is not None:
        raise SystemExit(code)


def command(name: str) -> Command:
    """A command by name.

    Raises:
        ValueError: There is none.
    """
    if name not in COMMANDS:
        near = hint(name, COMMANDS)
        raise ValueError(f"No command {name!r}.{near} `lightning-kv help` tells them all.")
    return import_module(f"lightning_kv.commands.{name.replace('-', '_')}").COMMAND


def parse(name: str, words: Sequence[str]) -> Any:
    """The options of a command, from what is typed after its name.

    Raises:
        ValueError: Something does not fit.
        SystemExit: Help was asked for, and is written.
    """
    return parse_words(command(name), words)
