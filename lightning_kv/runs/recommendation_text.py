"""A recommendation in sentences."""

from __future__ import annotations

from itertools import count

from lightning_kv.runs.candidates import EQUAL, LEVEL, Candidate, Recommendation
from lightning_kv.runs.intervals import interval_words
from lightning_kv.runs.margins import Loss
from lightning_kv.runs.units import counted, planned
from lightning_kv.stats.bootstrap import ceiling
from lightning_kv.utilities.formatting import (
    format_bytes,
    number,
    percent,
    several,
    sureness,
    upper,
)

NAMED = 6  # policies that were not chosen, the nearest first


def in_words(found: Recommendation) -> list[str]:
    """The answer, what it saves, what it costs, how sure that is, and what else there is."""
    said = chosen(found) if found.policy else refused(found)
    if found.measured < found.run["prompts"]:
        said.insert(1, f"The run is not finished: {found.measured} of {planned(found.run)}.")
    keeping = [one for one in found.candidates if one.keeps and one.policy != found.policy]
    if keeping:
        also = " also" if found.policy else ""
        said.append(
            f"Surely{also} keeping {kept_words(found)}: {', '.join(map(cheaply, keeping))}."
        )
    named_above = (found.closest, found.beyond)
    out = [one for one in found.candidates if one.out and one.policy not in named_above]
    if out:
        out.sort(key=lambda one: max((x.mean / (x.margin or 1) for x in one.losses), default=0.0))
        more = f"; and {len(out) - NAMED} more" if len(out) > NAMED else ""
        said.append(f"Not chosen: {'; '.join(why_out(one) for one in out[:NAMED])}{more}.")
    if found.bounds:
        said.append(f"Bounds that know what is to come, nothing to run: {', '.join(found.bounds)}.")
    return said


def chosen(found: Recommendation) -> list[str]:
    """Sentences where a policy qualifies."""
    best = found.of(found.policy)
    limit = f" It fits into {format_bytes(found.memory)}." if found.memory else ""
    said = [f"Run {named(best)}: {savings(best, found)}.{limit}"]
    said += [*effort(best, found), *(loss_words(loss, found.reference) for loss in best.losses)]
    asides = {
        "Runner-up": found.runner_up,
        "Fewest rows touched": found.fewest_reads,
        "Fastest here": found.fastest,
    }
    said += [f"{role}: {brief(found.of(name))}." for role, name in asides.items() if name]
    return said


def refused(found: Recommendation) -> list[str]:
    """Sentences where nothing qualifies, with the best guess."""
    said = [why_none(found)]
    if found.closest:
        guess = found.of(found.closest)
        said.append(f"Nearest that saves anything: {named(guess)}. {upper(savings(guess, found))}.")
        said += [*effort(guess, found), *(loss_words(x, found.reference) for x in guess.losses)]
    if found.beyond:
        said.append(f"With more memory: {brief(found.of(found.beyond))}.")
    fits = ""
    if found.memory:
        fits = ", which fits" if found.reference_bytes <= found.memory else ", which does not fit"
    said.append(f"{found.reference} itself holds {format_bytes(found.reference_bytes)}{fits}.")
    return said


def why_none(found: Recommendation) -> str:
    """The first sentence where nothing qualifies."""
    sized = [one for one in found.candidates if one.bytes_peak is not None]
    least = min(sized, key=lambda one: one.bytes_peak)
    if found.memory and least.bytes_peak > found.memory:
        return (
            f"No policy fits into {format_bytes(found.memory)}: the smallest, {least.policy}, "
            f"holds {format_bytes(least.bytes_peak)}."
        )
    losses = [loss for one in found.candidates for loss in one.losses]
    most = max(losses, key=lambda loss: loss.n, default=None)
    if most is None or ceiling(most.n) < LEVEL:
        prompts = counted(most.n, most.clips) if most else counted(0)
        enough = next(n for n in count(1) if ceiling(n) >= LEVEL)
        return (
            f"{prompts} cannot give {sureness(LEVEL)} confidence, so no policy is recommended yet: "
            f"it takes {counted(enough)} or more."
        )
    bars = kept_words(found)
    where = f" in {format_bytes(found.memory)}" if found.memory else ""
    idle = [one.policy for one in found.candidates if one.keeps and one.out == "saves nothing"]
    if idle:
        return (
            f"No policy both saves something and keeps {bars}{where}: "
            f"{', '.join(idle)} would keep it, but read and score as much as {found.reference} "
            "reads, and free no memory."
        )
    return (
        f"No policy keeps {bars}{where} with {sureness(LEVEL)} confidence, so none is recommended."
    )


def kept_words(found: Recommendation) -> str:
    """What all margins ask for."""
    losses = [loss for one in found.candidates for loss in one.losses]
    limits = {loss.metric: loss.limit for loss in losses if loss.limit is not None}
    return " and ".join(
        f"{name} at {number(limits[name])} or better"
        if name in limits
        else f"{name} within {number(margin)} of {found.reference}"
        for name, margin in found.margins.items()
    )


def named(one: Candidate) -> str:
    """The policy with its budgets."""
    budgets = ", ".join(f"{word} {amount}" for word, amount in one.budgets.items())
    return f"{one.policy} ({budgets} per head)" if budgets else one.policy


def savings(one: Candidate, found: Recommendation) -> str:
    """Bytes and reads against the reference."""
    held, full = format_bytes(one.bytes_peak), format_bytes(found.reference_bytes)
    if one.bytes_share > 1 + EQUAL:
        memory = f"it takes more memory ({held}, {found.reference} {full})"
    elif one.bytes_share > 1 - EQUAL:
        memory = f"it frees no memory ({held}, as {found.reference})"
    else:
        memory = f"it holds {held} where {found.reference} holds {full} ({saved(one.bytes_share)})"
    if one.reads is None:
        return memory
    return f"{memory} and reads {percent(one.reads)} of the rows"


def effort(one: Candidate, found: Recommendation) -> list[str]:
    """What choosing costs, and time."""
    said = []
    if one.scored:
        said.append(
            f"To choose, it also scores keys, {percent(one.scored)} of what {found.reference} "
            "reads."
        )
    if one.speedup and one.seconds_per_chunk and found.reference_seconds:
        ratio = f"{one.speedup:.2f} times as fast as"
        if one.speedup < 1:
            ratio = f"{1 / one.speedup:.2f} times as long as"
        pays = ""
        if one.speedup < 1 and one.bytes_share > 1 - EQUAL:
            pays = ": it pays only where reading the cache is what takes the time"
        said.append(
            f"A chunk took {1000 * one.seconds_per_chunk:.0f} ms here, {ratio} {found.reference}"
            f"{pays}."
        )
    return said


def loss_words(loss: Loss, reference: str) -> str:
    """One metric: both means, the loss with its interval, and how sure the margin is."""
    against = f"{number(loss.value)} against {number(loss.reference)} of {reference}"
    if loss.limit is not None:
        alike = number(loss.reference)
        against = (
            f"{number(loss.value)} against {reference}, where two identical clips have {alike}"
        )
    change = "no loss" if loss.mean == 0 else f"a loss of {number(loss.mean)}"
    if loss.mean < 0:
        change = f"a gain of {number(-loss.mean)}"
    spread = ""
    if loss.ci95 and loss.ci95[0] != loss.ci95[1]:
        low, high = loss.ci95
        spread = f" ({interval_words(number(low), number(high), loss.n, ' of the loss')})"
    said = f"{loss.metric} is {against}, {change}{spread} over {counted(loss.n, loss.clips)}"
    margin = number(loss.margin)
    if not loss.within:
        return f"{said}: more than the margin of {margin}."
    sure = sureness(loss.confidence)
    most = ""
    if ceiling(loss.n) < LEVEL:
        most = f" ({sureness(ceiling(loss.n))} is the most that so few can give)"
    return f"{said}: within the margin of {margin} with {sure} confidence{most}."


def brief(one: Candidate) -> str:
    """A policy in half a line."""
    losses = ", ".join(f"{loss.metric} {change(loss)}" for loss in one.losses)
    speed = f", {one.speedup:.2f}x speed" if one.speedup else ""
    reads = "" if one.reads is None else f", reads {percent(one.reads)}"
    return f"{one.policy} ({format_bytes(one.bytes_peak)}{reads}{speed}, {losses})"


def cheaply(one: Candidate) -> str:
    """A policy, what it reads and holds, and its speed."""
    reads = "" if one.reads is None else f" at {percent(one.reads)} of reads"
    speed = "" if one.speedup is None else f", {one.speedup:.1f}x speed"
    return f"{one.policy}{reads} ({format_bytes(one.bytes_peak or 0)}{speed})"


def why_out(one: Candidate) -> str:
    """A policy that does not qualify, and why."""
    losses = ", ".join(f"{x.metric} {change(x)}" for x in one.losses)
    return (
        one.policy
        + {
            "no values": " (not measured)",
            "failed": f" ({several(one.failed, 'clip')} failed)",
            "memory": f" (holds {format_bytes(one.bytes_peak or 0)})",
            "saves nothing": " (saves nothing)",
            "margin": f" ({losses})",
            "unsure": f" ({losses}, but only {sureness(one.confidence)} sure)",
        }[one.out]
    )


def change(loss: Loss) -> str:
    """How a metric changes, in words."""
    if loss.mean == 0:
        return "the same"
    return f"{number(abs(loss.mean))} {'worse' if loss.mean > 0 else 'better'}"


def saved(share: float) -> str:
    """What a share of the reference's bytes frees.

    >>> saved(0.17)
    '83 % less'
    """
    return f"{percent(1 - share)} less"
