"""The prompts of a run, dealt out to ranks."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import lightning
from torch.utils.data import DataLoader

from lightning_kv.data.shards import PromptSample, PromptShards, ShardIndex, read_index

__all__ = ["PromptData", "PromptSample"]


class PromptData(lightning.LightningDataModule):
    """Prompts from shards, each to exactly one rank, whatever the number of ranks.

    Args:
        shards: Folder with the tar files and their ``index.json``.
        prompts: How many prompts of the set to run, from its beginning; None for all.
        seed: Seed of the worlds that are drawn for the prompts.
        batch: Prompts per batch.

    Raises:
        ValueError: ``batch`` is not positive.
    """

    finished: set[str]
    """Keys of prompts to leave out; a task fills it before the run to resume."""

    def __init__(
        self, shards: Path, prompts: int | None = None, seed: int = 0, batch: int = 1
    ) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(
                f"A batch holds at least one prompt. batch={batch} was given. Use batch=1 or more."
            )
        self.shards = Path(shards)
        self.prompts = prompts
        self.seed = seed
        self.batch = batch
        self.finished = set()

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

    def prompt_texts(self) -> list[str]:
        """Texts of all prompts of the run in their order, finished ones included."""
        return [sample.prompt for sample in self._samples()]

    def keys(self) -> list[str]:
        """Keys of all prompts of the run in their order, finished ones included.

        Raises:
            ValueError: As for `total`, or two prompts have one key.
        """
        keys = [sample.key for sample in self._samples()]
        if len(set(keys)) < self.total:
            raise ValueError(
                "The prompts of the run have no distinct keys. "
                f"{self.shards} gives {len(set(keys))} keys for {self.total} prompts. "
                f"Use another data seed than {self.seed}, or write the set again."
            )
        return keys

    def _samples(self) -> PromptShards:
        return PromptShards(self.index, seed=self.seed, limit=self.total)

    def setup(self, stage: str | None = None) -> None:
        """Check the set before the first prompt is run.

        Raises:
            ValueError: As for `keys`, or there are more ranks than prompts in the run. Fewer
                unfinished prompts than ranks are allowed: a resumed run ends that way.
        """
        total, (_, world) = len(self.keys()), self._place()
        if world > total:
            raise ValueError(
                "There are more ranks than prompts. "
                f"{world} ranks share {total} prompts of {self.shards}. "
                f"Use at most {total} devices, or more prompts (the set holds "
                f"{self.index.samples})."
            )

    def test_dataloader(self) -> DataLoader[PromptSample]:
        """The unfinished prompts of this rank, as lists of up to ``batch`` `PromptSample`."""
        rank, world = self._place()
        samples = PromptShards(
            self.index,
            seed=self.seed,
            limit=self.total,
            skip=self.finished,
            rank=rank,
            world=world,
        )
        return DataLoader(samples, batch_size=self.batch, collate_fn=list, num_workers=0)

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks: the trainer's, or a single process where there is none."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
