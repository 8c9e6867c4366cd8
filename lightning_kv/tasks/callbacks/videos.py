"""Comparison videos: all policies of a prompt, or all files of a clip, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_kv.data.datamodule import PIECE, VideoPairDataModule
from lightning_kv.data.pairs import read_pair
from lightning_kv.data.video_pairs import PairedClip, alignable, shortest
from lightning_kv.runs.video import Frames
from lightning_kv.tasks.callbacks.base import FirstPromptsCallback
from lightning_kv.tasks.compare import CompareModule, floats
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.videos import Rows, fitted, has_comparison, write_comparison


class ComparisonVideos(FirstPromptsCallback):
    """Writes the videos of a prompt: all policies side by side, and their differences.

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
        """Clips whose video is missing."""
        shown = self.pictured(trainer, module)
        return {key for key in keys if key in shown and not has_comparison(self.run, key)}

    def shown(self, clip: ClipResult, index: int) -> Frames:
        """The frames, small enough to stand beside others."""
        return fitted(clip.pixels)

    def write(self, clip: ClipResult, shown: dict[str, Frames]) -> None:
        """Write both videos."""
        rows: Rows = [("truth", fitted(clip.truth))] if clip.truth is not None else []
        rows += list(shown.items())
        frames = len(rows[0][1])
        self.run.differences.mkdir(parents=True, exist_ok=True)  # there may be no RecordWriter
        write_comparison(self.run, clip.key, lambda: iter([rows]), frames, self.fps, self.reference)


class PairVideos(FirstPromptsCallback):
    """Writes videos of the first clips: all videos side by side, and their differences.

    Args:
        out: Run directory.
        prompts: How many clips get one; None for all.
    """

    def begin(self, trainer: L.Trainer, module: CompareModule) -> None:
        """Know which."""
        super().begin(trainer, module)
        self.data: VideoPairDataModule = trainer.datamodule
        self.clips = {clip.key: clip for clip in self.data.videos.clips}

    def lacking(self, trainer: L.Trainer, module: ClipModule, keys: Collection[str]) -> set[str]:
        """Clips whose video is missing and could be made."""
        data, shown = trainer.datamodule, self.pictured(trainer, module)
        return {
            clip.key
            for clip in data.videos.clips
            if clip.key in keys
            and clip.key in shown
            and not has_comparison(self.run, clip.key)
            and alignable(clip, data.infos, data.alignment)
        }

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: CompareModule, outputs: Any, *_: Any
    ) -> None:
        """Read the videos of a finished clip once more; what has failed is left out."""
        for result in outputs["clips"]:
            if result.failure:
                self.pending.setdefault(result.key, {})[result.name] = result.failure
            if result.last and result.key in self.keys and not has_comparison(self.run, result.key):
                failed = self.pending.pop(result.key, {})
                self._write(self.clips[result.key], pl_module.reference_name, failed)

    def _write(self, clip: PairedClip, base: str, failed: Mapping[str, str]) -> None:
        data = self.data
        reference = data.infos.get(clip.reference)
        able = {
            name: info
            for name, info in alignable(clip, data.infos, data.alignment).items()
            if name not in failed
        }
        if not able or base in failed:
            return
        limit = shortest(clip, data.infos, data.alignment) or reference.frames

        def rows() -> Any:
            streams = [read_pair(reference, info, data.alignment, PIECE) for info in able.values()]
            left = limit
            for pairs in zip(*streams, strict=False):
                shown = (pairs[0][0], *(judged for _, judged in pairs))
                frames = min(left, *map(len, shown))
                if not frames:
                    return
                yield panels([base, *able], shown, frames)
                left -= frames

        write_comparison(self.run, clip.key, rows, limit, float(reference.fps), base)


def panels(names: Sequence[str], shown: Sequence[Tensor], frames: int) -> Rows:
    """Some frames of several videos, small enough to stand side by side."""
    return [
        (name, fitted(floats(pixels[:frames]), 480))
        for name, pixels in zip(names, shown, strict=True)
    ]
