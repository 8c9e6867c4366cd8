"""Training the panorama encoder: its lessons, its losses, and a run that is taken up again."""

import csv
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lightning_kv.data.panorama import PALETTES, VISIBLE, world_for
from lightning_kv.metrics.backbones.panorama_encoder import PanoramaEncoder
from lightning_kv.tasks.options import EncoderRecipe, PretrainEncoderOptions
from lightning_kv.tasks.pretrain_encoder import (
    FIRST_WORLD,
    EncoderBatch,
    EncoderBatches,
    PretrainEncoder,
    place_losses,
    pretrain_encoder,
    steps,
)
from lightning_kv.tasks.training.artefacts import KINDS

SMALL = EncoderRecipe(steps=10, worlds=2, warmup=2)


@pytest.fixture(scope="module")
def task():
    task = PretrainEncoder(EncoderRecipe(worlds=16))
    task.log_dict = lambda *_: None  # no Trainer listens
    return task


@pytest.fixture(scope="module")
def batch(task):
    return EncoderBatches(task.recipe, task.codec, 0).draw(3)


def test_a_lesson_depends_on_its_number_alone(task):
    straight = list(EncoderBatches(SMALL, task.codec, 0))
    late = list(EncoderBatches(SMALL, task.codec, 7))
    assert len(straight) == 10 and len(late) == 3
    for a, b in zip(straight[7:], late, strict=True):
        assert torch.equal(a.frames, b.frames) and torch.equal(a.strength, b.strength)
    assert not torch.equal(straight[0].frames, straight[1].frames)


def test_a_lesson_shows_clean_clips_and_artefacts_of_the_same_worlds(batch):
    assert batch.frames.shape == (32, 8, 3, 32, 32)
    assert batch.frames.min() >= 0 and batch.frames.max() <= 1
    assert batch.strength.shape == (32, len(KINDS)) and batch.strength.max() <= 1
    assert (batch.strength[:16] == 0).all() and (batch.intact[:16] == 1).all()
    assert (batch.strength[16:] > 0).any(1).float().mean() > 0.6
    assert (batch.strength > 0).sum(1).max() == 2
    sky = torch.tensor([colours[0] for colours in PALETTES.values()])[batch.palette]
    top = batch.frames[:16, :, :, 0].mean(1).permute(0, 2, 1)  # [W, x, RGB]
    nearest = (top - sky[:, None]).abs().sum(2).amin(1)
    assert (nearest < 0.15).float().mean() > 0.6  # where no building fills the screen
    assert batch.codes.shape == (16, 8, VISIBLE)


def test_worlds_of_the_training_have_seeds_of_their_own(monkeypatch, task):
    seen = []

    def noted(text, seed):
        seen.append(seed)
        return world_for(text, seed)

    monkeypatch.setattr("lightning_kv.tasks.pretrain_encoder.world_for", noted)
    list(EncoderBatches(SMALL, task.codec, 0))
    assert seen == list(range(FIRST_WORLD, FIRST_WORLD + 20))


def test_camera_steps_as_classes():
    x = torch.tensor([[0, 8, 24, 24, 20, 200], [100, 92, 76, 52, 0, 4]])
    assert (steps(x) - 6).tolist() == [2, 4, 0, -1, 6, -2, -4, -6, -6, 1]


def test_the_place_losses_are_those_of_a_slow_twin(task):
    batch = EncoderBatches(SMALL, task.codec, 0).draw(1)
    features = torch.randn(4 * 8, 64, generator=torch.Generator().manual_seed(0))
    errors = {"same": [], "apart": []}
    for a in range(32):
        for b in range(32):
            cosine = float(torch.cosine_similarity(features[a], features[b], dim=0))
            (i, p), (j, q) = divmod(a, 8), divmod(b, 8)
            target = 0.0
            if i % 2 == j % 2:
                apart = abs(float(batch.x[i, p] - batch.x[j, q]))
                target = max(0.0, 1 - apart / 32) * float(batch.intact[i, p] * batch.intact[j, q])
            errors["same" if i % 2 == j % 2 else "apart"].append((cosine - target) ** 2)
    found = place_losses(features, batch)
    for name, values in errors.items():
        assert float(found[name]) == pytest.approx(8 * sum(values) / len(values), rel=1e-4)


def test_the_losses_fall_on_one_lesson(task, batch):
    optimizer = task.configure_optimizers()["optimizer"]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 3e-3
    first = None
    for _ in range(12):
        loss = task.training_step(batch, 0)
        first = first or dict(task.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = dict(task.losses)
    for name in ("loss", "same", "code", "ruler", "pace", "palette", "speed", "amount"):
        assert last[name] < 0.95 * first[name], name


def test_a_stopped_run_ends_with_the_file_of_one_that_ran_through(tmp_path):
    def run(name, recipe=SMALL):
        return pretrain_encoder(
            PretrainEncoderOptions(recipe, tmp_path / name, threads=1, checkpoint_every=5)
        )

    whole = run("whole")
    fit = PretrainEncoder.training_step

    def interrupted(self, batch, index):
        if self.global_step == 8:
            raise KeyError("power cut")
        return fit(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainEncoder, "training_step", interrupted)
        with pytest.raises(KeyError):
            run("stopped")
    assert (tmp_path / "stopped" / "last.ckpt").is_file()
    again = run("stopped")
    assert whole.read_bytes() == again.read_bytes()
    again.unlink()  # as if the power had failed once more, before the end
    assert run("stopped").read_bytes() == whole.read_bytes()
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"])["steps"] == int(metadata["steps"]) == 10
    assert metadata["world_seeds"] == f"{FIRST_WORLD} to {FIRST_WORLD + 19}"
    assert PanoramaEncoder.load(again).weights_sha256 == sha256(whole.read_bytes()).hexdigest()
    logs = sorted((tmp_path / "stopped" / "log").glob("*/metrics.csv"))
    assert logs and {"loss", "same", "step"} <= set(next(csv.reader(logs[-1].open())))
    with pytest.raises(ValueError, match="another recipe"):
        run("stopped", EncoderRecipe(steps=9))


def test_the_settings_file_says_the_defaults():
    path = Path(__file__).parents[2] / "configs" / "pretrain_encoder.yaml"
    read = yaml.safe_load(path.read_text())
    recipe = EncoderRecipe(**read.pop("recipe"))
    read["out"] = Path(read["out"])
    assert read.pop("trainer") == {"accelerator": "cpu"}, "the shipped weights are of a CPU"
    assert PretrainEncoderOptions(recipe, **read) == PretrainEncoderOptions()


@pytest.mark.slow
def test_the_losses_of_a_batch_on_a_gpu_are_computed_there(batch):
    """On tensors without contents: two devices in one operation would be an error."""
    task = PretrainEncoder(SMALL)

    def there(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(shape_env=ShapeEnv()):
        for module in task.modules():
            for own, kind in (
                (module._parameters, nn.Parameter),
                (module._buffers, torch.Tensor.detach),
            ):
                own.update({name: kind(there(x)) for name, x in own.items() if x is not None})
        moved = EncoderBatch(**{name: there(tensor) for name, tensor in vars(batch).items()})
        assert {loss.device.type for loss in task.measure(moved).values()} == {"cuda"}
