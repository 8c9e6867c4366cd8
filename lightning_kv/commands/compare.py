"""`lightning-kv compare`: videos that somebody else made, with the metrics of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import console, quiet, say, tell
from lightning_kv.tasks.options import TrainerOptions

if TYPE_CHECKING:  # they take seconds
    from lightning_kv.runs.directory import RunDirectory


@dataclass(frozen=True)
class CompareOptions:
    """The metrics and statistics of a run, for videos you already have.

    Args:
        folders: Reference, then candidates (see --pairs).
        out: Run directory; an unfinished comparison goes on there.
        pairs: Instead of folders: reference,candidate[,key] (none).
        metrics: See `list metrics`, or package.module:Class (all without weights).
        length: Equal, or shortest: cut a clip's videos to the shortest.
        resize: Bring candidates to the size of the reference.
        fps: Equal, or ignore: compare frame by frame all the same.
        unpaired: Names do not match: compare sets, each video alone.
        real: Real videos that sets are compared with (the reference).
        accept_license: Agree to that of non-commercial weights, such as cc-by-nc-4.0.
        strict: Stop at the first video that cannot be used.
        videos: Pairs that get a comparison video.
        threads: CPU threads per process.
        workers: Processes per device that read ahead.
        trainer: Where it runs.
    """

    out: Path
    folders: tuple[Path, ...] = ()
    pairs: Path | None = None
    metrics: tuple[str | dict[str, Any], ...] | None = None
    length: str = "equal"
    resize: bool = False
    fps: str = "equal"
    unpaired: bool = False
    real: Path | None = None
    accept_license: tuple[str, ...] = ()
    strict: bool = False
    videos: int = 3
    threads: int = 1
    workers: int = 0
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


def run(options: CompareOptions) -> int | None:
    """Compare, and show the table; exit code 1 where a video was skipped."""
    from lightning_kv.report.table import render_tables
    from lightning_kv.runs.verdict import verdict

    quiet()
    found, out = compare(options), console()
    if not found.summary:  # another rank tells
        return None
    out.print(render_tables(found.summary))
    say(out, verdict(found.summary, found.run.records()))
    if notes := [*found.notes, *(f"Skipped: {why}" for why in found.skipped)]:
        tell(notes)
    out.print(f"Results are in {found.run.path}: {found.run.report.name}, summary.json, records/")
    return 1 if found.skipped else None


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
    import torch

    from lightning_kv.data.datamodule import VideoPairDataModule
    from lightning_kv.data.pairs import Alignment
    from lightning_kv.tasks.callbacks import FrameProgressBar, PairVideos, RecordWriter
    from lightning_kv.tasks.class_paths import metrics_of
    from lightning_kv.tasks.compare import (
        CompareModule,
        failures,
        paired_videos,
        refuse_skipped,
        unjudged,
    )
    from lightning_kv.tasks.trainer import is_first, launched, trainer_for

    check_counts(options)
    settings = launched(options.trainer)
    torch.set_num_threads(options.threads)
    alignment = Alignment(options.length, "resize" if options.resize else "equal", options.fps)
    videos = paired_videos(options.folders, options.pairs, options.unpaired)
    data = VideoPairDataModule(videos, alignment, options.workers)
    data.check_readable(options.strict)
    module = CompareModule(
        videos.names,
        videos.reference,
        metrics_of(options.metrics),
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
    trainer = trainer_for(
        settings,
        [writer, pictures],
        FrameProgressBar(),
        options.out,
        enable_checkpointing=False,
    )
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
            f"{options.workers} cannot be. Use 1 thread or more, and 0 videos and workers "
            "or more."
        )


COMMAND = Command(
    "compare",
    CompareOptions,
    run,
    """\
Videos are paired by file name. A comparison goes on in its directory where it was left. What can
not be read is skipped, said, and gives exit code 1.

examples:
  lightning-kv compare full/ mine/ theirs/ --out runs/compared
  lightning-kv compare --pairs pairs.csv --out runs/compared --length shortest
  lightning-kv compare real/ mine/ --unpaired --metrics [fvd/i3d,kvd/i3d] --out runs/sets""",
    positional={"folders": "FOLDER"},
    metavars={"out": "DIR", "pairs": "CSV", "real": "FOLDER", "accept_license": "ID,..."},
)
