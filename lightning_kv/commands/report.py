"""`lightning-kv report`: write the page about one run or several again."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_kv.commands.options import Command


@dataclass(frozen=True)
class ReportOptions:
    """Write the page about one run or several, finished or not.

    Args:
        runs: Run directories that evaluate or compare made.
        out: HTML file (report.html in the run directory).
        force: Replace the file of --out.
    """

    runs: list[Path]
    out: Path | None = None
    force: bool = False


def run(options: ReportOptions) -> None:
    """Write it, and say where it is."""
    from lightning_kv.tasks.report import open_run, page_path, summary_of, write_report

    out = page_path(options.runs, options.out, options.force)
    runs = [open_run(path) for path in options.runs]
    write_report(out, runs, [summary_of(run) for run in runs])
    sys.stdout.write(f"The report is {out}\n")


COMMAND = Command(
    "report",
    ReportOptions,
    run,
    """\
One run's page is report.html in its directory and is written anew; several runs need --out.

examples:
  lightning-kv report runs/quickstart
  lightning-kv report runs/quickstart runs/evaluate --out both.html""",
    positional={"runs": "RUN"},
    metavars={"out": "FILE"},
)
