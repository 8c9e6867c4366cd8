"""What the numbers of a comparison depend on, and what a report must know about it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_kv.data.pairs import Alignment
from lightning_kv.data.videos import VideoInfo
from lightning_kv.metrics import Suite
from lightning_kv.metrics.backbones.weights import checksum
from lightning_kv.runs.verdict import FILES
from lightning_kv.tasks.film import GAIN
from lightning_kv.tasks.options import CompareOptions
from lightning_kv.tasks.pairing import Infos, Videos
from lightning_kv.tasks.results import versions


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
    options: CompareOptions,
    videos: Videos,
    suite: Suite,
    infos: Infos,
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
        "prompts": {clip.key: clip.prompt for clip in videos.clips if clip.prompt},
        "reference": videos.reference,
        "alignment": Alignment(options.length, options.size, options.fps).recipe,
        "metrics": suite.recipes(),
        "real": {key: checksum(path) for key, path in real.items()},
        "threads": options.threads,
        "device": device,
        "versions": versions(),
    }


def about(
    options: CompareOptions,
    videos: Videos,
    suite: Suite,
    infos: Infos,
    device: str,
) -> dict[str, Any]:
    """What a report must know."""
    alignment = Alignment(options.length, options.size, options.fps)
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
        "metrics": suite.facts() if options.unpaired else aligned(suite.facts(), alignment),
        "run": {
            "prompts": len(videos.clips),
            "frames": max(info.frames for info in known),
            "context_frames": 0,
            "rate": min(rates),
            "difference_gain": GAIN,
            "size": " ".join(sorted({f"{info.height}x{info.width}" for info in known})),
            "source": " ".join(sorted({info.source for info in known})),
            "alignment": asdict(alignment),
            "unpaired": options.unpaired,
            "device": device,
            "versions": versions() | {"python": platform.python_version()},
        },
        "model": {"name": FILES},
        "videos": options.videos,
        "fps": min(rates),
    }


def aligned(facts: dict[str, dict[str, Any]], alignment: Alignment) -> dict[str, dict[str, Any]]:
    """The facts of metrics, with how the videos were brought together in their recipes."""
    if alignment == Alignment():
        return facts
    return {
        name: each | {"recipe": each["recipe"] and f"{each['recipe']}; {alignment.recipe}"}
        for name, each in facts.items()
    }
