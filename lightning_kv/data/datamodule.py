"""What a run is about, dealt out to ranks: prompts and their rollouts, or pairs of videos."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_kv.data.pairs import Alignment
from lightning_kv.data.shards import PromptSample, PromptShards, ShardIndex, read_index
from lightning_kv.data.video_pairs import Infos, PairedClip, Piece, Videos, pieces, shortest
from lightning_kv.data.videos import VideoError, VideoInfo, checksum, probe

__all__ = [
    "PromptDataModule",
    "PromptSample",
    "RolloutItem",
    "VideoPairDataModule",
    "dealt",
    "each_sample",
    "in_batches",
]

PIECE = 4  # frames of a video in hand: metrics make several float64 copies of them

Item = TypeVar("Item")


class RolloutItem(NamedTuple):
    """One rollout to do.

    Args:
        prompt: What the model is told, and the seed of its world.
        sample: Which noise of this prompt, from 0.
        policy: Name of the policy; empty where nobody has said which there are.
    """

    # A named tuple, as PromptSample is.
    prompt: PromptSample
    sample: int = 0
    policy: str = ""

    @property
    def key(self) -> str:
        """Name of prompt and noise in results; noise is keyed by it."""
        return self.prompt.key if self.sample == 0 else f"{self.prompt.key}-s{self.sample}"


class PromptDataModule(lightning.LightningDataModule):
    """Prompts from shards, and for each of them the rollouts that the module asks for.

    An item is one (prompt, sample, policy). The policies of a prompt and sample follow each other
    on one rank, the module's first name first; so what comes later can be compared with it. How
    many ranks there are changes no item.

    Args:
        shards: Folder with the tar files and their ``index.json``.
        prompts: How many prompts of the set to run, from its beginning; None for all.
        samples: Noises per prompt. Statistics count prompts: more samples make each surer.
        seed: Seed of the worlds that are drawn for the prompts.
        batch: Rollouts of one policy that are done together.

    Raises:
        ValueError: ``batch`` or ``samples`` is not positive.

    Attributes:
        finished: Keys of items to leave out, all policies of them; a callback that takes up a run
            fills it before the loop starts.
    """

    finished: Collection[str]

    def __init__(
        self,
        shards: str | Path,
        prompts: int | None = None,
        samples: int = 1,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        super().__init__()
        if batch < 1 or samples < 1:
            raise ValueError(
                f"A batch holds at least one rollout, and a prompt gets at least one: batch={batch}"
                f", samples={samples}. Use 1 or more."
            )
        self.shards = Path(shards)
        self.prompts, self.samples, self.seed, self.batch = prompts, samples, seed, batch
        self.finished = ()

    @cached_property
    def index(self) -> ShardIndex:
        """The set, checked against its files on first use."""
        return read_index(self.shards)

    @property
    def total(self) -> int:
        """Prompts of the run, finished ones included.

        Raises:
            ValueError: The shards cannot be used, or do not hold so many prompts.
        """
        held = self.index.samples
        if self.prompts is None:
            return held
        if not 1 <= self.prompts <= held:
            raise ValueError(
                "The run asks for a number of prompts that the set cannot give. "
                f"prompts={self.prompts} was given and {self.shards} holds {held}. "
                f"Use 1 to {held}, or leave prompts out for all of them."
            )
        return self.prompts

    def prompt_samples(self) -> list[PromptSample]:
        """All prompts of the run in their order, finished ones included."""
        return list(self._prompts())

    def prompt_texts(self) -> list[str]:
        """Texts of all prompts of the run in their order, finished ones included."""
        return [sample.prompt for sample in self._prompts()]

    def keys(self) -> list[str]:
        """Keys of all items of the run in their order, finished ones included.

        Raises:
            ValueError: As for `total`, or two prompts have one key.
        """
        prompts = [sample.key for sample in self._prompts()]
        if len(set(prompts)) < self.total:
            raise ValueError(
                "The prompts of the run have no distinct keys. "
                f"{self.shards} gives {len(set(prompts))} keys for {self.total} prompts. "
                f"Use another data seed than {self.seed}, or write the set again."
            )
        return [item.key for item in self._items()]

    def first(self, prompts: int | None = None) -> list[str]:
        """Keys of the first prompts, each with its first noise; of all where None."""
        return [item.key for item in self._items() if not item.sample][:prompts]

    def describe(self) -> dict[str, Any]:
        """Everything that decides which items there are."""
        return {
            "shards": [shard.sha256 for shard in self.index.shards],
            "seed": self.seed,
            "prompts": self.total,
            "batch": self.batch,
            **({"samples": self.samples} if self.samples > 1 else {}),
        }

    def about(self) -> dict[str, Any]:
        """What a report must know."""
        return {
            "prompts": self.total,
            "samples": self.samples,
            "data_seed": self.seed,
            "batch": self.batch,
        }

    def _prompts(self) -> PromptShards:
        return PromptShards(self.index, seed=self.seed, limit=self.total)

    def _items(self) -> Iterator[RolloutItem]:
        return each_sample(self._prompts(), self.samples)

    def setup(self, stage: str | None = None) -> None:
        """Check the set before the first prompt is run.

        Raises:
            ValueError: As for `keys`.
        """
        self.keys()

    def left(self) -> int:
        """Items that this rank has before it, each under every policy."""
        rank, world = _place(self.trainer)
        unfinished = (item for item in self._items() if item.key not in self.finished)
        return sum(1 for _ in dealt(unfinished, rank, world))

    def test_dataloader(self) -> DataLoader[list[RolloutItem]]:
        """Rollouts of this rank, as lists of up to ``batch`` items of one policy."""
        rollouts = _Rollouts(self, self._policies(), *_place(self.trainer))
        return DataLoader(rollouts, batch_size=None, num_workers=0)

    def _policies(self) -> Sequence[str]:
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, "names", None) or ("",)


class _Rollouts(IterableDataset):
    """Unfinished items of one rank, batch by batch, each batch under every policy in turn."""

    def __init__(
        self, data: PromptDataModule, policies: Sequence[str], rank: int, world: int
    ) -> None:
        self.data, self.policies, self.rank, self.world = data, policies, rank, world

    def __iter__(self) -> Iterator[list[RolloutItem]]:
        finished = frozenset(self.data.finished)
        unfinished = (item for item in self.data._items() if item.key not in finished)
        # Left out before dealing: who did the rest does not depend on the ranks of the run before.
        mine = dealt(unfinished, self.rank, self.world)
        yield from in_batches(mine, self.data.batch, self.policies)


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
        left = dealt(self._unfinished(), *_place(self.trainer))
        return sum(self._length(clip) for clip in left)

    def _length(self, clip: PairedClip) -> int:
        limit = shortest(clip, self.infos, self.alignment)
        own = [clip.reference, *clip.candidates.values()]
        infos = (self.infos.get(path) for path in own)
        return sum(limit or info.frames for info in infos if isinstance(info, VideoInfo))

    def _unfinished(self) -> Iterator[PairedClip]:
        finished = frozenset(self.finished)
        return (clip for clip in self.videos.clips if clip.key not in finished)

    def test_dataloader(self) -> DataLoader[Piece]:
        """Pieces of the videos of this rank."""
        return DataLoader(
            _Pieces(self, *_place(self.trainer)), batch_size=None, num_workers=self.workers
        )


class _Pieces(IterableDataset):
    def __init__(self, data: VideoPairDataModule, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __iter__(self) -> Iterator[Piece]:
        data = self.data
        for clip in dealt(data._unfinished(), self.rank, self.world):
            yield from pieces(clip, data.videos, data.infos, data.alignment, PIECE)


def each_sample(prompts: Iterable[PromptSample], samples: int) -> Iterator[RolloutItem]:
    """An item for every noise of every prompt, of no policy so far."""
    return (RolloutItem(prompt, sample) for prompt in prompts for sample in range(samples))


def in_batches(
    items: Iterable[RolloutItem], batch: int, policies: Sequence[str]
) -> Iterator[list[RolloutItem]]:
    """Items by up to ``batch``, all of them under one policy after the other."""
    left = iter(items)
    while together := list(islice(left, batch)):
        for policy in policies:
            yield [item._replace(policy=policy) for item in together]


def _probed(path: Path) -> VideoInfo | VideoError:
    """What a file holds, or why it cannot be read."""
    try:
        return probe(path)
    except VideoError as error:
        return error


def _place(trainer: Any) -> tuple[int, int]:
    """Rank and number of ranks: the trainer's, or a single process where there is none."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def dealt(source: Iterable[Item], rank: int, world: int) -> Iterator[Item]:
    """Every item to exactly one of all workers of all ranks, in turn.

    Args:
        source: The same items in the same order everywhere.
        rank: Number of this process; given, not looked up, because not every launcher sets the
            environment before the first item is read.
        world: Number of processes.

    >>> list(dealt("abcde", rank=1, world=2))
    ['b', 'd']
    """
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return islice(source, rank * workers + number, None, world * workers)
