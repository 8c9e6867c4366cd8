"""Policies that know what is to come: marked on every page, and never the best of a column."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lightning_kv.report.entries import entries_of
from lightning_kv.report.latex import write_latex
from lightning_kv.report.markdown import write_markdown
from lightning_kv.report.page import write_page
from lightning_kv.report.table import quality_tables, render_tables

RECALL = {
    "full": [1.0] * 3,
    "oracle@6f": [0.75, 0.875, 1.0],
    "near@6f": [0.5, 0.625, 0.75],
    "far@6f": [0.25, 0.375, 0.5],
}
ROLES = {"full": "reference", "oracle@6f": "bound", "near@6f": "", "far@6f": ""}


@pytest.fixture(params=[True, False], ids=["said to be one", "not said to be one"])
def run(request, tmp_path: Path, make_run, add_statistics) -> tuple:
    """A run, and whose recall is the best."""
    made = add_statistics(make_run(tmp_path / "run", RECALL, ["a", "b", "c"]))
    if request.param:
        made.summary["run"]["hindsight"] = ["oracle@6f"]
    return made, "near@6f" if request.param else "oracle@6f"


def titled(best: str) -> list[str]:
    """Names as they stand in tables."""
    roles = ROLES | ({"oracle@6f": ""} if best == "oracle@6f" else {})
    return [f"{name} ({role})" if role else name for name, role in roles.items()]


def test_entries_know_their_role(run) -> None:
    made, best = run
    assert [entry.title for entry in entries_of([made])] == titled(best)


def rows_of(write: Callable, path: Path, made, *more) -> list[str]:
    write(path, [made], *more)
    return path.read_text().splitlines()


def test_markdown_and_latex(run, tmp_path: Path) -> None:
    made, best = run
    for lines, start, end, mark in (
        (rows_of(write_markdown, tmp_path / "report.md", made, []), "| ", " | ", "**0."),
        (rows_of(write_latex, tmp_path / "table.tex", made), "", " & ", r"\mathbf{0."),
    ):
        found = []
        for name in titled(best):
            row = next(line for line in lines if line.startswith(start + name + end))
            found += [name.split()[0]] * (mark in row.split(end)[1])
        assert found == [best]
    said = "bounds left out" in " ".join(lines)
    assert said == (best == "near@6f")


@pytest.mark.usefixtures("no_charts")
def test_the_page(run, tmp_path: Path) -> None:
    made, best = run
    text = " ".join(rows_of(write_page, tmp_path / "report.html", made, []))
    marked = set(re.findall(r'data-value="([^"]*)">[^<]* <span class="badge">bound<', text))
    pictured = re.findall(r'<figcaption>([^ ]*) <span class="badge">bound<', text)
    if best == "oracle@6f":
        assert not marked and not pictured
    else:
        assert marked == set(pictured) == {"oracle@6f"}
    assert ("reference and bounds, which know what is to come, left out" in text) == bool(marked)


def test_the_terminal(run) -> None:
    made, best = run
    table = quality_tables(made.summary)[0]
    cells = next(c for c in table.columns if "recall" in str(c.header)).cells
    bold = [bool(cell.style) for cell in cells]
    assert [name for name, strong in zip(RECALL, bold, strict=True) if strong] == [best]
    drawn = io.StringIO()
    Console(file=drawn, width=120).print(render_tables(made.summary))
    assert ("oracle@6f (bound)" in drawn.getvalue()) == (best == "near@6f")
    assert "near@6f (bound)" not in drawn.getvalue()
