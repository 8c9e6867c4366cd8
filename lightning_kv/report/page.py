"""``report.html``: everything about a run, or several, in one file that needs no network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_kv.report import charts, pictures
from lightning_kv.report.entries import (
    Entry,
    PageRun,
    entries_of,
    families,
    main_metric,
    main_metrics,
    metric_facts,
    run_names,
)
from lightning_kv.report.prompts import Ranked, extremes, finished, median, ranked
from lightning_kv.report.records import Record, write_atomic
from lightning_kv.report.styles import styles
from lightning_kv.report.table import NOTHING, format_bytes, format_number
from lightning_kv.report.traces import read_traces

# Pixels: how much room a picture has on a phone and on a desk.
OVERVIEW, STRIP, CLOSE_UP = (160, 220), (372, 1150), (320, 760)
OPEN = 2  # policies whose pictures are unfolded from the start
COSTS = (  # field, head, whether more is better, how it is shown
    ("kv_bytes_peak", "KV peak", False, format_bytes),
    ("kv_bytes_mean", "KV mean", False, format_bytes),
    ("kv_read_fraction", "reads", False, "{:.1%}".format),
    ("kv_scored_fraction", "scored", False, "{:.1%}".format),
    ("seconds_per_chunk_p50", "ms/chunk", False, lambda seconds: f"{1000 * seconds:.1f}"),
    ("speedup", "speed-up", True, "{:.2f}x".format),
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
    from jinja2 import Environment, PackageLoader

    entries = entries_of(runs)
    names = run_names([run.directory.path for run in runs])
    metrics = main_metrics(entries)
    records = [run.directory.records() for run in runs]
    templates = Environment(
        loader=PackageLoader("lightning_kv.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = templates.get_template("page.html.j2").render(
        title=", ".join(names),
        verdict=verdict,
        runs=[_run(name, run, own) for name, run, own in zip(names, runs, records, strict=True)],
        several=len(runs) > 1,
        table=_table(entries),
        legend=_legend(entries),
        metrics=metrics,
        tradeoffs={metric: charts.tradeoffs(entries, metric) for metric in metrics},
        curves={metric: charts.curves(entries, metric) for metric in metrics},
        shades={
            name: f"rgb{getattr(pictures, name)}"
            for name in ("GONE", "OWN", "HELD", "READ", "MERGED_HELD", "MERGED_READ")
        },
        facts=metric_facts(entries),
    )
    write_atomic(path, text)


def _run(name: str, run: PageRun, records: list[Record]) -> dict[str, Any]:
    """What the page says about one run."""
    summary, directory = run.summary, run.directory
    metric = main_metric(entries_of([run]))
    filmed = {path.stem for path in directory.videos.glob("*.mp4")}
    traced = {path.stem for path in directory.traces.glob("*.npz")}
    clips = ranked(records, summary, metric, filmed)
    return {
        "name": name,
        "summary": summary,
        "finished": finished(records, summary),
        "metric": metric,
        "filmed": len(clips),
        "clips": [_clip(run, rank, prompt) for rank, prompt in extremes(clips).items()],
        "memory": _memory(run, ranked(records, summary, metric, traced)),
        "command": f"lightning-kv evaluate -c {shlex.quote(str(directory.config))}",
        "config": directory.config.read_text() if directory.config.is_file() else "",
        "policies": {
            policy: json.dumps(result["config"], indent=2)
            for policy, result in summary["policies"].items()
        },
    }


def _table(entries: Sequence[Entry]) -> dict[str, Any]:
    """Heads and rows of the table: the main metrics, what they cost, the other metrics.

    The best value of a column, references left out, is marked.
    """
    facts, first = metric_facts(entries), main_metrics(entries)
    columns = [_metric_column(entries, name, facts[name]) for name in first]
    columns += [_cost_column(entries, *cost) for cost in COSTS]
    columns += [_metric_column(entries, name, facts[name]) for name in facts if name not in first]
    for column in columns:
        values = {
            entry.label: cell["value"]
            for entry, cell in zip(entries, column["cells"], strict=True)
            if not entry.is_reference and cell["value"] is not None
        }
        best = (max if column["more"] else min)(values.values(), default=None)
        alone = 2 * list(values.values()).count(best) <= len(values)  # else it says nothing
        for entry, cell in zip(entries, column["cells"], strict=True):
            cell["best"] = alone and values.get(entry.label) == best
    columns[len(first)]["starts"] = True
    if len(columns) > len(first) + len(COSTS):
        columns[len(first) + len(COSTS)]["starts"] = True
    rows = zip(*(column["cells"] for column in columns), strict=True)
    return {"columns": columns, "rows": list(zip(entries, rows, strict=True))}


def _metric_column(entries: Sequence[Entry], name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "head": name.replace("_", " "),
        "unit": facts["unit"],
        "more": facts["higher_is_better"],
        "cells": [_quality(entry, name) for entry in entries],
    }


def _cost_column(
    entries: Sequence[Entry], field: str, head: str, more: bool, show: Callable[[float], str]
) -> dict[str, Any]:
    values = [entry.result["cost"].get(field) for entry in entries]
    cells = [
        {
            "value": value,
            "text": NOTHING if value is None else show(value),
            "note": "no value" if value is None else f"{value:.8g}",
        }
        for value in values
    ]
    return {"head": head, "unit": "", "more": more, "cells": cells}


def _quality(entry: Entry, metric: str) -> dict[str, Any]:
    """One cell: mean and interval, or why there is none."""
    found, value = entry.result["metrics"].get(metric, {}), entry.mean(metric)
    if value is None:
        status = found.get("status", "not measured in this run")
        return {"value": None, "text": NOTHING, "small": "", "note": status}
    bounds = entry.interval(metric)
    scale = max(abs(value), *map(abs, bounds)) if bounds else abs(value)
    small = " … ".join(format_number(bound, scale) for bound in bounds) if bounds else ""
    return {
        "value": value,
        "text": format_number(value, scale),
        "small": small,
        "note": f"{value:.6g} over {found['n']} prompts",
    }


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


def _clip(run: PageRun, rank: str, prompt: Ranked) -> dict[str, Any]:
    """A moving picture and what every policy reached on it."""
    video = (run.directory.videos / f"{prompt.key}.mp4").read_bytes()
    return {
        "rank": rank,
        "prompt": prompt,
        "source": _data("video/mp4", video),
        "values": [
            (policy, NOTHING if value is None else format_number(value, abs(value)))
            for policy, value in prompt.values.items()
        ],
    }


def _memory(run: PageRun, prompts: list[Ranked]) -> dict[str, Any] | None:
    """Pictures of what every policy keeps and reads on the median prompt that has a trace."""
    if not prompts:
        return None
    prompt = median(prompts)
    traces = read_traces(run.directory.traces / f"{prompt.key}.npz")
    order = [name for name in run.summary["policies"] if name in traces]
    telling = [name for name in order if pictures.heads_differ(traces[name])]
    rivals = [name for name in order if name != run.summary["reference"]]
    return {
        "prompt": prompt,
        "policies": [_pictured(name, traces[name]) for name in order],
        "open": (telling or rivals)[:OPEN],
    }


def _pictured(policy: str, trace: pictures.Trace) -> dict[str, Any]:
    """All pictures of one policy."""
    chunks, layers, heads, frames = trace["held"].shape
    says = pictures.describe(trace)
    close = pictures.close_up(trace, chunks - 1) if pictures.query_frames_differ(trace) else None
    last = f"{policy}, chunk {chunks}: what every head and query frame reads"
    return {
        "name": policy,
        "says": says,
        "overview": _image(
            pictures.overview(trace), f"{policy}, mean over all heads. {says}", OVERVIEW
        ),
        "layers": [
            _image(pictures.strip(trace, layer), f"{policy}, layer {layer + 1}, all heads", STRIP)
            for layer in range(layers)
        ],
        "heads": heads,
        "gap": 100 * pictures.GAP / (heads * (frames + pictures.GAP) + frames),
        "frames": frames,
        "chunks": chunks,
        "close_up": None if close is None else _image(close, last, CLOSE_UP),
    }


def _image(pixels: pictures.Pixels, alt: str, room: tuple[int, int]) -> dict[str, Any]:
    """A picture; its cells are whole pixels, as many as there is room for."""
    width = pixels.shape[1]
    return {
        "source": _data("image/png", pictures.png(pixels)),
        "alt": alt,
        "small": width * max(1, room[0] // width),
        "large": width * max(1, room[1] // width),
    }


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
