"""Is a policy further from a real set of clips than the reference: a paired test over prompts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_kv.metrics.functional.frechet import AgainstReal, numbered, varied, within
from lightning_kv.metrics.functional.moments import Covariance
from lightning_kv.stats.inference import jackknife

EXACT = 10
"""Up to so many prompts the test tries all ``2**n`` swaps."""


@dataclass(frozen=True)
class FrechetDifference:
    """How much further from the real set the clips of a candidate are than the reference's.

    Args:
        value: ``candidate - reference``: below zero, the candidate is nearer.
        candidate: Distance of the candidate's clips from the real set.
        reference: Distance of the reference's clips from the real set.
        standard_error: By the jackknife over prompts; None for fewer than 3.
        p_value: Two-sided, of the sign-flip test over prompts.
        prompts: Number of prompts.
    """

    value: float
    candidate: float
    reference: float
    standard_error: float | None
    p_value: float
    prompts: int


def delta_frechet(
    candidate: Tensor,
    reference: Tensor,
    real: Tensor,
    ids: Tensor | None = None,
    permutations: int = 500,
    seed: int = 0,
    covariance: Covariance = "unbiased",
) -> FrechetDifference:
    """Difference of the distances of two paired sets of clips from one real set, with its test.

    Two rollouts of one prompt and noise are alike, so the distance between them is no test. If the
    policy changes nothing, the two may be swapped: p is the share of swaps of random prompts that
    leave a difference as large as there was. Up to 10 prompts all swaps are tried, otherwise
    random ones, and p is ``(b + 1) / (m + 1)`` (Phipson and Smyth, 2010, arXiv 1603.05766).

    Args:
        candidate: Features of the candidate's clips, ``[N, d]``.
        reference: Features of the reference's clips in the same order, ``[N, d]``.
        real: Features of the real set, ``[M, d]``.
        ids: Prompt of each pair, int64 ``[N]``: pairs of one prompt are swapped and left out
            together. By default each pair has its own.
        permutations: Number m of random swaps.
        seed: The same seed gives the same p.
        covariance: As in :func:`frechet_distance`.

    Raises:
        ValueError: The sets are not paired, or as :func:`frechet_distance`.

    Example:
        >>> reference, real = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
        >>> delta = delta_frechet(reference + 5, reference, real)
        >>> delta.value > 20, delta.p_value
        (True, 0.0078125)
    """
    candidate, reference = varied(candidate), varied(reference)
    prompt, prompts = _prompts(candidate, reference, ids)
    distances = AgainstReal(torch.cat([candidate, reference]), varied(real), covariance)
    rows, unswapped = torch.arange(len(prompt)), torch.zeros(len(prompt), dtype=torch.bool)

    def both(rows: Tensor, swap: Tensor) -> tuple[float, float]:
        first, second = rows + len(prompt) * swap, rows + len(prompt) * ~swap
        return distances(first).item(), distances(second).item()

    def difference(kept: np.ndarray) -> float:
        rows = within(prompt, kept).nonzero()[:, 0]
        first, second = both(rows, unswapped[rows])
        return first - second

    far, near = both(rows, unswapped)
    swaps = _swaps(prompts, permutations, seed)
    others = (both(rows, swap[prompt]) for swap in swaps)
    rounding = 1e-9 * distances.real_trace.item()
    extreme = sum(abs(a - b) >= abs(far - near) - rounding for a, b in others)
    extra = int(prompts > EXACT)
    error = jackknife(np.arange(prompts), difference)[1] if prompts > 2 else None
    p_value = (extreme + extra) / (len(swaps) + extra)
    return FrechetDifference(far - near, far, near, error, p_value, prompts)


def _prompts(candidate: Tensor, reference: Tensor, ids: Tensor | None) -> tuple[Tensor, int]:
    """Prompt of each pair, counted from 0, and the number of prompts."""
    if candidate.shape != reference.shape or (ids is not None and ids.shape != (len(reference),)):
        raise ValueError(
            f"The sets are not paired: features {tuple(candidate.shape)} and "
            f"{tuple(reference.shape)}, prompts {None if ids is None else tuple(ids.shape)}. "
            "Pass the same clips in the same order, and one prompt for each."
        )
    return numbered(ids, len(reference))


def _swaps(prompts: int, permutations: int, seed: int) -> Tensor:
    """Which prompts are swapped, bool ``[swaps, prompts]``: all ways, or random ones.

    Swapping the other prompts instead only turns the sign, so the first one stays in the full list.
    """
    if prompts <= EXACT:
        ways = list(itertools.product((False, True), repeat=prompts - 1))
        return torch.tensor([(False, *way) for way in ways])
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(permutations, prompts, generator=generator, dtype=torch.float32) < 0.5
