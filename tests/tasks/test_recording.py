"""What an evaluation leaves on disk, on the embedded model: metrics of every kind, and resume."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_kv.cli import main
from lightning_kv.runs.check import check

ROOT = Path(__file__).parents[2]
FVD = "fvd/panorama-encoder"
METRICS = f"[psnr,recall,retained_mass,temporal_flicker,{FVD},lpips]"
POLICIES = ["full", "sliding-window@6f"]
WORDS = [
    *("evaluate", "--data.shards", str(ROOT / "data/panorama-quick"), "--prompts", "3"),
    *("--frames", "24", "--context_frames", "6", "--policies", "[sliding-window@6f]"),
    *("--videos", "0", "--threads", "1", "--trainer.accelerator", "cpu"),
]
pytestmark = pytest.mark.usefixtures("no_page")


def evaluated(out, *words, metrics=METRICS):
    main([*WORDS, "--trainer.devices", "1", "--metrics", metrics, "--out", str(out), *words])
    return summary(out)


def summary(out):
    def refuse(word):
        raise AssertionError(f"the summary holds {word}")

    return json.loads((out / "summary.json").read_text(), parse_constant=refuse)


def records(out):
    lines = [line for p in (out / "records").iterdir() for line in p.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Three prompts, the reference and one policy; no weights are found."""
    with pytest.MonkeyPatch.context() as patch:
        nowhere = str(tmp_path_factory.mktemp("nowhere"))
        patch.setenv("LIGHTNING_KV_MODELS", nowhere)
        patch.setenv("TORCH_HOME", nowhere)
        out = tmp_path_factory.mktemp("single") / "run"
        evaluated(out)
        yield out


def test_every_kind_of_metric_has_a_row(single):
    found = summary(single)
    assert list(found["policies"]) == POLICIES
    rows = found["policies"]["sliding-window@6f"]["metrics"]
    assert list(rows) == ["psnr", "recall", "retained_mass", "temporal_flicker", FVD, "lpips/alex"]
    assert rows["lpips/alex"]["mean"] is None
    assert "unavailable: The weights" in rows["lpips/alex"]["status"]
    for name in ("psnr", "recall", "retained_mass", "temporal_flicker"):
        values = [r["metrics"][name] for r in records(single) if r["policy"] == POLICIES[1]]
        assert rows[name]["n"] == 3 and rows[name]["mean"] == pytest.approx(np.mean(values))
    assert 0 < rows["retained_mass"]["mean"] < 1
    full = found["policies"]["full"]["metrics"]
    assert full["retained_mass"]["mean"] == pytest.approx(1, abs=1e-5)
    assert full["psnr"]["mean"] is None and full["recall"]["mean"] > rows["recall"]["mean"]


def test_sets_are_compared_with_the_world_itself(single):
    """24 frames less 6 that were given are two windows of 8 frames of every clip."""
    for name in POLICIES:
        result = summary(single)["policies"][name]["metrics"][FVD]
        for side in ("", "_real"):
            counts = [result[f"{each}{side}"] for each in ("n", "clips", "windows")]
            assert counts == [3, 3, 6]
        assert result["against"] == "the real set" and {"null", "status", "se"} <= result.keys()
        folder = single / "features" / "policies" / name
        assert len(list(folder.glob("*.npz"))) == 3
        for path in folder.iterdir():
            assert np.load(path)["panorama-encoder"].shape[0] == 2
    paired = summary(single)["policies"][POLICIES[1]]["metrics"][FVD]["paired"]
    assert paired["n"] == 3 and paired["difference"] is not None
    assert not any("fvd" in name for record in records(single) for name in record["metrics"])


def equal(first, second):
    """All but timing."""
    for name in POLICIES:
        own, other = (found["policies"][name] for found in (first, second))
        assert own["units"] == other["units"] and own["drift"] == other["drift"]
        assert own["metrics"] == other["metrics"]
    return True


@pytest.mark.parametrize("kind", ["policies/full", "policies/sliding-window@6f", "real"])
@pytest.mark.thinned(3)
def test_features_that_are_lost_are_made_again(single, tmp_path, kind):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    before, lost = records(out), next((out / "features" / kind).iterdir())
    features = np.load(lost)["panorama-encoder"]
    lost.unlink()
    again = evaluated(out)
    assert np.allclose(np.load(lost)["panorama-encoder"], features, atol=1e-6)
    assert records(out) == before and equal(again, summary(single))


def test_a_clip_that_failed_has_no_features_to_wait_for(single, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    (file,) = (out / "records").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    key = lines[0]["key"]
    for record in lines:
        if record["key"] == key:
            record |= {"failure": "it broke", "metrics": dict.fromkeys(record["metrics"])}
            (out / "features" / "policies" / record["policy"] / f"{key}.npz").unlink()
    file.write_text("".join(json.dumps(record) + "\n" for record in lines))
    monkeypatch.setattr("lightning_kv.tasks.evaluate.rollout", None)  # nothing is left to roll out
    found = evaluated(out)["policies"][POLICIES[1]]["metrics"]
    assert found[FVD]["n"] == 2 and found[FVD]["windows"] == 4
    assert found["psnr"]["status"].startswith("1 of 3 clips failed")


def test_an_interrupted_run_goes_on(single, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    (file,) = (out / "records").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:30])
    again = evaluated(out)
    keys = [(r["policy"], r["key"]) for r in records(out)]
    assert len(keys) == len(set(keys)) == 6 and file.read_text().startswith("".join(lines[:3]))
    assert equal(again, summary(single))


@pytest.mark.slow
def test_two_processes_say_what_one_says(single, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    words = [sys.executable, "-m", "lightning_kv", *WORDS, "--metrics", METRICS]
    words += ["--trainer.devices", "2", "--out", str(tmp_path / "run")]
    env = clean | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(words, capture_output=True, text=True, env=env, timeout=200)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "run" / "records").iterdir())) == 2
    one, two = (summary(out)["policies"] for out in (single, tmp_path / "run"))
    for name in POLICIES:
        for metric, row in one[name]["metrics"].items():
            other = two[name]["metrics"][metric]
            assert (other["n"], other["status"]) == (row["n"], row["status"])
            assert (row["mean"] is None) == (other["mean"] is None)
            assert math.isclose(row["mean"] or 0, other["mean"] or 0, rel_tol=1e-5)


def test_a_run_checked_against_itself_needs_five_prompts(single):
    found = check(single, single / "summary.json", {"psnr": 0.5, "recall": 0.02})
    assert found.code == 2 and "about 2 prompts more would settle it" in found.words[2]
    assert {(test.policy, test.metric) for test in found.tests} == {
        ("full", "recall"),
        (POLICIES[1], "recall"),
        (POLICIES[1], "psnr"),
    }


@pytest.mark.parametrize(
    ("metrics", "words", "said"),
    [
        ("[pnsr]", [], "No metric 'pnsr'. Did you mean 'psnr'?"),
        ("[psnr,psnr]", [], "named twice"),
        ("[psnr]", ["--decode", "false"], "it needs pixels and pixels of a reference"),
        (f"[{FVD}]", ["--decode", "false"], "it needs pixels"),
        ("[psnr/alex]", [], "needs no network"),
        ("[fvd/alex]", [], "is not defined on 'alex'"),
        ("[]", [], "No metric is named"),
        ("[recall]", ["--real", "."], "does nothing: no metric compares sets"),
        (f"[{FVD}]", ["--real", "no/where"], "no such folder of videos"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, metrics, words, said, capsys
):
    with pytest.raises(SystemExit) as stop:
        evaluated(tmp_path / "run", *words, metrics=metrics)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and said in error
    assert not (tmp_path / "run").exists()


def test_without_pixels_there_are_the_other_metrics(tmp_path):
    found = evaluated(
        tmp_path / "run",
        "--decode",
        "false",
        "--prompts",
        "1",
        metrics="[latent_mse,retained_mass]",
    )
    rows = found["policies"][POLICIES[1]]["metrics"]
    assert rows["latent_mse"]["mean"] > 0 and 0 < rows["retained_mass"]["mean"] < 1
    assert not (tmp_path / "run" / "features").exists()
