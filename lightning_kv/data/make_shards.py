"""Shards out of what people have: lists of prompts, folders of videos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from lightning_kv.data.pairs import videos_in
from lightning_kv.data.prompt_lists import read_captions, read_prompts
from lightning_kv.data.records import as_json
from lightning_kv.data.shards import (
    INDEX,
    Files,
    ShardIndex,
    load_index,
    write_prompt_shards,
    write_shards,
)
from lightning_kv.data.videos import SUFFIXES, probe

PROMPTS = 512  # per shard
VIDEOS = 256
BYTES = 512 * 2**20  # of videos per shard
KEY = 80  # characters


def make_prompt_shards(
    source: str | Path,
    out: str | Path,
    name: str | None = None,
    per_shard: int = PROMPTS,
    replaced: Iterable[Path] = (),
) -> ShardIndex:
    """Write the prompts of a list as shards; equal input gives equal bytes.

    Args:
        source: A ``.txt``, ``.csv`` or ``.json`` file; see `read_prompts`.
        out: Folder to write to; made where it is missing.
        name: Name of the set, with which its keys begin; None: that of the file.
        per_shard: Prompts per tar.
        replaced: Tars of an earlier set, which go; see `earlier_set`.

    Returns:
        The set.

    Raises:
        ValueError: The list or the name cannot be used; nothing is written then.
    """
    source = Path(source)
    records = [{"source": source.name} | record for record in read_prompts(source)]
    name = name_of(source) if name is None else name
    samples = [(f"{name}-{number:06d}", record) for number, record in enumerate(records)]
    return write_prompt_shards(samples, out, name, per_shard, replaced)


def make_video_shards(
    folder: str | Path,
    out: str | Path,
    name: str | None = None,
    shard_videos: int = VIDEOS,
    shard_bytes: int = BYTES,
    captions: str | Path | None = None,
    replaced: Iterable[Path] = (),
) -> ShardIndex:
    """Write the videos of a folder as shards; equal input gives equal bytes.

    A sample is the file as it is, and a record of its prompt, name, rate, frames and size. Every
    video is walked through before anything is written.

    Args:
        folder: Folder of videos; see `videos_in`.
        out: Folder to write to; made where it is missing.
        name: Name of the set; None: that of the folder.
        shard_videos: Videos per tar, at most.
        shard_bytes: Bytes of videos per tar, at most, unless one video alone has more.
        captions: Table of captions; None: files beside the videos. See `read_captions`.
        replaced: Tars of an earlier set, which go; see `earlier_set`.

    Returns:
        The set.

    Raises:
        ValueError: There are no videos, one of them cannot be read, or a caption cannot be used;
            nothing is written then.
    """
    folder = Path(folder)
    videos = videos_in(folder)
    if not videos:
        raise ValueError(
            f"There are no videos in {folder}. Given none of {', '.join(SUFFIXES)}. Give a folder "
            "of videos, or a list of prompts."
        )
    said = read_captions(videos, captions)
    samples = [(_key(key), _files(key, path, said[key])) for key, path in videos.items()]
    name = name_of(folder) if name is None else name
    return write_shards(samples, out, name, shard_videos, shard_bytes, replaced)


def name_of(source: Path) -> str:
    """Name of the set of a list or folder, where nobody gives another."""
    if source.is_dir():
        return _slug(source.absolute().name) or "videos"
    return _slug(source.stem) or "prompts"


def earlier_set(out: Path, source: Path, name: str, force: bool) -> list[Path]:
    """Tars that a new set takes the place of, where nothing else would be lost or mixed with it.

    Args:
        out: Folder to write to.
        source: What the set is made of.
        name: Name of the set.
        force: Whether a set of this name, whole or interrupted, may be replaced.

    Raises:
        ValueError: ``out`` is the source or a file, holds anything else than a set of this name, or
            holds one that may not be replaced.
    """
    if out.resolve() == source.resolve() or (out.exists() and not out.is_dir()):
        raise ValueError(
            f"The shards cannot go to {out}: that is the source itself, or a file. They are made "
            f"of {source}. Give --out a folder of its own."
        )
    # A file of the system, such as .DS_Store, belongs to nobody.
    held = {path.name for path in out.glob("*") if not path.name.startswith(".")}
    tars = {each for each in held if re.fullmatch(rf"{re.escape(name)}-\d{{6}}\.tar", each)}
    there = "files of an interrupted set of this name"
    if INDEX in held:
        index = _index_of(out)
        there = "another index" if index is None else f"the set {index.name!r}"
        own = index is not None and index.name == name
        tars = {shard.file for shard in index.shards} if own else set()
        held -= {INDEX} if own else set()
    if other := sorted(held - tars):
        raise ValueError(
            f"{out} holds what is not of the set {name!r}: {other[0]!r}"
            f"{f' and {len(other) - 1} more' if other[1:] else ''}"
            f"{f', of {there}' if INDEX in held else ''}. Give --out a folder that is empty or new."
        )
    if tars and not force:
        raise ValueError(
            f"{out} is not empty: it holds {there}. Give another --out, or --force to replace it."
        )
    return [out / each for each in sorted(tars)]


def _index_of(folder: Path) -> ShardIndex | None:
    try:
        return load_index(folder)
    except ValueError:
        return None


def _files(key: str, path: Path, prompt: str | None) -> Files:
    info = probe(path)
    record = {
        "name": key,
        "fps": float(info.fps),
        "frames": info.frames,
        "height": info.height,
        "width": info.width,
        **({} if prompt is None else {"prompt": prompt}),
    }
    return {"json": as_json(record), path.suffix[1:].lower(): path}


def _key(path: str) -> str:
    """Key of a video in its shard: its path where that may be one, else what can be kept of it."""
    if re.fullmatch(rf"[a-z0-9_-]{{1,{KEY}}}", path):
        return path
    digest = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{_slug(path)[: KEY - 9].strip('-')}-{digest}".lstrip("-")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:KEY]
