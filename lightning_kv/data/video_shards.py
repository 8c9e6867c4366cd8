"""Videos in shards: what the tars of a set hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_kv.data.records import record_of, text_of
from lightning_kv.data.shards import Shard, ShardIndex, read_index
from lightning_kv.data.tars import Member, grouped
from lightning_kv.data.videos import SUFFIXES, VideoFile

RECORD = 2**20  # bytes of a record, at most


@dataclass(frozen=True)
class VideoSample:
    """A video of a set.

    Args:
        key: Its name in the set.
        video: The file, or the member of a tar.
        prompt: What it shows; empty where nothing is said.
        bytes: Its length as stored.
        shard: What the index says about its tar; None for a file of its own.
        files: The other files of its sample by extension, such as `latents.safetensors`.
    """

    key: str
    video: VideoFile
    prompt: str
    bytes: int
    shard: Shard | None = None
    files: Mapping[str, Member] = field(default_factory=dict)


def videos_in_shards(folder: str | Path, contents: bool = False) -> tuple[VideoSample, ...]:
    """Find the videos of a set of shards; nothing but heads and records is read.

    Args:
        folder: The folder of the set, or its ``index.json``.
        contents: Whether to compare every shard with its checksum as well.

    Returns:
        The videos, in the order of the set.

    Raises:
        ValueError: As `read_index`; or a key comes twice, or a sample has not one video.
    """
    return tuple(_samples(read_index(folder, contents)))


def _samples(index: ShardIndex) -> Iterator[VideoSample]:
    known: dict[str, Path] = {}
    for shard, path in zip(index.shards, index.paths, strict=True):
        samples = grouped(path)
        if len(samples) != shard.samples:
            raise ValueError(
                "The index of shards tells another number of samples than its shard holds. "
                f"{path} holds {len(samples)}, the index says {shard.samples}. Write the set again."
            )
        for key, files in samples.items():
            if key in known:
                raise ValueError(
                    f"Two shards hold one key. Given {key!r} in {known[key]} and {path}. Give "
                    "every sample of a set its own key, and write it again."
                )
            known[key] = path
            yield _sample(f"{key!r} of {path}", key, files, shard)


def _sample(where: str, key: str, files: Mapping[str, Member], shard: Shard) -> VideoSample:
    videos = video_of(files)
    if len(videos) != 1:
        raise ValueError(
            f"A sample has not one video. {where} has {', '.join(files)}. Give every sample of a "
            f"set one file of {', '.join(SUFFIXES)}; prompts alone go to PromptDataModule."
        )
    prompt = ""
    if "json" in files:
        prompt = text_of(read_record(files["json"]), where, needed=False)
    rest = {name: file for name, file in files.items() if file not in videos and name != "json"}
    return VideoSample(key, videos[0], prompt, videos[0].size, shard, rest)


def video_of(sample: Mapping[str, Member]) -> list[Member]:
    """The videos among the files of a sample."""
    return [member for extension, member in sample.items() if f".{extension}" in SUFFIXES]


def read_record(member: Member) -> object:
    """What the record of a sample holds.

    Raises:
        ValueError: It is no JSON in UTF-8, or larger than any record.
    """
    if member.size > RECORD:
        raise ValueError(
            f"A record is too large. {member} has {member.size} bytes. Give {RECORD} at most."
        )
    with member.open() as file:
        return record_of(file.read(), str(member))
