"""Batches of lists from the records of one or several rounds, for any number of processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_kv.data.datamodule.distribution import place
from lightning_kv.distillation.lists import Lists, column_moments, concatenated
from lightning_kv.models.samplers import stable_seed
from lightning_kv.tasks.distillation.records import Decided, check_alike, read_lists

OWN = 0.5  # of the lists of a batch, how many keep as many frames as the rollout did


class Batch(NamedTuple):
    """What a rank learns of one step.

    Args:
        lists: Its part of those that were drawn.
        k: int64 ``[N]``: how many candidates each is to keep.
        total: Weight of all that were drawn, over the number of ranks: the mean over ranks of sums
            over this is the mean over all lists.
    """

    lists: Lists
    k: Tensor
    total: Tensor


class StatisticsData(L.LightningDataModule):
    """Lists of the records of some rounds.

    What is drawn for a step depends on seed and step alone: each rank takes its slice, whatever
    their number, and the workers of a rank take turns. Held-out lists come once each, in turn to
    all workers of all ranks, so some may have more than others: what is made of them must be sums.

    Args:
        folders: Of the rounds, the newest last; held-out lists are those of the newest.
        steps: Steps of the training.
        batch: Lists of a step, of all ranks together.
        newest: How much more often lists of the newest round are drawn than others.
        seed: Of what is drawn.
        keys: Clips that count; all where None.
        look: Held-out lists that are judged together.
        workers: Processes of a rank that make batches.

    Raises:
        ValueError: A number makes no sense.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        steps: int,
        batch: int = 2048,
        newest: float = 2.0,
        seed: int = 0,
        keys: Collection[str] | None = None,
        look: int = 2048,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if not folders or min(steps, batch, look) < 1 or newest <= 0:
            raise ValueError(
                f"There is nothing to learn: {len(folders)} folders, steps={steps}, batch={batch}, "
                f"look={look}, newest={newest}. Give one folder or more, and numbers above 0."
            )
        self.folders = [Path(folder) for folder in folders]
        self.steps, self.batch, self.newest, self.seed = steps, batch, newest, seed
        self.keys, self.look, self.workers = keys, look, workers

    @cached_property
    def taught(self) -> tuple[Lists, Tensor]:
        """Lists to learn, of all rounds, and float64 ``[N]``: how often each is drawn.

        Raises:
            ValueError: There are none, or they are of different models, teachers or labels.
        """
        rounds = [read_lists(folder, False, self.keys) for folder in self.folders]
        found = [own.lists for own in rounds if own.lists is not None]
        if not found:
            raise ValueError(
                f"There is nothing to learn in {', '.join(map(str, self.folders))}: no clip had to "
                "drop a frame. Give longer clips (--frames) or smaller budgets."
            )
        sizes = {(own.made["layers"], own.made["heads"]) for own in rounds}
        if len(sizes) > 1:
            raise ValueError(
                f"Records are of models of different sizes: {sorted(sizes)} (layers, heads). Give "
                "folders of one model."
            )
        where = ", ".join(map(str, self.folders))
        for own in rounds[1:]:
            check_alike(where, rounds[0].made, own.made, ("teacher", "labels"))
        weights = [
            torch.full((len(own.lists),), self.newest if own is rounds[-1] else 1.0).double()
            for own in rounds
            if own.lists is not None
        ]
        return concatenated(found), torch.cat(weights)

    @cached_property
    def held_out(self) -> Decided:
        """Lists of held-out prompts, of the newest round."""
        return read_lists(self.folders[-1], True, self.keys)

    @property
    def outputs(self) -> bool:
        """Whether outputs were recorded with the lists."""
        return self.taught[0].gram is not None

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and deviation of every column of the lists to learn."""
        return column_moments(self.taught[0])

    def setup(self, stage: str | None = None) -> None:
        """Read the records.

        Raises:
            ValueError: One is damaged, or there is nothing to learn.
        """
        if stage in (None, "fit"):
            _ = self.taught
        _ = self.held_out

    def drawn(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step.

        Args:
            step: From 0.
            rank: Whose slice.
            world: Number of ranks.
        """
        lists, weight = self.taught
        rng = torch.Generator().manual_seed(stable_seed(self.seed, f"step {step}"))
        chance, own, wide = torch.rand(3, self.batch, generator=rng, dtype=torch.float64)
        share = weight.cumsum(0)
        index = torch.searchsorted(share, chance * share[-1], right=True)
        index = index.clamp_max(len(share) - 1)
        some = lists.select(index[rank::world])
        total = lists.weight[index].sum() / world
        k = chosen(some, own[rank::world] < OWN, wide[rank::world])
        return Batch(some, k, total)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank, from the step that the training has reached."""
        rank, world = place(self.trainer)
        start = 0 if self.trainer is None else self.trainer.global_step
        drawn = _Drawn(self, start, rank, world)
        return DataLoader(drawn, batch_size=None, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Lists] | list[Any]:
        """Held-out lists of this rank, each once; none where no prompt is held out."""
        if self.held_out.lists is None:
            return []
        held = _HeldOut(self.held_out.lists, self.look, *place(self.trainer))
        return DataLoader(held, batch_size=None, num_workers=self.workers)


def chosen(lists: Lists, own: Tensor, chance: Tensor) -> Tensor:
    """How many candidates lists of n are to keep, from 1 to n - 1, int64 ``[N]``.

    Args:
        lists: Of which each has two candidates or more.
        own: bool ``[N]``: as many as the budget of the rollout lets a head keep.
        chance: ``[N]`` from 0 to below 1; of the others the logarithm of k is uniform.
    """
    count = lists.candidate.sum(-1)
    wide = count.double().pow(chance).floor().long()
    return torch.where(own, lists.keep, wide).clamp_min(1).minimum(count - 1)


class _Drawn(IterableDataset):
    """Batches of one rank, from a step on."""

    def __init__(self, data: StatisticsData, start: int, rank: int, world: int) -> None:
        self.data, self.start, self.rank, self.world = data, start, rank, world

    def __iter__(self) -> Iterator[Batch]:
        number, workers = _worker()  # of which the loader asks one after the other
        for step in range(self.start + number, self.data.steps, workers):
            yield self.data.drawn(step, self.rank, self.world)


class _HeldOut(IterableDataset):
    """Lists of one rank, in batches."""

    def __init__(self, lists: Lists, look: int, rank: int, world: int) -> None:
        self.lists, self.look, self.rank, self.world = lists, look, rank, world

    def __iter__(self) -> Iterator[Lists]:
        number, workers = _worker()
        first, every = self.rank * workers + number, self.world * workers
        mine = torch.arange(len(self.lists))[first::every]
        for index in mine.split(self.look):
            if len(index):
                yield self.lists.select(index)


def _worker() -> tuple[int, int]:
    """Number of this worker, and of all of them; one where there are none."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)
