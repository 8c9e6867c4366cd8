"""Statistics of a summary against scipy, brute force and calls clip by clip."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.stats.drift import NAMES, drift

INFO = {
    "psnr": MetricInfo("dB", True, "-", against_reference=True),
    "recall": MetricInfo("share", True, "-"),
    "error": MetricInfo("", False, "-"),
    "brightness": MetricInfo("", None, "-"),
    "fvd/x": MetricInfo("", False, "-", sets=True),
}
RATE = 2.0


def record(policy, key, metrics=None, curves=None, mib=1, seconds=0.1):
    return {
        "policy": policy,
        "key": key,
        "prompt": "-",
        "metrics": dict.fromkeys(INFO) | (metrics or {}),
        "curves": curves or {},
        "failure": None if metrics else "it broke",
        "cost": {
            "kv_bytes_peak": mib,
            "kv_bytes_mean": mib,
            "kv_read_fraction": 1.0,
            "kv_scored_fraction": 0.0,
            "seconds_per_chunk": [seconds],
        },
    }


def analysed(records, names=("full", "a", "b")):
    summary = summarise(
        records,
        reference="full",
        policies={name: {} for name in names},
        metrics=INFO,
        run={"prompts": 9, "frames": 24, "rate": RATE},
        model={"name": "panorama"},
        fingerprint="-",
        interval=lambda values: None,
    )
    found = analyse(summary, records)
    json.dumps(found, allow_nan=False)  # whatever the run is like
    return found


@pytest.fixture(scope="module")
def run():
    """Three policies on eight prompts; one prompt failed under ``a``, one was never run under b."""
    rng, records = np.random.default_rng(0), []
    for i, name in itertools.product(range(8), ("full", "a", "b")):
        if (name, i) == ("b", 0):
            continue
        level = {"full": 0.9, "a": 0.6, "b": 0.88}[name]
        curve = (level + 0.05 * rng.standard_normal(24) - 0.01 * np.arange(24)).tolist()
        curve[:3] = [None] * 3
        values = {
            "psnr": None if name == "full" else 20 + i,
            "recall": float(np.mean(curve[3:])),
            "error": float(rng.random()),
            "brightness": float(rng.random()),
        }
        cost = {"full": 9, "a": 3, "b": 6}[name]
        failed = (name, i) == ("a", 5)
        records.append(
            record(
                name,
                f"k{i}",
                None if failed else values,
                {} if failed else {"recall": curve},
                mib=cost,
                seconds=cost / 100,
            )
        )
    return records[::-1], analysed(records[::-1])


def values(records, policy, metric):
    return {
        r["key"]: r["metrics"][metric]
        for r in records
        if r["policy"] == policy and r["metrics"][metric] is not None
    }


def test_paired_differences_are_those_of_scipy(run):
    records, found = run
    for policy, n in (("a", 7), ("b", 7)):
        for metric in ("recall", "error", "brightness"):
            own, base = (values(records, name, metric) for name in (policy, "full"))
            gaps = np.array([own[key] - base[key] for key in sorted(own)])
            test = found["policies"][policy]["metrics"][metric]["paired"]
            exact = stats.permutation_test(
                (gaps,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
            )
            assert test["n"] == n == len(gaps)
            assert test["difference"] == pytest.approx(gaps.mean())
            assert test["se"] == pytest.approx(stats.sem(gaps))
            assert test["d_z"] == pytest.approx(gaps.mean() / gaps.std(ddof=1))
            assert test["p"] == pytest.approx(exact.pvalue)
            assert test["ci95"][0] <= test["difference"] <= test["ci95"][1]
    for metric in INFO:
        assert found["policies"]["full"]["metrics"][metric]["paired"] is None
    assert found["policies"]["a"]["metrics"]["psnr"]["paired"] is None


def test_holm_by_hand(run):
    _, found = run
    tests = [
        metric["paired"]
        for policy in found["policies"].values()
        for metric in policy["metrics"].values()
        if metric["paired"]
    ]
    needed = found["family"].pop("prompts_needed")
    assert found["family"] == {"tests": 6, "correction": "Holm", "level": 0.05, "prompts": 7}
    assert 6 * 2 ** (1 - needed) <= 0.05 < 6 * 2 ** (2 - needed), "the least p, times the tests"
    ordered, largest = sorted(tests, key=lambda test: test["p"]), 0.0
    for rank, test in enumerate(ordered):
        largest = max(largest, min(1, test["p"] * (len(tests) - rank)))
        assert test["p_holm"] == pytest.approx(largest)


def test_drift_is_the_mean_over_clips(run):
    records, found = run
    own = {
        policy: {
            r["key"]: drift(r["curves"]["recall"], RATE).to_dict()
            for r in records
            if r["policy"] == policy and r["curves"]
        }
        for policy in ("full", "a")
    }
    for policy, drifts in own.items():
        told = found["policies"][policy]["drift"]["recall"]
        assert set(told) == {*NAMES, "paired"}
        for name in NAMES:
            there = [each[name] for each in drifts.values() if each[name] is not None]
            assert told[name]["n"] == len(there)
            assert told[name]["mean"] == (pytest.approx(np.mean(there)) if there else None)
    assert found["policies"]["full"]["drift"]["recall"]["paired"] is None
    gaps = [own["a"][key]["start_end"] - own["full"][key]["start_end"] for key in own["a"]]
    assert found["policies"]["a"]["drift"]["recall"]["paired"]["difference"] == pytest.approx(
        np.mean(gaps)
    )


def test_the_front_by_brute_force(run):
    records, found = run
    assert set(found["pareto"]) == {"psnr", "recall", "error"}, "brightness has no better"
    for metric, sign in (("recall", 1), ("error", -1)):
        own = {name: values(records, name, metric) for name in ("full", "a", "b")}
        shared = set.intersection(*map(set, own.values()))
        assert len(shared) == 6
        points = {
            name: (sign * np.mean([own[name][key] for key in shared]), cost)
            for name, cost in (("full", 9), ("a", 3), ("b", 6))
        }
        for axis in ("kv_bytes_peak", "seconds_per_chunk_p50"):
            told = found["pareto"][metric][axis]
            for name, (quality, cost) in points.items():
                beaten = any(
                    q >= quality and c <= cost and (q, c) != (quality, cost)
                    for q, c in points.values()
                )
                assert told[name]["front"] == (not beaten)
                assert 0 <= told[name]["p"] <= 1
            assert told["a"] == {"front": True, "p": 1.0}, "nothing is cheaper"


def test_every_front_is_of_its_own_cost():
    """Equal quality, so that the cheapest stands alone: another policy for bytes, rows and time."""
    costs = {"full": (9, 0.5, 0.1), "a": (3, 0.9, 0.5), "b": (6, 0.1, 0.9)}
    records = []
    for i, (name, (held, read, seconds)) in itertools.product(range(3), costs.items()):
        clip = record(name, f"k{i}", {"recall": 0.5}, mib=held, seconds=seconds)
        clip["cost"]["kv_read_fraction"] = read
        records.append(clip)
    found = analysed(records)["pareto"]["recall"]
    for axis, best in (
        ("kv_bytes_peak", "a"),
        ("kv_read_fraction", "b"),
        ("seconds_per_chunk_p50", "full"),
    ):
        assert found[axis] == {n: {"front": n == best, "p": float(n == best)} for n in costs}


def test_one_prompt(run):
    metrics = {"recall": 0.5, "error": 0.25}
    found = analysed([record("full", "k", metrics), record("a", "k", metrics | {"recall": 0.25})])
    test = found["policies"]["a"]["metrics"]["recall"]["paired"]
    assert test == {
        "difference": -0.25,
        "ci95": None,
        "se": None,
        "p": None,
        "p_holm": None,
        "d_z": None,
        "n": 1,
        "clips": 1,
    }
    assert found["family"]["tests"] == 0
    assert found["policies"]["b"]["metrics"]["recall"]["paired"] is None


def test_a_policy_without_clips_and_a_metric_without_values():
    records = [record(name, f"k{i}", {"recall": 0.5}) for i in range(3) for name in ("full", "a")]
    found = analysed(records)
    assert found["policies"]["b"]["units"] == {} and found["policies"]["b"]["drift"] == {}
    assert found["policies"]["a"]["metrics"]["error"]["paired"] is None
    assert set(found["pareto"]["recall"]["kv_bytes_peak"]) == {"full", "a"}
    assert "error" not in found["pareto"]


def test_policies_that_share_no_prompt_have_no_front():
    """As in a run that is not finished, or where each policy failed elsewhere."""
    records = [record("full", "k0", {"recall": 0.5}), record("a", "k1", {"recall": 0.5})]
    found = analysed(records)
    assert found["pareto"] == {} and found["policies"]["a"]["metrics"]["recall"]["paired"] is None


def test_curves_in_which_nothing_counts():
    curves = {"recall": [None] * 6, "error": [], "psnr": [0.5]}
    records = [
        record(name, f"k{i}", {"recall": 0.5}, curves) for i in range(3) for name in ("full", "a")
    ]
    told = analysed(records)["policies"]["a"]["drift"]
    assert told["recall"]["start_end"] == {"mean": None, "ci95": None, "n": 0, "clips": 0}
    assert told["recall"]["paired"] is None and told["psnr"]["start_end"]["mean"] is None
    assert told["error"] == {"paired": None}


def test_equal_policies_differ_nowhere():
    records = [record(name, f"k{i}", {"recall": i / 7}) for i in range(6) for name in ("full", "a")]
    found = analysed(records)
    test = found["policies"]["a"]["metrics"]["recall"]["paired"]
    assert (test["difference"], test["ci95"], test["p"], test["d_z"]) == (0, [0, 0], 1, None)
    assert math.isclose(test["se"], 0)
    assert all(each["front"] for each in found["pareto"]["recall"]["kv_bytes_peak"].values())
