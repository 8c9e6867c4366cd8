"""Metrics that are computed from others of the same clip."""

import numpy as np
import pytest

from lightning_kv.commands.list import metrics
from lightning_kv.metrics.suite import Choice, Suite
from lightning_kv.runs.derived import DERIVED, VBENCH, derivable, with_derived
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.summary import MetricInfo, summarise
from lightning_kv.stats.vbench import SCALES, vbench_quality

(QUALITY,) = DERIVED
VALUES = dict(zip(VBENCH.values(), (0.9, 0.95, 0.98, 0.99, 1.0, 0.6, 0.7), strict=True))


def test_the_metrics_are_those_of_vbench_on_its_networks():
    assert list(VBENCH) == list(SCALES)
    for name in VBENCH.values():
        assert Choice.parse(name).name == name, "as in results, with its network"


def test_its_name_asks_for_all_that_it_is_made_of():
    known = {"pixels", "fps"}
    asked = Suite(["sharpness", "vbench_quality", "temporal_flicker", "contrast"], known)
    rest = [name for name in VBENCH.values() if name != "temporal_flicker"]
    assert list(asked.choices) == ["sharpness", *rest, "temporal_flicker", "contrast"]
    assert derivable(asked.choices) == [QUALITY]
    assert asked.missing.keys() <= {*rest}, "what has no weights here says so by itself"


def test_a_clip_has_it_where_all_dimensions_are_measured():
    found = with_derived(VALUES | {"psnr": 30.0})
    dimensions = {name: VALUES[metric] for name, metric in VBENCH.items()}
    assert found.pop("vbench_quality") == vbench_quality(dimensions)
    assert found == VALUES | {"psnr": 30.0}


@pytest.mark.parametrize("name", VALUES)
def test_without_a_dimension_there_is_none(name):
    rest = {key: value for key, value in VALUES.items() if key != name}
    assert with_derived(rest) == rest and derivable(rest) == []
    for value in (None, 1.5, -0.1):
        assert with_derived(VALUES | {name: value})["vbench_quality"] is None


def test_one_that_is_there_stays():
    assert with_derived(VALUES | {"vbench_quality": 0.5})["vbench_quality"] == 0.5


def test_means_intervals_and_differences_come_for_free(tmp_path):
    run, rng = RunDirectory(tmp_path / "run"), np.random.default_rng(0)
    run.open("-", {}, {"reference": "full"})
    plain = dict.fromkeys(("kv_bytes_peak", "kv_bytes_mean", "seconds_per_chunk"))
    for i in range(3):
        values = {name: value - 0.1 * rng.random() for name, value in VALUES.items()}
        clip = {"policy": "full", "key": f"k{i}", "prompt": "-", "curves": {}, "cost": plain}
        run.append(0, clip | {"metrics": values})
    records = run.records()
    found = summarise(
        records,
        reference="full",
        policies={"full": {}},
        metrics={name: MetricInfo("", True, name) for name in VALUES},
        run={"prompts": 3},
        model={"name": "panorama"},
        fingerprint="-",
        interval=lambda values: (min(values), max(values)),
    )["policies"]["full"]["metrics"]["vbench_quality"]
    each = [
        vbench_quality({name: r["metrics"][metric] for name, metric in VBENCH.items()})
        for r in records
    ]
    assert (found["mean"], found["n"]) == (pytest.approx(np.mean(each)), 3)
    assert found["ci95"] == [min(each), max(each)] and found["higher_is_better"] is True
    assert all(name in found["recipe"] for name in VALUES) and not found["comparable"]


def test_the_list_of_metrics_says_what_it_is_derived_from():
    (row,) = [row for row in metrics() if row["metric"] == "vbench_quality"]
    assert row["needs"] == f"derived from {', '.join(VBENCH.values())}"
    assert (row["better"], row["unit"]) == ("higher", "-")
    assert {tuple(row) for row in metrics()} == {tuple(row)}, "columns as of any other"
