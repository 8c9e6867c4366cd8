"""Charts read back as XML: where marks stand, what they say, and what text may do to them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lightning_kv.report.curves import chunk_curves, curves
from lightning_kv.report.entries import Entry, entries_of
from lightning_kv.report.styles import styles
from lightning_kv.report.tradeoff_charts import AXES, BYTES, READS, tradeoff

SVG = "{http://www.w3.org/2000/svg}"
WILD = '<b>"$x_1$&'


@pytest.fixture
def entries(tmp_path: Path, make_run) -> list[Entry]:
    recall = {
        "full": [1.0, 1.0],
        "w@6f": [0.1, 0.3],
        "w@9f": [0.5, 0.7],
        "top": [0.9, 1.0],
        WILD: [0.4, 0.4],
    }
    found = entries_of([make_run(tmp_path, recall, ["p", "q"])])
    for number, entry in enumerate(found):
        entry.result["cost"]["kv_bytes_peak"] = 1000 * 2**number
        entry.result["cost"]["kv_read_fraction"] = 0.5 - 0.01 * number
    return found


def parsed(svg: str) -> ET.Element:
    svg = svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def marks(root: ET.Element) -> dict[str, tuple[float, float]]:
    """Where the points of the policies stand, by what they say."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        if (title := group.find(f"{SVG}title")) is not None:
            (use,) = group.iter(f"{SVG}use")
            found[title.text] = (float(use.get("x")), float(use.get("y")))
    return found


def test_points_stand_where_their_numbers_say(entries: list[Entry]) -> None:
    chart = parsed(tradeoff(entries, "recall", BYTES).svg)
    points = marks(chart)
    assert set(points) == {
        "w@6f: recall 0.2 [0.1, 0.3], 1.95 KiB",
        "w@9f: recall 0.6 [0.5, 0.7], 3.91 KiB",
        "top: recall 0.95 [0.9, 1], 7.81 KiB",
        f"{WILD}: recall 0.4 [0.4, 0.4], 15.6 KiB",
        "full: recall 1 [1, 1], 0.98 KiB",
    }
    xs = [x for x, _ in points.values()]
    steps = [b - a for a, b in zip(sorted(xs), sorted(xs)[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 4, rel=1e-3), "each has twice the bytes: a log axis"
    heights = {name.split(":")[0]: y for name, (_, y) in points.items()}
    scale = (heights["w@6f"] - heights["w@9f"]) / 0.4
    assert heights["w@9f"] - heights["top"] == pytest.approx(0.35 * scale, rel=1e-3)
    linear = marks(parsed(tradeoff(entries, "recall", READS).svg))
    xs = sorted(x for x, _ in linear.values())
    assert len(xs) == 5
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], rel=1e-2)


def path_of(root: ET.Element, start: str) -> list[tuple[float, float]]:
    """Corners of the line whose id starts so."""
    for group in root.iter(f"{SVG}g"):
        if group.get("id", "").startswith(start):
            numbers = re.findall(r"-?[\d.]+", group.find(f"{SVG}path").get("d"))
            pairs = list(map(float, numbers))
            return list(zip(pairs[::2], pairs[1::2], strict=True))
    return []


def test_the_front_is_a_staircase_through_its_points(tmp_path: Path, make_run) -> None:
    recall = {"full": [1.0, 1.0], "w@6f": [0.2, 0.4], "w@9f": [0.6, 0.6], "off": [0.1, 0.1]}
    run = make_run(tmp_path, recall, ["p", "q"])
    costs = {"w@6f": 1000, "off": 1500, "w@9f": 2000, "full": 3000}
    for name, cost in costs.items():
        run.summary["policies"][name]["cost"]["kv_bytes_peak"] = cost
    found = {name: {"front": name != "off", "p": 0.25 if name == "off" else 0.75} for name in costs}
    run.summary["pareto"] = {"recall": {"kv_bytes_peak": found}}
    entries = entries_of([run])
    chart = parsed(tradeoff(entries, "recall", BYTES).svg)
    points = {says.split(":")[0]: place for says, place in marks(chart).items()}
    (ax, ay), (bx, by), (cx, cy) = (points[name] for name in ("w@6f", "w@9f", "full"))
    corners = path_of(chart, "front-0")
    steps = [(ax, ay), (bx, ay), (bx, by), (cx, by), (cx, cy)]
    assert corners[:5] == [pytest.approx(step, abs=1e-3) for step in steps]
    assert corners[5][0] > cx, "it goes on to the edge"
    assert corners[5][1] == pytest.approx(cy, abs=1e-3)
    says = {says.split(":")[0]: says for says in marks(chart)}
    assert says["off"].endswith(", off the front, P(on it) = 0.25")
    assert says["full"].endswith(", on the front, P(on it) = 0.75")
    assert path_of(parsed(tradeoff(entries, "recall", READS).svg), "front-") == []
    for entry in entries:
        entry.result["metrics"]["recall"]["higher_is_better"] = None
    assert path_of(parsed(tradeoff(entries, "recall", BYTES).svg), "front-") == []


def test_texts_are_shown_as_they_are(entries: list[Entry]) -> None:
    chart = parsed(tradeoff(entries, "recall", BYTES).svg)
    texts = ["".join(text.itertext()) for text in chart.iter(f"{SVG}text")]
    assert {"6f", "9f"} <= set(texts)
    assert "recall, share ↑" in texts
    assert not any("$" in text or "\\" in text for text in texts)


def test_a_logarithmic_metric_has_plain_tick_labels(entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        entry.result["metrics"]["ruler_error"]["mean"] = 10.0**-number
        entry.result["metrics"]["ruler_error"]["ci95"] = None
    texts = [t.text for t in parsed(tradeoff(entries, "ruler_error", BYTES).svg).iter(f"{SVG}text")]
    assert {"0.001", "0.01", "0.1"} <= set(texts)


def test_budgets_never_overlap(entries: list[Entry]) -> None:
    crowd = [Entry(f"w@{n}f", "r", f"w@{n}f", False, {**entries[1].result}) for n in range(10, 30)]
    for number, entry in enumerate(crowd):
        metric = entry.result["metrics"]["recall"] | {"mean": 0.5 + 0.004 * number}
        entry.result["metrics"] = entry.result["metrics"] | {"recall": metric}
    chart = parsed(tradeoff(crowd, "recall", BYTES).svg)
    spots = []
    for text in chart.iter(f"{SVG}text"):
        if re.fullmatch(r"\d\df", text.text or ""):
            spots.append((float(text.get("x")), float(text.get("y"))))
    assert 2 <= len(spots) < 20, "some have no place"
    for index, (x, y) in enumerate(spots):
        assert all(abs(x - a) > 10 or abs(y - b) > 7 for a, b in spots[:index])


def test_the_reference_is_not_compared_with_itself(entries: list[Entry]) -> None:
    entries[0].result["metrics"]["psnr"]["mean"] = 100.0
    texts = [t.text for t in parsed(tradeoff(entries, "psnr", BYTES).svg).iter(f"{SVG}text")]
    assert "100" not in texts
    assert "20.5" in texts or "20.4" in texts, "the axis is about the others"


def test_nothing_to_show_is_no_chart(entries: list[Entry]) -> None:
    for entry in entries:
        entry.result["metrics"]["recall"]["mean"] = None
    assert tradeoff(entries, "recall", BYTES) is None
    for entry in entries:
        entry.result["curves"] = {}
    assert curves(entries, "recall") == []


def line_of(root: ET.Element, label: str) -> list[tuple[float, float]]:
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None and title.text == label:
            numbers = re.findall(r"-?[\d.]+", group.find(f"{SVG}path").get("d"))
            pairs = list(map(float, numbers))
            return list(zip(pairs[::2], pairs[1::2], strict=True))
    raise AssertionError(label)


def test_curves_follow_their_means(entries: list[Entry]) -> None:
    (chart,) = curves(entries, "recall")
    assert [label for label, _ in chart.lines] == ["w@6f", "w@9f", "top", WILD]
    line = line_of(parsed(chart.svg), "w@9f")
    assert len(line) == 8, "the given frames have no value"
    (x0, y0), (x1, y1), (x2, y2) = line[:3]
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-3)
    # The means are 0.6, 0.3 and 0.2; y runs down.
    assert y1 - y0 == pytest.approx(3 * (y2 - y1), rel=1e-3)


def test_seconds_stand_above_the_frames(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path, {"full": [1.0], "w": [0.5]}, ["p"])
    run.summary["run"]["rate"] = 2.0
    (chart,) = curves(entries_of([run]), "recall", along="frame")
    texts = [text.text for text in parsed(chart.svg).iter(f"{SVG}text")]
    assert {"seconds", "frame"} <= set(texts)
    assert "5" in texts, "frame 10 is at 5 seconds"
    run.summary["run"]["rate"] = None
    (chart,) = curves(entries_of([run]), "recall")
    assert "seconds" not in chart.svg


def test_the_time_of_chunks_starts_at_nothing_and_counts_from_one(entries: list[Entry]) -> None:
    times = {"full": [0.01, 0.02], "w@6f": [0.01, 0.03], "w@9f": [0.02, None], "top": []}
    (chart,) = chunk_curves(entries, times)
    assert [label for label, _ in chart.lines] == ["w@6f", "w@9f"]
    root = parsed(chart.svg)
    (x0, y0), (x1, y1) = line_of(root, "w@6f")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"0", "30", "1", "2"} <= set(texts)
    assert x1 > x0
    floor = max(y for _, y in path_of(root, "patch_2"))
    assert (floor - y0) == pytest.approx((floor - y1) / 3, rel=1e-3), "10 ms is a third of 30"


def test_many_policies_get_a_panel_per_family_with_equal_axes(tmp_path: Path, make_run) -> None:
    names = ["full", "a@3f", "a@6f", "b@3f", "b@6f", "c@3f", "c@6f", "d"]
    recall = {name: [0.1 * number] for number, name in enumerate(names, 1)}
    panels = curves(entries_of([make_run(tmp_path, recall, ["p"])]), "recall")
    assert [panel.title for panel in panels] == ["a", "b", "c", "d"]
    ticks = []
    for panel in panels:
        texts = [t.text for t in parsed(panel.svg).iter(f"{SVG}text")]
        ticks.append([text for text in texts if re.fullmatch(r"[\d.]+", text or "")])
    assert all(own == ticks[0] for own in ticks)
    high = {label: line_of(parsed(p.svg), label)[0][1] for p in panels for label, _ in p.lines}
    assert sorted(high, key=high.get, reverse=True) == names[1:]


def test_ids_are_unique_over_all_charts(entries: list[Entry]) -> None:
    charts = [tradeoff(entries, m, a) for m in ("recall", "psnr") for a in AXES]
    charts += [chart for m in ("recall", "psnr") for chart in curves(entries, m)]
    ids = [i for chart in charts for i in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for chart in charts:
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart.svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', chart.svg))
        assert "#010203" not in chart.svg


def test_charts_come_out_the_same_every_time(entries: list[Entry]) -> None:
    assert tradeoff(entries, "recall", BYTES) == tradeoff(entries, "recall", BYTES)


def test_a_family_shares_its_colour_and_no_two_policies_look_alike(tmp_path, make_run) -> None:
    names = ["full", *(f"p{n}" for n in range(14)), "p0@3f", "p0@6f", "p0@9f"]
    looks = styles(entries_of([make_run(tmp_path, {name: [0.5] for name in names}, ["x"])]))
    assert set(looks) == set(names[1:])
    assert len({looks[f"p0{b}"].colour for b in ("", "@3f", "@6f", "@9f")}) == 1
    assert len({(s.colour, s.marker, s.dashes, s.strength) for s in looks.values()}) == len(looks)
