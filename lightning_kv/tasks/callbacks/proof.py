"""Losses under budgets by head: clips are on disk as they are measured, and one rank concludes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import lightning as L

from lightning_kv.tasks.calibration.records import CalibrationDirectory
from lightning_kv.tasks.callbacks.curves import CurveWriter
from lightning_kv.tasks.proof.reads import ReadsProof, conclude
from lightning_kv.tasks.prove import ProveBudgetsModule


class ProofWriter(CurveWriter):
    """Writes a record of each clip, and at the end says what they prove.

    Interruptions, more prompts and ranks are as in
    :class:`~lightning_kv.tasks.callbacks.CurveWriter`.

    Args:
        records: Folder of the records.

    Attributes:
        found: What came of it, on the first rank, once the test has ended.
    """

    measured_by: ClassVar[type[ProveBudgetsModule]] = ProveBudgetsModule
    found: ReadsProof | None

    def __init__(self, records: str | Path) -> None:
        self.run = CalibrationDirectory(records)
        self.opened, self.found = False, None

    def settled(self, module: ProveBudgetsModule) -> float:
        """The first mean: nothing is asked about one alone."""
        return float(module.design.means[0])

    def on_test_end(self, trainer: L.Trainer, pl_module: ProveBudgetsModule) -> None:
        """Say what it proves, once all ranks are done."""
        trainer.strategy.barrier("records are written")
        if not trainer.is_global_zero:
            return
        wanted = pl_module.wanted(trainer.datamodule)
        self.found = conclude(self.run, wanted, pl_module.design)
        numbers = {f"prove/optimal@{own.mean}f": own.found for own in self.found.means}
        for logger in trainer.loggers:
            logger.log_metrics(numbers)
