"""The evaluation task's own pieces."""

import json
from pathlib import Path

import pytest
import torch

from lightning_kv.cli import main
from lightning_kv.data.shards import PromptSample
from lightning_kv.metrics import metric_by_name
from lightning_kv.rollout import rollout
from lightning_kv.tasks import evaluate
from lightning_kv.tasks.measuring.adapter import Clip, measure
from lightning_kv.tasks.options import TrainerOptions
from lightning_kv.tasks.rollouts.context import panorama_start
from lightning_kv.tasks.trainer import is_first, launched


@pytest.fixture
def starts(panorama):
    samples = [PromptSample(f"k{i}", "mist fast n7 left", 100 + i) for i in range(3)]
    return [panorama_start(sample, panorama.codec, 24, 9) for sample in samples]


def test_the_world_itself_is_perfect(panorama, starts):
    names = ["recall", "recall_far", "revisit_error", "ruler_error", "camera_rule", "psnr"]
    metrics = metric_by_name(names)
    for start in starts:
        latents = panorama.codec.encode(start.truth)
        assert torch.equal(latents[:9], start.context)
        clip = Clip(latents, panorama.codec.decode(latents), context=9, scene=start.scene)
        found = measure(metrics, clip)
        values = found.values
        assert values["recall"] == values["recall_far"] == values["camera_rule"] == 1
        assert values["revisit_error"] < 1e-9 and values["ruler_error"] < 1e-9
        assert values["psnr"] is None and "psnr" not in found.curves
        assert found.curves["recall"][:9].isnan().all()


def test_metric_states_and_clip_values_say_the_same(panorama, starts):
    metrics = metric_by_name(["recall", "ruler_error"])
    rng = torch.Generator().manual_seed(0)
    found = {"recall": [], "ruler_error": []}
    for start in starts:
        latents = panorama.codec.encode(start.truth)
        latents = latents + torch.randn(latents.shape, generator=rng)
        pixels = panorama.codec.decode(latents)
        clip = measure(metrics, Clip(latents, pixels, context=9, scene=start.scene))
        for name in found:
            found[name].append(metrics[name].add(clip.curves[name], id=start.sample.key))
            assert found[name][-1] == clip.values[name]
    for name, values in found.items():
        assert float(metrics[name].compute()) == pytest.approx(sum(values) / 3)
        assert len(set(values)) == 3


def test_another_world_is_not_recalled(panorama, starts):
    mine, other = starts[:2]
    latents = panorama.codec.encode(other.truth)
    latents[:9] = mine.context
    metrics = metric_by_name(["recall", "camera_rule"])
    clip = Clip(latents, panorama.codec.decode(latents), context=9, scene=mine.scene)
    values = measure(metrics, clip).values
    assert values["camera_rule"] == 1
    assert values["recall"] < 0.4


LAUNCH = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "RANK": "3"}


@pytest.mark.parametrize(
    ("env", "asked", "found"),
    [
        ({}, TrainerOptions(3, "cpu"), TrainerOptions(3, "cpu", 1)),
        (LAUNCH, TrainerOptions(accelerator="cpu"), TrainerOptions(2, "cpu", 2)),
        (
            LAUNCH | {"LT_DEVICES": "2", "LT_ACCELERATOR": "cpu"},
            TrainerOptions(),
            TrainerOptions(2, "cpu", 2),
        ),
        (LAUNCH | {"LT_DEVICES": "auto"}, TrainerOptions(2, "cpu"), TrainerOptions(2, "cpu", 2)),
    ],
)
def test_the_launcher_is_believed(monkeypatch, env, asked, found):
    for name in (*LAUNCH, "LT_DEVICES", "LT_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launched(asked) == found
    assert is_first() == (not env)


def test_a_contradiction_is_refused(monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"--trainer.devices 5 contradicts the launcher"):
        launched(TrainerOptions(5))


@pytest.mark.parametrize(("policies", "rollouts"), [("[full,random@6f]", 3), ("[random@6f]", 2)])
def test_a_reference_that_is_asked_for_is_rolled_out_again(
    tmp_path, monkeypatch, no_page, policies, rollouts
):
    asked = []
    monkeypatch.chdir(Path(__file__).parents[2])

    def counted(model, policy, prompts, frames, **settings):
        if frames == 18:  # the warm-up is shorter
            asked.append(policy.name)
        return rollout(model, policy, prompts, frames, **settings)

    monkeypatch.setattr(evaluate, "rollout", counted)
    small = ["--prompts", "1", "--frames", "18", "--videos", "0", "--trainer.devices", "1"]
    out = ["--policies", policies, "--out", str(tmp_path / "run")]
    main(["evaluate", "-c", "configs/quickstart.yaml", *small, *out])
    assert len(asked) == rollouts
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    mse = summary["policies"]["full"]["metrics"]["latent_mse"]
    assert mse["mean"] == (0 if rollouts == 3 else None)
