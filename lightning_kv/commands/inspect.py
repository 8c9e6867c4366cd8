"""`lightning-kv inspect`: a run's report in the terminal, or what is in a scorer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, say

NAMED = 3  # of a list of names


@dataclass(frozen=True)
class InspectOptions:
    """A run's report in the terminal, finished or not; or what is in a scorer.

    Args:
        run: Run directory that evaluate or compare made, or a scorer (.safetensors).
    """

    run: Path


def run(options: InspectOptions) -> None:
    """Show it."""
    if options.run.suffix == ".safetensors":
        show_scorer(options.run)
        return
    from lightning_kv.report.inspect import render_inspection
    from lightning_kv.runs.verdict import verdict
    from lightning_kv.tasks.report import open_run, summary_of

    opened = open_run(options.run)
    summary, out = summary_of(opened), console()
    say(out, verdict(summary, opened.records()))
    out.print(render_inspection(opened, summary))


def show_scorer(path: Path) -> None:
    """Show what a scorer is, what it looks at and what it says of itself.

    Raises:
        ValueError: It cannot be read as one.
    """
    from rich.table import Table

    from lightning_kv.utilities.files import checksum

    found, out = rows_of(path), console()
    for line in (f"{path}: {found.pop('student')}", f"SHA-256 {checksum(path)}"):
        out.print(line, soft_wrap=True, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in found.items():
        table.add_row(name, value)
    out.print(table)


def rows_of(path: Path) -> dict[str, str]:
    """What there is to say of a scorer, by name."""
    from lightning_kv.policies.scorer.artifact import Scorer
    from lightning_kv.policies.scorer.features import FEATURES

    scorer = Scorer.load(path)
    student, about = scorer.student, dict(scorer.about)
    count = sum(x.numel() for x in student.parameters())
    whose = f"{student.layers} layers of {student.heads} heads" if student.embeddings else "any"
    own = {"format", "version", "student", "features", "feature_hash", "queries"}
    absent = [name for name in FEATURES if name not in scorer.features]
    began = zip(scorer.features, student.settings["prior"], strict=True)
    return {
        "student": f"a student of kind {student.kind}, {count:,} numbers",
        "heads it knows": whose,
        "features": f"{len(scorer.features)} ({about['feature_hash']})",
        "left out": ", ".join(absent) or "-",
        "began as": ", ".join(f"{weight:g} {name}" for name, weight in began if weight),
        "queries that look": str(scorer.queries),
        **dict(told({name: x for name, x in about.items() if name not in own})),
    }


def told(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names with dots, and values in a line each; of lists of names only how many there are."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from told(value, f"{above}{name}.")
        elif isinstance(value, list) and any(isinstance(x, str) for x in value):
            more = ", ..." * (len(value) > NAMED)
            first = ", ".join(map(str, value[:NAMED]))
            yield f"{above}{name}", f"{len(value)} ({first}{more})"
        else:
            yield f"{above}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


COMMAND = Command(
    "inspect",
    InspectOptions,
    run,
    """\
examples:
  lightning-kv inspect runs/quickstart
  lightning-kv inspect scorer.safetensors""",
    positional={"run": "RUN"},
)
