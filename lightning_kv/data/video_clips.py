"""Sets of videos, in whatever form they come, and the clips that are cut from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_kv.data.pairs import pair_csv, videos_in
from lightning_kv.data.prompt_lists import read_captions
from lightning_kv.data.shards import INDEX
from lightning_kv.data.video_shards import VideoSample, videos_in_shards
from lightning_kv.data.videos import (
    SUFFIXES,
    VideoError,
    VideoFile,
    VideoInfo,
    probe,
    read,
)
from lightning_kv.utilities.files import checksum

BLOCK = 8  # frames that are decoded at a time


def find_videos(source: str | Path, column: str = "reference") -> tuple[VideoSample, ...]:
    """Find the videos of a set; of tars, nothing but heads and records is read.

    Args:
        source: A folder of shards (or their ``index.json``), a folder of videos (captions may lie
            beside them), or a table of pairs (``.csv``).
        column: Which videos of a table of pairs: `reference` or `candidate`.

    Returns:
        The videos in the order of the set.

    Raises:
        ValueError: There are none, shards have no index or another one, a key comes twice, or a
            sample has no video or more than one.
    """
    path = Path(source)
    if column not in ("reference", "candidate"):
        raise ValueError(
            f"A table of pairs has no such videos. Given {column!r}. Give 'reference' or "
            "'candidate'."
        )
    if path.suffix.lower() == ".csv":
        found = tuple(
            VideoSample(pair.key, video := getattr(pair, column), pair.prompt, _size(video))
            for pair in pair_csv(path).pairs
        )
    elif path.name == INDEX or (path / INDEX).is_file() or any(path.glob("*.tar")):
        found = videos_in_shards(path)
    else:
        videos = videos_in(path) if path.is_dir() else {}
        said = read_captions(videos)
        found = tuple(
            VideoSample(key, file, said[key] or "", _size(file)) for key, file in videos.items()
        )
    if not found:
        given = f"none of {', '.join(SUFFIXES)}" if path.is_dir() else "no folder and no table"
        raise ValueError(
            f"There are no videos in {path}. Given {given}. Give a folder of videos, of shards "
            "that lightning-kv shards make has written, or a table of pairs (.csv)."
        )
    return found


def _size(file: Path) -> int:
    return file.stat().st_size


class VideoClip(NamedTuple):
    """Consecutive frames of a video.

    Args:
        key: Name of the clip; that of its video where the whole is taken, else with ``@`` and the
            first frame.
        prompt: What the video shows; empty where nothing is said.
        fps: Frames per second.
        start: Number of the first frame.
        pixels: uint8 ``[T, 3, H, W]``, RGB.
    """

    # A named tuple, as PromptSample is.
    key: str
    prompt: str
    fps: float
    start: int
    pixels: Tensor


@dataclass(frozen=True)
class Cut:
    """How clips are cut from a video.

    Args:
        length: Frames per clip; None: every video is one clip.
        stride: Frames from one beginning to the next; None: clips follow each other. What is left
            at the end of a video and fills no clip is left out.
        size: Height and width (pixels) to resize to; None: as shown.

    Raises:
        ValueError: A number is not positive, or a stride has no length.

    Example:
        >>> Cut(length=16, stride=8).starts(40)
        range(0, 25, 8)
    """

    length: int | None = None
    stride: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given = (self.length, self.stride, *(self.size or ()))
        strides = self.stride and not self.length
        if strides or any(each is not None and each < 1 for each in given):
            raise ValueError(
                f"No clips can be cut so. Given length {self.length}, stride {self.stride} and "
                f"size {self.size}. Give numbers of 1 or more, and a stride only with a length."
            )

    def starts(self, frames: int) -> range:
        """First frames of the clips of a video of so many frames."""
        length = self.length or frames
        return range(0, frames - length + 1, self.stride or length)

    def key(self, video: str, start: int) -> str:
        """Name of a clip."""
        return video if self.length is None else f"{video}@{start}"


def keys_of(sample: VideoSample, cut: Cut) -> list[str]:
    """Keys of the clips of a video in their order; with a length it is walked through.

    Raises:
        VideoError: It cannot be read.
    """
    if cut.length is None:
        return [sample.key]
    return [cut.key(sample.key, start) for start in cut.starts(probe(sample.video).frames)]


def clips_of(
    sample: VideoSample, cut: Cut, finished: Collection[str] = frozenset()
) -> Iterator[VideoClip]:
    """Clips of a video in their order; no more than one clip and some frames are held.

    Args:
        sample: The video.
        cut: How it is cut.
        finished: Keys of clips to leave out. What lies behind the last that is wanted is not
            decoded.

    Raises:
        VideoError: It cannot be read, or is shorter than a clip.
    """
    if cut.length is None and sample.key in finished:
        return
    info = probe(sample.video)
    length = cut.length or info.frames
    starts = cut.starts(info.frames)
    if not starts:
        raise VideoError(
            f"{sample.video} is too short. Given {info.frames} frames for clips of {length}. Give "
            f"a length of {info.frames} at most, or take the video out of the set."
        )
    wanted = [start for start in starts if cut.key(sample.key, start) not in finished]
    frames, at = _frames(info, cut.size), 0  # number of the frame that is decoded next
    held: deque[Tensor] = deque()
    for start in wanted:
        while held and at - len(held) < start:
            held.popleft()
        at += sum(1 for _ in islice(frames, max(0, start - at)))
        held.extend(islice(frames, start + length - at))
        at = start + length
        key, pixels = cut.key(sample.key, start), torch.stack(list(held))
        yield VideoClip(key, sample.prompt, float(info.fps), start, pixels)


def described(samples: Iterable[VideoSample]) -> dict[str, Any]:
    """What videos are by content: checksums of shards and of files, and what is said of each."""
    samples = list(samples)
    shards = {sample.shard.file: sample.shard for sample in samples if sample.shard}
    return {
        "shards": {name: shard.sha256 for name, shard in shards.items()},
        "files": {sample.key: checksum(sample.video) for sample in samples if not sample.shard},
        "prompts": {sample.key: sample.prompt for sample in samples if sample.prompt},
    }


def first_frames(
    video: VideoFile | VideoInfo, frames: int, size: tuple[int, int] | None = None
) -> Tensor:
    """The beginning of a video, held as a whole; what lies behind it is not decoded.

    Args:
        video: The video, or what `probe` said about it.
        frames: How many frames; all where it has fewer.
        size: Height and width (pixels) to resize to; None: as shown.

    Returns:
        uint8 ``[T, 3, H, W]``, RGB.

    Raises:
        VideoError: It cannot be read.
    """
    info = video if isinstance(video, VideoInfo) else probe(video)
    return torch.stack(list(islice(_frames(info, size), frames)))


def _frames(info: VideoInfo, size: tuple[int, int] | None) -> Iterator[Tensor]:
    return (frame for block in read(info, BLOCK, size) for frame in block)
