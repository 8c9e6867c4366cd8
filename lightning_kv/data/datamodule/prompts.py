"""Prompts, and the rollouts that a run does of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lightning
from torch.utils.data import DataLoader, IterableDataset

from lightning_kv.data.context_videos import context_prompts, context_videos_of
from lightning_kv.data.datamodule.distribution import dealt, place
from lightning_kv.data.shards import PromptSample, PromptShards, ShardIndex, read_index
from lightning_kv.data.video_clips import described
from lightning_kv.data.video_shards import VideoSample
from lightning_kv.data.videos import VideoInfo, probe


class RolloutItem(NamedTuple):
    """One rollout to do.

    Args:
        prompt: What the model is told, the seed of its world, and the video it goes on from.
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
    """Prompts, and for each of them the rollouts that the module asks for.

    Prompts come from shards, or from the captions of videos that rollouts go on from: a video is
    one prompt then, and the module reads its first frames. It is one or the other, never both: in
    a set of prompts keys are mostly numbers, and joined by them a video would get any prompt.

    An item is one (prompt, sample, policy). The policies of a prompt and sample follow each other
    on one rank, the module's first name first; so what comes later can be compared with it. How
    many ranks there are changes no item.

    Args:
        shards: Folder with the tar files and their ``index.json``.
        prompts: How many prompts of the set to run, from its beginning; None for all.
        samples: Noises per prompt. Statistics count prompts: more samples make each surer.
        seed: Seed of the worlds that are drawn for the prompts.
        batch: Rollouts of one policy that are done together.
        context_videos: Videos with captions, as `find_videos` takes them, instead of shards.

    Raises:
        ValueError: ``batch`` or ``samples`` is not positive; shards and videos are given, or
            neither.

    Attributes:
        finished: Keys of items to leave out, all policies of them; a callback that takes up a run
            fills it before the loop starts.
        longest: Keys of items that take longer than others: they are dealt out first, so that no
            rank gets them all.
    """

    finished: Collection[str]
    longest: Collection[str] = ()

    def __init__(
        self,
        shards: str | Path | None = None,
        prompts: int | None = None,
        samples: int = 1,
        seed: int = 0,
        batch: int = 1,
        context_videos: str | Path | None = None,
    ) -> None:
        super().__init__()
        if (shards is None) == (context_videos is None):
            drop = "" if shards is None else "; --data.shards null drops those of a settings file"
            raise ValueError(
                "Prompts come from shards, or from the captions of context videos. Given shards "
                f"{shards} and context videos {context_videos}. Give one of them{drop}."
            )
        if batch < 1 or samples < 1:
            raise ValueError(
                f"A batch holds at least one rollout, and a prompt gets at least one: batch={batch}"
                f", samples={samples}. Use 1 or more."
            )
        self.shards = None if shards is None else Path(shards)
        self.context_videos = None if context_videos is None else Path(context_videos)
        self.prompts, self.samples, self.seed, self.batch = prompts, samples, seed, batch
        self.finished = ()

    @property
    def source(self) -> Path:
        """Where the prompts come from."""
        return self.context_videos if self.shards is None else self.shards

    @cached_property
    def index(self) -> ShardIndex:
        """The set, checked against its files on first use."""
        return read_index(self.shards)

    @cached_property
    def videos(self) -> tuple[VideoSample, ...]:
        """The context videos of the set, found and checked on first use; none with shards."""
        return () if self.context_videos is None else context_videos_of(self.context_videos)

    @cached_property
    def video_infos(self) -> Mapping[str, VideoInfo]:
        """What the context videos of the run hold, by key; none with shards.

        Raises:
            VideoError: One of them cannot be read.
        """
        if self.context_videos is None:  # a subclass may have no set to look into
            return {}
        return {sample.key: probe(sample.video) for sample in self.videos[: self.total]}

    @property
    def total(self) -> int:
        """Prompts of the run, finished ones included.

        Raises:
            ValueError: The shards cannot be used, or do not hold so many prompts.
        """
        held = len(self.videos) if self.shards is None else self.index.samples
        if self.prompts is None:
            return held
        if not 1 <= self.prompts <= held:
            raise ValueError(
                "The run asks for a number of prompts that the set cannot give. "
                f"prompts={self.prompts} was given and {self.source} holds {held}. "
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
            ValueError: As for `total`, or two prompts or items have one key.
        """
        prompts = [sample.key for sample in self._prompts()]
        if len(set(prompts)) < self.total:
            raise ValueError(
                "The prompts of the run have no distinct keys. "
                f"{self.source} gives {len(set(prompts))} keys for {self.total} prompts. "
                f"Use another data seed than {self.seed}, or write the set again."
            )
        return distinct(self._items(), self.source)

    def items(self) -> list[RolloutItem]:
        """All items of the run in their order, finished ones included, of no policy."""
        return list(self._items())

    def first(self, prompts: int | None = None) -> list[str]:
        """Keys of the first prompts, each with its first noise; of all where None."""
        return [item.key for item in self._items() if not item.sample][:prompts]

    def describe(self) -> dict[str, Any]:
        """Everything that decides which items there are."""
        chosen = self.videos[: self.total]
        shards = [] if self.shards is None else [shard.sha256 for shard in self.index.shards]
        return {
            **({"context_videos": described(chosen)} if chosen else {"shards": shards}),
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
            **({"context_videos": self.context_videos.name} if self.context_videos else {}),
        }

    def _prompts(self) -> Iterable[PromptSample]:
        if self.shards is None:
            return context_prompts(self.videos[: self.total], self.seed)
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
        rank, world = place(self.trainer)
        return sum(1 for _ in dealt(self.unfinished(), rank, world))

    def unfinished(self) -> Iterable[RolloutItem]:
        """Items of all ranks that are left to do, in the order in which they are dealt out."""
        finished, longest = frozenset(self.finished), frozenset(self.longest)
        items = (item for item in self._items() if item.key not in finished)
        return sorted(items, key=lambda item: item.key not in longest) if longest else items

    def test_dataloader(self) -> DataLoader[list[RolloutItem]]:
        """Rollouts of this rank, as lists of up to ``batch`` items of one policy."""
        rollouts = _Rollouts(self, self._policies(), *place(self.trainer))
        return DataLoader(rollouts, batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader[list[RolloutItem]]:
        """The same, for a training that looks at them in between."""
        return self.test_dataloader()

    def predict_dataloader(self) -> DataLoader[list[RolloutItem]]:
        """The same, for a module that records nothing."""
        return self.test_dataloader()

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
        # Left out before dealing: who did the rest does not depend on the ranks of the run before.
        mine = dealt(self.data.unfinished(), self.rank, self.world)
        yield from in_batches(mine, self.data.batch, self.policies)


def each_sample(prompts: Iterable[PromptSample], samples: int) -> Iterator[RolloutItem]:
    """An item for every noise of every prompt, of no policy so far."""
    return (RolloutItem(prompt, sample) for prompt in prompts for sample in range(samples))


def distinct(items: Iterable[RolloutItem], source: Path) -> list[str]:
    """Keys of items in their order.

    Args:
        items: Of which no two are one prompt and sample.
        source: Where their prompts come from.

    Raises:
        ValueError: Two have one key: they would share noise and results.
    """
    held: dict[str, RolloutItem] = {}
    for item in items:
        if (other := held.setdefault(item.key, item)) is not item:
            both = " and ".join(
                f"sample {each.sample} of {each.prompt.key!r}" for each in (other, item)
            )
            raise ValueError(
                f"Two rollouts have one key, and would share noise and results. Given {both} of "
                f"{source}, both called {item.key!r}. Give one of the prompts another name, or use "
                "fewer samples."
            )
    return list(held)


def in_batches(
    items: Iterable[RolloutItem], batch: int, policies: Sequence[str]
) -> Iterator[list[RolloutItem]]:
    """Items by up to ``batch``, all of them under one policy after the other."""
    left = iter(items)
    while together := list(islice(left, batch)):
        for policy in policies:
            yield [item._replace(policy=policy) for item in together]
