"""`lightning-kv budgets`: the map, what is predicted of it, the page, and what cannot work."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from curves import drawn

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import Rotary
from lightning_kv.cli import main
from lightning_kv.policies.curve_statistics import resampled
from lightning_kv.policies.head_curves import HeadCurves

GEOMETRY = Geometry(3, 4, 12, (2, 2), Rotary(12), 8, chunk=2, model="mine")


@pytest.fixture
def heads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(GEOMETRY, range(2, 11), prompts=8).save("heads.safetensors")
    return "heads.safetensors"


def shown(capsys, *words):
    main(["budgets", *words, "--resamples", "40"])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["budgets", *words])
    text, error = capsys.readouterr()
    assert stop.value.code == 2 and not text and error.startswith("error: ")
    assert len(re.findall(r"\w\S*\.(?=\s)", error)) in (2, 3)
    return error


def test_for_programs(heads, capsys):
    found = json.loads(shown(capsys, heads, "--mean", "4f", "--json"))
    curves = HeadCurves.load(heads)
    assert found["budgets"] == [list(row) for row in curves.solve("optimal", 4)]
    assert found["mean"] == 4 and found["prompts"] == 8
    assert found["layer_means"] == [sum(row) / 4 for row in found["budgets"]]
    longest = sum(4 * max(row) for row in found["budgets"])
    assert found["padded"] == pytest.approx(longest / 48)
    whole = curves.prompts("mass", "gn").mean(0)
    pairs = [(whole[i, j], n) for i, row in enumerate(found["budgets"]) for j, n in enumerate(row)]
    mine, even = sum(x[n - 2] for x, n in pairs), sum(x[2] for x, _ in pairs)
    assert found["in_sample"] == pytest.approx(float(mine / even))
    judged = resampled(
        curves.budgets,
        curves.prompts("mass", "gn"),
        lambda own: torch.tensor(replace(curves, curves={"mass/gn": own}).solve("optimal", 4)),
        torch.full((3, 4), 4),
        draws=40,
    )
    expected = np.exp(np.quantile(judged.gains, [0.5, 0.05, 0.95]))
    assert found["out_of_bag"] == pytest.approx(expected.tolist())
    assert found["sure"] == (expected[2] < 1)
    assert found["regret"] == pytest.approx(np.quantile(judged.regrets, 0.9))
    start = curves.curve("mass", "gn")[..., 0]
    assert found["am_gm"] == pytest.approx(float(start.mean() / start.log().mean().exp()))
    assert all(0 <= layer < 3 and 0 <= head < 4 for layer, head in found["undecided"])


def test_in_the_terminal(heads, capsys):
    text = shown(capsys, heads, "--mean", "4f")
    rows = HeadCurves.load(heads).solve("optimal", 4)
    lines = [line.split() for line in text.splitlines()]
    for layer, row in enumerate(rows, 1):
        assert [str(layer), *map(str, row), f"{sum(row) / 4:.2f}"] in lines
    for word in (
        "Better than uniform budgets on prompts that optimal ones have not seen.",
        "for mine (3 layers of 4 heads)",
        "Curves: mass/gn, mean, shrunk, by curve, 8 prompts.",
        "too good",
        "(median, 5th and 95th percentile of resamples)",
        "AM/GM of the importances",
        "(lambda*)",
    ):
        assert word in re.sub(r"\s+", " ", text)


def test_settings_reach_the_solver(heads, capsys):
    words = ["--rule", "levels", "--levels", "2", "--least", "3f", "--most", "8", "--mean", "5.5"]
    found = json.loads(shown(capsys, heads, *words, "--shrink", "false", "--json"))
    values = {x for row in found["budgets"] for x in row}
    assert len(values) <= 2 and values <= set(range(3, 9)) and found["mean"] == 5.5
    assert found["reading"] == "mass/gn, mean, as measured, by curve"
    assert found["threshold"] is None and found["undecided"] is None
    curves = drawn(GEOMETRY, range(2, 11), spread=2.0)
    curves.save("noisy.safetensors")
    plain = curves.solve("proportional", 4, shrink=False, importance="history")
    worst = curves.solve("proportional", 4, objective="cvar", shrink=False)
    assert len({plain, worst, curves.solve("proportional", 4, shrink=False)}) == 3
    own = (curves.curve("mass", "gn", "cvar", shrink) for shrink in (True, False))
    assert not torch.equal(*own)
    for more, expected in ((["--importance", "history"], plain), (["--objective", "cvar"], worst)):
        words = ["--mean", "4f", "--rule", "proportional", "--shrink", "false", "--json", *more]
        found = json.loads(shown(capsys, "noisy.safetensors", *words))
        assert found["budgets"] == [list(row) for row in expected]


def test_where_nothing_can_be_gained_uniform_is_enough(heads, capsys):
    text = shown(capsys, heads, "--mean", "4f", "--rule", "uniform")
    assert "Uniform is enough here" in text and "Gini 0." in text
    flat = drawn(GEOMETRY, range(2, 11), prompts=8)
    noise = torch.rand(8, 3, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = torch.arange(9, dtype=torch.float64)
    curves = (0.5 + noise) * (-0.3 * step).exp()
    HeadCurves(flat.budgets, {"mass/gn": curves}, about=flat.about).save("flat.safetensors")
    assert "Uniform is enough here" in shown(capsys, "flat.safetensors", "--mean", "4f")


def test_of_what_is_shipped(capsys):
    """Budgets of a memory start from the newest chunk, and say that they end at what is known."""
    text = " ".join(shown(capsys, "auto", "--mean", "6", "--scorer", "heavy-hitters").split())
    assert "different ones from 3 to 24" in text
    assert re.search(r"2 heads get all that was measured, and still lose \d+ % of what they", text)
    assert "It also has curves of mass, recency, snap-kv (--scorer)" in text
    found = json.loads(shown(capsys, "auto", "--mean", "6", "--json"))
    assert min(x for row in found["budgets"] for x in row) >= 1 and found["capped"] == 0


def test_a_verdict_is_of_its_rule(heads, capsys):
    words = [heads, "--mean", "6f", "--rule", "pyramid", "--beta", "50"]
    assert json.loads(shown(capsys, *words, "--json"))["out_of_bag"][1] > 1
    text = shown(capsys, *words)
    assert "Worse than uniform budgets on prompts that pyramid ones have not seen" in text
    text = " ".join(shown(capsys, heads, "--mean", "6f", "--rule", "focused").split())
    assert "Not judged on other prompts: those would choose another total" in text


def test_what_cannot_be_judged_is_said(heads, capsys):
    text = shown(capsys, heads, "--mean", "10f")  # all there is: nothing is lost
    assert "Not judged" in text and "uniform budgets'" not in text
    few = HeadCurves.load(heads)
    few = HeadCurves(few.budgets, {"mass/gn": few.curves["mass/gn"][:2]}, about=few.about)
    few.save("few.safetensors")
    found = json.loads(shown(capsys, "few.safetensors", "--mean", "4f", "--json"))
    assert found["out_of_bag"] is None and found["sure"] is None and found["in_sample"] < 1


class Cells(HTMLParser):
    """What a page says of each cell of the map when a pointer rests on it."""

    def __init__(self):
        super().__init__()
        self.open, self.titles = "", []

    def handle_starttag(self, tag, attrs):
        self.open = tag

    def handle_data(self, data):
        if self.open == "title" and data.startswith("layer "):
            self.titles.append(data)


def test_the_page_has_the_map(heads, capsys, tmp_path):
    text = shown(capsys, heads, "--mean", "4f", "--rule", "greedy", "-o", "page.html")
    assert "The page is page.html" in text
    page = (tmp_path / "page.html").read_text()
    assert "http" not in re.sub(r'"http://www.w3.org[^"]*"', "", page)
    cells = Cells()
    cells.feed(page)
    rows = HeadCurves.load(heads).solve("greedy", 4)
    expected = [
        f"layer {layer}, head {head}: {n} frames"
        for layer, row in enumerate(rows, 1)
        for head, n in enumerate(row, 1)
    ]
    assert [title for title in cells.titles if "head" in title] == expected
    assert sum("head" not in title for title in cells.titles) == 3
    assert "Better than uniform budgets" in page
    command = re.search(r"<code>lightning-kv (.*?)</code>", page)[1]
    assert (
        command
        == "budgets heads.safetensors --mean 4f --rule greedy --resamples 40 --out page.html"
    )
    assert "is there already" in refused(capsys, heads, "--mean", "4f", "-o", "page.html")
    main([*command.split(), "--force"])
    assert (tmp_path / "page.html").read_text() == page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mean", "half"], "--mean 'half' is no number of history frames. "),
        (["--mean", "9360t"], "--mean '9360t' is no number of history frames. "),
        (["--mean", "4f", "--least", "2.5f"], "--least '2.5f' is no whole number"),
        (["--mean", "1f"], "mean of 1 frames cannot be divided into budgets from 2 to 10"),
        (["--mean", "12f"], "mean of 12 frames cannot be divided into budgets from 2 to 10"),
        (["--mean", "4f", "--rule", "best"], "No allocation rule 'best'. Use one of: uniform"),
        (["--mean", "4f", "--scorer", "h2o"], "no curves h2o/gn in this head file. It has mass/gn"),
        (["--mean", "4f", "--objective", "max"], "No objective 'max'. Use one of: mean, cvar"),
        (["--mean", "0f"], "0 is less than a frame, and leaves nothing to divide"),
        (["--mean", "4f", "--levels", "7"], "levels=7 of an allocation does not work. Give 2 or 3"),
        (["--mean", "4f", "--resamples", "3"], "--resamples 3 are too few"),
        (["--mean", "4f", "-o", "page.txt"], "page.txt is no place for a page"),
        (["--mean", "4f", "-o", "none/page.html"], "none/page.html is no place for a page"),
    ],
)
def test_what_cannot_work(heads, capsys, words, said):
    assert said in refused(capsys, heads, *words)


def test_files_that_are_none(heads, capsys, tmp_path):
    assert "No head file at 'none'" in refused(capsys, "none", "--mean", "4f")
    (tmp_path / "other.safetensors").write_text("{}")
    text = refused(capsys, "other.safetensors", "--mean", "4f")
    assert "cannot be read as a head file" in text and "lightning-kv calibrate" in text
