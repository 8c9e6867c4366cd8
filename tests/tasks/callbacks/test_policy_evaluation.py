"""Cache policies judged inside of a training: an evaluation's numbers, and nothing disturbed."""

import csv
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)

from lightning_kv import load_model
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.video import VideoModel
from lightning_kv.tasks.callbacks import PolicyEvaluation
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.options import Recipe, Stage
from lightning_kv.tasks.pretrain import Pretrain

SHARDS = Path(__file__).parents[3] / "data/panorama-quick"
SETTINGS = {"metrics": ["recall", "latent_mse", "fvd/panorama-encoder"], "frames": 15}
SETTINGS |= {"context_frames": 6}
NAMES = ["kv/full/recall", "kv/sliding-window@6f/recall", "kv/sliding-window@6f/latent_mse"]
NAMES += ["kv/full/fvd/panorama-encoder", "kv/sliding-window@6f/fvd/panorama-encoder"]


class Tuning(L.LightningModule):
    """Somebody's training of the embedded model, with dropout and automatic optimisation."""

    def __init__(self, rate=1e-4):
        super().__init__()
        model = load_model("panorama")
        self.network, self.codec, self.encoder = model.network, model.codec, model.encoder
        self.network.requires_grad_(True)
        self.dropout, self.rate, self.drawn = torch.nn.Dropout(0.5), rate, []

    def training_step(self, batch, _):
        self.drawn.append(float(torch.rand(())))
        self.trained = self.network.training
        return sum((self.dropout(p) ** 2).sum() for p in self.network.parameters() if p.ndim == 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=self.rate)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(6, 1))


class Apart(Tuning):
    """Two optimisers by hand: the Trainer counts two steps a batch."""

    def __init__(self):
        super().__init__(rate=0)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        first, *rest = self.network.parameters()
        return [torch.optim.SGD([first], lr=0.0), torch.optim.SGD(rest, lr=0.0)]


def trained(module, callbacks, out=None, steps=5, **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=CSVLogger(out, name="", version="log") if out else False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **(quiet | more),
    )
    L.seed_everything(7, verbose=False)
    module.network.train()
    trainer.fit(module)
    return trainer


def rows(out):
    with (out / "log" / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [row for row in found if row.get(NAMES[0])]


def test_a_training_logs_what_an_evaluation_says(tmp_path):
    """Rate 0: the model stays, so every step has the numbers of an evaluation of it."""
    data = PromptDataModule(SHARDS, 2)
    watch = PolicyEvaluation(["sliding-window@6f"], data, every_n_steps=2, **SETTINGS)
    saver = ModelCheckpoint(tmp_path / "best", monitor=NAMES[0], mode="max", every_n_train_steps=2)
    trainer = trained(Tuning(rate=0), [watch, saver], tmp_path)
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == [2, 4]
    module = EvaluateModule("panorama", ["sliding-window@6f"], **SETTINGS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (direct,) = L.Trainer(accelerator="cpu", devices=1, **quiet).test(
        module, datamodule=PromptDataModule(SHARDS, 2), verbose=False
    )
    for row in found:
        assert {name: float(row[name]) for name in NAMES} == pytest.approx(
            {name: direct[name.removeprefix("kv/")] for name in NAMES}, rel=1e-9
        )
    assert trainer.callback_metrics[NAMES[0]] == pytest.approx(direct["full/recall"], rel=1e-6)
    assert saver.best_model_path and float(saver.best_model_score) > 0.9


def test_a_training_that_spoils_the_model_shows_it(tmp_path):
    watch = PolicyEvaluation(["full"], PromptDataModule(SHARDS, 1), 4, **SETTINGS)
    trained(Tuning(rate=1e-2), [watch], tmp_path)
    (row,) = rows(tmp_path)
    assert float(row["kv/full/recall"]) < 0.9


def test_a_training_with_two_optimisers_by_hand(tmp_path):
    watch = PolicyEvaluation(["full"], PromptDataModule(SHARDS, 1), 4, **SETTINGS)
    trained(Apart(), [watch], tmp_path, steps=6)
    (row,) = rows(tmp_path)
    assert int(row["step"]) == 4 and float(row["kv/full/recall"]) > 0.9


def test_the_training_is_not_disturbed():
    alone, watched = Tuning(), Tuning()
    trained(alone, [])
    watch = PolicyEvaluation(["random@6f"], PromptDataModule(SHARDS, 1), 2, **SETTINGS)
    trained(watched, [watch])
    assert alone.drawn == watched.drawn and len(alone.drawn) == 5
    assert watched.trained and watched.network.training
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_training_of_the_embedded_model_itself(tmp_path):
    """Its own module with two optimisers in one, its averaged weights, prompts as texts."""
    stage = Stage(steps=3, chunks=2, batch=1, sizes=(6, 8), lr=1e-3)
    task = Pretrain(Recipe([stage]), tmp_path, picture_every=0)
    watch = PolicyEvaluation(
        ["sliding-window@6f"],
        ["mist fast n7 left", "dusk fast n8 left"],
        every_n_steps=2,
        model=lambda module: VideoModel(module.average, module.codec, module.encoder),
        **SETTINGS,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[watch],
        logger=CSVLogger(tmp_path, name="", version="log"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task)
    (row,) = rows(tmp_path)
    assert int(row["step"]) == 2 and 0 <= float(row["kv/full/recall"]) < 0.9


@pytest.mark.parametrize(
    ("prompts", "every", "said"),
    [
        ([], 1, r"prompts=\[\]"),
        (["a"], 0, "every_n_steps=0"),
        (["a"], 10.5, "every_n_steps=10.5.*whole number"),
        (["a"], True, "every_n_steps=True.*whole number"),
        ("a", 1, "in a list"),
        (["a", "a"], 1, "Give each text once"),
        ([1], 1, r"\[1\] was given"),
        (7, 1, "7 was given"),
    ],
)
def test_nothing_to_evaluate_is_refused(prompts, every, said):
    with pytest.raises(ValueError, match=said):
        PolicyEvaluation(["full"], prompts, every)


def test_a_module_without_a_model_is_refused_before_the_first_step():
    class Other(Tuning):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.layer = torch.nn.Linear(2, 2)

    watch = PolicyEvaluation(["full"], ["mist fast n7 left"], 1)
    with pytest.raises(ValueError, match=r"Other has no model that can be .*model=lambda"):
        watch.on_fit_start(None, Other())


@pytest.mark.parametrize(
    ("policies", "more", "said"),
    [
        (["sliding-windw@6f"], {}, "Did you mean 'sliding-window"),
        ("full", {}, r"come in a list: 'full' was given\. Write \['full'\]"),
        ([], {}, "No policies"),
        (["full"], {"frame": 24}, r"no setting 'frame': frame=24 .*mean 'frames'\?.*context_fra"),
        (["full"], {"sample": 2}, r"no setting 'sample': .*mean 'samples'\?"),
        (["full"], {"samples": 0}, "at least one noise: samples=0"),
        (["full"], {"samples": 1.5}, "at least one noise: samples=1.5"),
        (["full"], {"metrics": {"psnr": 1}}, r"are a list, and this is .*metrics.values\(\)"),
        (["full"], {"metrics": "recall,psrn"}, "Did you mean 'psnr'"),
        (["full"], {"metrics": ["recal"]}, "Did you mean 'recall'"),
        (["full"], {"reference": "ful"}, "Did you mean 'full'"),
        (["full"], {"real": "videos"}, "real=videos is not read while a model trains"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is_written(policies, more, said):
    with pytest.raises(ValueError, match=said):
        PolicyEvaluation(policies, ["mist fast n7 left"], 1, **more)


def test_a_data_module_says_the_samples_itself():
    with pytest.raises(ValueError, match=r"samples=2 was given beside its 3\. Give Prompt"):
        PolicyEvaluation(["full"], PromptDataModule(SHARDS, 1, samples=3), 1, samples=2)


def test_a_data_module_that_cannot_be_read_is_refused_before_the_first_step(tmp_path):
    watch = PolicyEvaluation(["full"], PromptDataModule(tmp_path / "none"), 1, **SETTINGS)
    with pytest.raises(ValueError, match="none"):
        watch.on_fit_start(SimpleNamespace(strategy=DDPStrategy()), Tuning())


def test_a_metric_that_is_unavailable_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    watch = PolicyEvaluation(["full"], ["mist fast n7 left"], 1, metrics=["recall", "lpips"])
    with pytest.warns(UserWarning, match="'lpips/alex' is unavailable and will have no value"):
        watch.on_fit_start(SimpleNamespace(strategy=DDPStrategy()), Tuning())


SPREAD = [FSDPStrategy(), ModelParallelStrategy(), object.__new__(DeepSpeedStrategy)]


@pytest.mark.parametrize("strategy", SPREAD, ids=lambda each: type(each).__name__)
def test_a_model_that_is_spread_over_processes_is_refused(strategy):
    watch = PolicyEvaluation(["full"], ["mist fast n7 left"], 1, **SETTINGS)
    name = type(strategy).__name__
    with pytest.raises(ValueError, match=f"(?s)whole model.*{name}.*strategy='ddp'"):
        watch.on_fit_start(SimpleNamespace(strategy=strategy), Tuning())


def evaluated(module, data, **settings):
    """What an evaluation by itself says of the model in a module."""
    model = VideoModel(module.network, module.codec, module.encoder)
    fresh = EvaluateModule(model, ["sliding-window@6f"], **(settings or SETTINGS))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    alone = L.Trainer(accelerator="cpu", devices=1, **quiet)
    (found,) = alone.test(fresh, datamodule=data, verbose=False)
    return {f"kv/{name}": value for name, value in found.items()}


def test_samples_and_batch_of_the_data_module_count(monkeypatch):
    batches = []
    step = EvaluateModule.test_step

    def counted(self, batch, index):
        batches.append([(item.sample, item.policy) for item in batch])
        return step(self, batch, index)

    monkeypatch.setattr(EvaluateModule, "test_step", counted)
    data = PromptDataModule(SHARDS, 2, samples=2, batch=2)
    module, short = (
        Tuning(),
        {"metrics": ["recall", "latent_mse"], "frames": 12, "context_frames": 6},
    )
    trainer = SimpleNamespace(
        strategy=DDPStrategy(), global_rank=0, world_size=1, loggers=[], callback_metrics={}
    )
    found = PolicyEvaluation(["sliding-window@6f"], data, 1, **short).evaluate(trainer, module)
    names = ["full", "sliding-window@6f"]
    assert batches == 2 * [[(sample, name) for sample in (0, 1)] for name in names]
    assert found == pytest.approx(evaluated(module, data, **short), rel=1e-9)
    texts = [sample.prompt for sample in data.prompt_samples()][:1]
    batches.clear()
    watch = PolicyEvaluation(["sliding-window@6f"], texts, 1, samples=3, **short)
    watch.evaluate(trainer, module)
    assert batches == [[(sample, name)] for sample in (0, 1, 2) for name in names]


def test_an_evaluation_by_hand_after_the_training(tmp_path):
    data = PromptDataModule(SHARDS, 1)
    watch, module = PolicyEvaluation(["sliding-window@6f"], data, 100, **SETTINGS), Tuning()
    trainer = trained(module, [watch], tmp_path)
    assert not (tmp_path / "log" / "metrics.csv").exists()
    found = watch.evaluate(trainer, module)
    assert set(found) >= set(NAMES[:3])
    assert found == pytest.approx(evaluated(module, data), rel=1e-9)
    (row,) = rows(tmp_path)
    assert row["step"] == "5" and {name: float(row[name]) for name in found} == found
    assert trainer.callback_metrics[NAMES[0]] == pytest.approx(found[NAMES[0]])


class Shaky(torch.nn.Module):
    """A codec or an encoder that is another one in training: it drops what it gets."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.dropout = whole, torch.nn.Dropout(0.5)

    def forward(self, prompts):
        return self.dropout(self.whole(prompts))


class Patchy(PatchCodec):
    """A codec with dropout."""

    def decode(self, latents):
        return torch.nn.functional.dropout(super().decode(latents), 0.5, self.training)


class Shaking(Tuning):
    """Dropout in all parts of the model."""

    def __init__(self, rate=0.0):
        super().__init__(rate)
        self.network.register_forward_hook(self._shake)
        self.encoder, self.codec.__class__ = Shaky(self.encoder), Patchy
        self.modes = []

    def _shake(self, network, _, out):
        self.modes.append(network.training)
        return torch.nn.functional.dropout(out, 0.5, network.training)


def test_all_parts_are_in_evaluation_mode_and_then_as_they_were(tmp_path):
    data, module = PromptDataModule(SHARDS, 1), Shaking()
    module.network.train()
    module.encoder.whole.eval()  # somebody froze it
    watch = PolicyEvaluation(["sliding-window@6f"], data, 2, **SETTINGS)
    before = [each.training for each in module.modules()]
    trained(module, [watch], tmp_path)
    assert module.modes and not any(module.modes)
    assert [each.training for each in module.modules()] == before and any(before)
    right = evaluated(Tuning(), data)
    for row in rows(tmp_path):
        assert {name: float(row[name]) for name in right} == pytest.approx(right, rel=1e-9)


def test_an_evaluation_that_fails_leaves_all_modes_as_they_were(monkeypatch):
    monkeypatch.setattr("lightning_kv.tasks.evaluate.rollout", None)
    module = Shaking()
    module.network.train()
    module.encoder.whole.eval()
    before = [each.training for each in module.modules()]
    with pytest.raises(TypeError):
        trained(module, [PolicyEvaluation(["full"], PromptDataModule(SHARDS, 1), 1, **SETTINGS)])
    assert [each.training for each in module.modules()] == before


def test_every_evaluation_is_of_the_model_of_its_step_alone(tmp_path):
    """A model that changes much: what is logged is what a fresh evaluation of it says."""
    data, right = PromptDataModule(SHARDS, 1), []

    class Beside(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            copy = Tuning()
            copy.load_state_dict(pl_module.state_dict())
            right.append(evaluated(copy.eval(), data))

    watch = PolicyEvaluation(["sliding-window@6f"], data, 1, **SETTINGS)
    trained(Tuning(rate=1e-2), [watch, Beside()], tmp_path, steps=3)
    found = rows(tmp_path)
    assert len(found) == len(right) == 3
    assert len({each[NAMES[2]] for each in right}) == 3
    for row, each in zip(found, right, strict=True):
        assert {name: float(row[name]) for name in each} == pytest.approx(each, rel=1e-9)


class Saver(L.Callback):
    """Saves at one step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("cut", [3, 4, 5, 8])
@pytest.mark.parametrize("first", ["saver", "watch"])
def test_a_training_that_goes_on_is_evaluated_at_the_same_steps(tmp_path, monkeypatch, cut, first):
    """Also where the checkpoint is of a step at which an evaluation was due, before or after it."""
    steps = []
    monkeypatch.setattr(
        PolicyEvaluation, "evaluate", lambda self, trainer, _: steps.append(trainer.global_step)
    )

    def watch(prefix="kv/"):
        return PolicyEvaluation(["full"], ["mist fast n7 left"], 4, prefix=prefix, **SETTINGS)

    path = tmp_path / "cut.ckpt"
    callbacks = [Saver(cut, path), watch()]
    trained(Tuning(0), callbacks if first == "saver" else callbacks[::-1], steps=10)
    assert steps == [4, 8]
    done = [step for step in steps if step < cut or (step == cut and first == "watch")]
    steps.clear()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=10,
        callbacks=[again := watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tuning(0), ckpt_path=path, weights_only=False)
    assert done + steps == [4, 8]
    steps.clear()
    trained(Tuning(0), [again], steps=10)  # another training, from its beginning
    assert steps == [4, 8]


def test_a_callback_that_is_used_again_counts_anew(monkeypatch):
    steps = []
    monkeypatch.setattr(
        PolicyEvaluation, "evaluate", lambda self, trainer, _: steps.append(trainer.global_step)
    )
    both = [
        PolicyEvaluation(["full"], ["mist fast n7 left"], every, prefix=f"{every}/", **SETTINGS)
        for every in (3, 4)
    ]
    for _ in range(2):
        trained(Tuning(0), both)
    assert steps == 2 * [3, 4]
