"""`lightning-kv prove`: the tables, plain data, the page, and what cannot work."""

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tasks" / "proof"))
import test_scorer_rollouts
from curves import drawn
from test_rollouts import recorded
from test_scorer import records

from lightning_kv.calibration.chunk_meter import ChunkMeter
from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.cli import main, parse
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.sizes import PRESETS
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.tasks.proof.scorer_meter import ScorerMeter

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


SCORED = [word for word in SMALL if word not in ("--chunks", "1")]


def made_up_lists(self, key, unit, *_):
    """In place of rollouts: regrets of which the scorer's is the least."""
    (record,) = records(1, 1, budgets=self.design.budgets)
    return ClipRecord(key, unit, record.sites)


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ScorerMeter, "of_prompt", made_up_lists)
    for kind in ("mlp", "linear"):
        Scorer.fresh(kind, PRESETS["panorama"].geometry()).save(f"{kind}.safetensors")
    return ["mlp.safetensors", "--linear", "linear.safetensors"]


def test_a_scorer(scorers, capsys):
    words = ["prove", "scorer", *scorers, *SCORED, "--means", "4f,6"]
    main([*words, "-o", "p.html"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Memories of 4f" in text and "Memories of 6f" in text and "The page is p.html" in text
    assert "Learned: less regret than the best training-free ranking on 8 held-out" in text
    assert "better than the linear student at 4f, 6f" in text
    assert "mlp.safetensors does not say what taught it" in text
    assert Path("runs/prove_scorer/clips").is_dir()
    page = Page()
    page.feed(Path("p.html").read_text())
    assert page.rows == 2 * 14 and not page.fetched
    assert "A learned scorer on held-out prompts: mlp.safetensors" in page.text
    (typed,) = (own.split() for own in page.text if own.startswith("lightning-kv prove scorer"))
    again = parse("prove", [*typed[2:], "--accelerator", "cpu"])
    assert again == parse("prove", [*words[1:], "-o", "p.html"])
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "learned" and [own["budget"] for own in found["budgets"]] == [4, 6]
    assert found["budgets"][0]["best"] == "h2o" and found["budgets"][0]["p"] < 0.05


def test_a_run_with_a_scorer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test_scorer_rollouts.recorded(tmp_path / "run")
    words = ["prove", "scorer", "--run", "run", "--metric", "recall"]
    main([*words, "-o", "p.md"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "distilled@6f, recall" in text and "16 held-out prompts, whole rollouts" in text
    assert "The aim, better at 2 budgets and nowhere worse, is met." in text
    assert "| h2o@9f | equal |" in Path("p.md").read_text()
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [own["best"] for own in found["groups"]] == [
        f"future-forcing@{budget}" for budget in ("6f", "9f", "15f")
    ]


def test_what_cannot_work_with_a_scorer_is_refused(scorers, heads, capsys):
    before, mlp = sorted(Path.cwd().rglob("*")), scorers[0]
    said = refused(capsys, "scorer", mlp, "--select", "focused")
    assert "--select has no part in `prove scorer`" in said and "It has --linear." in said
    assert "has no part in `prove budgets`" in refused(capsys, "budgets", heads, *scorers[1:])
    assert "prove scorer scorer.safetensors" in refused(capsys, "scorer")
    assert "Give 7 or more" in refused(
        capsys, "scorer", mlp, *SCORED, "--means", "4f,5f", "--prompts", "6"
    )
    assert "4f or more" in refused(capsys, "scorer", mlp, *SCORED, "--means", "3f")
    assert "cannot be read as a scorer" in refused(capsys, "scorer", heads, *SCORED)
    assert "No scorer at" in refused(capsys, "scorer", "none.safetensors", *SCORED)
    assert "of the kind 'mlp'" in refused(
        capsys, "scorer", mlp, "--linear", mlp, *SCORED, "--means", "4f"
    )
    assert "too short for memories of 15f" in refused(capsys, "scorer", mlp, *SCORED)
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.slow
def test_ranks_judge_a_scorer_alike(tmp_path):
    """1 and 2 ranks, and one that was killed."""
    Scorer.fresh("mlp", PRESETS["panorama"].geometry()).save(tmp_path / "s.safetensors")
    words = [sys.executable, "-m", "lightning_kv", "prove", "scorer", "s.safetensors", *SCORED]
    words += ["--means", "4f"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def proof(name, *more):
        asked = [*words, "--records", name, "--json", *more]
        done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = proof("one")
    assert proof("two", "--devices", "2") == one
    started = subprocess.Popen([*words, "--records", "killed"], cwd=tmp_path, env=environment)
    clips = tmp_path / "killed/clips"
    while not (clips.is_dir() and len(list(clips.iterdir())) > 1):
        assert started.poll() is None
        time.sleep(0.05)
    started.kill()
    started.wait()
    assert len(list(clips.iterdir())) < 8
    assert proof("killed", "--devices", "2") == one
