"""What happens beside the measuring: records, moving pictures, traces and progress.

All of them hang on the ordinary batch hooks, and read ``outputs["clips"]`` of the step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_kv.cache.trace import Trace
from lightning_kv.runs.directory import RunDirectory, fingerprint
from lightning_kv.runs.features import FeatureStore, part_of_path
from lightning_kv.runs.traces import write_traces
from lightning_kv.runs.video import Frames
from lightning_kv.tasks.checks import check_data
from lightning_kv.tasks.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.clips import SUFFIX, write_clip
from lightning_kv.tasks.decode import FOLDER
from lightning_kv.tasks.film import Rows, film, filmed
from lightning_kv.tasks.overview import conclude
from lightning_kv.tasks.progress import RolloutProgress
from lightning_kv.tasks.progress_bars import LineProgressBar
from lightning_kv.tasks.results import about, describe, fitted, record_of


class RunCallback(L.Callback):
    """Writes something about some clips of a run into its directory.

    Args:
        out: Run directory.
    """

    def __init__(self, out: str | Path) -> None:
        self.run = RunDirectory(out)

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Of some clips, those of which something is still to be written."""
        return set()


class RecordWriter(RunCallback):
    """Writes a run directory: a record per clip, features, and at the end summary and report.

    A run that was cut off goes on: what is finished is left out, and the module's metrics start
    from the records. The directory refuses another run.

    Args:
        out: Run directory.
        latents: Keep the latents of every clip too, for ``lightning-kv decode``.
        report: Write ``summary.json`` and the report at the end.
    """

    def __init__(self, out: str | Path, latents: bool = False, report: bool = True) -> None:
        super().__init__(out)
        self.latents, self.report = latents, report
        self.store = FeatureStore(self.run.features)
        self.opened, self.summary = False, {}

    def open(self, trainer: L.Trainer, module: ClipModule, data: Any) -> None:
        """Make the directory, or check that it holds this very run; for one rank.

        Raises:
            ValueError: It holds something else.
        """
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
        write_clip(self._latents(clip.name, clip.key), clip.latents, module.settings.fps, about)

    def _latents(self, name: str, key: str) -> Path:
        return self.run.path / FOLDER / part_of_path(name) / f"{key}{SUFFIX}"

    def on_test_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Write the conclusions, once all ranks are done."""
        trainer.strategy.barrier("records are written")
        if trainer.is_global_zero and self.report and self.run.records():
            self.summary = conclude(self.run)


class PicturedCallback(RunCallback):
    """Writes something about the first prompts of a run, their first noise.

    Args:
        out: Run directory.
        prompts: How many; None for all.
    """

    def __init__(self, out: str | Path, prompts: int | None = None) -> None:
        super().__init__(out)
        if prompts is not None and prompts < 0:
            raise ValueError(
                f"--videos {prompts} is no number of prompts. Use 0 for none, or leave it out for "
                "all."
            )
        self.prompts = prompts
        self.keys: Collection[str] = ()
        self.pending: dict[str, dict[str, Any]] = {}

    def pictured(self, trainer: L.Trainer, module: ClipModule) -> Collection[str]:
        """Keys of the clips that something is written about."""
        return frozenset(trainer.datamodule.first(self.prompts))

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        """Know which clips, once the directory is no other run's.

        Raises:
            ValueError: It is.
        """
        if stage != "test":
            return
        check_data(trainer, self, "describe", "first")
        if trainer.is_global_zero and self._holds_run() and not self._recorded(trainer):
            described = describe(trainer, pl_module, trainer.datamodule)
            self.run.open(fingerprint(described), described)
        self.begin(trainer, pl_module)

    def _holds_run(self) -> bool:
        """Whether there is something that could be another run."""
        path = self.run.path
        return (path / "run.json").exists() or (path.exists() and not path.is_dir())

    def _recorded(self, trainer: L.Trainer) -> bool:
        """Whether a writer of records looks after the directory."""
        writers = [each for each in trainer.callbacks if isinstance(each, RecordWriter)]
        return self.run.path.resolve() in {each.run.path.resolve() for each in writers}

    def begin(self, trainer: L.Trainer, module: ClipModule) -> None:
        """Know which clips."""
        self.keys = self.pictured(trainer, module)
        self.pending.clear()

    def take(self, clips: Iterable[ClipResult]) -> None:
        """Keep what is shown of clips, and write it with the last of their prompt."""
        for index, clip in enumerate(clips):
            if clip.key in self.keys:
                self.pending.setdefault(clip.key, {})[clip.name] = self.shown(clip, index)
                if clip.last:
                    self.write(clip, self.pending.pop(clip.key))

    def shown(self, clip: ClipResult, index: int) -> Any:
        """What is kept of a clip, the one at this place of its batch."""
        raise NotImplementedError

    def write(self, clip: ClipResult, shown: dict[str, Any]) -> None:
        """Write what is shown of all names."""
        raise NotImplementedError

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: ClipModule, outputs: Any, *_: Any
    ) -> None:
        """Take in what was made."""
        self.take(outputs["clips"])


class ComparisonVideos(PicturedCallback):
    """Writes the moving pictures of a prompt: all policies side by side, and their differences.

    Args:
        out: Run directory.
        prompts: How many prompts get one; None for all.
    """

    reference, fps = "", 8.0

    def pictured(self, trainer: L.Trainer, module: ClipModule) -> Collection[str]:
        """As of all; none where no pixels are made."""
        return super().pictured(trainer, module) if module.settings.decode else ()

    def begin(self, trainer: L.Trainer, module: ClipModule) -> None:
        """Know which clips, and what they are compared with."""
        super().begin(trainer, module)
        self.reference, self.fps = module.reference_name, module.settings.fps

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Clips whose moving picture is missing."""
        shown = self.pictured(trainer, module)
        return {key for key in keys if key in shown and not filmed(self.run, key)}

    def shown(self, clip: ClipResult, index: int) -> Frames:
        """The frames, small enough to stand beside others."""
        return fitted(clip.pixels)

    def write(self, clip: ClipResult, shown: dict[str, Frames]) -> None:
        """Write both moving pictures."""
        rows: Rows = [("world", fitted(clip.truth))] if clip.truth is not None else []
        rows += list(shown.items())
        frames = len(rows[0][1])
        self.run.differences.mkdir(parents=True, exist_ok=True)  # there may be no RecordWriter
        film(self.run, clip.key, lambda: iter([rows]), frames, self.fps, self.reference)


class TraceWriter(PicturedCallback):
    """Writes which past frames every policy kept and read, one file per prompt.

    Args:
        out: Run directory.
        prompts: How many prompts get one; None for all.
    """

    trace: Trace | None = None

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Clips whose trace is missing."""
        shown = self.pictured(trainer, module)
        return {key for key in keys if key in shown and not self._file(key).is_file()}

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: ClipModule, batch: list[Any], *_: Any
    ) -> None:
        """Watch the rollout that comes, where its clips are shown."""
        self.trace = Trace() if any(item.key in self.keys for item in batch) else None
        if self.trace is not None:
            pl_module.watching.append(self.trace)

    def on_exception(
        self, trainer: L.Trainer, pl_module: ClipModule, exception: BaseException
    ) -> None:
        """Watch no longer."""
        if self.trace in getattr(pl_module, "watching", ()):
            pl_module.watching.remove(self.trace)

    def shown(self, clip: ClipResult, index: int) -> dict[str, np.ndarray]:
        """Arrays of one clip."""
        return self.trace.arrays(index)

    def write(self, clip: ClipResult, shown: dict[str, dict[str, np.ndarray]]) -> None:
        """Write the traces of all policies."""
        self.run.traces.mkdir(parents=True, exist_ok=True)  # there may be no RecordWriter
        write_traces(self._file(clip.key), shown)

    def _file(self, key: str) -> Path:
        return self.run.traces / f"{key}.npz"


class RolloutProgressBar(LineProgressBar):
    """A line with prompts, chunks, time left, frames per second and the size of the cache.

    Silent where standard error is no terminal.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Begin the line."""
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
