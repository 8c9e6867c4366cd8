"""Compare videos that somebody else made: the metrics and statistics of a run, without a model."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.data.pairs import Alignment, read_pair
from lightning_kv.data.videos import VideoError, VideoInfo, probe, read
from lightning_kv.metrics import PixelMetric, Suite
from lightning_kv.metrics.backbones.weights import checksum
from lightning_kv.metrics.base import Block, read_clip
from lightning_kv.metrics.windows import Windows, passing
from lightning_kv.report.entries import FILES
from lightning_kv.report.records import RunDirectory, fingerprint
from lightning_kv.tasks.featured import (
    featured,
    policy_folder,
    read_real,
    real_videos,
    write_features,
)
from lightning_kv.tasks.film import GAIN, Rows, film, filmed
from lightning_kv.tasks.launch import resolved
from lightning_kv.tasks.options import CompareOptions
from lightning_kv.tasks.overview import conclude
from lightning_kv.tasks.pairing import Clip, Videos, find_videos
from lightning_kv.tasks.progress import FrameProgress
from lightning_kv.tasks.results import fitted, versions

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
        notes: What has no partner.
        skipped: What could not be read or compared, and why.
    """

    run: RunDirectory
    summary: dict[str, Any]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def compare(options: CompareOptions) -> Compared:
    """Measure every video against its partner; go on with what an earlier call left unfinished.

    Raises:
        ValueError: Anything that does not fit, before anything is written.
        VideoError: A video cannot be read or compared, where ``strict``.
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
    described = describe(videos, suite, alignment, infos, real, device)
    run = RunDirectory(options.out)
    run.open(fingerprint(described), described, about(options, videos, suite, infos, device))
    job = _Job(run, suite, alignment, infos, options.strict, device)
    read_real(run, real, job.encoders)
    done = job.finished()
    seen = set(sorted({clip.key for clip in videos.clips})[: options.videos])
    with FrameProgress(job.frames(videos, done)) as job.progress:
        for clip in videos.clips:
            job.clip(clip, videos, done)
            if clip.key in seen:
                film_clip(run, clip, videos, infos, alignment)
    skipped = [
        f"{record['policy']} {record['key']}: {record['failure']}"
        for record in run.records()
        if record.get("failure")
    ]
    return Compared(run, conclude(run), videos.notes, tuple(skipped))


class _Job:
    """Measures clips and writes their records."""

    progress: FrameProgress

    def __init__(
        self,
        run: RunDirectory,
        suite: Suite,
        alignment: Alignment,
        infos: Mapping[Path, VideoInfo | VideoError],
        strict: bool,
        device: str,
    ) -> None:
        self.run, self.alignment, self.infos, self.strict = run, alignment, infos, strict
        self.metrics: dict[str, PixelMetric] = {
            name: metric.to(device) for name, metric in suite.clip_metrics().items()
        }
        self.encoders = {name: each.to(device) for name, each in suite.encoders().items()}

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
        return sum(
            self.infos[path].frames
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
        empty = {"metrics": dict.fromkeys(self.metrics), "curves": {}}
        try:
            found = self._read(name, clip, path, reference)
        except ValueError as error:  # of the file, or of a metric that cannot judge it
            if self.strict:
                raise
            log.warning("Skipped: %s", error)
            found = empty | {"failure": str(error)}
        self.run.append(0, record | found)

    def _read(self, name: str, clip: Clip, path: Path, reference: Path | None) -> dict[str, Any]:
        """Everything about one video, in one pass over its frames."""
        able = {
            key: metric
            for key, metric in self.metrics.items()
            if reference is not None or not metric.against_reference()
        }
        info = self._info(path)
        windows = {key: Windows(encoder) for key, encoder in self.encoders.items()}
        self.progress.begin(f"{name} {clip.key}")
        blocks = self.progress.counted(self._blocks(info, reference))
        curves = read_clip(
            able, passing(blocks, list(windows.values())), clip.prompt or None, float(info.fps)
        )
        values = {key: able[key].value(curve) for key, curve in curves.items()}
        features = {key: each.features() for key, each in windows.items()}
        write_features(policy_folder(self.run, name), clip.key, features)
        return {
            "metrics": dict.fromkeys(self.metrics) | values,
            "curves": {key: _plain(curve) for key, curve in curves.items()},
            "failure": None,
        }

    def _blocks(self, info: VideoInfo, reference: Path | None) -> Iterator[Block]:
        """Frames of a video as floats, with those of its reference."""
        if reference is None:
            yield from ((_floats(block), None) for block in read(info, PIECE))
            return
        for right, judged in read_pair(self._info(reference), info, self.alignment, PIECE):
            yield _floats(judged), _floats(right)

    def _info(self, path: Path) -> VideoInfo:
        info = self.infos[path]
        if isinstance(info, VideoError):
            raise info
        return info


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


def film_clip(
    run: RunDirectory,
    clip: Clip,
    videos: Videos,
    infos: Mapping[Path, VideoInfo | VideoError],
    alignment: Alignment,
) -> None:
    """A moving picture of a clip and its candidates, unless it is there."""
    reference = infos.get(clip.reference)
    able = {
        name: infos[path]
        for name, path in clip.candidates.items()
        if isinstance(infos[path], VideoInfo)
    }
    if not able or not isinstance(reference, VideoInfo) or filmed(run, clip.key):
        return
    total = min(info.frames for info in (reference, *able.values()))

    def rows() -> Iterator[Rows]:
        pairs = [read_pair(reference, info, alignment, PIECE) for info in able.values()]
        for pieces in zip(*pairs, strict=False):
            least = min(len(right) for right, _ in pieces)
            shown = [pieces[0][0], *(judged for _, judged in pieces)]
            names = [videos.reference, *able]
            yield [
                (name, fitted(_floats(pixels[:least])))
                for name, pixels in zip(names, shown, strict=True)
            ]

    try:
        film(run, clip.key, rows, total, float(reference.fps), videos.reference)
    except VideoError as error:  # its record says so too
        log.warning("No moving picture of %s: %s", clip.key, error)


def check_counts(options: CompareOptions) -> None:
    """Refuse numbers that count nothing.

    Raises:
        ValueError: No threads, or fewer than no videos.
    """
    if options.threads < 1 or options.videos < 0:
        raise ValueError(
            f"--threads {options.threads} and --videos {options.videos} cannot be. Use 1 thread or "
            "more, and 0 moving pictures or more."
        )


def usual(options: CompareOptions) -> list[str]:
    """Metrics where nobody says: all that tell two videos apart and need no weights."""
    alone = ["temporal_flicker", "sharpness", "brightness", "colourfulness"]
    return alone if options.unpaired else ["psnr", "ssim", *alone]


def describe(
    videos: Videos,
    suite: Suite,
    alignment: Alignment,
    infos: Mapping[Path, VideoInfo | VideoError],
    real: Mapping[str, Path],
    device: str,
) -> dict[str, Any]:
    """Everything the numbers depend on; of what cannot be read there is no checksum."""
    return {
        "files": {
            name: {
                key: checksum(path) if isinstance(infos[path], VideoInfo) else None
                for key, path in own.items()
            }
            for name, own in videos.files.items()
        },
        "reference": videos.reference,
        "alignment": alignment.recipe,
        "metrics": suite.recipes(),
        "real": {key: checksum(path) for key, path in real.items()},
        "device": device,
        "versions": versions(),
    }


def about(
    options: CompareOptions,
    videos: Videos,
    suite: Suite,
    infos: Mapping[Path, VideoInfo | VideoError],
    device: str,
) -> dict[str, Any]:
    """What a report must know."""
    known = [info for info in infos.values() if isinstance(info, VideoInfo)]
    if not known:
        first = next(iter(infos.values()))
        raise ValueError(f"None of {len(infos)} videos can be read. The first: {first}")
    rates = {float(info.fps) for info in known}
    folders = {videos.reference: options.reference} | dict(
        zip(videos.candidates, options.candidates, strict=False)
    )
    return {
        "reference": videos.reference,
        "policies": {
            name: {"folder": str(folders.get(name) or options.pairs)}
            for name in (videos.reference, *videos.candidates)
        },
        "metrics": suite.facts(),
        "run": {
            "prompts": len(videos.clips),
            "frames": max(info.frames for info in known),
            "context_frames": 0,
            "rate": min(rates),
            "difference_gain": GAIN,
            "size": " ".join(sorted({f"{info.height}x{info.width}" for info in known})),
            "source": " ".join(sorted({info.source for info in known})),
            "alignment": asdict(Alignment(options.length, options.size, options.fps)),
            "unpaired": options.unpaired,
            "device": device,
            "versions": versions() | {"python": platform.python_version()},
        },
        "model": {"name": FILES},
        "videos": options.videos,
        "fps": min(rates),
    }
