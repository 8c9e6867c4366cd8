"""Videos that rollouts go on from: each is a prompt, which is its caption."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from lightning_kv.data.shards import PromptSample, check_shard, world_seed_of
from lightning_kv.data.video_clips import find_videos
from lightning_kv.data.video_shards import VideoSample

NAME = 120  # bytes: file systems take 255, and endings come after it


def context_videos_of(source: str | Path) -> tuple[VideoSample, ...]:
    """Find the videos of a set, all of which say what they show.

    Args:
        source: As `find_videos` takes it; shards are compared with their checksums.

    Returns:
        The videos in the order of the set.

    Raises:
        ValueError: As `find_videos`; or a shard is damaged, a video has no caption, or two would
            have one name in results.
    """
    found = find_videos(source)
    for shard, tar in {sample.shard: sample.video for sample in found if sample.shard}.items():
        check_shard(shard, tar.tar)
    silent = [sample.key for sample in found if not sample.prompt]
    if silent:
        raise ValueError(
            "A rollout needs a prompt, and of a context video it is the caption. "
            f"{len(silent)} of {len(found)} videos in {source} have none, such as "
            f"{', '.join(map(repr, silent[:3]))}. Write it into a .txt file beside the video, into "
            "the column prompt of a table of pairs, or pack shards with `lightning-kv shards make "
            "--captions FILE`."
        )
    names: dict[str, str] = {}
    for sample in found:
        if (other := names.setdefault(result_key(sample), sample.key)) != sample.key:
            raise ValueError(
                f"Two videos have one name in results. Given {other!r} and {sample.key!r} in "
                f"{source}. Give one of them another name."
            )
    return found


def context_prompts(videos: Sequence[VideoSample], seed: int) -> list[PromptSample]:
    """The prompts of videos, in their order.

    Args:
        videos: From `context_videos_of`.
        seed: Of whatever else is drawn for a prompt.
    """
    return [
        PromptSample(
            result_key(sample), sample.prompt, world_seed_of(seed, sample.key), sample.video
        )
        for sample in videos
    ]


def result_key(sample: VideoSample) -> str:
    """Name of a video in results: its key, in which slashes become two underscores.

    Of a long key it is the beginning, with 8 digits of its checksum: files are called so.
    """
    name = sample.key.replace("/", "__")
    content = name.encode(errors="surrogateescape")
    if len(content) <= NAME:
        return name
    return f"{content[: NAME - 9].decode(errors='ignore')}-{sha256(content).hexdigest()[:8]}"
