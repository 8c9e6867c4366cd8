"""From the records of a calibration to its file, and what is to be said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_kv.calibration.reduction import Reduced, reduced
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.policies.curve_statistics import am_gm
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibration.checks import (
    advice,
    agreement,
    looks,
    plain,
    sentences_of,
    structure,
)
from lightning_kv.tasks.calibration.labels import write_labels
from lightning_kv.tasks.calibration.records import CalibrationDirectory, Wanted, mark_of
from lightning_kv.utilities.formatting import number, percent, several


@dataclass(frozen=True, eq=False)
class Calibration:
    """What came of a calibration.

    Args:
        curves: As they were written.
        words: What is to be said of them, in sentences.
        labels: Tables of labels that were written.
    """

    curves: HeadCurves
    words: tuple[str, ...]
    labels: tuple[Path, ...]


@dataclass(frozen=True)
class Task:
    """What a calibration is told beside its records.

    Args:
        settings: What was measured in a pass.
        mean: Budget that the stopping rule is asked about, history frames per head.
        chunk: Frames of a chunk.
        horizon: Frames that the model was trained on.
        about: What the file says of model, cache, data, settings and software.
    """

    settings: SiteSettings
    mean: float
    chunk: int
    horizon: int
    about: Mapping[str, Any]


def conclude(
    run: CalibrationDirectory, wanted: Mapping[str, Wanted], task: Task, out: Path
) -> Calibration:
    """Read all records that are asked for, write the file, and say how far it can be trusted.

    Args:
        run: The records.
        wanted: Clips by key, in the order in which they were asked for.
        task: What else there is to know.
        out: The file; labels go into a folder of its name.

    Raises:
        ValueError: Fewer than two prompts have a record.
    """
    done = sorted(run.finished(wanted))
    units = list(dict.fromkeys(own.sample.key for key, own in wanted.items() if key in done))
    check_enough(len(units), "were measured")
    found = reduced(map(run.read, done), task.settings, round(task.mean))
    validated = sorted({wanted[key].sample.key for key in done if wanted[key].validates})
    curves = found.curves(validated)
    order = [found.prompts.index(unit) for unit in units]
    scorer = task.settings.scorers[0]
    metric = "exact" if f"{scorer}/exact" in curves.curves else found.metric
    seen = looks(curves, order, scorer, metric, task.mean)
    checks = agreement(found, validated, task.mean) | {
        "am_gm": am_gm(curves.prompts(scorer, metric).mean(0)[..., 0]),
        "structure": structure(curves, scorer, metric),
        "mean": task.mean,
        "looks": [plain(each) for each in seen],
        "stopped_at": seen[-1].prompts if seen[-1].stop else None,
        "regret90": seen[-1].regret,
    }
    name = task.about["model"]["name"]
    tables, said = write_labels(found, task.chunk, task.horizon, name, out)
    told = {"checks": checks, "labels": [path.name for path in tables]}
    told |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    about = _about(task, found, {key: wanted[key] for key in done}) | told
    curves = replace(curves, about=about)
    curves.save(out)
    words = (*_first(out, curves), *sentences_of(checks), *advice(seen[-1], task.mean), *said)
    return Calibration(curves, words, tables)


def _about(task: Task, found: Reduced, done: Mapping[str, Wanted]) -> dict[str, Any]:
    """What the file says of model, cache, data and settings."""
    marks = [[key, mark_of(own.sample)] for key, own in done.items()]
    data = {"prompts": list(found.prompts), "clips": len(done)}
    data |= {"fingerprint": f"sha256:{fingerprint({'clips': marks})}"}
    settings = task.settings
    gram = {"scorer": settings.scorers[0], "frames": round(task.mean)} if settings.probes else None
    told = dict(task.about)
    return told | {"data": told["data"] | data, "settings": told["settings"] | {"gram": gram}}


def _first(out: Path, curves: HeadCurves) -> list[str]:
    """What was written, and how far heads differ."""
    prompts, (layers, heads) = len(curves.about["data"]["prompts"]), curves.shape
    found = [
        f"{out}: {several(prompts, 'prompt')}, {len(curves.curves)} curves of {layers} x {heads} "
        f"heads at {len(curves.budgets)} budgets ({curves.budgets[0]} to {curves.reach} frames)."
    ]
    checks = curves.about["checks"]
    if (spread := checks["am_gm"]) is not None:
        found.append(
            f"AM/GM of what heads lose with the least: {number(spread)}. If all heads decayed "
            "alike, uniform budgets would lose so many times what the best ones lose."
        )
    if (share := checks["structure"]["off_median"]) is not None:
        found.append(f"Heads that surely differ from the median head: {percent(share)}.")
    return found


def check_enough(count: int, what: str) -> None:
    """Refuse fewer prompts than tell their own noise.

    Raises:
        ValueError: There are fewer than two.
    """
    if count < 2:
        raise ValueError(
            f"Too few prompts: {count} {what}, and one tells nothing of its own noise. Give 2 or "
            "more; 8 for the first look of the stopping rule, which is mostly content with 16 to "
            "32."
        )
