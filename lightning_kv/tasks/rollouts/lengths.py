"""Length and size of a video in latent frames, and prompts that come on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_kv.cache.decisions import Event
from lightning_kv.models.wan import WanConfig


@dataclass(frozen=True)
class FrameTimes:
    """Seconds and latent frames of one video.

    Args:
        config: Of the model: its chunk, and how many pixel frames a latent frame shows.
        fps: Pixel frames per second.
    """

    config: WanConfig
    fps: float

    def frames(self, seconds: float) -> int:
        """Latent frames that cover a length, in whole chunks."""
        wanted = self.config.frames_for(math.ceil(round(seconds * self.fps, 6)))
        return math.ceil(wanted / self.config.chunk) * self.config.chunk

    def seconds(self, frames: int) -> float:
        """Length of so many latent frames: when the next one would begin."""
        return self.config.pixel_frames(frames) / self.fps if frames else 0.0

    def chunk_at(self, moment: float) -> int:
        """First latent frame of the chunk that is shown at a moment."""
        shown = math.floor(round(moment * self.fps, 6))
        frame = self.config.frames_for(shown + 1) - 1
        return frame // self.config.chunk * self.config.chunk


@dataclass(frozen=True)
class PromptSwitch:
    """Another prompt on the way.

    Args:
        prompt: From here on.
        asked: Second that was asked for.
        frame: Latent frame where it comes: the first of the chunk that the second falls into.
    """

    prompt: str
    asked: float
    frame: int

    @property
    def event(self) -> Event:
        """What a rollout is told."""
        return Event("prompt_switch", self.frame, self.prompt)


def read_switch(text: str, check: Callable[[str], object]) -> tuple[str, float]:
    """Prompt and second of ``TEXT@SECONDS``.

    Args:
        text: As written.
        check: Raises ValueError where the model cannot read a prompt.

    Raises:
        ValueError: No time, or an unreadable prompt.
    """
    prompt, mark, when = (part.strip() for part in text.rpartition("@"))
    try:
        moment = float(when)
    except ValueError:
        moment = math.nan
    if not mark or not math.isfinite(moment):
        raise ValueError(
            f"--prompt {text!r} does not say when. It switches the prompt on the way and reads "
            "TEXT@SECONDS, such as 'night fast n13 left@3'."
        )
    check(prompt)
    return prompt, moment


def read_switches(
    texts: Sequence[str], frames: int, times: FrameTimes, check: Callable[[str], object]
) -> list[PromptSwitch]:
    """Prompt switches, each at the first frame of the chunk that its time falls into.

    Args:
        texts: ``TEXT@SECONDS``.
        frames: Latent frames of the video.
        times: Of the video.
        check: Raises ValueError where the model cannot read a prompt.

    Raises:
        ValueError: No time, an unreadable prompt, a time in the first chunk or beyond the end, or
            two in one chunk.
    """
    chunk = times.config.chunk
    length, first = times.seconds(frames), times.seconds(chunk)
    found: dict[int, PromptSwitch] = {}
    for text in texts:
        prompt, moment = read_switch(text, check)
        frame = times.chunk_at(moment)
        if not 0 < frame < frames:
            where = "beyond the end" if frame > 0 else "in the first chunk"
            raise ValueError(
                f"--prompt {text!r} switches {where}: the video is {length:g} s long and a switch "
                f"comes at the start of a later chunk. Give a time from {first:g} to below "
                f"{length:g} seconds, or a longer video."
            )
        if frame in found:
            raise ValueError(
                f"Two prompt switches in one chunk: {found[frame].prompt!r} and {prompt!r} would "
                f"both come at {times.seconds(frame):g} s. Put {first:g} s or more between them."
            )
        found[frame] = PromptSwitch(prompt, moment, frame)
    return [found[frame] for frame in sorted(found)]


def read_size(text: str | None, config: WanConfig) -> tuple[int, int]:
    """Latent height and width of ``HEIGHTxWIDTH`` in pixels; the model's own where not given.

    Raises:
        ValueError: No size, or one that makes no whole patches.
    """
    if text is None:
        return config.latent_size
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--size {text!r} is no size. Write HEIGHTxWIDTH in pixels, as 480x832.")
    return config.latent_of((int(height), int(width)))
