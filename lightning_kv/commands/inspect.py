"""`lightning-kv inspect`: a run's report in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, say


@dataclass(frozen=True)
class InspectOptions:
    """A run's report in the terminal, finished or not.

    Args:
        run: Run directory that evaluate or compare made.
    """

    run: Path


def run(options: InspectOptions) -> None:
    """Show it."""
    from lightning_kv.report.inspect import render_inspection
    from lightning_kv.runs.verdict import verdict
    from lightning_kv.tasks.report import open_run, summary_of

    opened = open_run(options.run)
    summary, out = summary_of(opened), console()
    say(out, verdict(summary, opened.records()))
    out.print(render_inspection(opened, summary))


COMMAND = Command(
    "inspect",
    InspectOptions,
    run,
    """\
example:
  lightning-kv inspect runs/quickstart""",
    positional={"run": "RUN"},
)
