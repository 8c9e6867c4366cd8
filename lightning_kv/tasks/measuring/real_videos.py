"""Real videos that sets of clips are compared with: found, and shown to the encoders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_kv.data.pairs import videos_in
from lightning_kv.data.tars import Member, members
from lightning_kv.data.videos import SUFFIXES, VideoError, VideoFile, read
from lightning_kv.metrics.suite import Suite
from lightning_kv.metrics.windows import WindowEncoder
from lightning_kv.runs.features import FeatureStore

log = logging.getLogger(__name__)


def real_videos(folder: Path | None, suite: Suite) -> dict[str, VideoFile]:
    """The videos of ``--real`` by their key; none without a folder.

    A shard, a tar file of videos, gives a key ``SHARD::NAME`` for each.

    Raises:
        ValueError: There are none in the folder, two of one name, a tar cannot be read, or no
            metric looks at them.
    """
    if folder is None:
        return {}
    if not suite.set_metrics():
        raise ValueError(
            f"--real {folder} does nothing: no metric compares sets. Leave it out, or name one: "
            "--metrics [fvd/i3d]."
        )
    found: dict[str, VideoFile] = dict(videos_in(folder))
    for shard in sorted(folder.rglob("*.tar")):
        if shard.name.startswith("."):  # hidden, as videos of a folder may be
            continue
        key = shard.relative_to(folder).with_suffix("").as_posix()
        videos = (each for each in members(shard) if each.suffix.lower() in SUFFIXES)
        found |= {f"{key}::{each.name}": each for each in videos}
    if found:
        return found
    raise ValueError(
        f"There are no videos in --real {folder}. Given none of {', '.join(SUFFIXES)}, there or in "
        "its .tar shards. Give a folder of videos, or one of shards that hold some."
    )


def on_disk(video: VideoFile) -> Path:
    """The file that a video lies in: itself, or its shard."""
    return video.tar if isinstance(video, Member) else video


def encode_real(
    key: str, video: VideoFile, encoders: Mapping[str, WindowEncoder], store: FeatureStore | None
) -> dict[str, Tensor]:
    """Features of a real video by encoder, from the store where it has them.

    Raises:
        VideoError: It is damaged, or too short for a window.
    """
    if store is not None and (held := store.read(None, key)) is not None:
        return {name: torch.from_numpy(each) for name, each in held.items()}
    windows = {name: encoder.windows() for name, encoder in encoders.items()}
    for block in read(video):
        for each in windows.values():
            each.add(block.float() / 255)
    found = {name: each.features() for name, each in windows.items()}
    if not all(len(rows) for rows in found.values()):
        longest = max(each.length for each in windows.values())
        raise VideoError(f"shorter than a window of {longest} frames")
    if store is not None:
        store.write(None, key, {name: each.numpy() for name, each in found.items()})
    return found
