"""Traces: which past frames every policy kept and read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_kv.cache.trace import Trace
from lightning_kv.runs.traces import write_traces
from lightning_kv.tasks.callbacks.base import FirstPromptsCallback
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult


class TraceWriter(FirstPromptsCallback):
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
