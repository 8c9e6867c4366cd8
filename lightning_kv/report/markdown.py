"""``report.md``: the comparison as text that renders on GitHub and reads well without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_kv.report.columns import Column, comparison
from lightning_kv.report.differences import (
    MINUS,
    differences,
    effect_text,
    families_words,
    n_text,
    p_text,
    signed,
    signed_interval,
)
from lightning_kv.report.drifts import START_END, drift_tables
from lightning_kv.report.entries import (
    Entry,
    PageRun,
    arrow,
    entries_of,
    main_metrics,
    metric_facts,
    run_names,
    spoken,
    without_values,
)
from lightning_kv.report.pareto_table import front_axes, front_rows
from lightning_kv.runs.intervals import interval_note
from lightning_kv.runs.verdict import FILES, extent
from lightning_kv.utilities.files import write_atomic

ESCAPED = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "*": "\\*", "`": "\\`", "\n": " "})


def write_markdown(path: Path, runs: Sequence[PageRun], verdict: list[str]) -> None:
    """Write the report of one run or several as GitHub markdown.

    Args:
        path: File to write.
        runs: Runs, finished or not; their policies stand side by side.
        verdict: What to conclude, in sentences.
    """
    entries = entries_of(runs)
    parts = [
        *_head(runs, verdict),
        *_comparison(entries, runs),
        *_differences(entries, runs),
        *_fronts(entries),
        *_drift(entries),
        *_recipes(entries),
    ]
    write_atomic(path, "\n\n".join(parts) + "\n")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A GitHub table, its first column to the left; the cells are escaped.

    Args:
        heads: Of the columns.
        rows: Cells of each row.

    Example:
        >>> print(table(["policy", "p"], [["a|b", "0.5"]]))
        | policy | p |
        | :-- | --: |
        | a\|b | 0.5 |
    """
    marks = [":--", *["--:"] * (len(heads) - 1)]
    lines = [map(escaped, heads), marks, *(map(escaped, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    r"""Text as it is, in a cell or out of one.

    >>> escaped("<b>*|")
    '&lt;b>\\*\\|'
    """
    return text.translate(ESCAPED)


def _head(runs: Sequence[PageRun], verdict: list[str]) -> Iterator[str]:
    names = run_names([run.directory.path for run in runs])
    yield f"# {escaped(', '.join(names))}"
    for name, run in zip(names, runs, strict=True):
        about, model = run.summary["run"], run.summary["model"]["name"]
        frames = "frames" if model == FILES else "latent frames"
        seed = f", seed {about['seed']}" if "seed" in about else ""
        yield escaped(
            f"{name}: {model}, {extent(run.summary)}, {about['frames']} {frames}, "
            f"reference {run.summary['reference']}{seed}."
        )
        yield from map(escaped, about.get("foreign_heads", ()))
    yield "## Verdict"
    yield "\n".join(f"- {escaped(sentence)}" for sentence in verdict) or "Nothing to compare yet."


def _comparison(entries: Sequence[Entry], runs: Sequence[PageRun]) -> Iterator[str]:
    first, more = comparison(entries)
    for title, columns in (("Comparison", first), ("More metrics", more)):
        if columns:
            yield f"## {title}"
            yield _results(entries, columns)
    if note := interval_note(run.summary for run in runs):
        yield note
    shown = first + more
    if any(cell.differs for column in shown for cell in column.cells):
        yield f"(+) or ({MINUS}): surely more or less than the reference."
    if any(not column.comparable for column in shown):
        yield "† Not comparable with values in the literature."
    if lacking := without_values(entries):
        yield "\n".join(f"- {escaped(f'{name}: {why}')}" for name, why in lacking.items())


def _results(entries: Sequence[Entry], columns: Sequence[Column]) -> str:
    """The table of all policies; the best of a column is bold."""
    heads = ["policy", *(_head_of(column) for column in columns)]
    lines = [
        f"| {' | '.join(map(escaped, heads))} |",
        f"| :-- |{' --: |' * len(columns)}",
    ]
    for number, entry in enumerate(entries):
        cells = [escaped(entry.title)]
        for column in columns:
            cell = column.cells[number]
            text = f"**{escaped(cell.estimate)}**" if cell.best else escaped(cell.estimate)
            sign = ""
            if cell.differs:
                more = entry.paired(column.name)["difference"] > 0
                sign = " (+)" if more else f" ({MINUS})"
            cells.append(text + sign)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head_of(column: Column) -> str:
    unit = f" ({column.unit})" if column.unit else ""
    return f"{column.head}{arrow(column.better)}{unit}{'' if column.comparable else ' †'}"


def _differences(entries: Sequence[Entry], runs: Sequence[PageRun]) -> Iterator[str]:
    found = differences(entries)
    if not found:
        return
    yield "## Differences to the reference"
    yield from map(escaped, families_words(runs))
    yield table(
        ["policy", "metric", "difference", "95 % interval", "p", "p corrected", "d_z", "n", "so"],
        [
            [
                each.label,
                spoken(each.metric),
                signed(each.test["difference"]),
                signed_interval(each.test["ci95"]),
                p_text(each.test["p"]),
                p_text(each.test["p_holm"]),
                effect_text(each.test["d_z"]),
                n_text(each.test),
                each.says or ("differs" if each.differs else "not sure"),
            ]
            for each in found
        ],
    )


def _fronts(entries: Sequence[Entry]) -> Iterator[str]:
    title = "## On the front of quality and cost"
    for metric in main_metrics(entries):
        if rows := front_rows(entries, metric):
            if title:
                yield title
                yield "Probability of being on the front if the prompts were drawn anew."
            title = ""
            words = [f"P, for {word}" for word in front_axes(entries, metric).values()]
            body = [[row.label, *(share for share, _ in row.shares)] for row in rows]
            yield table([spoken(metric), *words], body)


def _drift(entries: Sequence[Entry]) -> Iterator[str]:
    tables = drift_tables(entries)
    if not tables:
        return
    yield "## Drift"
    yield (
        f"S{START_END[1:]}: mean of the first 15 % of a clip's values minus that of the last 15 %, "
        "positive where it fell; against the reference prompt by prompt, p not corrected."
    )
    heads = [START_END, "95 % interval", "against reference", "p", "slope per second"]
    for metric, rows in tables.items():
        body = [[r.label, r.start_end, r.interval, r.against, r.p, r.slope] for r in rows]
        yield table([spoken(metric), *heads], body)


def _recipes(entries: Sequence[Entry]) -> Iterator[str]:
    yield "## How these numbers are made"
    yield "\n".join(
        f"- **{escaped(spoken(name))}**: {escaped(fact['recipe'])}"
        for name, fact in metric_facts(entries).items()
        if fact["recipe"]
    )
