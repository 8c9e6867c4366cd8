"""The catalogue's configs hold every preset, and the page says what its runs hold."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_kv.policies.registry import load_policy, preset, presets
from lightning_kv.tasks.rollouts.policies import chosen_policies

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
catalogue = importlib.import_module("catalogue")

RUNS = [f"{name}{suffix}" for name in catalogue.SETTINGS for suffix in ("", "_bytes", "_positions")]


@pytest.mark.parametrize("name", RUNS)
def test_a_config_builds_and_differs_from_its_twin_in_the_worlds_alone(name):
    own = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    other = yaml.safe_load((ROOT / f"configs/{name.replace('_any_start', '')}.yaml").read_text())
    assert own["out"] == f"runs/{name}"
    assert {k: v for k, v in own.items() if k not in ("out", "data")} == {
        k: v for k, v in other.items() if k not in ("out", "data")
    }
    chosen_policies(own["policies"], budgets=own.get("budgets"))


@pytest.mark.parametrize("name", catalogue.SETTINGS)
def test_every_preset_is_in_the_catalogue(name):
    own = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    named = [policy for policy in own["policies"] if isinstance(policy, str)]
    assert named == list(dict.fromkeys(named))
    free = ("deco-prune", "duo-attention")  # they take a budget and come without
    both = {f"{each}@{amount}" for each in free for amount in own["budgets"]}
    assert set(named) == {*presets(any_model=True), *both}
    assert own["budgets"] == ["6f", "9f", "15f"]


def test_every_memory_is_crossed_with_positions():
    own = yaml.safe_load((ROOT / "configs/catalogue_positions.yaml").read_text())
    made = {policy.name: policy for policy in map(load_policy, own["policies"])}
    memories = {
        name
        for name in presets(any_model=True)
        if preset(name).retain.name != "everything" and not preset(name).needs
    } - {"longlive", "rolling-forcing"}  # a sink window where nothing is switched, a sampler's
    assert {"full", *memories} == {
        name.partition("@")[0].removesuffix("-contiguous").removesuffix("-absolute")
        for name in made
    }
    for name, policy in made.items():
        where = "contiguous" if "-contiguous" in name else "absolute"
        assert policy.positions.name == where
        if where == "contiguous":
            twins = {name.replace("-contiguous", x) for x in ("", "-absolute")}
            assert len(twins & made.keys()) == 1, name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of three worlds."""
    out = tmp_path_factory.mktemp("runs") / "catalogue"
    config = yaml.safe_load((ROOT / "configs/catalogue.yaml").read_text())
    config |= {"prompts": 3, "frames": 33, "budgets": ["6f"], "out": str(out), "batch": 3}
    names = ["full", "h2o", "future-forcing", "focused-forcing", "random-memory", "oracle"]
    crossed = [
        {"name": "h2o-contiguous@6f", "base": "h2o@6f", "positions": "contiguous"},
        {"name": "fade-mem-absolute@6f", "base": "fade-mem@6f", "positions": "absolute"},
        {"name": "fade-mem-contiguous@6f", "base": "fade-mem@6f", "positions": "contiguous"},
    ]
    config["policies"] = [*names, *crossed]
    config["data"] = {"shards": str(ROOT / "data/panorama-fast13")}
    path = out.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    from lightning_kv.cli import main

    assert main(["evaluate", "-c", str(path)]) in (None, 0)
    return catalogue.Run(out)


def recalls(run):
    """Recall by policy and prompt, read from the files alone."""
    found = {}
    for file in (run.folder / "records").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["policy"], {})[record["key"]] = record["metrics"]["recall"]
    return found


@pytest.mark.slow
def test_the_page_says_what_the_records_hold(run, monkeypatch):
    own = recalls(run)
    assert set(own) == set(run.names) and all(len(values) == 3 for values in own.values())
    page = catalogue.overview(run)
    for name, values in own.items():
        mean = sum(values.values()) / 3
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` "))
        assert f"| {mean:.3f} [" in line
        if name != "full":
            loss = sum(values[key] - own["full"][key] for key in values) / 3
            assert f"| {loss:+.3f} [" in line
        assert ("knows the future" in line) == name.startswith("oracle")
    gap = sum(own["h2o-contiguous@6f"][k] - own["h2o@6f"][k] for k in own["full"]) / 3
    assert f"| `h2o@6f` | {sum(own['h2o@6f'].values()) / 3:.3f} |" in catalogue.crossing(run)
    assert f"{gap:+.3f} [" in catalogue.crossing(run)
    assert "| `fade-mem-absolute@6f` |" in catalogue.crossing(run)
    rivals = [n for n in catalogue.savers(run, "memory") if n != "h2o-contiguous@6f"]
    assert sorted(rivals) == ["future-forcing@6f", "h2o@6f"]
    assert catalogue.against(run, "random-memory")[0].startswith("Of 2 comparisons")
    assert any("future-forcing@6f" in line for line in catalogue.seeds(run))
    monkeypatch.setattr(catalogue, "ROOT", run.folder.parents[1])
    monkeypatch.setattr(catalogue, "found_run", lambda name: run if name == "catalogue" else None)
    text = catalogue.document()
    assert "Not run yet: `lightning-kv evaluate -c configs/catalogue_any_start.yaml`" in text
    (line,) = catalogue.close_commands()
    assert "--prompts 32" in line
    found = json.loads(line.partition("--policies '")[2].partition("'")[0])
    assert [load_policy(own).name for own in found] == run.close()
