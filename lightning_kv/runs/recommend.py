"""Which policy to run: the cheapest whose loss stays within a margin, and how sure that is.

The rule. A policy *qualifies* where it fits into the memory (if one is given), no clip failed
under it, it saves memory or reads, and for every margin metric its mean loss against the
reference, prompt by prompt, is within the margin with a confidence of 95 % (a one-sided test of
non-inferiority by the bootstrap, :func:`~lightning_kv.stats.bootstrap.confidence_below`). The
confidences are corrected for the number of policies and metrics (Holm). Of those that qualify, the
one with the fewest bytes wins, then the one with the fewest reads; shares of the reference that
round to the same percent are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_kv.runs.candidates import Candidate, Recommendation, candidate
from lightning_kv.runs.directory import Record
from lightning_kv.runs.margins import (
    FROM_IDENTICAL,
    MARGINS,
    Loss,
    check_margins,
    default_margins,
    loss_of,
    unusable,
    usable,
)
from lightning_kv.runs.recommendation_text import in_words
from lightning_kv.runs.summary import hindsight
from lightning_kv.runs.units import Clips, finished_units
from lightning_kv.stats.inference import holm


def recommend(
    summary: dict[str, Any],
    records: Sequence[Record],
    memory: int | None = None,
    margins: dict[str, float] | None = None,
) -> Recommendation:
    """The cheapest policy that keeps its quality; the rule stands above.

    Args:
        summary: Content of ``summary.json``, of a finished run or not.
        records: The run's records.
        memory: Bytes that the cache of one clip may take.
        margins: Largest mean loss per metric, in its unit; see `margins.MARGINS` and
            `margins.FROM_IDENTICAL` where None.

    Raises:
        ValueError: There is nothing to compare, or a margin cannot be judged.
    """
    reference = summary["reference"]
    bounds = [name for name in hindsight(summary) if name in summary["policies"]]
    clips = compared_clips(summary, [own for own in records if own["policy"] not in bounds])
    margins = judged(summary, clips, margins)
    rivals = [name for name in summary["policies"] if name != reference and name not in bounds]
    losses = corrected_losses(summary, clips, rivals, margins)
    found = [candidate(summary, clips, name, memory, losses[name], len(margins)) for name in rivals]
    best = sorted((one for one in found if one.out is None), key=lambda one: one.price)
    keeping = [one for one in found if one.keeps and one.out == "memory"]
    cost = summary["policies"][reference]["cost"]
    every = [record for own in clips.values() for record in own.values()]
    answer = Recommendation(
        reference=reference,
        memory=memory,
        margins=margins,
        policy=best[0].policy if best else None,
        runner_up=best[1].policy if len(best) > 1 else None,
        fewest_reads=another(best, lambda one: one.price[1]),
        fastest=another(best, lambda one: -round(one.speedup or 0.0, 1)),
        closest=None if best else closest(found),
        beyond=None if best else first(keeping, lambda one: one.price),
        candidates=tuple(found),
        bounds=tuple(bounds),
        reference_bytes=cost["kv_bytes_peak"],
        reference_seconds=cost["seconds_per_chunk_p50"],
        measured=finished_units(every, (reference, *rivals), summary["run"]),
        run=summary["run"],
    )
    return replace(answer, words=in_words(answer))


def corrected_losses(
    summary: dict[str, Any],
    clips: dict[str, Clips],
    rivals: Sequence[str],
    margins: dict[str, float],
) -> dict[str, tuple[Loss, ...]]:
    """Losses of every policy, with confidences that hold for all of them together (Holm, 1979).

    Of many policies that are each judged with 95 % confidence, one passes by luck sooner or later.
    """
    base, facts = clips[summary["reference"]], summary["policies"][summary["reference"]]["metrics"]
    found = {
        name: [
            loss_of(clips.get(name, {}), base, metric, facts, margin)
            for metric, margin in margins.items()
        ]
        for name in rivals
    }
    known = {name: [loss for loss in own if loss is not None] for name, own in found.items()}
    adjusted = iter(holm([1 - loss.confidence for own in known.values() for loss in own]))
    return {
        name: tuple(replace(loss, confidence=1 - next(adjusted)) for loss in own)
        for name, own in known.items()
    }


def compared_clips(summary: dict[str, Any], records: Sequence[Record]) -> dict[str, Clips]:
    """Records by policy and key, where there is something to compare.

    Raises:
        ValueError: Only the reference was run, it is not measured yet, or nothing has a price.
    """
    reference = summary["reference"]
    if summary["policies"][reference]["cost"]["kv_bytes_peak"] is None and any(
        record["policy"] == reference for record in records
    ):
        raise ValueError(
            "There is nothing to recommend: what these clips cost is not known, as they come from "
            "video files. Read the report, or give a run of `lightning-kv evaluate`."
        )
    if list(summary["policies"]) == [reference]:
        raise ValueError(
            f"There is nothing to recommend: only the reference {reference!r} was run. "
            "Evaluate others too: --policies [full,sliding-window@9f,top-attention@9f]."
        )
    if not set(summary["policies"]) - {reference, *hindsight(summary)}:
        raise ValueError(
            f"There is nothing to recommend: beside the reference {reference!r} the run has only "
            f"{', '.join(hindsight(summary))}, which know what is to come. Evaluate other policies "
            "too."
        )
    clips: dict[str, Clips] = {}
    for record in records:
        clips.setdefault(record["policy"], {})[record["key"]] = record
    if len(clips) < 2 or reference not in clips:
        raise ValueError(
            f"There is nothing to compare yet: {', '.join(clips) or 'nothing'} is all that is "
            f"measured so far. Give the run time for a clip of {reference!r} and of a policy."
        )
    return clips


def judged(
    summary: dict[str, Any], clips: dict[str, Clips], margins: dict[str, float] | None
) -> dict[str, float]:
    """The margins, or the default one; refused where they cannot be judged."""
    facts = summary["policies"][summary["reference"]]["metrics"]
    able = usable(clips, summary["reference"], facts)
    if margins is None:
        margins = default_margins(able, unusable(summary, clips), MARGINS | FROM_IDENTICAL)
    check_margins(margins, facts, able)
    return margins


def closest(found: Sequence[Candidate]) -> str | None:
    """The best guess where nothing qualifies: the surest, then the least beyond its margins."""

    def rank(one: Candidate) -> tuple[float, ...]:
        beyond = max(0.0 if loss.within else loss.share for loss in one.losses)
        return (-one.confidence, beyond, *one.price)

    return first([one for one in found if one.out in ("unsure", "margin")], rank)


def another(best: Sequence[Candidate], price: Callable[[Candidate], float]) -> str | None:
    """The cheapest by another price, unless the first one is as cheap."""
    return first([one for one in best if price(one) < price(best[0])], price)


def first(found: Sequence[Candidate], price: Callable[[Candidate], Any]) -> str | None:
    """Name of the cheapest; None where there is none."""
    return min(found, key=price).policy if found else None
