"""Videos of the best, the median and the worst prompt, with how they differ."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_kv.report.entries import PageRun
from lightning_kv.report.prompts import Ranked
from lightning_kv.report.table import NOTHING, format_number
from lightning_kv.runs.directory import Record


def with_video(run: PageRun, records: Sequence[Record]) -> set[str]:
    """Keys of the prompts that have a video."""
    there = {path.name for path in run.directory.videos.glob("*.mp4")}
    return {record["key"] for record in records if video_name(record["key"]) in there}


def video_name(key: str) -> str:
    """The file of a prompt's video.

    >>> video_name("street/007")
    'street__007.mp4'
    """
    return f"{key.replace('/', '__')}.mp4"


def player(run: PageRun, rank: str, prompt: Ranked) -> dict[str, Any]:
    """A video, the same as differences where there is one, and every policy's value."""
    name, directory = video_name(prompt.key), run.directory
    return {
        "rank": rank,
        "prompt": prompt,
        "source": _address(directory.videos / name),
        "difference": _address(directory.differences / name),
        "gain": run.summary["run"].get("difference_gain"),
        "values": [
            (policy, NOTHING if value is None else format_number(value, abs(value)))
            for policy, value in prompt.values.items()
        ],
    }


def data_uri(kind: str, content: bytes) -> str:
    """Content as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _address(path: Path) -> str:
    """A video as an address; empty where there is none."""
    return data_uri("video/mp4", path.read_bytes()) if path.is_file() else ""
