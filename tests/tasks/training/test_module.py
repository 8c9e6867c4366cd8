"""What all trainings share: checkpoints, finite numbers, averaged weights, any logger."""

import os
import pickle
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import IterableDataset

from lightning_kv.tasks.callbacks.progress import TrainingProgressBar
from lightning_kv.tasks.options import (
    EncoderRecipe,
    PretrainEncoderOptions,
    PretrainOptions,
    Recipe,
    Stage,
)
from lightning_kv.tasks.pretrain import pretrain
from lightning_kv.tasks.pretrain_encoder import pretrain_encoder
from lightning_kv.tasks.training.module import Training, check_finite, train, training_trainer

STAGE = Stage(steps=2, chunks=2, batch=1, sizes=(4, 5), lr=1e-3)


class Numbers(IterableDataset):
    def __init__(self, start, steps):
        self.start, self.steps = start, steps

    def __iter__(self):
        for step in range(self.start, self.steps):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


class Straight(Training):
    """Fits a line: the least that a training can say."""

    def __init__(self, steps=10, spoil_loss=None, spoil_weight=None):
        super().__init__(steps)
        self.network = nn.Linear(3, 1)
        with torch.no_grad():
            self.network.weight.fill_(0.5)
            self.network.bias.fill_(0.0)
        self.average = self.averaged(self.network)
        self.spoil_loss, self.spoil_weight = spoil_loss, spoil_weight

    def data(self, start):
        return Numbers(start, self.steps)

    def measure(self, batch):
        error = (self.network(batch)[:, 0] - batch.sum(1)).square().mean()
        if self.global_step == self.spoil_weight:
            self.network.weight.data[0, 1] = float("inf")
        return {"loss": error * (float("nan") if self.global_step == self.spoil_loss else 1.0)}

    def optimizer(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def rate(self, step):
        return 0.1 / (1 + step)


def fit(task, out, checkpoint_every, **given):
    train(task, training_trainer(out, checkpoint_every, **given), out)


def by_hand(steps):
    """The same training as a plain loop."""
    weight, bias = torch.full((3,), 0.5), torch.zeros(())
    average = weight.clone()
    for step in range(steps):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        error = batch @ weight + bias - batch.sum(1)
        slope, lift = 2 * (error[:, None] * batch).mean(0), 2 * error.mean()
        norm = float((slope.square().sum() + lift.square()).sqrt())
        rate = 0.1 / (1 + step) / max(1.0, norm)
        weight, bias = weight - rate * slope, bias - rate * lift
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    return weight, average


def test_a_training_is_a_plain_loop_with_clipping_a_schedule_and_an_average(tmp_path):
    task = Straight()
    fit(task, tmp_path, 3)
    weight, average = by_hand(10)
    assert torch.allclose(task.network.weight[0], weight, atol=1e-6)
    assert torch.allclose(task.average.weight[0], average, atol=1e-6)
    assert not task.average.weight.requires_grad


def test_a_training_under_a_trainer_of_ones_own_gives_the_same_numbers(tmp_path):
    ours, theirs = Straight(), Straight()
    fit(ours, tmp_path, 3)
    quiet = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, **quiet).fit(theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


class Kept(DummyLogger):
    """A logger of one's own."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def after_save_checkpoint(self, checkpoint_callback):
        pass


def test_any_logger_is_told_the_losses(tmp_path):
    logger = Kept()
    recipe = EncoderRecipe(steps=20, worlds=2, warmup=2)
    pretrain_encoder(PretrainEncoderOptions(recipe, tmp_path), logger=logger)
    assert [step for step, _ in logger.rows] == [9, 19]
    assert {"loss", "same", "pace", "lr"} <= logger.rows[0][1].keys()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(("steps", "logged"), [(2, [1]), (12, [9, 11]), (20, [9, 19])])
def test_the_last_step_is_logged_and_saved_wherever_it_falls(tmp_path, steps, logged):
    logger, task = Kept(), Straight(steps)
    fit(task, tmp_path, 8, logger=logger)
    assert [step for step, _ in logger.rows] == logged
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps
    again = Straight(steps)
    fit(again, tmp_path, 8, logger=False)
    assert again.losses == task.losses
    for one, other in zip(task.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_callbacks_and_a_progress_bar_of_ones_own(tmp_path):
    class Count(L.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, *_):
            self.steps += 1

    count, bar = Count(), TrainingProgressBar()
    fit(Straight(4), tmp_path, 2, callbacks=[count, bar], logger=False)
    assert count.steps == 4 and bar.bar is None


def test_a_training_that_says_too_little_is_refused():
    class Nothing(Training):
        pass

    with pytest.raises(NotImplementedError):
        Nothing(3).configure_optimizers()


class Payload:
    """Runs code where it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "pickle"])
@pytest.mark.parametrize("command", ["pretrain", "pretrain-encoder"])
def test_a_checkpoint_that_would_run_code_does_not_and_is_refused(tmp_path, raw, command):
    out, sign = tmp_path / "run", tmp_path / "it-ran"
    out.mkdir()
    content = {"state_dict": {}, "training": {"format": 2, "losses": Payload(sign)}}
    if raw:
        (out / "last.ckpt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, out / "last.ckpt")
    held = (out / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"last\.ckpt.*run code.*Delete .*last\.ckpt") as said:
        if command == "pretrain":
            pretrain(PretrainOptions(Recipe([STAGE]), out, threads=1))
        else:
            pretrain_encoder(PretrainEncoderOptions(EncoderRecipe(steps=2), out))
    assert not sign.exists() and "\n" not in str(said.value)
    assert (out / "last.ckpt").read_bytes() == held
    assert [path.name for path in out.iterdir()] == ["last.ckpt"], "no recipe of a run that is none"
    pickle.loads(pickle.dumps(Payload(sign)))
    assert sign.exists(), "the payload would have worked"


def spoilt(kind, file):
    content = torch.load(file, weights_only=True)
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-2000])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif kind == "an earlier version":
        torch.save({k: v for k, v in content.items() if k != "training"}, file)
    elif kind == "a list":
        torch.save([1, 2], file)
    elif kind == "another shape":
        content["state_dict"]["network.weight"] = torch.zeros(1, 4)
        torch.save(content, file)
    else:
        del content["state_dict"]["average.bias"]
        torch.save(content, file)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut off", "cannot be read|damaged"),
        ("empty", "cannot be read|damaged"),
        ("a folder", "cannot be read"),
        ("an earlier version", "an earlier version wrote other"),
        ("a list", "not of this version"),
        ("another shape", r"network.weight is \(1, 4\) in it, and \(1, 3\)"),
        ("a weight too few", r"average.bias is None in it"),
    ],
)
def test_a_checkpoint_that_cannot_be_taken_up_is_refused_in_words(tmp_path, kind, said):
    fit(Straight(4), tmp_path, 2)
    spoilt(kind, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=rf"cannot go on from last.ckpt: .*({said}).*Delete"):
        fit(Straight(4), tmp_path, 2)


def test_a_loss_that_is_no_number_ends_the_training_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"step 5 of 10 the loss is nan.*0.0167.*lower learning"):
        fit(Straight(spoil_loss=5), tmp_path, 2)
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["global_step"] == 4
    again = Straight()
    fit(again, tmp_path, 2)
    assert torch.allclose(again.network.weight[0], by_hand(10)[0], atol=1e-6)


@pytest.mark.parametrize("step", [5, 9], ids=["before a checkpoint", "at the end"])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, step):
    with pytest.raises(ValueError, match=rf"after step {step + 1}, 1 of 3 values of network.weigh"):
        fit(Straight(spoil_weight=step), tmp_path, 2 if step == 5 else 4)
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["global_step"] == (4 if step == 5 else 8)
    check_finite(found["state_dict"], "here")


def test_a_command_whose_loss_is_no_number_writes_no_weights(tmp_path):
    """A rate that no network stands."""
    stage = replace(STAGE, steps=30, lr=1e30)
    options = PretrainOptions(Recipe([stage]), tmp_path, 1, 50, 0)
    with pytest.raises(ValueError, match=r"come to nothing.*lower learning rate"):
        pretrain(options)
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.json", "log"}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": NAN}, r"stages\[0\].lr is nan. Give a number above 0"),
        ({"lr": INF}, r"stages\[0\].lr is inf"),
        ({"lr": -1.0}, r"stages\[0\].lr is -1.0"),
        ({"lr": 0.0}, r"stages\[0\].lr is 0.0"),
        ({"lr": "fast"}, r"stages\[0\].lr is 'fast'"),
        ({"steps": 0}, r"stages\[0\].steps is 0. Give a whole number 1 or more"),
        ({"steps": -3}, r"stages\[0\].steps is -3"),
        ({"steps": 2.5}, r"stages\[0\].steps is 2.5. Give a whole number"),
        ({"steps": True}, r"stages\[0\].steps is True"),
        ({"chunks": 0}, r"stages\[0\].chunks is 0"),
        ({"batch": 0}, r"stages\[0\].batch is 0"),
        ({"sizes": (2, 5)}, r"sizes\[0\] is 2. Give a whole number from 4 to 14"),
        ({"sizes": (4, 15)}, r"sizes\[1\] is 15. Give a whole number from 4 to 14"),
        ({"sizes": (6, 5)}, r"sizes\[1\] is 5. Give a whole number from 6 to 14"),
        ({"sizes": (6,)}, r"sizes is \(6,\)"),
        ({"warmup": -1}, "warmup is -1"),
        ({"hold": 1.5}, "hold is 1.5. Give a number from 0 to 1"),
        ({"final": NAN}, "final is nan"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"head_dropout": 1.0}, "head_dropout is 1.0"),
    ],
)
def test_a_stage_that_trains_nothing_is_refused_before_anything_is_written(tmp_path, change, said):
    options = PretrainOptions(Recipe([replace(STAGE, **change)]), tmp_path / "run")
    with pytest.raises(ValueError, match=f"panorama model cannot be trained with: .*{said}"):
        pretrain(options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": []}, r"stages is \[\]. Give one stage or more"),
        ({"seed": -1}, "seed is -1. Give a whole number from 0"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"streams": 0}, "streams is 0"),
        ({"shift": 0.0}, "shift is 0.0. Give a number above 0"),
        ({"history_noise": NAN}, "history_noise is nan"),
        ({"history_dropout": 1.1}, "history_dropout is 1.1"),
        ({"slow": -0.1}, "slow is -0.1"),
        ({"ema": (0.99, NAN)}, r"ema\[1\] is nan"),
        ({"ema": (0.99,)}, r"ema is \(0.99,\). Give two numbers"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_a_recipe_that_trains_nothing_is_refused_before_anything_is_written(tmp_path, change, said):
    options = PretrainOptions(replace(Recipe([STAGE]), **change), tmp_path / "run")
    with pytest.raises(ValueError, match=f"panorama model cannot be trained with: {said}"):
        pretrain(options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": NAN}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"worlds": 0}, "worlds is 0"),
        ({"worlds": 1}, "worlds is 1. Give a whole number 2 or more"),
        ({"warmup": 0}, "warmup is 0. Give a whole number 1 or more"),
        ({"weight_decay": INF}, "weight_decay is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_encoder_recipe_that_trains_nothing_is_refused(tmp_path, change, said):
    options = PretrainEncoderOptions(EncoderRecipe(**change), tmp_path / "run")
    with pytest.raises(ValueError, match=f"panorama encoder cannot be trained with: {said}"):
        pretrain_encoder(options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"threads": 0}, {"checkpoint_every": 0}, {"picture_every": -1}])
def test_a_run_that_cannot_go_is_refused_before_anything_is_written(tmp_path, change):
    (name, value), *_ = change.items()
    options = PretrainOptions(Recipe([STAGE]), tmp_path / "run", **change)
    with pytest.raises(ValueError, match=f"The panorama model cannot.*{name} is {value}. Give"):
        pretrain(options)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_run_directory_is_said(tmp_path):
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(ValueError, match=r"run is a file. Give another --out"):
            pretrain_encoder(PretrainEncoderOptions(EncoderRecipe(steps=2), out))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("raw", ["schön".encode("latin-1"), b"{}", None])
def test_a_recipe_that_is_another_or_none_is_refused(tmp_path, raw):
    file = tmp_path / "recipe.json"
    file.mkdir() if raw is None else file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"another recipe.*recipe\.json.*Give another --out"):
        pretrain_encoder(PretrainEncoderOptions(EncoderRecipe(steps=2), tmp_path))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_line_counts_steps_on_a_terminal_and_is_silent_elsewhere(
    tmp_path, screen, terminal
):
    with pytest.raises(ValueError, match="step 5 of 6"):
        fit(Straight(6, spoil_loss=5), tmp_path, 4)
    (tmp_path / "log").rename(tmp_path / "first")
    read = screen(terminal)
    task = Straight(6)
    fit(task, tmp_path, 4)
    shown = read()
    if terminal:
        assert "training" in shown and "6/6" in shown and "steps" in shown
        assert f"loss {task.losses['loss']:.4g}" in shown
        assert "1/6" not in shown, "it goes on from step 4"
    else:
        assert "steps" not in shown and "training" not in shown
