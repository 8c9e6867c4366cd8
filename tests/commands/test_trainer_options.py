"""--trainer.precision, profiler and strategy of evaluate and compare: what they change, and not."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_kv.cli import main
from lightning_kv.runs.video import write_mp4

ROOT = Path(__file__).parents[2]
SMALL = ["evaluate", "--prompts", "2", "--frames", "18", "--context_frames", "12", "--videos", "0"]
SMALL += ["--policies", "full,sliding-window@3f", "--metrics", "recall,psnr"]
SMALL += ["--data.shards", str(ROOT / "data/panorama-quick"), "--trainer.accelerator", "cpu"]
ONE = "{class_path: lightning.pytorch.strategies.SingleDeviceStrategy, init_args: {device: cpu}}"


def run_of(out, *words):
    """The summary's means and the description of a run."""
    main([*words, "--out", str(out)])
    found = json.loads((out / "summary.json").read_text())["policies"]
    means = {
        (name, metric): row["mean"]
        for name, each in found.items()
        for metric, row in each["metrics"].items()
    }
    return means, json.loads((out / "run.json").read_text())


@pytest.mark.slow
def test_a_profiler_and_a_strategy_change_no_value_and_no_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    means, plain = run_of(tmp_path / "plain", *SMALL)
    for profiler, said in (("simple", "[LightningModule]EvaluateModule"), ("advanced", "cumtime")):
        out = tmp_path / profiler
        words = ["--trainer.profiler", profiler, "--trainer.strategy", ONE]
        found, run = run_of(out, *SMALL, *words)
        assert found == means and run["fingerprint"] == plain["fingerprint"]
        assert said in (out / "test-profile.txt").read_text()
    assert not list(Path().iterdir()), "all is written under --out"


@pytest.mark.slow
def test_autocast_is_part_of_the_fingerprint_and_changes_rollouts(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--trainer.precision", "bf16-mixed"]
    means, run = run_of(out, *SMALL, *words)
    assert run["described"]["trainer_precision"] == "bf16-mixed"
    assert means["full", "psnr"] == pytest.approx(100), "the same noise, twice"
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--out", str(out)])
    assert stop.value.code == 2
    assert "These differ: trainer_precision (there 'bf16-mixed'" in capsys.readouterr().err
    exact, plain = run_of(tmp_path / "plain", *SMALL)
    assert "trainer_precision" not in plain["described"]
    name = ("sliding-window@3f", "psnr")
    assert exact[name] != means[name] == pytest.approx(exact[name], rel=0.01)


@pytest.mark.slow
def test_autocast_changes_no_value_of_videos(tmp_path):
    """Metrics and the networks that look at videos keep their own precision."""
    rng = np.random.default_rng(0)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for key in "abcdef":
            write_mp4(
                tmp_path / name / f"{key}.mp4", rng.integers(0, 256, (16, 32, 32, 3), np.uint8), 8
            )
    names = "psnr,ssim,temporal_flicker,sharpness,fvd/panorama-encoder,kvd/panorama-encoder"
    words = [
        "compare",
        str(tmp_path / "one"),
        str(tmp_path / "other"),
        "--metrics",
        names,
        "--videos",
        "0",
    ]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision"]
    exact, plain = run_of(tmp_path / "plain", *words, "32-true")
    means, run = run_of(tmp_path / "mixed", *words, "bf16-mixed")
    assert means == exact and sum(value is not None for value in exact.values()) > 6
    assert run["described"]["trainer_precision"] == "bf16-mixed"
    assert run["fingerprint"] != plain["fingerprint"]
