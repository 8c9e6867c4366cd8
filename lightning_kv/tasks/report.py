"""From a run directory, finished or not, to its summary and its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.runs.verdict import verdict
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.utilities.files import write_atomic


def open_run(path: Path) -> RunDirectory:
    """A run directory that is there.

    Raises:
        ValueError: No such folder, a file, a folder that is no run, or one without records.
    """
    if not path.exists():
        raise ValueError(
            f"No folder {path}. Give a run directory that `lightning-kv evaluate --out` made."
        )
    run = RunDirectory(path)
    run.about()
    if not run.records():
        raise ValueError(
            f"{path} has no records: nothing of this run is measured so far. "
            f"Give `lightning-kv evaluate -c {run.config}` time to finish a clip."
        )
    return run


def summary_of(run: RunDirectory, intervals: bool = True) -> dict[str, Any]:
    """Summarise what a run has measured so far; the content of ``summary.json``.

    Args:
        run: Its directory.
        intervals: Also give what takes seconds: 95 % intervals, of means and of every frame of the
            curves, distances between sets, and the statistics of :mod:`lightning_kv.runs.analysis`.

    Raises:
        ValueError: As for :func:`open_run`.
    """
    open_run(run.path)
    about, records = run.about(), run.records()
    summary = summarise(
        records,
        reference=about["reference"],
        policies=about["policies"],
        metrics={name: MetricInfo(**info) for name, info in about["metrics"].items()},
        run=about["run"],
        model=about["model"],
        fingerprint=run.held()["fingerprint"],
        interval=lambda values: bca_interval(values, resamples=1000) if intervals else None,
    )
    if not intervals:
        return summary
    of_sets = {name: info for name, info in about["metrics"].items() if info.get("sets")}
    if of_sets:
        from lightning_kv.tasks.measuring.distances import (
            distances,  # with torch and torchmetrics: seconds
        )

        found = distances(run, of_sets, list(summary["policies"]), summary["reference"])
        for policy, metrics in found.items():
            for name, values in metrics.items():
                summary["policies"][policy]["metrics"][name] |= values
    return analyse(summary, records)


def conclude(run: RunDirectory) -> dict[str, Any]:
    """Write ``summary.json`` and the report; returns the summary."""
    found = summary_of(run)
    write_atomic(run.summary, json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_report(run.report, [run], [found])
    return found


def write_report(path: Path, runs: Sequence[RunDirectory], summaries: Sequence[dict]) -> None:
    """Write the page about one run or several, with the verdict in words.

    Beside it go the same in Markdown and a table for LaTeX.

    Args:
        path: HTML file to write.
        runs: The run directories.
        summaries: Of each, from :func:`summary_of`.
    """
    from lightning_kv.report.entries import PageRun, run_names
    from lightning_kv.report.latex import write_latex
    from lightning_kv.report.markdown import write_markdown
    from lightning_kv.report.page import write_page

    pages = [PageRun(run, found) for run, found in zip(runs, summaries, strict=True)]
    names = run_names([run.path for run in runs])
    words = []
    for name, run, found in zip(names, runs, summaries, strict=True):
        first, *more = verdict(found, run.records())
        words += [f"{name}: {first}" if len(runs) > 1 else first, *more]
    write_page(path, pages, words)
    write_markdown(path.with_suffix(".md"), pages, words)
    write_latex(path.with_name("table.tex" if path.stem == "report" else f"{path.stem}.tex"), pages)


def page_path(runs: Sequence[Path], out: Path | None, force: bool) -> Path:
    """Where the page about some runs goes.

    Args:
        runs: Their directories.
        out: Where the user wants it.
        force: Replace what is there.

    Raises:
        ValueError: One run twice, several without ``out``, or an ``out`` that cannot be written.
    """
    twice = [run for i, run in enumerate(runs) if run.resolve() in {r.resolve() for r in runs[:i]}]
    if twice:
        raise ValueError(f"{twice[0]} is given twice. Give each run once.")
    if out is None and len(runs) > 1:
        raise ValueError(
            f"A page about {len(runs)} runs belongs to none of their directories. "
            "Say where it goes: --out report.html."
        )
    if out is None:
        return RunDirectory(runs[0]).report
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"A report is a page, and --out {out} does not end in .html. "
            f"Give --out {out.with_suffix('.html') if out.name else 'report.html'}."
        )
    if not out.parent.is_dir():
        raise ValueError(f"No folder {out.parent} for {out.name}. Make it, or give another --out.")
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(
            f"{out} exists and would be lost. Give another --out, or --force to replace a file."
        )
    return out
