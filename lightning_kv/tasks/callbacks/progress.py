"""Progress lines as a Trainer's progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lightning_kv.tasks.progress import ProgressLine, RolloutProgress

if TYPE_CHECKING:  # a training shows its steps without all that is measured elsewhere
    from lightning_kv.data.video_pairs import Piece
    from lightning_kv.tasks.calibration.module import RecordsModule
    from lightning_kv.tasks.compare import CompareModule
    from lightning_kv.tasks.measuring.clip_module import ClipModule


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
    """A line with the steps of a ``Training`` and its loss."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the line where the training goes on."""
        done, visible = trainer.global_step, trainer.is_global_zero
        self.begin(ProgressLine(pl_module.steps, "steps", "training", done, visible))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Count steps."""
        self.bar.advance(1, note=f"loss {pl_module.losses['loss']:.4g}")


class RolloutProgressBar(LineProgressBar):
    """A line with prompts, chunks, time left, frames per second and the size of the cache.

    Silent where standard error is no terminal.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Begin the line."""
        from lightning_kv.tasks.callbacks.base import check_data

        check_data(trainer, self, "left")
        plan = pl_module.network.config.plan(
            pl_module.settings.frames, pl_module.settings.context_frames
        )
        rollouts = len(pl_module.names) + pl_module.rolls_first
        left = trainer.datamodule.left()
        bar = RolloutProgress(left, rollouts * plan.count, plan.chunk, trainer.is_global_zero)
        self.begin(bar)
        pl_module.begun.append(bar.begin)
        pl_module.heard.append(bar.chunk)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: ClipModule, outputs: Any, *_: Any
    ) -> None:
        """Count prompts."""
        self.bar.end(sum(clip.last for clip in outputs["clips"]))

    def close(self, pl_module: ClipModule) -> None:
        """Leave the terminal tidy, and the module without listeners."""
        if self.bar is not None:
            for listening, own in (
                (pl_module.begun, self.bar.begin),
                (pl_module.heard, self.bar.chunk),
            ):
                if own in listening:
                    listening.remove(own)
        super().close(pl_module)


class FrameProgressBar(LineProgressBar):
    """A line with the frames that are read, and the time left; silent without a terminal."""

    def on_test_start(self, trainer: L.Trainer, pl_module: CompareModule) -> None:
        """Begin the line."""
        from lightning_kv.tasks.callbacks.base import check_data

        check_data(trainer, self, "frames_left")
        left = trainer.datamodule.frames_left()
        self.begin(ProgressLine(left, "frames", visible=trainer.is_global_zero))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: CompareModule, outputs: Any, batch: Piece, *_: Any
    ) -> None:
        """Count frames."""
        self.bar.advance(len(batch.pixels), f"{batch.name} {batch.key}")


class CalibrationProgressBar(LineProgressBar):
    """A line with the clips that are measured, and the time left; silent without a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.clips, self.part = 0, 0.0  # done, and of the running one

    def on_test_start(self, trainer: L.Trainer, pl_module: RecordsModule) -> None:
        """Begin the line."""
        left = trainer.datamodule.left()
        self.begin(ProgressLine(left, "clips", "measuring", visible=trainer.is_global_zero))
        pl_module.heard.append(self.further)
        self.clips, self.part = 0, 0.0

    def further(self, key: str, share: float) -> None:
        """A clip is so much further."""
        self.part += share
        self.bar.at(self.clips + self.part, key)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: RecordsModule, outputs: Any, *_: Any
    ) -> None:
        """Clips are done; shares of them need not add up to whole numbers."""
        self.clips, self.part = self.clips + len(outputs["clips"]), 0.0
        self.bar.at(self.clips)

    def close(self, pl_module: RecordsModule) -> None:
        """Leave the terminal tidy, and the module without listeners."""
        if self.further in pl_module.heard:
            pl_module.heard.remove(self.further)
        super().close(pl_module)
