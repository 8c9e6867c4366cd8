"""Calibration under a Trainer: one file for any ranks and interruptions, and what is refused."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parent))
from test_context_videos import lossless

from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.cli import main, parse
from lightning_kv.commands.calibrate import measuring_of
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.panorama import world_for
from lightning_kv.models import load_model
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.policies.profiles import RULES, Profile
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.rollout import rollout
from lightning_kv.tasks.calibrate import CalibrateModule, validating
from lightning_kv.tasks.calibration.records import CalibrationDirectory
from lightning_kv.tasks.callbacks import CalibrationProgressBar, CurveWriter
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.rollouts.context import start_of

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "data/panorama-quick"
MEASURING = SiteSettings(reach=6, chunks=1, steps=(0,), probes=2, exact=(0, 2), batch=6)
SMALL = {"frames": 15, "context_frames": 6, "validate": 1}


def calibrated(
    out,
    prompts=2,
    data=None,
    measuring=MEASURING,
    logger=False,
    mean=None,
    beside=(),
    limit=1.0,
    **settings,
):
    """A calibration as a user's own few lines make it."""
    writer = CurveWriter(out, mean=mean)
    module = CalibrateModule("panorama", measuring, **(SMALL | settings))
    trainer = L.Trainer(
        callbacks=[writer, *beside],
        accelerator="cpu",
        devices=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=bool(beside),
        enable_model_summary=False,
        limit_test_batches=limit,
    )
    data = data or PromptDataModule(SHARDS, prompts, seed=1)
    trainer.test(module, datamodule=data, verbose=False)
    return writer.found


def content(path):
    """The bytes of a file, but for when it was made."""
    found = re.sub(rb"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", b"", path.read_bytes())
    assert found != path.read_bytes()
    return found


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four prompts, in one process, in one go."""
    out = tmp_path_factory.mktemp("four") / "heads.safetensors"
    return out, calibrated(out, 4)


def test_ten_lines_give_a_file_that_budgets_are_solved_from(four):
    out, found = four
    curves = HeadCurves.load(out)
    assert curves.budgets == tuple(range(7)) and curves.shape == (6, 4)
    names = {f"{s}/{m}" for s in ("mass", "recency") for m in ("mass", "output", "gn")}
    assert set(curves.curves) == names
    assert set(curves.importance) == {"history", "zero"}
    for own in curves.curves.values():
        assert float(own[..., -1].abs().max()) < 1e-12 < float(own[..., 0].min())
    solved = curves.solve("optimal", 2)
    assert sum(map(sum, solved)) == 48 and len({n for row in solved for n in row}) > 1
    policy = policy_from_dict(
        {
            "name": "x",
            "retain": {"part": "window", "budget": "6f"},
            "select": {
                "part": "top-attention",
                "budget": {
                    "part": "calibrated",
                    "scorer": "mass",
                    "amount": "2f",
                    "heads": str(out),
                    "least": "1f",
                },
            },
        }
    )
    model = load_model("panorama")
    policy.check(model.network.geometry(), 3, 15)
    assert f"{out}: 4 prompts" in found.words[0]
    assert any("Measure 4 prompts more: --prompts 8." in each for each in found.words)


def test_the_file_says_what_it_was_made_of(four):
    about = HeadCurves.load(four[0]).about
    keys = PromptDataModule(SHARDS, 4, seed=1).keys()
    assert about["model"]["name"] == "panorama" and about["data"]["prompts"] == sorted(keys)
    assert about["cache"]["reach"] == 6 and about["cache"]["reference"]["name"]
    assert about["settings"]["probes"] == 2 and len(about["settings"]["fingerprint"]) == 71
    checks = about["checks"]
    assert checks["validated"] == sorted(validating(keys, 1)) and checks["floor"] < 1e-9
    assert checks["mean"] == 1.5 and [own["prompts"] for own in checks["looks"]] == [4]
    assert checks["stopped_at"] is None and about["software"]["device"] == "cpu"
    assert json.loads(four[0].with_suffix(".json").read_text()) == about


def test_what_is_added_later_is_as_if_it_had_been_there(four, tmp_path):
    """From two prompts to four; the prompt that validates is another one then, or the same."""
    out = tmp_path / "heads.safetensors"
    calibrated(out, 2)
    assert len(HeadCurves.load(out).prompts("mass", "gn")) == 2
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "heads.records/clips").iterdir()}
    assert len(files) == 2
    calibrated(out, 4)
    assert content(out) == content(four[0])
    keys = [PromptDataModule(SHARDS, n, seed=1).keys() for n in (2, 4)]
    again = validating(keys[1], 1) - validating(keys[0], 1)
    for path, stamp in files.items():
        assert (path.stat().st_mtime_ns != stamp) == (path.stem in again)
    calibrated(out, 2)  # fewer again: those that are asked for
    assert HeadCurves.load(out).about["data"]["prompts"] == sorted(keys[0])


@pytest.mark.parametrize("at", [0, 2])
def test_what_was_stopped_goes_on(four, tmp_path, monkeypatch, at):
    out, real, seen = tmp_path / "heads.safetensors", CalibrateModule.measured, []

    def stopped(self, item):
        if len(seen) == at:
            raise KeyboardInterrupt
        seen.append(item.key)
        return real(self, item)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(CalibrateModule, "measured", stopped)
        calibrated(out, 4)
    assert not out.exists() and len(list((tmp_path / "heads.records/clips").iterdir())) == at
    calibrated(out, 4)
    assert content(out) == content(four[0])


def test_what_is_finished_is_not_measured_again(four, tmp_path, monkeypatch):
    out = tmp_path / "heads.safetensors"
    shutil.copytree(four[0].with_suffix(".records"), tmp_path / "heads.records")
    monkeypatch.setattr(CalibrateModule, "measured", None)
    calibrated(out, 4)
    assert content(out) == content(four[0])


def test_samples_are_means_within_their_prompt(tmp_path):
    data = PromptDataModule(SHARDS, 2, samples=2, seed=1)
    found = calibrated(tmp_path / "heads.safetensors", data=data, validate=0)
    assert len(found.curves.prompts("mass", "gn")) == 2 and found.curves.about["data"]["clips"] == 4
    assert "zero" not in found.curves.importance
    assert any("validate 0" in each for each in found.words)


def test_clips_are_counted_on_a_line(tmp_path, screen):
    shown = screen(terminal=True)
    bar = CalibrationProgressBar()
    calibrated(tmp_path / "heads.safetensors", beside=[bar], validate=0, labels=False)
    said = shown()
    assert re.search(r"measuring .* 2/2 clips", said) and "left-" in said
    assert bar.bar is None


def test_a_command_line_of_lightnings_own_writes_the_same(four, tmp_path):
    out = tmp_path / "heads.safetensors"
    told = {
        "model": {"measuring": {**vars(MEASURING)}, **SMALL},
        "data": {"shards": str(SHARDS), "prompts": 4, "seed": 1},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    told["model"]["measuring"] |= {"steps": [0], "exact": [0, 2], "scorers": ["mass", "recency"]}
    told["trainer"] |= {"enable_checkpointing": False}
    (tmp_path / "cli.yaml").write_text(yaml.safe_dump(told))
    words = ["test", "--config", str(tmp_path / "cli.yaml"), "--trainer.callbacks"]
    words += ["lightning_kv.tasks.callbacks.CurveWriter", "--trainer.callbacks.out", str(out)]
    LightningCLI(CalibrateModule, PromptDataModule, args=words, save_config_callback=None)
    assert content(out) == content(four[0])


def test_a_sink_has_a_reference_that_keeps_it(tmp_path):
    measuring = SiteSettings(reach=6, sink=3, chunks=1, steps=(0,), probes=2)
    found = calibrated(tmp_path / "heads.safetensors", measuring=measuring, validate=0, mean=4)
    assert found.curves.budgets == (3, 4, 5, 6)
    assert found.curves.about["cache"]["reference"]["name"] == "sink-window@6f"


def test_prompts_are_left_out_only_where_one_says_so(tmp_path, monkeypatch):
    out = tmp_path / "not" / "yet" / "heads.safetensors"
    assert len(calibrated(out, 3, limit=2).curves.prompts("mass", "gn")) == 2
    with pytest.raises(ValueError, match="Too few prompts: 1 were measured"):
        calibrated(tmp_path / "one.safetensors", 3, limit=1)
    write = CalibrationDirectory.write
    monkeypatch.setattr(
        CalibrationDirectory,
        "write",
        lambda self, record, sample: None if "noon" in record.key else write(self, record, sample),
    )
    with pytest.raises(ValueError, match=r"none of 1 of 3 clips, such as .noon.*machines share"):
        calibrated(tmp_path / "more.safetensors", 3)


def test_loggers_hear_of_it(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    calibrated(tmp_path / "heads.safetensors", logger=logger, validate=0)
    assert "calibrate/am_gm" in (tmp_path / "log/metrics.csv").read_text()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """No frames given; clips are as long as those that the model was trained on."""
    out = tmp_path_factory.mktemp("labelled") / "heads.safetensors"
    measuring = SiteSettings(reach=69, chunks=1, steps=(0,), probes=0)
    given = {"frames": 72, "context_frames": 0, "validate": 1}
    return out, calibrated(out, measuring=measuring, **given)


PYRAMID = {"select": "pyramid-reads", "positions": "pyramid-times"}
METHODS = ("forcing-kv", "head-forcing", "pyramid-forcing", "duo-attention")


def test_labels_are_those_of_the_full_cache(labelled):
    out, found = labelled
    samples = PromptDataModule(SHARDS, 2, seed=1).prompt_samples()
    keyed = profile_of_all(load_model("panorama"), samples, 72)
    assert [path.name for path in found.labels] == [f"{own}-panorama.json" for own in METHODS]
    for path in found.labels[:3]:
        assert path.parent == out.with_suffix("")
        held = json.loads(path.read_text())
        rows = zip(held["labels"], RULES[held["method"]](keyed), strict=True)
        same = [a == b for x, y in rows for a, b in zip(x, y, strict=True)]
        assert sum(same) >= 23  # of 24: a head on the edge may fall to the other side
        assert held["model"] == ["panorama"]
        assert held["source"] == "lightning-kv calibrate, 2 prompts"
        lags = held["method"] == "pyramid-forcing"
        assert held["about"].endswith("from 71 lags" if lags else "up to 69 frames of history")


def profile_of_all(model, samples, frames):
    """What heads attend to with the full cache, of clips with the noise of their keys."""
    made = [
        rollout(
            model,
            preset("full"),
            sample.prompt,
            frames,
            keys=[sample.key],
            decode=False,
            record=("mass", "lags"),
        ).tables
        for sample in samples
    ]
    mass = sum(own["mass"][0].mass["cond"].double() for own in made) / len(made)
    logits = sum(own["lags"][0].logits["cond"].double() for own in made) / len(made)
    return Profile(mass, tuple(range(0, frames + 1, 3)), logits)


def test_heads_that_lose_most_with_what_streaming_heads_keep_are_retrieval_heads(labelled):
    out, found = labelled
    held = json.loads(found.labels[3].read_text())
    lost = HeadCurves.load(out).prompts("recency", "output").mean(0)[..., 2]
    yes = {own for row, words in zip(lost.tolist(), held["labels"], strict=True)
           for own, word in zip(row, words, strict=True) if word == "retrieval"}  # fmt: skip
    assert yes == set(sorted(lost.flatten().tolist())[12:])
    assert held["about"].endswith(
        " heads, by a rule of ours in place of trained gates: the half that loses most with the "
        "newest 2 frames alone (recency/output)"
    )


def test_what_is_written_is_what_presets_run_with(labelled):
    out, found = labelled
    policies = []
    for method, path in zip(METHODS, found.labels, strict=True):
        made = {"labels": str(path)}
        own = {"retain": {"part": method, **made}}
        if method in ("forcing-kv", "head-forcing"):
            own["retain"]["budget"] = "6f"
        if method == "pyramid-forcing":
            own |= {kind: {"part": name, **made} for kind, name in PYRAMID.items()}
        policies.append(own)
    policies.append({"retain": {"part": "tri-attention", "budget": "6f", "statistics": str(out)}})
    budget = {"part": "importance", "importance": str(out), "amount": "9f", "least": "3f"}
    policies.append({"retain": {"part": "snap-kv", "budget": budget}})
    model, clips = load_model("panorama", decode=False), []
    for own in policies:
        policy = policy_from_dict({"name": "x", **own})
        clips.append(rollout(model, policy, "dusk fast n10 left", 27, decode=False).latents)
    assert all(own.isfinite().all() for own in clips)
    same = [n for n in itertools.combinations(range(6), 2) if torch.equal(*(clips[i] for i in n))]
    assert not same


def test_what_cannot_be_told_is_not_written(four, tmp_path):
    """Of 14 lags no wave, of 9 frames no shares of mass; without recency no streaming heads."""
    assert [path.name for path in four[1].labels] == ["duo-attention-panorama.json"]
    for name in ("forcing-kv", "head-forcing"):
        said = f"No labels of {name}: Its rule looks at clips .*, 72 frames, .* for 9 frames"
        assert any(re.match(said, each) for each in four[1].words)
    said = "No labels of pyramid-forcing: Waves need a curve of 36 lags or more, and 14 were"
    assert any(each.startswith(said) for each in four[1].words)
    alone = replace(MEASURING, scorers=("mass",), probes=0, exact=())
    found = calibrated(tmp_path / "heads.safetensors", measuring=alone, validate=0)
    assert any("duo-attention: mass say nothing" in each for each in found.words)


# -- videos -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Two worlds as videos of 15 frames, and one of 9."""
    folder = tmp_path_factory.mktemp("filmed")
    for number, sample in enumerate(PromptDataModule(SHARDS, 3, seed=1).prompt_samples()):
        place = folder / ("short" if number == 2 else "long")
        frames = 9 if number == 2 else 15
        world = world_for(sample.prompt, sample.world_seed)
        lossless(place / f"{sample.key}.mp4", world.render(frames))
        (place / f"{sample.key}.txt").write_text(sample.prompt)
    return folder


def test_history_is_that_of_the_video(filmed, tmp_path):
    data = PromptDataModule(context_videos=filmed / "long")
    found = calibrated(tmp_path / "heads.safetensors", data=data)
    assert found.curves.prompts("mass", "gn").shape == (2, 6, 4, 7)
    assert found.curves.about["data"]["prompts"] == sorted(data.keys())
    module = CalibrateModule("panorama", MEASURING, **SMALL)
    sample = data.prompt_samples()[0]
    module._trainer = None
    latents = module._latents(sample)
    assert latents.shape[0] == 15
    world = PromptDataModule(SHARDS, 3, seed=1).prompt_samples()
    own = next(each for each in world if each.key == sample.key)
    context = start_of(own, module.model, module.settings).context
    assert float((latents[:6] - context).abs().max()) < 0.1  # but for 8 bits


def test_a_video_shorter_than_the_reach_is_refused(filmed, tmp_path):
    data = PromptDataModule(context_videos=filmed)
    measuring = SiteSettings(reach=9, chunks=1, steps=(0,), probes=2)
    with pytest.raises(ValueError, match=r"short to be calibrated on: it has 9 frames"):
        calibrated(tmp_path / "heads.safetensors", data=data, measuring=measuring)
    assert not list(tmp_path.iterdir())


# -- what is refused --------------------------------------------------------------------------


def test_too_few_prompts_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Too few prompts: 1 .* Give 2 or more; 8 for the first"):
        calibrated(tmp_path / "heads.safetensors", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 6, "context_frames": 0}, r"6 latent frames has 0 chunks with 6 frames"),
        ({"context_frames": 12, "measuring": SiteSettings(reach=6, chunks=2)}, "12 of them given"),
        ({"reference": "sliding-window@3f"}, r"holds 3 frames of history"),
        ({"reference": "h2o@100t"}, r"whole frames"),
        ({"validate": -1}, "-1 prompts cannot validate"),
        ({"measuring": SiteSettings(reach=6, scorers=("mas",))}, "Did you mean 'mass'"),
        ({"mean": 6}, r"from 0 \(protected\) to 6"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        calibrated(tmp_path / "heads.safetensors", **changes)


class Pairs(L.LightningDataModule):
    def test_dataloader(self):
        return []


def test_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="measures the clips of prompts, and Pairs was given"):
        calibrated(tmp_path / "heads.safetensors", data=Pairs())


def test_records_of_other_settings_are_refused(four, tmp_path):
    out = tmp_path / "heads.safetensors"
    shutil.copytree(four[0].with_suffix(".records"), tmp_path / "heads.records")
    other = SiteSettings(reach=6, chunks=1, steps=(0,), probes=3, exact=(0, 2), batch=6)
    with pytest.raises(ValueError, match=r"holds another run.*measuring.probes \(there 2, asked 3"):
        calibrated(out, 4, measuring=other)
    with pytest.raises(ValueError, match=r"holds another run.*seed \(there 0, asked 5"):
        calibrated(out, 4, seed=5)
    assert not out.exists()


def test_gradients_that_are_no_numbers_are_said(tmp_path, monkeypatch):
    import lightning_kv.calibration.sites as sites

    real = sites.probe_products
    monkeypatch.setattr(sites, "probe_products", lambda *own: real(*own) * torch.nan)
    with pytest.raises(ValueError, match=r"gn/mass, gn/recency of clip .* are not finite"):
        calibrated(tmp_path / "heads.safetensors")
    assert not list((tmp_path / "heads.records/clips").iterdir())


def test_a_file_without_its_records_is_not_lost(four, tmp_path):
    out = tmp_path / "heads.safetensors"
    shutil.copy(four[0], out)
    with pytest.raises(ValueError, match=r"is there already, and its records are not"):
        calibrated(out)
    assert content(out) == content(four[0]) and len(list(tmp_path.iterdir())) == 1


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Give .*heads\.safetensors"):
        CurveWriter(tmp_path / "heads.json")


def test_an_evaluation_on_prompts_of_the_fit_is_warned_of(four, tmp_path):
    part = {
        "part": "calibrated",
        "amount": "2f",
        "scorer": "mass",
        "heads": str(four[0]),
        "least": "1f",
    }
    policy = {
        "name": "mine",
        "retain": {"part": "window", "budget": "6f"},
        "select": {"part": "top-attention", "budget": part},
    }
    settings = {"metrics": ["psnr"], "frames": 15, "context_frames": 6}
    held = PromptDataModule(SHARDS, 3, seed=1).keys()
    for others, whose in ((), "'mine'"), ((policy | {"name": "more"},), "2 policies"):
        module = EvaluateModule("panorama", [policy, *others], **settings)
        with pytest.warns(UserWarning, match="fitted on") as seen:
            module.check_data(PromptDataModule(SHARDS, 3, seed=1))
        (said,) = (str(own.message) for own in seen)  # once for the file
        assert said.startswith("Head curves (heads.safetensors) were fitted on 3 prompts of this")
        assert f"the budgets of {whose} look too good: " in said
        assert all(key in said for key in held)
    assert module.about()["run"]["foreign_heads"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_data(PromptDataModule(SHARDS, 3))


def test_an_evaluation_records_that_curves_are_of_other_weights(four):
    part = {
        "part": "calibrated",
        "amount": "2f",
        "scorer": "mass",
        "heads": str(four[0]),
        "transfer": True,
    }
    policies = [
        {"name": name, "select": {"part": "top-attention", "budget": part | {"least": least}}}
        for name, least in (("one", "1f"), ("two", "2f"))
    ]
    model = load_model("panorama")
    model.source["sha256"] = "another"
    module = EvaluateModule(model, policies, metrics=["psnr"], frames=15, context_frames=6)
    with pytest.warns(UserWarning, match="measured with other weights of 'panorama'") as seen:
        module.check_data(PromptDataModule(SHARDS, 3))
    assert [str(own.message) for own in seen] == module.about()["run"]["foreign_heads"]


def test_an_evaluation_with_another_cache_is_refused(four):
    part = {
        "part": "calibrated",
        "amount": "2f",
        "scorer": "mass",
        "heads": str(four[0]),
        "least": "1f",
    }
    policy = {"name": "mine", "select": {"part": "top-attention", "budget": part}}
    said = r"with 6 frames of history held, and 'mine' has all frames .* \(transfer: true\)"
    with pytest.raises(ValueError, match=said):
        EvaluateModule("panorama", [policy], metrics=["psnr"], frames=15, context_frames=6)
    EvaluateModule("panorama", [policy], metrics=["psnr"], frames=9, context_frames=6)


def test_who_validates_does_not_depend_on_the_order():
    keys = [f"prompt-{n}" for n in range(20)]
    assert validating(keys, 4) == validating(keys[::-1], 4)
    assert len(validating(keys, 4)) == 4 and validating(keys, 0) == frozenset()
    assert validating(keys, 4) <= validating(keys, 5)
    assert validating(keys[:3], 4) == set(keys[:3])


# -- processes --------------------------------------------------------------------------------

WORDS = ["--data.shards", str(SHARDS), "--prompts", "4", "--reach", "6f", "--chunks", "1"]
WORDS += ["--measuring.steps", "0", "--measuring.batch", "6", "--probes", "2", "--exact", "0,2"]
WORDS += ["--frames", "15", "--context_frames", "6", "--validate", "1"]
WORDS += ["--trainer.accelerator", "cpu"]


def started(out, devices):
    """The command in processes of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    words = [sys.executable, "-m", "lightning_kv", "calibrate", *WORDS]
    words += ["--trainer.devices", str(devices), "-o", str(out)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean | ONE
    )


ONE = {"OMP_NUM_THREADS": "1"}


def test_the_command_writes_the_file_of_the_module(four, tmp_path, capsys):
    out = tmp_path / "heads.safetensors"
    main(["calibrate", *WORDS, "--trainer.devices", "1", "-o", str(out)])
    assert content(out) == content(four[0])
    again = parse("calibrate", ["-c", str(tmp_path / "heads.records/config.yaml")])
    assert again.out == out and measuring_of(again, world=True) == MEASURING
    told = capsys.readouterr().out
    assert "Rank correlation of probes" in told and "lightning-kv budgets" in told


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_file(four, tmp_path, devices):
    out = tmp_path / "heads.safetensors"
    made = started(out, devices)
    _, said = made.communicate(timeout=300)
    assert made.returncode == 0, said
    assert content(out) == content(four[0])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_ranks(four, tmp_path):
    out, clips = tmp_path / "heads.safetensors", tmp_path / "heads.records/clips"
    killed = started(out, 1)
    until = time.monotonic() + 120
    while not list(clips.glob("*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert 1 <= len(list(clips.glob("*.safetensors"))) < 4 and not out.exists()
    made = started(out, 2)
    _, said = made.communicate(timeout=300)
    assert made.returncode == 0, said
    assert content(out) == content(four[0])
