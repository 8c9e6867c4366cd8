"""Tar files, read where they lie: a member is a range of bytes of an uncompressed tar.

webdataset hands out members as bytes in memory. A video is read from disk instead, so that its
length does not matter; how a member's name divides into a key and an extension is webdataset's.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

BLOCK = tarfile.BLOCKSIZE
WHOLE = "Copy the file again from where it came, or pack it again with lightning-kv shards make."
META = re.compile(r"__[^/]*__($|/)")  # what webdataset keeps to itself


class Member(NamedTuple):
    """A file inside a tar, which can be opened where it lies.

    Args:
        tar: The tar file.
        name: Its name in there.
        start: Where in the tar it begins, in bytes.
        size: Its length in bytes.
    """

    # A named tuple, as PromptSample is, which may hold one.
    tar: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}::{self.name}"

    @property
    def suffix(self) -> str:
        """As of a path, with its dot."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it for reading; other modes there are none."""
        assert mode == "rb"
        return io.BufferedReader(_Range(self), 2**16)


class _Range(io.RawIOBase):
    """The bytes of a member as a file of their own."""

    def __init__(self, member: Member) -> None:
        self.file, self.member, self.at = member.tar.open("rb", buffering=0), member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.member.size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning of the file")
        self.at = base + offset
        return self.at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer)[: max(0, self.member.size - self.at)]
        self.file.seek(self.member.start + self.at)
        count = self.file.readinto(view)
        self.at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def members(tar: Path) -> list[Member]:
    """List the files of a tar, after looking at all of its heads.

    Hidden files (``._000.mp4`` of macOS) and those of webdataset's own are left out.

    Args:
        tar: The file.

    Returns:
        Its members in the order in which they lie.

    Raises:
        ValueError: It is no whole uncompressed tar; or a name in it comes twice, leads out of the
            folder, or is not that of a plain file.
    """
    found: dict[str, Member] = {}
    for info in _heads(tar):
        _check_head(tar, info)
        if info.isdir() or is_hidden(info.name):
            continue
        if info.name in found:
            raise ValueError(
                f"{tar} holds two files of one name. Given {info.name!r} twice. Give every file a "
                "name of its own, and pack them again."
            )
        found[info.name] = Member(tar, info.name, info.offset_data, info.size)
    return list(found.values())


def grouped(tar: Path) -> dict[str, dict[str, Member]]:
    """Samples of a tar: what lies together under one key, by extension in small letters.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tar = Path(folder) / "a.tar"
    ...     with tarfile.open(tar, "w") as file:
    ...         for name in ("000.mp4", "000.latents.safetensors", "001.mp4"):
    ...             file.addfile(tarfile.TarInfo(name))
    ...     {key: list(sample) for key, sample in grouped(tar).items()}
    {'000': ['mp4', 'latents.safetensors'], '001': ['mp4']}

    Raises:
        ValueError: As `members`; or a key comes again after another one.
    """
    found: dict[str, dict[str, Member]] = {}
    last = None
    for member in members(tar):
        key, extension = base_plus_ext(member.name)
        key, extension = key.removeprefix("./"), extension.lower()
        sample = found.setdefault(key, {})
        if (sample and key != last) or extension in sample:
            raise ValueError(
                f"{tar} holds a key twice. Given {key!r} ({member.name!r} comes after {last!r}). "
                "Give every sample its own key and let its files lie together (tar --sort=name)."
            )
        sample[extension] = member
        last = key
    return found


def is_hidden(name: str) -> bool:
    """Whether a member is left out: it is hidden, has no extension, or is webdataset's own."""
    parts = PurePosixPath(name).parts
    return (
        not parts
        or any(part.startswith(".") for part in parts)
        or parts[0] == "__MACOSX"
        or META.match(name) is not None
        or base_plus_ext(name)[0] is None
    )


def hidden(tar: Path) -> list[str]:
    """Names of a tar's files that are left out."""
    return [info.name for info in _heads(tar) if not info.isdir() and is_hidden(info.name)]


def _heads(tar: Path) -> Iterator[tarfile.TarInfo]:
    end = 0
    try:
        with tarfile.open(tar, "r:") as content:  # never decompresses
            for info in content:
                end = max(end, info.offset_data)
                if info.isreg():
                    end = max(end, info.offset_data - -info.size // BLOCK * BLOCK)
                yield info
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{tar} is no whole, uncompressed tar. Given {_kind(tar, error)}. {WHOLE}"
        ) from error
    # tarfile stops without a word at a damaged head; what is whole ends with two empty blocks.
    with tar.open("rb") as file:
        file.seek(end)
        rest = file.read(2 * BLOCK)
    if len(rest) < 2 * BLOCK or any(rest):
        raise ValueError(
            f"{tar} is damaged or cut short. Given {tar.stat().st_size} bytes, of which the last "
            f"file that can be found ends at {end} and no end of the tar follows. {WHOLE}"
        )


def _kind(tar: Path, error: Exception) -> str:
    """What a file that is no tar looks like."""
    if not tar.is_file():
        return "no such file"
    with tar.open("rb") as file:
        head = file.read(64)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
    kinds |= {b"PK": "zip", b"<": "HTML or XML", b"version https://git-lfs": "a pointer of Git LFS"}
    named = (kind for start, kind in kinds.items() if head.lstrip().startswith(start))
    return next(named, "nothing" if not head else str(error))


def _check_head(tar: Path, info: tarfile.TarInfo) -> None:
    name = info.name
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or re.search(r"[\x00-\x1f]|^\w:", name):
        raise ValueError(
            f"{tar} holds a name that leads out of its folder. Given {name!r}. Give names such as "
            "'000123.mp4', without '..' and without a first '/'."
        )
    if not (info.isdir() or info.isreg()) or info.issparse():
        raise ValueError(
            f"{tar} holds something that is no plain file. Given {name!r} of type {info.type!r} "
            "(links, devices and files with holes are such). Pack the file itself (tar -h)."
        )
