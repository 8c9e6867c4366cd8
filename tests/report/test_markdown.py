"""``report.md``, its tables parsed as GitHub would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.report.entries import PageRun
from lightning_kv.report.markdown import table, write_markdown
from lightning_kv.report.page import write_page

RECALL = {"full": [1.0] * 3, "window@3f": [0.25, 0.5, 0.75], "a|b*<i>@6f": [0.5, 0.625, 1.0]}
MINUS = "\N{MINUS SIGN}"


def parsed(text: str) -> dict[str, list[list[str]]]:
    """Rows of every table, by its heads joined; what GitHub would call a table, and no other."""
    found = {}
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if len(lines) < 2 or not re.fullmatch(r"\|( :?-+:? \|)+", lines[1]):
            assert not block.startswith("|"), "a table without its line of dashes"
            continue
        rows = [cells(line) for line in lines if line != lines[1]]
        assert {len(row) for row in rows} == {lines[1].count("|") - 1}, "rows are equally long"
        found[" ".join(rows[0])] = rows[1:]
    return found


def cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line)
    assert (parts[0], parts[-1]) == ("", "")
    return [re.sub(r"\\(.)", r"\1", part).strip() for part in parts[1:-1]]


@pytest.fixture
def text(tmp_path: Path, make_run, add_statistics, add_metrics) -> str:
    run = make_run(tmp_path / "my run", RECALL, ["a", "b", "c"])
    write_markdown(tmp_path / "report.md", [add_metrics(add_statistics(run))], ["Run *it* | now."])
    return (tmp_path / "report.md").read_text()


def test_the_verdict_and_the_run_come_first(text: str) -> None:
    assert text.startswith("# my run\n\nmy run: panorama, 3 prompts, 12 latent frames, ")
    assert "- Run \\*it\\* \\| now." in text


def test_head_curves_of_other_weights_are_noted(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", RECALL, ["a"])
    run.summary["run"]["foreign_heads"] = ["Curves of *another* model."]
    write_markdown(tmp_path / "report.md", [run], [])
    write_page(tmp_path / "report.html", [run], [])
    assert "Curves of \\*another\\* model.\n\n## Verdict" in (tmp_path / "report.md").read_text()
    assert (
        '<p class="note">Curves of *another* model.</p>' in (tmp_path / "report.html").read_text()
    )


def test_the_comparison_holds_the_numbers(text: str) -> None:
    tables = parsed(text)
    head, rows = next((head, rows) for head, rows in tables.items() if "KV peak" in head)
    assert head.startswith("policy recall ↑ (share) psnr ↑ (dB) fvd/panorama-encoder ↓ † KV peak ↓")
    assert [row[0] for row in rows] == ["full (reference)", "window@3f", "a|b*&lt;i>@6f"]
    assert rows[1][1] == f"0.500 ±0.250 ({MINUS})", "surely less than the reference"
    assert rows[2][1] == f"**0.708 ±0.292** ({MINUS})"
    assert rows[1][3] == "**121.5 (null 88.2)**"
    assert rows[0][4] == "4.77 MiB"
    more = next(head for head in tables if "quality 15" in head)
    assert "quality 0 ↑" in more
    assert "brightness ruler" not in more
    assert "fvd/i3d: unavailable: no &lt;weights> here" in text


def test_differences_front_and_drift_are_tables(text: str) -> None:
    tables = parsed(text)
    (tests,) = (rows for head, rows in tables.items() if "p corrected" in head)
    assert tests[0] == [
        *("window@3f", "recall", f"{MINUS}0.125", f"{MINUS}0.500 … {MINUS}0.062", "0.001"),
        *("0.020", f"{MINUS}1.50", "3", "worse"),
    ]
    assert "Holm's method over all 2 differences" in text
    assert tables["recall P, for bytes P, for time"] == [
        *(["full", "1.00", "1.00"], ["window@3f", "0.88", "0.88"]),
        ["a|b*&lt;i>@6f", "0.06", "0.06"],
    ]
    (drift,) = (rows for head, rows in tables.items() if "slope per second" in head)
    assert drift[0] == [
        *("window@3f", "+0.250", "+0.125 … +0.500", "+0.375", "0.031", f"{MINUS}0.031"),
    ]
    assert "- **psnr**: 10 log10(1 / mse) &lt; the better" in text


def test_a_run_without_statistics_has_no_empty_sections(tmp_path: Path, make_run) -> None:
    runs: list[PageRun] = [
        make_run(tmp_path / name, {"full": [1.0], name: [0.5]}, ["p"]) for name in "ab"
    ]
    write_markdown(tmp_path / "two.md", runs, [])
    text = (tmp_path / "two.md").read_text()
    (rows,) = parsed(text).values()
    assert [row[0] for row in rows] == ["a/full (reference)", "a", "b/full (reference)", "b"]
    assert re.findall("^## (.*)", text, re.M) == [
        *("Verdict", "Comparison", "How these numbers are made"),
    ]


@given(st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), max_size=4))
def test_any_text_stays_in_its_cell(rows: list[list[str]]) -> None:
    lines = table(["a", "b"], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
