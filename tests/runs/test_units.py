"""Samples of a prompt are one value: against runs in which they were averaged beforehand."""

import json

import numpy as np
import pytest

from lightning_kv.runs.analysis import analyse
from lightning_kv.runs.check import PASS, THIN, check
from lightning_kv.runs.costs import chunk_medians, cost_by_unit, policy_cost
from lightning_kv.runs.margins import loss_of
from lightning_kv.runs.recommend import recommend
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.runs.units import finished_units, grouped, paired_units, unit_curves, unit_means
from lightning_kv.runs.verdict import FILES, verdict
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.drift import drift

INFO = {
    "recall": MetricInfo("share", True, "-"),
    "error": MetricInfo("", False, "-"),
    "ssim": MetricInfo("", True, "-", against_reference=True, identical=1.0),
}
MIB = 2**20
LEVEL = {"full": 0.9, "a": 0.88, "b": 0.6}
PRICE = {"full": 8.0, "a": 2.0, "b": 1.0}


def record(policy, unit, sample, rng):
    """A clip whose every number is its own; the price of a policy is of its prompts too."""
    recall = LEVEL[policy] + 0.02 * rng.standard_normal()
    key = f"{unit}#{sample}" if sample else unit
    price = PRICE[policy] * (1 + 0.1 * rng.random())
    return {
        "policy": policy,
        "key": key,
        "unit": unit,
        "sample": sample,
        "prompt": unit,
        "metrics": {"recall": recall, "error": rng.random(), "ssim": 1 - rng.random() / 99},
        "curves": {"recall": [None, *(recall - 0.01 * np.arange(23) * rng.random()).tolist()]},
        "failure": None,
        "cost": {
            "kv_bytes_peak": int(price * MIB),
            "kv_bytes_mean": price * MIB / 2,
            "kv_read_fraction": price / 8,
            "kv_scored_fraction": 0.1 * rng.random(),
            "kv_kept_fraction": rng.random(),
            "seconds_per_chunk": (price * (1 + rng.random(5))).tolist(),
        },
    }


def clips(prompts, samples, policies=("full", "a", "b"), seed=0):
    """``samples`` of each of so many prompts; one number, or one for each prompt."""
    rng = np.random.default_rng(seed)
    each = [samples] * prompts if isinstance(samples, int) else samples
    return [
        record(policy, f"p{i:02d}", sample, rng)
        for i in range(prompts)
        for sample in range(each[i])
        for policy in policies
    ]


def averaged(records):
    """One record per policy and prompt: what is a mean is taken here, with numpy, number by number.

    Times cannot be averaged beforehand, nor peaks: they are of clips and chunks.
    """
    found = []
    for policy in dict.fromkeys(r["policy"] for r in records):
        for unit in dict.fromkeys(r["unit"] for r in records):
            own = [r for r in records if (r["policy"], r["unit"]) == (policy, unit)]
            means = {
                part: {n: float(np.mean([r[part][n] for r in own])) for n in names}
                for part, names in (
                    ("metrics", INFO),
                    ("cost", [n for n in own[0]["cost"] if n.startswith("kv")]),
                )
            }
            curve = np.array([r["curves"]["recall"] for r in own], dtype=float).mean(0).tolist()
            curves = {"recall": [None if value != value else value for value in curve]}
            cost = means["cost"] | {
                "kv_bytes_peak": max(r["cost"]["kv_bytes_peak"] for r in own),
                "seconds_per_chunk": [s for r in own for s in r["cost"]["seconds_per_chunk"]],
            }
            kept = {name: own[0][name] for name in ("policy", "prompt", "failure")}
            found.append(kept | means | {"key": unit, "cost": cost, "curves": curves})
    return found


def analysed(records, **run):
    names = dict.fromkeys(r["policy"] for r in records)
    summary = summarise(
        records,
        reference="full",
        policies={name: {} for name in names},
        metrics=INFO,
        run={"prompts": len({r.get("unit") for r in records}), "frames": 24, "rate": 2.0} | run,
        model={"name": "panorama"},
        fingerprint="-",
        interval=lambda values: bca_interval(values, resamples=200),
    )
    found = analyse(summary, records)
    json.dumps(found, allow_nan=False)
    return found


def without_counts(found, *more):
    """A summary without how many clips are beneath."""
    if isinstance(found, dict):
        out = ("clips", "measured", "run", *more)
        return {k: without_counts(v, *more) for k, v in found.items() if k not in out}
    return found


def approximately(found):
    """The same, numbers within rounding."""
    if isinstance(found, dict):
        return {k: approximately(v) for k, v in found.items()}
    if isinstance(found, list):
        return [approximately(v) for v in found]
    return pytest.approx(found, rel=1e-9, abs=1e-12) if isinstance(found, float) else found


@pytest.fixture(scope="module")
def many():
    """Seven prompts, of one to four samples each."""
    records = clips(7, [1, 2, 3, 4, 1, 2, 3])
    return records, analysed(records), analysed(averaged(records))


def test_everything_is_as_if_samples_had_been_averaged_beforehand(many):
    """Means, intervals, curves, paired differences, fronts, costs: all but the drift of clips."""
    _, found, once = many
    left, right = (without_counts(each, "drift", "pareto") for each in (found, once))
    assert left == approximately(right)
    for axis in ("kv_bytes_peak", "kv_read_fraction"):
        for metric in INFO:
            assert found["pareto"][metric][axis] == once["pareto"][metric][axis]


def test_both_counts_are_there(many):
    _, found, _ = many
    value = found["policies"]["a"]["metrics"]["recall"]
    assert (value["n"], value["clips"]) == (7, 16)
    assert (value["paired"]["n"], value["paired"]["clips"]) == (7, 16)
    assert found["measured"] == {"prompts": 7, "clips": 16}
    assert found["family"]["prompts"] == 7
    told = found["policies"]["a"]["drift"]["recall"]["start_end"]
    assert (told["n"], told["clips"]) == (7, 16)


def test_drift_is_that_of_clips_then_the_mean_over_prompts(many):
    records, found, _ = many
    ends = {
        name: {
            unit: np.mean(
                [
                    drift(r["curves"]["recall"], 2.0).start_end
                    for r in records
                    if (r["policy"], r["unit"]) == (name, unit)
                ]
            )
            for unit in dict.fromkeys(r["unit"] for r in records)
        }
        for name in ("full", "a")
    }
    told = found["policies"]["a"]["drift"]["recall"]
    assert told["start_end"]["mean"] == pytest.approx(np.mean(list(ends["a"].values())))
    gaps = [ends["a"][unit] - ends["full"][unit] for unit in ends["a"]]
    assert told["paired"]["difference"] == pytest.approx(np.mean(gaps))
    assert told["paired"]["n"] == 7


def test_costs_that_are_means_count_prompts_and_the_others_clips(many):
    records, found, _ = many
    own = [r for r in records if r["policy"] == "a"]
    cost = found["policies"]["a"]["cost"]
    for name in ("kv_bytes_mean", "kv_read_fraction", "kv_scored_fraction", "kv_kept_fraction"):
        each = [np.mean([r["cost"][name] for r in group]) for group in grouped(own).values()]
        assert cost[name] == pytest.approx(np.mean(each))
        assert cost[name] != pytest.approx(np.mean([r["cost"][name] for r in own]), rel=1e-4)
    assert cost["kv_bytes_peak"] == max(r["cost"]["kv_bytes_peak"] for r in own)
    seconds = np.concatenate([r["cost"]["seconds_per_chunk"] for r in own])
    assert cost["seconds_per_chunk_p50"] == pytest.approx(np.quantile(seconds, 0.5))
    assert cost["seconds_per_chunk_p95"] == pytest.approx(np.quantile(seconds, 0.95))
    base = [r for r in records if r["policy"] == "full"]
    theirs = np.concatenate([r["cost"]["seconds_per_chunk"] for r in base])
    assert cost["speedup"] == pytest.approx(np.median(theirs) / np.median(seconds))


def test_costs_of_prompts_are_means_of_their_clips():
    own = {r["key"]: r for r in clips(2, [3, 1], ("a",))}
    time = cost_by_unit(own, "seconds_per_chunk_p50")
    each = [np.median(own[key]["cost"]["seconds_per_chunk"]) for key in ("p00", "p00#1", "p00#2")]
    assert time["p00"] == pytest.approx(np.mean(each)) and set(time) == {"p00", "p01"}
    reads = cost_by_unit(own, "kv_read_fraction")
    shares = [own[key]["cost"]["kv_read_fraction"] for key in ("p00", "p00#1", "p00#2")]
    assert reads["p00"] == pytest.approx(np.mean(shares))
    assert cost_by_unit(own, "kv_bytes_peak") == {}
    del own["p01"]["cost"]["kv_kept_fraction"]
    kept = policy_cost(list(own.values()), [])["kv_kept_fraction"]
    assert kept == pytest.approx(
        np.mean([own[key]["cost"]["kv_kept_fraction"] for key in ("p00", "p00#1", "p00#2")])
    )


def test_times_of_chunks_are_medians_over_all_clips():
    own = clips(2, [3, 1], ("a",))
    own[0]["cost"]["seconds_per_chunk"].append(7.0)
    own[1]["cost"]["seconds_per_chunk"] = None
    times = np.array([r["cost"]["seconds_per_chunk"][:5] for r in (own[0], own[2], own[3])])
    assert chunk_medians(own) == [*map(pytest.approx, np.median(times, 0).tolist()), 7.0]


@pytest.fixture(scope="module")
def one():
    """Six samples of one prompt: however well they agree, they are one value."""
    return clips(1, 6, ("full", "a"))


def test_six_samples_of_one_prompt_are_one_value_in_the_table(one):
    for policy in analysed(one)["policies"].values():
        for value in policy["metrics"].values():
            assert (value["n"], value["clips"], value["ci95"]) == (1, 6, None)


def test_six_samples_of_one_prompt_have_a_curve_without_a_band(one):
    own = np.array([r["curves"]["recall"] for r in one if r["policy"] == "a"], dtype=float)
    curve = analysed(one)["policies"]["a"]["curves"]["recall"]
    assert curve["mean"][1:] == pytest.approx(own.mean(0)[1:]) and curve["mean"][0] is None
    assert set(curve["lo"]) == set(curve["hi"]) == {None}


def test_six_samples_of_one_prompt_are_no_test(one):
    found = analysed(one)
    test = found["policies"]["a"]["metrics"]["recall"]["paired"]
    assert [test[each] for each in ("n", "clips", "ci95", "se", "p", "p_holm", "d_z")] == [
        *(1, 6),
        *[None] * 5,
    ]
    assert (found["family"]["tests"], found["family"]["prompts"]) == (0, 0)


def test_six_samples_of_one_prompt_have_a_drift_without_interval_or_p(one):
    told = analysed(one)["policies"]["a"]["drift"]["recall"]
    for name, value in told.items():
        if name == "paired":
            assert (value["n"], value["clips"], value["ci95"], value["p"]) == (1, 6, None, None)
        elif value["mean"] is not None:
            assert (value["n"], value["ci95"]) == (1, None) and 1 <= value["clips"] <= 6
    assert told["start_end"]["mean"] is not None and told["start_end"]["clips"] == 6


def test_six_samples_of_one_prompt_leave_no_doubt_to_the_front(one):
    """Drawn anew, one prompt is always itself: what is on the front is there with certainty."""
    for axes in analysed(one)["pareto"].values():
        for found in axes.values():
            assert all(each["p"] == float(each["front"]) for each in found.values())


def test_six_samples_of_one_prompt_are_one_loss(one):
    own, base = ({r["key"]: r for r in one if r["policy"] == p} for p in ("a", "full"))
    facts = analysed(one)["policies"]["full"]["metrics"]
    found = loss_of(own, base, "recall", facts, 0.1)
    assert (found.n, found.clips, found.ci95) == (1, 6, None) and found.confidence <= 0.5
    gaps = [base[key]["metrics"]["recall"] - own[key]["metrics"]["recall"] for key in own]
    assert found.mean == pytest.approx(np.mean(gaps))
    near = loss_of(own, base, "ssim", facts, 0.1)
    shares = [1 - own[key]["metrics"]["ssim"] for key in own]
    assert (near.n, near.reference, near.mean) == (1, 1.0, pytest.approx(np.mean(shares)))


def test_six_samples_of_one_prompt_recommend_nothing(one):
    found = recommend(analysed(one, samples=6), one, margins={"recall": 0.5})
    assert found.policy is None and found.measured == 1
    assert found.words[0] == (
        "1 prompt (6 samples) cannot give 95 % confidence, so no policy is recommended yet: it "
        "takes 5 prompts or more."
    )
    assert any("over 1 prompt (6 samples)" in word for word in found.words)
    six = clips(6, 1, ("full", "a"))
    assert recommend(analysed(six), six, margins={"recall": 0.5}).policy == "a", "six prompts do"


def test_six_samples_of_one_prompt_pass_nothing(one, tmp_path):
    paths = []
    for name, records in (("one", one), ("six", clips(6, 1, ("full", "a")))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(analysed(records)))
    found = check(paths[0], paths[0], {"recall": 0.5})
    assert found.code == THIN and found.words[0].startswith("TOO FEW PROMPTS: 2 of 2")
    assert found.words[2].startswith("Over 1 prompt (6 samples): about 4 prompts more")
    assert {test.found.n for test in found.tests} == {1}
    assert check(paths[1], paths[1], {"recall": 0.5}).code == PASS


def test_the_gate_pairs_prompts_and_holds_their_means(tmp_path, many):
    records, found, _ = many
    worse = json.loads(json.dumps(records))
    for each in worse:
        if each["policy"] == "a":  # worse by 0.1 where a prompt has one sample, else not at all
            lone = sum(r["unit"] == each["unit"] for r in records) == 3
            each["metrics"]["recall"] -= 0.1 * lone
    paths = [tmp_path / "new.json", tmp_path / "old.json"]
    for path, summary in zip(paths, (analysed(worse), found), strict=True):
        path.write_text(json.dumps(summary))
    (test,) = check(*paths, {"recall": 0.2}, ["a"]).tests
    assert (test.found.n, test.clips) == (7, 16)
    assert test.found.mean == pytest.approx(0.1 * 2 / 7)


def test_the_gate_refuses_another_number_of_samples(tmp_path, one):
    paths = [tmp_path / "new.json", tmp_path / "old.json"]
    for path, more in zip(paths, ({"samples": 6}, {}), strict=True):
        path.write_text(json.dumps(analysed(one, **more)))
    with pytest.raises(ValueError, match=r"samples \(1 in the baseline, 6 in the run\)"):
        check(*paths)


def test_a_comparison_of_files_says_both_counts(one):
    summary = analysed(one)
    summary["model"] = {"name": FILES}
    words = verdict(summary, one)
    assert "a against full, over 1 prompt (6 samples): ssim " in words[0]
    assert any("no sure difference in recall, error; it takes" in word for word in words)


def test_values_by_prompt_are_what_the_gate_reads(many):
    records, found, _ = many
    own = [r for r in records if r["policy"] == "a"]
    told = found["policies"]["a"]["units"]
    assert list(told) == [f"p{i:02d}" for i in range(7)] and "clips" not in found["policies"]["a"]
    for unit, values in told.items():
        for name in INFO:
            each = [r["metrics"][name] for r in own if r["unit"] == unit]
            assert values[name] == pytest.approx(np.mean(each))


def test_what_a_sample_lacks_the_others_say():
    records = clips(2, 2, ("full",))
    records[0]["metrics"]["recall"] = None
    records[1]["curves"] = {}
    records[2]["curves"]["recall"][3] = None
    second = records[1]["metrics"]["recall"]
    means = unit_means(records, lambda r: r["metrics"]["recall"])
    assert means["p00"] == second and len(means) == 2
    first, last = unit_curves(records, "recall")
    assert first == records[0]["curves"]["recall"]
    assert last[3] == records[3]["curves"]["recall"][3]
    whole = [records[i]["curves"]["recall"][5] for i in (2, 3)]
    assert last[5] == pytest.approx(np.mean(whole))
    assert unit_curves(records, "error") == []


def test_samples_are_paired_with_those_of_the_same_noise():
    """Half of a prompt is measured: its other half must not stand against nothing."""
    records = {r["key"]: r for r in clips(2, 2, ("full",))}
    own = {key: records[key] for key in ("p00", "p01", "p01#1")}
    value = lambda r: r["metrics"]["recall"]  # noqa: E731
    found = paired_units(own, records, value)
    assert found.differences == [0.0, 0.0] and found.clips == 3
    apart = {"p00#7": records["p00#1"] | {"key": "p00#7"}}  # no noise in common, the same prompt
    found = paired_units(apart, {"p00": records["p00"]}, value)
    assert found.differences == [value(records["p00#1"]) - value(records["p00"])]
    assert (found.clips, len(found.values)) == (1, 1)
    assert paired_units(own, {}, value).values == ()


@pytest.mark.parametrize(
    ("left", "samples", "run", "finished"),
    [
        (24, 2, {"prompts": 4, "samples": 2}, 4),
        (23, 2, {"prompts": 4, "samples": 2}, 3),
        (18, 2, {"prompts": 4, "samples": 2}, 3),
        (17, 2, {"prompts": 4, "samples": 2}, 2),
        (3, 2, {"prompts": 4, "samples": 2}, 0),  # the second sample is not begun
        (12, 1, {"prompts": 4}, 4),
        (11, 1, {"prompts": 4}, 3),
        (0, 1, {"prompts": 4}, 0),
        (24, 2, {"prompts": 8}, 8),  # video files, where every clip was counted
        (23, 2, {"prompts": 8}, 3),
        (11, 1, {"prompts": 4, "unpaired": True}, 4),
    ],
)
def test_a_prompt_is_finished_with_all_of_its_samples(left, samples, run, finished):
    records = clips(4, samples)[:left]
    assert finished_units(records, ("full", "a", "b"), run) == finished


def test_a_record_without_a_unit_counts_by_its_key():
    records = clips(3, 2, ("full",))
    for each in records:
        del each["unit"]
    assert list(grouped(records)) == [r["key"] for r in records]
