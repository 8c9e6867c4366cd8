"""`lightning-kv compare`: videos that somebody else made, with the metrics of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_kv.data.datamodule import VideoPairDataModule
from lightning_kv.data.pairs import Alignment, pair_csv, pair_folders
from lightning_kv.data.video_pairs import Videos, apart, joined
from lightning_kv.data.videos import VideoError
from lightning_kv.report.entries import run_names
from lightning_kv.runs.directory import Record, RunDirectory
from lightning_kv.tasks.callbacks import RecordWriter
from lightning_kv.tasks.compare import CompareModule, FrameProgressBar, PairVideos
from lightning_kv.tasks.launch import is_first, launched, trainer_for
from lightning_kv.tasks.options import CompareOptions, TrainerOptions


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Args:
        run: Where it is.
        summary: Content of ``summary.json``; empty on other ranks than the first.
        notes: What has no partner, and which metrics cannot judge some of the videos.
        skipped: What could not be read or compared, and why.
    """

    run: RunDirectory
    summary: dict[str, Any]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def compare(options: CompareOptions) -> Compared:
    """Measure every video against its partner; go on with what an earlier call left unfinished.

    Raises:
        ValueError: Anything that does not fit, before anything is written; and where ``strict``, a
            video that cannot be read, compared or judged, now or in an earlier call.
    """
    check_counts(options)
    settings = launched(TrainerOptions(options.devices, options.accelerator))
    torch.set_num_threads(options.threads)
    alignment = Alignment(options.length, options.size, options.fps)
    videos = find_videos(options)
    data = VideoPairDataModule(videos, alignment, options.workers)
    check_readable(data, options.strict)
    module = CompareModule(
        videos.names,
        videos.reference,
        options.metrics,
        paired=not options.unpaired,
        prompts=all(clip.prompt for clip in videos.clips),
        alignment=alignment,
        places=videos.places,
        real=options.real,
        accept_license=options.accept_license,
        strict=options.strict,
    )
    module.warns = False  # the table and the notes say it
    writer = RecordWriter(options.out)
    pictures = PairVideos(options.out, options.videos)
    trainer = trainer_for(settings, [writer, pictures, FrameProgressBar()], logger=False)
    if is_first():
        writer.open(trainer, module, data)
        if options.strict:
            refuse_skipped(writer.run.records())
    trainer.test(module, datamodule=data, verbose=False)
    records = writer.run.records()
    notes = (*videos.notes, *unjudged(records))
    return Compared(writer.run, writer.summary, notes, (*module.skipped, *failures(records)))


def check_counts(options: CompareOptions) -> None:
    """Refuse numbers that count nothing.

    Raises:
        ValueError: No threads, or fewer than no videos or workers.
    """
    if options.threads < 1 or options.videos < 0 or options.workers < 0:
        raise ValueError(
            f"--threads {options.threads}, --videos {options.videos} and --workers "
            f"{options.workers} cannot be. Use 1 thread or more, and 0 moving pictures and workers "
            "or more."
        )


def find_videos(options: CompareOptions) -> Videos:
    """The videos of two folders or more, or of a table of pairs.

    Raises:
        ValueError: Both or neither are given, a folder twice, or there is nothing to compare.
    """
    folders = [*([options.reference] if options.reference else []), *options.candidates]
    if options.pairs is not None:
        if folders or options.unpaired:
            raise ValueError(
                f"--pairs {options.pairs} says what is compared, and so do "
                f"{', '.join(map(str, folders)) or '--unpaired'}. Give one or the other."
            )
        found = joined("reference", {"candidate": pair_csv(options.pairs)})
        return replace(found, places=dict.fromkeys(found.names, str(options.pairs)))
    if len(folders) < 2:
        raise ValueError(
            f"Nothing to compare: {len(folders)} folder was given. Give the folder of the "
            "reference and one candidate or more, or --pairs FILE.csv."
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"A folder is given twice: {', '.join(map(str, folders))}. Give each once."
        )
    names = run_names(folders)
    places = {name: str(folder) for name, folder in zip(names, folders, strict=True)}
    if options.unpaired:
        return replace(apart(names, folders), places=places)
    pairs = {
        name: pair_folders(folders[0], folder)
        for name, folder in zip(names[1:], folders[1:], strict=True)
    }
    return replace(joined(names[0], pairs), places=places)


def check_readable(data: VideoPairDataModule, strict: bool) -> None:
    """Refuse a comparison of nothing, and where ``strict`` one with a video that has no header.

    Raises:
        ValueError: It is one.
    """
    broken = [info for info in data.infos.values() if isinstance(info, VideoError)]
    if broken and strict:
        raise broken[0]
    if len(broken) == len(data.infos):
        raise ValueError(f"None of {len(broken)} videos can be read. The first: {broken[0]}")


def failures(records: Iterable[Record]) -> list[str]:
    """The videos that could not be used, and why."""
    return [f"{r['policy']} {r['key']}: {r['failure']}" for r in records if r.get("failure")]


def unjudged(records: Iterable[Record]) -> list[str]:
    """The metrics that cannot judge some of the videos, and why."""
    found: dict[str, list[str]] = {}
    for record in records:
        for metric, why in (record.get("problems") or {}).items():
            found.setdefault(metric, []).append(f"{record['policy']} {record['key']}: {why}")
    return [
        f"{metric} has no value for {len(videos)} videos. The first: {videos[0]}"
        for metric, videos in found.items()
    ]


def refuse_skipped(records: Iterable[Record]) -> None:
    """Refuse to go on where an earlier call skipped something.

    Raises:
        ValueError: It has.
    """
    records = list(records)
    if skipped := [*failures(records), *unjudged(records)]:
        raise ValueError(
            f"{len(skipped)} videos or metrics were skipped, which --strict does not allow. The "
            f"first: {skipped[0].rstrip('.')}. Leave --strict out, or repair this and compare into "
            "a new directory."
        )
