"""Pairs of videos: which file is compared with which, and frame with frame."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightning_kv.data.shards import INDEX
from lightning_kv.data.video_shards import videos_in_shards
from lightning_kv.data.videos import SUFFIXES, VideoError, VideoFile, VideoInfo, probe, read

COLUMNS = ("reference", "candidate", "key", "prompt")
CHOICES = {
    "length": ("equal", "shortest"),
    "size": ("equal", "resize"),
    "fps": ("equal", "ignore"),
}
SAME_RATE = 5e-4  # relative: containers round rates, and 30 differs from 29.97 by twice that


class Pair(NamedTuple):
    """A candidate and what it is compared with.

    Args:
        key: Name of the pair in results.
        reference: The video that is right.
        candidate: The video that is judged.
        prompt: The text that both were made from; empty where unknown.
    """

    key: str
    reference: VideoFile
    candidate: VideoFile
    prompt: str = ""


@dataclass(frozen=True)
class Pairs:
    """Pairs, and what has no partner.

    Args:
        pairs: The pairs, in order of their keys (folders) or lines (CSV); one or more.
        reference_alone: Keys of references without a candidate.
        candidate_alone: Keys of candidates without a reference.
    """

    pairs: tuple[Pair, ...]
    reference_alone: tuple[str, ...] = ()
    candidate_alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alignment:
    """What is done where two videos differ in shape.

    Args:
        length: ``"equal"`` refuses different counts of frames; ``"shortest"`` leaves out what the
            longer video has more at its end.
        size: ``"equal"`` refuses different sizes; ``"resize"`` brings the candidate to the size of
            the reference (bicubic with antialias).
        fps: ``"equal"`` refuses different frame rates; ``"ignore"`` compares the n-th frame with
            the n-th frame all the same.

    Raises:
        ValueError: Another word.

    Example:
        >>> Alignment(length="shortest").recipe
        'length=shortest,size=equal,fps=equal'
    """

    length: str = "equal"
    size: str = "equal"
    fps: str = "equal"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Videos cannot be aligned so. Given {name} {getattr(self, name)!r}. Give one "
                    f"of {', '.join(map(repr, choices))}."
                )

    @property
    def recipe(self) -> str:
        """How the videos were brought together, as results record it."""
        size = "resize(bicubic,antialias)" if self.size == "resize" else self.size
        return f"length={self.length},size={size},fps={self.fps}"

    def check(self, reference: VideoInfo, candidate: VideoInfo) -> None:
        """Refuse two videos that cannot be compared frame by frame.

        Args:
            reference: The video that is right.
            candidate: The video that is judged.

        Raises:
            VideoError: Their counts of frames, sizes or rates differ and this alignment does not
                say what to do then.
        """
        found = [
            (given, option)
            for field, given, option in _differences(reference, candidate)
            if getattr(self, field) == "equal"
        ]
        if found:
            given, options = map(", ".join, zip(*found, strict=True))
            raise VideoError(
                f"{reference.path} and {candidate.path} cannot be compared frame by frame. Given "
                f"{given}. Give {options}; or give videos that are alike."
            )


def videos_in(folder: Path) -> dict[str, Path]:
    """Find the videos of a folder, down to its bottom.

    Files that are no videos by their suffix are left alone, and so are hidden ones.

    Args:
        folder: The folder.

    Returns:
        Key and file of each, in the order of their paths; the key is the path inside the folder,
        without the suffix.

    Raises:
        ValueError: The folder is not there, or has a key twice (two suffixes).
    """
    if not folder.is_dir():
        raise ValueError(f"There is no such folder of videos. Given {folder}. Give a folder.")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        key = inside.with_suffix("").as_posix()
        if key in found:
            raise ValueError(
                f"Two videos have one name. Given {found[key]} and {file}. Give one of them "
                "another name, or take it away."
            )
        found[key] = file
    return found


def videos_of(folder: Path) -> dict[str, VideoFile]:
    """The videos of a folder of videos or of shards by key, in their order.

    A folder is one of shards where it has an ``index.json`` and tars; every shard is compared with
    its checksum.

    Raises:
        ValueError: As `videos_in` and `videos_in_shards`.
    """
    if (folder / INDEX).is_file() and any(folder.glob("*.tar")):
        return {sample.key: sample.video for sample in videos_in_shards(folder, contents=True)}
    return dict(videos_in(folder))


def pair_folders(reference: str | Path, candidate: str | Path) -> Pairs:
    """Pair the videos of two folders, of files or of shards, by name.

    What counts as a video, and the key that pairs two of them, says :func:`videos_of`.

    Args:
        reference: Folder of the videos that are right.
        candidate: Folder of the videos that are judged.

    Returns:
        The pairs, and the keys that only one folder has.

    Raises:
        ValueError: A folder is not there, has a key twice (two suffixes), or no key is in both.
    """
    ours, theirs = videos_of(Path(reference)), videos_of(Path(candidate))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError(
            f"No video of {reference} has a partner in {candidate}. Given {_some(ours)} and "
            f"{_some(theirs)}. Give partners the same name, or say with --pairs FILE.csv which "
            "belongs to which."
        )
    return Pairs(
        tuple(Pair(key, ours[key], theirs[key]) for key in common),
        tuple(sorted(ours.keys() - theirs.keys())),
        tuple(sorted(theirs.keys() - ours.keys())),
    )


def pair_csv(path: str | Path) -> Pairs:
    """Read pairs from a table.

    Its first line names the columns: ``reference`` and ``candidate`` (paths, from the folder of the
    table on), and where wanted ``key`` (else the name of the reference without suffix) and
    ``prompt``.

    Args:
        path: The table, comma-separated, UTF-8.

    Returns:
        The pairs, in the order of the lines.

    Raises:
        ValueError: There is no such table, a column is missing or unknown, or a line is incomplete,
            names a file that is not there or repeats a key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no table of pairs. Given {path}. Give a CSV file.")
    pairs: dict[str, Pair] = {}
    for number, row in _rows(path):
        pair = _pair(f"{path}, line {number}", path.parent, row)
        if pair.key in pairs:
            raise ValueError(
                f"{path}, line {number}: a key comes again. Given {pair.key!r}. Give every pair "
                "its own in a column 'key'."
            )
        pairs[pair.key] = pair
    if not pairs:
        raise ValueError(f"{path} holds no pairs. Given 0 lines. Give one pair or more.")
    return Pairs(tuple(pairs.values()))


def read_pair(
    reference: str | VideoFile | VideoInfo,
    candidate: str | VideoFile | VideoInfo,
    alignment: Alignment | None = None,
    block: int = 8,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read two videos in step, a few frames at a time.

    Args:
        reference: The video that is right: the file, or what ``probe`` said about it.
        candidate: The video that is judged, likewise.
        alignment: What is done where they differ. None: they must be alike.
        block: Frames in a piece; the last may have fewer.

    Yields:
        Reference and candidate, uint8 ``[f, 3, H, W]`` each, RGB, equal shapes.

    Raises:
        VideoError: A file cannot be read (to its end), or the two differ and the alignment does not
            say what to do then.
        ValueError: The block is not positive.
    """
    alignment = alignment or Alignment()
    infos = [one if isinstance(one, VideoInfo) else probe(one) for one in (reference, candidate)]
    alignment.check(*infos)
    return _in_step(*(read(info, block, _size(infos[0])) for info in infos))


def _in_step(ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    # The alignment was checked, and a file gives as many frames as were counted or raises: so one
    # ends before the other only where that is wanted.
    for right, judged in zip(ours, theirs, strict=False):
        frames = min(len(right), len(judged))
        yield right[:frames], judged[:frames]


def _differences(ours: VideoInfo, theirs: VideoInfo) -> Iterator[tuple[str, str, str]]:
    """Field of the alignment, the values that differ, and the option that resolves it."""
    if ours.frames != theirs.frames:
        given = f"{ours.frames} and {theirs.frames} frames"
        yield "length", given, "--length shortest to leave out what is over"
    if _size(ours) != _size(theirs):
        given = f"sizes of {ours.width}x{ours.height} and {theirs.width}x{theirs.height}"
        yield "size", given, "--resize to bring the second to the size of the first"
    if abs(ours.fps - theirs.fps) > SAME_RATE * max(ours.fps, theirs.fps):
        given = f"rates of {float(ours.fps):.6g} and {float(theirs.fps):.6g} frames per second"
        yield "fps", given, "--fps ignore to compare n-th with n-th frames anyway"


def _size(info: VideoInfo) -> tuple[int, int]:
    return info.height, info.width


def _rows(path: Path) -> Iterator[tuple[int, dict[str | None, str | None]]]:
    """The lines of a table of pairs, numbered."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if not set(COLUMNS[:2]) <= set(columns) <= set(COLUMNS):
                given = ",".join(columns)[:80]
                raise ValueError(
                    f"The columns of {path} are not those of pairs. Given {given!r}. "
                    "Give a first line 'reference,candidate', and ',key' or ',prompt' where wanted."
                )
            for row in rows:
                yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as a table. Given {error}. Give a CSV file in UTF-8."
        ) from error


def _pair(where: str, folder: Path, row: dict[str | None, str | None]) -> Pair:
    """The pair of one line of a table."""
    cells = {name: (row[name] or "").strip() for name in COLUMNS if name in row}
    if None in row or not (cells["reference"] and cells["candidate"]):
        raise ValueError(
            f"{where}: no pair. Given {cells}. Give as many cells as the first line has columns, "
            "and quote a text that has commas."
        )
    files = folder / cells["reference"], folder / cells["candidate"]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{where}: no such file. Given {file}. Give paths from {folder} on, or whole ones."
            )
    return Pair(cells.get("key") or files[0].stem, *files, cells.get("prompt", ""))


def _some(videos: dict[str, VideoFile]) -> str:
    """A few names, and how many there are."""
    names = [repr(name) for name in islice(videos, 3)]
    return f"{len(videos)} videos ({', '.join([*names, '...'][: len(videos)])})"
