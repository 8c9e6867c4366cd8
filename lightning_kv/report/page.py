"""``report.html``: everything about a run, or several, in one file that needs no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.report import costs, differences, drifts, tradeoff_charts
from lightning_kv.report.columns import WIDE, comparison
from lightning_kv.report.curves import chunk_curves, curves
from lightning_kv.report.entries import (
    Entry,
    PageRun,
    arrow,
    entries_of,
    families,
    main_metric,
    main_metrics,
    metric_facts,
    run_names,
    spoken,
    unit_text,
    without_values,
)
from lightning_kv.report.memory import SHADES, memory
from lightning_kv.report.pareto_table import front_axes, front_rows
from lightning_kv.report.players import player, with_video
from lightning_kv.report.prompts import extremes, finished, ranked
from lightning_kv.report.styles import styles
from lightning_kv.runs.directory import Record
from lightning_kv.runs.intervals import interval_note
from lightning_kv.runs.verdict import FILES
from lightning_kv.utilities.files import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment

FILTERS = (
    *(arrow, spoken, unit_text),
    *(differences.signed, differences.signed_interval),
    *(differences.effect_text, differences.n_text, differences.p_text),
)


def write_page(path: Path, runs: Sequence[PageRun], verdict: list[str]) -> None:
    """Write the report of one run or several as one self-contained HTML file.

    Args:
        path: File to write.
        runs: Runs, finished or not; their policies stand side by side.
        verdict: What to conclude, in sentences.

    Raises:
        ValueError: A trace or a record cannot be read.
    """
    entries = entries_of(runs)
    names = run_names([run.directory.path for run in runs])
    records = dict(zip(names, (run.directory.records() for run in runs), strict=True))
    pages = templates()
    pages.filters |= {each.__name__: each for each in FILTERS}
    text = pages.get_template("page.html.j2").render(
        title=", ".join(names),
        verdict=verdict,
        runs=[_run(name, run, records[name]) for name, run in zip(names, runs, strict=True)],
        several=len(runs) > 1,
        files=_all_files(runs),
        shades=SHADES,
        facts=metric_facts(entries),
        lacking=without_values(entries),
        **_quality(entries, runs),
        **_over_time(entries, runs),
        **_costs(entries, records),
    )
    write_atomic(path, text)


def templates() -> Environment:
    """What pages are made from."""
    from jinja2 import Environment, PackageLoader

    return Environment(
        loader=PackageLoader("lightning_kv.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _all_files(runs: Sequence[PageRun]) -> bool:
    """Whether nothing but video files is compared."""
    return all(run.summary["model"]["name"] == FILES for run in runs)


def _quality(entries: Sequence[Entry], runs: Sequence[PageRun]) -> dict[str, Any]:
    """Tables, what differs from the reference, and quality against cost."""
    first, more = comparison(entries)
    found = differences.differences(entries)
    metrics = main_metrics(entries)
    tradeoffs = {metric: tradeoff_charts.tradeoffs(entries, metric) for metric in metrics}
    return {
        "entries": entries,
        "first": first,
        "more": more,
        "across": WIDE - 1,
        "intervals": interval_note(run.summary for run in runs),
        "nulls": any(
            cell.small.startswith("null") for column in first + more for cell in column.cells
        ),
        "differences": found,
        "sure": sum(each.differs for each in found),
        "families": differences.families_words(runs),
        "legend": _legend(entries),
        "metrics": metrics,
        "tradeoffs": tradeoffs if any(tradeoffs.values()) else {},
        "fronts": {
            metric: (
                front_axes(entries, metric),
                front_rows(entries, metric),
            )
            for metric in metrics
        },
    }


def _over_time(entries: Sequence[Entry], runs: Sequence[PageRun]) -> dict[str, Any]:
    """Curves and drift."""
    metrics = main_metrics(entries)
    along = "frame" if _all_files(runs) else "latent frame"
    tables = drifts.drift_tables(entries)
    return {
        "curves": {metric: curves(entries, metric, along) for metric in metrics},
        "drift": {name: _drift(rows) for name, rows in tables.items()},
        "drift_more": [name for name in tables if name not in metrics],
    }


def _drift(rows: list[drifts.DriftRow]) -> dict[str, Any]:
    return {
        "rows": rows,
        "definitions": drifts.known_definitions(rows),
        "others": drifts.other_values(rows),
        "paired": any(row.against != drifts.NOTHING for row in rows),
    }


def _costs(entries: Sequence[Entry], records: dict[str, list[Record]]) -> dict[str, Any]:
    """Where time and bytes go; empty where nothing is known."""
    times = costs.chunk_times(entries, records)
    return {
        "spent": costs.cost_rows(entries, times),
        "kept": any(e.result["cost"].get("kv_kept_fraction") is not None for e in entries),
        "chunks": chunk_curves(entries, times),
    }


def _run(name: str, run: PageRun, records: list[Record]) -> dict[str, Any]:
    """What the page says about one run."""
    summary, directory = run.summary, run.directory
    metric = main_metric(entries_of([run]))
    traced = {path.stem for path in directory.traces.glob("*.npz")}
    clips = ranked(records, summary, metric, with_video(run, records))
    files = summary["model"]["name"] == FILES
    return {
        "name": name,
        "summary": summary,
        "files": files,
        "finished": finished(records, summary),
        "counts": _counts(summary),
        "metric": metric,
        "with_video": len(clips),
        "clips": [player(run, rank, prompt) for rank, prompt in extremes(clips).items()],
        "memory": memory(run, ranked(records, summary, metric, traced)),
        "command": f"lightning-kv evaluate -c {shlex.quote(str(directory.config))}",
        "config": directory.config.read_text() if directory.config.is_file() else "",
        "policies": {
            policy: json.dumps(result["config"], indent=2)
            for policy, result in summary["policies"].items()
        },
    }


def _counts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """How many prompts and clips the run is about, by what they are called."""
    run, found = summary["run"], summary.get("measured")
    if summary["model"]["name"] != FILES:
        samples = run["prompts"] * (run.get("samples") or 1)
        return [("prompts", differences.n_text({"n": run["prompts"], "clips": samples}))]
    clips, prompts = (found["clips"], found["prompts"]) if found else [run["prompts"]] * 2
    told = [("videos compared", str(clips))]
    return told if prompts == clips else [*told, ("prompts", str(prompts))]


def _legend(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One chip per family: its colour, and the budgets it was run at."""
    looks = styles(entries)
    return [
        {
            "name": name,
            "style": looks[group[0].label],
            "budgets": ", ".join(entry.budget for entry in group if entry.budget),
        }
        for name, group in families(entries).items()
    ]
