"""PolicyDistiller: it learns, goes on where it was stopped, and two processes see what one does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

sys.path.insert(0, str(Path(__file__).parent))
from made_records import fresh, made_rounds

from lightning_kv.distillation.judging import ListMetric
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.tasks.distillation.data import StatisticsData
from lightning_kv.tasks.distillation.distiller import MONITOR, PolicyDistiller
from lightning_kv.tasks.distillation.fit import fit, judged
from lightning_kv.tasks.options import DistillRecipe

RECIPE = DistillRecipe(steps=60, batch=64, lr=1e-2, looks=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_rounds(tmp_path_factory.mktemp("rounds"))


def trainer_of(callbacks, folder, **given):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        callbacks=callbacks, accelerator="cpu", devices=1, default_root_dir=folder, **quiet | given
    )


def fitted(folder, folders, recipe=RECIPE, scorer=None, beside=(), **data):
    lists = StatisticsData(folders, recipe.steps, recipe.batch, **data)
    task = PolicyDistiller(scorer or fresh(), recipe)
    made = lambda own, *place, **given: trainer_of([*own, *beside], *place, **given)  # noqa: E731
    found = fit(folder, task, lists, made)
    return (found, found.about["fit"]), task


def weights(scorer):
    return {name: own.tolist() for name, own in scorer.student.state_dict().items()}


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return folder, *fitted(folder, folders)


def test_it_learns_what_the_lists_tell(done, folders):
    _, (scorer, told), task = done
    held = StatisticsData(folders, 1).held_out.lists
    table = judged(held, {"student": scorer, "before": fresh()}, kept=(2,))
    assert table["student"]["regret@own"] < 0.2 < 0.8 < table["before"]["regret@own"]
    assert table["oracle"]["regret@own"] == 0 and table["oracle"]["recall@2"] == 1
    least = float(task.least)
    assert table["student"]["output_regret@own"] == pytest.approx(least, abs=1e-6)
    assert told["steps"] == 60 and "output" in told["losses"]
    assert {"h2o", "recency", "snap-kv", "focused", "future", "random"} <= table.keys()


def test_what_was_fitted_is_not_fitted_again(done, folders, monkeypatch):
    folder, (scorer, told), _ = done
    assert not (folder / "last.ckpt").exists()
    monkeypatch.setattr(L.Trainer, "fit", None)
    (again, same), _ = fitted(folder, folders)
    assert weights(again) == weights(scorer) and same == told


class Stop(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("step", [20, 3, 47])
def test_a_fit_that_was_stopped_goes_on(done, folders, tmp_path, step):
    with pytest.raises(RuntimeError, match="stopped"):
        fitted(tmp_path, folders, beside=[Stop(step)])
    assert (tmp_path / "last.ckpt").exists() == (step >= 10)
    (scorer, told), _ = fitted(tmp_path, folders)
    assert weights(scorer) == weights(done[1][0]) and told == done[1][1]


def test_it_ends_when_looks_bring_nothing_also_where_it_was_stopped_then(folders, tmp_path):
    recipe = replace(RECIPE, lr=1e-9, final=0.0, patience=2, first=0.0)  # nothing is learned
    (_, told), _ = fitted(tmp_path / "one", folders, recipe)
    assert told["steps"] == 30

    class Die(L.Callback):
        def on_train_end(self, trainer, module):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fitted(tmp_path / "two", folders, recipe, beside=[Die()])
    (_, again), _ = fitted(tmp_path / "two", folders, recipe)
    assert again["steps"] == 30


def test_a_linear_student_with_some_features_and_no_outputs(folders, tmp_path):
    names = tuple(name for name in FEATURES if name not in ("logit", "age"))
    scorer, recipe = fresh("linear", names), replace(RECIPE, outputs=0.0, lr=0.05)
    (found, told), task = fitted(tmp_path, folders, recipe, scorer)
    assert found.features == names and "output" not in told["losses"]
    groups = task.optimizer().param_groups
    assert [x.ndim for x in groups[0]["params"]] == [2] and groups[1]["weight_decay"] == 0
    assert judged(StatisticsData(folders, 1).held_out.lists, {"x": found})["x"]["regret@own"] < 0.2


def test_the_rate_rises_and_falls():
    task = PolicyDistiller(fresh(), DistillRecipe(steps=200, lr=1e-2))
    rates = [task.rate(step) for step in range(200)]
    assert max(rates) == pytest.approx(1e-2) and rates.index(max(rates)) == 10
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 2e-5


def test_losses_that_are_no_numbers_are_refused(folders, tmp_path):
    scorer = fresh()
    scorer.student.prior.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"come to nothing: at step 0 of 60.*in the recipe"):
        fitted(tmp_path, folders, scorer=scorer)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"steps": 0}, "steps is 0"), ({"lr": -1.0}, "lr is -1.0"), ({"first": 2}, "first is 2")],
)
def test_a_recipe_that_cannot_be_followed_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        PolicyDistiller(fresh(), replace(RECIPE, **changes))


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="learns lists, and its Trainer was given no data module"):
        trainer_of([], None, max_steps=1).fit(PolicyDistiller(fresh(), RECIPE), [])


def test_a_trainer_of_ones_own_with_loggers_and_callbacks(folders, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="log")
    beside = [EarlyStopping(MONITOR, patience=1), L.pytorch.callbacks.ModelCheckpoint(tmp_path)]
    given = {"logger": logger, "max_epochs": 1, "val_check_interval": 20}
    trainer = trainer_of(beside, tmp_path, check_val_every_n_epoch=None, **given)
    task = PolicyDistiller(fresh(), RECIPE, kept=(2,))
    trainer.fit(task, datamodule=StatisticsData(folders, RECIPE.steps, RECIPE.batch))
    logged = (tmp_path / "log/metrics.csv").read_text()
    for name in ("val/regret@own", "val/recall@2", "val/output_regret@own", "baseline/h2o/ndcg@2"):
        assert name in logged
    assert float(trainer.callback_metrics[MONITOR]) < 0.3


def test_what_is_logged_is_what_a_metric_of_all_lists_says(folders):
    held = StatisticsData(folders, 1).held_out.lists
    scorer = fresh()
    own = scorer.scores(held.features, held.context, held.layer, held.head, held.candidate)
    metric = ListMetric(("own", 3), layers=3, heads=4)
    metric.update(own.masked_fill(~held.candidate, 0.0), held)
    found = validated(folders, scorer)
    for name, value in metric.compute().items():
        assert found[f"val/{name}"] == pytest.approx(float(value), abs=1e-6)


def validated(folders, scorer, **given):
    trainer = trainer_of([], None, **given)
    data = StatisticsData(folders, RECIPE.steps, RECIPE.batch, look=7)
    trainer.validate(PolicyDistiller(scorer, RECIPE), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


SCRIPT = """
import json, sys
from pathlib import Path
import lightning as L, torch
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.tasks.distillation.data import StatisticsData
from lightning_kv.tasks.distillation.distiller import PolicyDistiller
from lightning_kv.tasks.options import DistillRecipe

out, scorer, workers, *folders = sys.argv[1:]
torch.set_num_threads(1)
quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
def trainer(**given):
    return L.Trainer(accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
                     enable_checkpointing=False, **quiet, **given)
recipe = DistillRecipe(steps=60, batch=64, lr=1e-2, looks=6)
data = lambda: StatisticsData(folders, 60, 64, look=7, workers=int(workers))
seen = trainer()
seen.validate(PolicyDistiller(Scorer.load(scorer), recipe), datamodule=data(), verbose=False)
fits = trainer(max_epochs=1, val_check_interval=10, check_val_every_n_epoch=None)
task = PolicyDistiller(Scorer.load(scorer), recipe)
fits.fit(task, datamodule=data())
if fits.is_global_zero:
    task.distilled().save(Path(out).with_suffix(".safetensors"))
    held = {n: float(v) for n, v in seen.callback_metrics.items()}
    Path(out).write_text(json.dumps({"held": held, "losses": task.losses}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.full)])
def test_two_processes_see_and_learn_what_one_does(folders, tmp_path, workers):
    fresh().save(tmp_path / "scorer.safetensors")
    (tmp_path / "two.py").write_text(SCRIPT)
    out = tmp_path / "told.json"
    words = [sys.executable, "two.py", str(out), "scorer.safetensors", str(workers)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LT_", "TORCHELASTIC"))}
    path = str(Path(__file__).parents[3])
    made = subprocess.run(
        [*words, *map(str, folders)],
        cwd=tmp_path,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    told = json.loads(out.read_text())
    alone = validated(folders, Scorer.load(tmp_path / "scorer.safetensors"))
    held = {name: value for name, value in told["held"].items() if value == value}
    assert held.keys() == {name for name, value in alone.items() if value == value}
    for name, value in held.items():
        assert value == pytest.approx(alone[name], abs=1e-6), name
    loaded = Scorer.load(out.with_suffix(".safetensors"))  # which refuses what is not finite
    (one, _), _ = fitted(tmp_path / "one", folders)
    for name, own in one.student.state_dict().items():
        torch.testing.assert_close(loaded.student.state_dict()[name], own, atol=2e-3, rtol=1e-2)


def test_it_does_not_end_before_outputs_count(folders, tmp_path):
    recipe = replace(RECIPE, lr=1e-9, final=0.0, patience=1, first=0.5)
    (_, told), _ = fitted(tmp_path, folders, recipe)
    assert told["steps"] == 40  # the first look that counts is that of step 30
