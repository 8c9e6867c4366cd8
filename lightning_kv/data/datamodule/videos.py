"""Videos, clip by clip: what a model is given, taught or compared with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import IterableDataset

from lightning_kv.data.datamodule.distribution import dealt_by_bytes, place
from lightning_kv.data.datamodule.loader import Loader
from lightning_kv.data.shards import Shard, check_shard
from lightning_kv.data.tars import Member
from lightning_kv.data.video_clips import (
    Cut,
    VideoClip,
    clips_of,
    described,
    find_videos,
    keys_of,
)
from lightning_kv.data.video_shards import VideoSample


class VideoDataModule(lightning.LightningDataModule):
    """Clips of videos from shards, from a folder or from a table of pairs.

    Whole shards go to ranks and their workers, balanced by bytes; a shard is compared with its
    checksum before its first clip is given. Of a video, one clip and some frames are in memory.
    How many ranks and workers there are changes no clip, and neither does the order of those that
    one of them gives.

    A batch is a :class:`VideoClip` of lists and stacked tensors, its pixels uint8
    ``[B, T, 3, H, W]``.

    Args:
        videos: Folder of shards, folder of videos, or table; see `find_videos`.
        length: Frames per clip; None: every video is one clip, held as a whole.
        stride: Frames from one beginning to the next; None: as many as ``length``.
        batch: Clips per batch; they must be of one size.
        workers: Processes that read ahead; 0 reads where it is asked.
        size: Height and width (pixels) to resize to; None: as they are.
        seed: Of the order of a training, which shuffles videos anew in every pass.
        column: Which videos of a table of pairs.

    Attributes:
        finished: Keys of clips to leave out; a callback that takes up a run fills it before the
            loop starts. A training leaves nothing out.

    Raises:
        ValueError: A number is not positive.
    """

    finished: Collection[str]

    def __init__(
        self,
        videos: str | Path,
        length: int | None = None,
        stride: int | None = None,
        batch: int = 1,
        workers: int = 0,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        column: str = "reference",
    ) -> None:
        super().__init__()
        if batch < 1 or workers < 0:
            raise ValueError(
                f"A batch holds at least one clip. Given batch {batch} and {workers} workers. Use "
                "a batch of 1 or more and 0 workers or more."
            )
        self.videos, self.column = Path(videos), column
        self.cut = Cut(length, stride, None if size is None else tuple(size))
        self.batch, self.workers, self.seed = batch, workers, seed
        self.finished = ()

    @cached_property
    def samples(self) -> tuple[VideoSample, ...]:
        """All videos of the set, found on first use."""
        return find_videos(self.videos, self.column)

    def keys(self) -> list[str]:
        """Keys of all clips in the order of the set, finished ones included.

        Where there is a length, every video is walked through for its number of frames.

        Raises:
            VideoError: One of them cannot be read.
        """
        return [key for sample in self.samples for key in keys_of(sample, self.cut)]

    def prompt_texts(self) -> list[str]:
        """What is said about the videos, in their order; empty where nothing is."""
        return [sample.prompt for sample in self.samples]

    def describe(self) -> dict[str, Any]:
        """Everything that decides which clips there are."""
        return {
            **described(self.samples),
            "length": self.cut.length,
            "stride": self.cut.stride,
            "size": self.cut.size,
        }

    def setup(self, stage: str | None = None) -> None:
        """Find the videos before the first is read.

        Raises:
            ValueError: They cannot be used, or a training would leave a worker without any.
        """
        found, hands = len(self.samples), place(self.trainer)[1] * max(1, self.workers)
        if stage == "fit" and found < hands:
            raise ValueError(
                f"There are fewer videos than processes that read them. Given {found} videos for "
                f"{hands} workers of all ranks. Use fewer ranks or workers."
            )

    def train_dataloader(self) -> Loader[VideoClip]:
        """Batches without an end, pass after pass in an order of its own.

        Ranks hold different numbers of clips; so none of them ends before the others. Give the
        Trainer ``max_steps`` or ``limit_train_batches``.

        Raises:
            ValueError: The Trainer has no such limit.
        """
        trainer = self.trainer
        if trainer and trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
            raise ValueError(
                "A training on a stream of videos has no end. Given max_steps -1 and "
                f"limit_train_batches {trainer.limit_train_batches}. Give the Trainer max_steps, "
                "or a number of batches as limit_train_batches."
            )
        return self._loader(endless=True)

    def val_dataloader(self) -> Loader[VideoClip]:
        """Every unfinished clip of this rank once."""
        return self._loader()

    def test_dataloader(self) -> Loader[VideoClip]:
        """Every unfinished clip of this rank once."""
        return self._loader()

    def predict_dataloader(self) -> Loader[VideoClip]:
        """Every unfinished clip of this rank once."""
        return self._loader()

    def _loader(self, endless: bool = False) -> Loader[VideoClip]:
        clips = _Clips(self, *place(self.trainer), endless)
        return Loader(clips, batch_size=self.batch, num_workers=self.workers, collate_fn=_together)


class _Clips(IterableDataset):
    """Clips of one rank: once, or shuffled again and again."""

    def __init__(self, data: VideoDataModule, rank: int, world: int, endless: bool) -> None:
        self.samples, self.cut, self.seed = data.samples, data.cut, data.seed
        self.finished = frozenset() if endless else frozenset(data.finished)
        self.rank, self.world, self.endless = rank, world, endless

    def __iter__(self) -> Iterator[VideoClip]:
        mine = dealt_by_bytes(self.samples, self.rank, self.world)
        checked: set[Shard] = set()
        for turn in count() if self.endless and mine else range(1):
            if self.endless:
                random.Random(f"{self.seed}/{self.rank}/{turn}").shuffle(mine)
            for sample in mine:
                if isinstance(sample.video, Member) and sample.shard not in checked:
                    check_shard(sample.shard, sample.video.tar)
                    checked.add(sample.shard)
                yield from clips_of(sample, self.cut, self.finished)


def _together(clips: list[VideoClip]) -> VideoClip:
    """Clips as one: names in lists, numbers and pixels stacked."""
    shapes = {clip.key: tuple(clip.pixels.shape) for clip in clips}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"Clips of a batch have different shapes. Given {shapes}. Give a size and a length, or "
            "a batch of 1."
        )
    keys, prompts, rates, starts, pixels = zip(*clips, strict=True)
    return VideoClip(
        list(keys), list(prompts), torch.tensor(rates), torch.tensor(starts), torch.stack(pixels)
    )
