"""Whole rollouts as evidence: a run's records, by policy, mean and metric."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_kv.models.sizes import PRESETS
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.stats.comparison import compare
from lightning_kv.tasks.proof.rollouts import grouped_by_policy, of_run, sections
from lightning_kv.tasks.rollouts.policies import chosen_policies

RULES = ("uniform", "optimal", "dynamic", "pyramid-reversed", "shuffled-1", "shuffled-2")
FACTS = {
    "recall": {"unit": "share", "higher_is_better": True},
    "latent_mse": {"unit": "latent^2", "higher_is_better": False},
    "latent_relative": {"unit": "", "higher_is_better": False},
    "motion": {"unit": "", "higher_is_better": None},
}
WORSE = {"optimal": 1.0, "uniform": 1.3, "dynamic": 1.0}


def recorded(path, prompts=10, samples=2, names=("snap-kv",), means=("6f", "9f"), heads=None):
    """A run of which optimal budgets lose less than all others but the dynamic ones."""
    rng, run = np.random.default_rng(0), RunDirectory(path)
    policies = {"full": {"name": "full"}} | {
        f"{name}-{rule}@{mean}": {"name": "x", "retain": {"budget": {"heads": heads}}}
        for name in names
        for rule in RULES
        for mean in means
    }
    about = {"reference": "full", "policies": policies, "metrics": FACTS, "run": {}, "model": {}}
    run.open("x", {}, about)
    for n in range(prompts):
        size = rng.lognormal(0, 1)
        for sample in range(samples):
            for policy in policies:
                rule = policy.partition("@")[0].removeprefix("snap-kv-").removeprefix("h2o-")
                loss = size * WORSE.get(rule, 1.5) * rng.lognormal(0, 0.03)
                key = f"p{n}" + (f"-s{sample}" if sample else "")
                metrics = {
                    "recall": max(0.0, 0.9 - 0.1 * loss / size),
                    "latent_mse": loss**2,
                    "latent_relative": loss,
                    "motion": 1.0,
                }
                record = {"policy": policy, "key": key, "prompt": "x", "unit": f"p{n}"}
                run.append(0, record | {"metrics": metrics, "curves": {}, "cost": {}})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("run") / "run")


def test_losses_are_ratios_of_the_records(run):
    found = {(own.mean, own.metric): own for own in of_run(run)}
    assert found.keys() == {(m, x) for m in ("6f", "9f") for x in ("recall", "latent_relative")}
    own = found["9f", "latent_relative"]
    losses = {rule: {} for rule in RULES}
    for record in sorted(run.records(), key=lambda record: record["key"]):
        for rule in RULES:
            if record["policy"] == f"snap-kv-{rule}@9f":
                value = record["metrics"]["latent_relative"]
                losses[rule].setdefault(record["unit"], []).append(value)
    assert own.kind == "ratio" and own.proof.verdict == "optimal"
    assert own.proof.comparisons[0] == compare(losses, "optimal", "uniform")
    assert own.against["pyramid-reversed"] == compare(losses, "pyramid-reversed", "uniform")
    assert own.proof.comparisons[0].ratio == pytest.approx(1 / 1.3, rel=0.03)
    assert own.proof.placebo.better == 2 and own.proof.absent == ("pyramid", "focused-matched")
    value, low, high = own.values["uniform"]
    assert low < value < high
    assert value == pytest.approx(np.mean([np.mean(x) for x in losses["uniform"].values()]))


def test_squares_count_by_their_roots(run):
    (own, _) = of_run(run, ["latent_mse"])
    (other,) = (x for x in of_run(run, ["latent_relative"]) if x.mean == own.mean)
    ratios = [x.proof.comparisons[0].ratio for x in (own, other)]
    assert ratios[0] == pytest.approx(ratios[1])


def test_scores_are_differences(run):
    own = next(own for own in of_run(run, ["recall"]) if own.mean == "6f")
    assert own.kind == "difference" and own.proof.margin == 0.02
    assert own.proof.comparisons[0].gain == pytest.approx(0.03, abs=0.003)
    assert own.proof.verdict == "optimal" and own.against["dynamic"].gain > 0
    rows = {row[0]: row for row in sections([own])[0].rows}
    assert rows["uniform"][2:] == ("", "") and rows["dynamic"][2].startswith("+0.028")
    assert json.loads(json.dumps(asdict(own)))["proof"]["verdict"] == "optimal"


def test_other_metrics_must_keep(run):
    every = of_run(run, ["latent_relative"])
    for own in every:
        (kept,) = own.quality  # recall is not judged here, and has a margin
        assert (kept.metric, kept.against, kept.found.margin) == ("recall", "uniform", 0.02)
        assert kept.found.verdict == "not worse" and kept.found.mean == pytest.approx(
            -0.03, abs=3e-3
        )
        assert "Recall is kept within 0.02 of that of uniform budgets" in own.words[-1]
        assert not any("Expected" in each for each in own.words)
    assert not any(own.quality for own in of_run(run, ["recall", "latent_relative"]))


def test_clips_without_a_value_are_left_out_and_said(tmp_path):
    run = recorded(tmp_path / "run", samples=1)
    path = next((tmp_path / "run/records").iterdir())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["policy"] == "snap-kv-dynamic@6f" and line["key"] in ("p3", "p4"):
            line["metrics"]["recall"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = of_run(run, ["recall"])
    assert first.left_out == ("p3", "p4") and first.proof.comparisons[0].prompts == 8
    assert "left out: p3, p4." in first.words[-1]
    assert not second.left_out and second.proof.comparisons[0].prompts == 10


def test_prompts_that_budgets_were_fitted_on_are_named(tmp_path):
    heads = {"file": "heads.safetensors", "prompts": ["p2", "elsewhere", "p7"]}
    run = recorded(tmp_path / "run", heads=heads)
    with pytest.warns(UserWarning, match="2 prompts of this evaluation.*: p2, p7") as seen:
        of_run(run)
    assert len([own for own in seen if "fitted" in str(own.message)]) == 1


def test_what_cannot_be_judged_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="metric by which this run can be judged 'recal'"):
        of_run(run, ["recal"])
    with pytest.raises(ValueError, match="'motion'"):
        of_run(run, ["motion"])
    with pytest.raises(ValueError, match="No folder"):
        of_run(RunDirectory(tmp_path / "none"))
    with pytest.raises(ValueError, match="Too few prompts: 1 of snap-kv at 6f"):
        of_run(recorded(tmp_path / "one", prompts=1))
    with pytest.raises(ValueError, match="compares no budgets by head: its policies are full"):
        of_run(recorded(tmp_path / "other", names=()))


def test_names_of_two_words():
    names = ["a-pyramid-reversed@6f", "a-uniform@6f", "a-optimal@6f", "b-optimal@6f", "a-x@6f"]
    names += ["a-dynamic-table@6f", "a-dynamic@6f", "a-focused-matched-zero@6f", "a-optimal"]
    rules = ("uniform", "optimal", "pyramid-reversed", "dynamic-table", "dynamic")
    found = grouped_by_policy(names)
    assert found.keys() == {("a", "6f")}
    assert found["a", "6f"].keys() == {*rules, "focused-matched-zero"}


@pytest.mark.parametrize(
    ("config", "policies"),
    [("prove_budgets_memory", {"snap-kv", "h2o"}), ("prove_budgets_reads", {"top-attention"})],
)
def test_the_shipped_runs_are_such(config, policies):
    """With the curves that are shipped for the embedded model."""
    path = Path(__file__).parents[3] / "configs" / f"{config}.yaml"
    geometry = replace(PRESETS["panorama"].geometry(), model="panorama")
    told = yaml.safe_load(path.read_text())
    made, _ = chosen_policies(told["policies"], "full", told["budgets"])
    groups = grouped_by_policy(made)
    assert groups.keys() == {(name, mean) for name in policies for mean in ("6f", "9f", "12f")}
    shuffles = {f"shuffled-{n}" for n in (1, 2, 3)}
    for rules in groups.values():
        expected = {"uniform", "optimal", "focused-matched", "pyramid", "dynamic"} | shuffles
        assert rules.keys() == expected
    for policy in made.values():
        policy.check(geometry, 3, told["frames"])
    assert told["data"]["seed"] == 0 and told["prompts"] == 16
