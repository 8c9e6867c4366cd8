"""Whole rollouts as evidence for a scorer: who counts, what is sure, what is said."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_kv.models.sizes import PRESETS
from lightning_kv.policies.registry import policy_to_dict, presets
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.stats.inference import holm, sign_flip_p
from lightning_kv.tasks.proof.scorer_rollouts import extent, judged_policies, of_run, sections
from lightning_kv.tasks.rollouts.policies import chosen_policies

FACTS = {
    "recall": {"unit": "share", "higher_is_better": True},
    "latent_relative": {"unit": "", "higher_is_better": False},
}
FULL = {"full": (0.99, 5000, 0.1)}
POLICIES = FULL | {
    "distilled@6f": (0.6, 800, 0.12),
    "distilled-linear@6f": (0.5, 800, 0.12),
    "oracle@6f": (0.8, 700, 0.2),
    "h2o@6f": (0.33, 720, 0.1),
    "future-forcing@6f": (0.4, 914, 0.11),
    "random-memory@6f": (0.2, 660, 0.1),
    "distilled@9f": (0.85, 1100, 0.12),
    "h2o@9f": (0.45, 960, 0.1),
    "future-forcing@9f": (0.7, 1150, 0.115),
    "distilled@15f": (0.975, 1600, 0.13),
    "future-forcing@15f": (0.985, 1600, 0.12),
    "int4": (0.98, 1320, 0.2),
}
"""Mean recall, bytes, seconds per chunk."""


def spec(name, scorer=None):
    part = name.partition("@")[0].partition("-linear")[0]
    return {"name": name, "retain": {"part": part, "scorer": scorer}, "select": {"part": "x"}}


def recorded(path, policies=POLICIES, prompts=16, scorer=None, hindsight=("oracle@6f",)):
    rng, run = np.random.default_rng(0), RunDirectory(path)
    about = {
        "reference": "full",
        "policies": {name: spec(name, scorer) for name in policies},
        "metrics": FACTS,
        "run": {"hindsight": list(hindsight)},
        "model": {"model": "panorama"},
    }
    run.open("x", {}, about)
    for n in range(prompts):
        world = rng.normal(0, 0.02)
        for name, (recall, size, seconds) in policies.items():
            value = recall + world + rng.normal(0, 0.005)
            cost = {
                "kv_bytes_peak": size + n,
                "kv_bytes_mean": size,
                "kv_read_fraction": 1.0,
                "kv_scored_fraction": 0.0,
                "seconds_per_chunk": [seconds, 2 * seconds, seconds],
            }
            record = {"policy": name, "key": f"p{n}", "prompt": "x", "unit": f"p{n}", "cost": cost}
            metrics = {"recall": value, "latent_relative": 1 - value}
            run.append(0, record | {"metrics": metrics, "curves": {}})
    return run


def column(run, policy, metric="recall"):
    found = {r["key"]: r["metrics"][metric] for r in run.records() if r["policy"] == policy}
    return np.array([found[key] for key in sorted(found)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def found(run):
    return {own.budget: own for own in of_run(run, ["recall"])}


def test_who_is_compared_with_whom(found):
    roles = {b: {row.policy: row.role for row in own.rows} for b, own in found.items()}
    assert roles["6f"] == {
        "distilled@6f": "judged",
        "distilled-linear@6f": "student",
        "oracle@6f": "bound",
        "full": "reference",
        "h2o@6f": "equal",
        "random-memory@6f": "equal",
        "future-forcing@6f": "more bytes",
    }
    # 50 of 5000 bytes are no difference, and what drops nothing may hold no more either
    assert roles["9f"]["future-forcing@9f"] == "equal"
    assert roles["15f"]["int4"] == "other budget" and "int4" not in roles["9f"]
    assert roles["15f"]["future-forcing@9f"] == "other budget"
    assert "oracle@6f" not in roles["9f"] and "distilled-linear@6f" not in roles["9f"]


def test_reads_by_a_scorer_are_not_training_free(tmp_path):
    more = POLICIES | {"distilled-reads@6f": (0.9, 700, 0.1)}
    (first, *_) = of_run(recorded(tmp_path / "run", more), ["recall"])
    assert first.policy == "distilled@6f" and first.best == "future-forcing@6f"
    assert first.row("distilled-reads@6f").role == "student"


def test_differences_and_p_values_are_those_of_the_records(run, found):
    pairs, rows = [], []
    for budget, own in found.items():
        for row in own.rivals:
            pairs.append(column(run, f"distilled@{budget}") - column(run, row.policy))
            rows.append(row)
    expected = holm([sign_flip_p(own, permutations=20_000) for own in pairs])
    assert len(rows) == 15  # 9 of them at another budget, or none
    for row, pair, p in zip(rows, pairs, expected, strict=True):
        assert row.gain.gain == pytest.approx(pair.mean())
        assert row.gain.low < pair.mean() < row.gain.high
        assert row.p == pytest.approx(p, abs=1e-9)
    own = found["6f"].row("h2o@6f")
    assert own.bytes_peak == 735 and own.ms_per_chunk == 100
    assert own.value[0] == pytest.approx(column(run, "h2o@6f").mean())
    assert all(row.p is None for row in found["6f"].of("student", "bound", "reference"))


def test_the_best_is_the_best_of_the_budget_whatever_it_holds(run, found):
    assert [own.best.partition("@")[0] for own in found.values()] == ["future-forcing"] * 3
    own, best, bound = (
        column(run, name).mean() for name in ("distilled@6f", "future-forcing@6f", "oracle@6f")
    )
    assert found["6f"].gap.value == pytest.approx((own - best) / (bound - best))
    assert found["6f"].gap.low < found["6f"].gap.value < found["6f"].gap.high
    assert found["9f"].gap is None
    words = " ".join(found["6f"].words)
    assert "better than 3 of 3 training-free policies of this budget or of no more bytes" in words
    assert "A chunk takes 120.0 ms, of all clips of a batch: +20.0 ms against full and" in words
    assert " and +10.0 ms against future" in words
    assert "Policies of this budget hold 0.83 to 1.14 times the bytes that it does." in words
    assert "Against distilled-linear@6f: +0.1" in words
    late = found["15f"]
    assert late.row("int4").p is not None and not late.better  # of no budget, and no more bytes


def test_the_aim_is_met_where_it_is_better_twice_and_nowhere_much_worse(found):
    assert [own.better for own in found.values()] == [True, True, False]
    assert [own.not_worse for own in found.values()] == [True] * 3 and found["15f"].surely_worse
    said = extent(list(found.values()))
    assert said[0] == (
        "By recall, distilled is better than every training-free policy of its budget or bytes at "
        "6f, 9f, and nowhere worse than the best by 0.02, though surely worse by less at 15f. The "
        "aim, better at 2 budgets and nowhere worse, is met."
    )
    assert "adjusted for 15 training-free policies" in said[1] and "flatters" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"distilled@15f": 0.9}, "shown to be within 0.02 of the best at 15f. The aim"),
        ({"distilled@9f": 0.7}, "training-free policy of its budget or bytes at 6f, and nowhere"),
        ({"distilled@6f": 0.3, "distilled@9f": 0.4}, "at no budget shown to be better than every"),
    ],
)
def test_the_aim_is_not_met(tmp_path, changed, words):
    policies = POLICIES | {n: (x, *POLICIES[n][1:]) for n, x in changed.items()}
    (said, *_) = extent(of_run(recorded(tmp_path / "run", policies), ["recall"]))
    assert words in said and said.endswith("and nowhere worse, is not met.")


def test_losses_are_better_when_lower(run, found):
    every = of_run(run)
    assert [own.metric for own in every] == ["recall"] * 3 + ["latent_relative"] * 3
    for own in every[3:]:
        other = found[own.budget]
        assert own.best == other.best and own.better == other.better and own.not_worse is None
        for row in own.rivals:
            assert row.gain.gain == pytest.approx(other.row(row.policy).gain.gain)
    assert "what loss would count as none is not known" in extent(every)[1]
    told = json.loads(json.dumps([asdict(own) for own in every], allow_nan=False))
    assert told[0]["rows"][0]["gain"] is None
    first, *_, last = sections(every)
    assert first.title == "distilled@6f, recall" and first.rows[0][:4] == (
        *("distilled@6f", "judged", "815 B", "120.0"),
    )
    assert [row[1] for row in last.rows].count("other budget") == 3  # of 6


def test_a_bound_below_the_best_leaves_no_gap(tmp_path):
    policies = POLICIES | {"oracle@6f": (0.2, *POLICIES["oracle@6f"][1:])}
    (first, *_) = of_run(recorded(tmp_path / "run", policies), ["recall"])
    assert first.gap is None and "gap to the oracle" not in " ".join(first.words)


def test_policies_that_are_not_finished_are_named(tmp_path):
    run = recorded(tmp_path / "run")
    file = next((tmp_path / "run").rglob("*.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    kept = [x for x in lines if '"int4"' not in x or '"p3"' not in x]
    file.write_text("".join(kept))
    assert len(kept) == len(lines) - 1
    (_, _, said) = extent(of_run(run, ["recall"]))
    assert said == ("Compared over fewer prompts, as the run has no more of them: int4 (15).")


def test_few_prompts_are_said(tmp_path):
    said = extent(of_run(recorded(tmp_path / "few", prompts=5), ["recall"]))
    assert said[-1] == "No effect can be shown on fewer than 10 prompts."
    with pytest.raises(ValueError, match="Too few prompts: 1 have a value of recall"):
        of_run(recorded(tmp_path / "one", prompts=1))


def test_what_cannot_be_judged_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="no learned scorer at a budget: its policies are full"):
        of_run(recorded(tmp_path / "none", {"full": POLICIES["full"]}))
    lonely = {name: POLICIES[name] for name in ("full", "distilled@6f", "h2o@9f")}
    with pytest.raises(ValueError, match="no training-free policy of the budget 6f"):
        of_run(recorded(tmp_path / "lonely", lonely))
    with pytest.raises(ValueError, match="metric by which this run can be judged 'recal'"):
        of_run(run, ["recal"])
    two = {"a@6f": {"retain": {"part": "distilled"}}, "b@6f": {"select": {"part": "distilled"}}}
    with pytest.raises(ValueError, match="several learned scorers, a, b, and none"):
        judged_policies(run, two)
    assert judged_policies(run, {"a@6f": two["a@6f"]}) == {"6f": "a@6f"}


def test_prompts_that_the_scorer_was_fitted_on_are_named(tmp_path):
    geometry = PRESETS["panorama"].geometry()
    scorer = Scorer.fresh("mlp", geometry)
    told = {"data": {"prompts": ["p3", "elsewhere"]}}
    replace(scorer, about=told).save(tmp_path / "s.safetensors")
    part = {"part": "distilled", "budget": "9f", "scorer": str(tmp_path / "s.safetensors")}
    made, _ = chosen_policies([{"name": "distilled@9f", "retain": part}])
    file = policy_to_dict(made["distilled@9f"])["retain"]["scorer"]
    with pytest.warns(UserWarning, match=r"\(s.safetensors\) was taught on 1 prompt .*: p3\."):
        of_run(recorded(tmp_path / "run", scorer=file), ["recall"])
    scorer.save(tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match="not at hand as it was, so it cannot be told"):
        of_run(RunDirectory(tmp_path / "run"), ["recall"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_run(recorded(tmp_path / "clean", scorer=file | {"sha256": ""}), ["recall"])


def saved(name):
    """What a policy of the catalogue saves."""
    return presets()[name.partition("@")[0].removesuffix("-last3")].saves


def test_the_shipped_run_has_every_memory_of_the_catalogue():
    folder = Path(__file__).parents[3] / "configs"
    told = yaml.safe_load((folder / "distilled_vs_training_free.yaml").read_text())
    made, _ = chosen_policies(told["policies"], "full", told["budgets"])
    about = {name: policy_to_dict(own) for name, own in made.items()}
    assert judged_policies(RunDirectory(folder), about).keys() == {"6f", "9f", "15f"}
    assert [name for name, own in made.items() if own.needs] == [
        *("oracle@6f", "oracle@9f", "oracle@15f"),
    ]
    every = yaml.safe_load((folder / "catalogue.yaml").read_text())
    other, _ = chosen_policies(every["policies"], "full", every["budgets"])
    memories = {
        name
        for name, own in other.items()
        if "@" in name and not own.needs and "memory" in saved(name)
    }
    assert memories <= made.keys() and len(memories) > 80
    assert all(made[name] == other[name] for name in memories)
    for policy in (own for name, own in made.items() if not name.startswith("distilled")):
        geometry = replace(PRESETS["panorama"].geometry(), model="panorama")
        policy.check(geometry, 3, told["frames"])
    assert told["data"]["seed"] == 0 and told["prompts"] == 16
