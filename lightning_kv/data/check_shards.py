"""Whether a set of shards is whole: every file, every sample, every video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_kv.data.records import text_of
from lightning_kv.data.shards import Shard, check_shard, load_index
from lightning_kv.data.tars import Member, grouped, hidden
from lightning_kv.data.video_shards import read_record, video_of
from lightning_kv.data.videos import VideoError, probe


def check_shards(folder: str | Path) -> list[str]:
    """Read a set from end to end and say all that is wrong with it.

    Looked at are the index, the size, checksum and number of samples of every shard, the keys, the
    records, and every picture's place in every video; pictures are not decoded.

    Args:
        folder: The folder of the set, or its ``index.json``.

    Returns:
        A sentence or more for each finding; empty where the set is whole.
    """
    try:
        index = load_index(folder)
    except ValueError as error:
        return [str(error)]
    findings: list[str] = []
    known: dict[str, Path] = {}
    videos = {}
    for shard, path in zip(index.shards, index.paths, strict=True):
        samples = _samples(shard, path, findings)
        for key, sample in samples.items():
            if key in known:
                findings.append(
                    f"{path} holds a key that {known[key]} holds too. Given {key!r}. Give every "
                    "sample of a set its own key."
                )
            known[key] = path
            videos[key] = bool(video_of(sample))
            findings += _wrong(f"{key!r} of {path}", sample)
    if any(videos.values()) and not all(videos.values()):
        alone = [key for key, video in videos.items() if not video]
        findings.append(
            f"Some samples have no video and others do. Given {len(alone)} without, such as "
            f"{alone[0]!r}. Give a set of videos one in every sample."
        )
    for path in sorted(set(index.folder.glob("*.tar")) - set(index.paths)):
        findings.append(
            f"{path} is not in the index. Given {path.stat().st_size} bytes. Take it away, or "
            "write the set again."
        )
    return findings


def _samples(shard: Shard, path: Path, findings: list[str]) -> dict[str, dict[str, Member]]:
    """Samples of a shard, where they can be had."""
    try:
        check_shard(shard, path)
    except ValueError as error:
        findings.append(str(error))
    try:
        samples = grouped(path) if path.is_file() else {}
        left_out = hidden(path) if path.is_file() else []
    except ValueError as error:
        if str(error) not in findings:
            findings.append(str(error))
        return {}
    if left_out:
        findings.append(
            f"{path} holds files that are left out. Given {len(left_out)}, such as "
            f"{left_out[0]!r} (macOS adds such). Pack it again without: COPYFILE_DISABLE=1 tar."
        )
    return samples


def _wrong(where: str, sample: Mapping[str, Member]) -> list[str]:
    """What is wrong with a sample."""
    found, videos = [], video_of(sample)
    record = sample.get("json")
    if len(videos) > 1 or not (videos or record):
        found.append(
            f"{where} is no sample. Given {', '.join(sample)}. Give it one video, or one record "
            "(.json) with a prompt."
        )
    try:
        if record is not None:
            text_of(read_record(record), where, needed=not videos)
    except ValueError as error:
        found.append(str(error))
    for video in videos:
        try:
            probe(video)
        except VideoError as error:
            found.append(str(error))
    return found
