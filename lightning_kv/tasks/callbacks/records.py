"""Records: what is measured is on disk clip by clip, and a run goes on where it was cut off."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_kv.runs.directory import Record, fingerprint
from lightning_kv.runs.features import FeatureStore, part_of_path
from lightning_kv.tasks.callbacks.base import RunCallback, check_data
from lightning_kv.tasks.decode import FOLDER
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.fingerprint import about, describe
from lightning_kv.tasks.report import conclude
from lightning_kv.tasks.rollouts.latent_files import SUFFIX, write_latents


class RecordWriter(RunCallback):
    """Writes a run directory: a record per clip, features, and at the end summary and report.

    A run that was cut off goes on: what is finished is left out, and the module's metrics start
    from the records. The directory refuses another run.

    Args:
        out: Run directory.
        latents: Keep the latents of every clip too, for ``lightning-kv decode``.
        report: Write ``summary.json`` and the report at the end.
    """

    keeps_records = True

    def __init__(self, out: str | Path, latents: bool = False, report: bool = True) -> None:
        super().__init__(out)
        self.latents, self.report = latents, report
        self.store = FeatureStore(self.run.features)
        self.opened, self.summary = False, {}

    def open(self, trainer: L.Trainer, module: ClipModule, data: Any) -> None:
        """Make the directory, or check that it holds this very run; for one rank.

        Raises:
            ValueError: It holds something else, or the module cannot measure what the data gives.
        """
        module.check_data(data)
        described = describe(trainer, module, data)
        told = about(trainer, module, data)
        logs = [Path(each.log_dir).resolve().parts for each in trainer.loggers if each.log_dir]
        own = self.run.path.resolve().parts
        beside = {parts[len(own)] for parts in logs if parts[: len(own)] == own != parts}
        self.run.open(fingerprint(described), described, told, beside)
        self.opened = True

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        """Take up what an earlier start has left."""
        if stage != "test":
            return
        check_data(trainer, self, "describe", "about", "first")
        if trainer.is_global_zero and not self.opened:
            self.open(trainer, pl_module, trainer.datamodule)
        trainer.strategy.barrier("the run directory is there")
        records = self.run.records()
        self.there = {(record["policy"], record["key"]) for record in records}
        self.failed = {(r["policy"], r["key"]) for r in records if r.get("failure")}
        pl_module.restore(records, self.store)
        beside = [each for each in trainer.callbacks if isinstance(each, RunCallback)]
        self.firsts = frozenset(trainer.datamodule.first())
        self.wanted = getattr(trainer.datamodule, "names_of", lambda _: pl_module.names)
        done = {
            key
            for key in {key for _, key in self.there}
            if all((name, key) in self.there for name in self.wanted(key))
        }
        for each in beside:
            done -= each.lacking(trainer, pl_module, done)
        trainer.datamodule.finished = done

    def teardown(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        """What comes next is another run, until it is compared with what is there."""
        self.opened = False
        if trainer.datamodule is not None:
            trainer.datamodule.finished = ()

    def on_exception(
        self, trainer: L.Trainer, pl_module: ClipModule, exception: BaseException
    ) -> None:
        """After an error or an interrupt too: there is no teardown then."""
        self.teardown(trainer, pl_module, "test")

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Clips whose latents or features are missing."""
        return {key for key in keys if self._lacks(module, key)}

    def _lacks(self, module: ClipModule, key: str) -> bool:
        names = self.wanted(key)
        whole = [name for name in names if (name, key) not in self.failed]
        if self.latents and not all(self._latents(name, key).is_file() for name in names):
            return True
        if not module.encoders:
            return False
        truth = module.reference_name in whole and self._truth_of(module, key)
        sets = [*whole, *([None] if truth else [])]
        return not all(self.store.has(name, key) for name in sets)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: ClipModule, outputs: Any, *_: Any
    ) -> None:
        """Write what was measured."""
        for clip in outputs["clips"]:
            if self.latents:
                self._keep(pl_module, clip)
            for name, found in self._features(pl_module, clip).items():
                if not self.store.has(name, clip.key):
                    self.store.write(name, clip.key, {k: x.numpy() for k, x in found.items()})
            if (clip.name, clip.key) not in self.there:  # else finished before
                self.run.append(trainer.global_rank, record_of(clip))

    def _features(self, module: ClipModule, clip: ClipResult) -> dict[str | None, Any]:
        """What is kept of a clip, by set; an empty file where an encoder could not judge it."""
        if clip.failure or not module.encoders:
            return {}
        shows_truth = clip.name == module.reference_name and self._truth_of(module, clip.key)
        real = {None: clip.real} if clip.real or shows_truth else {}
        return {clip.name: clip.measured.features, **real}

    def _truth_of(self, module: ClipModule, key: str) -> bool:
        """Whether this clip brings what its world really shows."""
        return key in self.firsts and module.shows_truth and not module.real

    def _keep(self, module: ClipModule, clip: ClipResult) -> None:
        """Latents of one clip, for a later ``lightning-kv decode``."""
        about = {
            "model": module.model_name,
            "policy": clip.name,
            "prompt": clip.prompt,
            "key": clip.key,
            "seed": str(module.settings.seed),
            "noise_revision": str(clip.extra["noise_revision"]),
            "precision": module.source.get("precision", "float32"),
        }
        write_latents(self._latents(clip.name, clip.key), clip.latents, module.settings.fps, about)

    def _latents(self, name: str, key: str) -> Path:
        return self.run.path / FOLDER / part_of_path(name) / f"{key}{SUFFIX}"

    def on_test_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Write the conclusions, once all ranks are done."""
        trainer.strategy.barrier("records are written")
        if trainer.is_global_zero and self.report and self.run.records():
            self.summary = conclude(self.run)


def record_of(clip: ClipResult) -> Record:
    """The record line of a clip, see :mod:`lightning_kv.runs.directory`."""
    measured = clip.measured
    return {
        "policy": clip.name,
        "key": clip.key,
        "unit": clip.unit,
        "sample": clip.sample,
        "prompt": clip.prompt,
        **clip.extra,
        "cost": clip.cost,
        "metrics": measured.values,
        "curves": {name: plain(curve) for name, curve in measured.curves.items()},
        "failure": clip.failure,
        "problems": measured.problems,
    }


def plain(curve: Tensor) -> list[float | None]:
    """A curve as JSON has it: null where there is no value."""
    return [None if value != value else value for value in curve.tolist()]
