"""Records of clips that are measured alone: on disk as they come, and one rank concludes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibration.module import RecordsModule
from lightning_kv.tasks.calibration.records import CalibrationDirectory, ClipDirectory, Wanted
from lightning_kv.tasks.measuring.fingerprint import surroundings


class ClipRecordWriter(L.Callback):
    """Writes a record of each clip; what comes of them is said by a subclass.

    A run that was stopped goes on, and one of other prompts is added to what is there: what is
    finished is left out.

    Args:
        records: Folder of the records.

    Attributes:
        found: What came of it, on the first rank, once the test has ended.
    """

    measured_by: ClassVar[type[RecordsModule]]
    """The module whose clips it writes."""
    directory: ClassVar[type[ClipDirectory]] = CalibrationDirectory
    """What its records are."""

    def __init__(self, records: str | Path) -> None:
        self.run = self.directory(records)
        self.opened, self.found = False, None

    def check(self, module: RecordsModule) -> None:
        """Refuse what would be noticed when all is measured."""
        return

    def concluded(
        self, trainer: L.Trainer, module: RecordsModule, wanted: Mapping[str, Wanted]
    ) -> Any:
        """What comes of the records, on the first rank."""
        raise NotImplementedError

    def numbers(self, found: Any) -> dict[str, float]:
        """What loggers are told of it."""
        return {}

    def open(self, trainer: L.Trainer, module: RecordsModule, data: Any) -> None:
        """Make the directory, or check that it holds records of these very settings; for one rank.

        Raises:
            ValueError: It holds something else, something would be lost, or the module cannot
                measure what the data gives.
        """
        module.check_data(data)
        self.check(module)
        described = {**module.describe(), **surroundings(trainer)}
        logs = [Path(each.log_dir).resolve().parts for each in trainer.loggers if each.log_dir]
        own = self.run.path.resolve().parts
        beside = {parts[len(own)] for parts in logs if parts[: len(own)] == own != parts}
        self.run.open(fingerprint(described), described, None, beside)
        self.opened = True

    def setup(self, trainer: L.Trainer, pl_module: RecordsModule, stage: str) -> None:
        """Take up what an earlier start has left.

        Raises:
            ValueError: The Trainer runs something else than what is written.
        """
        if stage != "test":
            return
        kind = self.measured_by
        if not isinstance(pl_module, kind):
            raise ValueError(
                f"{type(self).__name__} writes what a {kind.__name__} measures, and a "
                f"{type(pl_module).__name__} was given. Use it with {kind.__name__}."
            )
        if trainer.is_global_zero and not self.opened:
            self.open(trainer, pl_module, trainer.datamodule)
        trainer.strategy.barrier("the folder of records is there")
        wanted = pl_module.wanted(trainer.datamodule)
        others = set(trainer.datamodule.keys()) - wanted.keys()
        trainer.datamodule.finished = self.run.finished(wanted) | others
        trainer.datamodule.longest = {key for key, own in wanted.items() if own.validates}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: RecordsModule, outputs: Any, *_: Any
    ) -> None:
        """Write what was measured."""
        for record, sample in zip(outputs["clips"], outputs["samples"], strict=True):
            self.run.write(record, sample)

    def on_test_end(self, trainer: L.Trainer, pl_module: RecordsModule) -> None:
        """Conclude, once all ranks are done."""
        trainer.strategy.barrier("records are written")
        if not trainer.is_global_zero:
            return
        wanted = pl_module.wanted(trainer.datamodule)
        self._check_whole(trainer, wanted)
        self.found = self.concluded(trainer, pl_module, wanted)
        for logger in trainer.loggers:
            logger.log_metrics(self.numbers(self.found))

    def _check_whole(self, trainer: L.Trainer, wanted: Mapping[str, Wanted]) -> None:
        """Refuse to leave prompts out, unless the Trainer was told to.

        Raises:
            ValueError: Records are not where this rank looks for them.
        """
        there = self.run.finished(wanted)
        missing = [key for key in wanted if key not in there]
        limit = trainer.limit_test_batches
        if missing and isinstance(limit, float) and limit == 1:  # 1 is one batch, 1.0 all of them
            raise ValueError(
                f"Records are missing: {self.run.path} has none of {len(missing)} of {len(wanted)} "
                f"clips, such as {missing[0]!r}, though they were measured. Give a folder that all "
                "machines share (--records), copy theirs into it, and start again."
            )

    def teardown(self, trainer: L.Trainer, pl_module: RecordsModule, stage: str) -> None:
        """What comes next is another run, until it is compared with what is there."""
        self.opened = False
        if trainer.datamodule is not None:
            trainer.datamodule.finished = trainer.datamodule.longest = ()

    def on_exception(
        self, trainer: L.Trainer, pl_module: RecordsModule, exception: BaseException
    ) -> None:
        """After an error or an interrupt too: there is no teardown then."""
        self.teardown(trainer, pl_module, "test")
