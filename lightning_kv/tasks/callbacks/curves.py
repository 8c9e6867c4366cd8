"""The file of head curves: clips are on disk as they are measured, and one rank adds them up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from lightning_kv.tasks.calibrate import CalibrateModule
from lightning_kv.tasks.calibration.checks import warn_few
from lightning_kv.tasks.calibration.conclude import Calibration, Task, conclude
from lightning_kv.tasks.calibration.records import Wanted
from lightning_kv.tasks.callbacks.clip_records import ClipRecordWriter
from lightning_kv.tasks.measuring.fingerprint import versions


class CurveWriter(ClipRecordWriter):
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
    found: Calibration | None

    def __init__(
        self, out: str | Path, records: str | Path | None = None, mean: float | None = None
    ) -> None:
        self.out, self.mean = Path(out), mean
        if self.out.suffix != ".safetensors":
            raise ValueError(
                f"Head curves go into a .safetensors file, and {str(out)!r} was given. Give "
                f"{self.out.with_suffix('.safetensors')}."
            )
        super().__init__(records or self.out.with_suffix(".records"))

    def open(self, trainer: L.Trainer, module: CalibrateModule, data: Any) -> None:
        """Make the directory, and the place of the file; for one rank.

        Raises:
            ValueError: As in the base.
        """
        super().open(trainer, module, data)
        self.out.parent.mkdir(parents=True, exist_ok=True)  # not after hours
        warn_few(min(module.validate, data.total))

    def check(self, module: CalibrateModule) -> None:
        """Refuse a mean that is none, and a file whose records are not there.

        Raises:
            ValueError: It is so.
        """
        self.settled(module)
        if self.out.exists() and not self.run.path.exists():
            raise ValueError(
                f"{self.out} is there already, and its records are not: there is no "
                f"{self.run.path}. Give another file, the folder of its records, or remove it."
            )

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
                f"(protected) to {high}, their reach. Give a mean in between."
            )
        return mean

    def concluded(
        self, trainer: L.Trainer, module: CalibrateModule, wanted: Mapping[str, Wanted]
    ) -> Calibration:
        """Write the file."""
        about = module.about()
        about["software"] = versions() | {"device": trainer.strategy.root_device.type}
        config = module.network.config
        mean = self.settled(module)
        task = Task(module.measuring, mean, config.chunk, config.train_horizon, about)
        return conclude(self.run, wanted, task, self.out)

    def numbers(self, found: Calibration) -> dict[str, float]:
        """How good the curves are."""
        checks = found.curves.about["checks"]
        last = checks["looks"][-1]
        told = {"am_gm": checks["am_gm"], "floor": checks.get("floor"), "gain": last["gain"]}
        told["prompts"] = last["prompts"]
        told["spearman_gn_exact"] = checks.get("spearman_gn_exact", [None])[0]
        return {f"calibrate/{name}": x for name, x in told.items() if x is not None}
