"""The summary against hand-made figures and a slow twin in numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest

from lightning_kv.runs.summary import MetricInfo, summarise

METRICS = {
    "psnr": MetricInfo("dB", True, "psnr of the clip"),
    "recall": MetricInfo("share", True, "share of columns", "no frame was revisited"),
}


def a_record(policy: str, key: str, psnr: float | None, seconds: list[float] | None) -> dict:
    return {
        "policy": policy,
        "key": key,
        "metrics": {"psnr": psnr, "recall": None},
        "curves": {"psnr": [None, psnr, psnr and psnr + 1], "recall": [None, None, None]},
        "cost": {
            "kv_bytes_peak": 100 + int(key),
            "kv_bytes_mean": 50.0 + int(key),
            "kv_read_fraction": 0.25 * int(key),
            "kv_scored_fraction": 0.0,
            "seconds_per_chunk": seconds,
        },
    }


def extremes(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that is easy to check, and shows the order in which values arrive."""
    return (values[0], values[-1]) if len(values) > 1 else None


def summary_of(records: list[dict], **changes: object) -> dict:
    settings = {
        "reference": "full",
        "policies": {"full": {"retain": "everything"}, "random@9f": {"budget": "9f"}},
        "metrics": METRICS,
        "run": {"prompts": 3},
        "model": {"name": "panorama"},
        "fingerprint": "abc",
        "interval": extremes,
    }
    return summarise(records, **(settings | changes))


RECORDS = [
    a_record("full", "1", 100.0, [0.4, 0.2]),
    a_record("full", "2", 100.0, [0.6, 0.4]),
    a_record("full", "3", 100.0, [9.0, 9.0]),
    a_record("random@9f", "1", 10.0, [0.1, 0.2]),
    a_record("random@9f", "2", 40.0, [0.3, 0.2]),
]


def test_the_schema_is_that_of_the_results() -> None:
    summary = summary_of(RECORDS)
    assert list(summary) == [
        *("schema", "fingerprint", "reference", "model", "run", "measured", "policies")
    ]
    assert (summary["schema"], summary["fingerprint"], summary["reference"]) == (1, "abc", "full")
    assert (summary["model"], summary["run"]) == ({"name": "panorama"}, {"prompts": 3})
    assert list(summary["policies"]) == ["full", "random@9f"]
    policy = summary["policies"]["random@9f"]
    assert list(policy) == ["config", "metrics", "cost", "curves"]
    assert policy["config"] == {"budget": "9f"}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


PLAIN = {
    "against_reference": False,
    "identical": None,
    "comparable": True,
    "weights": None,
    "sets": False,
}


def test_samples_of_one_prompt_are_one_value() -> None:
    records = [
        a_record("random@9f", str(i), value, [0.1]) for i, value in enumerate((1.0, 3.0, 8.0))
    ]
    for record, unit in zip(records, ("cat", "cat", "dog"), strict=True):
        record["unit"] = unit
    found = summary_of(records)["policies"]["random@9f"]["metrics"]["psnr"]
    assert (found["mean"], found["n"]) == (5.0, 2)


def test_metrics_in_closed_form() -> None:
    metrics = summary_of(RECORDS)["policies"]["random@9f"]["metrics"]
    assert metrics["psnr"] == {
        "mean": 25.0,
        "ci95": [10.0, 40.0],
        "n": 2,
        "clips": 2,
        "unit": "dB",
        "higher_is_better": True,
        "recipe": "psnr of the clip",
        "status": "ok",
        **PLAIN,
    }
    assert metrics["recall"] == {
        "mean": None,
        "ci95": None,
        "n": 0,
        "clips": 0,
        "unit": "share",
        "higher_is_better": True,
        "recipe": "share of columns",
        "status": "no value: no frame was revisited",
        **PLAIN,
    }


def test_cost_in_closed_form() -> None:
    cost = summary_of(RECORDS)["policies"]["random@9f"]["cost"]
    assert cost.pop("kv_kept_fraction") is None, "these records do not know it"
    # Chunks of the policy: .1 .2 .2 .3; of the reference on the same two clips: .2 .4 .4 .6.
    assert cost == pytest.approx(
        {
            "kv_bytes_peak": 102,
            "kv_bytes_mean": 51.5,
            "kv_read_fraction": 0.375,
            "kv_scored_fraction": 0.0,
            "seconds_per_chunk_p50": 0.2,
            "seconds_per_chunk_p95": 0.285,
            "speedup": 2.0,
        }
    )
    assert summary_of(RECORDS)["policies"]["full"]["cost"]["speedup"] == 1.0


@pytest.mark.parametrize("seconds", [None, []])
def test_no_speedup_without_the_time_of_the_reference(seconds: list[float] | None) -> None:
    records = [a_record("full", "1", 100.0, seconds), a_record("random@9f", "1", 10.0, [0.1])]
    policies = summary_of(records)["policies"]
    assert policies["random@9f"]["cost"]["speedup"] is None
    assert policies["random@9f"]["cost"]["seconds_per_chunk_p50"] == 0.1
    assert policies["full"]["cost"]["seconds_per_chunk_p50"] is None


def test_curves_are_means_over_the_clips_that_have_the_frame() -> None:
    records = [*RECORDS, a_record("random@9f", "3", None, [0.1])]
    assert summary_of(records)["policies"]["random@9f"]["curves"] == {
        "psnr": {"mean": [None, 25.0, 26.0], "lo": [None, 10.0, 11.0], "hi": [None, 40.0, 41.0]},
        "recall": {"mean": [None] * 3, "lo": [None] * 3, "hi": [None] * 3},
    }


def test_numbers_do_not_depend_on_which_rank_measured_what() -> None:
    assert summary_of(RECORDS[::-1]) == summary_of(RECORDS)


def test_many_clips_against_numpy() -> None:
    draw = random.Random(0)
    records = [
        a_record(policy, str(key), draw.gauss(30, 5), [draw.random() for _ in range(5)])
        for policy in ("full", "random@9f")
        for key in range(20)
    ]
    result = summary_of(records)["policies"]["random@9f"]
    own = [record for record in records if record["policy"] == "random@9f"]
    seconds = np.array([record["cost"]["seconds_per_chunk"] for record in own]).ravel()
    assert result["metrics"]["psnr"]["mean"] == pytest.approx(
        np.mean([record["metrics"]["psnr"] for record in own])
    )
    assert result["cost"]["seconds_per_chunk_p95"] == pytest.approx(np.quantile(seconds, 0.95))
    assert result["cost"]["kv_bytes_peak"] == 119


def test_one_clip_has_a_mean_and_no_interval() -> None:
    psnr = summary_of([RECORDS[3]])["policies"]["random@9f"]["metrics"]["psnr"]
    assert (psnr["mean"], psnr["ci95"], psnr["n"], psnr["status"]) == (10.0, None, 1, "ok")


def test_a_degenerate_interval_is_null() -> None:
    summary = summary_of(RECORDS, interval=lambda values: (float("nan"), 1.0))
    assert summary["policies"]["random@9f"]["metrics"]["psnr"]["ci95"] is None
    json.dumps(summary, allow_nan=False)


def test_a_policy_that_was_not_reached_yet_is_null_throughout() -> None:
    policy = summary_of(RECORDS[:3])["policies"]["random@9f"]
    assert policy["metrics"]["psnr"]["status"] == "no value: no clip is finished"
    assert set(policy["cost"].values()) == {None}
    assert policy["curves"] == {}


def test_a_record_of_another_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sink'.*full, random@9f"):
        summary_of([*RECORDS, a_record("sink", "1", 1.0, [0.1])])
