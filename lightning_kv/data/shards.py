"""Prompt shards: tar files of prompts, with an index that says what must be in them.

Prompts are small, so every rank reads every tar; who gets which is decided afterwards.
"""

from __future__ import annotations

import hashlib
import io
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

SCHEMA = 1
INDEX = "index.json"
SLUG = 64  # characters: the longest text that a prompt key spells out


class PromptSample(NamedTuple):
    """One prompt of a run.

    Args:
        key: Name of the prompt in results, made of its text and its world seed.
        prompt: The text the model is given.
        world_seed: Seed (63 bits) of whatever is drawn for this prompt.
    """

    # A named tuple because Lightning rebuilds every batch and cannot rebuild a frozen dataclass.
    key: str
    prompt: str
    world_seed: int


@dataclass(frozen=True)
class Shard:
    """What the index says about one tar file.

    Args:
        file: Name of the file, in the folder of the index.
        samples: Prompts in it.
        bytes: Its size.
        sha256: Its checksum, 64 hexadecimal digits.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A set of prompt shards.

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
        """Prompts in the whole set."""
        return sum(shard.samples for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """The tar files, in the order in which they are read."""
        return [self.folder / shard.file for shard in self.shards]


def write_prompt_shards(
    samples: Iterable[tuple[str, Mapping[str, Any]]], folder: str | Path, name: str, per_shard: int
) -> ShardIndex:
    """Write a set of prompts as tar files and their index; equal input gives equal bytes.

    Args:
        samples: Pairs of a key (``[a-z0-9_-]+``, up to 90 characters) and a record that can be
            written as JSON and has the text under ``"prompt"``.
        folder: Where to write; made where it is missing.
        name: Name of the set; the files are called ``<name>-000000.tar`` and so on.
        per_shard: Prompts per file.

    Raises:
        ValueError: A name, a key or a record is not allowed, a key comes twice, there is no
            prompt, or ``per_shard`` is not positive.
    """
    folder, samples = Path(folder), list(samples)
    _check_set(samples, name, per_shard)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        content = _tar(part)
        file = f"{name}-{number:06d}.tar"
        (folder / file).write_bytes(content)
        checksum = hashlib.sha256(content).hexdigest()
        shards.append(Shard(file, len(part), len(content), checksum))
    index = ShardIndex(folder, name, tuple(shards))
    record = {
        "schema": SCHEMA,
        "name": name,
        "samples": index.samples,
        "shards": [asdict(shard) for shard in shards],
    }
    # Last, so that an interrupted run leaves no index that vouches for half a set.
    (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return index


def read_index(folder_or_index: str | Path) -> ShardIndex:
    """Read the index of a set and check every shard against it.

    Args:
        folder_or_index: The folder of the set, or its ``index.json``.

    Raises:
        ValueError: There is no index, it cannot be understood, or a shard is missing or has
            another size or checksum than the index says; the message names the file.
    """
    path = Path(folder_or_index)
    path = path / INDEX if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            "There is no index of prompt shards. "
            f"Looked for {path}. Give a folder that write_prompt_shards has written."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in record["shards"])
        index = ShardIndex(path.parent, record["name"], shards)
        sound = record["schema"] == SCHEMA and record["samples"] == index.samples > 0
        sound = sound and all(Path(shard.file).name == shard.file for shard in shards)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(
            "The index of prompt shards cannot be used. "
            f"{path} is not an index of schema {SCHEMA} whose samples add up and whose shards lie "
            "beside it. Write the set again with write_prompt_shards."
        )
    for shard, tar in zip(index.shards, index.paths, strict=True):
        _check_shard(shard, tar)
    return index


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
            tar_file_expander,
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


def _first(source: Iterable[Any], limit: int | None) -> Iterator[Any]:
    return islice(source, limit)


def _prompts(source: Iterable[dict[str, Any]], seed: int) -> Iterator[PromptSample]:
    for sample in source:
        record = json.loads(sample.get("json", "null"))
        text = _text_of(record, f"{sample['__key__']!r} of {sample['__url__']}")
        world_seed = world_seed_of(seed, sample["__key__"])
        yield PromptSample(prompt_key(text, world_seed), text, world_seed)


def _check_set(samples: list[tuple[str, Mapping[str, Any]]], name: str, per_shard: int) -> None:
    _check_name(name, "The name of the set")
    for key, record in samples:
        _check_name(key, "The key of a sample")
        _text_of(record, repr(key))
    repeated = [key for key, count in Counter(key for key, _ in samples).items() if count > 1]
    if repeated:
        raise ValueError(
            "A key stands for two samples. "
            f"The set {name!r} repeats {', '.join(repeated[:3])}. Number the keys."
        )
    if per_shard < 1 or not samples:
        raise ValueError(
            "There is nothing to write. "
            f"The set {name!r} has {len(samples)} prompts, {per_shard} per shard. "
            "Give at least one prompt and per_shard=1 or more."
        )


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(r"[a-z0-9_-]{1,90}", name):
        raise ValueError(
            f"{what} is not allowed. It is {name!r}. "
            "Use 1 to 90 small letters, digits, '_' and '-'; webdataset ends a key at its first "
            "dot, and tar allows a member 100 characters."
        )


def _text_of(record: Any, what: str) -> str:
    text = record.get("prompt") if isinstance(record, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"A sample holds no prompt. {what} has the record {record!r}. "
            'Each record looks like {"prompt": "dusk fast n13 left"}; more fields may follow.'
        )
    return text


def _tar(samples: Iterable[tuple[str, Mapping[str, Any]]]) -> bytes:
    """Pack records without anything that differs between runs: no time, no owner, sorted keys."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, user="", group="", mtime=0, encoder=False) as sink:
        for key, record in samples:
            text = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False)
            sink.write({"__key__": key, "json": text.encode()})
    return buffer.getvalue()


def _check_shard(shard: Shard, path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b""
    checksum = hashlib.sha256(content).hexdigest()
    if len(content) != shard.bytes or checksum != shard.sha256:
        raise ValueError(
            "A prompt shard is missing or damaged. "
            f"{path} has {len(content)} bytes and sha256 {checksum[:12]}, the index says "
            f"{shard.bytes} and {shard.sha256[:12]}. Copy the file again, or write the set again."
        )
