"""Progress lines as a Trainer's progress bar."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lightning_kv.tasks.progress import ProgressLine


class LineProgressBar(ProgressBar):
    """A progress bar of one :class:`ProgressLine`, which ends with the run, after an error too."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: ProgressLine | None = None

    def disable(self) -> None:
        """Show nothing: ranks above 0, whose lines are invisible."""

    def enable(self) -> None:
        """Show again."""

    def begin(self, line: ProgressLine) -> None:
        """Show a line."""
        self.bar = line
        line.__enter__()

    def close(self, pl_module: L.LightningModule) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.__exit__()
            self.bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The training is over."""
        self.close(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The test is over."""
        self.close(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """The run has failed."""
        self.close(pl_module)


class TrainingProgressBar(LineProgressBar):
    """A line with the steps of a :class:`~lightning_kv.tasks.training.Training` and its loss."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the line where the training goes on."""
        done, visible = trainer.global_step, trainer.is_global_zero
        self.begin(ProgressLine(pl_module.steps, "steps", "training", done, visible))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Count steps."""
        self.bar.advance(1, note=f"loss {pl_module.losses['loss']:.4g}")
