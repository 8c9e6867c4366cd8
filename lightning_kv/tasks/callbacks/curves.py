"""The file of head curves: clips are on disk as they are measured, and one rank adds them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibrate import CalibrateModule
from lightning_kv.tasks.calibration.checks import warn_few
from lightning_kv.tasks.calibration.conclude import Calibration, Task, conclude
from lightning_kv.tasks.calibration.records import CalibrationDirectory, Wanted
from lightning_kv.tasks.measuring.fingerprint import surroundings, versions


class CurveWriter(L.Callback):
    """Writes a record of each clip, and at the end the file of head curves.

    A run that was stopped goes on, and one of other prompts is added to what is there: what is
    finished is left out. The file holds the prompts that are asked for, in the order of their keys,
    so it is the same however many ranks there were and however often they were stopped.

    Args:
        out: The file, ``.safetensors``.
        records: Folder of the records; ``OUT.records`` where None.
        mean: Budget that the stopping rule is asked about, history frames per head; a quarter of
            what the reference reads where None.

    Raises:
        ValueError: The file has another ending.

    Attributes:
        found: What came of it, on the first rank, once the test has ended.
    """

    measured_by: ClassVar[type[CalibrateModule]] = CalibrateModule
    """The module whose clips it writes."""

    def __init__(
        self, out: str | Path, records: str | Path | None = None, mean: float | None = None
    ) -> None:
        self.out = Path(out)
        if self.out.suffix != ".safetensors":
            raise ValueError(
                f"Head curves go into a .safetensors file, and {str(out)!r} was given. Give "
                f"{self.out.with_suffix('.safetensors')}."
            )
        self.run = CalibrationDirectory(records or self.out.with_suffix(".records"))
        self.mean, self.opened = mean, False
        self.found: Calibration | None = None

    def open(self, trainer: L.Trainer, module: CalibrateModule, data: Any) -> None:
        """Make the directory, or check that it holds records of these very settings; for one rank.

        Raises:
            ValueError: It holds something else, a file would be lost, or the module cannot measure
                what the data gives.
        """
        module.check_data(data)
        self.settled(module)
        if self.out.exists() and not self.run.path.exists():
            raise ValueError(
                f"{self.out} is there already, and its records are not: there is no "
                f"{self.run.path}. Give another file, the folder of its records, or remove it."
            )
        described = {**module.describe(), **surroundings(trainer)}
        logs = [Path(each.log_dir).resolve().parts for each in trainer.loggers if each.log_dir]
        own = self.run.path.resolve().parts
        beside = {parts[len(own)] for parts in logs if parts[: len(own)] == own != parts}
        self.run.open(fingerprint(described), described, None, beside)
        self.out.parent.mkdir(parents=True, exist_ok=True)  # not after hours
        warn_few(min(module.validate, data.total))
        self.opened = True

    def settled(self, module: CalibrateModule) -> float:
        """The budget that the stopping rule is asked about.

        Raises:
            ValueError: It is not between the sink and the reach.
        """
        low, high = module.measuring.sink, module.measuring.reach
        mean = max(low, high / 4) if self.mean is None else self.mean
        if not low <= mean < high:
            raise ValueError(
                f"A mean of {mean:g} frames is no budget of these curves. They go from {low} "
                f"(protected) to {high}, where nothing is lost. Give a mean in between."
            )
        return mean

    def setup(self, trainer: L.Trainer, pl_module: CalibrateModule, stage: str) -> None:
        """Take up what an earlier start has left.

        Raises:
            ValueError: The Trainer runs something else than a calibration.
        """
        if stage != "test":
            return
        kind = self.measured_by
        if not isinstance(pl_module, kind) or pl_module.judges != kind.judges:
            raise ValueError(
                f"{type(self).__name__} writes what a {kind.__name__} measures, and a "
                f"{type(pl_module).__name__} was given. Use it with {kind.__name__}."
            )
        if trainer.is_global_zero and not self.opened:
            self.open(trainer, pl_module, trainer.datamodule)
        trainer.strategy.barrier("the folder of records is there")
        wanted = pl_module.wanted(trainer.datamodule)
        trainer.datamodule.finished = self.run.finished(wanted)
        trainer.datamodule.longest = {key for key, own in wanted.items() if own.validates}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: CalibrateModule, outputs: Any, *_: Any
    ) -> None:
        """Write what was measured."""
        for record, sample in zip(outputs["clips"], outputs["samples"], strict=True):
            self.run.write(record, sample)

    def on_test_end(self, trainer: L.Trainer, pl_module: CalibrateModule) -> None:
        """Write the file, once all ranks are done."""
        trainer.strategy.barrier("records are written")
        if trainer.is_global_zero:
            wanted = pl_module.wanted(trainer.datamodule)
            self._check_whole(trainer, wanted)
            about = pl_module.about()
            about["software"] = versions() | {"device": trainer.strategy.root_device.type}
            chunk = pl_module.network.config.chunk
            task = Task(pl_module.measuring, self.settled(pl_module), chunk, about)
            self.found = conclude(self.run, wanted, task, self.out)
            self._log(trainer, self.found)

    def _check_whole(self, trainer: L.Trainer, wanted: dict[str, Wanted]) -> None:
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

    @staticmethod
    def _log(trainer: L.Trainer, found: Calibration) -> None:
        """Tell the loggers how good the curves are."""
        checks = found.curves.about["checks"]
        last = checks["looks"][-1]
        told = {"am_gm": checks["am_gm"], "floor": checks.get("floor"), "gain": last["gain"]}
        told["prompts"] = last["prompts"]
        told["spearman_gn_exact"] = checks.get("spearman_gn_exact", [None])[0]
        numbers = {f"calibrate/{name}": x for name, x in told.items() if x is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers)

    def teardown(self, trainer: L.Trainer, pl_module: CalibrateModule, stage: str) -> None:
        """What comes next is another run, until it is compared with what is there."""
        self.opened = False
        if trainer.datamodule is not None:
            trainer.datamodule.finished = trainer.datamodule.longest = ()

    def on_exception(
        self, trainer: L.Trainer, pl_module: CalibrateModule, exception: BaseException
    ) -> None:
        """After an error or an interrupt too: there is no teardown then."""
        self.teardown(trainer, pl_module, "test")
