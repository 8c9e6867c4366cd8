"""A policy as one that could be recommended: what it costs, what it loses, why it is out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_kv.runs.directory import Record
from lightning_kv.runs.margins import Loss
from lightning_kv.runs.units import Clips

LEVEL = 0.95
EQUAL = 0.01  # of the reference: bytes or reads that differ by less count as equal


@dataclass(frozen=True)
class Candidate:
    """One policy, what it costs, what it loses, and why it is out, if it is.

    Args:
        policy: Its name.
        budgets: ``keeps`` and ``reads``, where it has them.
        bytes_peak: Most bytes that the cache of a clip ever held; None where nothing is measured.
        bytes_share: The same ÷ the reference's.
        reads: Rows read ÷ the reference's.
        scored: Rows touched only to score them ÷ the reference's reads.
        seconds_per_chunk: Median.
        speedup: Against the reference; above 1 is faster.
        losses: One per margin metric that it has values for.
        failed: Clips that failed under it and not under the reference.
        keeps: Whether it keeps the quality surely enough, whatever it costs.
        out: Why it does not qualify, None where it does: ``no values``, ``failed``, ``memory``,
            ``saves nothing``, ``margin`` (the mean loss is above it) or ``unsure`` (it is within,
            but not surely).
    """

    policy: str
    budgets: dict[str, str]
    bytes_peak: int | None
    bytes_share: float | None
    reads: float | None
    scored: float | None
    seconds_per_chunk: float | None
    speedup: float | None
    losses: tuple[Loss, ...]
    failed: int
    keeps: bool
    out: str | None

    @property
    def confidence(self) -> float:
        """That all margins are kept: the least sure one's."""
        return min((loss.confidence for loss in self.losses), default=0.0)

    @property
    def work(self) -> float | None:
        """Rows touched, as a share of what the reference reads: those read and those scored."""
        return touched(self.reads, self.scored)

    @property
    def price(self) -> tuple[float, ...]:
        """What is compared: bytes, then work, both in percent; then what the percents hide."""
        shares = [1.0 if share is None else share for share in (self.bytes_share, self.work)]
        return (*(round(share / EQUAL) for share in shares), *shares)


@dataclass(frozen=True)
class Recommendation:
    """The answer, in numbers and in words.

    Args:
        reference: What the others are compared with.
        memory: Bytes that the cache of a clip may take; None for no limit.
        margins: Largest loss per metric.
        policy: What to run; None where nothing qualifies.
        closest: Where nothing qualifies: the best guess among those that fit.
        runner_up: The second of those that qualify.
        fewest_reads: The one of them that reads least, where that is another.
        fastest: The one of them that was fastest here, where that is another.
        beyond: Where nothing qualifies for want of memory: the cheapest that keeps the quality.
        candidates: Every policy but the reference and the bounds.
        bounds: Policies that were told what the reference attended to; nobody can run them.
        reference_bytes: Most bytes that the cache of a clip held under the reference.
        reference_seconds: Its median seconds per chunk.
        measured: Prompts of which every sample is measured under every policy.
        run: Prompts, frames and the like, as the summary has them.
        words: The answer in sentences.
    """

    reference: str
    memory: int | None
    margins: dict[str, float]
    policy: str | None
    closest: str | None
    runner_up: str | None
    fewest_reads: str | None
    fastest: str | None
    beyond: str | None
    candidates: tuple[Candidate, ...]
    bounds: tuple[str, ...]
    reference_bytes: int
    reference_seconds: float | None
    measured: int
    run: dict[str, Any]
    words: list[str] = field(default_factory=list)

    def of(self, name: str) -> Candidate:
        """The candidate of that name."""
        return next(one for one in self.candidates if one.policy == name)


def candidate(
    summary: dict[str, Any],
    clips: dict[str, Clips],
    name: str,
    memory: int | None,
    losses: tuple[Loss, ...],
    judged: int,
) -> Candidate:
    """What a policy costs, and whether it qualifies with these losses.

    Args:
        summary: Content of ``summary.json``.
        clips: Records by policy and key.
        name: Of the policy.
        memory: Bytes that the cache of one clip may take.
        losses: What it loses, with corrected confidences.
        judged: Number of metrics that have a margin.
    """
    own, base = clips.get(name, {}), clips[summary["reference"]]
    result, full = (summary["policies"][which] for which in (name, summary["reference"]))
    failed = sum(fails(clip) and not fails(base.get(key, {})) for key, clip in own.items())
    peak, reads, scored = (
        result["cost"][key] for key in ("kv_bytes_peak", "kv_read_fraction", "kv_scored_fraction")
    )
    work = touched(reads, scored)
    share = None if peak is None else peak / full["cost"]["kv_bytes_peak"]
    reasons = {
        "no values": len(losses) < judged,
        "failed": failed > 0,
        "memory": memory is not None and peak is not None and peak > memory,
        "saves nothing": all(x is None or x > 1 - EQUAL for x in (share, work)),
        "margin": not all(loss.within for loss in losses),
        "unsure": any(loss.confidence < LEVEL for loss in losses),
    }
    return Candidate(
        policy=name,
        budgets=budgets_of(result["config"]),
        bytes_peak=peak,
        bytes_share=share,
        reads=reads,
        scored=scored,
        seconds_per_chunk=result["cost"]["seconds_per_chunk_p50"],
        speedup=result["cost"]["speedup"],
        losses=losses,
        failed=failed,
        keeps=not any(reasons[name] for name in ("no values", "failed", "margin", "unsure")),
        out=next((reason for reason, holds in reasons.items() if holds), None),
    )


def touched(reads: float | None, scored: float | None) -> float | None:
    """Shares of rows read and of rows scored, together; None where reads are not known."""
    return None if reads is None else reads + (scored or 0.0)


def fails(clip: Record) -> bool:
    """Whether a clip could not be measured."""
    return bool(clip.get("failure"))


def budgets_of(config: dict[str, Any]) -> dict[str, str]:
    """Amounts of a policy's configuration: what it ``keeps`` and what it ``reads``."""
    found = {}
    for word, kind in (("keeps", "retain"), ("reads", "select")):
        budget = (config.get(kind) or {}).get("budget")
        if budget:
            found[word] = str(budget["amount"])
    return found
