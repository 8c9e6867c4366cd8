"""Distillation as a whole: one file for any ranks and interruptions, which an evaluation loads."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_context_videos import lossless

from lightning_kv.cli import main, parse
from lightning_kv.commands.distill import plan_of, policy_text
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.panorama import world_for
from lightning_kv.distillation import clips
from lightning_kv.distillation.clips import ClipCollector, Collecting
from lightning_kv.distillation.labels import Teacher
from lightning_kv.models import load_model
from lightning_kv.policies.registry import preset
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.rollout import rollout
from lightning_kv.tasks.calibrate import CalibrateModule, validating
from lightning_kv.tasks.distill import Distillation, Plan, features_without
from lightning_kv.tasks.distillation.collect import CollectModule, ListWriter
from lightning_kv.tasks.distillation.records import read_lists
from lightning_kv.tasks.options import DistillRecipe

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "data/panorama-quick"
RECIPE = DistillRecipe(steps=12, batch=64, looks=3)
PLAN = Plan(
    collecting=Collecting(Teacher("mass-future", None), budgets=(4, 5)),
    rounds=1,
    recipe=RECIPE,
    validate=1,
    controls=False,
)
SMALL = {"frames": 15, "context_frames": 6}


@pytest.fixture(scope="module")
def model():
    return load_model("panorama")


def trainer_of(callbacks, folder, **given):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    own = {"callbacks": callbacks, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return L.Trainer(**({"enable_checkpointing": False} | own | quiet | given))


def distilled(model, out, plan=PLAN, prompts=4, data=None):
    data = data or PromptDataModule(SHARDS, prompts, seed=1)
    records = out.with_suffix(".records")
    made = Distillation(plan, model, data, out, records, trainer_of, trainer_of, SMALL)
    made.check()
    return made.run()


def content(path):
    """The bytes of a file, but for when it was made."""
    found = re.sub(rb"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", b"", path.read_bytes())
    assert found != path.read_bytes()
    return found


@pytest.fixture(scope="module")
def four(model, tmp_path_factory):
    """Four prompts, in one process, in one go."""
    out = tmp_path_factory.mktemp("four") / "scorer.safetensors"
    with pytest.warns(UserWarning, match="One held-out prompt"):
        return out, distilled(model, out)


pytestmark = pytest.mark.filterwarnings("ignore:One held-out prompt")


def test_the_file_says_what_it_was_taught(four):
    out, found = four
    scorer = Scorer.load(out)
    about = scorer.about
    keys = PromptDataModule(SHARDS, 4, seed=1).keys()
    held = sorted(validating(keys, 1))
    assert about["data"]["validation_prompts"] == held
    assert about["data"]["prompts"] == sorted(set(keys) - set(held))
    assert about["data"]["frames"] == 15 and about["data"]["world_seed"] == 1
    assert about["model"]["name"] == "panorama" and about["model"]["geometry"]["layers"] == 6
    assert about["teacher"]["target"] == "mass-future" and about["labels"] == "reference"
    assert about["rounds"] == 1 and about["recipe"]["steps"] == 12
    assert about["cache"]["reference"]["name"] == "full" and about["licence"] == "Apache-2.0"
    table = about["validation"]["table"]
    assert {"distilled", "prior", "h2o", "recency", "oracle", "random"} <= table.keys()
    assert table["prior"] == table["h2o"] and table["oracle"]["regret@own"] == 0
    regrets = about["validation"]["regrets"]
    assert len(regrets["off_policy"]) == len(regrets["on_policy"]) == 2
    assert regrets["on_policy"][-1] == table["distilled"]["regret@own"]
    assert (
        scorer.features == tuple(FEATURES)
        and json.loads(out.with_suffix(".json").read_text()) == about
    )
    assert found.words[0].startswith(f"{out}: student set, taught on 3 prompts in 2 rounds")


def test_a_policy_runs_with_it(four, model, tmp_path):
    words = ["--policies", f"full,{policy_text(four[0])}", "--data.shards", str(SHARDS)]
    words += ["--prompts", "2", "--frames", "27", "--context_frames", "6", "--decode", "false"]
    words += ["--metrics", "latent_relative", "--trainer.accelerator", "cpu"]
    main(["evaluate", *words, "--out", str(tmp_path / "run")])
    told = json.loads((tmp_path / "run/summary.json").read_text())
    assert "scorer" in json.dumps(told["policies"])


def test_clips_are_drawn_and_decided_by_round_and_hold_out(four):
    rounds = sorted(four[0].with_suffix(".records").glob("round-*"))
    assert [own.name[:7] for own in rounds] == ["round-0", "round-1", "round-2"]
    first, second, last = (read_lists(own) for own in rounds)
    assert (first.clips, second.clips, last.clips) == (4, 4, 1)
    assert first.made["scorer"] is None and second.made["scorer"] != last.made["scorer"]
    own = Collecting(Teacher(), round=2)
    assert own.share(False) == 0.25 and own.share(True) == 0
    assert Collecting(Teacher()).share(True) == 1
    budgets = {
        Collecting(Teacher(), budgets=tuple(range(4, 13))).budget(f"k{n}") for n in range(99)
    }
    assert budgets == set(range(4, 13))


def same(four, out):
    return content(out) == content(four[0])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("at", [3, 0, 6])
def test_what_was_stopped_goes_on(four, model, tmp_path, monkeypatch, at):
    """In the first round, between clips of the second, and before the last."""
    out, real, seen = tmp_path / "scorer.safetensors", CollectModule.measured, []

    def stopped(self, item):
        if len(seen) == at:
            raise RuntimeError("stopped")
        seen.append(item.key)
        return real(self, item)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(CollectModule, "measured", stopped)
        distilled(model, out)
    assert not out.exists()
    distilled(model, out)
    assert same(four, out)


def test_what_is_finished_is_not_done_again(four, model, tmp_path, monkeypatch):
    out = tmp_path / "scorer.safetensors"
    shutil.copytree(four[0].with_suffix(".records"), tmp_path / "scorer.records")
    monkeypatch.setattr(CollectModule, "measured", None)
    monkeypatch.setattr(L.Trainer, "fit", None)
    distilled(model, out)
    assert same(four, out)


def test_other_recipes_use_the_records_that_are_there(four, model, tmp_path, monkeypatch):
    """A control, and a longer fit of the last round's records; no clip is rolled out again."""
    out = tmp_path / "scorer.safetensors"
    shutil.copytree(four[0].with_suffix(".records"), tmp_path / "scorer.records")
    monkeypatch.setattr(CollectModule, "measured", None)
    found = distilled(model, out, replace(PLAN, controls=True))
    assert found.table["linear"] and Scorer.load(tmp_path / "scorer-linear.safetensors")
    rounds = replace(PLAN, rounds=0, recipe=replace(RECIPE, steps=5), validate=0)
    monkeypatch.undo()
    found = distilled(model, tmp_path / "other.safetensors", rounds, prompts=2)
    assert found.table == {} and "No prompt was held out" in found.words[-1]


def test_records_of_others_are_refused(four, model, tmp_path):
    out = tmp_path / "scorer.safetensors"
    shutil.copytree(four[0].with_suffix(".records"), tmp_path / "scorer.records")
    other = replace(PLAN, collecting=replace(PLAN.collecting, teacher=Teacher("mass-now")))
    with pytest.raises(ValueError, match=r"another run.*made.teacher.target \(there 'mass-future'"):
        distilled(model, out, other)
    run = tmp_path / "scorer.records/round-0/run.json"
    run.write_text(run.read_text().replace('"model": "panorama"', '"model": "wan"'))
    text = json.loads(run.read_text())
    run.write_text(json.dumps(text | {"fingerprint": "another"}))
    with pytest.raises(ValueError, match=r"holds another run.*model \(there 'wan', asked 'panor"):
        distilled(model, out)
    shutil.rmtree(tmp_path / "scorer.records")
    shutil.copy(four[0], out)
    with pytest.raises(ValueError, match="is there already, and its records are not"):
        distilled(model, out)


@pytest.mark.parametrize("labels", ["reference", "shadow"])
@pytest.mark.parametrize("target", ["out-future", "next-use"])
def test_every_teacher_and_label_gives_lists(model, labels, target):
    own = Collecting(Teacher(target, None), labels, (5,), round=1)
    scorer = Scorer.fresh("set", model.network.geometry(), FEATURES)
    collector = ClipCollector(model, scorer, own, 15)
    with torch.inference_mode():
        found = collector.of_prompt("k", "k", "dusk fast n10 left")
    lists = found.lists
    assert len(lists) == 24 * 3 and (lists.gram is None) == (target == "next-use")
    assert bool((lists.target.sum(-1) > 0).all()) and set(lists.keep.tolist()) == {2}
    again = collector.of_prompt("k", "k", "dusk fast n10 left").lists
    assert torch.equal(lists.target, again.target) and torch.equal(lists.features, again.features)


def test_labels_on_the_clip_itself_are_those_of_a_video_of_it(model):
    """A clip that a full cache leads to is its own reference."""
    own = Collecting(Teacher("mass-future", None), "shadow", (9,))
    scorer = Scorer.fresh("linear", model.network.geometry())
    collector = ClipCollector(model, scorer, own, 15)
    prompt = "dusk fast n10 left"
    latents = rollout(model, preset("full"), prompt, 15, keys=["k"], decode=False).latents[0]
    of_video = collector.of_video("k", "k", prompt, latents).lists
    of_prompt = collector.of_prompt("k", "k", prompt).lists  # drops at the last commit but one
    assert len(of_video) == len(of_prompt) == 24
    torch.testing.assert_close(of_video.target, of_prompt.target, atol=1e-4, rtol=1e-3)


def test_videos_are_learned_from(model, tmp_path):
    for sample in PromptDataModule(SHARDS, 3, seed=1).prompt_samples():
        world = world_for(sample.prompt, sample.world_seed)
        lossless(tmp_path / "videos" / f"{sample.key}.mp4", world.render(15))
        (tmp_path / "videos" / f"{sample.key}.txt").write_text(sample.prompt)
    data = PromptDataModule(context_videos=tmp_path / "videos")
    plan = replace(PLAN, rounds=0)
    found = distilled(model, tmp_path / "scorer.safetensors", plan, data=data)
    assert found.table["distilled"] and len(found.scorer.about["data"]["prompts"]) == 2
    short = replace(plan, collecting=replace(plan.collecting, budgets=(12,)))
    with pytest.raises(ValueError, match=r"too short to be learned from|teaches nothing"):
        distilled(model, tmp_path / "other.safetensors", short, data=data)


@pytest.mark.parametrize(
    ("changes", "prompts", "said"),
    [
        ({"validate": 3}, 4, "Too few prompts: 4 are asked for, and 3 of them are held out"),
        ({"validate": -1}, 4, "-1 prompts cannot validate"),
        ({"prior": "mine"}, 4, "No prior 'mine'"),
        ({"student": "deep"}, 4, "No student 'deep'"),
        ({"features": ("age",), "prior": "h2o"}, 4, "looks at total-mass, which is left out"),
        (
            {"collecting": Collecting(Teacher(), budgets=(3,))},
            4,
            "A budget of 3 frames teaches nothing",
        ),
        (
            {"collecting": Collecting(Teacher(), budgets=(12,))},
            4,
            "Give budgets from 4 to 11, or longer clips",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    model, tmp_path, changes, prompts, said
):
    with pytest.raises(ValueError, match=said):
        distilled(model, tmp_path / "scorer.safetensors", replace(PLAN, **changes), prompts)
    assert not list(tmp_path.iterdir())


def test_what_makes_no_plan_is_refused():
    with pytest.raises(ValueError, match="Labels 'mine' are unknown"):
        Collecting(Teacher(), "mine")
    with pytest.raises(ValueError, match="-1 rounds cannot be run"):
        replace(PLAN, rounds=-1)
    with pytest.raises(ValueError, match="No feature or group of features 'masses'"):
        features_without(["masses"])
    with pytest.raises(ValueError, match="nothing to look at"):
        features_without(["content", "norms", "age", "mass", "others"])


def test_numbers_that_are_none_are_not_written(model, tmp_path, monkeypatch):
    real = clips.lists_of_clip

    def broken(*given):
        lists = real(*given)
        return replace(lists, target=lists.target * torch.nan)

    monkeypatch.setattr(clips, "lists_of_clip", broken)
    with pytest.raises(ValueError, match=r"target of clip .* are not finite"):
        distilled(model, tmp_path / "scorer.safetensors")


def test_another_module_is_refused():
    writer = ListWriter("nowhere")
    with pytest.raises(ValueError, match="writes what a CollectModule measures"):
        trainer_of([writer], None).test(
            CalibrateModule("panorama", frames=36, context_frames=6),
            datamodule=PromptDataModule(SHARDS, 2, seed=1),
        )


# -- processes --------------------------------------------------------------------------------

WORDS = ["--data.shards", str(SHARDS), "--prompts", "4", "--validate", "1", "--rounds", "1"]
WORDS += ["--teacher.target", "mass-future", "--budgets", "4f,5f", "--controls", "false"]
WORDS += ["--recipe.steps", "12", "--recipe.batch", "64", "--recipe.looks", "3"]
WORDS += ["--frames", "15", "--context_frames", "6", "--trainer.accelerator", "cpu"]


def started(out, devices):
    """The command in processes of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    words = [sys.executable, "-m", "lightning_kv", "distill", *WORDS]
    words += ["--trainer.devices", str(devices), "-o", str(out)]
    env = clean | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_the_command_writes_the_file_of_the_module(four, tmp_path, capsys):
    out = tmp_path / "scorer.safetensors"
    main(["distill", *WORDS, "--trainer.devices", "1", "-o", str(out)])
    assert same(four, out)
    again = parse("distill", ["-c", str(tmp_path / "scorer.records/config.yaml")])
    assert again.out == out and plan_of(again, 15, 3) == PLAN
    told = capsys.readouterr().out
    assert "Regret on held-out prompts" in told and "lightning-kv evaluate --policies" in told
    assert list((tmp_path / "scorer.records").glob("round-1-*/fit-*/log/*/metrics.csv"))


@pytest.mark.parametrize("devices", [3, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_file(four, tmp_path, devices):
    out = tmp_path / "scorer.safetensors"
    made = started(out, devices)
    told, said = made.communicate(timeout=300)
    assert made.returncode == 0, said
    assert same(four, out) and told.count("Regret on held-out prompts") == 1
    assert "sync_dist" not in said and "Traceback" not in said


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_ranks(four, tmp_path):
    out, records = tmp_path / "scorer.safetensors", tmp_path / "scorer.records"
    killed = started(out, 1)
    until = time.monotonic() + 120
    while not list(records.glob("round-1-*/clips/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not out.exists() and list(records.glob("round-1-*/clips/*.safetensors"))
    made = started(out, 2)
    _, said = made.communicate(timeout=300)
    assert made.returncode == 0, said
    assert same(four, out)


@pytest.mark.slow
def test_a_fit_that_comes_to_nothing_is_said_once(tmp_path):
    words = [sys.executable, "-m", "lightning_kv", "distill", *WORDS, "--recipe.lr", "1e30"]
    words += ["--trainer.devices", "2", "-o", str(tmp_path / "scorer.safetensors")]
    made = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert made.returncode == 2 and made.stderr.count("error: ") == 1
    assert "come to nothing" in made.stderr and "Traceback" not in made.stderr


def test_budgets_by_head_and_a_scorer_go_together(four, tmp_path, monkeypatch):
    """calibrate with the scorer as memory, then evaluate it at the budgets that came of that."""
    monkeypatch.chdir(tmp_path)
    scorer, _ = four
    usual = ["--data.shards", str(SHARDS), "--context_frames", "6", "--frames", "18"]
    words = ["calibrate", *usual, "--prompts", "3", "--validate", "0", "--chunks", "1"]
    words += ["--scorers", "distilled", "--reach", "9f", "--labels", "false", "--probes", "1"]
    main(words)
    by_head = "{part: calibrated, heads: heads.safetensors, amount: 5f}"
    for name, budget in (("taught", "5f"), ("by-head", by_head)):
        part = f"{{part: distilled, scorer: {scorer}, budget: {budget}}}"
        Path(f"{name}.yaml").write_text(f"name: {name}\nretain: {part}\n")
    words = ["evaluate", *usual, "--prompts", "2", "--videos", "0", "--metrics", "latent_relative"]
    main([*words, "--policies", "[full,taught.yaml,by-head.yaml]", "--out", "run"])
    summary = json.loads(Path("run/summary.json").read_text())["policies"]
    kept = {name: own["metrics"]["latent_relative"]["mean"] for name, own in summary.items()}
    assert kept["full"] == 0 < kept["by-head"] and kept["taught"] != kept["by-head"]
