"""Who gets what: items in turn, or whole shards by their bytes, over ranks and their workers."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from lightning_kv.data.video_shards import VideoSample

Item = TypeVar("Item")


def place(trainer: Any) -> tuple[int, int]:
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
    number, workers = _worker()
    return islice(source, rank * workers + number, None, world * workers)


def dealt_by_bytes(samples: Sequence[VideoSample], rank: int, world: int) -> list[VideoSample]:
    """Every video to exactly one of all workers of all ranks, whole shards together.

    Shards go to who has the fewest bytes so far, the largest first. Where there are fewer of them
    than workers of all ranks, single videos are dealt in the same way, so that all have something
    to do.

    Args:
        samples: The same videos in the same order everywhere.
        rank: Number of this process.
        world: Number of processes.

    Returns:
        Those of this worker, in their order.
    """
    number, workers = _worker()
    hands = world * workers
    together: dict[Any, list[int]] = {}
    for at, sample in enumerate(samples):
        shard = sample.shard.file if sample.shard else None
        together.setdefault(shard or (at, sample.key), []).append(at)
    groups = list(together.values())
    if len(groups) < hands:
        groups = [[at] for at in range(len(samples))]
    sizes = [sum(samples[at].bytes for at in group) for group in groups]
    # Neighbours in the list are of different ranks: a rank without any is the last resort.
    mine = balanced(sizes, hands)[number * world + rank]
    return [samples[at] for at in sorted(p for group in mine for p in groups[group])]


def balanced(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Deal sizes so that the sums are near each other: the largest first, to whom has least.

    >>> balanced([3, 9, 4, 4, 2], 2)
    [[1, 4], [0, 2, 3]]
    """
    given: list[list[int]] = [[] for _ in range(hands)]
    least = [(0, 0, hand) for hand in range(hands)]
    for at in sorted(range(len(sizes)), key=lambda each: (-sizes[each], each)):
        held, count, hand = heapq.heappop(least)
        given[hand].append(at)
        heapq.heappush(least, (held + sizes[at], count + 1, hand))
    return [sorted(each) for each in given]


def _worker() -> tuple[int, int]:
    """Number of this worker of a data loader, and of all of them; one where there are none."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)
