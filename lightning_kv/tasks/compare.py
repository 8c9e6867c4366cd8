"""Compare videos that somebody else made: the metrics and statistics of a run, without a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.data.pairs import Alignment, read_pair
from lightning_kv.data.videos import VideoError, VideoInfo, probe, read
from lightning_kv.metrics import PixelMetric, Suite
from lightning_kv.metrics.backbones import Backbone
from lightning_kv.metrics.base import Block, noting, read_clip
from lightning_kv.metrics.windows import Windows, passing
from lightning_kv.runs.directory import Record, RunDirectory, fingerprint
from lightning_kv.tasks.comparison import about, check_counts, describe, usual
from lightning_kv.tasks.featured import (
    featured,
    policy_folder,
    read_real,
    real_videos,
    write_features,
)
from lightning_kv.tasks.film import Rows, film, filmed
from lightning_kv.tasks.launch import resolved
from lightning_kv.tasks.options import CompareOptions
from lightning_kv.tasks.overview import conclude
from lightning_kv.tasks.pairing import Clip, Infos, Videos, alignable, find_videos, shortest
from lightning_kv.tasks.progress import FrameProgress
from lightning_kv.tasks.results import fitted

PIECE = 4  # frames read at a time: metrics make several float64 copies of them
UNKNOWN = {  # what a rollout cost cannot be seen in its video
    "kv_bytes_peak": None,
    "kv_bytes_mean": None,
    "kv_rows_read": None,
    "kv_rows_scored": None,
    "kv_read_fraction": None,
    "kv_scored_fraction": None,
    "seconds_per_chunk": [],
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Args:
        run: Where it is.
        summary: Content of ``summary.json``.
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
    torch.set_num_threads(options.threads)
    alignment = Alignment(options.length, options.size, options.fps)
    videos = find_videos(options)
    known = {"pixels", "fps"} | (set() if options.unpaired else {"reference_pixels"})
    if all(clip.prompt for clip in videos.clips):
        known.add("prompt")
    metrics = usual(options) if options.metrics is None else options.metrics
    suite = Suite(metrics, known, options.accept_license)
    real = real_videos(options.real, suite)
    device = "cuda" if resolved(options.accelerator) == "gpu" else "cpu"
    infos = {path: probed(path, options.strict) for path in paths_of(videos)}
    described = describe(options, videos, suite, infos, real, device)
    run = RunDirectory(options.out)
    run.open(fingerprint(described), described, about(options, videos, suite, infos, device))
    job = _Job(run, suite, alignment, infos, options.strict, device)
    unread = read_real(run, real, job.encoders)
    if options.strict:
        refuse_skipped(unread, run.records())
    done = job.finished()
    seen = set(sorted({clip.key for clip in videos.clips})[: options.videos])
    with FrameProgress(job.frames(videos, done)) as job.progress:
        for clip in videos.clips:
            job.clip(clip, videos, done)
            if clip.key in seen:
                job.film(clip, videos)
    records = run.records()
    notes = (*videos.notes, *unjudged(records))
    return Compared(run, conclude(run), notes, (*unread, *failures(records)))


class _Job:
    """Measures clips and writes their records."""

    progress: FrameProgress

    def __init__(
        self,
        run: RunDirectory,
        suite: Suite,
        alignment: Alignment,
        infos: Infos,
        strict: bool,
        device: str,
    ) -> None:
        self.run, self.alignment, self.infos, self.strict = run, alignment, infos, strict
        self.failed = {(r["policy"], r["key"]) for r in run.records() if r["failure"]}
        self.metrics: dict[str, PixelMetric] = {
            name: metric.to(device) for name, metric in suite.clip_metrics().items()
        }
        self.encoders = {name: each.to(device) for name, each in suite.encoders().items()}
        self.sets = {n: suite.made[n].name for n in suite.made if suite.choices[n].of_sets}

    def finished(self) -> set[tuple[str, str]]:
        """What an earlier call has left nothing to do for, by name and key."""
        return {
            (record["policy"], record["key"])
            for record in self.run.records()
            if record["failure"]
            or not self.encoders
            or featured(policy_folder(self.run, record["policy"]), record["key"])
        }

    def frames(self, videos: Videos, done: set[tuple[str, str]]) -> int:
        """Frames that are left to read."""
        limits = {clip.key: shortest(clip, self.infos, self.alignment) for clip in videos.clips}
        return sum(
            limits[key] or self.infos[path].frames
            for name, paths in videos.files.items()
            for key, path in paths.items()
            if (name, key) not in done and isinstance(self.infos[path], VideoInfo)
        )

    def clip(self, clip: Clip, videos: Videos, done: set[tuple[str, str]]) -> None:
        """Measure what is not measured of a clip: the reference alone, candidates against it."""
        if clip.reference is not None and (videos.reference, clip.key) not in done:
            self._measure(videos.reference, clip, clip.reference, None)
        for name, path in clip.candidates.items():
            if (name, clip.key) not in done:
                self._measure(name, clip, path, clip.reference)

    def _measure(self, name: str, clip: Clip, path: Path, reference: Path | None) -> None:
        prompt = clip.prompt or clip.key
        record = {"policy": name, "key": clip.key, "prompt": prompt, "cost": UNKNOWN}
        if clip.prompt:  # several samples of one prompt are no independent clips
            record["unit"] = clip.prompt
        empty = {"metrics": dict.fromkeys(self.metrics), "curves": {}}
        try:
            found = self._read(name, clip, path, reference)
        except ValueError as error:
            if self.strict:
                raise
            log.warning("Skipped: %s", error)
            self.failed.add((name, clip.key))
            found = empty | {"failure": str(error)}
        self.run.append(0, record | found)

    def _read(self, name: str, clip: Clip, path: Path, reference: Path | None) -> dict[str, Any]:
        """Everything about one video, in one pass over its frames."""
        able = {
            key: metric
            for key, metric in self.metrics.items()
            if reference is not None or not metric.against_reference()
        }
        info, problems = self._info(path), None if self.strict else {}
        windows = {key: _Windows(each, key, problems) for key, each in self.encoders.items()}
        self.progress.begin(f"{name} {clip.key}")
        limit = shortest(clip, self.infos, self.alignment)
        blocks = self.progress.counted(self._blocks(info, reference, limit))
        shown = passing(blocks, list(windows.values()))
        curves = read_clip(able, shown, clip.prompt or None, float(info.fps), problems)
        values = {key: able[key].value(curve) for key, curve in curves.items()}
        features = {key: each.features() for key, each in windows.items()}
        write_features(policy_folder(self.run, name), clip.key, features)
        return {
            "metrics": dict.fromkeys(self.metrics) | values,
            "curves": {key: _plain(curve) for key, curve in curves.items()},
            "problems": self._named(problems or {}),
            "failure": None,
        }

    def _named(self, problems: Mapping[str, str]) -> dict[str, str]:
        """Problems by metric: those of an encoder are of every metric that looks through it."""
        names = {name: self.sets.get(name, name) for name in (*self.metrics, *self.sets)}
        return {name: problems[of] for name, of in names.items() if of in problems}

    def _blocks(
        self, info: VideoInfo, reference: Path | None, limit: int | None
    ) -> Iterator[Block]:
        """Frames of a video as floats, with those of its reference."""
        if reference is None:
            for (pixels,) in cut(((block,) for block in read(info, PIECE)), limit):
                yield _floats(pixels), None
            return
        pairs = read_pair(self._info(reference), info, self.alignment, PIECE)
        for right, judged in cut(pairs, limit):
            yield _floats(judged), _floats(right)

    def film(self, clip: Clip, videos: Videos) -> None:
        """A moving picture of a clip and its candidates, unless it is there.

        What has failed is left out.
        """
        reference = self.infos.get(clip.reference)
        able = {
            name: info
            for name, info in alignable(clip, self.infos, self.alignment).items()
            if (name, clip.key) not in self.failed
        }
        if not able or filmed(self.run, clip.key):
            return
        limit = shortest(clip, self.infos, self.alignment) or reference.frames
        names = [videos.reference, *able]

        def rows() -> Iterator[Rows]:
            pairs = [read_pair(reference, info, self.alignment, PIECE) for info in able.values()]
            shown = (
                (each[0][0], *(judged for _, judged in each)) for each in zip(*pairs, strict=False)
            )
            for pieces in cut(shown, limit):
                yield [
                    (name, fitted(_floats(pixels), 480))
                    for name, pixels in zip(names, pieces, strict=True)
                ]

        film(self.run, clip.key, rows, limit, float(reference.fps), videos.reference)

    def _info(self, path: Path) -> VideoInfo:
        info = self.infos[path]
        if isinstance(info, VideoError):
            raise info
        return info


class _Windows(Windows):
    """Windows of an encoder that may be unable to judge a clip, which then has none."""

    def __init__(self, encoder: Backbone, name: str, problems: dict[str, str] | None) -> None:
        super().__init__(encoder)
        self.name, self.problems = name, problems

    def add(self, pixels: Tensor) -> None:
        if self.problems is None or self.name not in self.problems:
            with noting(self.problems, self.name):
                super().add(pixels)
                return
        self.held, self.found = [], []


def cut(pieces: Iterable[tuple[Tensor, ...]], limit: int | None) -> Iterator[tuple[Tensor, ...]]:
    """As many frames of the videos as the shortest piece has each time, up to a limit."""
    left = sys.maxsize if limit is None else limit
    for piece in pieces:
        frames = min(left, *map(len, piece))
        if not frames:
            return
        yield tuple(pixels[:frames] for pixels in piece)
        left -= frames


def _floats(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def _plain(curve: Tensor) -> list[float | None]:
    return [None if value != value else value for value in curve.tolist()]


def probed(path: Path, strict: bool) -> VideoInfo | VideoError:
    """What a file holds, or why it cannot be read."""
    try:
        return probe(path)
    except VideoError as error:
        if strict:
            raise
        return error


def paths_of(videos: Videos) -> list[Path]:
    """Every file once."""
    return list(dict.fromkeys(path for own in videos.files.values() for path in own.values()))


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


def refuse_skipped(unread: Iterable[str], records: Iterable[Record]) -> None:
    """Refuse to go on where an earlier call skipped something, or the real set has a bad file.

    Raises:
        ValueError: It has.
    """
    records = list(records)
    if skipped := [*unread, *failures(records), *unjudged(records)]:
        raise ValueError(
            f"{len(skipped)} videos or metrics were skipped, which --strict does not allow. The "
            f"first: {skipped[0].rstrip('.')}. Leave --strict out, or repair this and compare into "
            "a new directory."
        )
