"""``table.tex``: the comparison for a paper, a tabular in the style of booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_kv.report.columns import Cell, Column, comparison
from lightning_kv.report.differences import families_words, n_text
from lightning_kv.report.entries import Entry, PageRun, entries_of, metric_facts, run_names
from lightning_kv.report.table import NOTHING
from lightning_kv.runs.intervals import interval_note
from lightning_kv.runs.units import sets_words
from lightning_kv.runs.verdict import extent
from lightning_kv.utilities.files import write_atomic

ACROSS = 8  # columns of values that a page can hold
ESCAPED = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
    "\N{SUPERSCRIPT TWO}": "$^2$",
    "\N{EN DASH}": "--",
}
ARROWS = {True: r"~$\uparrow$", False: r"~$\downarrow$", None: ""}


def write_latex(path: Path, runs: Sequence[PageRun]) -> None:
    """Write the table of one run or several as LaTeX; it needs the package ``booktabs``.

    The best value of a column is bold, reference and bounds left out; a star marks a significant
    difference to the reference. More columns than a page holds go on in further tabulars.

    Args:
        path: File to write.
        runs: Runs, finished or not; their policies stand side by side.
    """
    entries = entries_of(runs)
    first, more = comparison(entries)
    columns = [column for column in first + more if column.name != "kv_bytes_mean"]
    groups = [columns[start : start + ACROSS] for start in range(0, len(columns), ACROSS)]
    lines = list(_comment(entries, runs))
    for group in groups:
        lines += ["", *_tabular(entries, group)]
    write_atomic(path, "\n".join(lines) + "\n")


def escape(text: str) -> str:
    r"""Text that LaTeX sets as it is.

    >>> escape("top_attention@50%")
    'top\\_attention@50\\%'
    """
    return "".join(ESCAPED.get(sign, sign) for sign in text)


def number(text: str) -> str:
    r"""A number as it is shown elsewhere, for math mode.

    >>> number("3.1e-5"), number("26.1 %"), number("4.31 MiB")
    ('3.1 \\times 10^{-5}', '26.1\\,\\%', '4.31~\\mathrm{MiB}')
    """
    text = text.replace(" %", r"\,\%")
    text = re.sub(r"x$", r"\\times", text)
    text = re.sub(r"e(-?)0*(\d+)", r" \\times 10^{\1\2}", text)
    return re.sub(r" ?([A-Za-z]*i?B)$", r"~\\mathrm{\1}", text)


def _comment(entries: Sequence[Entry], runs: Sequence[PageRun]) -> Iterator[str]:
    """What a caption should say, as comments."""
    for name, run in zip(run_names([run.directory.path for run in runs]), runs, strict=True):
        about = run.summary["run"]
        yield _line(
            f"Run {name}: {run.summary['model']['name']}, {extent(run.summary)}, "
            f"{about['frames']} frames, reference {run.summary['reference']}, fingerprint "
            f"{run.summary['fingerprint'][:12]}."
        )
    bounds = " and bounds" if any(entry.is_bound for entry in entries) else ""
    yield _line(
        "Mean and the longer arm of its 95 % interval over prompts; bold: the best, the reference"
        f"{bounds} left out; star: differs from the reference after correction. "
        "Needs \\usepackage{booktabs}."
    )
    if note := interval_note(run.summary for run in runs):
        yield _line(note)
    yield from map(_line, families_words(runs))
    for name, fact in metric_facts(entries).items():
        values = [entry.result["metrics"].get(name, {"n": 0}) for entry in entries]
        most = max(values, key=lambda value: value["n"])
        counts = sets_words(most) if most.get("windows") else f"n = {n_text(most)}"
        yield _line(f"{name} ({counts}): {fact['recipe'] or fact['status']}")


def _line(text: str) -> str:
    return f"% {' '.join(text.split())}"


def _tabular(entries: Sequence[Entry], columns: Sequence[Column]) -> Iterator[str]:
    yield rf"\begin{{tabular}}{{l{'r' * len(columns)}}}"
    yield r"\toprule"
    yield _row(["policy", *(escape(column.head) + ARROWS[column.better] for column in columns)])
    if any(column.unit for column in columns):
        yield _row(["", *(escape(f"({column.unit})") if column.unit else "" for column in columns)])
    yield r"\midrule"
    for place, entry in enumerate(entries):
        yield _row([escape(entry.title), *(_value(column.cells[place]) for column in columns)])
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _value(cell: Cell) -> str:
    """A mean and the arm of its interval in math mode, the best bold."""
    if cell.value is None:
        return escape(NOTHING)
    estimate, _, null = cell.estimate.partition(" (")
    mean, _, arm = estimate.partition(" ±")
    text = rf"\mathbf{{{number(mean)}}}" if cell.best else number(mean)
    if arm:
        text += rf" \pm {number(arm)}"
    star = r"\textsuperscript{*}" if cell.differs else ""
    return f"${text}${star}" + (f" ({null}" if null else "")
