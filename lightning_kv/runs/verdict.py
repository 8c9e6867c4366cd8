"""What a run says, in sentences: which policy to run, or how video files compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_kv.runs.directory import Record
from lightning_kv.runs.intervals import interval_kind, interval_words
from lightning_kv.runs.recommend import recommend
from lightning_kv.runs.units import counted, planned, sets_words
from lightning_kv.utilities.formatting import number

FILES = "video files"  # the model of a comparison of videos that somebody else made


def verdict(summary: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """The recommendation without a limit and with the default margin; or the comparison.

    Args:
        summary: Content of ``summary.json``, with its statistics.
        records: The run's records.
    """
    told = [said for name in rivals(summary) for said in compared(summary, name)]
    if summary["model"]["name"] == FILES:
        return told or ["There is nothing to compare: no video has a partner with a value."]
    try:
        return recommend(summary, records).words
    except ValueError as error:  # no metric that a margin can be set for, or one policy alone
        return [*told, str(error)]


def extent(summary: dict[str, Any]) -> str:
    """How many prompts a run is about; of video files, how many there are values of."""
    if summary.get("model", {}).get("name") == FILES and "measured" in summary:
        return counted(summary["measured"]["prompts"], summary["measured"]["clips"])
    return planned(summary["run"])


def rivals(summary: dict[str, Any]) -> list[str]:
    """Everything but the reference."""
    return [name for name in summary["policies"] if name != summary["reference"]]


def compared(summary: dict[str, Any], name: str) -> Iterator[str]:
    """One candidate: how near it is to the reference, what differs surely, what drifts."""
    policy, reference = summary["policies"][name], summary["reference"]
    metrics = policy["metrics"]
    near = [
        f"{metric} {estimate(value)}"
        for metric, value in metrics.items()
        if value["against_reference"] and value["mean"] is not None
    ]
    alone = [value for value in metrics.values() if not value["sets"]]
    most = max(alone, key=lambda value: value["n"], default={"n": 0})
    if near:
        over = counted(most["n"], most.get("clips"))
        brackets = f" ({interval_kind(most['n'])} in brackets)" if "[" in near[0] else ""
        yield f"{name} against {reference}, over {over}: {', '.join(near)}{brackets}."
    tested = {m: v["paired"] for m, v in metrics.items() if v["paired"]}
    level = summary["family"]["level"]
    sure = {m: t for m, t in tested.items() if t["p_holm"] is not None and t["p_holm"] <= level}
    if sure:
        changes = ", ".join(f"{metric} by {change(test)}" for metric, test in sure.items())
        yield (
            f"{name} differs from {reference} in {changes} (sign-flip test, {100 * level:g} % over "
            f"{summary['family']['tests']} tests by Holm)."
        )
    rest = [metric for metric in tested if metric not in sure]
    if rest:
        family = summary["family"]
        enough = family["prompts"] >= family["prompts_needed"]
        needed = family["prompts_needed"]
        few = "" if enough else f"; it takes {counted(needed)} or more to be sure of any"
        yield f"{name}: no sure difference in {', '.join(rest)}{few}."
    for metric, value in metrics.items():
        if value["sets"] and value["mean"] is not None:
            null = (
                "" if value["null"] is None else f"; equal sets would show {number(value['null'])}"
            )
            yield f"{name}: {metric} {number(value['mean'])}, {sets_words(value)}{null}."
    yield from drifting(summary, name)


def drifting(summary: dict[str, Any], name: str) -> Iterator[str]:
    """Whether it moves away from the reference over time."""
    policy = summary["policies"][name]
    for metric, found in policy["drift"].items():
        value = policy["metrics"][metric]
        ends = found.get("start_end")
        if not value["against_reference"] or not ends or ends["mean"] is None:
            continue
        if not ends["ci95"]:
            spread = counted(ends["n"], ends.get("clips"))
        else:
            low, high = sorted(map(abs, ends["ci95"]))
            if ends["ci95"][0] <= 0 <= ends["ci95"][1]:
                continue
            spread = interval_words(number(low), number(high), ends.get("n", 0))
        way = "falls" if ends["mean"] > 0 else "rises"
        yield (
            f"{name}: {metric} {way} by {number(abs(ends['mean']))} from the first to the last "
            f"15 % of the frames ({spread})."
        )
        return


def estimate(value: dict[str, Any]) -> str:
    """A mean with its unit and interval."""
    unit = f" {value['unit']}" if value["unit"] else ""
    spread = ""
    if value["ci95"]:
        spread = " [{:.3g}, {:.3g}]".format(*value["ci95"])
    return f"{value['mean']:.3g}{unit}{spread}"


def change(test: dict[str, Any]) -> str:
    """A signed difference with its interval and corrected p."""
    low, high = test["ci95"]
    return (
        f"{test['difference']:+.3g} [{number(low)}, {number(high)}] "
        f"(corrected p = {test['p_holm']:.2g})"
    )
