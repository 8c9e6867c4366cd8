"""Measure videos that somebody else made, each against its partner, while their frames go by."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.data.datamodule import VideoPairDataModule
from lightning_kv.data.pairs import Alignment, pair_csv, pair_folders
from lightning_kv.data.video_pairs import Piece, Videos, apart, joined
from lightning_kv.data.videos import VideoError
from lightning_kv.metrics.base import VideoMetric
from lightning_kv.metrics.reading import ClipReader, noting
from lightning_kv.metrics.suite import Suite
from lightning_kv.metrics.windows import WindowEncoder
from lightning_kv.report.entries import run_names
from lightning_kv.runs.directory import Record
from lightning_kv.runs.verdict import FILES
from lightning_kv.tasks.measuring.adapter import Measured
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.real_videos import real_videos
from lightning_kv.utilities.formatting import several

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


class CompareModule(ClipModule):
    """Measures videos, the reference alone and candidates against it.

    Run it with ``Trainer(...).test(module, datamodule=VideoPairDataModule(...))``.

    Args:
        names: The reference, then the candidates.
        reference: Name of the reference.
        metrics: Names and metrics; all that tell two videos apart and need no weights where None.
        paired: Whether candidates have partners.
        prompts: Whether every clip has a prompt.
        alignment: What is done where two videos differ; part of the recipes.
        places: Folder or table that the videos of a name come from, for the report.
        real: Folder of real videos that sets are compared with; the reference where None.
        accept_license: Licences accepted for weights that forbid commercial use.
        strict: Whether a video that cannot be read, compared or judged is an error.

    Raises:
        ValueError: A metric is unknown, or needs what videos do not have.
    """

    data_kind = VideoPairDataModule

    def __init__(
        self,
        names: Sequence[str],
        reference: str,
        metrics: Sequence[Any] | None = None,
        *,
        paired: bool = True,
        prompts: bool = False,
        alignment: Alignment | None = None,
        places: Mapping[str, str] | None = None,
        real: str | Path | None = None,
        accept_license: Sequence[str] = (),
        strict: bool = False,
    ) -> None:
        known = {"pixels", "fps"} | ({"reference_pixels"} if paired else set())
        chosen = usual(paired) if metrics is None else metrics
        suite = Suite(chosen, known | ({"prompt"} if prompts else set()), accept_license)
        super().__init__(
            suite, names, reference, real_videos(None if real is None else Path(real), suite)
        )
        self.paired, self.alignment, self.strict = paired, alignment or Alignment(), strict
        self.places = dict(places or {})
        self._reading: dict[tuple[str, str], _Reading] = {}

    def describe(self) -> dict[str, Any]:
        """Everything that the numbers depend on beside the data."""
        return {"reference": self.reference_name}

    def about(self) -> dict[str, Any]:
        """What a report must know."""
        return {
            "policies": {name: {"folder": self.places.get(name, name)} for name in self.names},
            "run": {
                "context_frames": 0,
                "alignment": asdict(self.alignment),
                "unpaired": not self.paired,
            },
            "model": {"name": FILES},
        }

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is known about the metrics; how videos were brought together is of the recipe."""
        facts = super().facts()
        if not self.paired or self.alignment == Alignment():
            return facts
        way = self.alignment.recipe
        return {
            name: each | {"recipe": each["recipe"] and f"{each['recipe']}; {way}"}
            for name, each in facts.items()
        }

    def on_test_start(self) -> None:
        """Show the real videos to the encoders.

        Raises:
            ValueError: One cannot be used and the module is strict, or none can.
        """
        super().on_test_start()
        if self.strict and self.skipped:
            raise ValueError(
                f"{len(self.skipped)} real videos cannot be used, which --strict does not allow. "
                f"The first: {self.skipped[0]}. Repair or remove them, or leave --strict out."
            )

    def misfit(self, batch: Any) -> str | None:
        """What is wrong with a batch; None where nothing is."""
        if not isinstance(batch, Piece):
            return f"not a Piece, but {type(batch).__name__}"
        if batch.name not in self.names:
            return f"videos of {', '.join(self.names)} are due, not of {batch.name!r}"
        return None

    def forget(self) -> None:
        """Start anew: no clip is known, and none is half read."""
        super().forget()
        self._reading.clear()

    def test_step(self, batch: Piece, batch_idx: int) -> dict[str, list[ClipResult]]:
        """Some frames of a video; what is measured of it comes with the last of them.

        Args:
            batch: The frames.
            batch_idx: Unused.

        Returns:
            A ``ClipResult``, or nothing yet, under ``clips``.
        """
        place = (batch.name, batch.key)
        if batch.failure and self.strict:
            raise VideoError(batch.failure)
        if place not in self._reading:
            self._reading[place] = self._begin(batch)
        reading = self._reading[place]
        if not batch.failure:
            reading.read(batch)
        if not batch.ends:
            return {"clips": []}
        del self._reading[place]
        result = self._result(batch, reading)
        self.add(result)
        return {"clips": [result]}

    def _begin(self, piece: Piece) -> _Reading:
        able = {
            name: metric
            for name, metric in self.metrics_of(piece.name).items()
            if piece.target is not None or not metric.against_reference()
        }
        return _Reading(able, self.encoders, piece, None if self.strict else {})

    def _result(self, piece: Piece, reading: _Reading) -> ClipResult:
        names = [*self.metrics_of(piece.name)]
        measured = Measured(dict.fromkeys(names))
        if piece.failure:
            log.warning("Skipped: %s", piece.failure)
        else:
            measured = reading.measured(names)
            measured.problems = self._named(measured.problems)
        return ClipResult(
            name=piece.name,
            key=piece.key,
            unit=piece.unit,
            prompt=piece.prompt or piece.key,
            measured=measured,
            cost=dict(UNKNOWN),
            failure=piece.failure,
            last=piece.last,
        )

    def _named(self, problems: Mapping[str, str]) -> dict[str, str]:
        """Problems by metric: those of an encoder are of every metric that looks through it."""
        through = {name: self.suite.encoder_of(name) for name in self.suite.set_metrics()}
        of = {name: name for name in self.suite.clip_metrics()} | through
        return {name: problems[each] for name, each in of.items() if each in problems}


class _Reading:
    """One video whose frames go by."""

    def __init__(
        self,
        metrics: Mapping[str, VideoMetric],
        encoders: Mapping[str, WindowEncoder],
        piece: Piece,
        problems: dict[str, str] | None,
    ) -> None:
        self.metrics, self.problems = metrics, problems
        self.reader = ClipReader(metrics, piece.prompt or None, piece.fps, problems)
        self.windows = {name: encoder.windows() for name, encoder in encoders.items()}

    def read(self, piece: Piece) -> None:
        """Show the frames to metrics and encoders."""
        pixels, target = floats(piece.pixels), piece.target
        self.reader.read((pixels, None if target is None else floats(target)))
        for name in list(self.windows):
            with noting(self.problems, name):
                self.windows[name].add(pixels)
                continue
            del self.windows[name]  # it cannot judge this video

    def measured(self, names: Sequence[str]) -> Measured:
        """What was found."""
        curves = self.reader.curves()
        values = {name: self.metrics[name].value(curve) for name, curve in curves.items()}
        found = {name: each.features() for name, each in self.windows.items()}
        return Measured(dict.fromkeys(names) | values, curves, found, dict(self.problems or {}))


def usual(paired: bool) -> list[str]:
    """Metrics where nobody says: all that tell two videos apart and need no weights."""
    alone = ["temporal_flicker", "sharpness", "brightness", "colourfulness"]
    return ["psnr", "ssim", *alone] if paired else alone


def floats(pixels: Tensor) -> Tensor:
    """8-bit pixels in [0, 1]."""
    return pixels.to(torch.float32) / 255


def paired_videos(
    folders: Sequence[Path], pairs: Path | None = None, unpaired: bool = False
) -> Videos:
    """The videos of two folders or more, or of a table of pairs.

    Args:
        folders: That of the reference, then those of the candidates.
        pairs: Instead of folders a table ``reference,candidate[,key][,prompt]``.
        unpaired: Names do not match: the folders are compared as sets.

    Raises:
        ValueError: Both or neither are given, a folder twice, or there is nothing to compare.
    """
    if pairs is not None:
        if folders or unpaired:
            raise ValueError(
                f"--pairs {pairs} says what is compared, and so do "
                f"{', '.join(map(str, folders)) or '--unpaired'}. Give one or the other."
            )
        found = joined("reference", {"candidate": pair_csv(pairs)})
        return replace(found, places=dict.fromkeys(found.names, str(pairs)))
    if len(folders) < 2:
        raise ValueError(
            f"Nothing to compare: given {several(len(folders), 'folder')}. Give the folder of the "
            "reference and one candidate or more, or --pairs FILE.csv."
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"A folder is given twice: {', '.join(map(str, folders))}. Give each once."
        )
    names = run_names(folders)
    places = {name: str(folder) for name, folder in zip(names, folders, strict=True)}
    if unpaired:
        return replace(apart(names, folders), places=places)
    by_name = {
        name: pair_folders(folders[0], folder)
        for name, folder in zip(names[1:], folders[1:], strict=True)
    }
    return replace(joined(names[0], by_name), places=places)


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
