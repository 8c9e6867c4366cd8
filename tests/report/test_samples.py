"""Six samples of one prompt in every table and sentence: one prompt, and both counts are said."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lightning_kv.report.columns import comparison
from lightning_kv.report.entries import PageRun, entries_of
from lightning_kv.report.inspect import render_inspection
from lightning_kv.report.latex import write_latex
from lightning_kv.report.markdown import write_markdown
from lightning_kv.report.page import write_page
from lightning_kv.report.prompts import extremes, finished, ranked
from lightning_kv.report.table import NOTHING, render_tables
from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.verdict import FILES, extent

RECALL = {"full": [1.0] * 6, "w@3f": [0.25, 0.5, 0.75, 0.25, 0.5, 0.75]}
WORDS = "1 prompt (6 samples)"


@pytest.fixture
def run(tmp_path: Path, make_run) -> PageRun:
    made = make_run(tmp_path / "one", RECALL, ["a cat"] * 6, samples=6)
    return PageRun(made.directory, analyse(made.summary, made.directory.records()))


def drawn(what) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(what)
    return console.file.getvalue()


def page(path: Path, run: PageRun) -> str:
    write_page(path, [run], [])
    return re.sub(r"\s+", " ", path.read_text())


def test_the_terminal(run: PageRun) -> None:
    text = drawn(render_tables(run.summary))
    assert f"mean ± 95 % interval, {WORDS}, 12 frames" in " ".join(text.split())
    row = next(line for line in text.splitlines() if line.strip().startswith("w@3f "))
    assert "0.500" in row and "±" not in row and "*" not in row


def test_a_policy_with_fewer_prompts_is_told_with_both_counts(run: PageRun) -> None:
    full, rival = (run.summary["policies"][n]["metrics"]["recall"] for n in ("full", "w@3f"))
    full["n"], rival["clips"] = 2, 5
    assert "recall: over 1 prompt (5 samples) only (w@3f)" in drawn(render_tables(run.summary))


def test_a_pointer_on_a_number(run: PageRun) -> None:
    first, _ = comparison(entries_of([run]))
    note = next(column for column in first if column.name == "recall").cells[1].note
    assert note.splitlines() == [
        f"0.5 over {WORDS}",
        "difference to the reference -0.5, n = 1 (6 samples)",
    ]


def test_a_distance_between_sets(run: PageRun) -> None:
    value = run.summary["policies"]["w@3f"]["metrics"]["recall"]
    value |= {"sets": True, "windows": 24, "n_real": 9, "against": "the real set", "se": None}
    first, _ = comparison(entries_of([run]))
    note = next(column for column in first if column.name == "recall").cells[1].note
    older = f"24 windows of {WORDS} against the real set (9 windows)"
    assert note.startswith(f"0.5 from {older}")
    value |= {"n_real": 2, "clips_real": 3, "windows_real": 9}
    sides = f"24 windows of {WORDS} against the real set (9 windows of 3 clips of 2 prompts)"
    first, _ = comparison(entries_of([run]))
    note = next(column for column in first if column.name == "recall").cells[1].note
    assert note.startswith(f"0.5 from {sides}")
    assert f"recall: {sides} (w@3f)" in " ".join(drawn(render_tables(run.summary)).split())


def test_the_markdown(run: PageRun, tmp_path: Path) -> None:
    write_markdown(tmp_path / "report.md", [run], [])
    text = (tmp_path / "report.md").read_text()
    assert f"one: panorama, {WORDS}, 12 latent frames" in text
    row = next(line for line in text.splitlines() if line.startswith("| w@3f | recall |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:] == [*[NOTHING] * 4, "1 (6 samples)", "not sure"]
    drift = text.split("## Drift")[1]
    assert " … " not in drift, "no interval of the drift either"


def test_the_latex(run: PageRun, tmp_path: Path) -> None:
    write_latex(tmp_path / "table.tex", [run])
    text = (tmp_path / "table.tex").read_text()
    assert f"% Run one: panorama, {WORDS}, 12 frames" in text
    assert "% recall (n = 1 (6 samples)): " in text
    assert r"\pm" not in text and "textsuperscript" not in text


def test_the_page(run: PageRun, tmp_path: Path) -> None:
    text = page(tmp_path / "report.html", run)
    assert "<dt>prompts</dt><dd>1 (6 samples)</dd>" in text
    assert '<td data-value="1">1 (6 samples)</td>' in text, "of the differences"
    assert f'title="0.5 over {WORDS}' in text
    assert "-band" not in text, "curves have no interval"
    assert "Half-finished" not in text and "kept</dt>" not in text
    assert "among the 1 prompt with a video" in text


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_a_run_that_is_not_finished(tmp_path: Path, make_run) -> None:
    """The second of two prompts lacks a sample."""
    recall = {"full": [1.0] * 4, "w@3f": [0.5] * 3}
    run = make_run(tmp_path / "half", recall, ["a", "a", "b", "b"], samples=2)
    records = run.directory.records()
    assert finished(records, run.summary) == 1
    assert "1 of 2 prompts finished" in page(tmp_path / "report.html", run)
    text = drawn(render_inspection(run.directory, run.summary))
    assert "Half-finished: 1 of 2 prompts finished." in text


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_video_files(run: PageRun, tmp_path: Path) -> None:
    run.summary["model"] = {"name": FILES}
    run.summary["run"]["prompts"] = 6  # videos, as an older comparison counted them
    del run.summary["run"]["samples"]
    assert extent(run.summary) == WORDS
    text = page(tmp_path / "report.html", run)
    assert "<dt>videos compared</dt><dd>6</dd>" in text and "<dt>prompts</dt><dd>1</dd>" in text
    assert "Half-finished" not in text


@pytest.mark.usefixtures("no_charts")
def test_the_share_of_rows_kept_has_a_column_where_it_is_known(
    run: PageRun, tmp_path: Path
) -> None:
    assert "kept" not in drawn(render_tables(run.summary))
    run.summary["policies"]["w@3f"]["cost"]["kv_kept_fraction"] = 0.125
    assert "kept" in (text := drawn(render_tables(run.summary))) and "12.5 %" in text
    first, _ = comparison(entries_of([run]))
    (column,) = [column for column in first if column.name == "kv_kept_fraction"]
    assert [cell.text for cell in column.cells] == [NOTHING, "12.5 %"] and column.better is False
    assert "<dt>kept</dt>" in page(tmp_path / "report.html", run)


def test_prompts_are_ranked_not_samples(tmp_path: Path, make_run) -> None:
    recall = {"full": [1.0] * 6, "w@3f": [0.9, 0.1, 0.4, 0.5, 0.8, 0.7]}
    run = make_run(tmp_path / "two", recall, [*"aabbcc"], samples=2)
    records = run.directory.records()
    keys = {record["key"] for record in records}
    found = ranked(records, run.summary, "recall", keys)
    assert [(p.key, p.score) for p in found] == [
        ("k4", pytest.approx(0.75)),
        ("k0", pytest.approx(0.5)),
        ("k2", pytest.approx(0.45)),
    ]
    assert found[1].values == {"full": 1.0, "w@3f": pytest.approx(0.5)}, "the mean of its samples"
    assert extremes(found)["worst"].key == "k2"
    only = ranked(records, run.summary, "recall", {"k0#1", "k2"})
    assert [p.key for p in only] == ["k0#1", "k2"], "the sample that can be shown"
