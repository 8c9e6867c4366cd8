"""The only places where the host waits for the device, and where it sends something there.

Everything else in the core is queued on the device, so a pass never stops for a number. On a CPU
both are ordinary copies; ``lightning_kv.tasks.benchmark.waits`` counts what would wait on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def fetch(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Bring integers and truth values to the host in one transfer; one flat list per tensor."""
    if not tensors:
        return []
    sizes = [x.numel() for x in tensors]
    numbers = torch.cat([x.reshape(-1).to(torch.int64) for x in tensors]).tolist()
    ends = [0, *accumulate(sizes)]
    return [numbers[low:high] for low, high in pairwise(ends)]


def upload(values: Sequence[float | int | bool], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of values on the device of ``like``, without waiting for it."""
    return _uploaded(tuple(values), like.device, dtype)


@lru_cache(maxsize=4096)
def _uploaded(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept for later, which may want gradients
        made = torch.tensor(values, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def send(x: Tensor, like: Tensor) -> Tensor:
    """A tensor of the host in the dtype and on the device of ``like``, without waiting for it."""
    if like.device.type != "cuda" or x.is_cuda:
        return x.to(like)
    return x.pin_memory().to(like.device, non_blocking=True).to(like.dtype)


def compact(mask: Tensor, count: int) -> Tensor:
    """Positions of the first ``count`` true entries along the last axis, ascending.

    What :func:`torch.nonzero` gives where the host knows how many there are.

    Args:
        mask: bool ``[..., n]`` with ``count`` true entries in each line.
        count: Their number.

    Returns:
        int64 ``[..., count]``.
    """
    size = mask.shape[-1]
    every = torch.arange(size, device=mask.device).expand(mask.shape)
    if count == size:
        return every
    rank = (mask.cumsum(-1) - 1).masked_fill(~mask, count).clamp_max(count)
    return every.new_zeros(*mask.shape[:-1], count + 1).scatter(-1, rank, every)[..., :count]
