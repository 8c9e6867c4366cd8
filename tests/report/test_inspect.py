"""A run in the terminal, as text of 120 columns."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_kv.report.entries import PageRun
from lightning_kv.report.inspect import BARS, picture, render_inspection, sparkline
from lightning_kv.report.table import NOTHING

RECALL = {"full": [1.0] * 3, "window@3f": [0.25, 0.5, 0.75], "window@6f": [0.5, 0.625, 1.0]}
PROMPTS = ["first", "[bold]second[/bold]", "third"]
CHUNKS, FRAMES = 4, 12


def shown(run: PageRun, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_inspection(run.directory, run.summary))
    return console.file.getvalue()


def lines_below(text: str, title: str, column: int, count: int) -> list[str]:
    """What stands in one column of the pictures below its title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line[column:].startswith(title)) + 1
    return [line[column : column + 37].rstrip() for line in lines[start : start + count]]


def test_the_tables_the_curves_the_pictures_and_the_files(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", RECALL, PROMPTS)
    text = shown(run)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text, "no colour codes in a pipe"
    assert "Quality, reference full" in text
    assert "977 KiB" in text
    assert "recall over the frames of a clip, from" in text
    for name, policy in run.summary["policies"].items():
        curve = policy["curves"]["recall"]["mean"]
        low = RECALL["window@3f"][1] / 8
        high = np.mean(RECALL["window@6f"])
        assert f"\n{name.ljust(9)} {sparkline(curve, low, high)} " in text
    # The median prompt is the second; window@3f keeps 3 frames, window@6f keeps 6.
    assert "prompt [bold]second[/bold] (k1)" in text
    text = text[text.index("What is kept") :]
    assert lines_below(text, "full", 0, 2) == ["\\\\\\", "   \\\\\\"]
    assert lines_below(text, "window@3f", 39, 5) == [
        "\\\\\\",
        "███\\\\\\",
        "   ███\\\\\\",
        "      ███\\\\\\",
        "keeps 3 of 9 past frames, reads 3",
    ]
    assert lines_below(text, "window@6f", 78, 4)[-1] == "   ██████\\\\\\"
    for name in ("summary.json", "videos", "traces"):
        assert f"/{name}  (" in text.replace("\n", "")
    assert "report.html" not in text, "it is not made yet"
    run.directory.report.write_text("x")
    assert "report.html" in shown(run)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_other_widths_work(tmp_path: Path, make_run, width: int) -> None:
    text = shown(make_run(tmp_path, RECALL, PROMPTS), width)
    assert max(map(len, text.splitlines())) <= width
    assert "window@6f" in text


def test_a_half_finished_run_without_traces(tmp_path: Path, make_run) -> None:
    recall = {"full": [1.0, 1.0], "late": [0.5], "never": []}
    text = shown(make_run(tmp_path, recall, PROMPTS, pictured=0, total=9))
    assert text.startswith("Half-finished: 0 of 9 prompts finished.")
    assert "No traces" in text
    cells = [line.split()[1:] for line in text.splitlines() if line.startswith((" never", "never"))]
    assert len(cells) == 3, "in both tables and in the curves"
    assert all(set(own) == {NOTHING} for own in cells)


def a_trace(frames: int = FRAMES, chunks: int = CHUNKS, heads: int = 1) -> dict:
    held = np.zeros((chunks, 1, heads, frames), np.uint8)
    return {
        "held": held,
        "read": np.zeros((chunks, 3, 1, heads, frames), np.uint8),
        "weight": np.zeros(held.shape, np.float16),
    }


def test_every_character_says_what_was_done() -> None:
    trace = a_trace(heads=4)
    last = trace["held"][3, 0], trace["read"][3, :, 0], trace["weight"][3, 0]
    held, read, weight = last
    held[:, 1:] = 255
    weight[:, 1:7] = 1
    read[:, :, 2] = 255  # by all
    read[0, :1, 3] = 255  # by one of twelve: hardly
    read[:, :2, 4] = 255  # by half of the heads
    weight[:, 7:] = 3
    read[:, :, 8] = 255
    held[1:, 6], weight[1:, 6] = 0, 0  # one head alone still has it
    assert picture(trace)[3] == " ░█░▒░░◌●\\\\\\"


def test_a_long_clip_fits() -> None:
    trace = a_trace(frames=180, chunks=60)
    for chunk in range(60):
        window = slice(max(0, 3 * chunk - 30), 3 * chunk)
        trace["held"][chunk, ..., window] = 255
        trace["read"][chunk, ..., window] = 255
        trace["weight"][chunk, ..., window] = 1
    lines = picture(trace)
    assert len(lines) == 20
    assert max(map(len, lines)) == 36
    assert lines[0].strip("\\") == ""
    assert lines[-1].startswith(" " * 20)
    assert lines[-1].count("█") >= 4


@given(st.lists(st.none() | st.floats(0, 1), max_size=200), st.integers(1, 80))
def test_a_sparkline_rises_with_its_values(values: list[float | None], width: int) -> None:
    line = sparkline(values, 0.0, 1.0, width)
    assert len(line) <= width
    if len(values) <= width:
        heights = [BARS.index(bar) for bar in line]
        assert [height == 0 for height in heights] == [value is None for value in values]
        there = sorted((v, h) for v, h in zip(values, heights, strict=True) if v is not None)
        assert [h for _, h in there] == sorted(h for _, h in there)
        assert all(abs(h - 1 - 7 * v) <= 0.5 for v, h in there)
