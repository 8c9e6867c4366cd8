"""`lightning-kv prove`: the tables, plain data, the page, and what cannot work."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tasks" / "proof"))
from curves import drawn
from test_rollouts import recorded

from lightning_kv.calibration.chunk_meter import ChunkMeter
from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.cli import main, parse
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.sizes import PRESETS

SMALL = ["--frames", "15", "--context_frames", "6", "--prompts", "8", "--accelerator", "cpu"]
SMALL += ["--data.shards", "panorama-quick", "--chunks", "1"]
BETTER = {"optimal": 0.7, "dynamic": 0.9}


def made_up(self, key, unit, *_):
    """In place of rollouts: a loss for each condition, of which some are better."""
    site = {}
    for name in self.ways:
        rule, noise = name.partition("@")[0], stable_seed(key, name) % 1000 / 1e4
        site[name] = torch.tensor(BETTER.get(rule, 1.0) * (1 + noise), dtype=torch.float64)
    return ClipRecord(key, unit, {(3, 0): site})


@pytest.fixture
def heads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ChunkMeter, "of_prompt", made_up)
    drawn(PRESETS["panorama"].geometry(), range(7)).save("heads.safetensors")
    return "heads.safetensors"


def shown(capsys, *words):
    main(["prove", "budgets", *words])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["prove", *words])
    text, error = capsys.readouterr()
    said = error[error.index("error: ") :]
    assert stop.value.code == 2 and not text and said.count("\n") == 1
    assert len(re.findall(r"\w\S*\.(?=\s)", said)) in (2, 3)
    return said


def test_a_table_for_each_mean_and_the_verdict(heads, capsys):
    text = shown(capsys, heads, *SMALL, "--means", "2f,3")
    assert "2 of 6 history frames" in text and "3 of 6 history frames" in text
    said = re.sub(r"\s+", " ", text)
    assert said.count("Optimal is better than uniform: optimal budgets change the loss") == 2
    assert "8 held-out prompts, 8 chunks made again under each condition" in said
    assert "Not measured: focused-matched-zero" in said
    rows = [line.split()[0] for line in text.splitlines() if re.match(r"[a-z-]+\d? +\d", line)]
    for rule in ("uniform", "pyramid-reversed", "log", "levels", "dynamic-table", "shuffled-5"):
        assert rows.count(rule) == 2
    assert Path("runs/prove/config.yaml").is_file()
    options = parse("prove", ["budgets", heads, "-c", "runs/prove/config.yaml"])
    assert options.means == ["2f", "3"] and options.prompts == 8


def test_for_programs(heads, capsys):
    found = json.loads(shown(capsys, heads, *SMALL, "--means", "3f", "--json"))
    (own,) = found["means"]
    assert own["mean"] == 3 and own["proof"]["verdict"] == "optimal"
    assert own["found"] == pytest.approx(0.7, abs=0.05)
    rows = {row["rule"]: row for row in own["rows"]}
    assert rows["uniform"]["against"] is None and rows["optimal"]["against"]["p"] < 0.01
    assert len(found["prompts"]) == 8 and found["additivity"]["tables"] == 13


class Page(HTMLParser):
    """Tags that are open, tables, and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.rows, self.fetched, self.text = 0, [], []

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v != "data:,"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page(heads, capsys):
    words = [heads, *SMALL, "--means", "3f", "--data.seed", "7"]
    assert "The page is p.html" in shown(capsys, *words, "-o", "p.html")
    page = Page()
    page.feed(Path("p.html").read_text())
    assert page.rows == 16 and not page.fetched
    (typed,) = (own.split() for own in page.text if own.startswith("lightning-kv prove"))
    again = parse("prove", [*typed[2:], "--accelerator", "cpu"])
    assert again == parse("prove", ["budgets", *words, "-o", "p.html"])
    shown(capsys, *words, "-o", "p.md", "--json")
    text = Path("p.md").read_text()
    assert text.startswith("# Budgets by head") and "| shuffled-5 |" in text
    assert "Optimal is better than uniform" in text


def test_a_run_of_whole_rollouts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "run")
    text = re.sub(r"\s+", " ", shown(capsys, "--run", "run", "-o", "p.html"))
    assert "snap-kv at 6f, recall" in text and "snap-kv at 9f, latent_relative" in text
    assert "10 held-out prompts, whole rollouts" in text
    assert "snap-kv at 9f, recall" in Path("p.html").read_text()
    found = json.loads(shown(capsys, "--run", "run", "--metric", "recall", "--json"))
    assert [own["metric"] for own in found["groups"]] == ["recall"] * 2


def test_what_cannot_work_is_refused(heads, capsys):
    before = sorted(Path.cwd().rglob("*"))
    assert "thing that is proved 'budget'" in refused(capsys, "budget", heads)
    assert "neither is given" in refused(capsys, "budgets")
    assert "both are given" in refused(capsys, "budgets", heads, "--run", "x")
    assert "ends in .html or .md" in refused(capsys, "budgets", heads, "-o", "p.pdf")
    assert "Give 8 or more" in refused(capsys, "budgets", heads, *SMALL, "--prompts", "7")
    assert "no number" in refused(capsys, "budgets", heads, "--means", "0.3x").replace("whole ", "")
    assert "at 6, the reach" in refused(capsys, "budgets", heads, *SMALL, "--means", "6f")
    assert "No head file" in refused(capsys, "budgets", "none.safetensors", *SMALL)
    assert "whole frames by score" in refused(capsys, "budgets", heads, "--select", "reach")
    assert "no curves focused/gn" in refused(capsys, "budgets", heads, "--select", "focused")
    assert "no curves mass/exact" in refused(capsys, "budgets", heads, "--measure", "exact")
    assert "No folder" in refused(capsys, "budgets", "--run", "nowhere")
    assert sorted(Path.cwd().rglob("*")) == before
