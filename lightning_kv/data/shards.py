"""Shards: tar files of prompts or of videos, with an index that says what must be in them.

A sample of a tar is what lies under one key: ``000.json`` with the prompt and, in a set of videos,
``000.mp4``. Prompts are small, so every rank reads every tar of theirs; who gets which is decided
afterwards. How videos are dealt says :mod:`lightning_kv.data.datamodule`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from lightning_kv.data.records import as_json, record_of, text_of
from lightning_kv.data.tars import grouped, is_hidden
from lightning_kv.data.videos import VideoFile
from lightning_kv.utilities.files import checksum

SCHEMA = 1
INDEX = "index.json"
SLUG = 64  # characters: the longest text that a prompt key spells out


class PromptSample(NamedTuple):
    """One prompt of a run.

    Args:
        key: Name of the prompt in results, made of its text and its world seed.
        prompt: The text the model is given.
        world_seed: Seed (63 bits) of whatever is drawn for this prompt.
        video: Whose first frames a rollout is given; None where it is not given those of a video.
    """

    # A named tuple because Lightning rebuilds every batch and cannot rebuild a frozen dataclass.
    key: str
    prompt: str
    world_seed: int
    video: VideoFile | None = None


@dataclass(frozen=True)
class Shard:
    """What the index says about one tar file.

    Args:
        file: Name of the file, in the folder of the index.
        samples: Prompts or videos in it.
        bytes: Its size.
        sha256: Its checksum, 64 hexadecimal digits.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A set of shards, of prompts or of videos.

    Args:
        folder: Where the shards lie.
        name: Name of the set.
        shards: The shards, in the order in which they are read.
    """

    folder: Path
    name: str
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Prompts or videos in the whole set."""
        return sum(shard.samples for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """The tar files, in the order in which they are read."""
        return [self.folder / shard.file for shard in self.shards]


Files = Mapping[str, "bytes | Path"]
"""Files of a sample by extension: what they hold, or where that lies."""


def write_prompt_shards(
    samples: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | Path,
    name: str,
    per_shard: int,
    replaced: Iterable[Path] = (),
) -> ShardIndex:
    """Write a set of prompts as tar files and their index; equal input gives equal bytes.

    Args:
        samples: Pairs of a key (``[a-z0-9_-]+``, up to 90 characters) and a record that can be
            written as JSON and has the text under ``"prompt"``.
        folder: Where to write; made where it is missing.
        name: Name of the set; the files are called ``<name>-000000.tar`` and so on.
        per_shard: Prompts per file.
        replaced: Tars of an earlier set, which go.

    Raises:
        ValueError: A name, a key or a record is not allowed, a key comes twice, there is no
            prompt, or ``per_shard`` is not positive.
    """
    samples = list(samples)
    for key, record in samples:
        text_of(record, repr(key))
    files = [(key, {"json": as_json(record)}) for key, record in samples]
    return write_shards(files, folder, name, per_shard, replaced=replaced)


def write_shards(
    samples: Iterable[tuple[str, Files]],
    folder: str | Path,
    name: str,
    per_shard: int,
    shard_bytes: int | None = None,
    replaced: Iterable[Path] = (),
) -> ShardIndex:
    """Write samples of any kind as tar files and their index; equal input gives equal bytes.

    Args:
        samples: Pairs of a key and its files, as `write_prompt_shards` says.
        folder: Where to write; made where it is missing.
        name: Name of the set.
        per_shard: Samples per tar, at most.
        shard_bytes: Bytes of files per tar, at most, unless one sample alone has more; None: any.
        replaced: Tars of an earlier set, which go.

    Raises:
        ValueError: As `write_prompt_shards`.
    """
    folder, samples = Path(folder), list(samples)
    _check_set(samples, name, per_shard, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    # An interrupted run must leave no index that vouches for half a set, its own or an older one.
    (folder / INDEX).unlink(missing_ok=True)
    for tar in replaced:
        tar.unlink(missing_ok=True)
    shards = []
    for number, part in enumerate(_parts(samples, per_shard, shard_bytes)):
        path = folder / f"{name}-{number:06d}.tar"
        _pack(path, part)
        shards.append(Shard(path.name, len(part), path.stat().st_size, checksum(path)))
    index = ShardIndex(folder, name, tuple(shards))
    record = {
        "schema": SCHEMA,
        "name": name,
        "samples": index.samples,
        "shards": [asdict(shard) for shard in shards],
    }
    (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return index


def _parts(
    samples: list[tuple[str, Files]], most: int, bound: int | None
) -> Iterator[list[tuple[str, Files]]]:
    part: list[tuple[str, Files]] = []
    held = 0
    for sample in samples:
        size = sum(map(_size, sample[1].values()))
        if part and (len(part) == most or (bound is not None and held + size > bound)):
            yield part
            part, held = [], 0
        part.append(sample)
        held += size
    yield part


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _pack(path: Path, samples: Iterable[tuple[str, Files]]) -> None:
    """Pack samples without anything that differs between runs: no time, no owner."""
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as sink,
    ):
        for key, files in samples:
            whole = {e: c.read_bytes() if isinstance(c, Path) else c for e, c in files.items()}
            sink.write({"__key__": key, **whole})


def read_index(folder_or_index: str | Path, contents: bool = True) -> ShardIndex:
    """Read the index of a set and check every shard against it.

    Args:
        folder_or_index: The folder of the set, or its ``index.json``.
        contents: Whether to read every shard from end to end. Without it their presence and their
            sizes are checked, and whoever reads a shard checks the rest (`check_shard`).

    Raises:
        ValueError: As `load_index`; or a shard is missing, is no tar, or has another size, checksum
            or number of samples than the index says; the message names the file.
    """
    index = load_index(folder_or_index)
    for shard, tar in zip(index.shards, index.paths, strict=True):
        check_shard(shard, tar, contents)
    return index


def load_index(folder_or_index: str | Path) -> ShardIndex:
    """Read the index of a set without a look at its shards.

    Raises:
        ValueError: There is no index, or it cannot be understood.
    """
    path = Path(folder_or_index)
    path = path / INDEX if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            "There is no index of shards. "
            f"Looked for {path}. Give a folder that lightning-kv shards make has written."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in record["shards"])
        index = ShardIndex(path.parent, record["name"], shards)
        sound = record["schema"] == SCHEMA and record["samples"] == index.samples > 0
        sound = sound and len({shard.file for shard in shards}) == len(shards)
        sound = sound and all(map(_is_sound, shards))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            "The index of shards cannot be used. "
            f"{path} is not an index of schema {SCHEMA} whose samples add up and whose shards lie "
            "beside it. Write the set again with lightning-kv shards make."
        )
    return index


def _is_sound(shard: Shard) -> bool:
    numbers = all(type(each) is int and each >= 0 for each in (shard.samples, shard.bytes))
    name = shard.file
    beside = "/" not in name and "\\" not in name and name not in ("", ".", "..")
    return numbers and beside and isinstance(shard.sha256, str)


def check_shard(shard: Shard, path: Path, contents: bool = True) -> None:
    """Compare a shard with what the index says.

    Raises:
        ValueError: As `read_index`.
    """
    size = path.stat().st_size if path.is_file() else 0
    digest = checksum(path) if contents and size == shard.bytes and path.is_file() else ""
    if size != shard.bytes or not path.is_file() or (contents and digest != shard.sha256):
        raise ValueError(
            "A shard is missing or damaged. "
            f"{path} has {size} bytes and sha256 {digest[:12] or 'unread'}, the index says "
            f"{shard.bytes} and {str(shard.sha256)[:12]}. Copy the file again, or write the set "
            "again."
        )
    if contents and (held := len(grouped(path))) != shard.samples:
        raise ValueError(
            "The index of shards tells another number of samples than its shard holds. "
            f"{path} holds {held}, the index says {shard.samples}. Write the set again with "
            "lightning-kv shards make."
        )


def world_seed_of(seed: int, sample_key: str) -> int:
    """Seed of the world of one sample: 63 bits, the same on every machine.

    Args:
        seed: Seed of the data of the run.
        sample_key: Key of the sample in its shard.

    >>> world_seed_of(0, "panorama-fast13-0007")
    6681460545379028318
    """
    digest = hashlib.sha256(f"{seed}/{sample_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_key(text: str, world_seed: int) -> str:
    """Name of a prompt in results: its text, then the last 8 hex digits of its world seed.

    The text is spelled out where it consists of small letters, digits and single blanks, at most
    64 characters; otherwise its beginning is, with 8 digits of its checksum.

    >>> prompt_key("night fast n13 left", 0x1234ABCD)
    'night-fast-n13-left-1234abcd'
    >>> prompt_key("A cat, a hat.", 0x1234ABCD)
    'a-cat-a-hat-1e67f213-1234abcd'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not slug or slug.replace("-", " ") != text or len(slug) > SLUG:
        checksum = hashlib.sha256(text.encode()).hexdigest()[:8]
        slug = f"{slug[: SLUG - 9].strip('-')}-{checksum}".lstrip("-")
    return f"{slug}-{world_seed & 0xFFFFFFFF:08x}"


class PromptShards(webdataset.DataPipeline):
    """The prompts of a set in their fixed order.

    Args:
        index: The set, from `read_index`.
        seed: Seed of the worlds.
        limit: How many prompts of the set belong to the run, from its beginning; None for all.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            partial(_open_shards, index.paths),
            partial(tar_file_expander, select_files=_is_read),
            group_by_keys,
            partial(_first, limit=limit),
            partial(_prompts, seed=seed),
        )


def _open_shards(paths: Iterable[Path]) -> Iterator[dict[str, str | BinaryIO]]:
    """Open the tar files one after the other.

    With its security switch on, webdataset runs no commands and unpickles nothing, but opens no
    local file either; so the files are opened here. ``WDS_SECURE=0`` in the environment keeps
    the switch as it is.
    """
    if hasattr(webdataset.utils, "enforce_security") and "WDS_SECURE" not in os.environ:
        webdataset.utils.enforce_security = True
    for path in paths:
        with path.open("rb") as stream:
            yield {"url": str(path), "stream": stream}


def _is_read(name: str) -> bool:
    return not is_hidden(name)


def _first(source: Iterable[Any], limit: int | None) -> Iterator[Any]:
    return islice(source, limit)


def _prompts(source: Iterable[dict[str, Any]], seed: int) -> Iterator[PromptSample]:
    for sample in source:
        where = f"{sample['__key__']!r} of {sample['__url__']}"
        text = text_of(record_of(sample.get("json", b"null"), where), where)
        world_seed = world_seed_of(seed, sample["__key__"])
        yield PromptSample(prompt_key(text, world_seed), text, world_seed)


def _check_set(
    samples: list[tuple[str, Files]], name: str, per_shard: int, shard_bytes: int | None
) -> None:
    _check_name(name, "The name of the set")
    for key, _ in samples:
        _check_name(key, "The key of a sample")
    repeated = [key for key, count in Counter(key for key, _ in samples).items() if count > 1]
    if repeated:
        raise ValueError(
            "A key stands for two samples. "
            f"The set {name!r} repeats {', '.join(repeated[:3])}. Number the keys."
        )
    if per_shard < 1 or not samples or (shard_bytes is not None and shard_bytes < 1):
        raise ValueError(
            "There is nothing to write. "
            f"The set {name!r} has {len(samples)} samples, {per_shard} (and {shard_bytes} bytes) "
            "per shard. Give at least one sample, and 1 or more per shard."
        )


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(r"[a-z0-9_-]{1,90}", name):
        raise ValueError(
            f"{what} is not allowed. It is {name!r}. "
            "Use 1 to 90 small letters, digits, '_' and '-'; webdataset ends a key at its first "
            "dot, and tar allows a member 100 characters."
        )
