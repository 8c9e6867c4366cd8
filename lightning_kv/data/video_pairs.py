"""The videos of a comparison, clip by clip, and their frames in step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kv.data.pairs import Alignment, Pairs, read_pair, videos_of
from lightning_kv.data.videos import SUFFIXES, VideoError, VideoFile, VideoInfo, read

Infos = Mapping[VideoFile, "VideoInfo | VideoError"]
"""What every file holds, or why it cannot be read."""


@dataclass(frozen=True)
class PairedClip:
    """Videos that are compared with each other.

    Args:
        key: Their name in results.
        prompt: The text that they were made from; empty where unknown.
        reference: The video that is right; None where sets alone are compared.
        candidates: The videos that are judged, by candidate.
    """

    key: str
    prompt: str
    reference: VideoFile | None
    candidates: Mapping[str, VideoFile]

    @property
    def unit(self) -> str:
        """What statistics count: clips of one prompt are samples of it."""
        return self.prompt or self.key


@dataclass(frozen=True)
class Videos:
    """All videos of a comparison.

    Args:
        reference: Name of the reference.
        candidates: Names of the candidates.
        clips: Ordered by key.
        notes: What has no partner, in sentences.
        places: Folder or table that the videos of a name come from.
    """

    reference: str
    candidates: tuple[str, ...]
    clips: tuple[PairedClip, ...]
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The reference, then the candidates."""
        return [self.reference, *self.candidates]

    @property
    def files(self) -> dict[str, dict[str, VideoFile]]:
        """Paths by name and key."""
        found: dict[str, dict[str, VideoFile]] = {self.reference: {}}
        for clip in self.clips:
            if clip.reference is not None:
                found[self.reference][clip.key] = clip.reference
            for name, path in clip.candidates.items():
                found.setdefault(name, {})[clip.key] = path
        return found

    @property
    def paths(self) -> list[VideoFile]:
        """Every file once."""
        return list(dict.fromkeys(path for own in self.files.values() for path in own.values()))


def joined(reference: str, pairs: Mapping[str, Pairs]) -> Videos:
    """Pairs of several candidates, by key."""
    keys = sorted({pair.key for each in pairs.values() for pair in each.pairs})
    by_key = {name: {pair.key: pair for pair in each.pairs} for name, each in pairs.items()}
    clips = []
    for key in keys:
        found = {name: own[key] for name, own in by_key.items() if key in own}
        first = next(iter(found.values()))
        paths = {name: pair.candidate for name, pair in found.items()}
        clips.append(PairedClip(key, first.prompt, first.reference, paths))
    notes = [
        f"{len(alone)} videos of {whose} have no partner in {other} and are left out: "
        f"{', '.join(alone[:3])}{' ...' if len(alone) > 3 else ''}."
        for name, each in pairs.items()
        for alone, whose, other in (
            (each.reference_alone, reference, name),
            (each.candidate_alone, name, reference),
        )
        if alone
    ]
    return Videos(reference, tuple(pairs), tuple(clips), tuple(notes))


def apart(names: Sequence[str], folders: Sequence[Path]) -> Videos:
    """Folders without pairs: every video for itself, under a key that names its folder.

    Raises:
        ValueError: A folder has no videos.
    """
    clips = []
    for name, folder in zip(names, folders, strict=True):
        found = videos_of(folder)
        if not found:
            raise ValueError(
                f"There are no videos in {folder}. Give a folder of {', '.join(SUFFIXES)} files, "
                "or of shards."
            )
        for key, path in sorted(found.items()):
            own = {} if name == names[0] else {name: path}
            first = path if name == names[0] else None
            clips.append(PairedClip(f"{name}/{key}", "", first, own))
    return Videos(names[0], tuple(names[1:]), tuple(clips))


def alignable(clip: PairedClip, infos: Infos, alignment: Alignment) -> dict[str, VideoInfo]:
    """Candidates of a clip that can be compared with its reference, by name."""
    reference = infos.get(clip.reference)
    found: dict[str, VideoInfo] = {}
    for name, path in clip.candidates.items():
        info = infos[path]
        if not (isinstance(reference, VideoInfo) and isinstance(info, VideoInfo)):
            continue
        try:
            alignment.check(reference, info)
        except VideoError:  # its record says so
            continue
        found[name] = info
    return found


def shortest(clip: PairedClip, infos: Infos, alignment: Alignment) -> int | None:
    """Frames that all videos of a clip are cut to; None where each is taken whole.

    The reference is cut with its candidates, and all of them alike: differences and sets would
    compare other stretches of time otherwise.
    """
    able = alignable(clip, infos, alignment)
    if alignment.length != "shortest" or not able:
        return None
    return min(info.frames for info in (infos[clip.reference], *able.values()))


class Piece(NamedTuple):
    """Some consecutive frames of a video, and those of the video that it is compared with.

    Args:
        name: Of the folder, or candidate, that the video belongs to.
        key: Of the clip.
        unit: What statistics count.
        prompt: The text that the video was made from; empty where unknown.
        fps: Frames per second.
        pixels: uint8 ``[f, 3, H, W]``; no frames where there is a failure.
        target: The same of the reference; None where there is none, or this is it.
        ends: Whether the video ends with it.
        last: Whether it is of the last video of its clip.
        failure: Why the video cannot be read, or compared; None where it can.
    """

    name: str
    key: str
    unit: str
    prompt: str
    fps: float
    pixels: Tensor
    target: Tensor | None = None
    ends: bool = False
    last: bool = False
    failure: str | None = None


NO_FRAMES = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)


def pieces(
    clip: PairedClip, videos: Videos, infos: Infos, alignment: Alignment, frames: int
) -> Iterator[Piece]:
    """All videos of a clip, the reference alone and the candidates beside it, piece by piece.

    A few frames are held at a time, whatever the length. A video that cannot be read ends with a
    piece that says why.

    Args:
        clip: The clip.
        videos: The comparison that it is of.
        infos: What the files hold.
        alignment: What is done where two videos differ.
        frames: Of a piece, at most.
    """
    own = {videos.reference: clip.reference} if clip.reference else {}
    own |= clip.candidates
    limit = shortest(clip, infos, alignment)
    for place, (name, path) in enumerate(own.items()):
        compared = clip.reference if name != videos.reference else None
        head = (name, clip.key, clip.unit, clip.prompt)
        info, last, waiting = infos[path], place == len(own) - 1, None
        rate = float(info.fps) if isinstance(info, VideoInfo) else 1.0
        try:
            for pixels, target in _cut(_frames(info, compared, infos, alignment, frames), limit):
                if waiting is not None:
                    yield waiting
                waiting = Piece(*head, rate, pixels, target, last=last)
        except VideoError as error:
            yield Piece(*head, rate, NO_FRAMES, None, True, last, str(error))
            continue
        yield waiting._replace(ends=True)


def _frames(
    info: VideoInfo | VideoError,
    reference: VideoFile | None,
    infos: Infos,
    alignment: Alignment,
    frames: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Frames of a video and of its reference."""
    against = None if reference is None else infos[reference]
    for each in (info, against):
        if isinstance(each, VideoError):
            raise each
    if against is None:
        yield from ((block, None) for block in read(info, frames))
        return
    for right, judged in read_pair(against, info, alignment, frames):
        yield judged, right


def _cut(
    blocks: Iterable[tuple[Tensor, Tensor | None]], limit: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """As many frames as both have each time, up to a limit."""
    left = sys.maxsize if limit is None else limit
    for pixels, target in blocks:
        frames = min(left, len(pixels), len(pixels if target is None else target))
        if not frames:
            return
        yield pixels[:frames], None if target is None else target[:frames]
        left -= frames
