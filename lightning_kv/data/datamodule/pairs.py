"""Pairs of videos, piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import lightning
from torch.utils.data import IterableDataset

from lightning_kv.data.datamodule.distribution import dealt, place
from lightning_kv.data.datamodule.loader import Loader
from lightning_kv.data.pairs import Alignment
from lightning_kv.data.video_pairs import Infos, PairedClip, Piece, Videos, pieces, shortest
from lightning_kv.data.videos import VideoError, VideoFile, VideoInfo, probe
from lightning_kv.utilities.files import checksum

PIECE = 4  # frames of a video in hand: metrics make several float64 copies of them


class VideoPairDataModule(lightning.LightningDataModule):
    """Videos that somebody made, each beside the one that it is compared with, piece by piece.

    All videos of a clip come on one rank and from one worker, the reference first. See
    :class:`~lightning_kv.data.video_pairs.Piece`.

    Args:
        videos: Which; see :mod:`lightning_kv.data.video_pairs`.
        alignment: What is done where two videos differ; None: they must be alike.
        workers: Processes that read ahead; 0 reads where it is measured.

    Attributes:
        finished: Keys of clips to leave out.
        infos: What every file holds, or why it cannot be read.
    """

    finished: Collection[str]

    def __init__(
        self, videos: Videos, alignment: Alignment | None = None, workers: int = 0
    ) -> None:
        super().__init__()
        self.videos, self.alignment, self.workers = videos, alignment or Alignment(), workers
        self.finished = ()
        self.infos: Infos = {path: _probed(path) for path in videos.paths}

    def names_of(self, key: str) -> list[str]:
        """Names that have a video of a clip."""
        return [name for name, own in self.videos.files.items() if key in own]

    def check_readable(self, strict: bool = False) -> None:
        """Refuse a comparison of nothing, and where ``strict`` one with a video that has no header.

        Raises:
            ValueError: It is one.
        """
        broken = [info for info in self.infos.values() if isinstance(info, VideoError)]
        if broken and strict:
            raise broken[0]
        if len(broken) == len(self.infos):
            raise ValueError(f"None of {len(broken)} videos can be read. The first: {broken[0]}")

    def first(self, clips: int | None = None) -> list[str]:
        """Keys of the first clips; of all where None."""
        return sorted({clip.key for clip in self.videos.clips})[:clips]

    def describe(self) -> dict[str, Any]:
        """Everything that decides what is compared; of what cannot be read there is no checksum."""
        files = self.videos.files.items()
        able = {path for path, info in self.infos.items() if isinstance(info, VideoInfo)}
        return {
            "files": {
                name: {key: checksum(path) if path in able else None for key, path in own.items()}
                for name, own in files
            },
            "prompts": {clip.key: clip.prompt for clip in self.videos.clips if clip.prompt},
            "alignment": self.alignment.recipe,
        }

    def about(self) -> dict[str, Any]:
        """What a report must know."""
        known = [info for info in self.infos.values() if isinstance(info, VideoInfo)]
        return {
            "prompts": len({clip.unit for clip in self.videos.clips}),
            "frames": max(info.frames for info in known),
            "rate": min(float(info.fps) for info in known),
            "size": " ".join(sorted({f"{info.height}x{info.width}" for info in known})),
            "source": " ".join(sorted({info.source for info in known})),
        }

    def frames_left(self) -> int:
        """Frames that this rank has to read, references included."""
        left = dealt(self._unfinished(), *place(self.trainer))
        return sum(self._length(clip) for clip in left)

    def _length(self, clip: PairedClip) -> int:
        limit = shortest(clip, self.infos, self.alignment)
        own = [clip.reference, *clip.candidates.values()]
        infos = (self.infos.get(path) for path in own)
        return sum(limit or info.frames for info in infos if isinstance(info, VideoInfo))

    def _unfinished(self) -> Iterator[PairedClip]:
        finished = frozenset(self.finished)
        return (clip for clip in self.videos.clips if clip.key not in finished)

    def test_dataloader(self) -> Loader[Piece]:
        """Pieces of the videos of this rank."""
        return Loader(
            _Pieces(self, *place(self.trainer)), batch_size=None, num_workers=self.workers
        )

    def val_dataloader(self) -> Loader[Piece]:
        """The same, for a training that looks at them in between."""
        return self.test_dataloader()

    def predict_dataloader(self) -> Loader[Piece]:
        """The same, for a module that records nothing."""
        return self.test_dataloader()


class _Pieces(IterableDataset):
    def __init__(self, data: VideoPairDataModule, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __iter__(self) -> Iterator[Piece]:
        data = self.data
        for clip in dealt(data._unfinished(), self.rank, self.world):
            yield from pieces(clip, data.videos, data.infos, data.alignment, PIECE)


def _probed(path: VideoFile) -> VideoInfo | VideoError:
    """What a file holds, or why it cannot be read."""
    try:
        return probe(path)
    except VideoError as error:
        return error
