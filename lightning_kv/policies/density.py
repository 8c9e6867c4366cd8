"""Which tokens a bank may take in without getting thicker where it is thick already.

Shapes: H heads, n newcomers, m tokens of the bank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """How much two keys count as near: ``(epsilon + distance² / (D / 2)) ** -power``.

    Args:
        epsilon: Above 0.
        power: Above 0: the larger, the less distant keys count.
    """

    epsilon: float = 1.0
    power: float = 2.0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """All pairs of ``[n, D]`` and ``[m, D]``, ``[n, m]``."""
        square = a.square().sum(-1).unsqueeze(1) + b.square().sum(-1) - 2 * a @ b.T
        return (self.epsilon + square.clamp_min(0) * 2 / a.shape[-1]) ** -self.power


@dataclass
class DensityBank:
    """Tokens of all heads of a layer.

    Args:
        keys: ``[H, m, D]``.
        density: ``[H, m]``: nearness summed over all others.
        baseline: ``[H, m]``: the density when a token came in, above 0.
    """

    keys: Tensor
    density: Tensor
    baseline: Tensor


def crowd(keys: Tensor, near: Kernel) -> Tensor:
    """The density of each key among its like, ``[H, m]`` of ``[H, m, D]``."""
    return torch.stack([near(own, own).fill_diagonal_(0).sum(1) for own in keys])


def admitted(
    bank: DensityBank, new: Tensor, room: int, growth: float, near: Kernel
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take in as many newcomers as let no more densities grow too far than tokens must go.

    DensityKV (arXiv 2608.27922). A head lines newcomers up by the most that they add to any token,
    over its baseline. So many are taken from the front, the same number in all heads, that in each
    no more tokens reach ``growth`` times their baseline than have to make room. These go, then the
    densest. An empty bank takes the first.

    Args:
        bank: What is there.
        new: Keys ``[H, n, D]``.
        room: Tokens that it holds.
        growth: See above.
        near: The kernel.

    Returns:
        Newcomers taken, bool ``[H, n]``; old ones that stay, bool ``[H, m]``; densities of both.
    """
    (heads, size), held = new.shape[:2], bank.keys.shape[1]
    place = torch.arange(1, size + 1, device=new.device)
    order = (place - 1).expand(heads, -1)
    fits = place <= room
    if held:
        surplus, lines = (held + place - room).clamp_min(0), []
        for head in range(heads):
            rho = near(new[head], bank.keys[head])
            lines.append((rho / bank.baseline[head]).amax(1).argsort(stable=True))
            grown = bank.density[head] + rho[lines[-1]].cumsum(0)
            fits = fits & ((grown >= growth * bank.baseline[head]).sum(1) <= surplus)
        order = torch.stack(lines)
    count = (place * fits).amax()  # the largest that fits, though fewer may not
    taken = (place <= count).expand_as(order)
    take = torch.zeros_like(taken).scatter(1, order, taken)
    found = [_one(bank, new, take, count, room, growth, near, head) for head in range(heads)]
    stay, old, fresh = (torch.stack(x) for x in zip(*found, strict=True))
    return take, stay, old, fresh


def _one(
    bank: DensityBank,
    new: Tensor,
    take: Tensor,
    count: Tensor,
    room: int,
    growth: float,
    near: Kernel,
    head: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Old ones that stay and densities, of one head."""
    keys, x, take = bank.keys[head], new[head], take[head]
    held, rho = len(keys), near(x, keys)
    grown = bank.density[head] + (rho * take.unsqueeze(1)).sum(0)
    over = grown >= growth * bank.baseline[head]
    order = grown.masked_fill(over, torch.inf).argsort(descending=True, stable=True)
    worst = order[: min(len(x), held) if held <= room else held]
    gone = torch.arange(len(worst), device=x.device) < count + held - room
    stay = torch.ones(held, dtype=torch.bool, device=x.device).scatter(0, worst, ~gone)
    lost = (near(keys[worst], keys) * gone.unsqueeze(1)).sum(0)
    among = (near(x, x).fill_diagonal_(0) * take).sum(1)
    return stay, (grown - lost).clamp_min(0), (rho * stay).sum(1) + among
