"""Commands. The only place that knows all the others; heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning_kv import __version__

USAGE = """\
usage: lightning-kv COMMAND [options]

Which KV-cache policy for an autoregressive video diffusion model, at what budget, and what does it
cost in quality?

commands:
  evaluate   roll out the reference and every policy from the same prompts and noise, and compare
  pretrain   train the embedded panorama model
  list       policies, models or metrics that are there

  lightning-kv COMMAND --help    says more
  lightning-kv --version

example:
  lightning-kv evaluate -c configs/quickstart.yaml --policies [sliding-window@9f,top-attention@6f]
"""

EXAMPLES = {
    "evaluate": """\
examples:
  lightning-kv evaluate -c configs/quickstart.yaml
  lightning-kv evaluate -c configs/evaluate.yaml --policies [full,sink-window@12f] --out runs/sinks
  lightning-kv evaluate -c configs/evaluate.yaml --trainer.devices 2""",
    "pretrain": """\
example:
  lightning-kv pretrain -c configs/pretrain_panorama.yaml --out runs/pretrain_panorama""",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error is said in words and gives exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "evaluate": evaluate_command,
        "pretrain": pretrain_command,
        "list": list_command,
    }
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if words[0] == "--version":
        sys.stdout.write(f"lightning-kv {__version__}\n")
        return
    if words[0] not in commands:
        fail(f"No command {words[0]!r}.{hint(words[0], commands)} Commands: {', '.join(commands)}.")
    try:
        commands[words[0]](words[1:])
    except ValueError as error:
        fail(str(error))


def hint(given: str, known: Iterable[str]) -> str:
    """The nearest known name, as a question; nothing where none is near."""
    near = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def fail(text: str) -> None:
    """Say what is wrong and stop."""
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)


def evaluate_command(words: list[str]) -> None:
    """`lightning-kv evaluate`."""
    from lightning_kv.tasks.options import EvaluateOptions

    options = parse("evaluate", EvaluateOptions, words)
    from lightning_kv.tasks.evaluate import evaluate

    quiet()
    summary = evaluate(options)
    if summary:
        from rich.console import Console

        from lightning_kv.report.table import render_tables

        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(render_tables(summary))
        console.print(
            f"Results are in {options.out}: summary.json, records/, videos/", soft_wrap=True
        )


def pretrain_command(words: list[str]) -> None:
    """`lightning-kv pretrain`."""
    from lightning_kv.tasks.options import PretrainOptions

    options = parse("pretrain", PretrainOptions, words)
    from lightning_kv.tasks.pretrain import pretrain

    quiet()
    sys.stdout.write(f"Weights are in {pretrain(options)}\n")


def list_command(words: list[str]) -> None:
    """`lightning-kv list`."""
    from lightning_kv.listing import KINDS, listing

    parser = argparse.ArgumentParser(
        "lightning-kv list",
        description="What is there to choose from.",
        epilog="example:\n  lightning-kv list policies --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="WHAT", help=f"one of: {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(words)
    if chosen.what not in KINDS:
        near = hint(chosen.what, KINDS)
        raise ValueError(f"Cannot list {chosen.what!r}.{near} Lists: {', '.join(KINDS)}.")
    rows = listing(chosen.what)
    if chosen.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def parse(command: str, options: type, words: list[str]) -> Any:
    """Read a command's settings from YAML files (``-c``) and flags; flags win."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"lightning-kv {command}",
        description=options.__doc__.partition("Args:")[0].strip(),
        usage=f"lightning-kv {command} -c FILE [--SETTING VALUE ...]",
        epilog=EXAMPLES[command],
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file; may be repeated")
    parser.add_class_arguments(options, as_group=False)
    try:
        found = parser.parse_args(words)
        made = parser.instantiate(found)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), options)) from None
    return options(**{field.name: made[field.name] for field in dataclasses.fields(options)})


def explain(text: str, options: type) -> str:
    """An error of the parser, with the nearest known setting where a name is unknown."""
    known = setting_names(options)
    given = re.search(r"(?:[Uu]nrecognized arguments: --|[Oo]ption ')([\w.\-]+)", text)
    if given and given[1] not in known:
        return f"No setting {given[1]!r}.{hint(given[1], known)} Settings: {', '.join(known)}."
    return text


def setting_names(options: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    import typing

    hints = typing.get_type_hints(options)
    names = []
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += setting_names(kind, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def quiet() -> None:
    """Keep Lightning's start-up notes to what a user must know (its import sets the levels)."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",  # worlds are drawn in no time
        "isinstance.treespec, LeafSpec",  # between lightning and torch
        "srun. command is available",
        "Checkpoint directory .* exists and is not empty",  # that is how a run goes on
        "was called before the ``update`` method",  # the reference has nothing to be compared with
        "no pre-optimization state was saved",  # the state after the step is the one wanted
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Names beside their meaning, in at most 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)
