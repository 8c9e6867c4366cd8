"""One fit of a student, which a stopped run goes on with: its numbers depend on no process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from lightning_kv.distillation.baselines import BASELINES, by_scorer
from lightning_kv.distillation.judging import OWN, ListMetric, cuts_of
from lightning_kv.distillation.lists import Lists
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.tasks.distillation.data import StatisticsData
from lightning_kv.tasks.distillation.distiller import KEPT, OUTPUT_MONITOR, PolicyDistiller
from lightning_kv.tasks.training.module import LAST, check_finite, last_checkpoint

SCORER = "scorer.safetensors"
TrainerOf = Callable[..., L.Trainer]
"""Makes a Trainer of callbacks, a folder for what it writes, and other arguments."""

Table = dict[str, dict[str, float | None]]
"""Measures as ``MEASURE@k`` by whose ranking it is; None where no list has a value."""


class Patience(EarlyStopping):
    """Ends a fit after some looks without a better one, also one that was stopped right then.

    Args:
        begin: Step before which looks do not count: losses come in later.
        settings: Of the base.
    """

    def __init__(self, *args: Any, begin: int = 0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.begin = begin

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count a look."""
        if trainer.global_step >= self.begin:
            super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What an earlier start has seen counts."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class LookSaver(L.Callback):
    """Saves a checkpoint after each look, when all that it decides is decided.

    Args:
        file: The checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            trainer.save_checkpoint(self.file, weights_only=False)


def fit(folder: Path, task: PolicyDistiller, data: StatisticsData, trainer_of: TrainerOf) -> Scorer:
    """Fit, or go on with a fit, or take up what it came to.

    Args:
        folder: Of this very fit: what has been written there is gone on with.
        task: The module.
        data: The lists.
        trainer_of: Makes a Trainer of one process.

    Returns:
        The scorer; its ``about["fit"]`` tells the steps and the last losses.

    Raises:
        ValueError: A checkpoint cannot be taken up, or the fit has come to nothing.
    """
    done = folder / SCORER
    if done.is_file():
        return Scorer.load(done)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(folder, task)
    recipe, looking = task.recipe, data.held_out.lists is not None
    callbacks: list[L.Callback] = []
    if looking:
        monitor = task.monitor(data.held_out.lists)
        begin = math.ceil(recipe.first * recipe.steps) if monitor == OUTPUT_MONITOR else 0
        callbacks += [
            Patience(monitor, patience=recipe.patience, begin=begin),
            LookSaver(folder / LAST),
        ]
    every = max(1, math.ceil(recipe.steps / recipe.looks))
    trainer = trainer_of(
        callbacks,
        folder,
        max_epochs=1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if looking else 0,
        enable_checkpointing=False,
        log_every_n_steps=min(50, every),
    )
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    check_finite(task.state_dict_of_student(), f"after step {trainer.global_step}", task.advice)
    scorer = task.distilled()
    scorer.about["fit"] = {"steps": trainer.global_step, "losses": task.losses}
    scorer.save(done)
    (folder / LAST).unlink(missing_ok=True)
    return scorer


def judged(lists: Lists | None, scorers: Mapping[str, Scorer], kept: Sequence[int] = KEPT) -> Table:
    """What rankings are worth on lists, of scorers and of all that is done by hand.

    Args:
        lists: Held out; nothing is said of none.
        scorers: By name.
        kept: Fixed budgets, candidates that are kept.
    """
    if lists is None:
        return {}
    budgets = (OWN, *kept)
    outputs = lists.gram is not None
    size = {"layers": int(lists.layer.max()) + 1, "heads": int(lists.head.max()) + 1}
    cuts, found = cuts_of(lists, budgets, outputs), {}
    scores = {name: scores_of(lists) for name, scores_of in BASELINES.items()}
    scores |= {name: by_scorer(lists, scorer) for name, scorer in scorers.items()}
    for name, own in scores.items():
        metric = ListMetric(budgets, outputs=outputs, sync_on_compute=False, **size)
        metric.update(own, lists, cuts)
        values = {what: float(x) for what, x in metric.compute().items()}
        found[name] = {
            what: round(x, 6) if math.isfinite(x) else None for what, x in values.items()
        }
    return found
