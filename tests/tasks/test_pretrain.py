"""Training: the data of a step, the curriculum, and a run that is taken up again."""

import pytest
import torch

from lightning_kv.models.embedded import read_weights
from lightning_kv.tasks.options import PretrainOptions, Recipe, Stage
from lightning_kv.tasks.pretrain import PanoramaBatches, Pretrain, new_model, pretrain, revisited

STAGES = [
    Stage(steps=6, chunks=3, batch=2, sizes=(4, 5), lr=1e-3, warmup=2, hold=0.5, final=0.1),
    Stage(steps=4, chunks=4, batch=1, sizes=(4, 6), lr=5e-4, head_dropout=0.5),
]


def test_learning_rate_warms_up_holds_and_falls():
    stage = Stage(steps=10, chunks=1, batch=1, sizes=(4, 4), lr=1.0, warmup=2, hold=0.5, final=0.2)
    assert [stage.rate(s) for s in (0, 1, 2, 5)] == [0.5, 1.0, 1.0, 1.0]
    assert stage.rate(7) == pytest.approx(1 - 0.8 * 0.4)
    assert stage.rate(10) == pytest.approx(0.2)


def test_a_batch_depends_on_its_number_alone():
    codec = new_model(0).codec
    recipe = Recipe(STAGES)
    straight = list(PanoramaBatches(recipe, codec, (6, 4), 0, 0))
    late = list(PanoramaBatches(recipe, codec, (6, 4), 7, 0))
    assert len(straight) == 10 and len(late) == 3
    for a, b in zip(straight[7:], late, strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.noise, b.noise)
        assert a.visible == b.visible and torch.equal(a.head_scale, b.head_scale)
    assert not torch.equal(straight[0].noise, straight[1].noise)
    assert straight[0].head_scale is None
    for batch in straight:
        assert batch.t.min() >= 0.02 and batch.t.max() <= 1
        assert all(set(seen) <= set(range(i)) for i, seen in enumerate(batch.visible))


def test_revisited_frames():
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 2, 1, 0, 1])
    slow = [
        any(positions[j] == p for j in range(i))
        and all(positions[j] != p for j in range(max(0, i - 3), i))
        for i, p in enumerate(positions)
    ]
    assert revisited(positions, 3).tolist() == slow


def test_the_loss_falls_on_one_batch():
    task = Pretrain(Recipe(STAGES), out=None, picture_every=0)
    batch = PanoramaBatches(task.recipe, task.codec, (6, 4), 0, 0).draw(0)
    optimizer = task.configure_optimizers()["optimizer"]
    target = batch.latents.repeat_interleave(2, 0)
    losses = []
    for _ in range(12):
        loss = (task.predict(batch, task.model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_weights_are_averaged_slowly_only_after_a_while(tmp_path):
    """Early steps forget faster, or the first weights would leave a trace; later ones slower."""
    stages = [Stage(steps=6, chunks=3, batch=1, sizes=(4, 5), lr=1e-2)]
    decay, step, seen = Pretrain.decay, Pretrain.optimizer_step, []

    def watched(self, *args, **kwargs):
        if not seen:
            seen.append(weights(self.average))
        step(self, *args, **kwargs)
        seen.append(weights(self.model))
        watched.average = weights(self.average)

    def late(self, step):
        return decay(self, 600 if step == 5 else step)

    def weights(network):
        return torch.cat([each.detach().flatten() for each in network.parameters()]).double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretrain, "optimizer_step", watched)
        patch.setattr(Pretrain, "decay", late)
        pretrain(PretrainOptions(Recipe(stages, ema=(0.25, 0.5)), tmp_path / "run", threads=1))
    average, *each = seen
    # (1 + step) / (10 + step) until that is as much as the recipe's own
    for decay, model in zip((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25, 0.5), each, strict=True):
        average = decay * average + (1 - decay) * model
    assert (each[-1] - each[0]).abs().max() > 1e-3, "the weights moved"
    assert (watched.average - average).abs().max() < 1e-6


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_one_that_ran_through(tmp_path):
    def run(name, stages):
        options = PretrainOptions(
            Recipe(stages), tmp_path / name, threads=1, checkpoint_every=3, picture_every=4
        )
        return pretrain(options)

    whole = run("whole", STAGES)
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 3
    stopped = tmp_path / "stopped"
    fit = Pretrain.training_step

    def interrupted(self, batch, index):
        if self.global_step == 7:
            raise KeyError("power cut")
        return fit(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretrain, "training_step", interrupted)
        with pytest.raises(KeyError):
            run("stopped", STAGES)
    assert (stopped / "last.ckpt").is_file()
    again = run("stopped", STAGES)
    ours, theirs = read_weights(whole)[0], read_weights(again)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="another recipe"):
        run("stopped", STAGES[:1])
