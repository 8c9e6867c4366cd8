"""Cache policies judged inside of a training: an evaluation's numbers, and nothing disturbed."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_kv import load_model
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.models.video import VideoModel
from lightning_kv.tasks.evaluate import EvaluateModule
from lightning_kv.tasks.options import Recipe, Stage
from lightning_kv.tasks.policy_evaluation import PolicyEvaluation
from lightning_kv.tasks.pretrain import Pretrain

SHARDS = Path(__file__).parents[2] / "data/panorama-quick"
SETTINGS = {"metrics": ["recall", "latent_mse", "fvd/panorama-encoder"], "frames": 24}
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


def test_the_training_is_not_disturbed():
    alone, watched = Tuning(), Tuning()
    trained(alone, [])
    watch = PolicyEvaluation(["random@6f"], PromptDataModule(SHARDS, 1), 1, **SETTINGS)
    trained(watched, [watch])
    assert alone.drawn == watched.drawn and len(alone.drawn) == 5
    assert watched.trained and watched.network.training
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_training_of_the_embedded_model_itself(tmp_path):
    """Its own module with two optimisers, its averaged weights, prompts as texts."""
    stage = Stage(steps=3, chunks=2, batch=1, sizes=(6, 8), lr=1e-3)
    task = Pretrain(Recipe([stage]), tmp_path, picture_every=0)
    watch = PolicyEvaluation(
        ["sliding-window@6f"],
        ["mist fast n7 left", "dusk fast n8 left"],
        every_n_steps=4,
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
    assert int(row["step"]) == 4 and 0 <= float(row["kv/full/recall"]) < 0.9


@pytest.mark.parametrize(
    ("prompts", "every", "said"),
    [([], 1, "prompts=\\[\\]"), (["a"], 0, "every_n_steps=0"), ("a", 1, "in a list")],
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


def test_an_unknown_policy_is_refused_before_the_first_step():
    watch = PolicyEvaluation(["sliding-windw@6f"], ["mist fast n7 left"], 1)
    with pytest.raises(ValueError, match="Did you mean"):
        trained(Tuning(), [watch])
