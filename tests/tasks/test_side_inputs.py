"""Policies that ask where the camera is: what an evaluation brings, and who is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_kv.cli import main
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.data.panorama import world_for
from lightning_kv.rollout import rollout
from lightning_kv.tasks import evaluate

SHARDS = Path(__file__).parents[2] / "data/panorama-fast13-any"
pytestmark = pytest.mark.usefixtures("no_page")
FRAMES = 24
WORDS = [
    *("evaluate", "--data.shards", str(SHARDS), "--prompts", "2", "--frames", str(FRAMES)),
    *("--policies", "[world-kv@9f]", "--videos", "0", "--threads", "1", "--metrics", "[recall]"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
]
GIVEN, FREE = ["--context_frames", "6"], ["--context_frames", "0"]


def records(out):
    """Every clip's numbers, but for the time it took."""
    lines = [line for p in (out / "records").iterdir() for line in p.read_text().splitlines()]
    counts = ("kv_rows_read", "kv_rows_scored", "kv_bytes_peak")
    return {
        (r["policy"], r["key"]): (r["metrics"], {name: r["cost"][name] for name in counts})
        for r in map(json.loads, lines)
    }


def evaluated(out, *words):
    """Run it; the poses that each clip was brought, by policy and key."""
    asked = {}

    def noted(model, policy, prompts, frames, **given):
        if frames == FRAMES:  # the warm-up is shorter
            poses = given["inputs"].get("pose", [None] * len(prompts))
            asked.update(zip(((policy.name, key) for key in given["keys"]), poses, strict=True))
        return rollout(model, policy, prompts, frames, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "rollout", noted)
        main([*WORDS, *GIVEN, *words, "--out", str(out)])
    return asked


def check_poses(asked):
    """They are those of each clip's own world; nobody else is given any."""
    samples = PromptDataModule(SHARDS, 2).prompt_samples()
    for sample in samples:
        pose = asked["world-kv@9f", sample.key]
        where = world_for(sample.prompt, sample.world_seed).positions(FRAMES)
        assert pose.shape == (FRAMES, 4, 4) and asked["full", sample.key] is None
        assert torch.equal(pose[:, 0, 3], where.float())
        assert torch.equal(pose[:, :3, :3], torch.eye(3).expand(FRAMES, 3, 3))
    assert not torch.equal(*(asked["world-kv@9f", sample.key] for sample in samples))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("poses") / "run"
    return out, evaluated(out, "--batch", "1")


def test_each_clip_is_brought_its_own_camera(single, tmp_path):
    """One by one or side by side: the counts are equal, metrics but for the last digits."""
    batch = evaluated(tmp_path / "run", "--batch", "2")
    check_poses(single[1])
    check_poses(batch)
    ours, theirs = records(tmp_path / "run"), records(single[0])
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for clip, (metrics, cost) in ours.items():
        assert cost == theirs[clip][1], clip
        assert metrics == pytest.approx(theirs[clip][0], rel=1e-3), clip


@pytest.mark.slow
def test_poses_are_read(single, tmp_path):
    """Chunks by their keys are others: the camera decides."""
    keys = "{name: keys, retain: half-chunks, select: {part: world-kv, by: keys, budget: 9f}}"
    evaluated(tmp_path / "run", "--policies", f"[{keys}]", "--metrics", "[latent_mse]")
    evaluated(tmp_path / "poses", "--metrics", "[latent_mse]")
    ours, theirs = records(tmp_path / "run"), records(tmp_path / "poses")
    for sample in PromptDataModule(SHARDS, 2).prompt_samples():
        assert ours["keys", sample.key][0] != theirs["world-kv@9f", sample.key][0]


def test_a_run_that_is_taken_up_again_brings_them_too(single, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(single[0], out)
    (file,) = (out / "records").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    asked = evaluated(out, "--batch", "1")
    (lost,) = {json.loads(line)["key"] for line in lines[2:]}
    assert {key for _, key in asked} == {lost}
    assert torch.equal(asked["world-kv@9f", lost], single[1]["world-kv@9f", lost])
    assert len(file.read_text().splitlines()) == 4 and records(out) == records(single[0])


# -- what is refused ---------------------------------------------------------------------------


def refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "Traceback" not in said
    said = " ".join(said.split())
    assert "by: keys of world-kv" in said
    return said


def test_worlds_whose_camera_nobody_knows(tmp_path, capsys):
    out = tmp_path / "run"
    said = refused([*WORDS, "--context_frames", "0", "--out", str(out)], capsys)
    assert "'world-kv@9f' needs the camera's pose at every frame" in said
    assert "starts with no frames given. Give --context_frames 3" in said
    assert not out.exists()


@pytest.mark.slow
def test_a_left_start_is_known_without_given_frames(tmp_path):
    quick = ["--data.shards", str(SHARDS.parent / "panorama-fast13"), "--prompts", "1"]
    main([*WORDS, *quick, "--frames", "18", *FREE, "--out", str(tmp_path / "run")])
    assert len(records(tmp_path / "run")) == 2


def test_a_video_that_ends_before_the_clip(tmp_path, capsys, video):
    folder = tmp_path / "videos"
    video(folder / "a.mp4", frames=12)
    (folder / "a.txt").write_text("noon fast n13 any")
    words = [word for word in WORDS if word not in ("--data.shards", str(SHARDS))]
    words = [*words, "--prompts", "1", "--context_videos", str(folder), *GIVEN]
    said = refused([*words, "--out", str(tmp_path / "run")], capsys)
    assert "a.mp4 ends before the clip: it has 12 frames of 24. Give --frames 12 at most" in said


@pytest.mark.parametrize("reference", [False, True])
def test_a_model_without_a_camera(tiny_wan, tmp_path, capsys, reference):
    out = tmp_path / "run"
    words = ["evaluate", "--model", str(tiny_wan / "model.yaml"), "--data.shards", str(SHARDS)]
    words += ["--reference", "world-kv"] if reference else ["--policies", "[full,world-kv]"]
    said = refused([*words, "--frames", "9", "--context_frames", "0", "--out", str(out)], capsys)
    assert "'world-kv' needs the side input pose of every frame" in said and "brings none" in said
    assert not out.exists()


@pytest.mark.parametrize("model", ["panorama", "wan"])
def test_one_video_alone_knows_no_camera(tiny_wan, tmp_path, capsys, model):
    out = tmp_path / "a.mp4"
    where = model if model == "panorama" else str(tiny_wan / "model.yaml")
    words = ["generate", "noon fast n7 left", "--model", where, "-o", str(out)]
    said = refused([*words, "--policy", "world-kv"], capsys)
    assert "'world-kv' needs the side input pose of every frame" in said
    assert "`generate` knows no camera" in said and not out.exists()
