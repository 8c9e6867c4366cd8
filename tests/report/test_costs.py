"""What time and bytes a policy takes, in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_kv.report.costs import chunk_times, cost_rows
from lightning_kv.report.entries import entries_of

RECALL = {"full": [1.0] * 3, "w@3f": [0.5] * 3}


def test_the_time_of_a_chunk_is_the_median_over_clips(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "a", RECALL, ["p", "q", "r"])
    records = run.directory.records()
    seconds = iter(([1.0, 2.0], [3.0, 4.0], [8.0, 6.0, 5.0]))
    for record in records:
        if record["policy"] == "w@3f":
            record["cost"]["seconds_per_chunk"] = next(seconds)
        else:
            record["cost"]["seconds_per_chunk"] = []
    times = chunk_times(entries_of([run]), {"a": records})
    assert times == {"full": [], "w@3f": [3.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("times", "growth"),
    [
        ([9.0, *[0.01] * 2, *[0.02] * 4, *[0.03] * 2], "10.0 → 30.0 ms (3.00x)"),
        ([9.0, 0.02, None, 0.02, 0.02, 0.01], "20.0 → 10.0 ms (0.50x)"),
        ([0.01, 0.02], "\N{EN DASH}"),
        ([], "\N{EN DASH}"),
    ],
)
def test_growth_compares_the_quarters_without_the_first(
    tmp_path: Path, make_run, times: list[float | None], growth: str
) -> None:
    entries = entries_of([make_run(tmp_path, RECALL, ["p"])])
    assert cost_rows(entries, {"w@3f": times})[1].growth == growth


def test_bars_are_parts_of_the_longest(tmp_path: Path, make_run) -> None:
    entries = entries_of([make_run(tmp_path, RECALL, ["p"])])
    costs = entries[1].result["cost"]
    costs |= {"kv_bytes_mean": 1_000_000, "kv_bytes_peak": 2_500_000}
    costs |= {"kv_read_fraction": 0.5, "kv_scored_fraction": 1.5}
    full, rival = cost_rows(entries, {})
    assert (rival.memory.first, rival.memory.second) == (20.0, 30.0)
    assert (full.rows.first, full.rows.second) == (50.0, 0.0), "2 is the longest"
    assert (rival.rows.first, rival.rows.second) == (25.0, 75.0)
    assert rival.rows.text == "50.0 % read + 150.0 % scored"


def test_what_nobody_knows_is_no_row(tmp_path: Path, make_run) -> None:
    entries = entries_of([make_run(tmp_path, RECALL, ["p"])])
    costs = entries[1].result["cost"]
    costs |= dict.fromkeys(costs)
    costs["seconds_per_chunk_p50"] = 0.1
    _, rival = cost_rows(entries, {})
    assert (rival.memory, rival.rows) == (None, None)
    costs["seconds_per_chunk_p50"] = None
    assert [row.label for row in cost_rows(entries, {})] == ["full"]
