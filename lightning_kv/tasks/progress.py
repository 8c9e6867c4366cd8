"""Progress lines: how much is done, the time left, and what is going on."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_kv.cache.session import CacheSession
from lightning_kv.utilities.formatting import format_bytes


class ProgressLine:
    """One line with a bar and the time left; silent where standard error is no terminal.

    Args:
        total: What is to be done, in units.
        unit: Its name, such as ``frames``.
        label: What is going on at first.
        done: What was done before.
        visible: Show anything at all (rank 0).
    """

    def __init__(
        self, total: int, unit: str, label: str = "starting", done: int = 0, visible: bool = True
    ) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not visible or not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> ProgressLine:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, count: float, label: str | None = None, note: str = "") -> None:
        """So many more units are done; what is going on, and a remark behind the bar."""
        self.bar.update(self.task, advance=count, description=label, note=note)

    def at(self, done: float, note: str = "") -> None:
        """So many units are done by now."""
        self.bar.update(self.task, completed=done, note=note)


class RolloutProgress(ProgressLine):
    """Chunks of rollouts, with frames per second and the size of the cache of this rank.

    Args:
        prompts: Prompts this rank has before it.
        chunks: Chunks per prompt, over all policies.
        chunk_frames: Latent frames per chunk.
        visible: Show anything at all (rank 0).
    """

    def __init__(self, prompts: int, chunks: int, chunk_frames: int, visible: bool) -> None:
        super().__init__(prompts * chunks, "chunks", visible=visible)
        self.prompts, self.chunk_frames = prompts, chunk_frames
        self.prompt = 0
        self.label, self.began, self.frames = "", time.perf_counter(), 0

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
        self.advance(self.clips, place + self.label, f"{rate:.1f} frames/s  cache {held}")

    def end(self, clips: int) -> None:
        """All policies of ``clips`` prompts are done."""
        self.prompt += clips
