"""A progress line for rollouts: prompts, chunks, time left, frames per second, cache size."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_kv.cache.session import CacheSession
from lightning_kv.runs.words import format_bytes


class RolloutProgress:
    """Shows how far one rank is. Silent where standard error is no terminal.

    Args:
        prompts: Prompts this rank has before it.
        chunks: Chunks per prompt, over all policies.
        chunk_frames: Latent frames per chunk.
        visible: Show anything at all (rank 0).
    """

    def __init__(self, prompts: int, chunks: int, chunk_frames: int, visible: bool) -> None:
        self.prompts, self.chunk_frames = prompts, chunk_frames
        self.prompt = 0
        self.label, self.began, self.frames = "", time.perf_counter(), 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("chunks"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            disable=not visible or not Console(stderr=True).is_terminal,
        )
        self.task = self.bar.add_task("starting", total=prompts * chunks, rate="")

    def __enter__(self) -> RolloutProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, policy: str, clips: int) -> None:
        """A rollout of ``clips`` prompts under a policy starts."""
        self.label, self.began, self.frames = policy, time.perf_counter(), 0
        self.clips = clips

    def chunk(self, _: int, session: CacheSession) -> None:
        """A chunk of the current rollout is done."""
        self.frames += self.chunk_frames * self.clips
        rate = self.frames / (time.perf_counter() - self.began)
        held = format_bytes(session.held_bytes(0))
        place = f"prompt {min(self.prompt + 1, self.prompts)}/{self.prompts} "
        place = place if self.prompts > 1 else ""
        self.bar.update(
            self.task,
            advance=self.clips,
            description=place + self.label,
            rate=f"{rate:.1f} frames/s  cache {held}",
        )

    def end(self, clips: int) -> None:
        """All policies of ``clips`` prompts are done."""
        self.prompt += clips


class FrameProgress:
    """Shows how many frames of video files are done, and the time left; silent as above.

    Args:
        frames: All that this rank has to read.
        visible: Show anything at all (rank 0).
    """

    def __init__(self, frames: int, visible: bool) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("frames"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not visible or not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=frames)

    def __enter__(self) -> FrameProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def count(self, name: str, frames: int) -> None:
        """So many frames of a video are done."""
        self.bar.update(self.task, description=name, advance=frames)
