"""The tables as a person sees them."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from lightning_kv.report.table import cost_table, format_estimate, quality_tables, render_tables
from lightning_kv.utilities.formatting import format_bytes

WAYS = {
    "psnr": ("dB", True),
    "ssim": ("", True),
    "latent_mse": ("latent^2", False),
    "revisit_error": ("intensity^2", False),
    "recall": ("share", True),
    "recall_far": ("share", True),
    "ruler_error": ("latent^2", False),
}
VALUES = {
    "full": (100.0, 1.0, 0.0, 0.003, 0.997, None, 0.00002),
    "sliding-window@9f": (11.7, 0.412, 0.81, 0.06, 0.125, None, 0.00004),
    "top-attention@9f": (43.4, 0.994, 0.0012, 0.0031, 0.994, None, 0.00003),
}
COSTS = {
    "full": (3_355_443, 1.0, 0.0, 0.05, 1.0),
    "sliding-window@9f": (1_048_576, 0.29, 0.0, 0.025, 2.0),
    "top-attention@9f": (3_355_443, 0.29, 1.0, None, None),
}


def a_summary() -> dict:
    policies = {}
    for name, values in VALUES.items():
        metrics = {}
        for (metric, (unit, higher)), mean in zip(WAYS.items(), values, strict=True):
            metrics[metric] = {
                "mean": mean,
                "ci95": None if mean is None else [mean * 0.99, mean * 1.02],
                "n": 0 if mean is None else 16,
                "unit": unit,
                "higher_is_better": higher,
                "recipe": "",
                "status": "no value: no frame was revisited" if mean is None else "ok",
            }
        peak, read, scored, seconds, speedup = COSTS[name]
        cost = {
            "kv_bytes_peak": peak,
            "kv_read_fraction": read,
            "kv_scored_fraction": scored,
            "seconds_per_chunk_p50": seconds,
            "seconds_per_chunk_p95": seconds and 3 * seconds,
            "speedup": speedup,
        }
        policies[name] = {"metrics": metrics, "cost": cost}
    run = {"prompts": 16, "frames": 72, "context_frames": 15}
    return {"reference": "full", "run": run, "policies": policies}


def drawn(item: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(item)
    return console.file.getvalue()


def column(table: Table, header: str) -> dict[str, tuple[str, bool]]:
    """Text and boldness of one column, by policy."""
    names = [str(cell).split()[0] for cell in table.columns[0].cells]
    found = [c for c in table.columns if str(c.header).split() == header.split()]
    assert len(found) == 1, [str(c.header).split() for c in table.columns]
    cells = list(found[0].cells)
    return {n: (str(c), "bold" in str(c.style)) for n, c in zip(names, cells, strict=True)}


def test_all_figures_stand_in_their_row_within_120_columns() -> None:
    text = drawn(render_tables(a_summary()))
    assert max(map(len, text.splitlines())) <= 120
    rows = [line.split("  ") for line in text.splitlines() if "sliding-window@9f" in line]
    quality, cost = ([cell.strip() for cell in row if cell.strip()] for row in rows)
    assert quality[1:] == [
        "11.7 ±0.2",
        "0.412 ±0.008",
        "0.810 ±0.016",
        "0.060 ±0.001",
        "0.125 ±0.003",
        "4.0e-5 ±8e-7",
    ]
    assert cost[1:] == ["1.00 MiB", "29.0 %", "0.0 %", "25.0", "75.0", "2.00x"]
    assert "recall_far: no value: no frame was revisited" in text
    assert "16 prompts, 72 frames (15 of them given)" in text


def test_arrows_and_units_are_in_the_header() -> None:
    table = quality_tables(a_summary())[0]
    assert column(table, "psnr ↑ (dB)")["full"] == ("100.0 ±2.0", False)
    assert column(table, "latent mse ↓ (latent\N{SUPERSCRIPT TWO})")["full"] == ("0", False)


def test_the_best_rival_is_bold_and_the_reference_never() -> None:
    quality, cost = quality_tables(a_summary())[0], cost_table(a_summary())
    for table, header, best in (
        (quality, "psnr ↑ (dB)", {"top-attention@9f"}),
        (quality, "ruler error ↓ (latent\N{SUPERSCRIPT TWO})", {"top-attention@9f"}),
        (cost, "KV peak ↓", {"sliding-window@9f"}),
        (cost, "reads ↓", {"sliding-window@9f", "top-attention@9f"}),
        (cost, "scored ↓", {"sliding-window@9f"}),
        (cost, "speed- up ↑", {"sliding-window@9f"}),
    ):
        cells = column(table, header)
        assert {name for name, (_, bold) in cells.items() if bold} == best, header


def test_the_reference_is_marked() -> None:
    text = drawn(render_tables(a_summary()))
    assert text.count("full (reference)") == 2
    assert text.count("(reference)") == 2


def test_nothing_is_lost_in_a_narrow_window() -> None:
    text = drawn(render_tables(a_summary()), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.split().count("sliding-window@9f") == 2
    for part in ("0.412", "±0.008", "4.0e-5", "±8e-7", "2.00x"):
        assert part in text.split()


def test_a_name_with_brackets_is_no_markup_and_a_long_one_goes_on() -> None:
    summary = a_summary()
    name = "[bold]future-forcing+focused@9360t"
    summary["policies"][name] = summary["policies"].pop("top-attention@9f")
    cells = [str(cell) for cell in cost_table(summary).columns[0].cells]
    assert cells[2].replace("\n", "") == name
    assert "[bold]" in drawn(cost_table(summary))


def test_clips_without_a_value_are_told() -> None:
    summary = a_summary()
    summary["policies"]["top-attention@9f"]["metrics"]["recall"]["n"] = 14
    assert "recall: over 14 prompts only (top-attention@9f)" in drawn(render_tables(summary))


sizes = st.floats(1e-9, 999.0)


@given(sizes, st.floats(0, 1), st.floats(0, 1))
def test_an_estimate_is_short_and_right(mean: float, below: float, above: float) -> None:
    interval = [mean * (1 - below), mean * (1 + above)]
    text = format_estimate(mean, interval)
    assert len(text) <= 14
    first, rest = text.split(" ±")
    if mean >= 1e-3:
        assert float(first) == pytest.approx(mean, rel=0.05)
        arm = max(mean - interval[0], interval[1] - mean)
        assert float(rest) == pytest.approx(arm, abs=0.051 * mean)
    else:
        assert float(first) == pytest.approx(mean, rel=0.06, abs=5e-5)


@pytest.mark.parametrize(
    ("mean", "interval", "text"),
    [
        (None, None, "\N{EN DASH}"),
        (0.0, None, "0"),
        (0.0, [0.0, 0.0], "0"),
        (1.0, [1.0, 1.0], "1.000 ±0"),
        (44.04, None, "44.0"),
        (0.0, [0.0, 0.3], "0 ±0.300"),
        (-0.25, [-0.5, -0.2], "-0.250 ±0.250"),
        (0.000996, None, "1.0e-3"),
        (250000.0, [249000.0, 251000.0], "2.5e5 ±1e3"),
    ],
)
def test_estimates(mean: float | None, interval: list[float] | None, text: str) -> None:
    assert format_estimate(mean, interval) == text


@given(st.integers(1, 2**50))
def test_bytes_read_back(count: int) -> None:
    number, unit = format_bytes(count).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert float(number) * scale == pytest.approx(count, rel=0.01)
    assert unit == "GiB" or len(number) <= 4


def test_twenty_metrics_go_on_in_further_tables_within_120_columns() -> None:
    summary = a_summary()
    for policy in summary["policies"].values():
        metrics = policy["metrics"]
        for number in range(20):
            metrics[f"quality_{number}"] = metrics["ssim"]
    tables = quality_tables(summary)
    assert len(tables) > 2
    text = drawn(render_tables(summary))
    assert max(map(len, text.splitlines())) <= 120
    heads = " ".join(str(c.header).replace("\n", " ") for table in tables for c in table.columns)
    assert all(f"quality {number} ↑" in heads for number in range(20)), "none is lost"
    assert all(len(table.columns) > 4 for table in tables[:-1]), "a table takes what fits"
    assert text.split().count("sliding-window@9f") == len(tables) + 1


def test_neither_way_is_better_so_nothing_is_best() -> None:
    summary = a_summary()
    for policy in summary["policies"].values():
        policy["metrics"]["ssim"]["higher_is_better"] = None
    cells = column(quality_tables(summary)[0], "ssim")
    assert not any(bold for _, bold in cells.values())


def test_a_star_marks_what_differs_and_brackets_hold_the_null() -> None:
    summary = a_summary()
    summary["family"] = {"tests": 7, "correction": "Holm", "level": 0.05}
    for name, p in (("sliding-window@9f", 0.05), ("top-attention@9f", 0.051)):
        summary["policies"][name]["metrics"]["recall"]["paired"] = {"p_holm": p}
    distance = {"mean": 150.5, "ci95": None, "null": 88.25, "unit": "", "sets": True, "n": 9}
    distance |= {"higher_is_better": False, "recipe": "", "status": "ok", "windows": 18}
    distance |= {"against": "the real set", "n_real": 7, "clips_real": 7, "windows_real": 14}
    for name, policy in summary["policies"].items():
        empty = {"mean": None, "null": None} if name == "full" else {}
        policy["metrics"]["fvd/i3d"] = distance | empty
    tables = quality_tables(summary)
    recall = column(tables[0], "recall ↑ (share)")
    assert recall["sliding-window@9f"][0] == "0.125 ±0.003*"
    assert "*" not in recall["top-attention@9f"][0]
    fvd = column(tables[-1], "fvd/ i3d ↓")
    assert (fvd["full"][0], fvd["top-attention@9f"][0]) == ("\N{EN DASH}", "150.5 (88.2)")
    text = drawn(render_tables(summary))
    assert "* differs from full: p at most 0.05 after Holm's correction over 7 tests" in text
    assert "In brackets: the distance that equal sets would show" in text
    sides = "18 windows of 9 prompts against the real set (14 windows of 7 clips)"
    assert f"fvd/i3d: {sides} (sliding-window@9f, " in text


def test_costs_that_nobody_knows_have_no_table() -> None:
    summary = a_summary()
    for policy in summary["policies"].values():
        policy["cost"] = dict.fromkeys(policy["cost"])
    text = drawn(render_tables(summary))
    assert "Quality" in text
    assert "Cost" not in text
