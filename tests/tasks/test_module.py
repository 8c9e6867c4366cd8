"""Evaluation as a module under somebody's own Trainer: logs, callbacks, resume, ranks, CLI."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_kv.cli import main
from lightning_kv.data.datamodule import PromptDataModule, VideoPairDataModule
from lightning_kv.metrics import VideoMetric
from lightning_kv.metrics.suite import Suite
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.tasks.callbacks import ComparisonVideos, RecordWriter, TraceWriter
from lightning_kv.tasks.compare import CompareModule
from lightning_kv.tasks.evaluate import EvaluateModule

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "data/panorama-quick"
FVD = "fvd/panorama-encoder"
METRICS = ["recall", "psnr", "latent_mse", FVD]
POLICIES = ["sliding-window@6f", "full"]
SMALL = {"frames": 15, "context_frames": 6}  # 9 frames: a window of 8 for the distance of sets
pytestmark = pytest.mark.usefixtures("no_page")


def trainer(callbacks=(), logger=False, **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return L.Trainer(callbacks=list(callbacks), logger=logger, **(quiet | more))


def evaluated(out, callbacks=(), prompts=3, samples=1, **settings):
    """A run as a user's own few lines make it."""
    module = EvaluateModule("panorama", POLICIES, metrics=METRICS, **(SMALL | settings))
    data = PromptDataModule(SHARDS, prompts, samples)
    run = trainer([RecordWriter(out), *callbacks], CSVLogger(out, name="", version="log"))
    run.test(module, datamodule=data, verbose=False)
    return module


def logged(out):
    with (out / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(x) for name, x in rows[-1].items() if x and name not in ("epoch", "step")}


def summary(out):
    return json.loads((out / "summary.json").read_text())


def agree(out, units):
    """What was logged is what the summary says, and that is the mean of the records."""
    found, policies = logged(out), summary(out)["policies"]
    records = RunDirectory(out).records()
    told = {}
    for name, policy in policies.items():
        for metric, row in policy["metrics"].items():
            if row["mean"] is not None:
                told[f"{name}/{metric}"] = row["mean"]
                assert row["n"] == units
    assert found.keys() == told.keys() and len(told) >= 7
    for name, value in found.items():
        assert value == pytest.approx(told[name], rel=1e-12, abs=1e-15), name
        policy, metric = name.split("/", 1)
        if metric != FVD:
            own = [r for r in records if r["policy"] == policy]
            means = [
                np.mean([r["metrics"][metric] for r in own if r["unit"] == unit])
                for unit in {r["unit"] for r in own}
            ]
            assert value == pytest.approx(np.mean(means), rel=1e-12, abs=1e-15), name
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Two prompts of two noises each, with everything that callbacks write."""
    out = tmp_path_factory.mktemp("single") / "run"
    beside = [ComparisonVideos(out, 1), TraceWriter(out, 1)]
    evaluated(out, beside, prompts=2, samples=2)
    return out


def test_ten_lines_and_a_logger_of_ones_own(single):
    found = agree(single, units=2)
    assert set(found) == {f"{n}/{m}" for n in POLICIES for m in METRICS}
    assert found["full/psnr"] == 100 and found["full/latent_mse"] == 0
    keys = {r["key"] for r in RunDirectory(single).records()}
    assert len(keys) == 4 and sum(key.endswith("-s1") for key in keys) == 2
    assert len(list((single / "videos").glob("*.mp4"))) == 1
    assert summary(single)["model"]["name"] == "panorama"
    assert len(list((single / "traces").glob("*.npz"))) == 1
    assert {path.name for path in single.iterdir()} >= {"report.html", "report.md", "log"}


def test_samples_are_other_noise_of_the_same_world(single):
    records = {(r["policy"], r["key"]): r for r in RunDirectory(single).records()}
    for (policy, key), record in records.items():
        if key.endswith("-s1"):
            first = records[policy, key.removesuffix("-s1")]
            assert (record["unit"], record["prompt"]) == (first["unit"], first["prompt"])
            assert (first["sample"], record["sample"]) == (0, 1)
            assert record["curves"]["latent_mse"] != first["curves"]["latent_mse"] or (
                policy == "full"
            )


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 8])
@pytest.mark.thinned(3)
def test_what_was_cut_off_goes_on_and_logs_the_whole(single, tmp_path, kept):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    shutil.rmtree(out / "log")
    (out / "summary.json").unlink()
    (file,) = (out / "records").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    half = "" if kept == 8 else lines[kept][:30]
    file.write_text("".join(lines[:kept]) + half)
    evaluated(out, prompts=2, samples=2)
    assert agree(out, units=2) == logged(single)
    again = file.read_text().splitlines(keepends=True)
    assert again[:kept] == lines[:kept] and len(again) == 8


@pytest.mark.parametrize("lost", ["real", "policies/full", "policies/sliding-window@6f"])
@pytest.mark.thinned(2)
def test_features_that_are_lost_are_logged_again(single, tmp_path, lost):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    shutil.rmtree(out / "log")
    files = sorted((out / "features" / lost).iterdir())
    assert len(files) == (2 if lost == "real" else 4)  # the world itself once, not per noise
    files[0].unlink()
    evaluated(out, prompts=2, samples=2)
    assert agree(out, units=2) == pytest.approx(logged(single), rel=1e-9)
    assert files[0].is_file()


def test_records_that_are_there_are_not_measured_again(single, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(single, out)
    monkeypatch.setattr("lightning_kv.tasks.evaluate.rollout", None)
    evaluated(out, prompts=2, samples=2)
    assert agree(out, units=2) == logged(single)


def launched(how, out, processes):
    """The command line under a launcher; without one, the Trainer starts the processes."""
    words = ["evaluate", "--data.shards", str(SHARDS), "--prompts", "2", "--samples", "2"]
    words += [f"--{name}={value}" for name, value in SMALL.items()]
    words += ["--policies", "[sliding-window@6f,full]"]
    words += ["--metrics", f"[{','.join(METRICS)}]", "--videos", "0", "--threads", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "csv", "--out", str(out)]
    script = str(ROOT / "tools/evaluate.py")
    tool = Path(sys.executable).parent
    start = {
        "trainer": [sys.executable, "-m", "lightning_kv", *words],
        "torchrun": [str(tool / "torchrun"), "--nproc-per-node", str(processes), script],
        "fabric": [str(tool / "fabric"), "run", "--accelerator", "cpu"],
    }[how]
    if how == "trainer":
        start += ["--trainer.devices", str(processes)]
    elif how == "torchrun":
        start += words[1:]
    else:
        start += ["--devices", str(processes), script, "--", *words[1:]]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    env = clean | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(start, capture_output=True, text=True, env=env, timeout=300)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(("how", "processes"), [("trainer", 3), ("torchrun", 2), ("fabric", 2)])
@pytest.mark.slow
def test_any_number_of_processes_logs_what_one_logs(single, tmp_path, how, processes):
    out = tmp_path / "run"
    launched(how, out, processes)
    assert agree(out, units=2) == pytest.approx(logged(single), rel=1e-12, abs=1e-15)
    ranks = {r["rank"] for r in RunDirectory(out).records()}
    assert ranks == set(range(min(processes, 4)))


@pytest.mark.slow
def test_a_rank_without_work_logs_and_ends_like_the_others(tmp_path):
    """Three ranks for the last unfinished item of a run that was cut off."""
    out = tmp_path / "run"
    launched("trainer", out, 1)
    before = logged(out)
    (file,) = (out / "records").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:6]))
    shutil.rmtree(out / "log")
    launched("trainer", out, 3)
    assert agree(out, units=2) == pytest.approx(before, rel=1e-12, abs=1e-15)


def test_without_a_writer_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = EvaluateModule("panorama", ["sliding-window@6f"], metrics=["recall"], **SMALL)
    (found,) = trainer().test(module, datamodule=PromptDataModule(SHARDS, 1), verbose=False)
    assert set(found) == {"full/recall", "sliding-window@6f/recall"}
    assert not list(tmp_path.iterdir())


class Lamp(VideoMetric):
    """Somebody's own metric."""

    higher_is_better = True

    def frame_values(self, preds, target=None):
        """Brightest value of every frame."""
        return preds.double().flatten(1).amax(1)


def test_a_second_test_says_what_the_first_said(tmp_path):
    module = EvaluateModule("panorama", ["sliding-window@6f"], metrics=["recall", FVD], **SMALL)
    found = [
        trainer().test(module, datamodule=PromptDataModule(SHARDS, n), verbose=False)[0]
        for n in (2, 2, 3)
    ]
    assert found[0] == found[1] and len(found[0]) == 4
    fresh = EvaluateModule("panorama", ["sliding-window@6f"], metrics=["recall", FVD], **SMALL)
    assert (
        found[2] == trainer().test(fresh, datamodule=PromptDataModule(SHARDS, 3), verbose=False)[0]
    )


def test_a_writer_that_is_used_again_refuses_another_run(tmp_path):
    writer, data = RecordWriter(tmp_path / "run"), PromptDataModule(SHARDS, 1)
    for seed in (0, 1):
        module = EvaluateModule("panorama", ["full"], metrics=["recall"], seed=seed, **SMALL)
        if seed:
            with pytest.raises(ValueError, match="holds another run"):
                trainer([writer]).test(module, datamodule=data, verbose=False)
        else:
            trainer([writer]).test(module, datamodule=data, verbose=False)
    assert trainer().test(module, datamodule=data, verbose=False)[0], "nothing counts as finished"


def test_settings_of_a_metric_that_is_an_object_are_of_the_run():
    class Scaled(Lamp):
        def __init__(self, scale=1):
            super().__init__()
            self.scale = scale

    known = {"pixels"}
    one, two = (Suite([Scaled(scale)], known).recipes() for scale in (1, 2))
    assert one != two and "scale=2" in str(two)


def test_pictures_and_traces_need_no_records(tmp_path):
    out = tmp_path / "run"
    module = EvaluateModule("panorama", ["sliding-window@6f"], metrics=["recall"], **SMALL)
    beside = [ComparisonVideos(out), TraceWriter(out)]
    trainer(beside).test(module, datamodule=PromptDataModule(SHARDS, 1), verbose=False)
    found = sorted(path.suffix for path in out.rglob("*.*"))
    assert found == [".mp4", ".mp4", ".npz"]


def test_a_run_callback_without_a_data_module_is_said(tmp_path):
    module = EvaluateModule("panorama", ["full"], metrics=["recall"], **SMALL)
    loader = PromptDataModule(SHARDS, 1).test_dataloader()
    with pytest.raises(ValueError, match=r"RecordWriter must know.*datamodule=PromptDataModule"):
        trainer([RecordWriter(tmp_path / "run")]).test(module, dataloaders=loader, verbose=False)


def test_metrics_and_policies_may_be_objects(tmp_path):
    from lightning_kv import load_model, preset

    own = [preset("sink-window@6f"), {"name": "mine", "retain": {"part": "sliding-window"}}]
    module = EvaluateModule(load_model("panorama"), own[:1], metrics=[Lamp(), "recall"], **SMALL)
    (found,) = trainer().test(module, datamodule=PromptDataModule(SHARDS, 1), verbose=False)
    assert 0 < found["sink-window@6f/lamp"] <= 1


def test_items_out_of_order_are_refused(tmp_path):
    module = EvaluateModule("panorama", ["sliding-window@6f"], metrics=["recall"], **SMALL)
    data = PromptDataModule(SHARDS, 1)
    items = [item._replace(policy="sliding-window@6f") for item in data._items()]
    with pytest.raises(ValueError, match=r"came before the reference 'full'.*in the order of"):
        module.test_step(items, 0)


def test_lightning_cli_can_be_built_and_run(tmp_path):
    words = ["test", "--model.policies", "[sliding-window@6f]", "--model.metrics", "[recall]"]
    words += [f"--model.{name}={value}" for name, value in SMALL.items()]
    words += ["--data.prompts", "1"]
    words += ["--data.shards", str(SHARDS), "--trainer.accelerator", "cpu", "--trainer.devices"]
    words += ["1", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.callbacks", "lightning_kv.tasks.callbacks.RecordWriter"]
    words += ["--trainer.callbacks.out", str(tmp_path / "run")]
    cli = LightningCLI(EvaluateModule, PromptDataModule, args=words, save_config_callback=None)
    found = summary(tmp_path / "run")["policies"]
    assert found["full"]["metrics"]["recall"]["mean"] > 0.9
    assert cli.trainer.callback_metrics["full/recall"] == found["full"]["metrics"]["recall"]["mean"]


def test_lightning_cli_compares_videos(folders):
    """The numbers of `compare` from a file of settings, with Lightning's own command line."""
    keys = ("a", "b", "c")
    clips = [
        {
            "key": key,
            "prompt": "",
            "reference": str(folders / "full" / f"{key}.mp4"),
            "candidates": {"near": str(folders / "near" / f"{key}.mp4")},
        }
        for key in keys
    ]
    told = {
        "model": {"names": ["full", "near"], "reference": "full", "metrics": ["psnr", "ssim"]},
        "data": {"videos": {"reference": "full", "candidates": ["near"], "clips": clips}},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    (folders / "cli.yaml").write_text(yaml.safe_dump(told))
    words = ["test", "--config", str(folders / "cli.yaml"), "--trainer.callbacks"]
    words += ["lightning_kv.tasks.callbacks.RecordWriter", "--trainer.callbacks.out"]
    words += [str(folders / "cli")]
    LightningCLI(CompareModule, VideoPairDataModule, args=words, save_config_callback=None)
    (folders / "full" / "deep" / "er.mp4").unlink()
    (folders / "near" / "deep" / "er.mp4").unlink()
    places = [str(folders / name) for name in ("full", "near")]
    main(["compare", *places, "-o", str(folders / "own"), "--metrics", "psnr,ssim"])
    found, own = (summary(folders / name)["policies"]["near"] for name in ("cli", "own"))
    assert found["units"] == own["units"] and sorted(found["units"]) == list(keys)


BAD = [
    (["--metrics", "[no.such:Thing]"], "cannot be imported"),
    (["--metrics", "[lightning_kv.rollout:Rollout]"], "is no metric of clips or of sets"),
    (["--decode", "false", "--metrics", "[psnr]"], "it needs pixels"),
    (["--decode", "false", "--metrics", "[revisit_error]"], "it needs pixels"),
    (["--trainer.accelerator", "gpu"], "There is no GPU that torch can use"),
    (["--samples", "0"], "samples=0"),
    (["--trainer.logger", "no.such:Logger"], "logger 'no.such:Logger' cannot be imported"),
    (["--videos", "-1"], "is no number of prompts"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[said for _, said in BAD])
def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path, words, said, capsys):
    start = ["evaluate", "--data.shards", str(SHARDS), "--prompts", "1", "--frames", "24"]
    start += ["--context_frames", "6", "--policies", "[sliding-window@6f]", "--trainer.devices"]
    with pytest.raises(SystemExit) as stop:
        main([*start, "1", "--out", str(tmp_path / "run"), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and said in error
    assert not (tmp_path / "run").exists()
